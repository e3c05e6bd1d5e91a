"""COCO's metrics of detections over images that are drawn with repetition, matched once for all draws.

An image that is drawn m times counts as m images of equal content, side by side in the order of ids: what pycocotools
computes on the data set with these copies, to the last digit. The reason why it is fast: of a curve only the points of
right detections matter, for at all others precision falls and recall stands still, and how many detections precede
such a point is a sum of the draws of their images.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.cocoeval import Params

from pipeline.coco_metrics import NOTHING_TO_FIND, Detections, Truth, boxes_of, column

SETTINGS = Params(iouType="bbox")
IOUS: list[float] = SETTINGS.iouThrs.tolist()  # T
RECALLS: NDArray[np.float64] = SETTINGS.recThrs  # R
AREAS: list[list[float]] = SETTINGS.areaRng  # A: all, small, medium, large; both ends are within
MOST: list[int] = SETTINGS.maxDets  # detections of an image and class: 1, 10, 100

RIGHT, IGNORED = 1, 2  # what a detection is of: an object, or one that does not count in this area; 0: nothing


@dataclasses.dataclass(frozen=True)
class Figures:
    """Metrics of one draw; NOTHING_TO_FIND where it has no such object."""

    metrics: NDArray[np.float64]  # [12], pipeline.coco_metrics.SUMMARY
    per_class: NDArray[np.float64]  # [K], AP


@dataclasses.dataclass(frozen=True)
class Matched:
    """Detections as accumulation takes them. A place is one of E, by class, score (the best first), image.

    A segment is one of S = A*T*K, in this order: an area, an IoU and a class. P points are right detections, in the
    order of segments and places. I images, by id.
    """

    num_classes: int
    images: NDArray[np.int64]  # [E]
    copies: NDArray[np.int64]  # [E]: counts from this repetition of its image on; -1: in all at once
    object_images: NDArray[np.int64]  # [N], objects that count in an area, sorted by area and class
    object_places: NDArray[np.int64]  # [N], area * K + class
    inside: NDArray[np.intp]  # places of detections of an area's size, by area
    inside_before: NDArray[np.intp]  # [S], of `inside`, before the segment's class
    inside_until: NDArray[np.intp]  # [P], of `inside`, up to the point
    changed: NDArray[np.intp]  # places that count against their size, or do not with it, by segment
    changed_sign: NDArray[np.int64]  # +1, -1
    changed_before: NDArray[np.intp]  # [S]
    changed_until: NDArray[np.intp]  # [P]
    points: NDArray[np.intp]  # [P], their places
    point_ranks: NDArray[np.int64]  # [P], within image and class
    point_segments: NDArray[np.intp]  # [P]
    starts: NDArray[np.intp]  # [S + 1], of each segment's points

    def figures(self, draws: NDArray[np.integer]) -> Figures:
        """draws: [I], how often each image is there."""
        weights = draws.astype(np.int32)[self.images]
        tied = np.flatnonzero(self.copies >= 0)
        weights[tied] = weights[tied] > self.copies[tied]
        shape = len(AREAS), len(IOUS), self.num_classes
        objects = np.bincount(self.object_places, draws[self.object_images], shape[0] * shape[2])
        objects = objects.reshape(shape[0], 1, shape[2])  # [A,1,K], that are to be found
        defined = objects[:, 0] > 0  # [A,K]

        right = _sums(weights[self.points])  # [P + 1], over all segments on end
        precision = self._precision(weights, right, objects)
        precision[~np.broadcast_to(defined[:, None], shape)] = NOTHING_TO_FIND
        per_class = precision[0].transpose(1, 0, 2).reshape(shape[2], -1).mean(axis=1)

        recalls = []
        for most in MOST:
            sums = right if most == MOST[-1] else _sums(weights[self.points] * (self.point_ranks < most))
            found = np.diff(sums[self.starts]).reshape(shape)
            recall = np.divide(found, objects, out=np.full(shape, NOTHING_TO_FIND), where=objects > 0)
            recalls.append([_mean(recall[area][:, defined[area]]) for area in range(shape[0])])
        # [A][T,R,K], the order in which pycocotools adds up
        by_recall = [precision[area][:, defined[area]].transpose(0, 2, 1) for area in range(shape[0])]
        half, three_quarters = IOUS.index(0.5), IOUS.index(0.75)
        metrics = [
            _mean(by_recall[0]),
            _mean(by_recall[0][half]),
            _mean(by_recall[0][three_quarters]),
            *(_mean(part) for part in by_recall[1:]),
            *(recalls[place][0] for place in range(len(MOST))),
            *recalls[-1][1:],
        ]
        return Figures(np.array(metrics), per_class)

    def _precision(
        self, weights: NDArray[np.int32], right: NDArray[np.int64], objects: NDArray[np.number]
    ) -> NDArray[np.float64]:
        """[A,T,K,R], the best precision from each recall on."""
        inside = _sums(weights[self.inside])
        changed = _sums(weights[self.changed] * self.changed_sign)
        before = inside[self.inside_before] + changed[self.changed_before]  # [S]
        counted = inside[self.inside_until] + changed[self.changed_until] - before[self.point_segments]
        found = right[1:] - right[self.starts[:-1]][self.point_segments]
        precision = found / (counted + np.spacing(1))
        # The best precision from a recall on is that of the points which reach it; more recall comes with each point.
        total = np.maximum(np.broadcast_to(objects, (len(AREAS), len(IOUS), self.num_classes)).reshape(-1), 1)
        step = self.point_segments * len(RECALLS) + _reached(found / total[self.point_segments])
        first = np.flatnonzero(np.diff(step, prepend=-1))
        best = np.zeros((len(AREAS), len(IOUS), self.num_classes, len(RECALLS)))
        if len(first):
            best.reshape(-1)[step[first]] = np.maximum.reduceat(precision, first)
        return np.maximum.accumulate(best[..., ::-1], axis=-1)[..., ::-1]


def _reached(recalls: NDArray[np.float64]) -> NDArray[np.int64]:
    """The place of the highest of RECALLS that each reaches, as floating point has it."""
    places = (recalls * (len(RECALLS) - 1)).astype(np.int64)
    places -= RECALLS[places] > recalls
    places += np.append(RECALLS, np.inf)[places + 1] <= recalls
    return places


def _sums(values: NDArray[np.integer]) -> NDArray[np.int64]:
    """[n + 1], of the first 0, 1, ... n values."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def _mean(values: NDArray[np.float64]) -> float:
    """Added up as pycocotools does, over a row of all values."""
    return float(np.mean(np.ascontiguousarray(values).reshape(-1))) if values.size else NOTHING_TO_FIND


