"""Makes a model's folder of published weights: `python -m pipeline.import_model MODEL --out FOLDER`.

MODEL is a TensorFlow checkpoint of google/automl or NVIDIA (folder, prefix, .tar.gz), a Keras .h5 or .safetensors file
of a detector, a training checkpoint or a model's folder. FOLDER gets model.json and weights.safetensors, which detect,
evaluate and train.init_from take.
"""

import argparse
from pathlib import Path

import numpy as np

from effdet.weights import published_variables
from pipeline.detectors import add_model_arguments
from pipeline.errors import PipelineError, run
from pipeline.files import written_whole
from pipeline.model_files import write_model
from pipeline.model_source import open_model


def main() -> None:
    arguments = _arguments()
    out: Path = arguments.out
    if out.exists():
        raise PipelineError(f"{out}: is there already; name a folder that is not")
    stored = open_model(
        arguments.source,
        arguments.model,
        tuple(arguments.image_size) if arguments.image_size else None,
        arguments.classes,
        not arguments.no_ema,
        arguments.allow_head_mismatch,
        arguments.apply_exif,
    )
    arrays = {name: np.asarray(variable) for name, variable in published_variables(stored.model).items()}
    weights = stored.weights
    with written_whole(out) as folder:
        folder.mkdir()
        write_model(
            folder,
            stored.config,
            stored.classes,
            arrays,
            kind=weights.kind,
            epoch=weights.epoch,
            step=weights.step,
            selected_by=weights.selected_by,
            apply_exif=stored.apply_exif,
        )
    height, width = stored.config.image_size
    print(
        f"{out}: {stored.config.name}, {height}x{width} pixels, {len(stored.classes)} classes, {weights.kind} weights"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.import_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="is made")
    parser.add_argument(
        "--allow-head-mismatch",
        action="store_true",
        help="where --classes are not as many as MODEL's, leave its class head out: it starts fresh, for training",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
