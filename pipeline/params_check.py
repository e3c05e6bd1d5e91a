"""What only the model library can say of params.yaml, asked before anything is fetched or made.

As a command it checks the whole file: `python -m pipeline.params_check`.
"""

import re
from pathlib import Path

from effdet.config import BACKBONES, model_config
from effdet.errors import EffdetError
from pipeline.errors import PipelineError, run
from pipeline.params import PARAMS_FILE, Params, load


def check(settings: Params, path: Path = PARAMS_FILE) -> None:
    """PipelineError for a model that is not of the family, an image size or a format it has not, a wrong expression."""
    try:
        config = model_config(settings.model.name, num_classes=1, image_size=settings.model.image_size)
    except EffdetError as error:
        raise PipelineError(f"{path}: {error}") from None
    try:
        re.compile(settings.train.freeze or "")
    except re.error as error:
        raise PipelineError(
            f"{path}: train.freeze: expected a regular expression, got {settings.train.freeze!r}: {error}"
        ) from None
    if "litert_int8" in settings.promote.formats and not BACKBONES[config.backbone].lite:
        raise PipelineError(
            f"{path}: promote.formats: litert_int8 is for lite models, {config.name} is none; take litert_float16"
        )


if __name__ == "__main__":
    run(lambda: check(load()))
