"""The files of data/shards, by the names that its manifest gives them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effdet.input_pipeline import Shards
from effdet.records import parse_examples
from pipeline.files import read_json

SHARDS = Path("data/shards")
MANIFEST = SHARDS / "manifest.json"
CHUNK = 64  # images read at a time


def shard_paths(manifest: Mapping[str, Any], split: str, folder: Path = SHARDS) -> list[Path]:
    """The files of a split's shards, in order."""
    return [folder / shard["file"] for shard in manifest["splits"][split]["shards"]]


def ground_truth_path(split: str, folder: Path = SHARDS) -> Path:
    """COCO json of exactly the images in a split's shards."""
    return folder / f"ground_truth_{split}.json"


def train_classes(folder: Path = SHARDS) -> list[list[int]]:
    """The class ids of the objects, no crowds, in each image of train: sorted, each once.

    In the order of `shard_paths(manifest, "train")` and of the records in each.
    """
    classes: list[list[int]] = read_json(folder / "classes_train.json", "list of the classes in each image")
    return classes


def spread_images(paths: Sequence[Path], count: int) -> dict[int, bytes]:
    """`count` images of a split, or all, evenly spaced over its records: image id -> JPEG or PNG bytes, by id."""
    shards = Shards(paths)
    numbers = np.unique(np.linspace(0, len(shards) - 1, min(count, len(shards)), dtype=np.int64))
    return dict(sorted(_images(shards, numbers)))


def all_images(paths: Sequence[Path]) -> Iterator[tuple[int, bytes]]:
    """Image id and JPEG or PNG bytes of every record, in their order."""
    shards = Shards(paths)
    for start in range(0, len(shards), CHUNK):
        yield from _images(shards, np.arange(start, min(start + CHUNK, len(shards))))


def images_of(paths: Sequence[Path], image_ids: Sequence[int]) -> dict[int, bytes]:
    """The images with these ids: image id -> JPEG or PNG bytes."""
    wanted = set(image_ids)
    return {image_id: encoded for image_id, encoded in all_images(paths) if image_id in wanted} if wanted else {}


def _images(shards: Shards, numbers: np.ndarray) -> Iterator[tuple[int, bytes]]:
    if numbers.size:
        examples = parse_examples(shards.read(numbers), max_boxes=1)
        yield from zip(examples["image_id"].numpy().tolist(), examples["encoded"].numpy().tolist(), strict=True)
