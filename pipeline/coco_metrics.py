"""COCO's detection metrics by pycocotools 2.0, its COCOeval with the published settings."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effdet.boxes import yxyx_to_xywh
from effdet.inference import Detections as InferenceDetections
from effdet.inference import Found
from pipeline.class_table import Class
from pipeline.errors import PipelineError
from pipeline.files import read_json

# In the order of COCOeval.stats. s, m, l: objects under 32**2, up to 96**2, above, in square pixels; 1, 10, 100:
# detections an image.
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
NOTHING_TO_FIND = -1.0  # COCOeval's value where the ground truth has no such object

Detections = Sequence[Mapping[str, Any]]  # COCO results: image_id, category_id, bbox [x, y, width, height], score


def coco_metrics(ground_truth_path: Path, detections: Detections) -> dict[str, Any]:
    """The metrics of detections against every image of the ground truth.

    ground_truth_path: COCO json with images, annotations and categories. Detections in pixels of the originals.
    Returns the twelve of SUMMARY, and "per_category": {category id: AP}; each 0..1, or NOTHING_TO_FIND.
    PipelineError where a detection is of an image that the ground truth has not.
    """
    evaluation = coco_evaluation(ground_truth_path, detections)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category], all areas, 100 detections
    per_category = {category: mean_precision(precision[:, :, k]) for k, category in enumerate(evaluation.params.catIds)}
    return {**dict(zip(SUMMARY, evaluation.stats.tolist(), strict=True)), "per_category": per_category}


def coco_evaluation(ground_truth_path: Path, detections: Detections) -> COCOeval:
    """The accumulated and summarized evaluation itself; arguments and error as for coco_metrics."""
    content = read_json(ground_truth_path, "ground truth")
    known = {image["id"] for image in content["images"]}
    strange = {detection["image_id"] for detection in detections} - known
    if strange:
        raise PipelineError(
            f"{ground_truth_path}: detections of {len(strange)} images that are not in it, the first {min(strange)}; "
            "were they made of other shards?"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells its steps on stdout
        evaluation = COCOeval(_ground_truth(content), _results(content, detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def coco_results(found: InferenceDetections, classes: Sequence[Class]) -> list[dict[str, Any]]:
    """Detections as COCO results, in their order; boxes to 0.001 pixel, scores to 1e-6, as they are written and judged.

    A class id that the table has not is left out: COCO's head of 90 classes has ten without a category.
    """
    category_ids = {row.class_id: row.category_id for row in classes}
    boxes = yxyx_to_xywh(found.boxes.astype(np.float64)).round(3)
    scores = found.scores.astype(np.float64).round(6)
    return [
        {
            "image_id": int(found.image_ids[image]),
            "category_id": category_ids[class_id],
            "bbox": boxes[image, place].tolist(),
            "score": float(scores[image, place]),
        }
        for image, count in enumerate(found.counts)
        for place in range(count)
        if (class_id := int(found.class_ids[image, place])) in category_ids
    ]


def coco_rows(image_id: int, found: Found, classes: Sequence[Class]) -> list[dict[str, Any]]:
    """One picture's detections as COCO results; otherwise as coco_results."""
    count = np.array([len(found.scores)], np.int32)
    one = InferenceDetections(np.array([image_id]), found.boxes[None], found.scores[None], found.class_ids[None], count)
    return coco_results(one, classes)


def mean_precision(precision: np.ndarray) -> float:
    """Mean over those entries that are defined, or NOTHING_TO_FIND: what COCOeval's summary does."""
    defined = precision[precision >= 0]
    return float(defined.mean()) if defined.size else NOTHING_TO_FIND


def _ground_truth(content: Mapping[str, Any]) -> COCO:
    # Numbered from 1: pycocotools marks a detection by the id of its match, and reads 0 as no match.
    return _indexed({**content, "annotations": _numbered(content["annotations"])})


def _results(content: Mapping[str, Any], detections: Detections) -> COCO:
    boxes = [
        {**detection, "area": detection["bbox"][2] * detection["bbox"][3], "iscrowd": 0} for detection in detections
    ]
    return _indexed({"images": content["images"], "categories": content["categories"], "annotations": _numbered(boxes)})


def _numbered(annotations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)]


def _indexed(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco
