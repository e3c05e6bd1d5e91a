"""Shards hold what the annotations say, each image once, the same bytes for a seed, or are not there."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image
from pycocotools.coco import COCO

from effdet.records import parse_examples
from pipeline import shard
from pipeline.errors import PipelineError
from pipeline.files import checksum
from pipeline.params import Reencode
from pipeline.shard_files import train_classes
from tests.pipeline.made_data import Split, filled, picture, write

SHARDS = Path("data/shards")
ROOT = Path(__file__).parents[2]
MAX_BOXES = 4
SETTINGS = {"images_per_shard": 4, "max_boxes": MAX_BOXES, "keep_empty_images": True, "seed": 1}
Records = dict[int, dict[str, Any]]


def split_with_everything() -> Split:
    """Nine images; 9 is a PNG, 10 has none, 11 has six boxes, 12 a crowd."""
    split = filled(1, 8)
    split.add_image(9, content=picture(9, "PNG"))
    split.add_annotation(900, 9)
    split.add_image(10)
    split.add_image(11)
    for k in range(6):
        split.add_annotation(1100 + k, 11, bbox=[k, k, 10 + k, 10])
    split.add_image(12)
    split.add_annotation(1200, 12, bbox=[0, 0, 64, 48], iscrowd=1, area=99.5)
    return split


def run_shard(
    folder: Path,
    splits: dict[str, Split],
    excluded: dict[str, dict[str, list[int]]] | None = None,
    **changed: Any,
) -> dict[str, Any]:
    """Runs the stage in the folder; returns the manifest."""
    write(folder, splits, **{**changed, "shard": {**SETTINGS, **changed.get("shard", {})}})
    nothing: dict[str, list[int]] = {"images": [], "annotations": []}
    exclusions = {split: (excluded or {}).get(split, nothing) for split in splits}
    (folder / "data" / "exclusions.json").write_text(json.dumps(exclusions))
    with contextlib.chdir(folder):
        shard.main()
        manifest: dict[str, Any] = json.loads((SHARDS / "manifest.json").read_text())
    return manifest


def read(folder: Path, manifest: dict[str, Any], split: str) -> Records:
    """The records of a split by image id, read as training reads them; each image must be there once."""
    files = [str(folder / SHARDS / row["file"]) for row in manifest["splits"][split]["shards"]]
    records = list(tf.data.TFRecordDataset(files).as_numpy_iterator())
    parsed = {key: value.numpy() for key, value in parse_examples(tf.constant(records), MAX_BOXES).items()}
    by_id = {int(image_id): {key: parsed[key][i] for key in parsed} for i, image_id in enumerate(parsed["image_id"])}
    assert len(by_id) == len(records) == manifest["splits"][split]["images"]
    return by_id


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / SHARDS).iterdir())}


def test_shards_hold_the_files_and_the_objects(tmp_path: Path) -> None:
    train = split_with_everything()
    manifest = run_shard(tmp_path, {"train": train, "val": filled(21, 1)})
    records = read(tmp_path, manifest, "train")
    assert sorted(records) == list(range(1, 13))
    for image_id, record in records.items():
        assert record["encoded"] == train.files[f"{image_id:03d}.jpg"]  # byte for byte, the PNG too
        assert (record["height"], record["width"]) == (48, 64)
    # Annotations 100 and 101 are [0, 2, 10, 8] of category 3 and [1.5, 2, 10, 9] of category 7, as x, y, w, h.
    np.testing.assert_array_equal(records[1]["boxes"][:2], [[2, 0, 10, 10], [2, 1.5, 11, 11.5]])
    assert records[1]["class_ids"].tolist() == [0, 1, -1, -1]
    assert records[1]["area"].tolist() == [40, 45, 0, 0]
    assert records[10]["class_ids"].tolist() == [-1, -1, -1, -1]
    assert records[12]["is_crowd"].tolist() == [True, False, False, False]
    assert records[12]["area"][0] == 99.5
    # Of widths 10 to 15 the four widest, in the order of the file.
    assert records[11]["boxes"][:, 1].tolist() == [2, 3, 4, 5]


def test_manifest_says_what_is_in_the_shards(tmp_path: Path) -> None:
    manifest = run_shard(tmp_path, {"train": split_with_everything(), "val": filled(21, 2)})
    train = manifest["splits"]["train"]
    assert (train["images"], train["boxes"], train["empty_images"]) == (12, 16 + 1 + 4 + 1, 1)
    assert train["left_out"] == {
        "excluded_images": 0,
        "excluded_annotations": 0,
        "empty_images": 0,
        "boxes_above_max_boxes": 2,
    }
    assert [row["images"] for row in train["shards"]] == [4, 4, 4]
    assert [row["file"] for row in train["shards"]] == [f"train-0000{n}-of-00003.tfrecord" for n in range(3)]
    for row in train["shards"] + manifest["splits"]["val"]["shards"]:
        path = tmp_path / SHARDS / row["file"]
        content = path.read_bytes()
        assert (row["bytes"], row["crc32c"]) == (len(content), f"{google_crc32c.value(content):08x}")
    annotations = tmp_path / "data" / "raw" / "instances_train.json"
    assert manifest["source"]["train"] == {"annotations_sha256": checksum(annotations, "sha256")}
    assert (manifest["format"], manifest["num_classes"], manifest["max_boxes"]) == (1, 2, MAX_BOXES)
    assert manifest["classes"] == [
        {"class_id": 0, "category_id": 3, "name": "cat"},
        {"class_id": 1, "category_id": 7, "name": "dog"},
    ]


def test_coco2017_keeps_the_gaps_of_its_category_ids(tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "source": "coco2017",
        "base_url": "x",
        "checksums": {},
        "apply_exif": False,
        "max_images": None,
    }
    manifest = run_shard(tmp_path, {"train": filled(1, 2), "val": filled(21, 1)}, data=data)
    assert manifest["num_classes"] == 90
    assert [row["class_id"] for row in manifest["classes"]] == [2, 6]
    assert read(tmp_path, manifest, "train")[1]["class_ids"].tolist() == [2, 6, -1, -1]


def test_tfrecords_keep_the_gaps_of_their_labels(tmp_path: Path) -> None:
    data = {
        "source": "tfrecords",
        "base_url": "x",
        "train": "t",
        "val": "v",
        "num_classes": 7,
        "checksums": {},
        "apply_exif": False,
        "max_images": None,
    }
    manifest = run_shard(tmp_path, {"train": filled(1, 1), "val": filled(21, 1)}, data=data)
    assert (manifest["num_classes"], [row["class_id"] for row in manifest["classes"]]) == (7, [2, 6])


def test_classes_of_the_training_images_stand_in_the_order_of_the_records(tmp_path: Path) -> None:
    train = split_with_everything()
    train.add_annotation(1101, 11, category_id=7, bbox=[0, 0, 9, 9])  # smaller than the four that stay
    train.annotations[-1]["id"] = 1190
    manifest = run_shard(tmp_path, {"train": train, "val": filled(21, 1)})
    found = train_classes(tmp_path / SHARDS)
    files = [str(tmp_path / SHARDS / row["file"]) for row in manifest["splits"]["train"]["shards"]]
    records = list(tf.data.TFRecordDataset(files).as_numpy_iterator())
    ids = parse_examples(tf.constant(records), MAX_BOXES)["image_id"].numpy().tolist()
    by_id = dict(zip(ids, found, strict=True))
    # 9 has one object, 10 none, 12 a crowd alone; of 11 the cats were larger.
    assert by_id == {**{number: [0, 1] for number in range(1, 9)}, 9: [0], 10: [], 11: [0], 12: []}


def rotated(content: bytes, orientation: int) -> bytes:
    """The JPEG with that EXIF orientation, its pixels as they were."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    segment = exif.tobytes()
    return content[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + content[2:]


@pytest.mark.parametrize("apply_exif", [True, False])
def test_orientation_goes_into_the_record_where_boxes_are_of_the_turned_picture(
    tmp_path: Path, apply_exif: bool
) -> None:
    train = filled(1, 2)
    train.files["001.jpg"] = rotated(picture(1), 6)
    if apply_exif:
        train.images[0].update(width=48, height=64)
    data = {
        "source": "synthetic",
        "seed": 1,
        "train_images": 2,
        "val_images": 1,
        "apply_exif": apply_exif,
        "max_images": None,
    }
    manifest = run_shard(tmp_path, {"train": train, "val": filled(21, 1)}, data=data)
    assert manifest["apply_exif"] is apply_exif
    records = read(tmp_path, manifest, "train")
    assert records[1]["encoded"] == train.files["001.jpg"]
    assert [records[number]["orientation"] for number in (1, 2)] == [6 if apply_exif else 1, 1]
    assert (records[1]["height"], records[1]["width"]) == ((64, 48) if apply_exif else (48, 64))
    assert records[1]["boxes"].tolist() == records[2]["boxes"].tolist()


@pytest.mark.slow
def test_pictures_of_train_are_made_smaller_with_their_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": filled(1, 3), "val": filled(21, 2)}
    splits["train"].files["001.jpg"] = rotated(picture(1), 6)
    splits["train"].images[0].update(width=48, height=64)
    splits["train"].files["002.jpg"] = picture(2, width=64, height=47)
    splits["train"].images[1].update(height=47)
    splits["train"].files["003.jpg"] = picture(3, width=40, height=30)  # no longer than 40
    splits["train"].images[2].update(width=40, height=30)
    data = {
        "source": "synthetic",
        "seed": 1,
        "train_images": 3,
        "val_images": 2,
        "apply_exif": True,
        "max_images": None,
    }
    settings = {"reencode": {"max_side": 40, "quality": 90}}
    results = []
    for workers in ("1", "2"):
        monkeypatch.setenv("EFFDET_LOADER_WORKERS", workers)
        manifest = run_shard(tmp_path / workers, splits, data=data, shard={**settings, "images_per_shard": 2})
        results.append(bytes_of(tmp_path / workers))
    assert results[0] == results[1]
    parts = manifest["splits"]
    assert (parts["train"]["reencoded"], parts["val"]["reencoded"]) == (2, 0)
    train, val = (read(tmp_path / "1", manifest, split) for split in ("train", "val"))
    # 64 x 47 becomes 40 x 29 (of 29.375); boxes are [0, 2, 10, 8] and [1.5, 2, 10, 9] as x, y, w, h.
    assert (train[2]["height"], train[2]["width"], train[2]["orientation"]) == (29, 40, 1)
    boxes = np.array([[2, 0, 10, 10], [2, 1.5, 11, 11.5]])  # yxyx
    y, x = 29 / 47, 0.625
    np.testing.assert_allclose(train[2]["boxes"][:2], boxes * [y, x, y, x], rtol=1e-6)
    np.testing.assert_allclose(train[2]["area"][:2], [y * x * 40, y * x * 45], rtol=1e-6)
    assert tf.io.decode_jpeg(train[2]["encoded"]).shape == (29, 40, 3)
    # Image 1 was to be turned, and is.
    assert (train[1]["height"], train[1]["width"], train[1]["orientation"]) == (40, 30, 1)
    assert tf.io.decode_jpeg(train[1]["encoded"]).shape == (40, 30, 3)
    np.testing.assert_allclose(train[1]["boxes"][:2], 0.625 * boxes, rtol=1e-6)
    assert train[3]["encoded"] == splits["train"].files["003.jpg"]
    np.testing.assert_array_equal(train[3]["boxes"][:2], boxes)
    assert all(val[number]["encoded"] == splits["val"].files[f"{number:03d}.jpg"] for number in (21, 22))


def test_picture_that_cannot_be_made_smaller_is_named(tmp_path: Path) -> None:
    train = filled(1, 2)
    train.files["002.jpg"] = picture(2)[:1500]
    with pytest.raises(PipelineError, match=r"train\.zip: 002\.jpg: cannot be decoded: .*decode_fraction: 1\.0"):
        run_shard(
            tmp_path,
            {"train": train, "val": filled(21, 1)},
            shard={"reencode": {"max_side": 40, "quality": 90}},
        )


def test_same_bytes_for_any_number_of_workers_and_others_for_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": split_with_everything(), "val": filled(21, 5)}
    results = []
    for workers in ("1", "3"):
        monkeypatch.setenv("EFFDET_LOADER_WORKERS", workers)
        run_shard(tmp_path / workers, splits)
        results.append(bytes_of(tmp_path / workers))
    assert len(results[0]) == 3 + 2 + 3  # shards; manifest, classes and ground truth
    assert results[0] == results[1]
    manifest = run_shard(tmp_path / "other", splits, shard={"seed": 2})
    assert bytes_of(tmp_path / "other")["train-00000-of-00003.tfrecord"] != results[0]["train-00000-of-00003.tfrecord"]
    assert sorted(read(tmp_path / "other", manifest, "train")) == list(range(1, 13))


def test_ground_truth_holds_every_annotation_of_the_images_in_the_shards(tmp_path: Path) -> None:
    val = split_with_everything()
    excluded = {"val": {"images": [2], "annotations": [900, 300]}}
    manifest = run_shard(tmp_path, {"train": filled(31, 1), "val": val, "test": filled(41, 2)}, excluded)
    path = tmp_path / SHARDS / "ground_truth_val.json"
    truth = json.loads(path.read_text())
    kept = [a for a in val.annotations if a["image_id"] != 2 and a["id"] not in (900, 300)]
    assert truth["annotations"] == kept  # image 11 with all its six
    assert truth["images"] == [image for image in val.images if image["id"] != 2]
    assert truth["categories"] == val.categories
    records = read(tmp_path, manifest, "val")
    assert sorted(records) == [image["id"] for image in truth["images"]]
    np.testing.assert_array_equal(records[3]["boxes"][:2], [[2, 1.5, 11, 11.5], [0, 0, 0, 0]])  # 301 alone
    assert manifest["splits"]["val"]["left_out"] == {
        "excluded_images": 1,
        "excluded_annotations": 2 + 2,  # of image 2, and the two named
        "empty_images": 0,
        "boxes_above_max_boxes": 2,
    }
    assert COCO(str(path)).getAnnIds(imgIds=[11]) == list(range(1100, 1106))
    assert (tmp_path / SHARDS / "ground_truth_test.json").exists()
    assert not (tmp_path / SHARDS / "ground_truth_train.json").exists()


def test_empty_images_are_left_out_of_training_alone(tmp_path: Path) -> None:
    splits = {"train": split_with_everything(), "val": split_with_everything()}
    excluded = {"train": {"images": [], "annotations": [900]}}  # which leaves image 9 empty
    manifest = run_shard(tmp_path, splits, excluded, shard={"keep_empty_images": False})
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert sorted(read(tmp_path, manifest, "train")) == [1, 2, 3, 4, 5, 6, 7, 8, 11, 12]
    assert (train["empty_images"], train["left_out"]["empty_images"]) == (0, 2)
    assert (val["images"], val["empty_images"], val["left_out"]["empty_images"]) == (12, 1, 0)


def test_no_image_left_is_an_error_that_counts(tmp_path: Path) -> None:
    train = filled(1, 3, boxes=0)
    excluded = {"train": {"images": [1], "annotations": []}}
    with pytest.raises(PipelineError) as error:
        run_shard(tmp_path, {"train": train, "val": filled(21, 1)}, excluded, shard={"keep_empty_images": False})
    assert str(error.value) == (
        "data/raw/instances_train.json: no images left of 3: 1 stand in data/exclusions.json,"
        " 2 have no annotations and params.yaml says shard.keep_empty_images: false"
    )


def test_missing_image_is_named_and_what_was_there_stays(tmp_path: Path) -> None:
    splits = {"train": filled(1, 5), "val": filled(21, 1)}
    run_shard(tmp_path, splits)
    before = bytes_of(tmp_path)
    del splits["train"].files["004.jpg"]
    with pytest.raises(PipelineError, match=r"image 4: data/raw/train\.zip: .*'004\.jpg' is not in"):
        run_shard(tmp_path, splits)
    assert bytes_of(tmp_path) == before
    assert [path.name for path in (tmp_path / "data").iterdir() if path.name.startswith(".")] == []


def test_damaged_image_found_while_writing_leaves_no_shards(tmp_path: Path) -> None:
    splits = {"train": filled(1, 9), "val": filled(21, 1)}
    write(tmp_path, splits, shard=SETTINGS)
    archive = tmp_path / "data" / "raw" / "train.zip"
    content = bytearray(archive.read_bytes())
    content[content.index(picture(7)) + 1000] ^= 0xFF
    archive.write_bytes(content)
    nothing: dict[str, list[int]] = {"images": [], "annotations": []}
    (tmp_path / "data" / "exclusions.json").write_text(json.dumps({"train": nothing, "val": nothing}))
    with contextlib.chdir(tmp_path), pytest.raises(PipelineError, match=r"007\.jpg: cannot be read: Bad CRC-32"):
        shard.main()
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"raw", "exclusions.json"}


