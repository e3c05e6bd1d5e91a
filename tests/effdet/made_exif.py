"""JPEG files with an EXIF orientation, laid out byte by byte."""

import io
import struct

import numpy as np
from PIL import Image

ORIENTATION, SHORT = 0x0112, 3

# What turns a stored picture [h,w,...] upright, from the words of the standard: which sides of the stored picture are
# the top and the left of the upright one.
TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.swapaxes(0, 1),  # left, top
    6: lambda p: p[::-1].swapaxes(0, 1),  # the first row is the right side, the first column the top
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda p: p[:, ::-1].swapaxes(0, 1),  # left, bottom
}


def entry(order, tag, kind, count, value):
    """An entry of a TIFF directory; the value is four bytes."""
    return struct.pack(f"{order}HHI", tag, kind, count) + value


def tiff(orientation, order="<", place=8, kind=SHORT, count=1):
    """A TIFF with a make that lies behind the directory, and the orientation after it."""
    value = struct.pack(f"{order}HH", orientation, 0)
    entries = entry(order, 0x010F, 2, 6, struct.pack(f"{order}I", place + 30)) + entry(
        order, ORIENTATION, kind, count, value
    )
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", place)
    directory = struct.pack(f"{order}H", 2) + entries + bytes(4)
    return header + bytes(place - 8) + directory + b"maker\0"


def segment(marker, body):
    return b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(body)) + body


def exif(content):
    """APP1 with such a TIFF."""
    return segment(0xE1, b"Exif\0\0" + content)


def jpeg(height=24, width=40, seed=0):
    """A JPEG file with a JFIF segment and no EXIF; no turn of it is like another."""
    rough = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((width, height)).save(file, "JPEG", quality=95)
    return file.getvalue()


def with_segments(plain, *segments):
    """The JPEG with segments put before its others."""
    return b"".join([plain[:2], *segments, plain[2:]])


def turned(orientation, order="<", **options):
    """A JPEG of this orientation."""
    return with_segments(jpeg(**options), exif(tiff(orientation, order)))


JFIF = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
# Files whose orientation, 6 at first sight, does not count.
DAMAGED = {
    "nothing": b"",
    "half a marker": b"\xff",
    "start alone": b"\xff\xd8",
    "no JPEG": b"\0\0" + turned(6)[2:],
    "ends in the marker": turned(6)[:3],
    "ends in the name": turned(6)[:10],
    "ends after the name": turned(6)[:12],
    "ends in the directory": turned(6)[: turned(6).index(b"\x12\x01") + 9],
    "no byte order": turned(6).replace(b"II*\0", b"IM*\0"),
    "not 42": turned(6).replace(b"II*\0", b"II+\0"),
    "directory outside": with_segments(jpeg(), exif(b"II*\0" + b"\xff" * 4 + tiff(6)[8:])),
    "directory at the end": with_segments(jpeg(), exif(b"II*\0" + struct.pack("<I", len(tiff(6)) - 1) + tiff(6)[8:])),
    "segment too short": with_segments(jpeg(), exif(tiff(6)[:30]), tiff(6)[30:]),
    "no entries": with_segments(jpeg(), exif(b"II*\0\x08\0\0\0\0\0")),
    "orientation 0": turned(0),
    "orientation 9": turned(9),
    "orientation of another type": with_segments(jpeg(), exif(tiff(6, kind=4))),
    "two orientations in one entry": with_segments(jpeg(), exif(tiff(6, count=2))),
    "the first of two counts": with_segments(jpeg(), exif(tiff(1)), exif(tiff(6))),
    "in other application data": with_segments(jpeg(), segment(0xE2, b"Exif\0\0" + tiff(6))),
    "behind the pixels": jpeg()[:-2] + exif(tiff(6)) + jpeg()[-2:],
    "behind junk": with_segments(jpeg(), b"\0", exif(tiff(6))),
    "behind a segment without length": with_segments(jpeg(), b"\xff\xe0\0\0", exif(tiff(6))),
    "behind too many segments": with_segments(jpeg(), *[segment(0xFE, b"")] * 65, exif(tiff(6))),
}
WHOLE = {
    "first": with_segments(jpeg(), exif(tiff(6))),
    "behind JFIF": with_segments(jpeg(), JFIF, exif(tiff(6))),
    "behind a profile and a comment": with_segments(
        jpeg(), segment(0xE2, b"ICC_PROFILE\0" + bytes(60_000)), segment(0xFE, b"\xff\xe1 comment"), exif(tiff(6))
    ),
    "behind XMP": with_segments(jpeg(), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0"), exif(tiff(6))),
    "behind filling": with_segments(jpeg(), b"\xff\xff", exif(tiff(6))),
    "behind as many segments as may be": with_segments(jpeg(), *[segment(0xFE, b"")] * 64, exif(tiff(6))),
    "directory far off": with_segments(jpeg(), exif(tiff(6, place=5000))),
    "more entries announced than there are": with_segments(jpeg(), exif(tiff(6)[:8] + b"\xff\xff" + tiff(6)[10:])),
}
