"""COCO metrics against numbers made by hand, and against pycocotools."""

import json

import numpy as np
import pytest

from pipeline.coco_metrics import NOTHING_TO_FIND, SUMMARY, coco_evaluation, coco_metrics, figures
from pipeline.coco_reference import ALWAYS_WHOLE, SUBSET, reference_evaluation, require_same, subset, verify
from pipeline.errors import PipelineError


def annotation(number, image, category, box, iscrowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": iscrowd,
    }


def detection(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


@pytest.fixture
def truth(tmp_path):
    """Two images, two categories; the annotation ids begin at 0, which pycocotools takes for "no match"."""
    path = tmp_path / "ground_truth.json"
    content = {
        "images": [{"id": 7, "width": 200, "height": 200}, {"id": 9, "width": 200, "height": 200}],
        "categories": [{"id": 1, "name": "a"}, {"id": 5, "name": "b"}, {"id": 6, "name": "never"}],
        "annotations": [
            annotation(0, 7, 1, [10, 10, 20, 20]),
            annotation(1, 9, 1, [10, 10, 20, 20]),
            annotation(2, 7, 5, [50, 50, 100, 100]),
        ],
    }
    path.write_text(json.dumps(content))
    return path


def test_perfect_detections(truth):
    found = [
        detection(7, 1, [10, 10, 20, 20], 0.9),
        detection(9, 1, [10, 10, 20, 20], 0.8),
        detection(7, 5, [50, 50, 100, 100], 0.9),
    ]
    metrics = coco_metrics(truth, found)
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == pytest.approx(1.0)
    assert metrics["per_category"] == pytest.approx({1: 1.0, 5: 1.0, 6: NOTHING_TO_FIND})
    assert metrics["APm"] == NOTHING_TO_FIND  # 20**2 is small, 100**2 is large
    assert list(metrics) == [*SUMMARY, "per_category"]


def test_image_without_detections_counts(truth):
    # Category 1: one of two found without a false one: precision 1 up to recall 0.5, so 51 of 101 points.
    # Category 5: none found.
    metrics = coco_metrics(truth, [detection(7, 1, [10, 10, 20, 20], 0.9)])
    assert metrics["per_category"][1] == pytest.approx(51 / 101)
    assert metrics["AP"] == pytest.approx(51 / 101 / 2)
    assert metrics["AR100"] == pytest.approx(0.25)


def test_no_detections_are_zeros(truth):
    metrics = coco_metrics(truth, [])
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 0.0
    assert metrics["per_category"] == {1: 0.0, 5: 0.0, 6: NOTHING_TO_FIND}


def test_iou_of_thresholds(truth):
    # 20 x 20 against 20 x 15 inside it: IoU 0.75 passes six of ten thresholds (0.50 .. 0.75).
    found = [detection(image, 1, [10, 10, 20, 15], 0.9) for image in (7, 9)]
    assert coco_metrics(truth, found)["per_category"][1] == pytest.approx(0.6)


def test_crowd_is_neither_missed_nor_false(tmp_path):
    path = tmp_path / "ground_truth.json"
    content = {
        "images": [{"id": 1, "width": 200, "height": 200}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [annotation(1, 1, 1, [0, 0, 20, 20]), annotation(2, 1, 1, [100, 100, 80, 80], iscrowd=1)],
    }
    path.write_text(json.dumps(content))
    found = [detection(1, 1, [0, 0, 20, 20], 0.5), detection(1, 1, [110, 110, 20, 20], 0.9)]
    assert coco_metrics(path, found)["AP"] == pytest.approx(1.0)


def test_unknown_image_is_named(truth):
    with pytest.raises(PipelineError, match="1 images that are not in it, the first 8"):
        coco_metrics(truth, [detection(8, 1, [0, 0, 1, 1], 0.5)])


def test_says_nothing(truth, capsys):
    coco_metrics(truth, [])
    assert capsys.readouterr().out == ""


# Against pycocotools --------------------------------------------------------------------------------------------------

CASES = {  # images, categories, most objects an image, most detections an image
    "usual": (20, 5, 8, 30),
    "more than 100 detections an image": (3, 1, 20, 260),
    "nothing to find": (5, 2, 0, 10),
    "nothing found": (5, 3, 4, 0),
}


def made(seed, images, categories, objects, found, first_id=0):
    """A set with crowds, boxes at the limits of sizes, ids in no order, some without either; ties for even seeds."""
    rng = np.random.default_rng(seed)
    ids = (rng.permutation(3 * images)[:images] + first_id).tolist()
    names = (1 + rng.permutation(90)[:categories]).tolist()
    rows, detections = [], []
    for image_id in ids:
        own = []
        for _ in range(rng.integers(0, objects + 1)):
            box = [*rng.uniform(0, 300, 2).round(1).tolist(), *np.exp(rng.uniform(1, 5.5, 2)).round(1).tolist()]
            own.append(annotation(len(rows) + len(own), image_id, int(rng.choice(names)), box, int(rng.random() < 0.1)))
            if rng.random() < 0.2:
                own[-1]["area"] = float(rng.choice([32**2, 96**2]))
        rows += own
        for _ in range(rng.integers(0, found + 1)):
            near = own[rng.integers(len(own))] if own and rng.random() < 0.7 else None
            box = near["bbox"] if near else [50, 60, 70, 80]
            moved = (np.array(box) + rng.normal(0, 5, 4)).clip(1).round(3).tolist()
            category = near["category_id"] if near and rng.random() < 0.8 else int(rng.choice(names))
            detections.append(detection(image_id, category, moved, round(float(rng.random()), 1 + 5 * (seed % 2))))
    images_rows = [{"id": number, "width": 640, "height": 480} for number in ids]
    categories_rows = [{"id": number, "name": str(number)} for number in sorted(names)]
    return {"images": images_rows, "annotations": rows, "categories": categories_rows}, detections


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(6))
def test_every_number_is_pycocotools(case, seed):
    truth, found = made(seed, *CASES[case], first_id=2**60 if seed == 5 else 0)
    ours, theirs = coco_evaluation(truth, found), reference_evaluation(truth, found)
    assert ours.stats.tolist() == theirs.stats.tolist()
    assert list(ours.params.catIds) == list(theirs.params.catIds)
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(ours.eval[name], theirs.eval[name], strict=True)
    assert case != "nothing to find" or set(ours.stats.tolist()) == {NOTHING_TO_FIND}
    assert verify(truth, found, ours, "subset")["of"] == "all"


def test_a_difference_names_the_metric_and_both_figures():
    truth, found = made(1, *CASES["usual"])
    right = figures(coco_evaluation(truth, found))
    wrong = {**right, "APm": np.nextafter(right["APm"], 1)}
    words = rf"APm over 20 images is {wrong['APm']!r} by hotcoco and {right['APm']!r} by pycocotools"
    with pytest.raises(PipelineError, match=words.replace("(", r"\(").replace(")", r"\)")):
        require_same(wrong, right, 20)
    category = truth["categories"][2]["id"]
    wrong = {**right, "per_category": {**right["per_category"], category: 0.5}}
    with pytest.raises(PipelineError, match=f"AP of category {category} over 20 images is 0.5 by hotcoco"):
        require_same(wrong, right, 20)


def test_the_check_is_of_the_same_images_in_any_order():
    ids = list(range(10, 10 + ALWAYS_WHOLE))
    chosen = subset(ids)
    assert len(chosen) == SUBSET
    assert subset(ids[::-1]) == chosen
    # The sha256 of "17" begins 4523..., which 0.27 of all are below; of "11" 4fc8..., 0.31; of "12" 6b51..., 0.42.
    assert {17, 11, 12} <= chosen
    assert len(chosen & subset([*ids, *range(5000, 5010)])) >= SUBSET - 10


def test_large_sets_are_checked_on_the_subset_or_in_full(monkeypatch):
    rows = [annotation(n, n, 1, [10, 10, 20, 20]) for n in range(ALWAYS_WHOLE)]
    truth = {
        "images": [{"id": n, "width": 99, "height": 99} for n in range(ALWAYS_WHOLE)],
        "annotations": rows,
        "categories": [{"id": 1, "name": "a"}],
    }
    found = [detection(n, 1, [10, 10, 20, 20 - n % 9], 0.9) for n in range(ALWAYS_WHOLE)]
    evaluation = coco_evaluation(truth, found)
    assert verify(truth, found, evaluation, "full")["images"] == ALWAYS_WHOLE
    told = verify(truth, found, evaluation, "subset")
    assert (told["images"], told["of"]) == (SUBSET, "a subset fixed by the hash of the id")
    smaller = {**truth, "images": truth["images"][1:], "annotations": rows[1:]}
    assert verify(smaller, found[1:], coco_evaluation(smaller, found[1:]), "subset")["images"] == ALWAYS_WHOLE - 1
