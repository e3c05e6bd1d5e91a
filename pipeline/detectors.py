"""Any model a person has, as one thing that detects on pictures: ours, published weights, or an exported file.

The numbers of a Keras model are those of the evaluate stage: the same preparation and the same effdet.inference, in
batches of one fixed size.
"""

import argparse
import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet.boxes import PADDING
from effdet.exported import Run, is_exported, open_exported
from effdet.inference import Found, prepare_device, run_detection
from effdet.input_pipeline import NO_IMAGE, Batch
from effdet.postprocess import PostprocessConfig
from effdet.preprocess import decode, resize
from pipeline import local
from pipeline.class_table import Class
from pipeline.errors import PipelineError
from pipeline.model_files import StoredModel
from pipeline.model_source import open_model

BATCH = 8  # pictures

Picture = NDArray[np.uint8]  # [h,w,3] RGB
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Detector:
    """A model and what runs it."""

    name: str
    classes: list[Class]
    detect: Callable[[Sequence[Picture]], list[Found]]  # pictures of any sizes, as many as memory holds
    stored: StoredModel | None  # None: an export, which chooses detections by settings of its own
    apply_exif: bool  # pictures are to be decoded with this, as those that it was trained on


def open_detector(
    source: str,
    nms: PostprocessConfig,
    name: str | None = None,
    image_size: tuple[int, int] | None = None,
    classes: Path | None = None,
    ema: bool = True,
    batch_size: int = BATCH,
    apply_exif: bool = False,
) -> Detector:
    """The model at `source`: a bundle, a training checkpoint, published weights, a SavedModel, .onnx or .tflite.

    `name`, `image_size` (height, width), `classes`, `ema` and `apply_exif` as for pipeline.model_source.open_model.
    `nms` is for models that are not exported. PipelineError or EffdetError where there is no such model.
    """
    path = Path(source)
    if not is_exported(path):
        stored = open_model(source, name, image_size, classes, ema, apply_exif=apply_exif)
        detect = keras_detection(stored, nms, batch_size)
        return Detector(stored.config.name, stored.classes, detect, stored, stored.apply_exif)
    if (name, image_size, classes, ema, apply_exif) != (None, None, None, True, False):
        raise PipelineError(
            f"{path}: an exported model brings its name, size, classes and weights, and knows of EXIF; leave out "
            "--model, --image-size, --classes, --no-ema and --apply-exif"
        )
    exported = open_exported(path)
    rows = zip(exported.category_ids.tolist(), exported.class_names, strict=True)
    table = [
        Class(class_id=class_id, category_id=category_id, name=class_name)
        for class_id, (category_id, class_name) in enumerate(rows)
        if category_id != PADDING
    ]
    detect = export_detection(exported.run, batch_size, source)
    return Detector(path.resolve().stem, table, detect, None, exported.apply_exif)


def keras_detection(
    stored: StoredModel, nms: PostprocessConfig, batch_size: int
) -> Callable[[Sequence[Picture]], list[Found]]:
    """Detection with a model in batches of exactly this size, filled up: an image's numbers depend on no other."""

    def detect(pictures: Sequence[Picture]) -> list[Found]:
        if not pictures:
            return []
        parts = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
        batches = (_batch(part, stored.config.image_size, batch_size) for part in parts)
        found = run_detection(stored.model, stored.config, batches, nms)
        rows = zip(found.counts, found.boxes, found.scores, found.class_ids, strict=True)
        return [Found(boxes[:n], scores[:n], class_ids[:n]) for n, boxes, scores, class_ids in rows]

    return detect


def _batch(pictures: Sequence[Picture], image_size: tuple[int, int], batch_size: int) -> Batch:
    """What effdet.input_pipeline.evaluation_batches makes of the same pictures, without boxes."""
    images = np.zeros([batch_size, *image_size, 3], np.float32)
    content_sizes = np.ones([batch_size, 2], np.int32)
    scales = np.ones([batch_size], np.float32)
    with tf.device("/CPU:0"):  # where evaluation resizes, too
        for place, picture in enumerate(pictures):
            image, content_sizes[place], scales[place] = resize(tf.constant(picture), image_size)
            height, width = content_sizes[place]
            images[place, :height, :width] = image
    image_ids = np.where(np.arange(batch_size) < len(pictures), np.arange(batch_size), NO_IMAGE)
    return {
        "image": tf.constant(images),
        "content_size": tf.constant(content_sizes),
        "image_id": tf.constant(image_ids, tf.int64),
        "scale": tf.constant(scales),
    }


