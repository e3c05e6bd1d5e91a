"""The train stage: shards to data/model, on one process or on the ranks of a Horovod job.

data/model/
  model.json, weights.safetensors   the best averaged weights by AP on val, and what rebuilds the model
  provenance.json                   with which versions, on what hardware
  dvclive/                          an epoch's figures, for `dvc metrics`, `dvc plots`, `dvc exp show`
"""

import sys
from pathlib import Path
from typing import Any

from effdet.config import model_config
from effdet.distributed import Keep, Ranks, connect, lost_ranks_named, train_elastically
from pipeline import local, params, params_check
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.launch import launch
from pipeline.launchers import WORKER, needs_launcher, preview
from pipeline.timings import run_stage

SHARDS = Path("data/shards")
OUT = Path("data/model")
MODULE = "pipeline.train"
DRY_RUN = "--dry-run"


def main() -> None:
    """Checks what can be checked without TensorFlow, then trains here or starts the ranks that do."""
    arguments = sys.argv[1:]
    if arguments not in ([], [WORKER], [DRY_RUN]):
        raise PipelineError(
            f"{MODULE}: takes {DRY_RUN} or nothing, got {' '.join(arguments)}; params.yaml says what to do"
        )
    settings, where = params.load(), local.load()
    if arguments == [DRY_RUN]:  # says how the ranks would be started
        print(preview(MODULE, settings.train.ranks, where), end="")
        return
    params_check.check(settings)  # download asked already, and is not asked again when another parameter changes
    manifest = read_json(SHARDS / "manifest.json", "manifest of the shards")
    config = model_config(settings.model.name, manifest["num_classes"], settings.model.image_size)
    if not arguments and needs_launcher(settings.train.ranks, where):
        launch(MODULE, settings.train.ranks, where)
        return
    from pipeline.training_run import Run  # here: who only starts ranks needs no TensorFlow

    def train(ranks: Ranks, kept: Any = None, keep: Keep | None = None) -> None:
        with lost_ranks_named():
            Run(settings, where, config, manifest, SHARDS, OUT, ranks, kept, keep).train()

    if where.elastic is not None and arguments == [WORKER]:
        train_elastically(train)
    else:
        train(connect(settings.train.ranks))


if __name__ == "__main__":
    run_stage("train", main)
