"""A file from a web server (HTTP/1.1 ranges, RFC 9110 section 14): on from what is on disk, by several connections.

What a server does wrong is either asked for again from where it broke off, with growing pauses; or, where bytes of two
files might be mixed, all of the file is; or it ends in a TransferError that says what the server did.
"""

import contextlib
import hashlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from types import TracebackType
from typing import NoReturn, TypeVar

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from pipeline.errors import PipelineError
from pipeline.part_file import PartFile, check_room

CONNECTIONS = 4  # at once: where a connection is slow, more pass more; servers refuse many
SEGMENT = 16 << 20  # bytes a request: many round trips long, and few enough that the checksum follows closely
CHUNK = 1 << 18  # bytes, at most, that are read at a time
TIMEOUT = (10, 60)  # seconds to connect, and between two chunks
TRIES = 6  # in a row in which no connection brings anything
PAUSE = 1.0  # seconds before the second try; doubled before each further one
LONGEST_PAUSE = 60.0  # seconds, also where the server asks for more
LAST_WORD = 0.25  # seconds for a connection to end, where the file is not wanted any more; it may wait for its server
BEGINNINGS = 4  # times that a file is fetched from its start
SIZE = r"[0-9]{1,15}"  # more digits no file has, nor room in a part's journal
PASSING = (408, 429, 500, 502, 503, 504)  # answers that another try may better

Result = TypeVar("Result")


class TransferError(PipelineError):
    """A file that could not be had."""


class UnreachableError(TransferError):
    """A server or folder that answers nothing, whatever file it is asked for."""


class SparedError(TransferError):
    """A file that may be had, but not as the rest of a part that came from another address."""


class _BrokenError(Exception):
    """A try that failed; the next one may go on where it broke off."""

    def __init__(self, words: str, *, pause: float = 0.0, reached: bool = True) -> None:
        super().__init__(words)
        self.pause = pause  # seconds that the server asks for
        self.reached = reached  # the server


class _AnewError(Exception):
    """What has come is of no use: the file must be fetched from its start."""


@dataclass(frozen=True)
class _File:
    """What an answer tells of a file."""

    size: int | None  # bytes
    validator: str | None  # its ETag, or else when it was changed last
    in_ranges: bool  # whether parts of it can be had

    def __str__(self) -> str:
        size = "of unknown size" if self.size is None else f"{self.size:,} bytes"
        return f"{size}, {self.validator or 'no ETag'}, {'in' if self.in_ranges else 'not in'} ranges"


def fetch(url: str, part: PartFile, expected: str | None, label: str, spare: bool) -> str:
    """Makes the part whole; its checksum, in the algorithm of `expected` ("algorithm:hex"), or of sha256.

    A part that was begun for the same checksum is continued wherever the file has the same size; one without checksum
    only from the same address, and where the server shows that the file is the same. With `spare` a part of another
    address that cannot be continued here stays: SparedError.
    """

    def attempt() -> str:
        if part.here and not _may_be_same(part.of, url, expected):
            if spare and part.of["checksum"] == expected and part.of["url"] != url:
                raise SparedError(f"{url}: {part.here:,} bytes are here of {part.of['url']}, perhaps of another file")
            tqdm.write(f"{url}: {part.here:,} bytes that are here may be of another file; all of it is fetched anew")
            part.begin({})
        return _completed(url, part, expected, label, spare)

    return _from_its_start(url, attempt, lambda: part.begin({}))


def checksum(url: str, algorithm: str, label: str) -> str:
    """ "algorithm:hex" of the file, kept nowhere."""

    def attempt() -> str:
        digest = hashlib.new(algorithm, usedforsecurity=False)
        transfer = _Transfer(url)
        with _Connection(transfer) as connection:
            transfer.file, response = connection.answer(0, None)
            with _progress(label, transfer.file.size, 0) as progress:
                for chunk in connection.received(0, transfer.file.size, response):
                    digest.update(chunk)
                    progress.update(len(chunk))
        return f"{algorithm}:{digest.hexdigest()}"

    return _from_its_start(url, attempt, lambda: None)


