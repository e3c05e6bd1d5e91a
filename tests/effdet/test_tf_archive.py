"""Archives that are not what they should be: nothing is written outside of the temporary folder, and it is gone."""

import gzip
import io
import resource
import tarfile
import tempfile

import numpy as np
import pytest

from effdet import tf_archive
from effdet.errors import EffdetError
from effdet.tf_archive import unpacked
from tests.effdet.published_files import write_archive, write_checkpoint, write_members

RAW = {"class_net/class-0/bias": np.random.default_rng(1).standard_normal(20_000).astype(np.float32)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for the test; temporary folders are made below it, where `left` sees them."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def left(place):
    return list((place / "temporary").iterdir())


def good(place):
    """The members of a good archive."""
    write_checkpoint(place / "d0" / "model", RAW)
    return [(tarfile.TarInfo(f"d0/{path.name}"), path.read_bytes()) for path in sorted((place / "d0").iterdir())]


def refused(place, path, words):
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    with pytest.raises(EffdetError, match=words), unpacked(path):
        pytest.fail("it was unpacked")
    assert left(place) == []
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before


def test_the_checkpoint_alone_is_unpacked_and_gone_afterwards(place):
    write_checkpoint(place / "d0" / "model", RAW)
    (place / "d0" / "model.meta").write_text("a graph")
    (place / "d0" / "notes.txt").write_text("hello")
    with unpacked(write_archive(place / "d0.tar.gz", place / "d0")) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [
            "checkpoint",
            "model.data-00000-of-00001",
            "model.index",
        ]
        assert (folder / "model.index").read_bytes() == (place / "d0" / "model.index").read_bytes()
        assert left(place) == [folder]
    assert left(place) == []


@pytest.mark.parametrize("name", ["../evil.index", "d0/../../evil.index", "d0/.."])
def test_traversal(place, name):
    archive = write_members(place / "a.tar.gz", *good(place), (tarfile.TarInfo(name), b"x"))
    refused(place, archive, "leads out of the folder")


def test_absolute(place):
    evil = place / "evil.index"
    archive = write_members(place / "a.tar.gz", *good(place), (tarfile.TarInfo(str(evil)), b"x"))
    refused(place, archive, "leads out of the folder")
    assert not evil.exists()


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("symlink", tarfile.SYMTYPE),
        ("hardlink", tarfile.LNKTYPE),
        ("character device", tarfile.CHRTYPE),
        ("block device", tarfile.BLKTYPE),
        ("pipe", tarfile.FIFOTYPE),
        ("sparse", tarfile.GNUTYPE_SPARSE),
        ("of a kind that nobody knows", b"Z"),
    ],
)
def test_links_and_devices(place, kind, what):
    member = tarfile.TarInfo("d0/model2.index")
    member.type, member.linkname = what, "/etc/passwd"
    archive = write_members(place / "a.tar.gz", *good(place), (member, b""))
    refused(place, archive, r"'d0/model2\.index' is no plain file")


@pytest.mark.parametrize("name", ["d0/model.index", "./d0/model.index", "d0//model.index"])
def test_duplicate(place, name):
    archive = write_members(place / "a.tar.gz", *good(place), (tarfile.TarInfo(name), b"x"))
    refused(place, archive, "is there twice")


def test_bomb(place):
    big = tarfile.TarInfo("d0/model.data-00001-of-00002")
    archive = write_members(place / "a.tar.gz", *good(place), (big, bytes(30 << 20)))
    assert archive.stat().st_size < 1 << 20
    refused(place, archive, "unpacks to more than .* bytes")


def test_bomb_after_the_last_member(place):
    archive = place / "a.tar.gz"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for member, data in good(place):
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    archive.write_bytes(gzip.compress(content.getvalue() + bytes(30 << 20)))
    refused(place, archive, "unpacks to more than .* bytes")


def test_bomb_in_a_header(place):
    member = tarfile.TarInfo("d0/model2.index")
    member.pax_headers = {"comment": "x" * (30 << 20)}
    archive = place / "a.tar.gz"
    with tarfile.open(archive, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member)
    refused(place, archive, "unpacks to more than .* bytes")


def test_more_than_the_absolute_limit(place, monkeypatch):
    archive = write_members(place / "a.tar.gz", *good(place))
    monkeypatch.setattr(tf_archive, "MAX_BYTES", 10_000)
    refused(place, archive, "unpacks to more than 10000 bytes")


def test_too_many_members(place):
    members = [(tarfile.TarInfo(f"d0/{number}"), b"") for number in range(200)]
    refused(place, write_members(place / "a.tar.gz", *good(place), *members), "more than 100 members")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_cut_short(place, part):
    archive = write_members(place / "a.tar.gz", *good(place))
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * part)])
    refused(place, archive, "cannot be read as .tar.gz|expected one folder")


def test_cut_short_by_its_checksum(place):
    archive = write_members(place / "a.tar.gz", *good(place))
    archive.write_bytes(archive.read_bytes()[:-8])
    refused(place, archive, "cannot be read as .tar.gz")


def test_tar_cut_short_within_a_whole_gz(place):
    content = gzip.decompress(write_members(place / "a.tar.gz", *good(place)).read_bytes())
    (place / "a.tar.gz").write_bytes(gzip.compress(content[:40_000]))
    refused(place, place / "a.tar.gz", "cannot be read as .tar.gz|is cut short")


def test_a_flipped_bit(place):
    archive = write_members(place / "a.tar.gz", *good(place))
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 16
    archive.write_bytes(content)
    refused(place, archive, "cannot be read as .tar.gz")


def test_a_disk_that_takes_no_more_is_not_the_archives_fault(place):
    """A limit of this process stands for the full disk."""
    archive = write_members(place / "a.tar.gz", *good(place))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, unpacked(archive):
            pytest.fail("it was unpacked")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename.startswith(str(place / "temporary"))
    assert left(place) == []


def test_no_checkpoint_and_two(place):
    refused(place, write_members(place / "a.tar.gz", (tarfile.TarInfo("x.txt"), b"x")), r"expected one folder .*\[\]")
    two = [*good(place), (tarfile.TarInfo("d1/model.index"), b"x")]
    refused(place, write_members(place / "a.tar.gz", *two), r"expected one folder .*\['d0', 'd1'\]")