KILLED = """
import os, signal
from pipeline import shard
shard.ground_truth = lambda tables: os.kill(os.getpid(), signal.SIGKILL)
shard.main()
"""


@pytest.mark.slow
def test_killed_run_leaves_the_old_shards_and_the_next_removes_what_it_wrote(tmp_path: Path) -> None:
    splits = {"train": filled(1, 9), "val": filled(21, 2)}
    run_shard(tmp_path, splits)
    before = bytes_of(tmp_path)
    splits["train"].add_image(10)
    write(tmp_path, splits, shard=SETTINGS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    (part,) = (path for path in (tmp_path / "data").iterdir() if path.name.startswith(".shards."))
    assert len(list(part.glob("*.tfrecord"))) == 3 + 1  # all were written, and nobody reads them
    assert bytes_of(tmp_path) == before
    ours, others = (part.with_name(f".shards.{process}.part") for process in (os.getpid(), os.getppid()))
    ours.mkdir()  # as a process that had our id would have left it
    others.mkdir()
    run_shard(tmp_path, splits)
    assert [path.exists() for path in (part, ours, others)] == [False, False, True]
    assert bytes_of(tmp_path) != before


@pytest.mark.parametrize(("column", "words"), [("image_id", "the split's images"), ("category_id", "the categories")])
def test_annotation_of_something_unknown_is_named(tmp_path: Path, column: str, words: str) -> None:
    train = filled(1, 2)
    train.annotations[3][column] = 55
    with pytest.raises(PipelineError, match=rf"annotation 201: {column} 55 is not among {words}"):
        run_shard(tmp_path, {"train": train, "val": filled(21, 1)})


def test_largest_boxes_stay_crowds_go_first() -> None:
    rows = [  # id, image, w, h, crowd
        (1, 1, 2, 2, 0),
        (2, 2, 9, 9, 0),
        (3, 1, 3, 3, 0),
        (4, 1, 50, 50, 1),
        (5, 1, 2, 2, 0),
        (6, 1, 1, 5, 0),
    ]
    annotations = pd.DataFrame(rows, columns=["id", "image_id", "w", "h", "iscrowd"])
    # Image 1 by area: 3 (9), 6 (5), 1 and 5 (4 each, 1 stands first), then the crowd.
    assert shard.largest(annotations, 3)["id"].tolist() == [1, 2, 3, 6]
    assert shard.largest(annotations, 4)["id"].tolist() == [1, 2, 3, 5, 6]
    assert shard.largest(annotations, 5)["id"].tolist() == [1, 2, 3, 4, 5, 6]


def test_deal_is_a_shuffle_of_all_even_in_number_and_bytes() -> None:
    sizes = np.random.default_rng(0).lognormal(11.8, 0.5, 2003).astype(np.int64)  # like COCO's files
    dealt = shard.deal(sizes, 250, seed=1)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(2003))
    counts = [len(members) for members in dealt]
    assert len(counts) == 9  # 2003 / 250 rounded up
    assert max(counts) - min(counts) <= 1
    totals = np.array([sizes[members].sum() for members in dealt])
    assert totals.max() < 1.1 * totals.min()


