"""When an export counts as detecting what the model detects."""

import numpy as np
import pytest

from effdet.inference import Found
from pipeline.class_table import class_rows
from pipeline.errors import PipelineError
from pipeline.export_check import (
    BEST,
    BOUNDS,
    EXACT,
    HALF,
    AveragePrecision,
    Comparison,
    compare,
    found_of_results,
    match,
    of_classes,
)
from tests.pipeline.judged_model import CLASSES

BOX = [10.0, 10.0, 110.0, 110.0]  # 100 x 100


def found(*rows):
    boxes, scores, class_ids = zip(*rows, strict=True) if rows else ([], [], [])
    return Found(np.reshape(boxes, (-1, 4)).astype(float), np.array(scores, float), np.array(class_ids, np.int32))


def lower(bottom):
    """BOX that ends at `bottom`: an IoU of (bottom - 10) % with it."""
    return [10.0, 10.0, bottom, 110.0]


@pytest.mark.parametrize(
    ("bounds", "other", "same"),
    [
        (EXACT, (BOX, 0.9, 1), True),
        (EXACT, (lower(109.0), 0.9, 1), True),  # IoU 0.99
        (EXACT, (lower(108.9), 0.9, 1), False),  # 0.989
        (EXACT, (BOX, 0.9009, 1), True),
        (EXACT, (BOX, 0.9011, 1), False),
        (EXACT, (BOX, 0.8989, 1), False),
        (EXACT, (BOX, 0.9, 2), False),
        (HALF, (lower(105.0), 0.9, 1), True),  # IoU 0.95
        (HALF, (lower(104.9), 0.9, 1), False),  # 0.949
        (HALF, (BOX, 0.9199, 1), True),
        (HALF, (BOX, 0.9201, 1), False),
        (HALF, (BOX, 0.9, 2), False),
    ],
)
def test_limits(bounds, other, same):
    assert match(found((BOX, 0.9, 1)), found(other), bounds).found.tolist() == [same]


def test_bounds_of_the_formats():
    exact = ("saved_model", "onnx", "litert_float32")
    assert {name: BOUNDS[name] for name in exact} == dict.fromkeys(exact, EXACT)
    assert BOUNDS["litert_float16"] == HALF
    assert "litert_int8" not in BOUNDS  # is judged by its AP
    assert (EXACT.min_share, HALF.min_share) == (1.0, 0.99)


def test_tiny_box_may_move_by_a_hundredth():
    # 0.1 x 0.1 moved by 0.005: IoU 0.9, but the same to the eye and to the file
    tiny, moved, further = ([5.0 + by, 5.0, 5.1 + by, 5.1] for by in (0.0, 0.005, 0.011))
    result = match(found((tiny, 0.9, 1)), found((moved, 0.9, 1)), EXACT)
    assert (result.found.tolist(), result.overlaps.tolist()) == ([True], [1.0])
    assert not match(found((tiny, 0.9, 1)), found((further, 0.9, 1)), EXACT).found.any()


def test_nothing_against_something():
    assert match(found(), found((BOX, 0.9, 1)), EXACT).found.tolist() == []
    assert match(found((BOX, 0.9, 1), (BOX, 0.8, 2)), found(), EXACT).found.tolist() == [False, False]
    assert match(found(), found(), EXACT).found.tolist() == []


def test_the_nearest_of_several_is_the_counterpart():
    others = found((BOX, 0.9, 2), (lower(109.5), 0.9005, 1), (lower(109.2), 0.9, 1), (BOX, 0.7, 1))
    result = match(found((BOX, 0.9, 1)), others, EXACT)
    assert result.found.tolist() == [True]
    assert result.overlaps == pytest.approx([0.995])
    assert result.score_differences == pytest.approx([0.0005])


def test_the_best_and_the_high_scores_are_compared():
    low = found(*[(BOX, 0.2 - place / 1000, 1) for place in range(BEST + 5)])
    high = found(*[(BOX, 0.3, 1) for _ in range(BEST + 5)])
    assert len(match(low, low, EXACT).found) == BEST
    assert len(match(high, high, EXACT).found) == BEST + 5
    assert len(match(low, low, HALF).found) == 0
    assert len(match(high, high, HALF).found) == BEST + 5
    assert len(match(found((BOX, 0.2999, 1)), high, HALF).found) == 0


def test_low_score_is_a_counterpart():
    """A detection that rounding takes below the limit is there all the same."""
    result = match(found((BOX, 0.305, 1)), found((BOX, 0.295, 1)), HALF)
    assert result.found.tolist() == [True]


def without_ties(ours, theirs, bounds):
    """Compares them; whatever it is shown, the model finds the same."""
    return compare("m.onnx", ours, theirs, bounds, lambda image_id, _: ours[image_id])


# Over the images ------------------------------------------------------------------------------------------------------


def spread(count, missed=0):
    """`count` detections apart from each other; the last `missed` of them elsewhere."""
    places = [20.0 * place + (500 if place >= count - missed else 0) for place in range(count)]
    return found(*[([0.0, place, 10.0, place + 10], 0.9, 1) for place in places])


def test_one_of_a_hundred_may_be_missed_at_half_precision():
    theirs = {1: spread(60), 2: spread(40, missed=1)}
    comparison = without_ties({1: spread(60), 2: spread(40)}, theirs, HALF)
    assert comparison == Comparison(images=2, detections=200, found=198, min_iou=1.0, max_score_difference=0.0, ties=0)
    theirs[2] = spread(40, missed=2)
    with pytest.raises(PipelineError, match=r"on 1 of 2 images \(image 2: 2 lost, 2 new\)"):
        without_ties({1: spread(60), 2: spread(40)}, theirs, HALF)


