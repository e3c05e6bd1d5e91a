"""COCO's detection metrics with the published settings: by hotcoco, whose figures are pycocotools' to the last digit.

pipeline.coco_reference holds them against pycocotools.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from effdet.boxes import yxyx_to_xywh
from pipeline.class_table import Class
from pipeline.errors import PipelineError
from pipeline.files import read_json

if TYPE_CHECKING:  # it imports TensorFlow, which nothing else here needs
    from effdet.inference import Detections as InferenceDetections
    from effdet.inference import Found

# In the order of COCOeval.stats. s, m, l: objects under 32**2, up to 96**2, above, in square pixels; 1, 10, 100:
# detections an image.
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
NOTHING_TO_FIND = -1.0  # COCOeval's value where the ground truth has no such object

Detections = Sequence[Mapping[str, Any]]  # COCO results: image_id, category_id, bbox [x, y, width, height], score
Truth = Mapping[str, Any]  # COCO's json: images, annotations, categories


def coco_metrics(ground_truth_path: Path, detections: Detections) -> dict[str, Any]:
    """The metrics of detections against every image of the ground truth.

    ground_truth_path: COCO json with images, annotations and categories. Detections in pixels of the originals.
    Returns the twelve of SUMMARY, and "per_category": {category id: AP}; each 0..1, or NOTHING_TO_FIND.
    PipelineError where a detection is of an image that the ground truth has not.
    """
    return figures(coco_evaluation(read_truth(ground_truth_path, detections), detections))


def read_truth(path: Path, detections: Detections) -> Truth:
    """The ground truth. PipelineError where it is missing, or a detection is of an image that it has not."""
    content: Truth = read_json(path, "ground truth")
    known = {image["id"] for image in content["images"]}
    strange = {detection["image_id"] for detection in detections} - known
    if strange:
        raise PipelineError(
            f"{path}: detections of {len(strange)} images that are not in it, the first {min(strange)}; "
            "were they made of other shards?"
        )
    return content


def coco_evaluation(truth: Truth, detections: Detections) -> hotcoco.COCOeval:
    """The accumulated and summarized evaluation itself. Its image ids are places among the sorted ones."""
    # Results come as a table of float64, which holds every place, but not every id.
    image_ids = np.sort(np.array([image["id"] for image in truth["images"]], np.int64))
    images = [{"id": place} for place in range(len(image_ids))]
    annotations = truth["annotations"]
    objects = hotcoco.COCO.from_arrays(
        images,
        [{"id": category["id"], "name": str(category["id"])} for category in truth["categories"]],
        np.searchsorted(image_ids, column(annotations, "image_id", np.int64)),
        column(annotations, "category_id", np.int64),
        boxes_of(annotations),
        ids=np.arange(1, len(annotations) + 1),
        area=column(annotations, "area", np.float64),
        iscrowd=column(annotations, "iscrowd", np.bool_),
    )
    results = np.empty((len(detections), 7))
    results[:, 0] = np.searchsorted(image_ids, column(detections, "image_id", np.int64))
    results[:, 1:5] = boxes_of(detections)
    results[:, 5] = column(detections, "score", np.float64)
    results[:, 6] = column(detections, "category_id", np.int64)
    evaluation = hotcoco.COCOeval(objects, objects.load_res(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its summary
        evaluation.summarize()
    return evaluation


def column(rows: Detections, key: str, kind: type[np.generic]) -> NDArray[Any]:
    """The rows' values under `key`: [n]."""
    return np.fromiter((row[key] for row in rows), kind, len(rows))


def boxes_of(rows: Detections) -> NDArray[np.float64]:
    """The rows' boxes: [n,4] xywh."""
    return np.fromiter((edge for row in rows for edge in row["bbox"]), np.float64, 4 * len(rows)).reshape(-1, 4)


def figures(evaluation: Any) -> dict[str, Any]:
    """The twelve of SUMMARY and "per_category", of an evaluation by hotcoco or by pycocotools."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category], all areas, 100 detections
    per_category = {category: mean_precision(precision[:, :, k]) for k, category in enumerate(evaluation.params.catIds)}
    return {**dict(zip(SUMMARY, evaluation.stats.tolist(), strict=True)), "per_category": per_category}


def coco_results(found: InferenceDetections, classes: Sequence[Class]) -> list[dict[str, Any]]:
    """Detections as COCO results, in their order; boxes to 0.001 pixel, scores to 1e-6, as they are written and judged.

    A class id that the table has not is left out: COCO's head of 90 classes has ten without a category.
    """
    category_ids = {row.class_id: row.category_id for row in classes}
    boxes = yxyx_to_xywh(found.boxes.astype(np.float64)).round(3)
    scores = found.scores.astype(np.float64).round(6)
    return [
        row
        for image, count in enumerate(found.counts)
        for row in _rows(
            int(found.image_ids[image]),
            boxes[image, :count],
            scores[image, :count],
            found.class_ids[image, :count],
            category_ids,
        )
    ]


def coco_rows(image_id: int, found: Found, classes: Sequence[Class]) -> list[dict[str, Any]]:
    """One picture's detections as COCO results; otherwise as coco_results."""
    category_ids = {row.class_id: row.category_id for row in classes}
    boxes = yxyx_to_xywh(found.boxes.astype(np.float64)).round(3)
    return _rows(image_id, boxes, found.scores.astype(np.float64).round(6), found.class_ids, category_ids)


def _rows(
    image_id: int,
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    class_ids: NDArray[np.int32],
    category_ids: Mapping[int, int],
) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "category_id": category_ids[class_id], "bbox": box, "score": score}
        for box, score, class_id in zip(boxes.tolist(), scores.tolist(), class_ids.tolist(), strict=True)
        if class_id in category_ids
    ]


def mean_precision(precision: np.ndarray) -> float:
    """Mean over those entries that are defined, or NOTHING_TO_FIND: what COCOeval's summary does."""
    defined = precision[precision >= 0]
    return float(defined.mean()) if defined.size else NOTHING_TO_FIND
