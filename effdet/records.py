"""Our records: tf.Example (core/example/*.proto) in TFRecord files (core/lib/io/record_writer.h), of TensorFlow 2.21.

One image is one record. Writing needs no TensorFlow, so a writing process starts at once and stays small: the few
protobuf fields in use are laid out by hand, as https://protobuf.dev/programming-guides/encoding describes them.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
from numpy.typing import ArrayLike, NDArray

from effdet.boxes import PADDING
from effdet.errors import EffdetError

if TYPE_CHECKING:
    import tensorflow as tf

ENCODED = "image/encoded"  # bytes: JPEG or PNG as it came
IMAGE_ID = "image/id"  # int64
HEIGHT = "image/height"  # int64, pixels
WIDTH = "image/width"  # int64, pixels
ORIENTATION = "image/orientation"  # int64, 2..8: to be turned so when decoded; not there: as stored
BOXES = "objects/boxes"  # float32 [N * 4], yxyx, pixels of the picture
CLASS_IDS = "objects/class_ids"  # int64 [N], 0..K-1
IS_CROWD = "objects/is_crowd"  # int64 [N], 0 or 1
AREA = "objects/area"  # float32 [N], square pixels of the object, not of its box

# Field numbers of example.proto and feature.proto, and the one wire type in use.
FEATURES = 1  # of Example
FEATURE, KEY, VALUE = 1, 1, 2  # of Features, a map
BYTES_LIST, FLOAT_LIST, INT64_LIST = 1, 2, 3  # of Feature
LIST_VALUE = 1  # of each of these
LENGTH_DELIMITED = 2

# A TFRecord: uint64 length, CRC of the length, the payload, CRC of the payload; little-endian.
HEADER_BYTES = 12
FOOTER_BYTES = 4
CRC_MASK_DELTA = 0xA282EAD8


def encode_example(
    encoded: bytes,
    image_id: int,
    height: int,
    width: int,
    boxes: ArrayLike,
    class_ids: ArrayLike,
    is_crowd: ArrayLike,
    area: ArrayLike,
    orientation: int = 1,
) -> bytes:
    """One image as a serialized tf.Example.

    Args:
        encoded: the bytes of a JPEG or PNG file.
        image_id: the id in the annotations.
        height, width: pixels, of the picture as `orientation` turns it.
        boxes: float [N, 4] yxyx in pixels of that picture; N may be 0.
        class_ids, is_crowd: integer [N].
        area: float [N], square pixels.
        orientation: EXIF's, 1..8, by which the picture is to be turned when decoded; 1 where boxes are those of the
            picture as stored, whatever its EXIF says.

    Raises:
        EffdetError: the arrays do not describe the same number of objects, or there is no such orientation.
    """
    corners = np.asarray(boxes, np.float32).reshape(-1, 4)
    ids, crowds, areas = (np.asarray(a).ravel() for a in (class_ids, is_crowd, area))
    if not len(corners) == len(ids) == len(crowds) == len(areas):
        raise EffdetError(
            f"image {image_id}: got {len(corners)} boxes, {len(ids)} class ids, {len(crowds)} crowd marks"
            f" and {len(areas)} areas; one of each an object is needed"
        )
    if not 1 <= orientation <= 8:
        raise EffdetError(f"image {image_id}: expected an EXIF orientation of 1 to 8, got {orientation}")
    features = {
        IMAGE_ID: _integers([image_id]),
        HEIGHT: _integers([height]),
        WIDTH: _integers([width]),
        BOXES: _floats(corners),
        CLASS_IDS: _integers(ids.tolist()),
        IS_CROWD: _integers(crowds.tolist()),
        AREA: _floats(areas),
    }
    if orientation != 1:
        features[ORIENTATION] = _integers([orientation])
    entries = b"".join(_field(FEATURE, _key(name) + _field(VALUE, feature)) for name, feature in features.items())
    # The picture stands last, so that it is copied once, behind the openings of all fields that end with it.
    key = _key(ENCODED)
    value = _opening(len(encoded), VALUE, BYTES_LIST, LIST_VALUE)
    entry = _opening(len(key) + len(value) + len(encoded), FEATURE)
    example = _opening(len(entries) + len(entry) + len(key) + len(value) + len(encoded), FEATURES)
    return b"".join((example, entries, entry, key, value, encoded))


def parse_examples(serialized: tf.Tensor, max_boxes: int) -> dict[str, tf.Tensor]:
    """Serialized records [n] as arrays padded to `max_boxes`, M, objects; objects beyond it are left out.

    Returns:
        encoded string [n]; image_id int64 [n]; height, width int32 [n], pixels; orientation int32 [n], 1 where
        the picture is to be taken as stored;
        boxes float32 [n, M, 4] yxyx in pixels of the picture; class_ids int32 [n, M], PADDING where there is no
        object; is_crowd bool [n, M]; area float32 [n, M]. All but class_ids are 0 where there is no object.
    """
    import tensorflow as tf  # here: who writes records needs no TensorFlow

    parsed = tf.io.parse_example(
        serialized,
        {
            ENCODED: tf.io.FixedLenFeature([], tf.string),
            IMAGE_ID: tf.io.FixedLenFeature([], tf.int64),
            HEIGHT: tf.io.FixedLenFeature([], tf.int64),
            WIDTH: tf.io.FixedLenFeature([], tf.int64),
            ORIENTATION: tf.io.FixedLenFeature([], tf.int64, 1),
            BOXES: tf.io.RaggedFeature(tf.float32),
            CLASS_IDS: tf.io.RaggedFeature(tf.int64),
            IS_CROWD: tf.io.RaggedFeature(tf.int64),
            AREA: tf.io.RaggedFeature(tf.float32),
        },
    )
    per_object = [None, max_boxes]
    return {
        "encoded": parsed[ENCODED],
        "image_id": parsed[IMAGE_ID],
        "height": tf.cast(parsed[HEIGHT], tf.int32),
        "width": tf.cast(parsed[WIDTH], tf.int32),
        "orientation": tf.cast(parsed[ORIENTATION], tf.int32),
        "boxes": tf.reshape(parsed[BOXES].to_tensor(0, shape=[None, max_boxes * 4]), [-1, max_boxes, 4]),
        "class_ids": tf.cast(parsed[CLASS_IDS].to_tensor(PADDING, shape=per_object), tf.int32),
        "is_crowd": tf.cast(parsed[IS_CROWD].to_tensor(0, shape=per_object), tf.bool),
        "area": parsed[AREA].to_tensor(0, shape=per_object),
    }


def framed(payload: bytes) -> tuple[bytes, bytes, bytes]:
    """The payload between its header and footer: what is to be written, one after the other, to a TFRecord file."""
    length = struct.pack("<Q", len(payload))
    return length + _masked_crc(length), payload, _masked_crc(payload)


def record_spans(path: Path) -> NDArray[np.int64]:
    """Where the payloads of a TFRecord file lie: int64 [n, 2], offset and length in bytes.

    Only the record headers are read, and their checksums compared.

    Raises:
        EffdetError: the file ends within a record, or does not hold records.
    """
    spans = []
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        offset = 0
        while offset < size:
            header = os.pread(file.fileno(), HEADER_BYTES, offset)
            if len(header) == HEADER_BYTES and header[8:] != _masked_crc(header[:8]):
                raise EffdetError(
                    f"{path}: byte {offset}: expected the header of a TFRecord, its checksum differs;"
                    " the file is damaged, compressed or no TFRecord file"
                )
            # No length fits a header that is cut itself: size + 1 leads to the same error.
            length = struct.unpack("<Q", header[:8])[0] if len(header) == HEADER_BYTES else size + 1
            end = offset + HEADER_BYTES + length + FOOTER_BYTES
            if end > size:
                raise EffdetError(
                    f"{path}: the record at byte {offset} is cut off by the file's end at byte {size};"
                    " write or fetch the file again"
                )
            spans.append((offset + HEADER_BYTES, length))
            offset = end
    return np.array(spans, np.int64).reshape(-1, 2)


def read_payload(file: FileIO, offset: int, length: int) -> bytes:
    """The payload of a record that `record_spans` found, from the open TFRecord file.

    Raises:
        EffdetError: its checksum differs.
    """
    data = os.pread(file.fileno(), length + FOOTER_BYTES, offset)
    payload = data[:length]
    if data[length:] != _masked_crc(payload):
        raise EffdetError(
            f"{file.name}: the record at byte {offset - HEADER_BYTES} is damaged, its checksum differs;"
            " write or fetch the file again"
        )
    return payload


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + CRC_MASK_DELTA) & 0xFFFFFFFF)


def _opening(length: int, *numbers: int) -> bytes:
    """Tags and lengths of nested protobuf fields, outermost first: what precedes the innermost's `length` bytes."""
    opening = b""
    for number in reversed(numbers):
        opening = bytes((number << 3 | LENGTH_DELIMITED,)) + _varint(len(opening) + length) + opening
    return opening


def _field(number: int, body: bytes) -> bytes:
    return _opening(len(body), number) + body


@functools.cache
def _key(name: str) -> bytes:
    return _field(KEY, name.encode())


@functools.lru_cache(maxsize=4096)  # most numbers are small and come again
def _varint(value: int) -> bytes:
    rest = value & 0xFFFFFFFFFFFFFFFF  # a negative int64 in two's complement
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _floats(values: ArrayLike) -> bytes:
    body = np.asarray(values, "<f4").tobytes()
    return _opening(len(body), FLOAT_LIST, LIST_VALUE) + body


def _integers(values: Iterable[int]) -> bytes:
    body = b"".join(map(_varint, values))
    return _opening(len(body), INT64_LIST, LIST_VALUE) + body
