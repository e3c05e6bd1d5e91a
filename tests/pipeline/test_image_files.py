"""What image files say of themselves, and that TensorFlow reads them as is said."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

from pipeline.coco import ImageArchive
from pipeline.image_files import chosen, file_facts
from pipeline.validation_tables import images_table
from tests.pipeline.made_data import facts, filled, picture, write

ROWS, COLUMNS = np.mgrid[0:48, 0:64]
SMOOTH = np.stack([COLUMNS * 4, ROWS * 5, (ROWS + COLUMNS) * 2], axis=-1).astype(np.uint8)  # so that JPEG keeps it
ADOBE = b"\xff\xee\x00\x0eAdobe"  # the marker that says how CMYK is stored
PNG_COLOURS = {"grey": (0, 1), "RGB": (2, 3), "palette": (3, 1), "grey with alpha": (4, 2), "RGB with alpha": (6, 4)}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(depth: int, colour: str, *extra: bytes) -> bytes:
    """SMOOTH's first channels in 8 or 16 bits, as PNG 1.2 lays them out; with depth 16 the lower bits are 0x55."""
    number, channels = PNG_COLOURS[colour]
    samples = SMOOTH[..., [0, 1, 2, 0][:channels]].astype(np.uint16)
    pixels = (samples * 256 + 0x55).astype(">u2") if depth == 16 else samples.astype(np.uint8)
    header = struct.pack(">IIBBBBB", 64, 48, depth, number, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg(mode: str, adobe: bool = True, transform: int = 0) -> bytes:
    """SMOOTH as JPEG; CMYK with another transform in Adobe's marker, or without the marker."""
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH).convert(mode).save(buffer, "JPEG", quality=95)
    content = buffer.getvalue()
    if mode == "CMYK":
        place = content.index(ADOBE)
        marker = content[place : place + 16]
        content = content.replace(marker, marker[:-1] + bytes([transform]) if adobe else b"")
    return content


def read(folder: Path, *contents: bytes) -> pd.DataFrame:
    """The facts of files that are decoded in full."""
    names = [f"{number}" for number in range(len(contents))]
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for name, content in zip(names, contents, strict=True):
            archive.writestr(name, content)
    with ImageArchive(folder / "a.zip") as opened:
        return facts(opened, names, decode=True)


PALETTE = chunk(b"PLTE", bytes(range(256)) * 3)
GREY = SMOOTH[..., :1].repeat(3, axis=-1)
KINDS = {  # words: file, what it is read as
    "8-bit RGB with alpha: read as 8-bit RGB, transparency is ignored": (png(8, "RGB with alpha"), SMOOTH),
    "8-bit grey with alpha: read as 8-bit RGB, transparency is ignored": (png(8, "grey with alpha"), GREY),
    "8-bit palette: read as 8-bit RGB": (png(8, "palette", PALETTE), None),
    "8-bit palette with transparency: read as 8-bit RGB, transparency is ignored": (
        png(8, "palette", PALETTE, chunk(b"tRNS", b"\0\x80")),
        None,
    ),
    "8-bit RGB with transparency: read as 8-bit RGB, transparency is ignored": (
        png(8, "RGB", chunk(b"tRNS", b"\0\0\0\0\0\0")),
        SMOOTH,
    ),
    "16-bit grey: read as 8-bit RGB, the lower 8 bits are dropped": (png(16, "grey"), GREY),
    "16-bit RGB: read as 8-bit RGB, the lower 8 bits are dropped": (png(16, "RGB"), SMOOTH),
    "16-bit RGB with alpha: read as 8-bit RGB, the lower 8 bits are dropped, transparency is ignored": (
        png(16, "RGB with alpha"),
        SMOOTH,
    ),
    "CMYK: read as RGB": (jpeg("CMYK"), SMOOTH),
}


def test_kinds_of_pictures_are_named_and_tensorflow_reads_them_so(tmp_path: Path) -> None:
    found = read(tmp_path, *(content for content, _ in KINDS.values()))
    assert found["mode"].tolist() == list(KINDS)
    assert found["decode_problem"].isna().all()
    for words, (content, expected) in KINDS.items():
        decoded = tf.image.decode_image(content, channels=3, expand_animations=False).numpy()
        if expected is None:
            expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))[..., :3]
        largest = np.abs(decoded.astype(int) - expected).max()
        assert largest <= (6 if "CMYK" in words else 0), words


