"""COCO files: what is read, and how a faulty record, archive or class is named."""

import errno
import json
import os
import pickle
import re
import tracemalloc
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline import zip_safety
from pipeline.coco import (
    AnnotationError,
    ArchiveError,
    ImageArchive,
    add_member,
    class_table,
    num_classes,
    parse_annotations,
    read_annotations,
)

IMAGE = {"id": 5, "file_name": "a.jpg", "width": 64, "height": 48, "license": 3}
BOX = {
    "id": 17,
    "image_id": 5,
    "category_id": 2,
    "bbox": [1, 2.5, 10, 20],
    "area": 150.5,
    "iscrowd": 0,
    "segmentation": {"counts": "abc", "size": [48, 64]},
}
CATEGORY = {"id": 2, "name": "dog", "supercategory": "animal"}


def content(**changes: Any) -> dict[str, Any]:
    return {"images": [IMAGE], "annotations": [BOX], "categories": [CATEGORY], "info": {}, **changes}


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def test_tables_hold_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content(annotations=[BOX, {**BOX, "id": 4, "iscrowd": 1}])))
    tables = read_annotations(path)
    assert tables.images.to_dict("records") == [{"id": 5, "file_name": "a.jpg", "width": 64, "height": 48}]
    assert list(tables.annotations.columns) == ["id", "image_id", "category_id", "x", "y", "w", "h", "area", "iscrowd"]
    assert tables.annotations.to_numpy().tolist() == [
        [17, 5, 2, 1, 2.5, 10, 20, 150.5, 0],
        [4, 5, 2, 1, 2.5, 10, 20, 150.5, 1],
    ]
    assert tables.categories.to_dict("records") == [{"id": 2, "name": "dog"}]
    assert tables.annotations.dtypes["image_id"] == np.int64
    assert tables.annotations.dtypes["x"] == np.float64


def test_ids_beyond_32_bits_stay_exact() -> None:
    large = 2**62 + 1  # not a float64
    tables = parse_annotations(json.dumps(content(images=[{**IMAGE, "id": large}])).encode(), "x.json")
    assert tables.images["id"].tolist() == [large]


def test_no_annotations_is_a_table_without_rows() -> None:
    tables = parse_annotations(json.dumps(content(annotations=[])).encode(), "x.json")
    assert tables.annotations.shape == (0, 9)
    assert tables.annotations.dtypes["w"] == np.float64


@pytest.mark.parametrize(
    ("faulty", "words"),
    [
        (without(content(), "annotations"), "x.json: lacks key 'annotations'"),
        ([], "x.json: expected `object`, got `array`"),
        (content(images={}), "x.json: images: expected `array`, got `object`"),
        (content(images=[IMAGE, 3]), "x.json: images[1]: expected `object`, got `int`"),
        (content(images=[without(IMAGE, "width")]), "x.json: images[0] (id 5): lacks key 'width'"),
        (content(images=[without(IMAGE, "id")]), "x.json: images[0]: lacks key 'id'"),
        (content(images=[{**IMAGE, "id": "5"}]), "x.json: images[0] (id '5'): id: expected `int`, got `str`"),
        (content(images=[{**IMAGE, "id": -1}]), "x.json: images[0] (id -1): id: expected `int` >= 0"),
        (content(annotations=[without(BOX, "bbox")]), "x.json: annotations[0] (id 17): lacks key 'bbox'"),
        (
            content(annotations=[{**BOX, "bbox": [1, 2, 3]}]),
            "x.json: annotations[0] (id 17): bbox: expected `array` of length 4",
        ),
        (
            content(annotations=[{**BOX, "bbox": [1, 2, 3, None]}]),
            "x.json: annotations[0] (id 17): bbox[3]: expected `float`, got `null`",
        ),
        (
            content(annotations=[BOX, BOX]),
            "x.json: annotations[1]: id 17 stands at annotations[0] already; 1 repeated ids in all; ids must be unique",
        ),
        (
            content(images=[IMAGE, {**IMAGE, "id": 6}, IMAGE, IMAGE]),
            "x.json: images[2]: id 5 stands at images[0] already; 2 repeated ids in all; ids must be unique",
        ),
        (content(categories=[]), "x.json: categories: empty; at least one category is needed"),
    ],
)
def test_a_fault_names_file_record_and_key(faulty: object, words: str) -> None:
    with pytest.raises(AnnotationError) as error:
        parse_annotations(json.dumps(faulty).encode(), "x.json")
    assert str(error.value) == words


