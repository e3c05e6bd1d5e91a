"""Which object a detection is of, and what follows: confusions and an image's score, by hand."""

import numpy as np
import pytest

from pipeline import matching
from pipeline.confusion import NONE, confusion, confusion_rows
from pipeline.matching import IN_CROWD, NOTHING, image_scores, match


def truth_of(*objects, images=(1, 2, 3)):
    """COCO's json of objects: image, category, box, crowd."""
    return {
        "images": [{"id": number} for number in images],
        "categories": [{"id": number, "name": str(number)} for number in (4, 6)],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            for image, category, box, crowd in objects
        ],
    }


def found(*rows):
    keys = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(keys, row, strict=True)) for row in rows]


SQUARE = [0, 0, 10, 10]


def test_the_own_class_comes_first_and_the_rest_is_a_confusion():
    truth = truth_of((1, 4, SQUARE, 0), (1, 6, [0, 0, 10, 9], 0))
    # The first lies on the object of 6 (IoU 1) and on the one of its class (0.9): it is of the latter. The second, of 4
    # as well, gets what is left.
    matched = match(truth, found((1, 4, [0, 0, 10, 9], 0.9), (1, 4, SQUARE, 0.8)), 0.5)
    assert matched.objects.tolist() == [0, 1]
    assert confusion(matched, [4, 6]).tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_better_scores_choose_first_and_lower_ones_do_not_count():
    truth = truth_of((1, 4, SQUARE, 0))
    rows = found((1, 4, SQUARE, 0.6), (1, 4, [0, 0, 10, 5], 0.7), (1, 4, SQUARE, 0.49))
    matched = match(truth, rows, 0.5)
    assert matched.objects.tolist() == [0, NOTHING]  # the best first: IoU 0.5 is enough
    assert matched.detection_images.tolist() == [0, 0]
    assert match(truth, found((1, 4, [0, 0, 10, 4.99], 0.7)), 0.5).objects.tolist() == [NOTHING]


def test_a_detection_in_a_crowd_of_its_class_is_neither_right_nor_wrong():
    truth = truth_of((1, 4, [0, 0, 100, 100], 1), (1, 4, SQUARE, 0))
    rows = found((1, 4, [50, 50, 9, 9], 0.9), (1, 6, [50, 50, 9, 9], 0.8), (1, 4, SQUARE, 0.7))
    matched = match(truth, rows, 0.5)
    assert matched.objects.tolist() == [IN_CROWD, NOTHING, 0]
    assert confusion(matched, [4, 6]).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    (score, *_) = [one for one in image_scores(matched) if one.image_id == 1]
    assert (score.right, score.wrong, score.missed) == (1, 1, 0)


def test_confusions_by_hand():
    far = [500, 500, 10, 10]
    truth = truth_of((1, 4, SQUARE, 0), (2, 4, SQUARE, 0), (3, 6, SQUARE, 0), (3, 6, far, 0))
    rows = found((1, 4, SQUARE, 0.9), (2, 6, SQUARE, 0.9), (3, 6, SQUARE, 0.9), (1, 4, far, 0.8))
    counts = confusion(match(truth, rows, 0.5), [4, 6])
    # 4: found once, taken for 6 once. 6: found once, missed once. 4 was found once where nothing was.
    assert counts.tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 0]]
    table = confusion_rows(counts, ["cat", "dog"])
    assert [(row["truth"], row["found"]) for row in table] == [
        ("cat", "cat"),
        ("cat", "dog"),
        ("dog", "dog"),
        ("dog", NONE),
        (NONE, "cat"),
    ]


def test_images_from_the_worst_to_the_best():
    far = [500, 500, 10, 10]
    objects = [(image, 4, SQUARE, 0) for image in (1, 2, 3, 4)] + [(4, 6, far, 0)]
    rows = found((2, 4, SQUARE, 0.9), (2, 4, far, 0.9), (4, 4, SQUARE, 0.9), (4, 6, far, 0.9), (3, 6, SQUARE, 0.9))
    scores = image_scores(match(truth_of(*objects, images=(5, 4, 3, 2, 1)), rows, 0.5))
    # 3: wrong and missed, 1: missed, 2: 2/(2+1), 5: nothing to find and nothing found, 4: both found
    assert [(score.image_id, score.f1) for score in scores] == [(3, 0.0), (1, 0.0), (2, 2 / 3), (5, 1.0), (4, 1.0)]


@pytest.mark.parametrize("chunk", [1, 7, 500_000])
def test_the_work_in_parts_is_the_work_in_one(chunk, monkeypatch):
    rng = np.random.default_rng(1)

    def boxes(count):
        return np.concatenate([rng.integers(0, 20, (count, 2)), rng.integers(10, 20, (count, 2))], axis=1).tolist()

    objects = [(int(rng.integers(1, 4)), int(rng.choice([4, 6])), box, int(rng.random() < 0.2)) for box in boxes(30)]
    rows = found(*((int(rng.integers(1, 4)), int(rng.choice([4, 6])), box, float(rng.random())) for box in boxes(60)))
    whole = match(truth_of(*objects), rows, 0.1)
    assert {IN_CROWD, NOTHING} < set(whole.objects.tolist())
    taken = whole.objects[whole.objects >= 0]
    assert len(taken) == len(set(taken.tolist())) > 10
    monkeypatch.setattr(matching, "CHUNK", chunk)
    assert match(truth_of(*objects), rows, 0.1).objects.tolist() == whole.objects.tolist()


def test_nothing_at_all():
    matched = match(truth_of(), [], 0.5)
    assert confusion(matched, [4, 6]).sum() == 0
    assert [score.f1 for score in image_scores(matched)] == [1.0, 1.0, 1.0]
