"""Checkpoints of a training run: a file each, whole or not there, and checked when read.

FOLDER/step-00000120.safetensors   the state of training; the last few are kept
FOLDER/best-00000080.safetensors   the best weights, which a kept checkpoint names

FOLDER is here or at a URL (effdet.folder). A file holds the arrays and, in its metadata, the state as JSON with the
SHA-256 of both, so that a damaged checkpoint is seen before it is used. One file and not two: any store puts one whole.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from effdet.errors import EffdetError
from effdet.folder import Folder, FolderError, part_name

FORMAT = 2
CONTENT, DIGEST = "checkpoint", "checkpoint_sha256"  # the keys in a file's metadata
SUFFIX = ".safetensors"
NAME = re.compile(rf"(?P<kind>step|best)-(?P<step>\d{{8,}}){re.escape(SUFFIX)}")
PART = re.compile(re.escape(part_name("NAME")).replace("NAME", NAME.pattern))
MAX_HEADER = 100_000_000  # bytes; as safetensors has it. A damaged length must not fill the memory

Place = str | Path | Folder  # a folder, or the URL of one
Arrays = Mapping[str, NDArray[Any]]


class CheckpointError(EffdetError):
    """A checkpoint is damaged or cannot be written; names the file."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved after a step."""

    step: int  # steps done
    arrays: dict[str, NDArray[Any]]
    state: dict[str, Any]  # of JSON's types
    best_step: int | None = None  # names the "best" checkpoint that belongs to this one