@pytest.mark.parametrize("text", ["", "<html>", '{"images": [', json.dumps(content(extra=float("nan")))])
def test_what_is_not_json_is_said_to_be_none(text: str) -> None:
    with pytest.raises(AnnotationError, match=r"^x\.json: not JSON: "):
        parse_annotations(text.encode(), "x.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_number_that_is_no_json_is_shown_with_its_record(number: str) -> None:
    text = json.dumps(content(annotations=[{**BOX, "bbox": [0, "?", 1, 1]}])).replace('"?"', number)
    with pytest.raises(AnnotationError) as error:
        parse_annotations(text.encode(), "x.json")
    shown = f', in \'{{"id": 17, "image_id": 5, "category_id": 2, "bbox": [0, {number}, 1, 1], '
    assert shown in str(error.value)
    assert str(error.value).endswith("; numbers must be finite")


def test_number_beyond_floats_is_named() -> None:
    text = json.dumps(content(annotations=[{**BOX, "bbox": [0, "?", 1, 1]}])).replace('"?"', "1e999")
    with pytest.raises(AnnotationError, match=r"^x\.json: annotations\[0\] \(id 17\): bbox\[1\]: number out of range$"):
        parse_annotations(text.encode(), "x.json")


def test_missing_annotations_are_named(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"instances_val\.json: annotations not found; run `dvc repro`"):
        read_annotations(tmp_path / "instances_val.json")


# Classes


def categories(*ids: int) -> pd.DataFrame:
    return pd.DataFrame({"id": ids, "name": [f"c{number}" for number in ids]})


def test_coco_2017_keeps_its_gaps() -> None:
    table = class_table(categories(90, 1, 13), 90)
    assert [(row["class_id"], row["category_id"], row["name"]) for row in table] == [
        (0, 1, "c1"),
        (12, 13, "c13"),
        (89, 90, "c90"),
    ]
    assert num_classes(categories(90, 1, 13), 90) == 90


def test_other_sources_are_dense_by_category_id() -> None:
    table = class_table(categories(700, 0, 13), None)
    assert [(row["class_id"], row["category_id"]) for row in table] == [(0, 0), (1, 13), (2, 700)]
    assert num_classes(categories(700, 0, 13), None) == 3


def test_an_id_that_the_head_has_not_is_named() -> None:
    with pytest.raises(AnnotationError, match=r"categories: id 91 \(c91\): this data\.source .* has ids 1 to 90"):
        class_table(categories(1, 91), 90)
    with pytest.raises(AnnotationError, match=r"categories: id 0 \(c0\)"):  # which would be class -1
        class_table(categories(1, 0), 90)


# Archives


def archive_of(path: Path, *names: str, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in names:
            archive.writestr(name, b"" if name.endswith("/") else f"bytes of {name}".encode())
    return path


def read_in_worker(archive: ImageArchive, file_name: str) -> bytes:
    return archive.read(file_name)


@pytest.mark.parametrize(
    ("members", "file_name", "found"),
    [
        (["a.jpg", "b.jpg"], "b.jpg", "b.jpg"),
        (["train2017/", "train2017/a.jpg", "train2017/b.jpg"], "b.jpg", "train2017/b.jpg"),
        (["train2017/a.jpg", "train2017/b.jpg"], "train2017/b.jpg", "train2017/b.jpg"),
        (["top/sub/a.JPG", "top/sub2/a.JPG"], "sub2/a.JPG", "top/sub2/a.JPG"),
        (["top/a.jpg", "__MACOSX/top/._a.jpg"], "a.jpg", "top/a.jpg"),
    ],
)
def test_a_file_name_is_found(tmp_path: Path, members: list[str], file_name: str, found: str) -> None:
    with ImageArchive(archive_of(tmp_path / "x.zip", *members)) as archive:
        assert archive.member(file_name).filename == found
        assert archive.read(file_name) == f"bytes of {found}".encode()
        assert archive.open(file_name).read(5) == b"bytes"


@pytest.mark.parametrize(
    ("members", "file_name", "words"),
    [
        (["train/a.jpg"], "b.jpg", "x.zip: 'b.jpg' is not in the archive$"),
        (["a/b.jpg", "c/d.jpg"], "b.jpg", "x.zip: 'b.jpg' is not in the archive; there is 'a/b.jpg', and a file_name"),
    ],
)
def test_a_missing_image_is_named(tmp_path: Path, members: list[str], file_name: str, words: str) -> None:
    with ImageArchive(archive_of(tmp_path / "x.zip", *members)) as archive, pytest.raises(ArchiveError, match=words):
        archive.read(file_name)


@pytest.mark.parametrize(
    "name",
    ["/etc/a.jpg", "../a.jpg", "train/../../a.jpg", "..", "a/..", "\\a.jpg", "a\\..\\..\\b.jpg", "C:a.jpg", "c:/a"],
)
def test_a_member_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ArchiveError, match=rf"x\.zip: member {re.escape(repr(name))} leads out of the archive; refused"
    ):
        ImageArchive(archive_of(tmp_path / "x.zip", "b.jpg", name))


@pytest.mark.parametrize("name", ["..a.jpg", "a..b/c...jpg", "...", "ab:c.jpg", "a b/ä/~.jpg"])
def test_odd_names_are_names(tmp_path: Path, name: str) -> None:
    with ImageArchive(archive_of(tmp_path / "x.zip", "b.jpg", name)) as archive:
        assert archive.read(name) == f"bytes of {name}".encode()


def changed(member: zipfile.ZipInfo, **attributes: int) -> zipfile.ZipInfo:
    for name, value in attributes.items():
        setattr(member, name, value)
    return member


def changed_archive(path: Path, content: bytes, old: bytes, new: bytes) -> Path:
    """A zip of a.jpg with `content`, and in its directory, not before the file, `new` in place of `old`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", content)
    head, separator, directory = path.read_bytes().partition(b"PK\1\2")
    assert directory.count(old) == 1
    path.write_bytes(head + separator + directory.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"a.jpg", b"a\\jpg", r"member 'a\\\\jpg' has a backslash or NUL in its name"),
        (b"a.jpg", b"a\0jpg", r"member 'a\\x00jpg' has a backslash or NUL in its name"),
        (
            (0o600 << 16).to_bytes(4, "little"),
            (0o120777 << 16).to_bytes(4, "little"),
            "member 'a.jpg' is a symbolic link",
        ),
        (b"\x14\0\0\0\x08\0", b"\x14\0\1\0\x08\0", "member 'a.jpg' is encrypted"),
        (b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x0e\0", r"member 'a.jpg' is packed by method 14, and stored and deflated"),
    ],
)
def test_a_member_that_no_honest_archive_has_is_refused(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    with pytest.raises(ArchiveError, match=rf"x\.zip: {words}.*; refused"):
        ImageArchive(changed_archive(tmp_path / "x.zip", b"picture", old, new))


def bomb(path: Path, *sizes: int) -> Path:
    """Zeros, deflated to about a thousandth."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, size in enumerate(sizes):
            archive.writestr(f"{number}.jpg", bytes(size))
    return path


def test_a_bomb_by_its_ratio_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"member '1\.jpg' unpacks from [\d,]+ to 1,048,577 bytes, over 200 times"):
        ImageArchive(bomb(tmp_path / "x.zip", 1 << 20, (1 << 20) + 1))
    with ImageArchive(bomb(tmp_path / "y.zip", 1 << 20)) as archive:
        assert archive.read("0.jpg") == bytes(1 << 20)


