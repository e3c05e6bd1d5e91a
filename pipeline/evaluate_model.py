"""Judges any model on any COCO-format set: `python -m pipeline.evaluate_model MODEL --annotations FILE --images PATH`.

PATH is a folder of images or a zip. `--out FOLDER`, which is to be new or empty, gets what the evaluate stage writes:
  metrics.json, detections_SET.json, the tables for plots, pictures/, index.html; and timings.json
or, where the file has images and no annotations (COCO's test-dev), what COCO's server takes:
  detections_SET_MODEL_results.json, and a .zip of it
SET is the annotations' file name without instances_ or image_info_. NMS, pictures and the usual batch are those of
params.yaml's evaluate section; an exported model chooses its detections by settings of its own.
Every image counts: one that is missing, unreadable or of another size than listed is an error. Images are turned by
EXIF where the model was trained so: the annotations are then to refer to the turned pictures, else to the stored ones.
"""

import argparse
import contextlib
import zipfile
from collections.abc import Generator, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
from tqdm import tqdm

from effdet.postprocess import PostprocessConfig
from pipeline import params
from pipeline.coco import AnnotationError, CocoTables, ImageArchive, parse_annotations
from pipeline.coco_metrics import coco_rows
from pipeline.detectors import (
    Detector,
    Picture,
    add_arguments,
    decode_picture,
    in_batches,
    new_folder,
    open_from,
)
from pipeline.errors import PipelineError, run
from pipeline.evaluate import BREAKDOWN_FILE, METRICS_FILE, PAGE_FILE, about, breakdown
from pipeline.evaluation_page import page
from pipeline.files import write_json, written_whole
from pipeline.judging import ImagesOf, judge_split, summary, write_results
from pipeline.timings import Pace

PREFIXES = ("instances_", "image_info_")  # of COCO's annotation files
TIMINGS_FILE = "timings.json"
EXPORT_NMS = "the exported model's own"

Row = dict[str, Any]


# The set --------------------------------------------------------------------------------------------------------------


def read_set(path: Path) -> tuple[CocoTables, bool]:
    """The annotation file's tables, and whether it has annotations. AnnotationError names what is wrong with it."""
    if not path.is_file():
        raise AnnotationError(f"{path}: not found; expected a COCO json")
    content = path.read_bytes()
    try:
        keys = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: no COCO json: {error}") from None
    has_truth = "annotations" in keys
    tables = parse_annotations(content if has_truth else msgspec.json.encode({**keys, "annotations": []}), str(path))
    if tables.images.empty:
        raise AnnotationError(f"{path}: images: empty; there is nothing to judge on")
    for column, table in (("image_id", tables.images), ("category_id", tables.categories)):
        strange = tables.annotations[~tables.annotations[column].isin(table["id"])]
        if not strange.empty:
            first = strange.iloc[0]
            raise AnnotationError(
                f"{path}: annotations (id {first['id']:.0f}): {column} {first[column]:.0f} is not in the file; "
                f"{len(strange)} such annotations in all; COCO's metrics would pass over them"
            )
    return tables, has_truth


def require_same_categories(detector: Detector, source: str, tables: CocoTables, path: Path) -> None:
    """PipelineError with the first difference, unless model and annotations have the same categories, id for id."""
    ours = {row.category_id: row.name for row in detector.classes}
    theirs = dict(zip(tables.categories["id"].tolist(), tables.categories["name"].tolist(), strict=True))
    for category in sorted(ours.keys() | theirs.keys()):
        if ours.get(category) != theirs.get(category):
            words = [repr(table[category]) if category in table else "absent" for table in (theirs, ours)]
            raise PipelineError(
                f"{path}: categories are not the model's: {category} is {words[0]} here, and {words[1]} in {source}; "
                "take a model for these categories, or annotations with the model's"
            )


class ImageFolder:
    """Images below a folder by the annotations' file names, as ImageArchive has those of a zip."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def member(self, file_name: str) -> Path:
        """The image's file. PipelineError where there is none, or it would lie elsewhere."""
        parts = PurePosixPath(file_name)
        if parts.is_absolute() or ".." in parts.parts:
            raise PipelineError(f"{self.path}: file_name {file_name!r} leads out of the folder; refused")
        if not (self.path / parts).is_file():
            raise PipelineError(f"{self.path}: {file_name!r} is not in the folder")
        return self.path / parts

    def read(self, file_name: str) -> bytes:
        """The image file's bytes."""
        return self.member(file_name).read_bytes()


def open_images(path: Path, tables: CocoTables) -> ImageArchive | ImageFolder:
    """The folder or zip, in which all images of the tables are. PipelineError names the first that is not."""
    if not path.exists():
        raise PipelineError(f"{path}: images not found; expected a folder or a zip")
    images = ImageFolder(path) if path.is_dir() else ImageArchive(path)
    for file_name in tables.images["file_name"]:
        images.member(file_name)
    return images


# Work -----------------------------------------------------------------------------------------------------------------


