"""The paired bootstrap: each draw is what pycocotools makes of the data set with these copies, to the last digit."""

import json

import numpy as np
import pytest

from pipeline.bootstrap import difference, draws, intervals
from pipeline.coco_metrics import SUMMARY
from pipeline.coco_reference import reference_evaluation
from pipeline.errors import PipelineError
from pipeline.resampled_metrics import matched

CATEGORIES = [9, 4, 7, 2]  # in no order; 2 is never there, and never found
IMAGES = [31, 5, 12, 8, 77, 40, 3]


def made(seed, shift=0.08, scores=2):
    """Ground truth and detections of all that is special: crowds, ties, borders of sizes, too many, empty images."""
    rng = np.random.default_rng(seed)
    objects, results = [], []
    for image in IMAGES[:-1]:
        for _ in range(int(rng.integers(2, 9))):
            x, y = rng.uniform(0, 200, 2).round(1).tolist()
            side = float(rng.choice([20.0, 32.0, 64.0, 96.0, 150.0]))  # 32 and 96 are of two sizes
            area = side * side * float(rng.choice([1, 1, 0.6]))  # a segment's is less than its box
            row = {"image_id": image, "category_id": int(rng.choice(CATEGORIES[:3])), "bbox": [x, y, side, side]}
            objects.append({**row, "area": area, "iscrowd": int(rng.random() < 0.15)})
            for _ in range(int(rng.integers(0, 4))):
                moved = (np.array(row["bbox"]) + rng.normal(0, shift, 4) * side).round(1).tolist()
                category = row["category_id"] if rng.random() < 0.8 else int(rng.choice(CATEGORIES[:3]))
                score = round(float(rng.random()), scores)
                results.append({"image_id": image, "category_id": category, "bbox": moved, "score": score})
    results += [  # more than 100 of one class, with ties
        {"image_id": 5, "category_id": 9, "bbox": [float(n), 0.0, 20.0, 20.0], "score": round(0.001 * (n % 60), 3)}
        for n in range(130)
    ]
    results.append({"image_id": IMAGES[-1], "category_id": 4, "bbox": [1.0, 1.0, 9.0, 9.0], "score": 0.5})
    rng.shuffle(results)
    truth = {
        "images": [{"id": image, "width": 400, "height": 400} for image in IMAGES],
        "categories": [{"id": category, "name": str(category)} for category in CATEGORIES],
        "annotations": objects,
    }
    return truth, results


def drawn_set(truth, detections, draw):
    """The data set in which each image is as often as it was drawn, copies side by side in the order of ids."""
    images = [{"id": 10 * image + copy} for image, count in draw.items() for copy in range(count)]

    def rows(of):
        return [{**row, "image_id": 10 * row["image_id"] + copy} for row in of for copy in range(draw[row["image_id"]])]

    return {**truth, "images": images, "annotations": rows(truth["annotations"])}, rows(detections)


def reference(truth, detections):
    evaluation = reference_evaluation(truth, detections)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_class = [part[part > -1].mean() if (part > -1).any() else -1 for part in np.moveaxis(precision, 2, 0)]
    return evaluation.stats.tolist(), per_class


@pytest.mark.parametrize("seed", range(6))
def test_images_as_they_are_give_the_bits_of_pycocotools(seed):
    truth, detections = made(seed)
    metrics, per_class = reference(truth, detections)
    figures = matched(truth, detections, 1).figures(np.ones(len(IMAGES), int))
    assert figures.metrics.tolist() == metrics
    assert figures.per_class.tolist() == per_class
    assert 0.1 < metrics[0] < 0.9
    assert per_class[0] == -1  # category 2


@pytest.mark.parametrize("seed", range(12))
def test_a_draw_gives_the_bits_of_pycocotools_on_the_copies(seed):
    # Scores of one digit: most detections of an image and class are tied.
    truth, detections = made(seed, scores=1 + seed % 2)
    counts = draws(len(IMAGES), 1, seed)[0]
    assert counts.max() > 1
    assert counts.min() == 0
    metrics, per_class = reference(
        *drawn_set(truth, detections, dict(zip(sorted(IMAGES), counts.tolist(), strict=True)))
    )
    figures = matched(truth, detections, int(counts.max())).figures(counts)
    assert figures.metrics.tolist() == metrics
    assert figures.per_class.tolist() == per_class


def one_class(*found):
    """An image with two objects; detections: (right or not, score)."""
    boxes = [[0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 10.0, 10.0]]
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box, "area": 100.0, "iscrowd": 0} for box in boxes],
    }
    free = iter(boxes)
    rows = [
        {"image_id": 1, "category_id": 1, "bbox": next(free) if right else [200.0, 0.0, 9.0, 9.0], "score": score}
        for right, score in found
    ]
    return truth, rows


