"""Files from where they are offered, http(s)://, file:// or a folder, to a place of ours: whole and verified."""

import contextlib
import errno
import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from tqdm import tqdm

from pipeline import files, http_transfer
from pipeline.coco import ArchiveError, ImageArchive, add_member
from pipeline.errors import PipelineError
from pipeline.http_transfer import SparedError, TransferError, UnreachableError
from pipeline.part_file import PartFile, check_room

Result = TypeVar("Result")


@dataclass(frozen=True)
class SourceFile:
    """One thing that a data set consists of."""

    name: str  # in data.checksums
    places: tuple[str, ...]  # where it may lie below a base, in the order to try
    is_folder: bool = False  # of images, packed into a zip on arrival; on this machine's file system only


def fetch(bases: Sequence[str], file: SourceFile, target: Path, expected: str | None) -> str:
    """Writes the file whose checksum is `expected` ("algorithm:hex") to `target`, from the first base that has it.

    Gives the checksum. Where none is expected (None) a zip's members are held to their CRC-32. Nothing half-written
    stands at `target`; what came over http stays beside it and is continued, and is given up only where no base goes on
    with it. TransferError tells every attempt.
    """
    try:
        return _first_of(bases, file, lambda base, place: _fetch_from(base, place, file, target, expected, spare=True))
    except SparedError as error:
        print(f"{error}\n{file.name}: no server goes on with what is here; all of it is fetched anew")
        return _first_of(bases, file, lambda base, place: _fetch_from(base, place, file, target, expected, spare=False))


def checksum(bases: Sequence[str], file: SourceFile, algorithm: str) -> str:
    """ "algorithm:hex" of the file in the first base that has it, read there and kept nowhere.

    Of a folder: of the lines "sha256 name", one an image, sorted by name, `algorithm` being sha256.
    """

    def read(base: str, place: str) -> str:
        if file.is_folder:
            return _folder_checksum(_contents(_images_folder(base, place), base, place))
        path = _local_file(base, place)
        if path is None:
            return http_transfer.checksum(_url(base, place), algorithm, file.name)
        return _read(path, algorithm, lambda _: None)

    return _first_of(bases, file, read)


def is_present(target: Path, file: SourceFile, expected: str) -> bool:
    """Whether `target` already is what `fetch` would write."""
    if not target.is_file():
        return False
    if not file.is_folder:
        return files.checksum(target, expected.partition(":")[0]) == expected
    with contextlib.suppress(PipelineError), ImageArchive(target) as archive:
        return _folder_checksum((name, archive.read(name)) for name in archive.names) == expected
    return False


def local_folder(base: str) -> Path | None:
    """The folder that `base` (file:// or a plain path) means; None where it is http(s)."""
    parts = urlsplit(base)
    if parts.scheme in ("http", "https"):
        return None
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise TransferError(f"{base}: a file:// address names no host; write file:///{parts.netloc}{parts.path}")
        return Path(url2pathname(parts.path))
    if "://" in base:
        raise TransferError(f"{base}: expected http://, https://, file:// or a folder")
    return Path(base).expanduser()


def _first_of(bases: Sequence[str], file: SourceFile, attempt: Callable[[str, str], Result]) -> Result:
    failures: list[TransferError] = []
    for base in bases:
        for place in file.places:
            try:
                return attempt(base, place)
            except UnreachableError as error:
                failures.append(error)
                break
            except TransferError as error:
                failures.append(error)
    kind = SparedError if any(isinstance(failure, SparedError) for failure in failures) else TransferError
    if len(failures) == 1:
        raise kind(str(failures[0]))
    raise kind(f"{file.name} could not be had:\n" + "\n".join(f"- {failure}" for failure in failures))


def _fetch_from(base: str, place: str, file: SourceFile, target: Path, expected: str | None, spare: bool) -> str:
    path = None if file.is_folder else _local_file(base, place)
    if path is None and not file.is_folder:
        address = _url(base, place)
        got = _fetch_url(address, file, target, expected, spare)
    else:
        with files.written_whole(target) as part:
            address, got = _packed(base, place, part) if path is None else _copied(path, part, expected)
            if fault := _fault(address, file, part, got, expected):
                raise TransferError(fault)
    print(f"{target}: {target.stat().st_size:,} bytes from {address}")
    if expected is None:
        print(f"{file.name}: data.checksums does not say what it must be; it is {got}")
    return got


