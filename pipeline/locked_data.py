"""The outputs that a dvc.lock names, by their hashes: out of DVC's cache or the default remote, never the work tree."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

from dvc.repo import Repo

from pipeline.errors import PipelineError

FOLDER = ".dir"  # ends the hash of a folder, whose object lists its files


class MissingError(PipelineError):
    """What is asked for is not there; the words say why."""


class LockedData:
    """The files below the outputs of one lock. `lock`: stage -> entry."""

    def __init__(self, repo: Repo, lock: Mapping[str, Mapping[str, Any]]) -> None:
        self._repo = repo
        self._outs = {out["path"]: out for entry in lock.values() for out in entry.get("outs", [])}
        self._remote: Any = None
        self._folders: dict[str, dict[str, str]] = {}

    def read(self, path: str) -> bytes:
        """A file's content, which has the hash that it should have. MissingError where it cannot be had."""
        digest = self.hash_of(path)
        with self.open(path) as file:
            content = file.read()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != digest:
            raise MissingError(f"{path} is damaged in the cache or on the remote; run `dvc fetch` or `dvc push` anew")
        return content

    def json(self, path: str) -> Any:
        """A JSON file's content; MissingError also where it is none."""
        try:
            return json.loads(self.read(path))
        except ValueError as error:
            raise MissingError(f"{path} is not JSON: {error}") from None

    def open(self, path: str) -> IO[bytes]:
        """The file to read from, any part of it, wherever it lies: of a remote one no more is fetched than is read."""
        return self._object(self.hash_of(path), path)

    def hash_of(self, path: str) -> str:
        """The md5 of a file. MissingError where the lock has no such output, or the output no such file."""
        out = next((found for found in self._outs if path == found or path.startswith(f"{found}/")), None)
        if out is None or not self._outs[out].get("md5"):
            raise MissingError(f"{path} is no output in dvc.lock")
        name, files = path.removeprefix(out).removeprefix("/"), self.files(out)
        if name not in files:
            raise MissingError(f"{path} is not among what its run produced")
        return files[name]

    def files(self, out: str) -> dict[str, str]:
        """The path below an output -> md5, of each file of it; an output that is a file has the path ""."""
        digest = str(self._outs[out]["md5"])
        return self._files(digest, out) if digest.endswith(FOLDER) else {"": digest}

    def _files(self, digest: str, out: str) -> dict[str, str]:
        if digest not in self._folders:
            with self._object(digest, out) as file:
                self._folders[digest] = {row["relpath"]: row["md5"] for row in json.loads(file.read())}
        return self._folders[digest]

    def _object(self, digest: str, path: str) -> IO[bytes]:
        asked = "cache"
        try:
            for odb in self._places():
                asked = "remote" if odb is self._remote else asked
                place = odb.oid_to_path(digest)
                if odb.fs.exists(place):
                    found: IO[bytes] = odb.fs.open(place, "rb")
                    return found
        except Exception as error:  # each kind of remote has its own kinds
            raise MissingError(f"{path} is not in DVC's cache, and the remote does not answer: {error}") from None
        where = "the cache nor on the remote" if asked == "remote" else "the cache, and there is no default remote"
        raise MissingError(f"{path} is neither in {where}" if asked == "remote" else f"{path} is not in {where}")

    def _places(self) -> Iterator[Any]:
        yield self._repo.cache.local
        if self._repo.config["core"].get("remote"):
            if self._remote is None:
                self._remote = self._repo.cloud.get_remote_odb(command="pull")
            yield self._remote
