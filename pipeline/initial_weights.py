"""What training begins with: `train.init_from`, and which bytes those are."""

import hashlib
from pathlib import Path

import keras

from effdet import weight_sources
from effdet.config import ModelConfig
from effdet.weight_sources import Loaded
from pipeline.errors import PipelineError
from pipeline.files import checksum
from pipeline.model_files import MODEL_FILE, check_weights, read_description
from pipeline.params import IMAGENET, PARAMS_FILE, Train


def content_checksum(source: str | Path) -> str:
    """SHA-256, as "sha256:hex", of the file that is read of a source, or of its files' names and SHA-256 in order."""
    files = weight_sources.files(source)
    if len(files) == 1:
        return checksum(files[0], "sha256")
    lines = [f"{checksum(file, 'sha256')} {file.name}\n" for file in files]
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def identity(settings: Train) -> str | None:
    """What of `train.init_from` enters a run's fingerprint: the bytes of a path wherever it lies, else the word."""
    if settings.init_from in (None, IMAGENET):
        return settings.init_from
    return settings.init_checksum or content_checksum(settings.init_from)


def begin_with(model: keras.Model, config: ModelConfig, settings: Train) -> Loaded:
    """Gives the model the weights of `train.init_from`, which is not null.

    PipelineError where they are not those of `train.init_checksum`; EffdetError where they do not fit.
    """
    source = settings.init_from
    if source != IMAGENET:
        _check(str(source), settings.init_checksum)
    return weight_sources.load(model, config, str(source), allow_head_mismatch=settings.allow_head_mismatch)


def _check(source: str, expected: str | None) -> None:
    if (Path(source) / MODEL_FILE).is_file():
        check_weights(Path(source), read_description(Path(source)))
    found = content_checksum(source)
    if expected is None:
        print(f"{source} is {found}; `python -m pipeline.checksums` writes that into {PARAMS_FILE}, so that other")
        print("bytes there are a changed stage")
    elif found != expected:
        raise PipelineError(
            f"{source}: is {found}, and {PARAMS_FILE} says {expected} (train.init_checksum); restore the file, or take "
            "it as it is: `python -m pipeline.checksums`"
        )
