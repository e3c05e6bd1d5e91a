"""A folder of files here or at a URL (fsspec 2026.9): a file is put whole, or it is not there.

A URL holds no password: that comes from the environment, from ssh's configuration or from fsspec's, as each library
reads it. Everywhere a file is written by another name and moved: a rename here and over sftp, a copy within an object
store, which shows an object only when it is whole.
"""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from effdet.errors import EffdetError

SSH = {
    "known_hosts": (),  # those that ssh itself takes; sshfs alone would trust any host
    "connect_timeout": 30,  # seconds
    "keepalive_interval": 15,  # seconds; three unanswered end the connection: without, a cut line hangs for ever
}
OPTIONS: dict[str, dict[str, Any]] = {"sftp": SSH, "ssh": SSH}  # of a protocol; fsspec's configuration stands above

T = TypeVar("T")


class FolderError(EffdetError):
    """A URL cannot be used, or what is there does not answer or refuses; names it, without credentials."""


class Folder:
    """The files of one folder, without those of folders below.

    Here, OSError says what the disk refuses; at a URL, FolderError what stands in the way.
    """

    def __init__(self, where: str | Path) -> None:
        """Connects. FolderError where the URL is of no known kind, holds a password or does not answer."""
        self._where = str(where)
        protocol, address, _ = self._where.partition("://")
        self.is_here = not address or protocol in ("file", "local")  # on this machine's file systems
        if re.search(r"://[^/@]*:[^/@]*@", self._where):
            raise FolderError(
                f"{self}: holds a password; leave it out, and give it by the environment or a configuration file"
            )
        self._connect()

    def __str__(self) -> str:
        return without_credentials(self._where).rstrip("/")

    def names(self) -> list[str]:
        """The names in it, in order; none where there is no such folder."""

        def listed() -> list[str]:
            self._files.invalidate_cache()
            return list(self._files.ls(self._path, detail=False))

        try:
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in self._ask(listed))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """A file's content. FileNotFoundError where there is none."""
        return self._ask(lambda: bytes(self._files.cat_file(f"{self._path}/{name}")))

    def head(self, name: str, length: int) -> bytes:
        """The first `length` bytes of a file, or all where it has fewer. FileNotFoundError where there is none."""

        def beginning() -> bytes:
            with self._files.open(f"{self._path}/{name}", "rb") as file:
                return bytes(file.read(length))

        return self._ask(beginning)

    def write(self, name: str, content: bytes) -> None:
        """Puts a file whole, in place of one of that name. Where that fails, nothing is left and the old one stands."""
        if self.is_here:
            _write_here(Path(self._path), name, content)
        else:
            self._ask(lambda: self._write_there(name, content))

    def remove(self, name: str) -> None:
        """Removes a file, where there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self._files.rm_file(f"{self._path}/{name}"))

    def _connect(self) -> None:
        self._files: fsspec.AbstractFileSystem
        if "://" not in self._where:
            self._files, self._path = LocalFileSystem(), os.path.abspath(self._where)
            return
        protocol = self._where.partition("://")[0]
        options = OPTIONS.get(protocol, {}) | fsspec.config.conf.get(protocol, {})
        self._files, path = self._answer(lambda: url_to_fs(self._where, skip_instance_cache=True, **options))
        self._path = path.rstrip("/")

    def _ask(self, question: Callable[[], T]) -> T:
        """What the folder answers; at a URL over a new connection where need be: the last may have ended meanwhile."""
        if self.is_here:
            return question()
        try:
            return self._answer(question)
        except FolderError:
            self._connect()
            return self._answer(question)

    def _answer(self, question: Callable[[], T]) -> T:
        """Makes a FolderError of what a URL's library raises: each has errors of its own. FileNotFoundError stays."""
        try:
            return question()
        except FileNotFoundError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {without_credentials(str(error))}".removesuffix(": ")
            raise FolderError(f"{self}: {what}") from None

    def _write_there(self, name: str, content: bytes) -> None:
        part, goal = (f"{self._path}/{file}" for file in (part_name(name), name))
        try:
            self._files.makedirs(self._path, exist_ok=True)
            self._files.pipe_file(part, content)
            self._files.mv(part, goal)
            self._files.invalidate_cache()
            arrived = self._files.info(goal)["size"]
            if arrived != len(content):  # some servers' rename refuses in silence where the goal is there
                raise OSError(f"{arrived} of {len(content)} bytes are at {name}")
        except Exception:
            with contextlib.suppress(Exception):  # a part stays where no line to the server is left, until `prune`
                self._files.rm_file(part)
            raise


def part_name(name: str) -> str:
    """What a file is called until it is whole: one name, so that what a killed process left is written over."""
    return f".{name}.part"


def without_credentials(text: str) -> str:
    """A text whose URLs name neither user nor password."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def _write_here(folder: Path, name: str, content: bytes) -> None:
    part = folder / part_name(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a rename must not get to the disk before its content
        os.replace(part, folder / name)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        part.unlink(missing_ok=True)