def test_none_may_be_missed_at_full_precision():
    ours = {1: spread(1000), 2: spread(1)}
    with pytest.raises(PipelineError, match=r"^m\.onnx: .* on 1 of 2 images \(image 1: 1 lost, 1 new\)$"):
        without_ties(ours, {1: spread(1000, missed=1), 2: spread(1)}, EXACT)
    assert without_ties(ours, ours, EXACT).found == 2002


def test_both_sides_are_looked_for():
    more, fewer = {1: spread(3)}, {1: spread(2)}
    with pytest.raises(PipelineError, match="image 1: 1 lost, 0 new"):
        without_ties(more, fewer, EXACT)
    with pytest.raises(PipelineError, match="image 1: 0 lost, 1 new"):
        without_ties(fewer, more, EXACT)


def test_tie_is_held_against_what_the_model_finds_like_it():
    ours = {1: found((BOX, 0.9, 1), (lower(60.0), 0.4, 1)), 2: spread(3)}
    theirs = {1: found((lower(100.0), 0.9, 1), (lower(55.0), 0.35, 1)), 2: spread(3)}
    likewise = found((lower(99.9), 0.9002, 1), (lower(55.0), 0.35, 1))
    comparison = compare("m.onnx", ours, theirs, EXACT, lambda _, shown: ours[1] if shown is ours[1] else likewise)
    assert (comparison.detections, comparison.found, comparison.ties) == (10, 10, 1)
    assert comparison.min_iou == pytest.approx(89.9 / 90)
    assert comparison.max_score_difference == pytest.approx(0.0002)


def test_tie_excuses_nothing_else_on_the_image():
    ours, theirs = {1: spread(2), 2: spread(3)}, {1: spread(2, missed=1), 2: spread(3, missed=1)}
    likewise = {1: spread(2, missed=1), 2: spread(3, missed=2)}
    with pytest.raises(PipelineError, match=r"on 1 of 2 images \(image 2: 1 lost, 1 new\)"):
        compare("m.onnx", ours, theirs, EXACT, lambda key, shown: shown if shown is ours[key] else likewise[key])


def test_what_was_judged_must_be_the_models_too():
    """Else detections of any other model would be ties with an export that is right."""
    ours, theirs = {1: spread(2, missed=1)}, {1: spread(2)}
    with pytest.raises(PipelineError, match="image 1: 1 lost, 1 new"):
        compare("m.onnx", ours, theirs, EXACT, lambda *_: spread(2))


def test_nothing_is_judged_again_where_the_export_passes():
    ours, theirs = {1: spread(100)}, {1: spread(100, missed=1)}
    assert compare("m.tflite", ours, theirs, HALF, None).found == 198


def test_figures_are_of_the_worst_that_was_found():
    ours = {1: found((BOX, 0.9, 1)), 2: found((BOX, 0.9, 1)), 3: found()}
    theirs = {1: found((lower(109.6), 0.9, 1)), 2: found((BOX, 0.9005, 1)), 3: found()}
    comparison = without_ties(ours, theirs, EXACT)
    assert (comparison.images, comparison.detections, comparison.found) == (3, 4, 4)
    assert comparison.min_iou == pytest.approx(0.996)
    assert comparison.max_score_difference == pytest.approx(0.0005)


def test_images_without_detections():
    comparison = without_ties({1: found()}, {1: found()}, EXACT)
    assert comparison == Comparison(images=1, detections=0, found=0, min_iou=1.0, max_score_difference=0.0, ties=0)


def test_words():
    assert Comparison(10, 200, 200, 0.99876543, 0.000123, 0).words() == (
        "10 images: all 200 detections found, IoU at least 0.998765, scores within 1.2e-04"
    )
    assert Comparison(10, 200, 198, 0.96, 0.02, 0).words() == (
        "10 images: 198 of 200 detections found, IoU at least 0.960000, scores within 2.0e-02"
    )
    assert Comparison(10, 0, 0, 1.0, 0.0, 0).words() == "10 images: nothing scored 0.3 or more, so nothing was compared"
    assert Comparison(10, 200, 200, 1.0, 0.000002, 3).words() == (
        "10 images: all 200 detections found, IoU at least 1.000000, scores within 2.0e-06; on 3 of them boxes of "
        "one score tie, and it keeps another"
    )
    assert AveragePrecision(0.41234, 0.42, "truth.json").words() == "AP 0.4123 by truth.json, the model's 0.4200"


def test_detections_of_classes():
    here = of_classes(found((BOX, 0.9, 2), (lower(50.0), 0.8, 1), (BOX, 0.7, 3), (BOX, 0.0, -1)), [1, 3])
    assert here.class_ids.tolist() == [1, 3]
    assert here.scores.tolist() == [0.8, 0.7]
    assert here.boxes.tolist() == [lower(50.0), BOX]


def test_results_as_detections():
    rows = [
        {"image_id": 5, "category_id": 9, "bbox": [1.0, 2.0, 3.0, 5.0], "score": 0.5},
        {"image_id": 6, "category_id": 3, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.4},
        {"image_id": 5, "category_id": 7, "bbox": [0.0, 0.0, 2.0, 1.0], "score": 0.3},
    ]
    here = found_of_results(rows, 5, class_rows(CLASSES))
    assert here.boxes.tolist() == [[2.0, 1.0, 7.0, 4.0], [0.0, 0.0, 1.0, 2.0]]
    assert here.scores.tolist() == [0.5, 0.3]
    assert here.class_ids.tolist() == [3, 1]
    assert found_of_results(rows, 7, class_rows(CLASSES)).boxes.shape == (0, 4)