def test_a_bomb_of_many_small_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert zip_safety.TOTAL_FROM == 64 << 20
    monkeypatch.setattr(zip_safety, "TOTAL_FROM", 4 << 20)
    with pytest.raises(ArchiveError, match=r"its 5 members unpack to 5,242,880 bytes, over 20 times the archive's"):
        ImageArchive(bomb(tmp_path / "x.zip", *[1 << 20] * 5))
    ImageArchive(bomb(tmp_path / "y.zip", *[1 << 20] * 4)).close()


def test_a_member_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    old, new = (7).to_bytes(4, "little") + b"\5\0", ((512 << 20) + 1).to_bytes(4, "little") + b"\5\0"
    with pytest.raises(ArchiveError, match=r"member 'a\.jpg' unpacks to 536,870,913 bytes, over 536,870,912; refused"):
        ImageArchive(changed_archive(tmp_path / "x.zip", b"picture", old, new))


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "x.zip", "a.jpg", "b.jpg")
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("b.jpg").header_offset
    content = path.read_bytes()
    path.write_bytes(content.replace(offset.to_bytes(4, "little") + b"b.jpg", bytes(4) + b"b.jpg"))
    with pytest.raises(ArchiveError, match=r"members 'a\.jpg' and 'b\.jpg' overlap; refused"):
        ImageArchive(path)


