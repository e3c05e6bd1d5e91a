"""Pictures of the first offenders, small, with their boxes: what the validation page shows of a failed check."""

import io
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.coco import ArchiveError, ImageArchive
from pipeline.exif import upright
from pipeline.image_files import DAMAGED, TURNED

A_CHECK, IN_ALL = 4, 40  # offenders that are shown, at most
SIDE = 320  # pixels, of the longer side
LARGEST = 100_000_000  # pixels that are decoded for it
MARGIN = 24  # pixels around a picture of which a marked box stands outside
NAMED = 5  # boxes in a caption
QUALITY = 80  # of the JPEG
OTHERS, MARKED, OUTSIDE = (255, 255, 255), (255, 0, 60), (225, 225, 225)  # colours of boxes, and around a picture
EDGE = (0, 0, 0)  # drawn one pixel outside of a box, so that it is seen on any ground

Tables = Mapping[str, Mapping[str, pd.DataFrame]]  # {split: {table: data frame}} as pipeline.validate makes them


@dataclass(frozen=True)
class Picture:
    """A picture of an offender, or of the twin of one."""

    jpeg: bytes
    width: int  # pixels
    height: int
    lines: tuple[str, ...]  # what it is


@dataclass(frozen=True)
class _Wanted:
    """An image of a split, and which of its annotations fail."""

    split: str
    image_id: int
    marked: tuple[int, ...]


def pictures(
    failed: Sequence[Mapping[str, Any]], tables: Tables, archives: Mapping[str, ImageArchive], apply_exif: bool
) -> list[list[Picture]]:
    """For each row of the report's `failed` its first offenders, critical ones first where there are too many."""
    shown: list[list[Picture]] = [[] for _ in failed]
    room = IN_ALL
    for place in sorted(range(len(failed)), key=lambda place: failed[place]["severity"]):
        wanted = _wanted(failed[place], tables)
        found = (_picture(one, tables[one.split], archives[one.split], apply_exif) for one in wanted)
        shown[place] = list(itertools.islice((picture for picture in found if picture), min(A_CHECK, room)))
        room -= len(shown[place])
    return shown


def _wanted(failure: Mapping[str, Any], tables: Tables) -> Iterator[_Wanted]:
    """The images of the first offenders, each once; after one that is there twice, the other."""
    split, first = failure["split"], failure["first"]
    if failure["table"] == "annotations":
        ids: dict[int, list[int]] = {record["image_id"]: [] for record in first}
        for record in first:
            ids[record["image_id"]].append(record["id"])
        yield from (_Wanted(split, image_id, tuple(marked)) for image_id, marked in ids.items())
    elif failure["table"] == "images":
        images = tables[split]["images"]
        for row in images[images["id"].isin([record["id"] for record in first])].itertuples():
            yield _Wanted(split, row.id, ())
            if "duplicate_problem" in first[0]:
                yield _Wanted(row.twin_split, row.twin_id, ())
            if "leakage_problem" in first[0]:
                yield _Wanted(row.leak_split, row.leak_id, ())


def _picture(
    wanted: _Wanted, tables: Mapping[str, pd.DataFrame], archive: ImageArchive, apply_exif: bool
) -> Picture | None:
    """None where there is no such image, or its file cannot be decoded."""
    images, annotations = tables["images"], tables["annotations"]
    record = next(images[images["id"] == wanted.image_id].itertuples(), None)
    if record is None or record.file_width is None or record.file_width * record.file_height > LARGEST:
        return None
    image = _small(archive, record.file_name)
    if image is None:
        return None
    size = record.file_width, record.file_height
    if apply_exif:
        image = upright(image, record.orientation)
        size = size if record.orientation < TURNED else size[::-1]
    scale = image.width / size[0], image.height / size[1]
    of_image = annotations[annotations["image_id"] == wanted.image_id]
    marked = of_image["id"].isin(wanted.marked).to_numpy()
    image = _with_boxes(image, of_image[list("xywh")].to_numpy(np.float64) * (*scale, *scale), marked)
    output = io.BytesIO()
    image.save(output, "JPEG", quality=QUALITY)
    names = dict(zip(tables["categories"]["id"], tables["categories"]["name"], strict=True))
    boxes = [f"{row.id} ({names.get(row.category_id, row.category_id)})" for row in of_image[marked].itertuples()]
    lines = [f"{wanted.split} image {wanted.image_id}", str(record.file_name)]
    if boxes:
        lines.append(f"box {', '.join(boxes[:NAMED])}" + ", ..." * (len(boxes) > NAMED))
    return Picture(output.getvalue(), image.width, image.height, tuple(lines))


def _small(archive: ImageArchive, file_name: str) -> Image.Image | None:
    """The picture as RGB, its longer side SIDE pixels; None where it cannot be decoded."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(archive.read(file_name))) as image:
            warnings.simplefilter("ignore")  # Pillow's advice on palettes and on large pictures
            factor = SIDE / max(image.size)
            size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
            image.draft("RGB", (2 * size[0], 2 * size[1]))  # a JPEG may be decoded smaller, at least so large
            grey = np.asarray(image) >> 8 if image.mode.startswith("I;16") else None  # Pillow would clip it
            picture = image if grey is None else Image.fromarray(grey.astype(np.uint8))
            return picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    except (ArchiveError, *DAMAGED):
        return None


def _with_boxes(image: Image.Image, xywh: NDArray[np.float64], marked: NDArray[np.bool_]) -> Image.Image:
    """The picture with boxes [n,4] in its pixels, the marked ones above; with a margin where one of them is outside."""
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    drawable = np.isfinite(corners).all(axis=1)
    outside = (corners < -1).any(axis=1) | (corners[:, 2:] > (image.width + 1, image.height + 1)).any(axis=1)
    margin = MARGIN if (outside & marked & drawable).any() else 0
    if margin:
        canvas = Image.new("RGB", (image.width + 2 * margin, image.height + 2 * margin), OUTSIDE)
        canvas.paste(image, (margin, margin))
        image = canvas
    draw = ImageDraw.Draw(image)
    low, high = (0, 0, 0, 0), (image.width - 1, image.height - 1) * 2
    for kind, colour, line in ((~marked, OTHERS, 1), (marked, MARKED, 3)):
        for box in corners[kind & drawable]:
            left, top, right, bottom = np.clip(np.rint(box + margin), low, high).tolist()
            edges = min(left, right), min(top, bottom), max(left, right), max(top, bottom)  # of a negative size, too
            around = edges[0] - 1, edges[1] - 1, edges[2] + 1, edges[3] + 1
            draw.rectangle(around, outline=EDGE)
            draw.rectangle(edges, outline=colour, width=line)
    return image
