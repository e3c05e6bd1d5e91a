"""Writes a model for serving, once it is known to detect what the model detects.

    python -m pipeline.export_model data/release --format onnx --images photos/ --out model.onnx

MODEL is what `python -m pipeline.detect` takes, but for an export. It is compared on --images, real ones of the kind to
come: images, folders or globs. litert_int8 is judged by its AP instead: --images is then the folder or zip of
--annotations, a COCO json, and --calibration names images from which the ranges of its activations are taken. Inputs
and outputs of each format: effdet/export.py. NMS is that of params.yaml's evaluate section.
"""

import argparse
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from effdet.postprocess import PostprocessConfig
from pipeline import params
from pipeline.coco_metrics import coco_metrics
from pipeline.detect import find
from pipeline.detectors import BATCH, Detector, Picture, add_model_arguments, decode_picture, open_from
from pipeline.errors import PipelineError, run
from pipeline.evaluate_model import open_images, read_set, require_same_categories, results
from pipeline.export_check import (
    BOUNDS,
    AveragePrecision,
    Comparison,
    check_average_precision,
    check_export,
    of_classes,
)
from pipeline.exports import CALIBRATION_IMAGES, FILES, write_export
from pipeline.model_files import StoredModel

COMPARED_IMAGES = 64  # the first of those that --images names


def main() -> None:
    """Exports, compares, and only then puts the file or folder in its place."""
    arguments = _arguments()
    out: Path = arguments.out
    nms = PostprocessConfig(**params.load().evaluate.nms.model_dump())
    detector = open_from(arguments, nms, BATCH)
    if detector.stored is None:
        raise PipelineError(f"{arguments.source}: is an export already; give the model that it was made of")
    # What is wrong with the images shows here, before the work.
    calibration = pictures(detector, read(arguments.calibration, CALIBRATION_IMAGES))
    compare = (by_average_precision if arguments.format == "litert_int8" else by_detections)(
        arguments, detector, detector.stored, nms
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".part", dir=out.parent) as part:
        path = Path(part, out.name)
        heads_only = arguments.raw_heads
        write_export(path, arguments.format, detector.stored, None if heads_only else nms, calibration)
        outcome = compare(path)
        os.replace(path, out)
    print(f"{out}: {outcome.words()}")


def by_detections(
    arguments: argparse.Namespace, detector: Detector, stored: StoredModel, nms: PostprocessConfig
) -> Callable[[Path], Comparison]:
    """Runs the model on the images. Gives what compares an export with it, and raises PipelineError as check_export."""
    named = read(arguments.images, COMPARED_IMAGES)
    in_use = [row.class_id for row in stored.classes]
    found = detector.detect(pictures(detector, named))
    judged = {number: of_classes(here, in_use) for number, here in enumerate(found)}
    images = {number: data for number, (_, data) in enumerate(named)}
    return functools.partial(
        check_export, bounds=BOUNDS[arguments.format], images=images, judged=judged, stored=stored, nms=nms
    )


def by_average_precision(
    arguments: argparse.Namespace, detector: Detector, stored: StoredModel, nms: PostprocessConfig
) -> Callable[[Path], AveragePrecision]:
    """The same on the annotated images, by AP: check_average_precision."""
    annotations: Path = arguments.annotations
    tables, has_truth = read_set(annotations)
    if not has_truth:
        raise PipelineError(f"{annotations}: has no annotations to judge by")
    require_same_categories(detector, arguments.source, tables, annotations)
    images = open_images(Path(arguments.images[0]), tables)
    model_ap = coco_metrics(annotations, list(results(detector, tables, images, BATCH)))["AP"]
    rows = zip(tables.images["id"].tolist(), tables.images["file_name"], strict=True)
    encoded = ((image_id, images.read(name)) for image_id, name in rows)
    return functools.partial(
        check_average_precision, images=encoded, ground_truth=annotations, model_ap=model_ap, stored=stored, nms=nms
    )


def read(inputs: Sequence[str], limit: int) -> list[tuple[str, bytes]]:
    """The first `limit` images that the inputs name: name and bytes."""
    sources, _ = find(inputs) if inputs else ([], 0)
    if any(source.is_video for source in sources):
        raise PipelineError(f"{sources[0].path}: expected images, got a video")
    return [(str(source.path), source.path.read_bytes()) for source in sources[:limit]]


def pictures(detector: Detector, named: Sequence[tuple[str, bytes]]) -> list[Picture]:
    """The pixels of such images, as the model takes them. PipelineError names what cannot be decoded."""
    return [decode_picture(data, name, detector.apply_exif) for name, data in named]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.export_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("--format", required=True, choices=get_args(params.Format))
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="the new file; a folder for saved_model"
    )
    parser.add_argument("--images", nargs="+", required=True, metavar="PATH", help="images to compare on")
    parser.add_argument("--raw-heads", action="store_true", help="the network's outputs in place of detections")
    int8 = parser.add_argument_group("litert_int8")
    int8.add_argument("--annotations", type=Path, metavar="FILE", help="COCO json of --images, one folder or zip")
    int8.add_argument("--calibration", nargs="+", default=[], metavar="PATH", help="images to take ranges from")
    arguments = parser.parse_args()
    suffix = Path(FILES[arguments.format]).suffix
    if arguments.out.exists():
        parser.error(f"--out {arguments.out}: is there already")
    if arguments.out.suffix != suffix:
        parser.error(f"--out {arguments.out}: expected a name that ends in {suffix!r} for {arguments.format}")
    if arguments.format != "litert_int8" and (arguments.annotations or arguments.calibration):
        parser.error("--annotations and --calibration are for litert_int8")
    if arguments.format == "saved_model" and arguments.raw_heads:
        parser.error("--raw-heads: a SavedModel has no such form; take onnx or litert_float32")
    annotated = arguments.annotations is not None and len(arguments.images) == 1 and arguments.calibration
    if arguments.format == "litert_int8" and not annotated:
        parser.error("litert_int8: needs --annotations, their images as one --images, and --calibration")
    return arguments


if __name__ == "__main__":
    run(main)
