"""What AP50 would be without each kind of error, and calibration, by hand."""

import pytest

from pipeline.calibration import calibration
from pipeline.coco_metrics import coco_evaluation
from pipeline.error_breakdown import KINDS, error_breakdown

BOX, OFF, FAR = [0, 0, 100, 100], [0, 0, 100, 40], [500, 500, 50, 50]  # OFF: IoU 0.4 with BOX
A, B = 1, 2
HALF = 51 / 101  # the AP of one found of two, without a false one


def evaluated(found, crowd=()):
    """Images 1 and 2 with an A each, image 3 with a B, and what was found: image, class, box, score."""
    objects = [(1, A, BOX, 0), (2, A, BOX, 0), (3, B, BOX, 0), *((image, kind, box, 1) for image, kind, box in crowd)]
    truth = {
        "images": [{"id": number, "width": 640, "height": 640} for number in (1, 2, 3)],
        "categories": [{"id": A, "name": "a"}, {"id": B, "name": "b"}],
        "annotations": [
            {"image_id": image, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for image, kind, box, crowd in objects
        ],
    }
    rows = [dict(zip(("image_id", "category_id", "bbox", "score"), row, strict=True)) for row in found]
    return coco_evaluation(truth, rows)


RIGHT = [(1, A, BOX, 0.95), (3, B, BOX, 0.7)]
SECOND = (2, A, BOX, 0.65)
# What is found beside RIGHT; AP50 of A and of B; and for each kind that occurs its number, and AP50 of both without it.
CASES = {
    "classification": ([(2, B, BOX, 0.8)], (HALF, 1 / 2), {"classification": (1, (1, 1))}),
    "localisation": ([(2, A, OFF, 0.8)], (HALF, 1), {"localisation": (1, (1, 1))}),
    "both": ([(2, B, OFF, 0.8)], (HALF, 1 / 2), {"both": (1, (HALF, 1)), "missed": (1, (1, 1 / 2))}),
    # right, wrong, right: precision 1 up to recall 1/2, then 2/3
    "duplicate": ([(1, A, BOX, 0.8), SECOND], ((51 + 50 * 2 / 3) / 101, 1), {"duplicate": (1, (1, 1))}),
    # wrong, right, right: precision 2/3 throughout
    "background": ([(3, A, FAR, 0.99), SECOND], (2 / 3, 1), {"background": (1, (1, 1))}),
    "missed": ([], (HALF, 1), {"missed": (1, (1, 1))}),
    "none": ([SECOND], (1, 1), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_by_hand(case):
    found, aps, errors = CASES[case]
    evaluation = evaluated(RIGHT + found)
    assert evaluation.stats[1] == pytest.approx(sum(aps) / 2)
    rows = {row["error"]: row for row in error_breakdown(evaluation)}
    assert list(rows) == list(KINDS)
    for kind, row in rows.items():
        count, without = errors.get(kind, (0, aps))
        assert row["count"] == count, kind
        assert row["AP50_without"] == pytest.approx(sum(without) / 2, abs=1e-6), kind
        assert row["AP50_gain"] == pytest.approx((sum(without) - sum(aps)) / 2, abs=2e-6), kind


def test_what_lies_in_a_crowd_is_no_error_and_no_score():
    evaluation = evaluated([*RIGHT, SECOND, (2, A, FAR, 0.9)], crowd=[(2, A, [400, 400, 200, 200])])
    assert {row["count"] for row in error_breakdown(evaluation)} == {0}
    assert sum(row["detections"] for row in calibration(evaluation).bins) == 3


def test_calibration_by_hand():
    # from 0.9: 0.95 right, 0.91 wrong; 0.7 to 0.8: right; 0.2 to 0.3: wrong
    found = [(1, A, BOX, 0.95), (2, A, FAR, 0.91), (3, B, BOX, 0.75), (3, A, BOX, 0.25)]
    judged = calibration(evaluated(found))
    assert judged.bins == [
        {"from": 0.2, "to": 0.3, "detections": 1, "score": 0.25, "right": 0.0},
        {"from": 0.7, "to": 0.8, "detections": 1, "score": 0.75, "right": 1.0},
        {"from": 0.9, "to": 1.0, "detections": 2, "score": 0.93, "right": 0.5},
    ]
    assert judged.error == pytest.approx((0.25 + 0.25 + 2 * 0.43) / 4)


def test_calibration_without_detections():
    judged = calibration(evaluated([]))
    assert (judged.error, judged.bins) == (None, [])
