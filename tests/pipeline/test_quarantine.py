"""What validate.quarantine leaves out of shards and ground truth, and what it cannot mend."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from effdet.records import parse_examples
from pipeline import shard, validate
from pipeline.errors import PipelineError
from tests.pipeline.made_data import Split, filled, write

REPORT = Path("data/reports/validation/report.json")
PAGE = Path("data/reports/validation/index.html")
EXCLUSIONS = Path("data/exclusions.json")
HEIGHT = "the box's height is above 0"


def with_flat_boxes() -> dict[str, Split]:
    """Annotations 301 of train and 211 of val have a box without height, image 2 of train has no file.

    Images 1 to 4 and 21 to 22 have two boxes each; val's 2100 is of category 3, 2101 and 211 are of 7.
    """
    train, val = filled(1, 4), filled(21, 2)
    del train.files["002.jpg"]
    next(record for record in train.annotations if record["id"] == 301)["bbox"] = [1, 2, 10, 0]
    val.add_annotation(211, 21, bbox=[1, 2, 10, 0], area=20, category_id=7)
    return {"train": train, "val": val}


def run_validate(folder: Path) -> dict[str, Any]:
    """Runs the stage in the folder; returns the report."""
    with contextlib.chdir(folder):
        validate.main()
        report: dict[str, Any] = json.loads(REPORT.read_text())
    return report


def records(folder: Path, split: str) -> dict[int, Any]:
    """The boxes of each image in the shards, by its id."""
    files = [str(path) for path in sorted((folder / "data" / "shards").glob(f"{split}-*.tfrecord"))]
    parsed = parse_examples(tf.constant(list(tf.data.TFRecordDataset(files).as_numpy_iterator())), 2)
    return dict(zip(parsed["image_id"].numpy().tolist(), parsed["boxes"].numpy(), strict=True))


def test_box_without_height_is_in_neither_shards_nor_ground_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"quarantine": True, "min_boxes_per_class": 3}
    write(tmp_path, with_flat_boxes(), validate=settings)
    report = run_validate(tmp_path)
    assert json.loads((tmp_path / EXCLUSIONS).read_text()) == {
        "train": {"images": [2], "annotations": [301]},
        "val": {"images": [], "annotations": [211]},
    }
    printed = capsys.readouterr()
    assert "train: 1 images and 3 annotations left out; see data/exclusions.json" in printed.out
    assert f"quarantined: val annotations: expected that {HEIGHT}: 1 fail, ids 211" in printed.err

    assert report["success"] is True
    of_check = {(row["split"], row["expectation"]): row["quarantined"] for row in report["checks"]}
    assert of_check["train", HEIGHT] == of_check["val", HEIGHT] == of_check["train", "the file is in the archive"] == 1
    assert of_check["val", "the file is in the archive"] == 0
    train, val = report["splits"]["train"], report["splits"]["val"]
    # The annotations of image 2, and 301.
    assert (train["quarantined_images"], train["quarantined_annotations"]) == (1, 2 + 1)
    assert (train["images"], train["annotations"]) == (3, 5)
    assert (val["quarantined_images"], val["quarantined_annotations"]) == (0, 1)
    few = next(row for row in report["failed"] if row["table"] == "classes")
    assert [record["boxes"] for record in few["first"]] == [2, 2]  # without 211, which category 7 would pass with
    page = (tmp_path / PAGE).read_text()
    assert "quarantined annotations" in page
    assert "1 quarantined" in page
    assert "critical check" in page
    assert "The pipeline stops" not in page

    with contextlib.chdir(tmp_path):
        shard.main()
    boxes = records(tmp_path, "train")
    assert sorted(boxes) == [1, 3, 4]
    np.testing.assert_array_equal(boxes[3], [[2, 0, 10, 10], [0, 0, 0, 0]])  # 300 alone
    truth = json.loads((tmp_path / "data" / "shards" / "ground_truth_val.json").read_text())
    assert [record["id"] for record in truth["annotations"]] == [2100, 2101, 2200, 2201]
    assert [record["id"] for record in truth["images"]] == sorted(records(tmp_path, "val")) == [21, 22]


def test_without_quarantine_the_stop_says_that_there_is_one(tmp_path: Path) -> None:
    write(tmp_path, with_flat_boxes(), validate={"quarantine": False})
    with pytest.raises(PipelineError) as error:
        run_validate(tmp_path)
    # The file and the height in train, the height in val.
    assert "leave them out with validate.quarantine: true in params.yaml (mends 3 of 3 checks)" in str(error.value)
    assert not (tmp_path / EXCLUSIONS).exists()


def test_category_that_train_lacks_stops_with_quarantine_too(tmp_path: Path) -> None:
    splits = with_flat_boxes()
    splits["val"].categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "cow"}]
    write(tmp_path, splits, validate={"quarantine": True})
    with pytest.raises(PipelineError) as error:
        run_validate(tmp_path)
    assert str(error.value) == (
        "the data set fails 1 critical checks; see data/reports/validation/index.html\n"
        "  val categories: expected that the category is one of train's: 1 fail, ids 7"
    )
    assert not (tmp_path / EXCLUSIONS).exists()
    assert "Failed: 1 critical check." in (tmp_path / PAGE).read_text()


@pytest.mark.parametrize("lost", ["images", "annotations"])
def test_quarantine_that_would_leave_nothing_stops(tmp_path: Path, lost: str) -> None:
    splits = with_flat_boxes()
    if lost == "images":
        splits["val"].files.clear()
    for record in splits["val"].annotations if lost == "annotations" else []:
        record["bbox"] = [1, 2, 10, 0]
    write(tmp_path, splits, validate={"quarantine": True})
    with pytest.raises(PipelineError) as error:
        run_validate(tmp_path)
    assert "train" not in str(error.value)
    assert (
        "\n  val: validate.quarantine leaves nothing out, since no image or no annotation would be left;"
        " correct the data set"
    ) in str(error.value)
    report = json.loads((tmp_path / REPORT).read_text())
    assert (report["success"], report["splits"]["val"]["quarantined_annotations"]) == (False, 0)
    assert not (tmp_path / EXCLUSIONS).exists()


def test_every_id_is_left_out_not_only_those_listed(tmp_path: Path) -> None:
    train = filled(1, 30)
    for record in train.annotations[::2]:
        record["iscrowd"] = 2
    write(tmp_path, {"train": train, "val": filled(51, 1)}, validate={"quarantine": True})
    report = run_validate(tmp_path)
    failure = next(row for row in report["failed"] if row["severity"] == "critical")
    assert (failure["count"], failure["quarantined"], len(failure["first"])) == (30, 30, 20)
    excluded = json.loads((tmp_path / EXCLUSIONS).read_text())["train"]
    assert excluded == {"images": [], "annotations": [100 * number for number in range(1, 31)]}


@pytest.mark.slow
def test_of_images_in_two_splits_trains_is_left_out_and_of_a_split_all_but_the_first(tmp_path: Path) -> None:
    splits = {"train": filled(1, 5), "val": filled(21, 3), "test": filled(31, 2)}
    train, val, test = splits.values()
    train.files |= {"002.jpg": val.files["021.jpg"], "004.jpg": train.files["003.jpg"]}
    val.files["023.jpg"] = test.files["031.jpg"]
    severity = {"duplicates": "critical", "leakage": "critical", "drift": "warning"}
    write(tmp_path, splits, validate={"quarantine": True, "min_boxes_per_class": 0, "severity": severity})
    report = run_validate(tmp_path)
    excluded = json.loads((tmp_path / EXCLUSIONS).read_text())
    assert {split: ids["images"] for split, ids in excluded.items()} == {"train": [2, 4], "val": [23], "test": []}
    assert all(ids["annotations"] == [] for ids in excluded.values())
    assert report["success"] is True
    # The annotations of the two images are no longer counted: 2 boxes each of the remaining three.
    assert (report["splits"]["train"]["annotations"], report["splits"]["train"]["quarantined_annotations"]) == (6, 4)

    severity |= {"leakage": "warning"}
    write(tmp_path, splits, validate={"quarantine": True, "min_boxes_per_class": 0, "severity": severity})
    run_validate(tmp_path)
    excluded = json.loads((tmp_path / EXCLUSIONS).read_text())
    assert {split: ids["images"] for split, ids in excluded.items()} == {"train": [4], "val": [], "test": []}
