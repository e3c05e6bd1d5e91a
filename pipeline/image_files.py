"""What the image files of a split say of themselves: header, orientation, and of a sample every pixel."""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import IO, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pipeline.archive_workers import over_archive
from pipeline.coco import ArchiveError, ImageArchive
from pipeline.exif import orientation

FILES_A_TASK = 64  # enough for the way to a worker process not to matter
HEADER = 4096  # bytes read at a time: most headers are one read
TURNED = 5  # orientations from here on swap width and height
# What Pillow, and the zip that it reads from, raise for a damaged file.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)
PNG_DEPTH = 24  # place of the bit depth in a PNG file; the colour type follows (PNG 1.2, 4.1.1)
PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


class FileFacts(NamedTuple):
    """What an image file says of itself. A problem is words, None where there is none or it was not looked for."""

    archive_problem: str | None
    member: str | None  # its name in the archive
    checksum: int | None  # CRC-32 and
    bytes: int | None  # size, unpacked, as the archive's directory has them
    header_problem: str | None
    format: str | None  # Pillow's name
    file_width: int | None  # pixels, as stored
    file_height: int | None
    mode: str | None  # where it is neither 8-bit grey nor RGB: what it is, and what TensorFlow's decoders make of it
    orientation: int | None  # EXIF's, 1 to 8
    decode_problem: str | None


def inspect(archive: ImageArchive, files: Sequence[tuple[str, bool]]) -> list[FileFacts]:
    """Reads the headers of files of the archive, and decodes those marked True in full."""
    return [_inspect_file(archive, file_name, decode) for file_name, decode in files]


def _inspect_file(archive: ImageArchive, file_name: str, decode: bool) -> FileFacts:
    facts = FileFacts(*[None] * len(FileFacts._fields))
    try:
        member = archive.member(file_name)
    except ArchiveError as error:
        return facts._replace(archive_problem=str(error))
    facts = facts._replace(member=member.filename, checksum=member.CRC, bytes=member.file_size)
    try:
        stream = _stream(archive, file_name, decode)
    except ArchiveError as error:
        return facts._replace(decode_problem=str(error))
    with stream:
        try:
            image = Image.open(stream)
            facts = facts._replace(
                format=image.format,
                file_width=image.width,
                file_height=image.height,
                mode=converted(image, stream),
                orientation=orientation(image),
            )
        except DAMAGED as error:
            return facts._replace(header_problem=_words(error))
        if decode:
            try:
                _decode(image, stream)
            except DAMAGED as error:
                return facts._replace(decode_problem=_words(error))
        return facts


def _stream(archive: ImageArchive, file_name: str, whole: bool) -> IO[bytes]:
    if whole:
        return io.BytesIO(archive.read(file_name))
    return io.BufferedReader(archive.open(file_name), HEADER)  # type: ignore[type-var] # a RawIOBase but for its name


def _decode(image: Image.Image, stream: IO[bytes]) -> None:
    """Raises one of DAMAGED where TensorFlow would not decode it either."""
    image.load()
    if image.format == "PNG":  # Pillow lets wrong checksums and a missing end pass, TensorFlow does not
        stream.seek(0)
        with Image.open(stream) as again:
            again.verify()


def converted(image: Image.Image, stream: IO[bytes]) -> str | None:
    """What the picture is and becomes, unless it is 8-bit grey or RGB. The stream is that of the image.

    tf.image.decode_image and decode_and_crop_jpeg decode all of these, to what is said here.
    """
    if image.format == "PNG":
        place = stream.tell()
        stream.seek(PNG_DEPTH)
        depth, colour = stream.read(2)
        stream.seek(place)
        kind = f"{depth}-bit {PNG_COLOURS.get(colour)}" + (" with transparency" if "transparency" in image.info else "")
        if kind in ("8-bit grey", "8-bit RGB"):
            return None
        loses = ["the lower 8 bits are dropped"] * (depth == 16) + ["transparency is ignored"] * ("with" in kind)
        return f"{kind}: read as 8-bit RGB" + "".join(f", {words}" for words in loses)
    if image.mode == "CMYK":
        if "adobe" in image.info:
            return "CMYK: read as RGB"
        return "CMYK without Adobe's marker: read as RGB, 0 taken as no ink; other readers may take it as full ink"
    return None


def _words(error: Exception) -> str:
    """The error's own, without the address of the object that it may name."""
    return str(error).partition(" <")[0] or type(error).__name__


def file_facts(
    archive: ImageArchive, split: str, file_names: Sequence[str], decode: NDArray[np.bool_], workers: int
) -> pd.DataFrame:
    """FileFacts of each file as columns."""
    marked = list(zip(file_names, decode.tolist(), strict=True))
    tasks = [marked[start : start + FILES_A_TASK] for start in range(0, len(marked), FILES_A_TASK)]
    facts: list[FileFacts] = []
    with tqdm(total=len(marked), desc=f"validate {split}", unit=" images", disable=None) as bar:
        for part in over_archive(archive.path, workers, inspect, tasks):
            facts += part
            bar.update(len(part))
    return pd.DataFrame(facts, columns=list(FileFacts._fields), dtype=object)


def chosen(count: int, fraction: float) -> NDArray[np.bool_]:
    """Marks that fraction of `count` files, rounded up: the same ones each time."""
    marks = np.zeros(count, np.bool_)
    marks[np.random.default_rng(0).permutation(count)[: math.ceil(count * fraction)]] = True
    return marks