def test_a_disk_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with ImageArchive(archive_of(tmp_path / "x.zip", "a.jpg")) as archive:
        monkeypatch.setattr(os, "pread", fail)
        monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
        with pytest.raises(ArchiveError, match=r"x\.zip: a\.jpg: cannot be read: .*Input/output error"):
            archive.read("a.jpg")


@pytest.mark.parametrize("offset", [1000, 0xFFFFFFFE])
def test_a_member_beyond_the_end_is_refused(tmp_path: Path, offset: int) -> None:
    old, new = bytes(4) + b"a.jpg", offset.to_bytes(4, "little") + b"a.jpg"
    with pytest.raises(ArchiveError, match=r"x\.zip: member 'a\.jpg' lies outside of it; refused"):
        ImageArchive(changed_archive(tmp_path / "x.zip", b"picture", old, new))


def test_a_member_without_a_name_is_no_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as written:
        written.writestr(zipfile.ZipInfo(""), b"picture")
    with ImageArchive(tmp_path / "x.zip") as archive:
        assert archive.names == [""]


def test_coco_s_own_archives_are_within_the_limits() -> None:
    def member(name: str, packed: int, unpacked: int, offset: int) -> zipfile.ZipInfo:
        return changed(zipfile.ZipInfo(name), compress_size=packed, file_size=unpacked, header_offset=offset)

    json_mib = {"instances_train": 448, "person_keypoints_train": 228, "captions_train": 88}
    json_mib |= {"instances_val": 20, "person_keypoints_val": 10, "captions_val": 4}
    members, offset = [], 0
    for name, size in json_mib.items():
        packed = int(size * 1048576 * 0.3)
        members.append(member(f"annotations/{name}2017.json", packed, size << 20, offset))
        offset += packed + 100
    assert 240e6 < offset < 260e6
    assert zip_safety.fault(members, offset) is None
    pictures = [member(f"train2017/{n:012}.jpg", 163_000, 163_000, n * 163_100) for n in range(1000)]
    assert zip_safety.fault(pictures, 163_100_000) is None


@pytest.mark.parametrize("declared", [6, 8])
def test_a_size_that_is_not_the_member_s_is_named(tmp_path: Path, declared: int) -> None:
    old, new = (size.to_bytes(4, "little") + b"\5\0" for size in (7, declared))
    with ImageArchive(changed_archive(tmp_path / "x.zip", b"picture", old, new)) as archive:
        with pytest.raises(ArchiveError, match=r"a\.jpg: (cannot be read: Bad CRC-32|has 7 bytes; the archive says 8)"):
            archive.read("a.jpg")
        with pytest.raises(ArchiveError, match=r"a\.jpg: (cannot be read: Bad CRC-32|has 7 bytes; the archive says 8)"):
            archive.check()


