"""Unpacks a TensorFlow checkpoint from a .tar.gz, as google/automl publishes them, into a temporary folder.

The archive is not trusted: it is read through twice as a stream. First all of it is checked; only if nothing is
wrong are the checkpoint's own files written, by their last name, into a folder that is gone afterwards.
"""

import contextlib
import gzip
import posixpath
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NoReturn

from effdet.errors import EffdetError

MAX_BYTES = 4 << 30  # unpacked; D7x with averages and momentum is 0.9 GiB
MAX_RATIO = 20  # unpacked over packed; weights hardly shrink, a checkpoint's graph ten times
SMALL = 1 << 20  # bytes that any archive may unpack to: the padding of a small one shrinks well
MAX_MEMBERS = 100
CHUNK = 1 << 20  # bytes read at a time
CHECKPOINT_FILE = re.compile(r"checkpoint|.+\.index|.+\.data-\d{5}-of-\d{5}")


@contextlib.contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """A folder with the checkpoint's files, there as long as the block runs.

    EffdetError where the archive is damaged, holds none or several checkpoints, a member that does not belong in one
    (absolute, upwards, a link, a device, a name twice), or unpacks to more than the limits above. OSError where the
    disk refuses, as a full one does.
    """
    with tempfile.TemporaryDirectory(prefix="effdet-") as folder:
        try:
            _check(archive)
            _write(archive, Path(folder))
        except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError, ValueError, RecursionError) as error:
            raise EffdetError(f"{archive}: cannot be read as .tar.gz: {error}; fetch it again") from None
        except OSError as error:
            error.filename = error.filename or folder  # a full disk names none
            raise
        yield Path(folder)


def _check(archive: Path) -> None:
    """Reads the whole archive, its end and checksum too."""
    folders: set[str] = set()
    names: set[str] = set()
    with _Unzipped(archive) as stream, tarfile.open(None, "r|", stream) as tar:
        for member in tar:
            name = posixpath.normpath(member.name)
            if name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                _refuse(archive, member, "leads out of the folder it is unpacked into")
            if not (member.isreg() or member.isdir()) or member.issparse():
                _refuse(archive, member, "is no plain file: a link, a device or sparse")
            if name in names:
                _refuse(archive, member, "is there twice")
            names.add(name)
            if len(names) > MAX_MEMBERS:
                raise EffdetError(f"{archive}: has more than {MAX_MEMBERS} members; a checkpoint has a handful")
            if member.isreg() and CHECKPOINT_FILE.fullmatch(posixpath.basename(name)):
                folders.add(posixpath.dirname(name))
        while stream.read(CHUNK):
            pass
    if len(folders) != 1:
        raise EffdetError(f"{archive}: expected one folder with a TensorFlow checkpoint, got {sorted(folders)}")


def _write(archive: Path, folder: Path) -> None:
    with _Unzipped(archive) as stream, tarfile.open(None, "r|", stream) as tar:
        for member in tar:
            name = posixpath.basename(posixpath.normpath(member.name))
            content = tar.extractfile(member) if member.isreg() and CHECKPOINT_FILE.fullmatch(name) else None
            if content is None:
                continue
            with (folder / name).open("xb") as file:
                while chunk := content.read(CHUNK):
                    file.write(chunk)
                if file.tell() != member.size:
                    _refuse(archive, member, f"is cut short: {file.tell()} of {member.size} bytes")


class _Unzipped(gzip.GzipFile):
    """The archive's bytes, unpacked up to the limits."""

    def __init__(self, archive: Path) -> None:
        self._limit = min(MAX_BYTES, SMALL + MAX_RATIO * archive.stat().st_size)
        self._left = self._limit
        super().__init__(archive, "rb")

    def read(self, size: int | None = -1) -> bytes:
        asked = self._left + 1 if size is None or size < 0 else min(size, self._left + 1)
        content = super().read(asked)
        self._left -= len(content)
        if self._left < 0:
            raise EffdetError(
                f"{self.name}: unpacks to more than {self._limit} bytes ({MAX_RATIO} times its size, and "
                f"{MAX_BYTES} at most), which no checkpoint does"
            )
        return content


def _refuse(archive: Path, member: tarfile.TarInfo, why: str) -> NoReturn:
    raise EffdetError(f"{archive}: member {member.name!r} {why}; nothing was unpacked")
