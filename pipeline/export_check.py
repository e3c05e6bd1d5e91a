"""Does an exported model detect what the model itself detects?

At float32 and float16 detections are compared one by one, in a process that knows nothing but the export; int8 is
judged by its AP.
"""

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

from effdet.anchors import anchors
from effdet.boxes import PADDING, xywh_to_yxyx
from effdet.config import ModelConfig
from effdet.exported import open_exported
from effdet.inference import Found, prepare_device
from effdet.postprocess import PostprocessConfig, detect
from effdet.preprocess import decode
from pipeline.class_table import Class
from pipeline.coco_metrics import coco_metrics, coco_rows
from pipeline.errors import PipelineError
from pipeline.model_files import StoredModel
from pipeline.ties import SAME_IOU, candidates_of, chosen_like, overlap

HIGH_SCORE = 0.3  # detections from this score on are compared
BEST = 10  # and, at full precision, so many of an image whatever they score
MAX_AP_LOSS = 0.02  # of int8, on val


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How far an export may be off."""

    min_iou: float
    max_score_difference: float
    min_share: float  # of detections that must have their counterpart
    best: int  # an image that are compared beside those of a high score


EXACT = Bounds(min_iou=SAME_IOU, max_score_difference=1e-3, min_share=1.0, best=BEST)
HALF = Bounds(min_iou=0.95, max_score_difference=0.02, min_share=0.99, best=0)
BOUNDS = {"saved_model": EXACT, "onnx": EXACT, "litert_float32": EXACT, "litert_float16": HALF}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How the comparison came out: over the detections of both sides that were looked for on the other."""

    images: int
    detections: int  # looked for
    found: int  # that have their counterpart
    min_iou: float  # of those
    max_score_difference: float
    ties: int  # images on which the model's detections are those of pipeline.ties

    def words(self) -> str:
        """For a person."""
        if not self.detections:
            return f"{self.images} images: nothing scored {HIGH_SCORE} or more, so nothing was compared"
        share = "all" if self.found == self.detections else f"{self.found} of"
        ties = f"; on {self.ties} of them boxes of one score tie, and it keeps another" if self.ties else ""
        return (
            f"{self.images} images: {share} {self.detections} detections found, IoU at least {self.min_iou:.6f}, "
            f"scores within {self.max_score_difference:.1e}{ties}"
        )


@dataclasses.dataclass(frozen=True)
class AveragePrecision:
    """How an export that is judged by its AP came out."""

    export: float
    model: float
    ground_truth: str  # name of the file that both were judged by

    def words(self) -> str:
        """For a person."""
        return f"AP {self.export:.4f} by {self.ground_truth}, the model's {self.model:.4f}"


class Match(NamedTuple):
    """Detections looked for on the other side, n of them."""

    found: NDArray[np.bool_]  # [n]
    overlaps: NDArray[np.floating]  # [n], with the counterpart
    score_differences: NDArray[np.floating]  # [n]


def match(ours: Found, theirs: Found, bounds: Bounds) -> Match:
    """The best of ours, or of a high score, among all of theirs."""
    compared = (np.arange(len(ours.scores)) < bounds.best) | (ours.scores >= HIGH_SCORE)
    boxes, scores, class_ids = ours.boxes[compared], ours.scores[compared], ours.class_ids[compared]
    if not len(scores) or not len(theirs.scores):
        return Match(np.zeros(len(scores), bool), np.zeros(len(scores)), np.zeros(len(scores)))
    overlaps = overlap(boxes[:, None], theirs.boxes[None])  # [n,m]
    differences = np.abs(scores[:, None] - theirs.scores)
    fits = (differences <= bounds.max_score_difference) & (class_ids[:, None] == theirs.class_ids)
    overlaps = np.where(fits, overlaps, 0.0)
    best = overlaps.argmax(axis=1)
    rows = np.arange(len(best))
    return Match(overlaps[rows, best] >= bounds.min_iou, overlaps[rows, best], differences[rows, best])


def check_export(
    path: Path,
    bounds: Bounds,
    images: Mapping[int, bytes],
    judged: Mapping[int, Found],
    stored: StoredModel,
    nms: PostprocessConfig,
) -> Comparison:
    """Compares an export with what the model itself found.

    images: id -> JPEG or PNG bytes; judged: id -> its detections by the model, of classes that are in use.
    PipelineError, naming images, where fewer detections than the bounds ask for have a counterpart.
    """
    # spawn: a fresh process
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            served = pool.submit(_all_detections, path, images, stored.config, nms).result()
        except BrokenProcessPool:
            raise PipelineError(f"{path.name}: the runtime crashed on it (or was killed: out of memory?)") from None
    candidates_on = candidates_of(stored, nms)
    in_use = [row.class_id for row in stored.classes]

    def like(image_id: int, found: Found) -> Found:
        offered = candidates_on(decode(images[image_id], stored.apply_exif).numpy())
        return of_classes(chosen_like(found, offered, nms), in_use)

    return compare(path.name, judged, served, bounds, like)