def _from_its_start(url: str, attempt: Callable[[], Result], forget: Callable[[], None]) -> Result:
    reason = ""
    for beginning in range(BEGINNINGS):
        if beginning > 0:
            tqdm.write(f"{url}: {reason}; all of it is fetched anew")
            time.sleep(_pause(beginning - 1))
        try:
            return attempt()
        except _AnewError as error:
            forget()
            reason = str(error)
    raise TransferError(f"{url}: {reason}; given up after {BEGINNINGS} beginnings")


def _pause(before: int, asked: float = 0.0) -> float:
    """Seconds, after so many pauses before, where the server asks for some."""
    return min(max(PAUSE * 2.0**before, asked), LONGEST_PAUSE)


def _progress(label: str, size: int | None, here: int) -> "tqdm[NoReturn]":
    # disable=None: silent where standard error is no terminal
    return tqdm(total=size, initial=here, desc=label, unit="B", unit_scale=True, disable=None)


# One connection ------------------------------------------------------------------------------------------------------


@dataclass
class _Transfer:
    """What the connections to a file share."""

    url: str
    file: _File | None = None  # as the first answer described it; a later one must not differ
    received: int = 0  # bytes, by all; looked at for whether it grew
    stopped: threading.Event = field(default_factory=threading.Event)


class _Connection:
    """Asks again where another try may help. Tries count anew once any connection brought something."""

    def __init__(self, transfer: _Transfer) -> None:
        self._transfer = transfer
        self._session = requests.Session()  # which takes proxies from the environment
        self._tries, self._received_before = 0, 0
        self._pauses = 0  # since this very connection brought something: one too many for the server waits ever longer

    def answer(self, first: int, end: int | None) -> tuple[_File, requests.Response]:
        """What the server tells of the file, and a response whose body begins at byte `first`, or at 0 if no ranges."""
        while True:
            try:
                return self._ask(first, end)
            except _BrokenError as error:
                self._wait(error)

    def received(self, first: int, end: int | None, response: requests.Response | None) -> Iterator[bytes]:
        """Bytes `first` to before `end` (None: to wherever the server ends), at first from `response` if given."""
        while end is None or first < end:
            try:
                response = response or self._ask(first, end)[1]
                with response:
                    for chunk in _body(response, None if end is None else end - first):
                        first += len(chunk)
                        self._transfer.received += len(chunk)
                        self._pauses = 0
                        yield chunk
                if end is None:
                    return
                if first < end:
                    raise _BrokenError(f"broke off at byte {first:,}")
            except _BrokenError as error:
                if self._transfer.file is not None and not self._transfer.file.in_ranges:
                    raise _AnewError(f"{error}, and the server hands out no parts of a file") from None
                self._wait(error)
            response = None

    def _ask(self, first: int, end: int | None) -> tuple[_File, requests.Response]:
        # identity: what arrives is the file itself, and its length the file's
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={first}-{'' if end is None else end - 1}"}
        before = self._transfer.file
        if before is not None and before.validator and not before.validator.startswith("W/"):
            headers["If-Range"] = before.validator
        try:
            response = self._session.get(self._transfer.url, stream=True, timeout=TIMEOUT, headers=headers)
        except (requests.ConnectionError, requests.Timeout, HTTPError) as error:
            raise _BrokenError(f"no answer: {error}", reached=False) from None
        except (requests.RequestException, ValueError) as error:  # redirects without end, or to what is no address
            raise TransferError(f"{self._transfer.url}: cannot be asked for: {error}") from None
        try:
            file = _described(self._transfer.url, response, first)
            if before is not None and "If-Range" in headers and file.in_ranges and file.validator is None:
                file = replace(file, validator=before.validator)  # compared, so it may be left out: RFC 9110, 15.3.7
            if before not in (None, file):
                raise _AnewError(f"the file changed meanwhile: it was {before}; it is {file}")
        except BaseException:
            response.close()
            raise
        return file, response

    def _wait(self, error: _BrokenError) -> None:
        """Before the next try. TransferError where it is not worth it."""
        if self._transfer.received != self._received_before:
            self._tries, self._received_before = 0, self._transfer.received
        self._tries += 1
        if self._tries == TRIES:
            kind = TransferError if error.reached else UnreachableError
            raise kind(f"{self._transfer.url}: {error} ({TRIES} tries)")
        if self._transfer.stopped.wait(_pause(self._pauses, error.pause)):
            raise TransferError(f"{self._transfer.url}: not asked any more")
        self._pauses += 1

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()


