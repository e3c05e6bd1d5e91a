"""A data set made for a test, as the download stage would leave it, with params.yaml beside it."""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from ruamel.yaml import YAML

from pipeline.coco import ImageArchive
from pipeline.image_files import FileFacts, inspect

PARAMS = Path(__file__).parents[2] / "params.yaml"
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def picture(
    number: int, kind: str = "JPEG", width: int = 64, height: int = 48, mode: str = "RGB", orientation: int = 1
) -> bytes:
    """A picture of its own for each number, of that EXIF orientation unless it is 1."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **({"exif": exif} if orientation > 1 else {}))
    return buffer.getvalue()


def annotation(number: int, image_id: int, **other: Any) -> dict[str, Any]:
    """A valid annotation, but for what is given."""
    box = other.get("bbox", [4.5, 6, 20, 10])
    standard = {"category_id": 3, "bbox": box, "area": 0.5 * box[2] * box[3], "iscrowd": 0}
    return {"id": number, "image_id": image_id, **standard, **other}


def facts(archive: ImageArchive, file_names: Sequence[str], decode: bool = False) -> pd.DataFrame:
    """What pipeline.image_files.file_facts gives of these files, without its processes."""
    found = inspect(archive, [(name, decode) for name in file_names])
    return pd.DataFrame(found, columns=list(FileFacts._fields), dtype=object)


@dataclass
class Split:
    """One split, to be changed before it is written."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=lambda: list(CATEGORIES))
    files: dict[str, bytes] = field(default_factory=dict)

    def add_image(self, number: int, content: bytes | None = None, **other: Any) -> None:
        """An image of 64 x 48 pixels with its file, and no annotation."""
        name = f"{number:03d}.jpg"
        self.images.append({"id": number, "file_name": name, "width": 64, "height": 48, **other})
        self.files[name] = picture(number) if content is None else content

    def add_annotation(self, number: int, image_id: int, **other: Any) -> None:
        self.annotations.append(annotation(number, image_id, **other))


def filled(first: int, images: int, boxes: int = 2) -> Split:
    """`images` images with ids from `first` on, `boxes` boxes each, of both classes in turn."""
    split = Split()
    for number in range(first, first + images):
        split.add_image(number)
        for k in range(boxes):
            split.add_annotation(100 * number + k, number, category_id=(3, 7)[k % 2], bbox=[1.5 * k, 2, 10, 8 + k])
    return split


def write(folder: Path, splits: dict[str, Split], **changed: Any) -> Path:
    """Writes the splits below folder/data/raw, archives with one top folder, and folder/params.yaml.

    `changed` replaces values of params.yaml: shard={"max_boxes": 2}.
    """
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        tables = {key: getattr(split, key) for key in ("images", "annotations", "categories")}
        (raw / f"instances_{name}.json").write_text(json.dumps(tables))
        with zipfile.ZipFile(raw / f"{name}.zip", "w") as archive:
            for file_name, content in split.files.items():
                archive.writestr(zipfile.ZipInfo(f"{name}/{file_name}"), content)
    params = YAML(typ="safe").load(PARAMS)
    for block, values in changed.items():
        params[block] = values if block == "data" else {**params[block], **values}
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(params, file)
    return folder
