"""Checkpoints of a training run: a folder each, whole or not there, and checked when read.

FOLDER/step-00000120/   arrays.safetensors and state.json; the last few are kept
FOLDER/best-00000080/   likewise, the best weights that a kept checkpoint names

state.json holds the SHA-256 of the arrays and of itself, so that a damaged checkpoint is seen before it is used.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from effdet.errors import EffdetError

FORMAT = 1
ARRAYS_FILE = "arrays.safetensors"
STATE_FILE = "state.json"

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


def save(folder: Path, kind: str, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint of `kind`, "step" or "best". CheckpointError where the disk refuses; then nothing is left."""
    goal = _path(folder, kind, checkpoint.step)
    part = folder / f".{goal.name}.part"  # one name: what a killed process left is overwritten, not gathered
    old = folder / f".{goal.name}.old"
    try:
        _discard(part)
        _discard(old)
        part.mkdir(parents=True)
        save_file({name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}, part / ARRAYS_FILE)
        content = {
            "format": FORMAT,
            "step": checkpoint.step,
            "arrays_sha256": _sha256(part / ARRAYS_FILE),
            "state": checkpoint.state,
            "best_step": checkpoint.best_step,
        }
        (part / STATE_FILE).write_text(json.dumps({**content, "sha256": _sha256_of(content)}, indent=1))
        for path in (part / ARRAYS_FILE, part / STATE_FILE, part):
            _to_disk(path)
        if goal.exists():  # of a course that was left, or of a step that is its epoch's all over
            os.replace(goal, old)
        os.replace(part, goal)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{goal}: checkpoint not written: {error}; earlier ones are intact") from None
    finally:
        _discard(part)
        _discard(old)


def load(folder: Path, kind: str, step: int) -> Checkpoint:
    """Reads one checkpoint. CheckpointError where it is not there or not as it was written."""
    return read(_path(folder, kind, step))


def read(path: Path) -> Checkpoint:
    """Reads the checkpoint in a folder of its own. CheckpointError where it is not as it was written."""
    content = _state(path)
    try:
        if content["arrays_sha256"] != _sha256(path / ARRAYS_FILE):
            raise CheckpointError(f"{path / ARRAYS_FILE}: damaged: its SHA-256 differs from that in {STATE_FILE}")
        arrays = load_file(path / ARRAYS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / ARRAYS_FILE}: damaged: {error}") from None
    return Checkpoint(content["step"], arrays, content["state"], content["best_step"])


def latest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, and so are the best weights that it names; None where there is none.

    Where no such pair is left, the newest that is whole itself, without a `best_step`: a damaged file of the best
    weights must not cost the run. What is passed over is told to `report`.
    """
    without_best = None
    paths = _paths(folder, "step")
    for path in reversed(paths):
        try:
            checkpoint = load(folder, "step", _step(path))
        except CheckpointError as error:
            report(f"{error}; trying the one before")
            continue
        if checkpoint.best_step is None:
            return checkpoint
        try:
            load(folder, "best", checkpoint.best_step)
            return checkpoint
        except CheckpointError as error:
            report(f"{error}; trying the one before")
            without_best = without_best or dataclasses.replace(checkpoint, best_step=None)
    if without_best:
        report(f"{folder}: going on after step {without_best.step}; the best weights are sought anew")
    elif paths:
        report(f"{folder}: no checkpoint is whole; training begins anew")
    return without_best


def newest(folder: Path, kind: str) -> Path | None:
    """The folder of the last checkpoint of `kind`, whole or not; None where there is none."""
    paths = [path for path in _paths(folder, kind) if path.is_dir() and path.name.rpartition("-")[2].isdecimal()]
    return max(paths, key=_step, default=None)


def prune(folder: Path, keep: int, newest: int) -> None:
    """Leaves the last `keep` checkpoints up to step `newest`, and the best weights that these name.

    What lies beyond `newest` is of a course that was left: damaged, or naming best weights that are.
    """
    for path in _paths(folder, "step"):
        if _step(path) > newest:
            _discard(path)
    paths = _paths(folder, "step")
    for path in paths[:-keep]:
        _discard(path)
    named = set()
    for path in paths[-keep:]:
        with contextlib.suppress(CheckpointError):  # damaged: `latest` will say so, and not use it
            named.add(_state(path)["best_step"])
    for path in _paths(folder, "best"):
        if _step(path) not in named:
            _discard(path)


def _path(folder: Path, kind: str, step: int) -> Path:
    return folder / f"{kind}-{step:08d}"


def _paths(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}-*"))


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _state(path: Path) -> dict[str, Any]:
    """state.json's content, checked against its own hash."""
    file = path / STATE_FILE
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        said = content.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from None
    if said != _sha256_of(content):
        raise CheckpointError(f"{file}: damaged: its SHA-256 differs from the one it names")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{file}: expected format {FORMAT}, got {content['format']!r}")
    return content


def _discard(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _to_disk(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk: a rename must not get there before its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