@pytest.mark.parametrize("transform", [0, 2])  # CMYK, and YCCK, which says that these inks are luma and chroma
def test_cmyk_is_pillows_rgb_in_both_ways_of_decoding(transform: int) -> None:
    content = jpeg("CMYK", transform=transform)
    with Image.open(io.BytesIO(content)) as image:
        assert image.info["adobe_transform"] == transform
        pillows = np.asarray(image.convert("RGB")).astype(int)
    whole = tf.image.decode_image(content, channels=3, expand_animations=False).numpy()
    part = tf.image.decode_and_crop_jpeg(content, [8, 16, 24, 32], channels=3).numpy()
    assert np.abs(whole - pillows).max() <= 8
    assert np.abs(part - pillows[8:32, 16:48]).max() <= 8
    assert pillows.std() > 40  # or the same of anything would be no proof


def test_cmyk_without_adobes_marker_is_named_for_what_it_is(tmp_path: Path) -> None:
    content = jpeg("CMYK", adobe=False)
    assert read(tmp_path, content)["mode"].tolist() == [
        "CMYK without Adobe's marker: read as RGB, 0 taken as no ink; other readers may take it as full ink"
    ]
    decoded = tf.image.decode_image(content, channels=3, expand_animations=False).numpy().astype(int)
    pillows = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_allclose(pillows, SMOOTH, atol=8)  # Pillow takes all as inverted,
    assert np.abs(decoded - pillows).mean() > 50  # TensorFlow does not


def test_grey_and_rgb_need_no_words(tmp_path: Path) -> None:
    found = read(tmp_path, jpeg("L"), jpeg("RGB"), png(8, "grey"), png(8, "RGB"), b"no picture")
    assert found["mode"].isna().all()
    assert found["format"].tolist() == ["JPEG", "JPEG", "PNG", "PNG", None]


def broken(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "content",
    [png(8, "RGB")[:-12], broken(png(8, "RGB"), -13), png(8, "RGB")[:-40], jpeg("RGB")[:-2]],
    ids=["png-without-end", "png-checksum", "png-cut", "jpeg-without-end"],
)
def test_what_tensorflow_cannot_decode_is_a_problem(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError):
        tf.image.decode_image(content, channels=3, expand_animations=False)
    assert read(tmp_path, content)["decode_problem"].notna().all()


@pytest.mark.parametrize("apply_exif", [False, True])
def test_size_is_compared_after_turning_where_boxes_are_of_the_turned_picture(tmp_path: Path, apply_exif: bool) -> None:
    turns = [1, 3, 6, 8, 6]
    found = read(tmp_path, *(picture(turn, orientation=turn) for turn in turns))
    assert found["orientation"].tolist() == turns
    upright = pd.DataFrame({"width": [64, 64, 48, 48, 64], "height": [48, 48, 64, 64, 48]})
    expected = [None] * 4 + ["64 x 48 in the annotations, 48 x 64 in the file, turned; as with data.apply_exif: false"]
    if not apply_exif:
        words = "48 x 64 in the annotations, 64 x 48 in the file; as with data.apply_exif: true"
        expected = [None, None, words, words, None]
    assert images_table(upright, found, apply_exif)["size_problem"].tolist() == expected


@pytest.mark.parametrize(("fraction", "marked"), [(0, 0), (0.001, 1), (0.5, 50), (0.501, 51), (1, 100)])
def test_that_many_files_are_chosen_and_the_same_each_time(fraction: float, marked: int) -> None:
    marks = chosen(100, fraction)
    assert marks.sum() == marked
    np.testing.assert_array_equal(marks, chosen(100, fraction))


def test_a_larger_fraction_holds_a_smaller_one() -> None:
    assert chosen(100, 0.7)[chosen(100, 0.3)].all()


def test_damaged_member_is_a_problem_of_its_image(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": filled(1, 2), "val": filled(3, 1)})
    archive = folder / "data" / "raw" / "train.zip"
    content = bytearray(archive.read_bytes())
    middle = content.index(picture(1)) + 1000  # within the data of 001.jpg, whose CRC-32 then differs
    content[middle] ^= 0xFF
    archive.write_bytes(content)
    with ImageArchive(archive) as opened:
        found = file_facts(opened, "train", ["001.jpg", "002.jpg"], np.array([True, True]), workers=1)
    assert "Bad CRC-32" in found["decode_problem"][0]
    assert found["decode_problem"][1] is None
    assert found["file_width"].tolist() == [None, 64]
