"""Counts and the population stability index, by hand."""

import math

import pandas as pd
import pytest

from pipeline.coco import CocoTables
from pipeline.drift import FLOOR, LABELS, distributions, drift_table, stability_index


def tables() -> CocoTables:
    """Image 1 has a cat of 10 x 10, a dog of 40 x 10 (side 20) and a crowd of dogs, 2 has two cats, 3 nothing."""
    images = pd.DataFrame(
        {"id": [1, 2, 3], "file_name": ["a", "b", "c"], "width": [640, 64, 8000], "height": [480, 64, 6000]}
    )
    rows = [
        (1, 1, 3, 0, 0, 10.0, 10.0, 9, 0),
        (2, 1, 7, 0, 0, 40.0, 10.0, 9, 0),
        (3, 1, 7, 0, 0, 32.0, 32.0, 9, 1),
        (4, 2, 3, 0, 0, 500.0, 500.0, 9, 0),
        (5, 2, 3, 0, 0, 0.0, 500.0, 9, 0),
    ]
    columns = ["id", "image_id", "category_id", *"xywh", "area", "iscrowd"]
    categories = pd.DataFrame({"id": [7, 3, 9], "name": ["dog", "cat", "cow"]})
    return CocoTables(images, pd.DataFrame(rows, columns=columns), categories)


def test_counts_by_hand() -> None:
    found = distributions(tables())
    assert list(found["classes"].items()) == [("3 cat", 3), ("7 dog", 1), ("9 cow", 0)]  # by id; crowds not counted
    # The box without width has no size; the crowd of side 32 lies at the upper edge of a bin that it is not in.
    assert {key: n for key, n in found["box sizes"].items() if n} == {"8-16": 1, "16-32": 1, "32-64": 1, "384+": 1}
    assert {key: n for key, n in found["boxes an image"].items() if n} == {"0": 1, "2": 2}
    # Sides 554.3, 64 and 6928.
    assert {key: n for key, n in found["image sizes"].items() if n} == {"64-128": 1, "512-576": 1, "4096+": 1}


def test_labels_of_whole_numbers_name_the_last_that_is_in_the_bin() -> None:
    assert LABELS["boxes an image"] == ["0", "1", "2", "3-4", "5-7", "8-12", "13-20", "21-33", "34-54", "55+"]


def test_index_by_hand() -> None:
    # (0.5 - 0.25) * ln 2 + (0.5 - 0.75) * ln (2 / 3) = 0.173287 + 0.101366
    assert stability_index({"a": 10, "b": 10}, {"a": 1, "b": 3}) == (0.274653, "a: 25.0% to 50.0%")


def test_index_of_the_same_shares_is_0_whatever_the_counts() -> None:
    assert stability_index({"a": 30, "b": 10}, {"b": 1, "a": 3}) == (0, "")


@pytest.mark.parametrize("gone", [False, True])
def test_share_of_nothing_counts_as_the_floor(gone: bool) -> None:
    counts = {"a": 1, "b": 1}, {"a": 1} if gone else {"a": 1, "b": 0}
    expected = 0.5 * math.log(0.5 / 1) * -1 + (0.5 - FLOOR) * math.log(0.5 / FLOOR)  # 0.346574 + 4.257745
    assert stability_index(*counts) == (pytest.approx(expected, abs=1e-6), "b: 0.0% to 50.0%")
    assert stability_index(*counts[::-1]) == (pytest.approx(expected, abs=1e-6), "b: 50.0% to 0.0%")


def test_both_shares_below_the_floor_add_nothing() -> None:
    assert stability_index({"a": 10, "b": 0}, {"a": 20}) == (0, "")


def test_split_without_boxes_has_an_index() -> None:
    # Against a share of 1: (FLOOR - 1) * ln(FLOOR) = 9.209419
    assert stability_index({"a": 0}, {"a": 5}) == (9.209419, "a: 100.0% to 0.0%")


def test_classes_are_told_apart_by_id_and_name() -> None:
    counts = distributions(tables())
    other = counts | {"classes": {"3 cat": 3, "7 wolf": 1, "9 cow": 0}}
    table = drift_table(counts, other).set_index("quantity")
    assert table.loc["classes", "class_problem"] == "not in the baseline: 7 dog; in the baseline alone: 7 wolf"
    assert table["class_problem"].notna().sum() == 1
    assert table.loc["classes", "psi"] > 0.2
    assert (table.drop("classes")["psi"] == 0).all()
    assert drift_table(counts, counts)["class_problem"].isna().all()


def test_of_many_other_classes_the_first_are_named() -> None:
    counts = distributions(tables())
    other = counts | {"classes": {f"{number} x": 1 for number in range(20, 26)}}
    (words,) = drift_table(other, counts)["class_problem"].dropna()
    assert words == (
        "not in the baseline: 20 x, 21 x, 22 x, 23 x, 24 x, ...; in the baseline alone: 3 cat, 7 dog, 9 cow"
    )