def save(place: Place, kind: str, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint of `kind`, "step" or "best", in place of one of that step; the best that it names is there.

    CheckpointError where it is not, or the disk or the remote refuses; then nothing is left, and what was there stands.
    """
    folder = _opened(place)
    name = file_name(kind, checkpoint.step)
    try:
        best = checkpoint.best_step
        best_sha256 = None if best is None else _head(folder, file_name("best", best))["arrays_sha256"]
        folder.write(name, _packed(checkpoint, best_sha256))
    except (OSError, FolderError, SafetensorError) as error:
        raise not_written(folder, name, error) from None


def load(place: Place, kind: str, step: int) -> Checkpoint:
    """Reads one checkpoint. CheckpointError where it is not there or not as it was written."""
    return _checkpoint(*_read(_opened(place), file_name(kind, step)))


def read(path: Path) -> Checkpoint:
    """Reads the checkpoint in a file. CheckpointError where it is not as it was written or of another format."""
    return _checkpoint(*_read(Folder(path.parent), path.name))


def describe(path: Path) -> dict[str, Any]:
    """`step`, `state` and `best_step` of the checkpoint in a file, without its arrays. Errors as `read` has them."""
    return _head(Folder(path.parent), path.name)


def is_checkpoint(path: Path) -> bool:
    """Whether it is a checkpoint, whole or not, by whatever name that ends as theirs do."""
    if path.suffix != SUFFIX or not path.is_file():
        return False
    try:
        return CONTENT in _metadata(str(path), _header(Folder(path.parent), path.name))
    except CheckpointError:  # no safetensors file
        return False


def latest(place: Place, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, and so are the best weights that it names; None where there is none.

    Where no such pair is left, the newest that is whole itself, without a `best_step`: a damaged file of the best
    weights must not cost the run. What is passed over is told to `report`. FolderError where a remote does not answer:
    older ones, or none, would be a wrong reply.
    """
    folder = _opened(place)
    without_best = None
    steps = _steps(_names(folder), "step")
    for step in reversed(steps):
        try:
            content, arrays = _read(folder, file_name("step", step))
        except CheckpointError as error:
            report(f"{error}; trying the one before")
            continue
        checkpoint = _checkpoint(content, arrays)
        if checkpoint.best_step is None:
            return checkpoint
        try:
            _check_best(folder, content)
            return checkpoint
        except CheckpointError as error:
            report(f"{error}; trying the one before")
            without_best = without_best or dataclasses.replace(checkpoint, best_step=None)
    if without_best:
        report(f"{folder}: going on after step {without_best.step}; the best weights are sought anew")
    elif steps:
        report(f"{folder}: no checkpoint is whole; training begins anew")
    return without_best


def newest(place: Place, kind: str) -> int | None:
    """The step of the last checkpoint of `kind`, whole or not; None where there is none."""
    return max(_steps(_names(_opened(place)), kind), default=None)


def prune(place: Place, keep: int, newest: int) -> None:
    """Leaves the last `keep` checkpoints up to step `newest`, and the best weights that these name.

    What lies beyond `newest` is of a course that was left: damaged, or naming best weights that are. What a killed save
    left goes as well. No checkpoint ever names best weights that are gone, also if this is killed. CheckpointError
    where the disk or the remote refuses.
    """
    folder = _opened(place)
    try:
        names = _names(folder)
        kept = [step for step in _steps(names, "step") if step <= newest][-keep:]
        named = set()
        for step in kept:
            with contextlib.suppress(CheckpointError):  # damaged: `latest` will say so, and not use it
                named.add(_head(folder, file_name("step", step))["best_step"])
        stays = {file_name("step", step) for step in kept} | {file_name("best", step) for step in named - {None}}
        ours = [file_name(kind, step) for kind in ("step", "best") for step in _steps(names, kind)]
        for name in ours:  # those that name best weights first
            if name not in stays:
                folder.remove(name)
        for name in names:
            if PART.fullmatch(name):
                folder.remove(name)
    except (OSError, FolderError) as error:
        raise CheckpointError(f"{folder}: old checkpoints not removed: {error}") from None


def file_name(kind: str, step: int) -> str:
    """What a checkpoint's file is called in its folder."""
    return f"{kind}-{step:08d}{SUFFIX}"


def not_written(folder: Folder, name: str, error: Exception) -> CheckpointError:
    """The error of a save that the disk or the remote refused."""
    what = str(error).removeprefix(f"{folder}: ")
    return CheckpointError(
        f"{folder}/{name}: checkpoint not written: {what}; earlier ones are intact; make room, or mend what is said, "
        "and start again"
    )


def _opened(place: Place) -> Folder:
    return place if isinstance(place, Folder) else Folder(place)


def _names(folder: Folder) -> list[str]:
    """What lies in the folder. CheckpointError where it is or holds a checkpoint of format 1, which was a folder."""
    names = folder.names()
    old = [f"{folder}/{name}" for name in names if re.fullmatch(r"(step|best)-\d{8,}", name)]
    if old or {"arrays.safetensors", "state.json"} <= set(names):
        raise CheckpointError(f"{old[-1] if old else folder}: {_other_format(1)}")
    return names


def _steps(names: list[str], kind: str) -> list[int]:
    """The steps of a kind's checkpoints, in order."""
    return sorted(int(found["step"]) for found in map(NAME.fullmatch, names) if found and found["kind"] == kind)


def _packed(checkpoint: Checkpoint, best_sha256: str | None) -> bytes:
    arrays = {name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}
    content = json.dumps(
        {
            "format": FORMAT,
            "step": checkpoint.step,
            "best_step": checkpoint.best_step,
            "best_sha256": best_sha256,  # of its arrays
            "state": checkpoint.state,
            "arrays_sha256": _sha256(arrays),
        }
    )
    digest = hashlib.sha256(content.encode()).hexdigest()
    return safetensors.numpy.save(arrays, metadata={CONTENT: content, DIGEST: digest})


def _checkpoint(content: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Checkpoint:
    return Checkpoint(content["step"], arrays, content["state"], content["best_step"])


def _check_best(folder: Folder, content: dict[str, Any]) -> None:
    """Raises where the best weights are damaged, or others than those there were when `content` named them."""
    name = file_name("best", content["best_step"])
    if _read(folder, name)[0]["arrays_sha256"] != content["best_sha256"]:
        raise CheckpointError(f"{folder}/{name}: others than {file_name('step', content['step'])} names")


def _read(folder: Folder, name: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """All but the arrays, and the arrays."""
    where = f"{folder}/{name}"
    try:
        packed = folder.read(name)
        content = _content(where, packed)
        arrays = safetensors.numpy.load(packed)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: an element type that NumPy has not
        raise CheckpointError(f"{where}: damaged: {error}") from None
    if content["arrays_sha256"] != _sha256(arrays):
        raise CheckpointError(f"{where}: damaged: the arrays' SHA-256 differs from the one it names")
    return content, arrays


def _head(folder: Folder, name: str) -> dict[str, Any]:
    """All of a checkpoint but its arrays, checked against its own hash."""
    return _content(f"{folder}/{name}", _header(folder, name))


def _header(folder: Folder, name: str) -> bytes:
    """The beginning of a safetensors file: the length of its description, 8 bytes, and the description."""
    try:
        length = int.from_bytes(folder.head(name, 8), "little")
        return folder.head(name, 8 + min(length, MAX_HEADER))
    except OSError as error:
        raise CheckpointError(f"{folder}/{name}: damaged: {error}") from None


def _metadata(where: str, packed: bytes) -> dict[str, Any]:
    """A safetensors file's own words, from its beginning; nothing is checked yet."""
    try:
        metadata: dict[str, Any] = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])["__metadata__"]
        if not isinstance(metadata, dict):
            raise TypeError("its metadata are no names and values")
        return metadata
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: damaged: {error!r}") from None


def _content(where: str, packed: bytes) -> dict[str, Any]:
    metadata = _metadata(where, packed)
    text = str(metadata.get(CONTENT))
    if metadata.get(DIGEST) != hashlib.sha256(text.encode()).hexdigest():
        raise CheckpointError(f"{where}: damaged: its state's SHA-256 differs from the one it names")
    content: dict[str, Any] = json.loads(text)
    if content["format"] != FORMAT:
        raise CheckpointError(f"{where}: {_other_format(content['format'])}")
    return content


def _other_format(number: int) -> str:
    return (
        f"expected a checkpoint of format {FORMAT}, got format {number}; use the version of this program that wrote it"
    )


def _sha256(arrays: Arrays) -> str:
    """Of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
