"""Which object each detection of a score that counts is of, at an IoU of 0.5: for confusions, and for an image's score.

A detection first takes the object of its own class that it overlaps most, the best scores first, as COCO's evaluation
does; what is left over takes the object of another class that it overlaps most. Crowds as in COCO's: a detection that
lies in one of its class is neither right nor wrong.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.coco_metrics import Detections, Truth, boxes_of, column

IOU = 0.5
NOTHING, IN_CROWD = -1, -2  # in place of an object
CHUNK = 100_000  # pairs of a detection and an object compared at a time: some 20 MB


@dataclasses.dataclass(frozen=True)
class Matched:
    """D detections, N objects that are no crowds."""

    image_ids: NDArray[np.int64]  # of all images, sorted
    object_images: NDArray[np.int64]  # [N], places among image_ids; so the next
    detection_images: NDArray[np.int64]  # [D]
    object_categories: NDArray[np.int64]  # [N]
    detection_categories: NDArray[np.int64]  # [D]
    objects: NDArray[np.int64]  # [D]: the object that a detection is of, NOTHING or IN_CROWD


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """How right the detections on an image are."""

    image_id: int
    right: int  # detections on an object of their class
    wrong: int  # other detections, those in crowds left out
    missed: int  # objects without a detection of their class

    @property
    def f1(self) -> float:
        """2 right / (2 right + wrong + missed); 1 where there is nothing to find and nothing was found."""
        counted = 2 * self.right + self.wrong + self.missed
        return 2 * self.right / counted if counted else 1.0


def match(truth: Truth, detections: Detections, min_score: float) -> Matched:
    """Matches the detections of at least min_score; each is of an image of the truth."""
    image_ids = np.sort(np.array([image["id"] for image in truth["images"]], np.int64))
    rows = [row for row in detections if row["score"] >= min_score]
    images = np.searchsorted(image_ids, column(rows, "image_id", np.int64))
    order = np.lexsort((-column(rows, "score", np.float64), images))  # by image, the best first; stable
    images, categories = images[order], column(rows, "category_id", np.int64)[order]
    boxes = boxes_of(rows)[order]

    objects = [row for row in truth["annotations"] if not row["iscrowd"]]
    crowds = [row for row in truth["annotations"] if row["iscrowd"]]
    object_images, object_categories = _placed(objects, image_ids)
    crowd_images, crowd_categories = _placed(crowds, image_ids)

    matched = np.full(len(rows), NOTHING)
    free = np.ones(len(objects), bool)
    pairs = np.concatenate(list(_overlaps(images, boxes, object_images, boxes_of(objects), crowd=False)))
    same = categories[pairs["detection"]] == object_categories[pairs["object"]]
    _take(pairs[same], matched, free)
    in_crowd = np.concatenate(list(_overlaps(images, boxes, crowd_images, boxes_of(crowds), crowd=True)))
    of_class = categories[in_crowd["detection"]] == crowd_categories[in_crowd["object"]]
    inside = in_crowd["detection"][of_class]
    matched[inside[matched[inside] == NOTHING]] = IN_CROWD
    _take(pairs[~same], matched, free)
    return Matched(image_ids, object_images, images, object_categories, categories, matched)


PAIR = np.dtype([("detection", np.int64), ("object", np.int64), ("iou", np.float64)])


def _placed(rows: Detections, image_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows' images, as places among the ids, and their categories."""
    return np.searchsorted(image_ids, column(rows, "image_id", np.int64)), column(rows, "category_id", np.int64)


def _overlaps(
    images: NDArray[np.int64],
    boxes: NDArray[np.float64],
    object_images: NDArray[np.int64],
    object_boxes: NDArray[np.float64],
    *,
    crowd: bool,
) -> Iterator[NDArray[np.void]]:
    """The pairs of one image that overlap by IOU; boxes xywh, `images` sorted. Of a crowd: the part that lies in it."""
    by_image = np.argsort(object_images, kind="stable")
    first = np.searchsorted(object_images[by_image], images)  # [D], the image's first object
    counts = np.searchsorted(object_images[by_image], images, side="right") - first
    ends = np.cumsum(counts)
    start = 0
    yield np.empty(0, PAIR)
    while start < len(images):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
        part = counts[start:stop]
        detection = np.repeat(np.arange(start, stop), part)
        within = np.arange(len(detection)) - np.repeat(ends[start:stop] - part - done, part)
        chosen = by_image[first[detection] + within]
        iou = _iou(boxes[detection], object_boxes[chosen], crowd)
        found = iou >= IOU
        pairs = np.empty(int(found.sum()), PAIR)
        pairs["detection"], pairs["object"], pairs["iou"] = detection[found], chosen[found], iou[found]
        yield pairs
        start = stop


def _iou(one: NDArray[np.float64], other: NDArray[np.float64], crowd: bool) -> NDArray[np.float64]:
    """Of boxes xywh, pair by pair: [n]. `crowd`: over the area of `one` alone."""
    low = np.maximum(one[:, :2], other[:, :2])
    high = np.minimum(one[:, :2] + one[:, 2:], other[:, :2] + other[:, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=1)
    area = np.prod(one[:, 2:], axis=1)
    whole = area if crowd else area + np.prod(other[:, 2:], axis=1) - common
    found: NDArray[np.float64] = np.divide(common, whole, out=np.zeros_like(common), where=whole > 0)
    return found


def _take(pairs: NDArray[np.void], matched: NDArray[np.int64], free: NDArray[np.bool_]) -> None:
    """Gives each detection in turn the free object it overlaps most, of equals the last as COCO's evaluation does."""
    order = np.lexsort((-pairs["object"], -pairs["iou"], pairs["detection"]))
    chosen = pairs[order]
    for detection, place in zip(chosen["detection"].tolist(), chosen["object"].tolist(), strict=True):
        if matched[detection] == NOTHING and free[place]:
            matched[detection], free[place] = place, False


def image_scores(matched: Matched) -> list[ImageScore]:
    """The score of every image, the worst first: by F1, then by the number of errors, then by id.

    Of images without an error those with the most objects come last.
    """
    count = len(matched.image_ids)
    found = np.maximum(matched.objects, 0)
    right = matched.objects >= 0
    if right.any():
        right = right & (matched.object_categories[found] == matched.detection_categories)
    wrong = ~right & (matched.objects != IN_CROWD)
    rights = np.bincount(matched.detection_images[right], minlength=count)
    wrongs = np.bincount(matched.detection_images[wrong], minlength=count)
    missed = np.bincount(matched.object_images, minlength=count) - rights
    columns = (matched.image_ids, rights, wrongs, missed)
    scores = [ImageScore(*row) for row in zip(*(values.tolist() for values in columns), strict=True)]
    return sorted(scores, key=lambda score: (score.f1, -score.wrong - score.missed, score.right, score.image_id))