def test_shards_of_pictures_made_smaller_are_even_in_bytes_too() -> None:
    random = np.random.default_rng(0)
    sides = np.where(random.random(2000) < 0.5, 400, 2000)  # half of them come down to a fifth of their side
    images = pd.DataFrame({"height": sides, "width": sides // 2})
    came = random.lognormal(11.8, 0.5, 2000).astype(np.int64)  # bytes that say nothing of the side
    expected = shard.expected_bytes(came, images, Reencode(max_side=400, quality=90))
    np.testing.assert_allclose(expected, np.where(sides == 400, came, came / 25), atol=1)
    totals = np.array([expected[members].sum() for members in shard.deal(expected, 250, seed=1)])
    assert totals.max() < 1.1 * totals.min()
    unaware = np.array([expected[members].sum() for members in shard.deal(came, 250, seed=1)])
    assert unaware.max() > 1.1 * unaware.min()  # what it is for
    assert shard.expected_bytes(came, images, None).tolist() == came.tolist()


def test_deal_mixes_the_order_of_the_file() -> None:
    dealt = np.concatenate(shard.deal(np.full(4000, 1000), 250, seed=1))
    # Of a random permutation p, the correlation of p[i] with i has a standard deviation of 1 / sqrt(4000) = 0.016.
    assert abs(np.corrcoef(dealt, np.arange(4000))[0, 1]) < 0.06
    assert (np.abs(np.diff(dealt)) == 1).mean() < 0.01  # neighbours in the file: 2 / 4000 expected
    assert dealt.tolist() != np.concatenate(shard.deal(np.full(4000, 1000), 250, seed=2)).tolist()


def test_one_image_is_one_shard() -> None:
    assert [members.tolist() for members in shard.deal(np.array([5]), 250, seed=1)] == [[0]]


def test_shards_are_written_without_tensorflow() -> None:
    """So that a worker starts at once; checked in the sources, since this process has loaded it."""
    from pipeline.dvc_graph import modules_behind

    for module in modules_behind(Path(shard.__file__)):
        lines = module.read_text().splitlines()
        assert not [line for line in lines if line.startswith(("import tensorflow", "import keras", "from keras"))]
