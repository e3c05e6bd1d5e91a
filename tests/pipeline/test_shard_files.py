"""Which images of a split the stages take from its shards."""

import json

import numpy as np
import pytest

from effdet.errors import EffdetError
from effdet.records import encode_example, framed
from pipeline.shard_files import CHUNK, all_images, ground_truth_path, shard_paths, spread_images
from tests.pipeline.judged_model import write_shards


@pytest.fixture
def shards(tmp_path):
    """Nine images, the second a PNG."""
    write_shards(tmp_path / "shards", {"train": 3, "val": 9})
    return tmp_path / "shards"


def write_shard(path, image_ids):
    """Records whose encoded bytes are the image id's digits: nothing here decodes them."""
    boxes = np.zeros((0, 4), np.float32)
    records = [encode_example(str(image_id).encode(), image_id, 8, 8, boxes, [], [], []) for image_id in image_ids]
    path.write_bytes(b"".join(piece for record in records for piece in framed(record)))
    return path


def test_paths(shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    assert shard_paths(manifest, "val", shards) == [shards / "val-00000-of-00001.tfrecord"]
    assert all(path.is_file() for path in shard_paths(manifest, "train", shards))
    assert ground_truth_path("val", shards).is_file()


def test_images_are_spread_over_the_split(shards):
    path = shards / "val-00000-of-00001.tfrecord"
    assert list(spread_images([path], 3)) == [200, 204, 208]
    assert list(spread_images([path], 20)) == list(range(200, 209))
    assert spread_images([path], 0) == {}


def test_images_come_as_they_lie_in_the_records(shards):
    found = spread_images([shards / "val-00000-of-00001.tfrecord"], 9)
    assert [image_id for image_id, content in found.items() if content.startswith(b"\x89PNG")] == [201]
    assert all(content.startswith(b"\xff\xd8") for image_id, content in found.items() if image_id != 201)
    assert list(all_images([shards / "val-00000-of-00001.tfrecord"])) == list(found.items())


def test_spread_goes_over_all_shards_and_comes_by_id(tmp_path):
    paths = [write_shard(tmp_path / "a", [9, 8, 7]), write_shard(tmp_path / "b", [3, 2, 1])]
    assert spread_images(paths, 2) == {1: b"1", 9: b"9"}
    assert list(spread_images(paths, 6)) == [1, 2, 3, 7, 8, 9]


def test_all_images_come_once_in_the_records_order(tmp_path):
    image_ids = [*range(3 * CHUNK, 0, -1), 3 * CHUNK + 5]  # a last chunk of one, and chunks over both shards
    paths = [write_shard(tmp_path / "a", image_ids[: CHUNK + 7]), write_shard(tmp_path / "b", image_ids[CHUNK + 7 :])]
    assert list(all_images(paths)) == [(image_id, str(image_id).encode()) for image_id in image_ids]
    images = all_images(paths)
    assert next(images) == (3 * CHUNK, str(3 * CHUNK).encode())


def test_shards_without_a_record(tmp_path):
    path = write_shard(tmp_path / "a", [])
    for read in (lambda: list(all_images([path])), lambda: spread_images([path], 5)):
        with pytest.raises(EffdetError, match=r"got none in .*a$"):
            read()
