"""Files as the stages write and identify them: whole or not at all, and the same bytes for the same content."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

CHUNK = 1 << 20  # bytes read at a time


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it at the end, file or folder.

    Where the block fails nothing stays behind. A folder at `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Sorted keys, two spaces, a final newline: git and DVC see a change only where there is one."""
    with written_whole(path) as part:
        part.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """The file's content; PipelineError, naming `what` the file is, where it is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise PipelineError(f"{path}: {what} not found; run `dvc repro`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: {what} is not JSON: {error}") from None


def checksum(path: Path, algorithm: str) -> str:
    """`algorithm` (md5 or sha256) of a file, as "algorithm:hex"."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return f"{algorithm}:{digest.hexdigest()}"


def megabytes(path: Path) -> float:
    """Size of a file, or of all files of a folder, in 10**6 bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6