def _described(url: str, response: requests.Response, first: int) -> _File:
    """The file, as an answer to the question for its bytes from `first` on tells of it."""
    status, headers = response.status_code, response.headers
    words = f"the server answers {status} {response.reason}"
    if status in PASSING:
        raise _BrokenError(words, pause=_retry_after(response))
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and first > 0:
        raise _AnewError(f"{words}: the file has no byte {first:,}")
    if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        raise TransferError(f"{url}: {words}")
    packing = headers.get("Content-Encoding", "identity")
    if packing != "identity":
        raise TransferError(f"{url}: asked for the file as it is, the server sends it packed by {packing}")
    validator = headers.get("ETag") or headers.get("Last-Modified")
    if status == HTTPStatus.OK:
        length = re.fullmatch(SIZE, headers.get("Content-Length", ""))
        return _File(int(length[0]) if length else None, validator, in_ranges=False)
    span = re.fullmatch(rf"bytes ({SIZE})-{SIZE}/({SIZE})", headers.get("Content-Range", ""))
    if span is None or int(span[1]) != first:
        got = headers.get("Content-Range")
        raise TransferError(f"{url}: asked for bytes from {first:,} on, the server answers with Content-Range {got!r}")
    return _File(int(span[2]), validator, in_ranges=True)


def _retry_after(response: requests.Response) -> float:
    with contextlib.suppress(HTTPError, ValueError, OverflowError):  # neither a number nor a date, or out of bounds
        return Retry().get_retry_after(response.raw) or 0.0
    return 0.0


def _body(response: requests.Response, most: int | None) -> Iterator[bytes]:
    """Chunks as they come in, so that of what breaks off all is had that came; no more than `most` bytes."""
    try:
        while most is None or most > 0:
            chunk = response.raw.read1(CHUNK if most is None else min(CHUNK, most), decode_content=False)
            if not chunk:
                return
            if most is not None:
                most -= len(chunk)
            yield chunk
    except HTTPError as error:
        raise _BrokenError(f"broke off: {error}") from None


# A file --------------------------------------------------------------------------------------------------------------


def _completed(url: str, part: PartFile, expected: str | None, label: str, spare: bool) -> str:
    here, workers = part.here, _Workers(_Transfer(url), part)
    gaps = part.gaps(part.of.get("size", SEGMENT), SEGMENT)  # of a segment, while no server has told the size
    try:
        if gaps:  # none where an earlier run was killed when all was there
            _start(workers, part, gaps[0], expected, spare)
        return _checksum_along(part, here, expected, label, workers)
    finally:
        workers.stop()


def _start(workers: "_Workers", part: PartFile, gap: tuple[int, int], expected: str | None, spare: bool) -> None:
    """Asks for the first gap, and sets all to work where the answer goes with what is here."""
    transfer = workers.transfer
    with contextlib.ExitStack() as ending:
        connection = ending.enter_context(_Connection(transfer))
        transfer.file, response = connection.answer(*gap)
        ending.callback(response.close)
        _begin(part, transfer.url, transfer.file, expected, spare)
        ending.pop_all()  # a thread closes them: here, that would wait for the server
    whole = [(0, transfer.file.size)]  # the size may not be known
    gaps = part.gaps(transfer.file.size or 0, SEGMENT) if transfer.file.in_ranges else whole
    workers.start(gaps, connection, response)


