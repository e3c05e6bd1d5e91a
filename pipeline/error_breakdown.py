"""What AP50 would be without each kind of error (TIDE, arXiv:2008.08115), by hotcoco.

Of detections that are right at no object, at the paper's IoUs of 0.5 and 0.1:
  classification   on an object, of another class
  localisation     of an object's class, too far off (IoU 0.1 to 0.5)
  both             of another class and too far off
  duplicate        on an object that a better detection has
  background       on nothing (IoU under 0.1)
  missed           objects that none of the first two is about
Without an error means: the detection is put right, or left out where its object has one already; a missed object is
not asked for. The differences do not add up.
"""

from typing import Any

import hotcoco

from pipeline.coco_metrics import SUMMARY

IOU, BACKGROUND_IOU = 0.5, 0.1
KINDS = {
    "classification": "Cls",
    "localisation": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}
DIGITS = 6  # of figures that are looked at, and compared with nothing


def error_breakdown(evaluation: hotcoco.COCOeval) -> list[dict[str, Any]]:
    """A row for each kind: "error", "count", "AP50_gain" and "AP50_without" (None where there is nothing to find)."""
    found = evaluation.tide_errors(pos_thr=IOU, bg_thr=BACKGROUND_IOU)
    ap50 = float(evaluation.stats[SUMMARY.index("AP50")])
    rows = []
    for kind, name in KINDS.items():
        gain = float(found["delta_ap"][name]) if ap50 >= 0 else None
        rows.append(
            {
                "error": kind,
                "count": int(found["counts"][name]),
                "AP50_gain": None if gain is None else round(gain, DIGITS),
                "AP50_without": None if gain is None else round(ap50 + gain, DIGITS),
            }
        )
    return rows