# Matching -------------------------------------------------------------------------------------------------------------

ROW = np.dtype(
    [
        ("class", np.int64),  # place among the categories, by id
        ("image", np.int64),  # place among the images, by id
        ("rank", np.int64),  # place within class and image
        ("box", np.float64, 4),  # xywh
        ("area", np.float64),
        ("score", np.float64),
        ("crowd", np.bool_),
    ]
)
Rows = NDArray[np.void]  # of ROW


def matched(truth: Truth, detections: Detections, most_draws: int) -> Matched:
    """Matches detections, each of an image of the truth, for draws of an image up to `most_draws` times."""
    image_ids = np.sort(np.array([image["id"] for image in truth["images"]], np.int64))
    categories = np.sort(np.array([category["id"] for category in truth["categories"]], np.int64))
    objects = _rows(truth["annotations"], image_ids, categories)
    objects["area"] = column(truth["annotations"], "area", np.float64)
    objects["crowd"] = column(truth["annotations"], "iscrowd", np.bool_)
    objects = _ranked(objects)
    found = _rows(detections, image_ids, categories)
    found["area"] = found["box"][:, 2] * found["box"][:, 3]
    found["score"] = column(detections, "score", np.float64)
    found = _ranked(found)
    found = found[found["rank"] < MOST[-1]]
    outside = np.stack([_outside(objects, area) | objects["crowd"] for area in AREAS])  # [A,N]
    outcomes = _outcomes(found, objects, outside)
    return _accumulation(found, objects, outside, outcomes, len(categories), most_draws)


def _rows(rows: Detections, image_ids: NDArray[np.int64], categories: NDArray[np.int64]) -> Rows:
    table = np.zeros(len(rows), ROW)
    table["class"] = np.searchsorted(categories, column(rows, "category_id", np.int64))
    table["image"] = np.searchsorted(image_ids, column(rows, "image_id", np.int64))
    table["box"] = boxes_of(rows)
    return table


def _ranked(rows: Rows) -> Rows:
    """By class, image and score, the best first; what is equal stays as it came."""
    rows = rows[np.lexsort((-rows["score"], rows["image"], rows["class"]))]
    groups = _groups(rows)
    rows["rank"] = np.arange(len(rows)) - np.searchsorted(groups, groups)
    return rows


def _groups(rows: Rows) -> NDArray[np.int64]:
    """A number for each class and image, rising."""
    numbers: NDArray[np.int64] = rows["class"] * (rows["image"].max(initial=0) + 1) + rows["image"]
    return numbers


def _outside(rows: Rows, area: Sequence[float]) -> NDArray[np.bool_]:
    outside: NDArray[np.bool_] = (rows["area"] < area[0]) | (rows["area"] > area[1])
    return outside


