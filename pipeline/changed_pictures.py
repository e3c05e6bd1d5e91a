"""The pictures whose detections changed most between two models, drawn: truth, before and after."""

import io
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from effdet.boxes import xywh_to_yxyx
from pipeline import exif
from pipeline.errors import PipelineError
from pipeline.rendering import CAPTION, GAP, JPEG_QUALITY, Drawn, with_boxes, write_text

SAME_IOU = 0.5  # two detections of a class that overlap so much are one
SIDE = 400  # pixels of a picture's longer side

Rows = Sequence[Mapping[str, Any]]  # of COCO results or annotations: image_id, category_id, bbox, score


def changes(before: Rows, after: Rows, min_score: float) -> dict[int, float]:
    """Image id -> how much its detections of at least min_score changed, where they did.

    A detection that only one of them has counts its score; one that both have what its score moved, and 1 - IoU.
    """
    sides: list[dict[int, list[Mapping[str, Any]]]] = [defaultdict(list), defaultdict(list)]
    for side, rows in zip(sides, (before, after), strict=True):
        for row in rows:
            if row["score"] >= min_score:
                side[row["image_id"]].append(row)
    ids = sides[0].keys() | sides[1].keys()
    found = {number: _change(sides[0].get(number, []), sides[1].get(number, [])) for number in ids}
    return {number: change for number, change in sorted(found.items()) if change > 0}


def _change(before: Rows, after: Rows) -> float:
    """The sum over one image: pairs of a class are made greedily, those that overlap most first."""
    overlaps = _overlaps(before, after)
    total: float = sum(row["score"] for row in (*before, *after))
    while overlaps.size and overlaps.max() >= SAME_IOU:
        one, other = (int(place) for place in np.unravel_index(overlaps.argmax(), overlaps.shape))
        total += abs(before[one]["score"] - after[other]["score"]) + 1 - float(overlaps[one, other])
        total -= before[one]["score"] + after[other]["score"]
        overlaps[one, :] = overlaps[:, other] = 0
    return round(total, 6)


def _overlaps(before: Rows, after: Rows) -> NDArray[np.float64]:
    """IoU [n,m] of the detections; 0 for those of other classes."""
    if not before or not after:
        return np.zeros((len(before), len(after)))
    ours, theirs = (np.array([row["bbox"] for row in rows], np.float64) for rows in (before, after))
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, :2] + ours[:, None, 2:], theirs[None, :, :2] + theirs[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    union = ours[:, None, 2:].prod(axis=2) + theirs[None, :, 2:].prod(axis=2) - shared
    classes = [np.array([row["category_id"] for row in rows]) for rows in (before, after)]
    return np.where(classes[0][:, None] == classes[1][None, :], shared / np.maximum(union, 1e-9), 0.0)


def read_image(archive: IO[bytes], file_name: str) -> bytes:
    """An image's bytes out of the zip of a split, of which no more is read; by its name, or below one top folder."""
    try:
        with zipfile.ZipFile(archive) as images:
            names = [name for name in images.namelist() if not name.startswith("__MACOSX/")]
            tops = {name.partition("/")[0] for name in names}
            candidates = [file_name, *(f"{top}/{file_name}" for top in tops if len(tops) == 1)]
            return images.read(next(name for name in candidates if name in names))
    except StopIteration:
        raise PipelineError(f"{file_name} is not in the zip of images") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise PipelineError(f"the zip of images cannot be read: {error}") from None


def triptych(
    encoded: bytes, truth: Rows, before: Rows, after: Rows, names: Mapping[int, str], apply_exif: bool
) -> bytes:
    """A JPEG of three copies of the image beside each other: true boxes, detections before, and after.

    `before` and `after` hold what is to be drawn, the best first. PipelineError where the image cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise PipelineError(f"an image cannot be decoded: {error}") from None
    if apply_exif:
        image = exif.upright(image, exif.orientation_of(encoded))
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    canvas = Image.new("RGB", (3 * size[0] + 2 * GAP, size[1] + CAPTION), (255, 255, 255))
    for place, (caption, rows) in enumerate((("truth", truth), ("before", before), ("after", after))):
        left = place * (size[0] + GAP)
        write_text(canvas, (left + 2, 3), caption)
        canvas.paste(with_boxes(pixels, list(_drawn(rows, scale, names))), (left, CAPTION))
    output = io.BytesIO()
    canvas.save(output, "JPEG", quality=JPEG_QUALITY)
    return output.getvalue()


def _drawn(rows: Rows, scale: float, names: Mapping[int, str]) -> Iterable[Drawn]:
    for row in reversed(rows):  # the best detection last, so that it lies on top
        box = xywh_to_yxyx(np.array(row["bbox"], np.float64)) * scale
        score = f" {row['score']:.2f}" if "score" in row else ""
        label = names.get(row["category_id"], str(row["category_id"])) + score
        yield Drawn(box, row["category_id"] - 1, label)
