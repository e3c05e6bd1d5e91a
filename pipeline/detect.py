"""Detects on a person's pictures or video, and draws: `python -m pipeline.detect MODEL INPUT... --out FOLDER`.

An input is an image, a folder (searched with its sub-folders for .jpg, .jpeg and .png), a glob in quotes, or one video.
FOLDER, which is to be new or empty, then holds
  pictures/         the images with boxes, labels and scores, in their own size and the same sub-folders; or
  NAME.mp4          the video, with the same times (H.264, no sound)
  detections.json   COCO results, one a line: boxes in pixels of the original
  images.json       {id, file_name, width, height, source}, one a line; id is the place of the image among the inputs,
                    or of the frame in the video, from 1
What scores less than --min-score stands in none of them. An image that cannot be read is named and left out, and the
command ends with exit 1. An image is turned as its EXIF orientation says if the model was trained so (data.apply_exif;
--apply-exif for published weights), and taken as stored if not; boxes, width, height and what is drawn are of that.
"""

import argparse
import glob
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeAlias

import numpy as np
from PIL import Image
from tqdm import tqdm

from effdet.boxes import xywh_to_yxyx
from effdet.inference import Found
from effdet.postprocess import PostprocessConfig
from pipeline import local, params
from pipeline.class_table import labels
from pipeline.coco_metrics import coco_rows
from pipeline.detectors import (
    BATCH,
    Detector,
    Picture,
    add_arguments,
    decode_picture,
    in_batches,
    new_folder,
    open_from,
)
from pipeline.errors import PipelineError, run
from pipeline.files import written_whole
from pipeline.judging import rows_file
from pipeline.rendering import Drawn, with_boxes
from pipeline.video import VideoReader, VideoWriter

MIN_SCORE = 0.3
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
VIDEO_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
JPEG_QUALITY = 92

Row: TypeAlias = dict[str, Any]
Add: TypeAlias = Callable[[Iterable[Row]], None]  # takes rows for a file


@dataclass(frozen=True)
class Source:
    """A file to look at."""

    path: Path
    name: str  # below pictures/; no two have the same

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


# Inputs ---------------------------------------------------------------------------------------------------------------


def find(inputs: Sequence[str]) -> tuple[list[Source], int]:
    """The images, or the video, that the inputs name, in their order, and how many other files were passed over.

    A file that several inputs name counts once. PipelineError for an input that names none.
    """
    files: dict[Path, tuple[Path, str]] = {}  # resolved -> as given, and its name
    passed_over: set[Path] = set()
    for text in inputs:
        found, others = _files(text, in_company=len(inputs) > 1)
        if not found:
            what = f"; {len(others)} files there have none of these endings" if others else ""
            raise PipelineError(f"{text}: no image or video found (folders: {', '.join(IMAGE_SUFFIXES)}){what}")
        for path, name in found:
            files.setdefault(path.resolve(), (path, name))
        passed_over.update(path.resolve() for path in others)
    taken: set[str] = set()
    sources = [Source(path, _untaken(name, taken)) for path, name in files.values()]
    if len(sources) > 1 and any(source.is_video for source in sources):
        video = next(source for source in sources if source.is_video)
        raise PipelineError(f"{video.path}: a video goes alone; run the command once for it and once for the rest")
    return sources, len(passed_over - files.keys())


def _files(text: str, in_company: bool) -> tuple[list[tuple[Path, str]], list[Path]]:
    """The files that an input names with their names in the output, and those passed over."""
    path = Path(text)
    if path.is_dir():
        found, others = _sorted_out(_below(path), path)
        top = PurePosixPath(path.resolve().name if in_company else "")
        return [(file, str(top / name)) for file, name in found], others
    if path.exists():
        return [(path, path.name)], []
    if not glob.has_magic(text):
        raise PipelineError(f"{text}: not found; expected an image, a folder, a glob or a video")
    parts = path.parts
    root = Path(*parts[: next(place for place, part in enumerate(parts) if glob.has_magic(part))])
    matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
    files = [file for match in matches for file in (_below(match) if match.is_dir() else [match])]
    return _sorted_out(files, root, IMAGE_SUFFIXES + VIDEO_SUFFIXES)


def _below(folder: Path) -> list[Path]:
    """All files, a folder's before its sub-folders'. Links to folders are not followed: they can lead back."""
    files = []
    for top, folders, names in os.walk(folder):
        folders.sort()  # which decides where os.walk goes next
        files += [Path(top, name) for name in sorted(names)]
    return files


