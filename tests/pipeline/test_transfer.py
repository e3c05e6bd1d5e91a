"""Files from a web server on loopback and from folders: whole and verified, or not at all."""

import hashlib
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import http_transfer, transfer
from pipeline.coco import ImageArchive
from pipeline.errors import PipelineError
from pipeline.http_transfer import TransferError
from pipeline.transfer import SourceFile
from tests.pipeline.misbehaving_server import Fault, running

FILE = SourceFile("a b.zip", ("a b.zip",))
CONTENT = bytes(range(256)) * 9000  # 2.2 MiB: three chunks
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
FOLDER = SourceFile("pictures", ("pictures",), is_folder=True)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_transfer, "PAUSE", 0.001)


@pytest.fixture
def offered(tmp_path: Path) -> Path:
    folder = tmp_path / "offered"
    folder.mkdir()
    (folder / FILE.name).write_bytes(CONTENT)
    return folder


def dead_address() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def assert_nothing_written(folder: Path) -> None:
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("kind", ["http", "http/", "file", "folder"])
def test_every_kind_of_base(offered: Path, tmp_path: Path, serve: Callable[[Path], Any], kind: str) -> None:
    base = {"file": offered.as_uri(), "folder": str(offered)}.get(kind) or serve(offered).url + kind[4:]
    target = tmp_path / "here" / "x.zip"
    transfer.fetch([base], FILE, target, CHECKSUM)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert transfer.checksum([base], FILE, "sha256") == CHECKSUM
    assert transfer.checksum([base], FILE, "md5") == f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    assert transfer.is_present(target, FILE, CHECKSUM)


def test_a_file_is_present_only_with_the_right_bytes(tmp_path: Path) -> None:
    assert not transfer.is_present(tmp_path / "x.zip", FILE, CHECKSUM)
    (tmp_path / "x.zip").write_bytes(CONTENT[:-1])
    assert not transfer.is_present(tmp_path / "x.zip", FILE, CHECKSUM)


def test_other_bytes_are_refused(offered: Path, tmp_path: Path, serve: Callable[[Path], Any]) -> None:
    server = serve(offered)
    (offered / FILE.name).write_bytes(b"other")
    with pytest.raises(TransferError) as error:
        transfer.fetch([server.url], FILE, tmp_path / "here" / "x.zip", CHECKSUM)
    got = hashlib.sha256(b"other").hexdigest()
    assert f"{server.url}/a%20b.zip: checksum differs" in str(error.value)
    assert f"data.checksums.a b.zip is {CHECKSUM}, got sha256:{got}" in str(error.value)
    assert "`python -m pipeline.checksums`" in str(error.value)
    assert_nothing_written(tmp_path / "here")


