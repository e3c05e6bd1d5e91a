"""TFRecords as google/automl's efficientdet/dataset/create_coco_tfrecord.py @6a54c87 and NVIDIA's copy write them.

What they hold is laid down as a COCO data set, image archive and annotations, which every stage reads.

Of a record: image/encoded; image/height and image/width; image/source_id, a decimal id; image/object/bbox/{xmin,xmax,
ymin,ymax} as shares of width and height; image/object/class/label, 1 to K with gaps. What else is missing, is filled
in: sizes from the picture, ids by counting, image/object/class/text from the label, image/object/is_crowd as 0 and
image/object/area as the box's. The rest is not looked at.
"""

import contextlib
import io
import itertools
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from effdet.errors import EffdetError
from effdet.records import HEADER_BYTES, read_payload, record_spans
from pipeline.coco import add_member
from pipeline.errors import PipelineError
from pipeline.files import written_whole

GZIP = b"\x1f\x8b"
KINDS = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}  # how an encoded picture begins -> ending of its name
INT64_DIGITS = 19  # of its largest
SIDES = ("xmin", "ymin", "xmax", "ymax")

# tensorflow/core/example/{example,feature}.proto of TensorFlow 2.21; its own classes come with all of TensorFlow.
# A protobuf map is a repeated message of key and value; the last of a key counts.
MESSAGES = """
name: "example.proto" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: "BytesList" }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: "FloatList" }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: "Int64List" }
}
message_type {
  name: "Entry"
  field { name: "key" number: 1 type: TYPE_STRING }
  field { name: "value" number: 2 type: TYPE_MESSAGE type_name: "Feature" }
}
message_type {
  name: "Features" field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Entry" }
}
message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
"""


class _FaultError(Exception):
    """What is wrong with a record; whoever reads the file knows where it stands."""


@dataclass(frozen=True)
class Picture:
    """A record's image, its objects in lists of the same length."""

    encoded: bytes  # JPEG or PNG
    image_id: int | None  # where source_id is one
    height: int  # pixels
    width: int
    boxes: NDArray[np.float64]  # [N, 4] xywh, pixels
    labels: list[int]
    texts: list[str]  # or none
    is_crowd: list[int]
    area: list[float]  # square pixels


# File names -----------------------------------------------------------------------------------------------------------


def file_names(pattern: str) -> list[str]:
    """`train-?????-of-00256.tfrecord` as its 256 names; a name without ? and * is itself."""
    if pattern.endswith((".gz", ".gzip", ".zlib")):
        raise PipelineError(f"params.yaml: data: {pattern!r} is compressed; only plain TFRecords are read: unpack them")
    if not re.search(r"[?*\[]", pattern):
        return [pattern]
    parts = re.fullmatch(r"([^?*\[]*)(?:\?+|\*)-of-(\d+)([^?*\[]*)", pattern)
    if parts is None or int(parts[2]) == 0:
        raise PipelineError(
            f"params.yaml: data: {pattern!r} does not say how many files there are; write ?????-of-00256 in the place "
            "of the numbers, with the number of files at the end"
        )
    before, count, after = parts.groups()
    return [f"{before}{number:0{len(count)}d}-of-{count}{after}" for number in range(int(count))]


# Records --------------------------------------------------------------------------------------------------------------


def _example_class() -> Any:
    described = text_format.Parse(MESSAGES, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(described)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))


Example = _example_class()


def pictures(path: Path) -> Iterator[tuple[str, Picture]]:
    """Where each record of the file stands, in words, and what it holds. PipelineError names file and byte."""
    try:
        spans = record_spans(path).tolist()
    except EffdetError as error:
        with path.open("rb") as file:
            if file.read(2) == GZIP:
                raise PipelineError(f"{path}: is gzip; only plain TFRecords are read: unpack it") from None
        raise PipelineError(str(error)) from None
    with path.open("rb", buffering=0) as file:
        for offset, length in spans:
            where = f"{path}: record at byte {offset - HEADER_BYTES}"
            try:
                yield where, picture_of(read_payload(file, offset, length))
            except EffdetError as error:
                raise PipelineError(str(error)) from None
            except _FaultError as error:
                raise PipelineError(f"{where}: {error}") from None