def test_equal_scores_of_an_image_that_is_drawn_twice_come_in_turn():
    truth, detections = one_class((False, 0.5), (True, 0.5))
    model = matched(truth, detections, 2)
    # drawn twice, 4 objects: wrong, right, wrong, right. Precision 1/2 at recall 1/4, 2/4 at recall 2/4, then nothing:
    # 51 of the 101 recalls at 1/2. One after the other would be wrong, wrong, right, right: 2/4, too; but
    assert model.figures(np.array([2])).metrics[0] == pytest.approx(51 / 101 / 2)
    truth, detections = one_class((True, 0.5), (False, 0.5))
    # right, wrong, right, wrong: 1 up to recall 1/4 (26 of the recalls), 2/3 up to 2/4 (25); not 1 on all 51
    assert matched(truth, detections, 2).figures(np.array([2])).metrics[0] == pytest.approx((26 + 25 * 2 / 3) / 101)


def test_nothing_found_and_nothing_to_find():
    truth, _ = one_class()
    assert matched(truth, [], 1).figures(np.array([1])).metrics[[0, 3, 5, 8]].tolist() == [0, 0, -1, 0]
    _, detections = one_class((True, 0.5))
    empty = {**truth, "annotations": []}
    assert set(matched(empty, detections, 1).figures(np.array([1])).metrics.tolist()) == {-1}


# The interval ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    truth, weak = made(3, shift=0.15)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    return path, truth, made(3, shift=0.02)[1], weak


SETTINGS = {"resamples": 40, "seed": 5, "confidence": 0.9}


def test_the_interval_is_of_the_differences_on_the_same_draws(files):
    path, truth, strong, weak = files
    found = difference(path, strong, weak, **SETTINGS)
    rows = []
    for draw in draws(len(IMAGES), 40, 5).tolist():
        counts = dict(zip(sorted(IMAGES), draw, strict=True))
        ours, theirs = (reference(*drawn_set(truth, model, counts))[0] for model in (strong, weak))
        rows.append([a - b if a > -1 else np.nan for a, b in zip(ours, theirs, strict=True)])
    for place, name in enumerate(SUMMARY):
        low, high = np.nanquantile([row[place] for row in rows], [0.05, 0.95])
        assert (found.metrics[name].low, found.metrics[name].high) == (pytest.approx(low), pytest.approx(high))
    whole = found.metrics["AP"]
    assert whole.candidate == reference(truth, strong)[0][0]
    assert whole.champion == reference(truth, weak)[0][0]
    assert whole.difference == whole.candidate - whole.champion
    assert 0 < whole.low < whole.difference < whole.high
    assert set(found.per_class) == set(CATEGORIES)
    assert found.per_class[2].low is None
    assert found.per_class[2].difference is None


def test_the_interval_of_one_model_is_of_its_figures_on_the_draws(files):
    path, truth, strong, _ = files
    found = intervals(path, strong, **SETTINGS)
    rows = []
    for draw in draws(len(IMAGES), 40, 5).tolist():
        rows.append(reference(*drawn_set(truth, strong, dict(zip(sorted(IMAGES), draw, strict=True))))[0])
    figures = np.where(np.array(rows) > -1, rows, np.nan)
    for place, name in enumerate(SUMMARY):
        assert found[name] == pytest.approx(tuple(np.nanquantile(figures[:, place], [0.05, 0.95])))
    assert found["AP"][0] < reference(truth, strong)[0][0] < found["AP"][1]


def test_a_figure_with_nothing_to_find_has_no_interval(files):
    path, truth, strong, _ = files
    path.write_text(json.dumps({**truth, "annotations": []}))
    assert set(intervals(path, strong, **SETTINGS).values()) == {None}


def test_a_model_against_itself_differs_by_nothing(files):
    path, _, strong, _ = files
    whole = difference(path, strong, strong, **SETTINGS).metrics["AP"]
    assert (whole.difference, whole.low, whole.high) == (0, 0, 0)


def test_the_seed_decides_alone(files):
    path, _, strong, weak = files
    assert difference(path, strong, weak, **SETTINGS) == difference(path, strong, weak, **SETTINGS)
    assert difference(path, strong, weak, **SETTINGS) != difference(path, strong, weak, **{**SETTINGS, "seed": 6})
    there, back = difference(path, strong, weak, **SETTINGS), difference(path, weak, strong, **SETTINGS)
    assert there.metrics["AP"].low == pytest.approx(-back.metrics["AP"].high)


def test_detections_of_other_images_are_named(files):
    path, _, strong, weak = files
    with pytest.raises(PipelineError, match="detections of 1 images that are not in it, the first 99"):
        difference(path, strong, [*weak, {**weak[0], "image_id": 99}], **SETTINGS)
