"""Exported models run in fresh processes, in turn: do they detect on sample images, and how long do they take?"""

import contextlib
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import numpy as np

from effdet.errors import EffdetError
from effdet.exported import RunEncoded, open_exported
from effdet.inference import prepare_device

ROUNDS = 5  # after one that is not timed, in which programs are built

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_run: RunEncoded  # of a process that serves a model


@dataclasses.dataclass(frozen=True)
class Run:
    """How a model did on sample images."""

    answered: int  # images on which it gave detections, or said that there are none
    milliseconds: float | None  # an image, the median; None: it did not run
    fault: str | None  # why


def run_in_turn(paths: Sequence[Path], images: Sequence[bytes]) -> list[Run]:
    """Each SavedModel in a process that knows nothing but it; they take the images in turns, one model at a time.

    images: JPEG or PNG bytes.
    """
    with contextlib.ExitStack() as stack:
        # spawn: a fresh process
        context = multiprocessing.get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in paths]
        faults = [_attempt(pool, _open, path)[1] for pool, path in zip(pools, paths, strict=True)]
        answered, times = [0 for _ in paths], [list[float]() for _ in paths]
        for number in range(1 + ROUNDS):
            for place, pool in enumerate(pools):
                if faults[place] is None:
                    done, faults[place] = _attempt(pool, _detect, images)
                    answered[place], seconds = done or (0, [])
                    times[place] += seconds if number else []
    return [
        Run(count, 1e3 * statistics.median(seconds) if fault is None else None, fault)
        for count, seconds, fault in zip(answered, times, faults, strict=True)
    ]


def _attempt(
    pool: ProcessPoolExecutor, work: Callable[[Argument], Result], argument: Argument
) -> tuple[Result | None, str | None]:
    """What the process made of it, and what went wrong."""
    try:
        return pool.submit(work, argument).result(), None
    except EffdetError as error:
        return None, str(error)
    except BrokenProcessPool:
        return None, "the runtime crashed on it (or was killed: out of memory?)"


def _open(path: Path) -> None:
    """Loads the model of this process."""
    global _run
    prepare_device()
    exported = open_exported(path)
    if exported.run_encoded is None:
        raise EffdetError(f"{path}: takes no image files: it is no SavedModel")
    _run = exported.run_encoded


def _detect(images: Sequence[bytes]) -> tuple[int, list[float]]:
    """Images answered, and seconds of each."""
    answered, seconds = 0, list[float]()
    for image in images:
        start = time.perf_counter()
        try:
            found = _run([image])
            finite = np.isfinite(found["scores"]).all() and np.isfinite(found["boxes"]).all()
        except Exception as error:  # a runtime's own, which may not travel between processes
            raise EffdetError(f"{type(error).__name__}: {error}") from None
        seconds.append(time.perf_counter() - start)
        answered += bool(finite)
    return answered, seconds