def compare(
    name: str,
    judged: Mapping[int, Found],
    served: Mapping[int, Found],
    bounds: Bounds,
    like: Callable[[int, Found], Found],
) -> Comparison:
    """The detections of the model and of the export called `name`, by image id; PipelineError as check_export.

    like: image id, detections -> the model's detections with ties broken as those break them. Where the two differ by
    ties, each is what the model finds like it.
    """

    def sides(ours: Found, theirs: Found) -> tuple[Match, Match]:
        return match(ours, theirs, bounds), match(theirs, ours, bounds)

    matches = {image_id: sides(judged[image_id], found) for image_id, found in served.items()}
    ties = 0
    if _share_found(matches) < bounds.min_share:
        for image_id in _faults(matches):
            both = [sides(like(image_id, found), found) for found in (judged[image_id], served[image_id])]
            if all(side.found.all() for again in both for side in again):
                matches[image_id] = both[1]
                ties += 1
    if _share_found(matches) < bounds.min_share:
        faults = list(_faults(matches).values())
        raise PipelineError(
            f"{name}: the exported model does not detect what the model did, on {len(faults)} of {len(served)} images "
            f"({'; '.join(faults[:5])})"
        )
    found, overlaps, differences = (np.concatenate(column) for column in zip(*chain(*matches.values()), strict=True))
    return Comparison(
        images=len(served),
        detections=found.size,
        found=int(found.sum()),
        min_iou=float(overlaps[found].min(initial=1.0)),
        max_score_difference=float(differences[found].max(initial=0.0)),
        ties=ties,
    )


def _share_found(matches: Mapping[int, tuple[Match, Match]]) -> float:
    found = np.concatenate([side.found for side in chain(*matches.values())])
    return float(found.mean()) if found.size else 1.0


def _faults(matches: Mapping[int, tuple[Match, Match]]) -> dict[int, str]:
    """What to say of the images on which something has no counterpart."""
    counts = {image_id: [int((~side.found).sum()) for side in sides] for image_id, sides in matches.items()}
    return {
        image_id: f"image {image_id}: {lost} lost, {new} new" for image_id, (lost, new) in counts.items() if lost or new
    }


def check_average_precision(
    path: Path,
    images: Iterable[tuple[int, bytes]],
    ground_truth: Path,
    model_ap: float,
    stored: StoredModel,
    nms: PostprocessConfig,
) -> AveragePrecision:
    """Judges an export on every image of the ground truth, against the model's own AP there.

    images: id, JPEG or PNG bytes. nms is for an export that gives raw heads. PipelineError where the export's AP is
    lower by more than MAX_AP_LOSS.
    """
    found = detections_of(path, images, stored.config, nms)
    results = [row for image_id, here in found for row in coco_rows(image_id, here, stored.classes)]
    average_precision = coco_metrics(ground_truth, results)["AP"]
    if average_precision < model_ap - MAX_AP_LOSS:
        raise PipelineError(
            f"{path.name}: AP {average_precision:.4f} on {ground_truth.name}, where the model has {model_ap:.4f}: more "
            f"than {MAX_AP_LOSS} lower; calibrate with pictures like these, or leave this format out"
        )
    return AveragePrecision(average_precision, model_ap, ground_truth.name)


def detections_of(
    path: Path, images: Iterable[tuple[int, bytes]], config: ModelConfig, nms: PostprocessConfig
) -> Iterator[tuple[int, Found]]:
    """What the export finds on each picture by itself, from id and JPEG or PNG bytes, of classes that are in use.

    A SavedModel decodes the pictures itself; for others they are turned by EXIF where the export says so. Detections of
    an export with raw heads are chosen by config and nms.
    """
    exported = open_exported(path)
    in_use = np.flatnonzero(exported.category_ids != PADDING)
    for image_id, encoded in images:
        picture = decode(encoded, exported.apply_exif).numpy()
        outputs = exported.run_encoded([encoded]) if exported.run_encoded else exported.run(picture[None])
        if "class_logits" in outputs:
            outputs = _of_heads(outputs, picture, config, nms)
        # COCO results have no others; nor is an empty place of use
        yield image_id, of_classes(Found(*(outputs[name][0] for name in ("boxes", "scores", "class_ids"))), in_use)


def of_classes(found: Found, class_ids: ArrayLike) -> Found:
    """Those of the detections that are of these classes."""
    here = np.isin(found.class_ids, class_ids)
    return Found(found.boxes[here], found.scores[here], found.class_ids[here])


def _all_detections(
    path: Path, images: Mapping[int, bytes], config: ModelConfig, nms: PostprocessConfig
) -> dict[int, Found]:
    prepare_device()
    return dict(detections_of(path, images.items(), config, nms))


def _of_heads(
    outputs: Mapping[str, NDArray[Any]], picture: NDArray[np.uint8], config: ModelConfig, nms: PostprocessConfig
) -> dict[str, NDArray[Any]]:
    scales = tf.constant([np.max(np.array(picture.shape[:2]) / config.image_size)], tf.float32)
    found = detect(outputs["class_logits"], outputs["box_deltas"], anchors(config), scales, nms)
    return {name: tensor.numpy() for name, tensor in found.items()}


def found_of_results(results: Sequence[Mapping[str, Any]], image_id: int, classes: Sequence[Class]) -> Found:
    """An image's detections among COCO results."""
    class_ids = {row.category_id: row.class_id for row in classes}
    rows = [row for row in results if row["image_id"] == image_id]
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    scores = np.array([row["score"] for row in rows], np.float64)
    return Found(xywh_to_yxyx(boxes), scores, np.array([class_ids[row["category_id"]] for row in rows], np.int32))
