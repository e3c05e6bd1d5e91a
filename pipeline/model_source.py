"""Any detector that a person has, opened: our own model or checkpoint, or published weights."""

import re
from pathlib import Path

import keras
from pydantic import ValidationError

from effdet.checkpoint import describe, is_checkpoint
from effdet.config import MODELS, model_config
from effdet.model import build
from effdet.training_weights import best_of
from effdet.weight_sources import Loaded, files, load, num_classes, opened
from pipeline.class_table import Class, class_rows
from pipeline.coco_classes import coco_classes
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.initial_weights import content_checksum
from pipeline.model_files import MODEL_FILE, NETWORK_FILE, StoredModel, Weights, read_model, read_network

# Classes of the published heads: COCO's category ids 1 to 90, and in NVIDIA's one more, which is none.
COCO_HEADS = (90, 91)
SEED = 1  # of a class head that starts fresh


def open_model(
    source: str,
    name: str | None = None,
    image_size: tuple[int, int] | None = None,
    classes: Path | None = None,
    ema: bool = True,
    allow_head_mismatch: bool = False,
    apply_exif: bool = False,
) -> StoredModel:
    """A detector with its weights, from a model's folder, a training checkpoint or run, or published weights.

    `name` and `image_size` (height, width): of published weights; without, the name is sought in the source's path, and
    the size is the published one. `classes`: a release's classes.json or COCO annotations; without, a head of 90 or
    91 has COCO's. `ema`: moving averages are taken where there are any. `allow_head_mismatch`: for other classes than
    the source's the class head starts fresh: a beginning for training. `apply_exif`: published weights are for pictures
    turned as their EXIF orientation says. PipelineError, EffdetError name what does not fit.
    """
    path = Path(source)
    options = {"--model": name, "--image-size": image_size, "--classes": classes, "--apply-exif": apply_exif or None}
    given = [option for option, value in options.items() if value is not None]
    checkpoint = path if is_checkpoint(path) else best_of(path) if path.is_dir() else None
    ours = (path / MODEL_FILE).is_file() or checkpoint is not None
    if ours and given:
        raise PipelineError(f"{source}: says itself which model it is; leave out {', '.join(given)}")
    if checkpoint is not None:
        return _of_checkpoint(checkpoint, ema)
    if ours:
        return _of_folder(path, ema)
    return _published(source, name or _name_in(path), image_size, classes, ema, allow_head_mismatch, apply_exif)


def _of_folder(folder: Path, ema: bool) -> StoredModel:
    stored = read_model(folder)
    if not ema and stored.weights.kind == "ema":
        raise PipelineError(f"{folder}: holds the averaged weights alone; name a step-... checkpoint for the others")
    return stored


def _of_checkpoint(checkpoint: Path, ema: bool) -> StoredModel:
    checkpoint = checkpoint.resolve()  # "." and links have another folder around them
    if not (checkpoint.parent / NETWORK_FILE).is_file():
        raise PipelineError(
            f"{checkpoint}: {NETWORK_FILE} not found in the folder around it, which says what network it is of; "
            "take the checkpoint together with its run's folder"
        )
    config, classes, apply_exif = read_network(checkpoint.parent)
    model = build(config)
    loaded = load(model, config, checkpoint, ema)
    written = describe(checkpoint)  # and not the name: files are renamed
    selected_by = "last" if written["state"] else "val AP"  # the best weights have no course to go on with
    return StoredModel(config, classes, _weights(checkpoint, loaded, selected_by, written["step"]), model, apply_exif)


def _published(
    source: str,
    name: str | None,
    image_size: tuple[int, int] | None,
    classes: Path | None,
    ema: bool,
    allow_head_mismatch: bool,
    apply_exif: bool,
) -> StoredModel:
    files(source)  # raises where there are none
    if name is None:
        raise PipelineError(f"{source}: which model is it? name it with --model; the models are {', '.join(MODELS)}")
    with opened(source, ema) as found:
        head = num_classes(found, model_config(name, COCO_HEADS[0]))
        rows = _class_table(source, head, classes, allow_head_mismatch)
        config = model_config(name, _outputs(rows, head), image_size)
        keras.utils.set_random_seed(SEED)
        model = build(config)
        loaded = load(model, config, found, allow_head_mismatch=allow_head_mismatch)
    print(loaded)
    return StoredModel(config, rows, _weights(source, loaded, "published", 0), model, apply_exif)


def _class_table(source: str, head: int, classes: Path | None, allow_head_mismatch: bool) -> list[Class]:
    """The classes of published weights, checked against the size of their head."""
    if classes is None:
        if head not in COCO_HEADS:
            raise PipelineError(
                f"{source}: its head has {head} classes, and COCO's table {COCO_HEADS[0]}; give its own with --classes "
                "(a release's classes.json, or COCO annotations)"
            )
        return coco_classes()
    rows = read_classes(classes, COCO_HEADS[0] if head in COCO_HEADS else head)
    needed = _outputs(rows, head)
    if needed != head and not allow_head_mismatch:
        raise PipelineError(
            f"{source}: its head has {head} classes, and {classes} makes {needed}; give the classes it was trained on, "
            "or --allow-head-mismatch, which leaves its class head out: a beginning for training"
        )
    return rows


def _outputs(rows: list[Class], head: int) -> int:
    """A head for these classes has so many; NVIDIA's for COCO's has one more."""
    needed = rows[-1].class_id + 1
    return head if (needed, head) == COCO_HEADS else needed


def _weights(source: str | Path, loaded: Loaded, selected_by: str, step: int) -> Weights:
    kind = "ema" if loaded.averaged else "raw"
    return Weights(kind=kind, epoch=0, step=step, selected_by=selected_by, sha256=content_checksum(source))


def _name_in(path: Path) -> str | None:
    """The model whose name stands in the path, the nearest to its end."""
    for part in reversed(path.absolute().parts):
        found = re.search(r"efficientdet-(lite3x|lite\d|d7x|d\d)", part)
        if found and found[0] in MODELS:
            return found[0]
    return None


def read_classes(path: Path, head: int) -> list[Class]:
    """The table of a release's classes.json, or of COCO annotations, for a head of `head` classes.

    Category ids that end at `head` count as the published heads do, class_id = category_id - 1; others are taken
    densely, in their order. PipelineError where the file is neither.
    """
    content = read_json(path, "class table")
    try:
        if isinstance(content, list):
            rows = class_rows(content)
        else:
            names = {int(row["id"]): str(row["name"]) for row in content["categories"]}
            as_published = max(names) == head and min(names) >= 1
            rows = [
                Class(class_id=number - 1 if as_published else place, category_id=number, name=names[number])
                for place, number in enumerate(sorted(names))
            ]
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise PipelineError(f"{path}: expected a release's classes.json or COCO annotations: {error}") from None
    ids = [row.class_id for row in rows]
    if not ids or ids != sorted(set(ids)) or ids[0] < 0:
        raise PipelineError(f"{path}: class_id must rise from 0 on, got {ids}")
    return rows