def export_detection(run: Run, batch_size: int, where: str) -> Callable[[Sequence[Picture]], list[Found]]:
    """Detection with an export's `run`, whose batches hold pictures of one size, at most `batch_size` at a time.

    PipelineError, naming `where`, once it shows that the export has no detections in it.
    """

    def detect(pictures: Sequence[Picture]) -> list[Found]:
        same_size = collections.defaultdict(list)
        for place, picture in enumerate(pictures):
            same_size[picture.shape].append(place)
        found = {}
        for places in same_size.values():
            for group in (places[start : start + batch_size] for start in range(0, len(places), batch_size)):
                outputs = run(np.stack([pictures[place] for place in group]))
                if "boxes" not in outputs:
                    raise PipelineError(
                        f"{where}: gives the network's raw outputs ({', '.join(sorted(outputs))}) and no detections; "
                        "take an export with these inside"
                    )
                for row, place in enumerate(group):
                    count = outputs["count"][row]
                    found[place] = Found(*(outputs[key][row, :count] for key in ("boxes", "scores", "class_ids")))
        return [found[place] for place in range(len(pictures))]

    return detect


def decode_picture(encoded: bytes, where: str, apply_exif: bool = False) -> Picture:
    """An image file's pixels, decoded as evaluation does: grey, CMYK and transparent pictures as RGB.

    Of an animation the first picture; `apply_exif` as for effdet.preprocess.decode. PipelineError, naming `where`, for
    what TensorFlow cannot decode.
    """
    try:
        with tf.device("/CPU:0"):
            picture: Picture = decode(encoded, apply_exif).numpy()
    except (tf.errors.InvalidArgumentError, tf.errors.ResourceExhaustedError) as error:
        reason = re.sub(r"^{{.*?}} | \[Op:\w*\].*$", "", str(error.message), flags=re.DOTALL)
        raise PipelineError(f"{where}: cannot be decoded: {reason}") from None
    return picture


def in_batches(load: Callable[[Item], Result], items: Sequence[Item], batch_size: int) -> Iterator[list[Result]]:
    """`load(item)` of all items in their order, in lists of batch_size; threads load the next while one is used."""
    with ThreadPoolExecutor(local.load().loader_workers) as pool:
        loading = pool.map(load, items[:batch_size])
        for end in range(batch_size, len(items) + batch_size, batch_size):
            loaded = list(loading)
            loading = pool.map(load, items[end : end + batch_size])
            yield loaded


# Command lines --------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, default_batch: int | None) -> None:
    """What the commands that detect with a model ask for."""
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--batch", type=_count, default=default_batch, metavar="N", help="pictures at a time")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that takes a model asks about it."""
    parser.add_argument(
        "source",
        metavar="MODEL",
        help="a folder like data/model or data/release, a training checkpoint, published weights (TF checkpoint, "
        ".tar.gz, .h5, .safetensors), or an export: SavedModel folder, .onnx, .tflite",
    )
    published = parser.add_argument_group("published weights")
    published.add_argument("--model", metavar="NAME", help="which model, where the file name does not say")
    published.add_argument("--image-size", type=_count, nargs=2, metavar=("H", "W"), help="input, if not the standard")
    published.add_argument("--classes", type=Path, metavar="FILE", help="class table, where it is not COCO's")
    published.add_argument("--no-ema", action="store_true", help="the raw weights, not the averaged")
    published.add_argument(
        "--apply-exif", action="store_true", help="turn pictures as their EXIF orientation says; else as stored"
    )


def open_from(arguments: argparse.Namespace, nms: PostprocessConfig, batch_size: int) -> Detector:
    """The model that such arguments ask for, with the device made ready."""
    prepare_device()
    size = tuple(arguments.image_size) if arguments.image_size else None
    return open_detector(
        arguments.source,
        nms,
        arguments.model,
        size,
        arguments.classes,
        not arguments.no_ema,
        batch_size,
        arguments.apply_exif,
    )


def new_folder(path: Path) -> None:
    """PipelineError unless `path` is free or an empty folder: what a person has there is never replaced."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise PipelineError(f"{path}: is there already; give another --out, or remove it")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number