def _begin(part: PartFile, url: str, file: _File, expected: str | None, spare: bool) -> None:
    """Makes the part one of this very file, or sees that it is. _AnewError where it is not."""
    here, of = part.here, part.of
    if here and spare and of["url"] != url and (of["size"] != file.size or not file.in_ranges):
        raise SparedError(f"{url}: {here:,} bytes of {of['size']:,} are here of {of['url']}; this is {file}")
    if here and not file.in_ranges:
        raise _AnewError(f"{here:,} bytes are here, and the server hands out no parts of a file")
    if here and (of["size"] != file.size or (of["url"] == url and of["validator"] != file.validator)):
        raise _AnewError(f"{here:,} bytes of {of['size']:,} are here, {of['validator']}; now it is {file}")
    if file.size is not None:
        check_room(url, file.size, here, part.path.parent)
    if here:
        tqdm.write(f"{url}: {here:,} bytes of {file.size:,} are here, the rest follows")
    else:
        part.begin({"checksum": expected, "url": url, "size": file.size, "validator": file.validator})


def _may_be_same(of: dict[str, object], url: str, expected: str | None) -> bool:
    if of["checksum"] != expected or of["size"] is None:
        return False
    return expected is not None or (of["url"] == url and of["validator"] is not None)


class _Workers:
    """Threads that fetch what lacks of a part."""

    def __init__(self, transfer: _Transfer, part: PartFile) -> None:
        self.transfer, self._part = transfer, part
        self._waiting: deque[tuple[int, int | None]] = deque()
        self._threads: list[threading.Thread] = []
        self.running = 0
        self.error: Exception | None = None  # of the first that failed

    def start(
        self, gaps: Sequence[tuple[int, int | None]], connection: _Connection, response: requests.Response
    ) -> None:
        """Fetches the gaps in order, the first one from `response`, by whose connection others follow.

        (Left open and idle it would block a server that serves one connection at a time.)
        """
        self._waiting.extend(gaps[CONNECTIONS:])
        first: list[tuple[tuple[int, int | None], _Connection, requests.Response | None]]
        first = [(gap, _Connection(self.transfer), None) for gap in gaps[:CONNECTIONS]]
        first[:1] = [(gap, connection, response) for gap in gaps[:1]]
        # daemons: one that waits for a server must not hold up the end of the process
        self._threads = [threading.Thread(target=self._work, args=given, daemon=True) for given in first]
        self.running = len(first)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No byte is written from here on."""
        with self._part.changed:
            self.transfer.stopped.set()
        for thread in self._threads:
            thread.join(LAST_WORD)

    def _work(
        self, gap: tuple[int, int | None] | None, connection: _Connection, response: requests.Response | None
    ) -> None:
        try:
            with connection:
                while gap is not None:
                    self._fetch(connection, gap, response)
                    response = None
                    with self._part.changed:
                        gap = self._waiting.popleft() if self._waiting and not self.transfer.stopped.is_set() else None
        except Exception as error:  # raised where the checksum is waited for
            with self._part.changed:
                self.error = self.error or error
        finally:
            with self._part.changed:
                self.running -= 1
                self._part.changed.notify()

    def _fetch(self, connection: _Connection, gap: tuple[int, int | None], response: requests.Response | None) -> None:
        offset = gap[0]
        for chunk in connection.received(*gap, response):
            with self._part.changed:
                if self.transfer.stopped.is_set():
                    return
                offset = self._part.put(gap[0], offset, chunk)


def _checksum_along(part: PartFile, here: int, expected: str | None, label: str, workers: _Workers) -> str:
    """Reads the part from its start while the rest of it arrives."""
    algorithm = (expected or "sha256:").partition(":")[0]
    digest, read = hashlib.new(algorithm, usedforsecurity=False), 0
    # unbuffered: what lies behind the prefix must not be read ahead, for it is yet to be written
    with _progress(label, part.of["size"], here) as progress, part.path.open("rb", buffering=0) as file:
        while True:
            with part.changed:
                if workers.running and workers.error is None and part.prefix == read:
                    part.changed.wait()
                if workers.error is not None:
                    raise workers.error
                ended, ready, here = not workers.running, part.prefix, part.here
            progress.update(here - progress.n)
            if ended and ready == read:
                return f"{algorithm}:{digest.hexdigest()}"
            chunk = file.read(min(CHUNK, ready - read))
            if not chunk and ready > read:
                raise PipelineError(f"{part.path}: {ready:,} bytes were written, {read:,} are there; run it again")
            digest.update(chunk)
            read += len(chunk)
