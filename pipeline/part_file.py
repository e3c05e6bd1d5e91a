"""A file that arrives in pieces: the part file beside its target, and a journal of which bytes of it are there.

The journal is a line of JSON, what the bytes are of, and a line "start end" for each run of bytes on disk, written
after the bytes. A process may be killed between any two writes: what the journal names is there, and what it does not
name is fetched again. (Bytes that a failing machine lost, it does not know of; the checksum finds them.)
"""

import errno
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pipeline.errors import PipelineError

LINE = 32  # bytes of a line: none lies across two pages of memory, between which a kill may cut a write


class PartFile:
    """The part of `target`, held by one process at a time; its threads write it under `changed`.

    It stays when it is closed, unless nothing has come.
    """

    def __init__(self, target: Path) -> None:
        """Opens it, or an empty one. PipelineError where another process has it."""
        self.path = target.with_name(f".{target.name}.part")
        self._journal_path = self.path.with_name(f"{self.path.name}.state")
        self._file = _locked(self.path)
        self._journal = _opened(self._journal_path)
        self.changed = threading.Condition()
        self.of: dict[str, Any] = {}  # what the bytes are of, as given to `begin`
        self.here = 0  # bytes on disk
        self.continued = False  # some of them came in an earlier run
        self._ends = {0: 0}  # first byte of a run -> behind its last
        self._lines: dict[int, int] = {}  # first byte of a run -> where in the journal its line stands
        self._front = 0  # the first byte of the last run that bytes without a gap lead to
        self._load()

    @property
    def prefix(self) -> int:
        """Bytes on disk from the start to the first gap."""
        while (end := self._ends[self._front]) != self._front and end in self._ends:
            self._front = end
        return self._ends[self._front]

    def gaps(self, size: int, longest: int) -> list[tuple[int, int]]:
        """(first byte, behind the last) of what is not on disk of `size` bytes, in order, cut to that length."""
        found, reached = [], 0
        for start, end in [*sorted(self._ends.items()), (size, size)]:
            found += [(first, min(first + longest, start)) for first in range(reached, start, longest)]
            reached = end
        return found

    def begin(self, of: dict[str, Any]) -> None:
        """Empties it, for the bytes of `of`, which JSON can hold."""
        with self.changed:
            self._file.truncate(0)
            self._journal.truncate(0)
            self.of, self.here, self.continued = of, 0, False
            self._ends, self._lines, self._front = {0: 0}, {}, 0
            text = json.dumps(of)
            text += " " * (-(len(text) + 1) % LINE) + "\n"
            self._write(self._journal, text.encode(), 0)
            self._journal_end = len(text)

    def put(self, start: int, offset: int, chunk: bytes) -> int:
        """Writes bytes at `offset`, where the run that begins at `start` ends; its new end."""
        with self.changed:
            self._write(self._file, chunk, offset)
            end = self._ends[start] = offset + len(chunk)
            self.here += len(chunk)
            if start not in self._lines:
                self._lines[start] = self._journal_end
                self._journal_end += LINE
            self._write(self._journal, f"{start:15d} {end:15d}\n".encode(), self._lines[start])
            self.changed.notify()
            return end

    def finish(self, target: Path) -> None:
        """Renames it to `target`."""
        os.replace(self.path, target)
        self._journal_path.unlink()

    def close(self) -> None:
        """Lets another process have it."""
        if not self.here:
            for path in (self._journal_path, self.path):  # the latter frees the lock: another may have both from then
                path.unlink(missing_ok=True)
        self._journal.close()
        self._file.close()

    def _load(self) -> None:
        text, *lines = self._journal_path.read_text(errors="replace").splitlines(keepends=True) or [""]
        try:
            of, runs = json.loads(text), [(int(line[:15]), int(line[15:])) for line in lines if len(line) == LINE]
        except ValueError:
            of, runs = {}, []
        if not runs or max(end for _, end in runs) > self.path.stat().st_size:
            self.begin({})
            return
        self.of, self.here, self.continued = of, sum(end - start for start, end in runs), True
        self._ends |= dict(runs)
        self._journal_end = len(text) + LINE * len(runs)

    def _write(self, file: BinaryIO, content: bytes, offset: int) -> None:
        view = memoryview(content)
        try:
            while view:
                written = os.pwrite(file.fileno(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PipelineError(
                f"{self.path}: the disk filled up; make room and run it again: {self.here:,} bytes stay here"
            ) from None

    def __enter__(self) -> "PartFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_room(address: str, size: int, here: int, folder: Path) -> None:
    """PipelineError unless what lacks of a file of `size` bytes, `here` of them on disk, fits into the folder."""
    free = shutil.disk_usage(folder).free
    if size - here > free:
        lacking = f"has {size:,} bytes, " + (f"{here:,} of them are here, " if here else "")
        raise PipelineError(f"{address}: {lacking}{free:,} are free in {folder}; make room there")


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)


def _locked(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = _opened(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise PipelineError(f"{path}: another process is fetching this file; wait for it or stop it") from None
        except FileNotFoundError:
            pass
        file.close()  # the one that had it has renamed it since