def _fetch_url(url: str, file: SourceFile, target: Path, expected: str | None, spare: bool) -> str:
    with PartFile(target) as part:
        while True:
            got = http_transfer.fetch(url, part, expected, file.name, spare)
            fault = _fault(url, file, part.path, got, expected)
            if fault is None:
                part.finish(target)
                return got
            continued = part.continued
            part.begin({})
            if not continued:
                raise TransferError(fault)
            print(f"{fault}\n{url}: some of these bytes came in an earlier run; all of it is fetched anew")


def _fault(address: str, file: SourceFile, path: Path, got: str, expected: str | None) -> str | None:
    """What is wrong with the bytes at `path`."""
    if expected not in (None, got):
        return (
            f"{address}: checksum differs: params.yaml: data.checksums.{file.name} is {expected}, got {got}; "
            "where these bytes are the right ones, `python -m pipeline.checksums` writes their checksums"
        )
    if expected is None and file.name.endswith(".zip"):
        try:
            with ImageArchive(path) as archive:
                archive.check()
        except ArchiveError as error:
            return f"{address}: {error}"
    return None


# Single files --------------------------------------------------------------------------------------------------------


def _url(base: str, place: str) -> str:
    return f"{base.rstrip('/')}/{quote(place)}"


def _local_file(base: str, place: str) -> Path | None:
    """The file on this machine; None where `base` is http(s)."""
    folder = local_folder(base)
    if folder is None:
        return None
    path = folder / place
    if not folder.is_dir():
        raise UnreachableError(f"{folder}: no such folder")
    if not path.is_file():
        raise TransferError(f"{path}: no such file")
    return path


def _copied(path: Path, part: Path, expected: str | None) -> tuple[str, str]:
    """Copies to `part`; (where from, checksum)."""
    check_room(str(path), path.stat().st_size, 0, part.parent)
    with part.open("wb") as written:
        return str(path), _read(path, (expected or "sha256:").partition(":")[0], written.write)


def _read(path: Path, algorithm: str, take: Callable[[bytes], object]) -> str:
    """Hands every chunk to `take`; the checksum of all."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        # disable=None: silent where standard error is no terminal
        with (
            path.open("rb") as file,
            tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, disable=None) as progress,
        ):
            while chunk := file.read(files.CHUNK):
                digest.update(chunk)
                take(chunk)
                progress.update(len(chunk))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PipelineError(f"{path}: the disk filled up; make room and run it again") from None
        raise TransferError(f"{path}: cannot be read: {error}") from None
    return f"{algorithm}:{digest.hexdigest()}"


# Folders of images ---------------------------------------------------------------------------------------------------


def _packed(base: str, place: str, part: Path) -> tuple[str, str]:
    """Packs a folder into a stored zip, sorted by name and without dates; (where from, checksum)."""
    folder = _images_folder(base, place)
    check_room(str(folder), sum(path.stat().st_size for path in _paths(folder)), 0, part.parent)

    def packed(archive: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
        for name, content in _contents(folder, base, place):
            add_member(archive, name, content)
            yield name, content

    with zipfile.ZipFile(part, "w") as archive:
        return str(folder), _folder_checksum(packed(archive))


def _images_folder(base: str, place: str) -> Path:
    below = local_folder(base)
    if below is None:
        raise TransferError(f"{base}: {place!r} is not a .zip, and a folder of images cannot be read over http; zip it")
    if not (below / place).is_dir():
        raise TransferError(f"{below / place}: no such folder (images are a folder, or an archive that ends in .zip)")
    return below / place


def _paths(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _contents(folder: Path, base: str, place: str) -> Iterator[tuple[str, bytes]]:
    named = sorted((path.relative_to(folder).as_posix(), path) for path in _paths(folder))
    for name, path in tqdm(named, desc=place, unit="images", disable=None):
        try:
            name.encode()
            yield name, path.read_bytes()
        except UnicodeEncodeError:
            raise TransferError(f"{base}: {place}: the file name {name!r} is not UTF-8; rename it") from None
        except OSError as error:
            raise TransferError(f"{base}: {path}: cannot be read: {error.strerror}") from None


def _folder_checksum(contents: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{hashlib.sha256(content).hexdigest()} {name}\n".encode())
    return f"sha256:{digest.hexdigest()}"
