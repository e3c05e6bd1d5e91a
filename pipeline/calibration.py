"""How far scores are probabilities: of the detections with a score near s, which share is right?

Right is a detection that COCO's evaluation gives an object at IoU 0.5; those it ignores (crowds) are left out.
"""

import dataclasses
from typing import Any

import hotcoco

IOU = 0.5
BINS = 10  # of equal width, from 0 to 1
DIGITS = 6  # of figures that are looked at, and compared with nothing


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The reliability curve and its distance from the diagonal."""

    error: float | None  # expected calibration error: mean |right - score| of the bins, by detections; None without any
    bins: list[dict[str, Any]]  # those with detections: from, to, detections, score (mean), right (share)


def calibration(evaluation: hotcoco.COCOeval) -> Calibration:
    """Of all detections that count."""
    found = evaluation.calibration(n_bins=BINS, iou_threshold=IOU)
    bins = [
        {
            "from": round(row["bin_lower"], DIGITS),
            "to": round(row["bin_upper"], DIGITS),
            "detections": row["count"],
            "score": round(row["avg_confidence"], DIGITS),
            "right": round(row["avg_accuracy"], DIGITS),
        }
        for row in found["bins"]
        if row["count"]
    ]
    return Calibration(round(found["ece"], DIGITS) if bins else None, bins)