def _sorted_out(
    files: Sequence[Path], root: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> tuple[list[tuple[Path, str]], list[Path]]:
    chosen = [file for file in files if file.suffix.lower() in suffixes]
    others = [file for file in files if file.suffix.lower() not in suffixes]
    return [(file, _name(file, root)) for file in chosen], others


def _name(file: Path, root: Path) -> str:
    """The file's path from the root; the last part alone where that would lead out of it (a glob with `..`)."""
    relative = Path(os.path.relpath(file, root))
    return file.name if ".." in relative.parts else relative.as_posix()


def _untaken(name: str, taken: set[str]) -> str:
    """The name, with a number where another file has it (in any case of letters); notes it in `taken`."""
    path = PurePosixPath(name)
    suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else f"{path.suffix}.jpg"  # what is written
    number, free = 1, path.with_suffix(suffix)
    while str(free).casefold() in taken:
        number += 1
        free = path.with_name(f"{path.stem}-{number}{suffix}")
    taken.add(str(free).casefold())
    return str(free)


# Work -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pen:
    """Draws what is found on pictures."""

    detector: Detector
    min_score: float

    def rows(self, image_id: int, found: Found) -> list[Row]:
        """COCO results of at least min_score, the best first."""
        return [row for row in coco_rows(image_id, found, self.detector.classes) if row["score"] >= self.min_score]

    def draw(self, picture: Picture, rows: Sequence[Row]) -> Image.Image:
        """The picture with such results, the best on top."""
        names = labels(self.detector.classes)
        class_ids = {row.category_id: row.class_id for row in self.detector.classes}
        boxes = []
        for row in reversed(rows):
            class_id = class_ids[row["category_id"]]
            label = f"{names[class_id]} {row['score']:.2f}"
            boxes.append(Drawn(xywh_to_yxyx(np.array(row["bbox"])), class_id, label))
        return with_boxes(picture, boxes)

    def save(self, path: Path, picture: Picture, rows: Sequence[Row]) -> None:
        """The same as a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
        self.draw(picture, rows).save(path, kind, quality=JPEG_QUALITY)


def detect_images(
    pen: Pen, sources: Sequence[Source], folder: Path, batch_size: int, add_results: Add, add_images: Add
) -> int:
    """Detects on images, draws them below `folder`, hands on results and entries; how many images could be read.

    An image that cannot be is named on stderr, and has neither.
    """
    num_read = 0
    numbered = list(enumerate(sources, start=1))
    with ThreadPoolExecutor(local.load().loader_workers) as pool, _bar(len(sources), " images") as bar:
        for loaded in in_batches(partial(_load, pen.detector.apply_exif), numbered, batch_size):
            for _, _, got in loaded:
                if isinstance(got, PipelineError):
                    tqdm.write(f"left out: {got}", file=sys.stderr)
            pictures = [
                (number, source, picture)
                for number, source, picture in loaded
                if not isinstance(picture, PipelineError)
            ]
            found = pen.detector.detect([picture for _, _, picture in pictures])
            rows = [pen.rows(number, here) for (number, _, _), here in zip(pictures, found, strict=True)]
            names = [folder / source.name for _, source, _ in pictures]
            list(pool.map(pen.save, names, [picture for _, _, picture in pictures], rows))
            add_results(row for here in rows for row in here)
            add_images(_entry(number, source.name, picture, source.path) for number, source, picture in pictures)
            num_read += len(pictures)
            bar.update(len(loaded))
    return num_read


def _load(apply_exif: bool, numbered: tuple[int, Source]) -> tuple[int, Source, Picture | PipelineError]:
    number, source = numbered
    try:
        return number, source, decode_picture(source.path.read_bytes(), str(source.path), apply_exif)
    except OSError as error:
        return number, source, PipelineError(f"{source.path}: {error.strerror}")
    except PipelineError as error:
        return number, source, error


def _entry(number: int, name: str, picture: Picture, source: Path) -> Row:
    height, width = picture.shape[:2]
    return {"id": number, "file_name": name, "width": width, "height": height, "source": str(source)}


def detect_video(pen: Pen, path: Path, folder: Path, batch_size: int, add_results: Add, add_images: Add) -> int:
    """Detects on a video's frames, writes it with them into `folder`, hands on results and entries; how many frames."""
    number = 0
    with (
        VideoReader(path) as reader,
        VideoWriter(folder / f"{path.stem}.mp4", reader) as writer,
        _bar(reader.expected_frames(), " frames") as bar,
    ):
        frames = reader.frames()
        while batch := list(itertools.islice(frames, batch_size)):
            for frame, found in zip(batch, pen.detector.detect([frame.picture for frame in batch]), strict=True):
                number += 1
                rows = pen.rows(number, found)
                writer.write(np.asarray(pen.draw(frame.picture, rows)), frame.time)
                add_results(rows)
                add_images([_entry(number, f"{path.name}#{number}", frame.picture, path)])
            bar.update(len(batch))
    return number


def _bar(total: int | None, unit: str) -> "tqdm[NoReturn]":
    return tqdm(total=total, desc="detect", unit=unit, disable=None)


# Command --------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Detects on everything that the inputs name, and writes the folder as a whole or not at all."""
    arguments = _arguments()
    new_folder(arguments.out)
    sources, passed_over = find(arguments.inputs)
    nms = PostprocessConfig(**params.load().evaluate.nms.model_dump())
    pen = Pen(open_from(arguments, nms, arguments.batch), arguments.min_score)
    video = sources[0].path if sources[0].is_video else None
    with written_whole(arguments.out) as folder:
        folder.mkdir()
        with rows_file(folder / "detections.json") as results, rows_file(folder / "images.json") as images:
            if video:
                done = detect_video(pen, video, folder, arguments.batch, results, images)
            else:
                done = detect_images(pen, sources, folder / "pictures", arguments.batch, results, images)
    others = f"; {passed_over} other files passed over" if passed_over else ""
    print(f"{done} {'frames' if video else 'images'}, in {arguments.out}{others}")
    if not video and done < len(sources):
        raise PipelineError(f"{len(sources) - done} of {len(sources)} images could not be read; they are named above")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.detect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, BATCH)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder, glob in quotes, or one video")
    parser.add_argument("--min-score", type=_score, default=MIN_SCORE, metavar="S", help=f"default {MIN_SCORE}")
    return parser.parse_args()


def _score(text: str) -> float:
    score = float(text)
    if not 0 <= score <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return score


if __name__ == "__main__":
    run(main)