def picture_of(payload: bytes) -> Picture:
    """A serialized tf.Example, read. _FaultError where it is none, or does not hold an image."""
    try:
        features = {entry.key: entry.value for entry in Example.FromString(payload).features.feature}
    except DecodeError:
        raise _FaultError("no tf.Example") from None

    def values(name: str, kind: str) -> list[Any]:
        lists = features[name].ListFields() if name in features else []
        for field, found in lists:
            if found.value and field.name != kind:
                raise _FaultError(f"{name}: expected a {kind}, got a {field.name}")
        return list(getattr(features[name], kind).value) if lists else []

    encoded = values("image/encoded", "bytes_list")
    if len(encoded) != 1 or not encoded[0].startswith(tuple(KINDS)):
        raise _FaultError("image/encoded: expected one JPEG or PNG; are these records of another layout?")
    height, width = _size(encoded[0], values("image/height", "int64_list"), values("image/width", "int64_list"))
    source_id = b"".join(values("image/source_id", "bytes_list"))
    labels = values("image/object/class/label", "int64_list")
    sides = [values(f"image/object/bbox/{side}", "float_list") for side in SIDES]
    lists = {
        "is_crowd": values("image/object/is_crowd", "int64_list"),
        "area": values("image/object/area", "float_list"),
        "class/text": values("image/object/class/text", "bytes_list"),
    }
    for name, found in {**dict(zip(SIDES, sides, strict=True)), **{n: f for n, f in lists.items() if f}}.items():
        if len(found) != len(labels):
            raise _FaultError(
                f"{len(labels)} of image/object/class/label and {len(found)} of {name}; one of each an object"
            )
    corners = np.array(sides, np.float64).reshape(4, -1).T * [width, height, width, height]
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    area = lists["area"] or (boxes[:, 2] * boxes[:, 3]).tolist()
    if not (np.isfinite(boxes).all() and np.isfinite(area).all()):
        raise _FaultError("image/object/bbox or area: a value is not finite")
    # As google/automl's create_pascal_tfrecord.py (@e419394) writes them: each object would count as a small one.
    shares = boxes[:, 2] * boxes[:, 3] / (width * height)
    if lists["area"] and shares.any() and np.allclose(area, shares, rtol=1e-3, atol=0):
        raise _FaultError(
            "image/object/area: are shares of the picture, not square pixels; take the json that was written beside "
            "the records, and the images, with data.source: coco_format"
        )
    return Picture(
        encoded[0],
        int(source_id) if source_id.isdigit() and len(source_id) < INT64_DIGITS else None,
        height,
        width,
        boxes,
        labels,
        [text.decode("utf-8", "replace") for text in lists["class/text"]],
        lists["is_crowd"] or [0] * len(labels),
        area,
    )


def _size(encoded: bytes, height: list[int], width: list[int]) -> tuple[int, int]:
    if len(height) == len(width) == 1 and height[0] > 0 and width[0] > 0:
        return height[0], width[0]
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError):
        raise _FaultError("no image/height and image/width, and image/encoded cannot be opened") from None


# Data set -------------------------------------------------------------------------------------------------------------