def _outcomes(found: Rows, objects: Rows, outside: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """What each detection is of, in each area and at each IoU: [A,T,D]."""
    outcomes = np.zeros((len(AREAS), len(IOUS), len(found)), np.uint8)
    both = _groups(np.concatenate([found, objects]))
    of_found, (groups, first) = both[: len(found)], np.unique(both[len(found) :], return_index=True)
    ends = np.append(first[1:], len(objects))
    starts, stops = (np.searchsorted(of_found, groups, side=side) for side in ("left", "right"))
    for number in np.flatnonzero(stops > starts).tolist():
        there, here = slice(first[number], ends[number]), slice(starts[number], stops[number])
        crowds = objects["crowd"][there]
        overlaps = mask.iou(found["box"][here], objects["box"][there], crowds)  # [d,n]
        if overlaps.max() >= IOUS[0]:
            _match_group(overlaps, outside[:, there], crowds.tolist(), outcomes[:, :, here])
    return outcomes


def _match_group(
    overlaps: NDArray[np.float64], outside: NDArray[np.bool_], crowds: Sequence[bool], outcomes: NDArray[np.uint8]
) -> None:
    """One image and class, into its part of the outcomes: COCOeval.evaluateImg.

    A detection takes, the best score first, the free object that it overlaps most, of equals the last; one that does
    not count only where no other is left. A crowd is always free.
    """
    near: dict[int, list[tuple[int, float]]] = {}
    for place, one in np.argwhere(overlaps >= IOUS[0]).tolist():
        near.setdefault(place, []).append((one, float(overlaps[place, one])))
    for area, ignored in enumerate(outside.tolist()):
        wishes = {
            place: sorted((ignored[one], -overlap, -one) for one, overlap in pairs) for place, pairs in near.items()
        }
        for level, threshold in enumerate(IOUS):
            taken: set[int] = set()
            for place, pairs in wishes.items():
                for is_ignored, overlap, one in pairs:
                    if -overlap >= threshold and -one not in taken:
                        outcomes[area, level, place] = IGNORED if is_ignored else RIGHT
                        if not crowds[-one]:
                            taken.add(-one)
                        break


def _accumulation(
    found: Rows,
    objects: Rows,
    outside: NDArray[np.bool_],
    outcomes: NDArray[np.uint8],
    num_classes: int,
    most_draws: int,
) -> Matched:
    chosen, copies = _places(found, most_draws)
    found, outcomes = found[chosen], outcomes[:, :, chosen]
    size, num_ious = max(len(found), 1), len(IOUS)
    inside = np.stack([~_outside(found, area) for area in AREAS])  # [A,E]
    signs = np.where((outcomes == RIGHT) & ~inside[:, None], 1, 0)
    signs -= (outcomes == IGNORED) & inside[:, None]
    # Places of [A,E] and [A,T,E] as numbers: they order by area, IoU, class, score.
    points, changed, by_size = (np.flatnonzero(which) for which in (outcomes == RIGHT, signs, inside))
    in_area = points // (size * num_ious) * size + points % size
    class_starts = np.searchsorted(found["class"], np.arange(num_classes))
    areas = np.arange(len(AREAS)).repeat(num_ious)  # of each segment of one class; so the next
    segments = (np.arange(len(areas))[:, None] * size + class_starts).reshape(-1)  # [S], the first place of each
    area_segments = (areas[:, None] * size + class_starts).reshape(-1)
    starts = np.append(np.searchsorted(points, segments), len(points))
    object_areas, object_numbers = np.nonzero(~outside)
    return Matched(
        num_classes=num_classes,
        images=found["image"].copy(),
        copies=copies,
        object_images=objects["image"][object_numbers],
        object_places=object_areas * num_classes + objects["class"][object_numbers],
        inside=by_size % size,
        inside_before=np.searchsorted(by_size, area_segments),
        inside_until=np.searchsorted(by_size, in_area, side="right"),
        changed=changed % size,
        changed_sign=signs.reshape(-1)[changed],
        changed_before=np.searchsorted(changed, segments),
        changed_until=np.searchsorted(changed, points, side="right"),
        points=points % size,
        point_ranks=found["rank"][points % size],
        point_segments=np.repeat(np.arange(len(segments)), np.diff(starts)),
        starts=starts,
    )


def _places(found: Rows, most_draws: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Detections in the order of places, and from which repetition of its image on each counts (-1: in all at once).

    Where an image is drawn twice, its detections of one class and one score come as often in turn, not one after the
    other: each repetition has places of its own then.
    """
    number = np.arange(len(found))
    same = (np.diff(found["score"]) == 0) & (np.diff(_groups(found)) == 0)
    tied = np.zeros(len(found), bool)
    tied[:-1] |= same
    tied[1:] |= same
    chosen = np.concatenate([number[~tied], np.repeat(number[tied], most_draws)])
    copies = np.concatenate([np.full(np.sum(~tied), -1), np.tile(np.arange(most_draws), np.sum(tied))])
    rows = found[chosen]
    order = np.lexsort((chosen, copies, rows["image"], -rows["score"], rows["class"]))
    return chosen[order], copies[order]
