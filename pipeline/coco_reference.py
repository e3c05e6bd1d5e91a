"""The check of COCO's metrics against pycocotools 2.0, which defines them: to the last digit, or an error."""

import contextlib
import hashlib
import importlib.metadata
import io
from collections.abc import Mapping
from typing import Any, Literal

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.coco_metrics import SUMMARY, Detections, Truth, coco_evaluation, figures
from pipeline.errors import PipelineError

SUBSET = 500  # images: some seconds of pycocotools, against most of a minute for val2017
ALWAYS_WHOLE = 1000  # images; below, all are judged twice


def verify(truth: Truth, detections: Detections, found: Any, how: Literal["subset", "full"]) -> dict[str, Any]:
    """What was checked, and against what. PipelineError with the first figure that differs, and both its values.

    `found`: coco_evaluation's of the same arguments. A subset is always of the same images, and judged by both anew.
    """
    whole = how == "full" or len(truth["images"]) < ALWAYS_WHOLE
    if not whole:
        ids = subset([image["id"] for image in truth["images"]])
        truth = {
            "images": [image for image in truth["images"] if image["id"] in ids],
            "annotations": [row for row in truth["annotations"] if row["image_id"] in ids],
            "categories": truth["categories"],
        }
        detections = [row for row in detections if row["image_id"] in ids]
        found = coco_evaluation(truth, detections)
    require_same(figures(found), figures(reference_evaluation(truth, detections)), len(truth["images"]))
    return {
        "against": f"pycocotools {importlib.metadata.version('pycocotools')}",
        "images": len(truth["images"]),
        "of": "all" if whole else "a subset fixed by the hash of the id",
    }


def subset(image_ids: list[int]) -> set[int]:
    """SUBSET of the ids, chosen by their hash: in whatever order they come, and mostly the same when others join."""
    ranked = sorted(image_ids, key=lambda image_id: hashlib.sha256(str(image_id).encode()).digest())
    return set(ranked[:SUBSET])


def require_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], images: int) -> None:
    """PipelineError with the first of the figures that is not the same number in both."""
    pairs = {name: (ours[name], theirs[name]) for name in SUMMARY}
    for category, value in theirs["per_category"].items():
        pairs[f"AP of category {category}"] = (ours["per_category"].get(category), value)
    for name, (our, their) in pairs.items():
        if our != their:
            raise PipelineError(
                f"evaluation: {name} over {images} images is {our!r} by hotcoco and {their!r} by pycocotools; "
                "the figures are not COCO's: nothing was written; was one of the two updated (requirements/ml.txt)?"
            )


def reference_evaluation(truth: Truth, detections: Detections) -> COCOeval:
    """pycocotools' evaluation, accumulated and summarized."""
    boxes = [{**row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in detections]
    shared = {"images": truth["images"], "categories": truth["categories"]}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells its steps on stdout
        evaluation = COCOeval(_indexed(shared, truth["annotations"]), _indexed(shared, boxes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _indexed(shared: Mapping[str, Any], annotations: Detections) -> COCO:
    coco = COCO()
    # Numbered from 1: pycocotools marks a detection by the id of its match, and reads 0 as no match.
    numbered = [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)]
    coco.dataset = {**shared, "annotations": numbered}
    coco.createIndex()
    return coco
