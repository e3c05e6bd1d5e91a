"""The EXIF orientation of a JPEG, by the rules of effdet.preprocess and equal to it for every file, without TensorFlow.

Not Pillow's: that reads XMP too, and forgives other faults than effdet does.
"""

import io
import struct
from typing import IO, cast

from PIL import Image

from pipeline.errors import PipelineError

MAX_SEGMENTS = 64  # the constants of effdet.preprocess, which would import TensorFlow
SEGMENT_HEADER = 10
ORIENTATION, SHORT = 0x0112, 3
ENTRY = 12

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """The orientation, 1..8, of an image that was opened and not yet loaded: it is read from the image's file.

    1 for an image that is no JPEG, has none, or has one that is damaged.
    """
    file = cast(IO[bytes] | None, getattr(image, "fp", None))
    if file is None:
        raise PipelineError("EXIF orientation: the image's file is closed; ask before its pixels are loaded")
    place = file.tell()
    found = _orientation(file)
    file.seek(place)
    return found


def orientation_of(encoded: bytes) -> int:
    """The same of a file's bytes."""
    return _orientation(io.BytesIO(encoded))


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned and mirrored as its orientation, 1..8, says."""
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _orientation(file: IO[bytes]) -> int:
    file.seek(0)
    if file.read(2) != b"\xff\xd8":
        return 1
    position = 2
    segment = _header(file, position)
    for _ in range(MAX_SEGMENTS):
        length = _length(segment)
        if segment[:2] == b"\xff\xff":
            position += 1
        elif segment[0] == 0xFF and _has_length(segment[1]) and length >= 4 and not _is_exif(segment):
            position += length
        else:
            break
        segment = _header(file, position)
    return _tiff_orientation(file.read(_length(segment) - SEGMENT_HEADER)) if _is_exif(segment) else 1


def _header(file: IO[bytes], position: int) -> bytes:
    file.seek(position)
    return file.read(SEGMENT_HEADER).ljust(SEGMENT_HEADER, b"\0")


def _length(segment: bytes) -> int:
    return 2 + int.from_bytes(segment[2:4], "big")


def _has_length(marker: int) -> bool:
    return 0xC0 <= marker < 0xD0 or marker > 0xDA


def _is_exif(segment: bytes) -> bool:
    return segment[:2] == b"\xff\xe1" and _length(segment) >= SEGMENT_HEADER and segment[4:] == b"Exif\0\0"


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (place,) = struct.unpack_from(f"{order}I", tiff, 4)
    if place + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(f"{order}H", tiff, place)
    for start in range(place + 2, min(place + 2 + ENTRY * count, len(tiff) - ENTRY + 1), ENTRY):
        tag, kind, number, value = struct.unpack_from(f"{order}HHIH", tiff, start)
        if tag == ORIENTATION:
            return value if kind == SHORT and number == 1 and 1 <= value <= 8 else 1
    return 1