class _Classes:
    """The labels that occur, with their texts, learnt record by record."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.texts: dict[int, str | None] = {}

    def learn(self, where: str, picture: Picture) -> None:
        """PipelineError where a label is none of the classes, or had another text."""
        for label, text in itertools.zip_longest(picture.labels, picture.texts):
            if not 1 <= label <= self.num_classes:
                raise PipelineError(
                    f"{where}: image/object/class/label: got {label}, and data.num_classes in params.yaml allows 1 to "
                    f"{self.num_classes}; where 0 is a class, write the records anew with labels one higher"
                )
            known = self.texts.get(label)
            if known is not None and text not in (None, known):
                raise PipelineError(
                    f"{where}: image/object/class/text of label {label}: {text!r}, and {known!r} before"
                )
            self.texts[label] = known or text

    def categories(self) -> list[dict[str, Any]]:
        """COCO's table of them."""
        if not self.texts:
            raise PipelineError("data.train and data.val: no record has an object: there is nothing to learn")
        return [{"id": label, "name": self.texts[label] or f"class {label}"} for label in sorted(self.texts)]


def convert(files: Mapping[str, Iterable[Path]], num_classes: int, max_images: int | None, raw: Path) -> set[Path]:
    """Writes {split}.zip and instances_{split}.json of each split's TFRecord files below `raw`; returns their paths.

    The first `max_images` records of a split count; files behind these are not asked for. Category ids are the labels
    that occur, of 1 to `num_classes`. Images are numbered where the first record's source_id is no integer. Pictures
    and annotations are written as they come: memory holds a row an image.
    """
    classes = _Classes(num_classes)
    written = set()
    with contextlib.ExitStack() as stack:
        unfinished = []
        for split, paths in files.items():
            archive, annotations = raw / f"{split}.zip", raw / f"instances_{split}.json"
            zipped = stack.enter_context(zipfile.ZipFile(stack.enter_context(written_whole(archive)), "w"))
            text = stack.enter_context(stack.enter_context(written_whole(annotations)).open("wb"))
            found = itertools.islice((record for path in paths for record in pictures(path)), max_images)
            bar = tqdm(found, desc=f"read {split}", unit=" images", disable=None)
            images = _write_split(bar, classes, zipped, text)
            if not images:
                raise PipelineError(f"data.{split}: its files hold no record; a split needs at least one image")
            unfinished.append((text, images))
            written |= {archive, annotations}
        # In the file, so that another number of classes is another data set to the stages that follow.
        about = {"description": "from TFRecords", "num_classes": num_classes}
        for text, images in unfinished:
            text.write(
                b"]," + msgspec.json.encode({"images": images, "categories": classes.categories(), "info": about})[1:]
            )
    return written


def _write_split(
    found: Iterable[tuple[str, Picture]], classes: _Classes, zipped: zipfile.ZipFile, text: IO[bytes]
) -> list[dict[str, Any]]:
    """Writes pictures and annotations, the latter's file left open; returns the images."""
    images: list[dict[str, Any]] = []
    ids: set[int] = set()
    is_numbered = False
    number = itertools.count(1)  # of annotations
    text.write(b'{"annotations":[')
    for where, picture in found:
        is_numbered = is_numbered if images else picture.image_id is None
        image_id = len(images) + 1 if is_numbered else picture.image_id
        if image_id is None or image_id in ids:
            problem = "is no integer, and the first record's was" if image_id is None else f"{image_id} came before"
            raise PipelineError(
                f"{where}: image/source_id {problem}; ids must be unique integers, or all something else"
            )
        ids.add(image_id)
        classes.learn(where, picture)
        ending = next(ending for start, ending in KINDS.items() if picture.encoded.startswith(start))
        file_name = f"{image_id:012d}.{ending}"
        add_member(zipped, file_name, picture.encoded)
        images.append({"id": image_id, "file_name": file_name, "height": picture.height, "width": picture.width})
        rows = zip(picture.boxes.tolist(), picture.labels, picture.is_crowd, picture.area, strict=True)
        for box, label, is_crowd, area in rows:
            row = {"id": next(number), "image_id": image_id, "category_id": label, "bbox": box}
            comma = b"," if row["id"] != 1 else b""
            text.write(comma + msgspec.json.encode({**row, "area": area, "iscrowd": is_crowd}))
    return images
