"""The train stage: shards to data/model, on one process or on the ranks of a Horovod job.

data/model/
  model.json, weights.safetensors   the best averaged weights by AP on val, and what rebuilds the model
  provenance.json                   with which versions, on what hardware
  dvclive/                          an epoch's figures, for `dvc metrics`, `dvc plots`, `dvc exp show`
"""

import sys
from pathlib import Path

from effdet.config import model_config
from effdet.distributed import connect
from pipeline import local, params, params_check
from pipeline.errors import PipelineError, run
from pipeline.files import read_json
from pipeline.launch import WORKER, launch

SHARDS = Path("data/shards")
OUT = Path("data/model")
MODULE = "pipeline.train"


def main() -> None:
    """Checks what can be checked without TensorFlow, then trains here or starts the ranks that do."""
    arguments = sys.argv[1:]
    if arguments not in ([], [WORKER]):
        raise PipelineError(f"{MODULE}: takes no arguments, got {' '.join(arguments)}; params.yaml says what to do")
    settings, where = params.load(), local.load()
    params_check.check(settings)  # download asked already, and is not asked again when another parameter changes
    manifest = read_json(SHARDS / "manifest.json", "manifest of the shards")
    config = model_config(settings.model.name, manifest["num_classes"], settings.model.image_size)
    if settings.train.ranks > 1 and not arguments:
        launch(MODULE, settings.train.ranks, where.hosts)
        return
    ranks = connect(settings.train.ranks)
    from pipeline.training_run import Run  # here: who only starts ranks needs no TensorFlow

    Run(settings, where, config, manifest, SHARDS, OUT, ranks).train()


if __name__ == "__main__":
    run(main)