def test_no_more_is_unpacked_than_the_archive_says(tmp_path: Path) -> None:
    old, new = ((size).to_bytes(4, "little") + b"\5\0" for size in (16 << 20, 1000))
    with ImageArchive(changed_archive(tmp_path / "x.zip", bytes(16 << 20), old, new)) as archive:
        tracemalloc.start()
        with pytest.raises(ArchiveError, match=r"a\.jpg: cannot be read: Bad CRC-32"):
            archive.read("a.jpg")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # bytes
        tracemalloc.stop()


def test_check_reads_every_member(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(5)]
    path = archive_of(tmp_path / "x.zip", *names)
    with ImageArchive(path) as archive:
        archive.check()
    path.write_bytes(path.read_bytes().replace(b"bytes of 4", b"bytes of 5"))
    with (
        ImageArchive(path) as archive,
        pytest.raises(ArchiveError, match=r"x\.zip: 4\.jpg: cannot be read: Bad CRC-32"),
    ):
        archive.check()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_repeated_member_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"member 'a\.jpg' is there more than once; refused"):
        ImageArchive(archive_of(tmp_path / "x.zip", "b.jpg", "a.jpg", "a.jpg"))


def test_what_is_no_zip_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"<html>")
    with pytest.raises(ArchiveError, match=r"x\.zip: not a zip archive"):
        ImageArchive(tmp_path / "x.zip")
    with pytest.raises(ArchiveError, match=r"y\.zip: image archive not found"):
        ImageArchive(tmp_path / "y.zip")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_named(tmp_path: Path, compression: int) -> None:
    path = archive_of(tmp_path / "x.zip", "a.jpg", compression=compression)
    damaged = bytearray(path.read_bytes())
    damaged[30 + len("a.jpg") + 3] ^= 0xFF  # a local header has 30 bytes and the name
    path.write_bytes(damaged)
    with ImageArchive(path) as archive, pytest.raises(ArchiveError, match=r"x\.zip: a\.jpg: cannot be read"):
        archive.read("a.jpg")


def test_a_pickled_archive_opens_its_file_anew(tmp_path: Path) -> None:
    archive = ImageArchive(archive_of(tmp_path / "x.zip", "a.jpg"))
    with archive, ProcessPoolExecutor(1) as pool:
        assert pool.submit(read_in_worker, archive, "a.jpg").result() == b"bytes of a.jpg"
        assert pickle.loads(pickle.dumps(archive)).names == ["a.jpg"]


def test_members_beyond_4_gib_of_offset_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with path.open("wb") as file:
        file.seek(5 << 30)  # a hole, not bytes on disk: the offsets need zip64
        with zipfile.ZipFile(file, "a") as archive:
            add_member(archive, "train/a.jpg", b"far away")
    with ImageArchive(path) as archive:
        assert archive.read("a.jpg") == b"far away"


def test_add_member_gives_the_same_bytes_at_any_time(tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            add_member(archive, "a.jpg", b"x" * 100)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert zipfile.ZipFile(tmp_path / "one.zip").getinfo("a.jpg").date_time == (1980, 1, 1, 0, 0, 0)


def test_stored_members_are_read_from_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands before them; the local header may be longer than the directory says."""
    path = tmp_path / "a.zip"
    contents = {"plain": b"a" * 99, "zip64": b"b" * 98, "ünicode": b"c" * 97, "empty": b"", "packed": b"d" * 96}
    path.write_bytes(b"#!/bin/sh\n")  # a self-extracting archive begins so
    with zipfile.ZipFile(path, "a") as archive:
        for name, content in contents.items():
            kind = zipfile.ZIP_DEFLATED if name == "packed" else zipfile.ZIP_STORED
            member = zipfile.ZipInfo(name)
            member.compress_type = kind
            member.extra = b"\xfe\xca\x02\x00zz"
            with archive.open(member, "w", force_zip64=name == "zip64") as file:
                file.write(content)
    streamed = []
    stream = ImageArchive._chunks
    monkeypatch.setattr(ImageArchive, "_chunks", lambda self, *given: streamed.append(given) or stream(self, *given))
    with ImageArchive(path) as images:
        assert {name: images.read(name) for name in contents} == contents
    assert [member.filename for member, _ in streamed] == ["packed"]
