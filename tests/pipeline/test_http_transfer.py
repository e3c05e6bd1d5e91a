"""Files from a web server that misbehaves: what is had in the end, what is asked for again, and what is said."""

import contextlib
import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests

from pipeline import http_transfer
from pipeline.errors import PipelineError
from pipeline.http_transfer import TransferError, UnreachableError
from pipeline.part_file import PartFile
from tests.pipeline.misbehaving_server import Fault, Server, running

SIZE = 1_000_003  # bytes: eight segments, the last one shorter
SEGMENT = 1 << 17
CONTENT = np.random.default_rng(0).bytes(SIZE)
OTHER = np.random.default_rng(1).bytes(SIZE)
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
BREAK = Fault(stop_after=50_000)


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_transfer, "SEGMENT", SEGMENT)
    monkeypatch.setattr(http_transfer, "PAUSE", 0.001)
    monkeypatch.setattr(http_transfer, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    with running(CONTENT) as started:
        yield started


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "here" / "x.zip"


def fetch(server: Server, target: Path, expected: str | None = CHECKSUM) -> str:
    with PartFile(target) as part:
        got = http_transfer.fetch(f"{server.url}/x.zip", part, expected, "x.zip", spare=False)
        part.finish(target)
    return got


def begun(server: Server, target: Path, expected: str | None = CHECKSUM) -> int:
    """Fetches until the server does not answer any more; bytes on disk then."""
    server.faults = [Fault(stop_after=30_000 + 10_000 * number) for number in range(http_transfer.CONNECTIONS)]
    server.always = Fault(503)
    with pytest.raises(TransferError, match="503"):
        fetch(server, target, expected)
    assert not target.exists()
    server.always = None
    with PartFile(target) as part:
        return part.here


def assert_each_byte_once(server: Server) -> None:
    spans = sorted(span for span in server.sent if span[0] < span[1])
    assert [0, *[end for _, end in spans]] == [*[first for first, _ in spans], SIZE]


# What goes well


def test_several_connections_bring_each_byte_once(server: Server, target: Path) -> None:
    assert fetch(server, target) == CHECKSUM
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert_each_byte_once(server)
    assert len(server.asked) == 8  # segments
    assert {headers.get("If-Range") for headers in server.asked[1:]} == {'"one"'}


def test_md5_and_a_small_file_in_one_request(target: Path) -> None:
    with running(b"abc") as server:
        got = fetch(server, target, "md5:900150983cd24fb0d6963f7d28e17f72")  # of RFC 1321
        assert got == "md5:900150983cd24fb0d6963f7d28e17f72"
        assert len(server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file(target: Path, ranges: bool) -> None:
    with running(b"", ranges=ranges) as server:
        server.always = Fault(whole=True)
        assert fetch(server, target, None) == f"sha256:{hashlib.sha256(b'').hexdigest()}"
    assert list(target.parent.iterdir()) == [target]


def test_checksum_keeps_nothing_and_goes_on_after_breaks(server: Server, tmp_path: Path) -> None:
    server.faults = [BREAK, Fault(503), BREAK]
    got = http_transfer.checksum(f"{server.url}/x.zip", "md5", "x.zip")
    assert got == f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    assert_each_byte_once(server)
    assert list(tmp_path.iterdir()) == []


def test_checksum_of_a_server_without_ranges_begins_anew(server: Server) -> None:
    server.ranges, server.faults = False, [BREAK]
    assert http_transfer.checksum(f"{server.url}/x.zip", "sha256", "x.zip") == CHECKSUM


def test_silent_where_standard_error_is_no_terminal(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(server, target)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_what_is_here_rate_and_time_left(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = begun(server, target)
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        fetch(server, target)
        monkeypatch.undo()
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's other end is closed, and all is read
        while True:
            shown += os.read(leader, 1 << 16)
    os.close(leader)
    first, *_, last = re.findall(r"x\.zip: [^\r]*", shown.decode())
    assert here == 180_000
    assert re.search(r"18%.* 180k/1\.00M \[00:00<\?, \?B/s\]", first)
    assert re.search(r"100%.* 1\.00M/1\.00M \[00:0\d<00:00, .*MB/s\]", last)


# Interruptions


def test_kill_9_costs_no_byte_that_was_written(server: Server, target: Path) -> None:
    server.always = Fault(stop_after=40_000, then="stall")
    program = (
        "import sys; from pathlib import Path; from pipeline import http_transfer as h, part_file as p\n"
        f"h.SEGMENT = {SEGMENT}\n"
        "h.fetch(sys.argv[1], p.PartFile(Path(sys.argv[2])), sys.argv[3], 'x.zip', False)"
    )
    command = [sys.executable, "-c", program, f"{server.url}/x.zip", str(target), CHECKSUM]
    with subprocess.Popen(command) as process:
        journal = target.with_name(".x.zip.part.state")
        expected = http_transfer.CONNECTIONS * 40_000
        written = 0
        while written < expected:
            assert process.poll() is None
            time.sleep(0.01)
            with contextlib.suppress(FileNotFoundError):
                runs = [line.split() for line in journal.read_text().splitlines()[1:]]
                written = sum(int(end) - int(start) for start, end in runs)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    server.always = None
    assert fetch(server, target) == CHECKSUM
    assert target.read_bytes() == CONTENT
    assert_each_byte_once(server)


def test_a_later_run_fetches_only_what_lacks(server: Server, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = begun(server, target)
    assert here == 30_000 + 40_000 + 50_000 + 60_000
    assert fetch(server, target) == CHECKSUM
    assert target.read_bytes() == CONTENT
    assert_each_byte_once(server)
    assert f"{server.url}/x.zip: {here:,} bytes of 1,000,003 are here, the rest follows" in capsys.readouterr().out


def test_a_part_that_is_whole_asks_for_nothing(server: Server, target: Path) -> None:
    with PartFile(target) as part:
        http_transfer.fetch(f"{server.url}/x.zip", part, CHECKSUM, "x.zip", spare=False)
    asked = len(server.asked)
    assert fetch(server, target) == CHECKSUM  # killed before it was renamed
    assert len(server.asked) == asked
    assert target.read_bytes() == CONTENT


def test_another_mirror_finishes_a_part_of_known_checksum(server: Server, target: Path) -> None:
    here = begun(server, target)
    with running(CONTENT, etag='"of another server"') as mirror:
        assert fetch(mirror, target) == CHECKSUM
        assert mirror.sent_bytes == SIZE - here


def test_another_mirror_begins_anew_without_a_checksum(server: Server, target: Path) -> None:
    begun(server, target, None)
    with running(CONTENT) as mirror:
        assert fetch(mirror, target, None) == CHECKSUM
        assert mirror.sent_bytes == SIZE


@pytest.mark.parametrize(
    ("validators", "again"),
    [
        ({"etag": '"one"'}, 0),
        ({"etag": 'W/"one"'}, 0),
        ({"modified": "Mon, 23 Nov 2026 10:00:00 GMT"}, 0),
        ({}, 180_000),
    ],
)
def test_without_checksum_the_same_file_is_gone_on_with(target: Path, validators: dict[str, str], again: int) -> None:
    with running(CONTENT, **{"etag": None, **validators}) as server:
        here = begun(server, target, None)
        assert here == 180_000
        assert fetch(server, target, None) == CHECKSUM
        assert server.sent_bytes == SIZE + again  # nothing shows that it is the same file: all of it


def test_a_part_of_another_checksum_is_thrown_away(server: Server, target: Path) -> None:
    begun(server, target, f"sha256:{64 * '0'}")
    before = server.sent_bytes
    fetch(server, target)
    assert server.sent_bytes - before == SIZE


def test_a_part_of_unknown_size_is_thrown_away(server: Server, target: Path) -> None:
    with PartFile(target) as part:
        part.begin({"checksum": CHECKSUM, "url": f"{server.url}/x.zip", "size": None, "validator": None})
        part.put(0, 0, bytes(SEGMENT))
    assert fetch(server, target) == CHECKSUM
    assert server.sent_bytes == SIZE


def test_two_processes_cannot_fetch_one_part(server: Server, target: Path) -> None:
    with PartFile(target), pytest.raises(PipelineError, match=r"\.x\.zip\.part: another process is fetching this file"):
        fetch(server, target)
    assert fetch(server, target) == CHECKSUM


# A file that changes


def test_a_date_that_was_compared_may_be_left_out(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(CONTENT, etag=None, modified="Mon, 23 Nov 2026 10:00:00 GMT") as server:
        server.faults, server.always = [None], Fault(headers={"Last-Modified": None})
        assert fetch(server, target) == CHECKSUM
        assert_each_byte_once(server)
    assert "changed" not in capsys.readouterr().out


def test_a_file_that_changed_between_two_runs(server: Server, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(server, target)
    server.etag, server.content = '"two"', OTHER
    expected = f"sha256:{hashlib.sha256(OTHER).hexdigest()}"
    assert fetch(server, target) == expected  # the caller refuses it
    assert target.read_bytes() == OTHER
    assert '180,000 bytes of 1,000,003 are here, "one"; now it is 1,000,003 bytes, "two"' in capsys.readouterr().out


def test_a_file_that_became_shorter_between_two_runs(server: Server, target: Path) -> None:
    begun(server, target)
    server.content = CONTENT[:100]  # 416 answers the question for the rest
    fetch(server, target)
    assert target.read_bytes() == CONTENT[:100]


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changes_while_it_is_fetched(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, if_range: bool
) -> None:
    monkeypatch.setattr(http_transfer, "CONNECTIONS", 1)
    changed = Fault(headers={"ETag": '"two"'}, whole=if_range)  # a 200 with all of it, or the wrong file's range
    server.faults = [None, None, changed]
    assert fetch(server, target) == CHECKSUM
    assert target.read_bytes() == CONTENT
    said = capsys.readouterr().out
    assert 'x.zip: the file changed meanwhile: it was 1,000,003 bytes, "one", in ranges; it is 1,000,003' in said
    assert "; all of it is fetched anew" in said


def test_a_file_that_changes_all_the_time_is_given_up(server: Server, target: Path) -> None:
    server.faults = [None, *[Fault(headers={"ETag": f'"{number}"'}) for number in range(100)]]
    with pytest.raises(TransferError, match=r"x\.zip: the file changed meanwhile: .*; given up after 4 beginnings"):
        fetch(server, target)
    assert list(target.parent.iterdir()) == []


# Servers that break off


@pytest.mark.parametrize("then", ["close", "reset"])
def test_short_reads_go_on_where_they_broke_off(server: Server, target: Path, then: str) -> None:
    server.faults = [Fault(stop_after=50_000, then=then)] * 12
    assert fetch(server, target) == CHECKSUM
    assert target.read_bytes() == CONTENT
    if then == "close":  # a reset drops what is under way
        assert_each_byte_once(server)


def test_a_server_that_stalls_is_asked_again(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_transfer, "TIMEOUT", (1, 0.1))
    server.faults = [None, Fault(stop_after=50_000, then="stall")]
    assert fetch(server, target) == CHECKSUM
    assert_each_byte_once(server)


def test_a_connection_that_stalls_does_not_hold_up_the_end(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_transfer, "TIMEOUT", (1, 3))
    server.faults, server.always = [Fault(stop_after=0, then="stall")], Fault(404)
    with pytest.raises(TransferError, match="the server answers 404"):
        fetch(server, target)
    waiting = [thread for thread in threading.enumerate() if "_work" in thread.name]
    assert len(waiting) == 1  # for its server, still
    server.go_on.set()
    waiting[0].join()


def test_tries_are_counted_anew_after_progress(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_transfer, "CONNECTIONS", 1)
    server.faults = [Fault(503), Fault(429), Fault(500), Fault(502), BREAK, Fault(504), Fault(408), *[BREAK] * 4]
    assert fetch(server, target) == CHECKSUM
    assert_each_byte_once(server)


def test_a_server_that_refuses_more_connections_than_one(server: Server, target: Path) -> None:
    server.faults = [None, *[Fault(429)] * (http_transfer.TRIES - 1)]
    assert fetch(server, target) == CHECKSUM
    assert_each_byte_once(server)


def test_a_server_that_serves_one_connection_at_a_time(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_transfer, "TIMEOUT", (1, 0.1))
    with running(CONTENT, one_at_a_time=True) as server:  # an idle connection of ours would block it
        assert fetch(server, target) == CHECKSUM
    assert target.read_bytes() == CONTENT


def test_a_server_that_stays_busy_is_given_up(server: Server, target: Path) -> None:
    server.always = Fault(503)
    with pytest.raises(
        TransferError, match=r"x\.zip: the server answers 503 Service Unavailable \(6 tries\)$"
    ) as error:
        fetch(server, target)
    assert type(error.value) is TransferError
    assert len(server.asked) == http_transfer.TRIES
    assert list(target.parent.iterdir()) == []


def test_no_server_at_all(server: Server, target: Path) -> None:
    with running(b"") as gone:
        pass
    with pytest.raises(UnreachableError, match=r"x\.zip: no answer: .*refused.* \(6 tries\)$"):
        fetch(gone, target)


def test_pauses_double_and_follow_the_server_up_to_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_transfer, "PAUSE", 1.0)
    monkeypatch.setattr(http_transfer, "LONGEST_PAUSE", 60.0)
    assert [http_transfer._pause(before) for before in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    answers = ["7", "0", "soon", "Mon, 23 Nov 2026 10:00:00 GMT", "99999"]  # the date is past
    answers += ["Mon, 23 Nov 99999 10:00:00 GMT", "9" * 5000]  # neither is one
    server.faults = [Fault(503, {"Retry-After": answer}) for answer in answers] + [Fault(503)]
    asked = [http_transfer._retry_after(requests.get(server.url, timeout=9)) for _ in range(8)]
    assert [http_transfer._pause(1, seconds) for seconds in asked] == [7, 2, 2, 2, 60, 2, 2, 2]


# Servers without ranges


def test_without_ranges_one_connection_is_enough(server: Server, target: Path) -> None:
    server.ranges = False
    assert fetch(server, target) == CHECKSUM
    assert len(server.asked) == 1


def test_without_ranges_a_break_begins_anew(server: Server, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.ranges, server.faults = False, [BREAK]
    assert fetch(server, target) == CHECKSUM
    assert "the server hands out no parts of a file; all of it is fetched anew" in capsys.readouterr().out


def test_without_ranges_breaks_are_given_up(server: Server, target: Path) -> None:
    server.ranges, server.always = False, BREAK
    with pytest.raises(TransferError, match=r"broke off.*hands out no parts of a file; given up after 4 beginnings"):
        fetch(server, target)
    assert list(target.parent.iterdir()) == []


def test_without_ranges_what_is_here_is_fetched_again(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(server, target)
    server.ranges = False
    assert fetch(server, target) == CHECKSUM
    assert "180,000 bytes are here, and the server hands out no parts of a file" in capsys.readouterr().out


def test_a_server_that_tells_no_size(server: Server, target: Path) -> None:
    server.ranges, server.always = False, Fault(chunked=True)
    server.faults = [Fault(chunked=True, stop_after=50_000)]  # a chunked body that breaks off is known to
    assert fetch(server, target) == CHECKSUM
    assert len(server.asked) == 2


# Servers that lie


@pytest.mark.parametrize("length", ["\xb2", "-1", "9" * 5000])
def test_a_content_length_that_is_none(server: Server, target: Path, length: str) -> None:
    server.ranges, server.always = False, Fault(headers={"Content-Length": length, "Connection": "close"})
    assert fetch(server, target) == CHECKSUM


def test_a_content_length_too_large(server: Server, target: Path) -> None:
    server.always = Fault(headers={"Content-Length": str(2 * SIZE), "Connection": "close"})
    assert fetch(server, target) == CHECKSUM  # in ranges, Content-Range tells what comes
    server.ranges = False
    with pytest.raises(TransferError, match=r"broke off.*; given up after 4 beginnings"):
        fetch(server, target.with_name("y.zip"))


def test_a_content_length_too_small(server: Server, target: Path) -> None:
    server.always = Fault(headers={"Content-Length": "1000", "Connection": "close"})
    server.content = CONTENT[:10_000]
    assert fetch(server, target) == f"sha256:{hashlib.sha256(CONTENT[:10_000]).hexdigest()}"
    server.ranges = False  # nothing tells: the checksum, or the zip's directory at its end, does
    assert fetch(server, target.with_name("y.zip")) == f"sha256:{hashlib.sha256(CONTENT[:1000]).hexdigest()}"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(shift=5), r"asked for bytes from 0 on, the server answers with Content-Range 'bytes 5-131071/1000003'"),
        (Fault(headers={"Content-Range": None}), "asked .*, the server answers with Content-Range None"),
        (
            Fault(headers={"Content-Range": "bytes 0-9/*"}),
            r"asked .*, the server answers with Content-Range 'bytes 0-9/\*'",
        ),
        (
            Fault(headers={"Content-Encoding": "gzip"}),
            "asked for the file as it is, the server sends it packed by gzip",
        ),
        (
            Fault(headers={"Content-Range": "bytes 0-131071/9999999999999999"}),
            r"asked .*, the server answers with Content-Range 'bytes 0-131071/9999999999999999'",
        ),
        (Fault(404), "the server answers 404 Not Found$"),
        (Fault(416), "the server answers 416 Requested Range Not Satisfiable$"),
        (Fault(302, {"Location": "file:///etc/passwd"}), "cannot be asked for: .*file:///etc/passwd"),
        (Fault(302, {"Location": "ftp://127.0.0.1/x.zip"}), "cannot be asked for: .*ftp://"),
        (Fault(302, {"Location": "http://[::1/x.zip"}), "cannot be asked for: Invalid IPv6 URL"),
        (Fault(302, {"Location": "/\xff.zip"}), "cannot be asked for: .*can't decode"),
        (Fault(302, {"Location": "/x.zip"}), "cannot be asked for: Exceeded 30 redirects"),
    ],
)
def test_an_answer_that_is_of_no_use_is_named(server: Server, target: Path, fault: Fault, words: str) -> None:
    server.always = fault
    with pytest.raises(TransferError, match=rf"^{server.url}/x\.zip: {words}"):
        fetch(server, target)
    assert list(target.parent.iterdir()) == []


def test_a_size_that_is_too_large_once(server: Server, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.content = CONTENT[:200_000]
    server.faults = [Fault(headers={"Content-Range": f"bytes 0-{SEGMENT - 1}/{SIZE}"})]
    fetch(server, target)
    assert target.read_bytes() == CONTENT[:200_000]
    assert "; all of it is fetched anew" in capsys.readouterr().out


def test_redirects_are_followed(server: Server, target: Path) -> None:
    with running(b"") as first:
        first.always = Fault(307, {"Location": f"{server.url}/elsewhere/y.zip"})
        assert fetch(first, target) == CHECKSUM
    assert {headers["path"] for headers in server.asked} == {"/elsewhere/y.zip"}
    assert_each_byte_once(server)


# Proxies, disks


def test_proxies_come_from_the_environment(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with PartFile(target) as part:
        http_transfer.fetch("http://data.invalid/x.zip", part, CHECKSUM, "x.zip", spare=False)
    assert {headers["path"] for headers in server.asked} == {"http://data.invalid/x.zip"}
    server.asked.clear()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running(CONTENT) as direct:
        fetch(direct, target.with_name("y.zip"))
    assert server.asked == []


def test_a_disk_without_room_is_told_before_the_first_byte(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = begun(server, target)
    before = server.sent_bytes
    usage = http_transfer.check_room.__globals__["shutil"].disk_usage(target.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=SIZE - here - 1))
    with pytest.raises(
        PipelineError, match=r"has 1,000,003 bytes, 180,000 of them are here, 820,002 are free in .*here"
    ):
        fetch(server, target)
    with PartFile(target) as part:
        assert part.here == here
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=SIZE - here))
    fetch(server, target)
    assert server.sent_bytes >= before + SIZE - here


def test_a_disk_that_fills_up_keeps_what_is_there(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = os.pwrite, [600_000]

    def full(descriptor: int, content: bytes, offset: int) -> int:
        room[0] -= len(content)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(PipelineError, match=r"\.x\.zip\.part: the disk filled up; make room and run it again"):
        fetch(server, target)
    monkeypatch.undo()
    assert fetch(server, target) == CHECKSUM
    assert target.read_bytes() == CONTENT