def test_what_is_there_stays_when_the_new_bytes_are_wrong(offered: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    target.write_bytes(b"before")
    (offered / FILE.name).write_bytes(b"other")
    with pytest.raises(TransferError):
        transfer.fetch([str(offered)], FILE, target, CHECKSUM)
    assert target.read_bytes() == b"before"


def test_a_body_that_breaks_off_is_refused(offered: Path, tmp_path: Path, serve: Callable[[Path], Any]) -> None:
    server = serve(offered)
    server.faults["/a%20b.zip"] = ["short"] * 4
    with pytest.raises(TransferError, match=r"a%20b\.zip: broke off: .*; given up after 4 beginnings"):
        transfer.fetch([server.url], FILE, tmp_path / "here" / "x.zip", CHECKSUM)
    assert_nothing_written(tmp_path / "here")


def test_a_busy_server_is_asked_again(offered: Path, tmp_path: Path, serve: Callable[[Path], Any]) -> None:
    server = serve(offered)
    server.faults["/a%20b.zip"] = ["503", "500"]
    transfer.fetch([server.url], FILE, tmp_path / "x.zip", CHECKSUM)
    assert server.asked == ["/a%20b.zip"] * 3


def test_a_server_that_stays_busy_is_named(offered: Path, tmp_path: Path, serve: Callable[[Path], Any]) -> None:
    server = serve(offered)
    server.faults["/a%20b.zip"] = ["503"] * 9
    with pytest.raises(TransferError, match=r"a%20b\.zip: the server answers 503 Service Unavailable \(6 tries\)$"):
        transfer.fetch([server.url], FILE, tmp_path / "x.zip", CHECKSUM)
    assert len(server.asked) == 6


def test_places_below_a_base_then_the_next_base(offered: Path, tmp_path: Path, serve: Callable[[Path], Any]) -> None:
    file = SourceFile("x.zip", ("zips/x.zip", "x.zip"))
    (tmp_path / "empty").mkdir()
    (offered / "x.zip").write_bytes(CONTENT)
    empty, good, unasked = serve(tmp_path / "empty"), serve(offered), serve(offered)
    bases = [dead_address(), str(tmp_path / "none"), empty.url, good.url, unasked.url]
    transfer.fetch(bases, file, tmp_path / "y.zip", CHECKSUM)
    assert empty.asked == good.asked == ["/zips/x.zip", "/x.zip"]
    assert unasked.asked == []


def test_a_base_with_wrong_bytes_is_passed_over(offered: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / FILE.name).write_bytes(b"other")
    transfer.fetch([str(tmp_path / "wrong"), str(offered)], FILE, tmp_path / "x.zip", CHECKSUM)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT


def test_every_attempt_is_told(offered: Path, tmp_path: Path, serve: Callable[[Path], Any]) -> None:
    server = serve(offered)
    dead = dead_address()
    with pytest.raises(TransferError) as error:
        transfer.fetch([dead, server.url, "none"], SourceFile("b", ("b", "c")), tmp_path / "x.zip", CHECKSUM)
    lines = str(error.value).splitlines()
    assert lines[0] == "b could not be had:"
    assert lines[1].startswith(f"- {dead}/b: no answer: ")
    assert lines[2:] == [
        f"- {server.url}/b: the server answers 404 File not found",
        f"- {server.url}/c: the server answers 404 File not found",
        "- none: no such folder",
    ]


@pytest.mark.parametrize("base", ["ftp://host/x", "s3://bucket", "file://host/x"])
def test_an_address_that_is_not_understood_is_named(tmp_path: Path, base: str) -> None:
    with pytest.raises(TransferError, match=base):
        transfer.fetch([base], FILE, tmp_path / "x.zip", CHECKSUM)


def test_a_full_disk_is_told_before_the_first_byte(
    offered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PipelineError, match=r"has 2,304,000 bytes, 1,000,000 are free in .*here; make room there"):
        transfer.fetch([str(offered)], FILE, tmp_path / "here" / "x.zip", CHECKSUM)
    assert_nothing_written(tmp_path / "here")


def test_a_full_disk_is_told_before_a_folder_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(bytes(5000))
    usage = shutil.disk_usage(tmp_path)._replace(free=4999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PipelineError, match=r"pictures: has 5,000 bytes, 4,999 are free in .*here; make room there"):
        transfer.fetch([str(tmp_path)], FOLDER, tmp_path / "here" / "x.zip", None)
    assert_nothing_written(tmp_path / "here")


def test_a_full_disk_is_told_when_it_fills_up(offered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(transfer, "check_room", lambda *_: None)
    monkeypatch.setattr("pipeline.files.os.getpid", lambda: "full")
    (tmp_path / "here" / ".x.zip.full.part").symlink_to("/dev/full")
    with pytest.raises(PipelineError, match=r"a b\.zip: the disk filled up; make room and run it again"):
        transfer.fetch([str(offered)], FILE, tmp_path / "here" / "x.zip", CHECKSUM)
    assert_nothing_written(tmp_path / "here")


# What is begun, and goes on


def test_a_mirror_that_fails_midway_is_finished_by_the_next(
    offered: Path, tmp_path: Path, serve: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_transfer, "CONNECTIONS", 1)
    with running(CONTENT) as first, running(CONTENT, etag='"other"') as second:
        first.faults, first.always = [Fault(stop_after=1_000_000)], Fault(500)
        transfer.fetch([first.url, second.url], FILE, tmp_path / "x.zip", CHECKSUM)
        assert second.sent == [(1_000_000, len(CONTENT))]
    assert (tmp_path / "x.zip").read_bytes() == CONTENT


def begin(content: bytes, target: Path) -> None:
    """Fetches the first 1,000,000 bytes of what another server has."""
    with running(content) as server:
        server.faults, server.always = [Fault(stop_after=1_000_000)], Fault(500)
        with pytest.raises(TransferError):
            transfer.fetch([server.url], FILE, target, CHECKSUM)


@pytest.mark.parametrize("expected", [CHECKSUM, None])
@pytest.mark.parametrize("page", [b"please log in", None])
def test_a_part_outlives_a_mirror_that_has_something_else(
    tmp_path: Path, expected: str | None, page: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_transfer, "CONNECTIONS", 1)
    target = tmp_path / "x.zip"
    file = SourceFile("x.bin", ("x.bin",))
    with running(page or CONTENT, ranges=False) as mirror, running(CONTENT) as server:
        server.faults, server.always = [Fault(stop_after=1_000_000)], Fault(500)
        with pytest.raises(TransferError):
            transfer.fetch([server.url], file, target, expected)
        server.always = None
        transfer.fetch([mirror.url, server.url], file, target, expected)
        assert server.sent[-1] == (1_000_000, len(CONTENT))
    assert target.read_bytes() == CONTENT


def test_a_part_that_no_server_goes_on_with_is_fetched_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(CONTENT, tmp_path / "x.zip")
    with running(CONTENT, ranges=False) as server:
        transfer.fetch([server.url], FILE, tmp_path / "x.zip", CHECKSUM)
        assert server.sent[-1] == (0, len(CONTENT))
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert "no server goes on with what is here; all of it is fetched anew" in capsys.readouterr().out


def test_a_part_that_proves_wrong_is_fetched_once_more_from_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(bytes(len(CONTENT)), tmp_path / "x.zip")
    with running(CONTENT) as server:
        transfer.fetch([server.url], FILE, tmp_path / "x.zip", CHECKSUM)
        assert server.sent == [(1_000_000, len(CONTENT)), (0, len(CONTENT))]
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    said = capsys.readouterr().out
    assert "a%20b.zip: checksum differs" in said
    assert "some of these bytes came in an earlier run; all of it is fetched anew" in said


def test_a_file_that_is_wrong_at_both_tries_is_refused(tmp_path: Path) -> None:
    begin(CONTENT, tmp_path / "here" / "x.zip")
    with running(bytes(len(CONTENT))) as server:
        with pytest.raises(TransferError, match="checksum differs"):
            transfer.fetch([server.url], FILE, tmp_path / "here" / "x.zip", CHECKSUM)
        assert len(server.sent) == 2
    assert_nothing_written(tmp_path / "here")


# Files whose checksum is not known


@pytest.mark.parametrize("kind", ["http", "folder"])
def test_without_a_checksum_the_members_of_a_zip_are_checked(
    offered: Path, tmp_path: Path, serve: Callable[[Path], Any], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    with zipfile.ZipFile(offered / FILE.name, "w") as archive:
        archive.writestr("a.jpg", b"picture")
        archive.writestr("b.jpg", b"picture")
    base = str(offered) if kind == "folder" else serve(offered).url
    content = (offered / FILE.name).read_bytes()
    found = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert transfer.fetch([base], FILE, tmp_path / "here" / "x.zip", None) == found
    assert f"a b.zip: data.checksums does not say what it must be; it is {found}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "here")
    (offered / FILE.name).write_bytes(content[::-1].replace(b"erutcip", b"erutciP", 1)[::-1])  # of b.jpg
    with pytest.raises(TransferError, match=r"a(%20| )b\.zip: .*\.part: b\.jpg: cannot be read: Bad CRC-32"):
        transfer.fetch([base], FILE, tmp_path / "here" / "x.zip", None)
    (offered / FILE.name).write_bytes(content[:-30])  # a Content-Length too small
    with pytest.raises(TransferError, match=r"a(%20| )b\.zip: .*\.part: not a zip archive"):
        transfer.fetch([base], FILE, tmp_path / "here" / "x.zip", None)
    assert_nothing_written(tmp_path / "here")


# Folders of images


def test_a_folder_becomes_the_same_archive_whatever_its_dates(tmp_path: Path) -> None:
    for base, names in (("one", ["b.jpg", "sub/a.jpg"]), ("two", ["sub/a.jpg", "b.jpg"])):
        for name in names:
            path = tmp_path / base / "pictures" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
    (tmp_path / "two" / "pictures" / ".hidden").write_bytes(b"of some file manager")
    # b.jpg, then sub/a.jpg: sha256 of each, a space, its name
    lines = "".join(f"{hashlib.sha256(name.encode()).hexdigest()} {name}\n" for name in ("b.jpg", "sub/a.jpg"))
    expected = f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    for base in ("one", "two"):
        assert transfer.checksum([str(tmp_path / base)], FOLDER, "sha256") == expected
        transfer.fetch([str(tmp_path / base)], FOLDER, tmp_path / f"{base}.zip", expected)
        assert transfer.is_present(tmp_path / f"{base}.zip", FOLDER, expected)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with ImageArchive(tmp_path / "one.zip") as archive:
        assert archive.read("sub/a.jpg") == b"sub/a.jpg"
        assert archive.member("b.jpg").compress_type == zipfile.ZIP_STORED


def test_a_changed_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"1")
    before = transfer.checksum([str(tmp_path)], FOLDER, "sha256")
    (tmp_path / "pictures" / "a.jpg").rename(tmp_path / "pictures" / "b.jpg")
    with pytest.raises(TransferError, match=r"pictures: checksum differs: .*data\.checksums\.pictures is"):
        transfer.fetch([str(tmp_path)], FOLDER, tmp_path / "here" / "x.zip", before)
    assert_nothing_written(tmp_path / "here")


def test_a_file_name_that_no_archive_can_hold_is_named(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / os.fsdecode(b"\xff.jpg")).write_bytes(b"1")
    with pytest.raises(TransferError, match=r"pictures: the file name '\\udcff\.jpg' is not UTF-8; rename it"):
        transfer.fetch([str(tmp_path)], FOLDER, tmp_path / "here" / "x.zip", None)
    assert_nothing_written(tmp_path / "here")


def test_a_folder_over_http_or_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"'pictures' is not a \.zip, and a folder of images cannot be read over"):
        transfer.fetch(["http://127.0.0.1:1"], FOLDER, tmp_path / "x.zip", CHECKSUM)
    with pytest.raises(TransferError, match=r"pictures: no such folder \(images are a folder, or an archive"):
        transfer.fetch([str(tmp_path)], FOLDER, tmp_path / "x.zip", CHECKSUM)
