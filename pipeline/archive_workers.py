"""Work on the images of an archive in several processes, each with the archive open for itself."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.coco import ImageArchive
from pipeline.errors import PipelineError

Task = TypeVar("Task")
Result = TypeVar("Result")

_archive: ImageArchive  # of a worker process


def over_archive(
    archive: Path,
    workers: int,
    work: Callable[[ImageArchive, Task], Result],
    tasks: Sequence[Task],
) -> Iterator[Result]:
    """Yields `work(archive, task)` of each task, in their order, worked on by `workers` processes.

    `work`, tasks and results travel between processes, so they must pickle. The first error ends the work, and so does
    this process's end, however it comes.
    """
    with ProcessPoolExecutor(min(workers, len(tasks)) or 1, initializer=_open, initargs=(archive,)) as pool:
        try:
            yield from pool.map(partial(_run, work), tasks)
        except BrokenProcessPool:
            raise PipelineError(
                f"{archive}: a process that read it was killed, most often for want of memory;"
                " set loader_workers in local.yaml to fewer"
            ) from None


def _open(archive: Path) -> None:
    global _archive
    _archive = ImageArchive(archive)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, kill -9 included: it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(work: Callable[[ImageArchive, Task], Result], task: Task) -> Result:
    return work(_archive, task)
