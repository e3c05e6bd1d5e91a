"""A trained model as files: model.json (configuration, class table, which weights, whether pictures are turned by
EXIF) beside weights.safetensors.

The same two files stand in data/model and in a release, and are read in one way. Beside training checkpoints lies
network.json, which is model.json without a word on weights.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np
from pydantic import ValidationError

from effdet.config import ModelConfig
from effdet.errors import EffdetError
from effdet.model import build
from effdet.weights import WEIGHTS_FILE as WEIGHTS_FILE
from effdet.weights import assign, load_weights, save_weights
from pipeline.class_table import Class
from pipeline.errors import PipelineError
from pipeline.files import checksum, read_json, write_json
from pipeline.settings import Section

FORMAT = 1
MODEL_FILE = "model.json"
NETWORK_FILE = "network.json"


class Weights(Section):
    """Which of the weights that training saw are kept."""

    kind: str  # "ema", or "raw" where there is no average
    epoch: int  # counted from 1; 0 where it is not known
    step: int  # likewise
    selected_by: str  # "val AP", "last", or "published" where others trained it
    # in model.json of weights.safetensors, as pipeline.files.checksum writes it; of a model that
    # pipeline.model_source opened elsewhere, of what it came from: pipeline.initial_weights.content_checksum
    sha256: str


class Network(Section):
    """network.json."""

    format: int
    model: dict[str, Any]  # ModelConfig's fields
    classes: list[Class]  # by class_id
    # pictures are turned as their EXIF orientation says; models that say nothing were trained on pictures as stored
    apply_exif: bool = False


class Description(Network):
    """model.json."""

    weights: Weights


Described = TypeVar("Described", bound=Network)


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model as it came from a folder."""

    config: ModelConfig
    classes: list[Class]
    weights: Weights
    model: keras.Model  # float32, with its weights
    apply_exif: bool  # takes pictures as effdet.preprocess.decode gives them with this


def write_model(
    folder: Path,
    config: ModelConfig,
    classes: Sequence[Class],
    arrays: Mapping[str, np.ndarray],
    kind: str,
    epoch: int,
    step: int,
    selected_by: str,
    apply_exif: bool,
) -> None:
    """Writes model.json and weights.safetensors into `folder`, which exists.

    `arrays` has every published name (effdet.weights.published_variables); `kind` is "ema" or "raw", `selected_by`
    "val AP", "last" or "published"; `apply_exif`: the model takes pictures turned as their EXIF orientation says.
    """
    save_weights(folder / WEIGHTS_FILE, arrays)
    sha256 = checksum(folder / WEIGHTS_FILE, "sha256")
    description = Description(
        format=FORMAT,
        model=dataclasses.asdict(config),
        classes=list(classes),
        apply_exif=apply_exif,
        weights=Weights(kind=kind, epoch=epoch, step=step, selected_by=selected_by, sha256=sha256),
    )
    write_json(folder / MODEL_FILE, description.model_dump(mode="json"))


def read_model(folder: Path) -> StoredModel:
    """Builds the model of a folder and gives it its weights. PipelineError where the files do not make one."""
    description = read_description(folder)
    weights_file = check_weights(folder, description)
    try:
        config = ModelConfig.from_dict(description.model)
        model = build(config)
        assign(model, load_weights(weights_file))
    except EffdetError as error:
        raise PipelineError(f"{folder}: {error}; train again with this version") from None
    return StoredModel(config, description.classes, description.weights, model, description.apply_exif)


def require_same_pictures(ours: bool, our_file: Path, theirs: bool, their_file: Path) -> None:
    """PipelineError unless apply_exif is the same in a model's and in its data's description."""
    if ours != theirs:
        raise PipelineError(
            f"{our_file}: apply_exif is {ours}, and {theirs} in {their_file}: the model would see pictures turned "
            "otherwise than in training; run `dvc repro`"
        )


def check_weights(folder: Path, description: Description) -> Path:
    """The weights' file. PipelineError where it is missing, or not that which the description names."""
    weights_file = folder / WEIGHTS_FILE
    if not weights_file.is_file():
        raise PipelineError(f"{weights_file}: weights not found beside {MODEL_FILE}; run `dvc repro`")
    found = checksum(weights_file, "sha256")
    if found != description.weights.sha256:
        raise PipelineError(
            f"{weights_file}: is {found}, and {MODEL_FILE} says {description.weights.sha256}: the two files are not "
            "of one model; restore both (`dvc checkout`) or train again"
        )
    return weights_file


def write_network(folder: Path, config: ModelConfig, classes: Sequence[Class], apply_exif: bool) -> None:
    """Writes network.json into `folder`, which exists."""
    network = Network(format=FORMAT, model=dataclasses.asdict(config), classes=list(classes), apply_exif=apply_exif)
    write_json(folder / NETWORK_FILE, network.model_dump(mode="json"))


def read_network(folder: Path) -> tuple[ModelConfig, list[Class], bool]:
    """network.json, checked, its last apply_exif. PipelineError names what is wrong with it."""
    network = _read(folder / NETWORK_FILE, Network)
    try:
        return ModelConfig.from_dict(network.model), network.classes, network.apply_exif
    except EffdetError as error:
        raise PipelineError(f"{folder / NETWORK_FILE}: {error}; train again with this version") from None


def read_description(folder: Path) -> Description:
    """model.json alone, checked. PipelineError names what is wrong with it."""
    return _read(folder / MODEL_FILE, Description)


def _read(path: Path, kind: type[Described]) -> Described:
    content = read_json(path, "model description")
    found = content.get("format") if isinstance(content, dict) else content
    if found != FORMAT:
        raise PipelineError(f"{path}: expected format {FORMAT}, got {found!r:.80}; train again with this version")
    try:
        description = kind.model_validate(content)
    except ValidationError as error:
        details = error.errors()[0]
        where = ".".join(str(key) for key in details["loc"])
        raise PipelineError(f"{path}: {where}: {details['msg']}; train again with this version") from None
    ids = [row.class_id for row in description.classes]
    head = description.model.get("num_classes", 0)
    if not ids or ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= head:
        raise PipelineError(f"{path}: classes: class_id must rise within 0..{head - 1}, got {ids}; train again")
    return description
