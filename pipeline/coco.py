"""A COCO data set as files: annotation tables, images inside their zip, class table.

Format: https://cocodataset.org/#format-data, object detection. Segmentation polygons are skipped while parsing, so
that all of COCO's annotations stay small in memory.
"""

import functools
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any

import msgspec
import numpy as np
import pandas as pd
from tqdm import tqdm

from pipeline import zip_safety
from pipeline.errors import PipelineError
from pipeline.files import CHUNK

COCO2017_CLASSES = 90  # category ids 1..90, ten of them unused; published heads are laid out so

Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
BEFORE, BEHIND = 200, 40  # bytes around a fault that are shown, at most


class AnnotationError(PipelineError):
    """An annotations file that cannot be read as COCO's format; names file, record and key."""


class ArchiveError(PipelineError):
    """An image archive that is damaged, unsafe, or lacks an image."""


# What the zip reader raises for a member that is damaged, encrypted or packed in a way it does not know.
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    UnicodeDecodeError,
)


class _Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str
    width: Int
    height: Int


class _Annotation(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    area: float
    iscrowd: Int


class _Category(msgspec.Struct, gc=False):
    id: Id
    name: str


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclass(frozen=True)
class CocoTables:
    """An annotations file as tables, in the file's order. Ids are int64 and unique."""

    images: pd.DataFrame  # id, file_name, width, height (pixels)
    annotations: pd.DataFrame  # id, image_id, category_id, x, y, w, h (float64 original pixels), area, iscrowd
    categories: pd.DataFrame  # id, name


# Annotations ---------------------------------------------------------------------------------------------------------


def read_annotations(path: Path) -> CocoTables:
    """Reads a COCO json. AnnotationError names file, record and key of the first structural fault."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise AnnotationError(f"{path}: annotations not found; run `dvc repro`") from None
    return parse_annotations(content, str(path))


def parse_annotations(content: bytes, where: str) -> CocoTables:
    """The same of bytes; `where` names them in errors."""
    try:
        parsed = msgspec.json.decode(content, type=_File)
    except msgspec.ValidationError as error:
        raise AnnotationError(f"{where}: {_fault(str(error), content)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{where}: not JSON: {error}{_around(str(error), content)}") from None
    if not parsed.categories:
        raise AnnotationError(f"{where}: categories: empty; at least one category is needed")
    for table in ("images", "annotations", "categories"):
        _refuse_duplicates(table, getattr(parsed, table), where)
    return CocoTables(
        images=_table(parsed.images, id=np.int64, file_name=object, width=np.int64, height=np.int64),
        annotations=_annotations_table(parsed.annotations),
        categories=_table(parsed.categories, id=np.int64, name=object),
    )


def _table(records: list[Any], **columns: type) -> pd.DataFrame:
    return pd.DataFrame(
        {
            name: np.fromiter((getattr(record, name) for record in records), kind, len(records))
            for name, kind in columns.items()
        }
    )


def _annotations_table(records: list[_Annotation]) -> pd.DataFrame:
    boxes = np.array([record.bbox for record in records], np.float64).reshape(-1, 4)  # xywh
    table = _table(
        records,
        id=np.int64,
        image_id=np.int64,
        category_id=np.int64,
        area=np.float64,
        iscrowd=np.int64,
    )
    for column, name in enumerate("xywh"):
        table.insert(3 + column, name, boxes[:, column])
    return table


def _refuse_duplicates(table: str, records: list[Any], where: str) -> None:
    ids = pd.Series([record.id for record in records], dtype=np.int64)
    repeated = np.flatnonzero(ids.duplicated())
    if repeated.size:
        index = int(repeated[0])
        first = int(np.flatnonzero(ids == ids[index])[0])
        raise AnnotationError(
            f"{where}: {table}[{index}]: id {ids[index]} stands at {table}[{first}] already; "
            f"{repeated.size} repeated ids in all; ids must be unique"
        )


def _fault(message: str, content: bytes) -> str:
    """msgspec's words (`... - at `$.annotations[3].bbox[0]``) as ours, with the record's id where it has one."""
    words, _, path = message.partition(" - at ")
    path = path.strip("`").removeprefix("$").removeprefix(".")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", words)
    words = f"lacks key {missing[1]!r}" if missing else words[0].lower() + words[1:]
    record = re.match(r"(images|annotations|categories)\[(\d+)\]\.?", path)
    if record:
        key = path[record.end() :]
        path = f"{record[1]}[{record[2]}]{_id_of(content, record[1], int(record[2]))}"
        path += f": {key}" if key else ""
    return f"{path}: {words}" if path else words


def _id_of(content: bytes, table: str, index: int) -> str:
    records = msgspec.json.decode(content, type=dict[str, msgspec.Raw])[table]
    record = msgspec.json.decode(records, type=list[msgspec.Raw])[index]
    try:
        found = msgspec.json.decode(record, type=dict[str, msgspec.Raw])
        return f" (id {msgspec.json.decode(found['id'])!r})" if "id" in found else ""
    except msgspec.ValidationError:  # no object, or an id that is out of range
        return ""


def _around(message: str, content: bytes) -> str:
    """The text around the byte that msgspec names, from its record's beginning. Python writes NaN, which is no JSON."""
    place = re.search(r"\(byte (\d+)\)", message)
    if place is None:
        return ""
    byte = int(place[1])
    start = max(0, byte - BEFORE, content.rfind(b"{", 0, byte))
    text = content[start : byte + BEHIND].decode("utf-8", "replace")
    return f", in {text!r}" + "; numbers must be finite" * content.startswith((b"NaN", b"Infinity"), byte)


def without(tables: CocoTables, excluded: Mapping[str, list[int]]) -> CocoTables:
    """The tables without the images and annotations of these ids, and without the annotations of those images."""
    images, annotations = tables.images, tables.annotations
    lost = annotations["id"].isin(excluded["annotations"]) | annotations["image_id"].isin(excluded["images"])
    return CocoTables(
        images[~images["id"].isin(excluded["images"])].reset_index(drop=True),
        annotations[~lost].reset_index(drop=True),
        tables.categories,
    )


# Classes -------------------------------------------------------------------------------------------------------------


def class_table(categories: pd.DataFrame, head: int | None) -> list[dict[str, Any]]:
    """[{class_id, category_id, name}] by class_id.

    In a head that is given category ids are 1 to `head`, gaps allowed, and a class is one less; without one, classes
    are dense by category id.
    """
    ordered = categories.sort_values("id")
    pairs = [(int(number), str(name)) for number, name in zip(ordered["id"], ordered["name"], strict=True)]
    if head is None:
        return [
            {"class_id": class_id, "category_id": category_id, "name": name}
            for class_id, (category_id, name) in enumerate(pairs)
        ]
    for category_id, name in pairs:
        if not 1 <= category_id <= head:
            raise AnnotationError(
                f"categories: id {category_id} ({name}): this data.source in params.yaml has ids 1 to {head}; "
                "for a data set of your own set data.source: coco_format"
            )
    return [{"class_id": category_id - 1, "category_id": category_id, "name": name} for category_id, name in pairs]


def num_classes(categories: pd.DataFrame, head: int | None) -> int:
    """K, the width of the model's class head: the one given, or as many as there are categories."""
    return len(categories) if head is None else head


# Images --------------------------------------------------------------------------------------------------------------


class ImageArchive:
    """The images of a split, read straight from their zip, by the annotations' file names.

    A pickled archive opens its file anew, so one may be sent to a worker process. (One inherited through a fork would
    share its position in the file with its parent.)
    """

    def __init__(self, path: Path) -> None:
        """Opens the zip and reads its directory. ArchiveError where it is missing, damaged or unsafe (zip_safety)."""
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise ArchiveError(f"{path}: image archive not found; run `dvc repro`") from None
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise ArchiveError(f"{path}: not a zip archive: {error}") from None
        if fault := zip_safety.fault(self._zip.infolist(), path.stat().st_size):
            self.close()
            raise ArchiveError(f"{path}: {fault}; refused")
        members = [member for member in self._zip.infolist() if not _is_by_product(member)]
        self._members = {member.filename: member for member in members}
        if len(self._members) < len(members):
            names = pd.Series([member.filename for member in members])
            repeated = names[names.duplicated()].iloc[0]
            raise ArchiveError(f"{path}: member {repeated!r} is there more than once; refused")
        tops = {name.partition("/")[0] for name in self._members}
        self._top = f"{tops.pop()}/" if len(tops) == 1 else ""

    @property
    def names(self) -> list[str]:
        """All members' names, sorted."""
        return sorted(self._members)

    def member(self, file_name: str) -> zipfile.ZipInfo:
        """The member of that very name, or of that name below the archive's one top folder (`train2017/`)."""
        for name in (file_name, self._top + file_name):
            if name in self._members:
                return self._members[name]
        raise ArchiveError(f"{self.path}: {file_name!r} is not in the archive{self._nearest(file_name)}")

    def read(self, file_name: str) -> bytes:
        """The image file's bytes, as many as the directory says, checked against the CRC-32 there."""
        member = self.member(file_name)
        content = self._stored(member) if member.compress_type == zipfile.ZIP_STORED else None
        return b"".join(self._chunks(member, max(member.file_size, 1))) if content is None else content

    def check(self) -> None:
        """Reads every file once, a chunk at a time, for its CRC-32. ArchiveError names the first that is damaged."""
        for member in tqdm(self._members.values(), desc=f"check {self.path.name}", unit=" files", disable=None):
            for _ in self._chunks(member, CHUNK):
                pass

    def open(self, file_name: str) -> IO[bytes]:
        """The image file as a stream, for its header; only a stream read to its end checks the CRC-32."""
        member = self.member(file_name)
        try:
            return self._zip.open(member)
        except DAMAGED as error:
            raise ArchiveError(f"{self.path}: {member.filename}: cannot be read: {error}") from None

    def close(self) -> None:
        """Closes the file."""
        self._zip.close()

    def _stored(self, member: zipfile.ZipInfo) -> bytes | None:
        """The bytes of a member that is not compressed, from their place: half of what zipfile's stream costs.

        None where they are not what the directory says. The stream tells what is wrong then.
        """
        file = self._zip.fp
        try:
            header = os.pread(file.fileno(), zip_safety.LOCAL_HEADER, member.header_offset) if file else b""
            if file is None or len(header) < zip_safety.LOCAL_HEADER:
                return None
            name_length, extra_length = struct.unpack("<HH", header[-4:])  # its last fields
            place = member.header_offset + zip_safety.LOCAL_HEADER + name_length + extra_length
            content = os.pread(file.fileno(), member.file_size, place)
        except OSError:
            return None
        return content if len(content) == member.file_size and zlib.crc32(content) == member.CRC else None

    def _chunks(self, member: zipfile.ZipInfo, length: int) -> Iterator[bytes]:
        size = 0
        try:
            with self._zip.open(member) as stream:
                # Given a length zipfile unpacks no more; without one, all that is there before it cuts it.
                while chunk := stream.read(length):
                    size += len(chunk)
                    yield chunk
        except DAMAGED as error:
            raise ArchiveError(f"{self.path}: {member.filename}: cannot be read: {error}") from None
        if size < member.file_size:
            raise ArchiveError(
                f"{self.path}: {member.filename}: has {size:,} bytes; the archive says {member.file_size:,}"
            )

    @functools.cached_property
    def _by_last_part(self) -> dict[str, str]:
        return {name.rpartition("/")[2]: name for name in reversed(self._members)}  # the first of several stays

    def _nearest(self, file_name: str) -> str:
        found = self._by_last_part.get(file_name.rpartition("/")[2])
        return f"; there is {found!r}, and a file_name must be the whole path in the archive" if found else ""

    def __enter__(self) -> "ImageArchive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["ImageArchive"], tuple[Path]]:
        return ImageArchive, (self.path,)


def _is_by_product(member: zipfile.ZipInfo) -> bool:
    """Folders' own entries, and what macOS adds to an archive."""
    return member.filename.endswith("/") or member.filename.startswith("__MACOSX/")  # is_dir() fails on an empty name


def add_member(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Stores a file uncompressed and without its date: the same content is the same archive, byte by byte."""
    member = zipfile.ZipInfo(name)  # dated 1980-01-01
    member.external_attr = 0o644 << 16
    member.create_system = 3  # Unix, wherever it is written
    archive.writestr(member, content)