def results(
    detector: Detector,
    tables: CocoTables,
    images: ImageArchive | ImageFolder,
    batch_size: int,
    pace: Pace | None = None,
) -> Generator[Row, None, None]:
    """COCO results of every image, by image id, the best of an image first."""
    rows = tables.images.sort_values("id").to_dict("records")
    with tqdm(total=len(rows), desc="evaluate", unit=" images", disable=None) as bar:
        for loaded in in_batches(partial(_load, images, detector.apply_exif), rows, batch_size):
            found = detector.detect([picture for _, picture in loaded])
            for (image_id, _), here in zip(loaded, found, strict=True):
                yield from coco_rows(image_id, here, detector.classes)
            if pace is not None:
                pace.batch(len(loaded))
            bar.update(len(loaded))


def _load(images: ImageArchive | ImageFolder, apply_exif: bool, row: Row) -> tuple[int, Picture]:
    where = f"{images.path}: {row['file_name']}"
    picture = decode_picture(images.read(row["file_name"]), where, apply_exif)
    height, width = picture.shape[:2]
    if (height, width) != (row["height"], row["width"]):
        raise PipelineError(
            f"{where}: is {width} x {height} pixels{', turned by EXIF' if apply_exif else ''}, and the annotations say "
            f"{row['width']} x {row['height']} (id {row['id']}): their boxes would be judged in the wrong place"
        )
    return row["id"], picture


def read_images(tables: CocoTables, images: ImageArchive | ImageFolder, image_ids: Sequence[int]) -> dict[int, bytes]:
    """The files of the images with these ids: image id -> bytes."""
    names = dict(zip(tables.images["id"].tolist(), tables.images["file_name"], strict=True))
    return {image_id: images.read(names[image_id]) for image_id in image_ids}


def set_name(annotations: Path) -> str:
    """`val2017` of instances_val2017.json, `test-dev2017` of image_info_test-dev2017.json."""
    name = annotations.stem
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name or annotations.stem


def write_judged(
    folder: Path,
    annotations: Path,
    source: str,
    detector: Detector,
    rows: list[Row],
    images_of: ImagesOf,
    settings: params.Evaluate,
    seconds: Row,
) -> str:
    """Judges results, draws them on images, and writes all files; the outcome in a line. `seconds`: of judge_split."""
    name = set_name(annotations)
    used_for = f"of {annotations.name}"
    figures, shown = judge_split(
        folder,
        name,
        used_for,
        annotations,
        rows,
        images_of,
        detector.classes,
        settings,
        detector.apply_exif,
        seconds,
    )
    stored = detector.stored
    judged: Row = {
        "model": source,
        "nms": settings.nms.model_dump() if stored else EXPORT_NMS,
        "splits": {name: figures},
    }
    if stored:
        judged["weights"] = stored.weights.model_dump()
    write_json(folder / METRICS_FILE, judged)
    write_json(folder / BREAKDOWN_FILE, breakdown(judged["splits"]))
    # published weights say nothing of epochs
    trained = stored is not None and stored.weights.epoch > 0
    words = about(stored) if stored and trained else f"{len(detector.classes)} classes, from {source}."
    (folder / PAGE_FILE).write_text(page(detector.name, words, [shown], settings.picture_score), encoding="utf-8")
    return summary(name, figures)


def write_server_file(folder: Path, stem: str, rows: Iterable[Row]) -> None:
    """The results as COCO's server takes them: a JSON of that name in a zip of that name, and beside it."""
    write_results(folder / f"{stem}.json", rows)
    with zipfile.ZipFile(folder / f"{stem}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / f"{stem}.json", f"{stem}.json")


def main() -> None:
    """Judges, or detects only, and writes the folder as a whole or not at all."""
    arguments = _arguments()
    annotations, out = arguments.annotations, arguments.out
    settings = params.load().evaluate
    new_folder(out)
    tables, has_truth = read_set(annotations)
    images = open_images(arguments.images, tables)
    batch_size = arguments.batch or settings.batch_size
    detector = open_from(arguments, PostprocessConfig(**settings.nms.model_dump()), batch_size)
    require_same_categories(detector, arguments.source, tables, annotations)
    pace = Pace()
    found = results(detector, tables, images, batch_size, pace)
    with written_whole(out) as folder, contextlib.closing(found):
        folder.mkdir()
        if has_truth:
            rows = list(found)
            timings: Row = {"detection": pace.figures(1)}
            images_of = partial(read_images, tables, images)
            line = write_judged(folder, annotations, arguments.source, detector, rows, images_of, settings, timings)
            write_json(folder / TIMINGS_FILE, timings)
            message = f"{line}; see {out / PAGE_FILE}"
        else:
            stem = f"detections_{set_name(annotations)}_{detector.name}_results"
            write_server_file(folder, stem, found)
            message = f"{len(tables.images)} images without annotations; for COCO's server: {out / stem}.zip"
    print(message)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, None)
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="COCO json")
    parser.add_argument("--images", type=Path, required=True, metavar="PATH", help="folder or zip of the images")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
