"""Starts a stage's module on several ranks, shows what they say, and waits for their end.

A signal to this process asks the ranks to stop: they save and end after the same step (exit 75). A second one, or
STOP_SECONDS without an end, ends them where they are.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import psutil

from effdet.distributed import SIZE_VARIABLES
from pipeline.errors import RETRY_EXIT, PipelineError, Preempted
from pipeline.kubernetes_run import KubernetesJob
from pipeline.launchers import WORKER, command
from pipeline.local import Local
from pipeline.rank_output import Heard, follow
from pipeline.slurm_run import SlurmJob

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_SECONDS = 300  # a step, an evaluation of val and a checkpoint fit in
LOOK_SECONDS = 0.2  # between looks at a job


class Job(Protocol):
    """Ranks that a launcher runs."""

    def code(self) -> int | None:
        """The exit code, or None while they run."""

    def ask_to_stop(self) -> None:
        """Has the ranks save and end."""

    def end(self) -> None:
        """Ends them where they are, within some seconds."""


def launch(module: str, ranks: int, where: Local) -> None:
    """Runs the ranks to their end.

    Preempted where they were asked to stop and saved; PipelineError where a rank fails; its own words stand above,
    behind its number.
    """
    announced = [name for name in SIZE_VARIABLES if os.environ.get(name, "1") != "1"]
    if announced:
        raise PipelineError(
            f"ranks is {ranks}, and a launcher has started this process already ({announced[0]}="
            f"{os.environ[announced[0]]}); start `python -m {module}` alone, it starts the ranks itself"
        )
    heard = Heard(ranks)
    with _received() as signals:
        code = _to_the_end(JOBS[where.launcher](module, ranks, where, heard), signals)
    names = ", ".join(signal.Signals(number).name for number in signals)
    if code == RETRY_EXIT or heard.preempted:
        raise Preempted(f"{module}: all {ranks} ranks saved and ended{f' on {names}' if names else ''}; run it again")
    if signals:
        raise PipelineError(f"{module}: all {ranks} ranks were ended by {names}; run it again to go on")
    if code and (reason := heard.reason()):
        raise PipelineError(f"{module} stalled on {ranks} ranks (stall_seconds {where.stall_seconds}): {reason}")
    if code:
        raise PipelineError(f"{module} failed on {ranks} ranks (exit {code}); the first rank's error stands above")


def _to_the_end(job: Job, signals: list[int]) -> int:
    """The job's exit code. `signals` fills while it runs."""
    asked: float | None = None  # when
    while (code := job.code()) is None:
        if signals and asked is None:
            asked = time.monotonic()
            job.ask_to_stop()
        if asked is not None and (len(signals) > 1 or time.monotonic() > asked + STOP_SECONDS):
            job.end()
        time.sleep(LOOK_SECONDS)
    return code


@contextmanager
def _received() -> Iterator[list[int]]:
    """Notes the signals that come, in place of what they did before."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LocalJob:
    """horovodrun or mpirun as a child of this process; it reaches the other hosts itself."""

    def __init__(self, module: str, ranks: int, where: Local, heard: Heard) -> None:
        self._rank_line = ["-m", module, WORKER]
        line = command(module, ranks, where)
        try:
            # A group of its own: Ctrl-C in a terminal goes to a whole group, and the ranks would get it as well.
            self._process = subprocess.Popen(line, process_group=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except FileNotFoundError:
            raise PipelineError(
                f"{line[0]}: not found: ranks {ranks} needs it; run `make setup` (horovodrun) or install "
                "openmpi-bin (mpirun), or set ranks to 1"
            ) from None
        streams = [(self._process.stdout, False), (self._process.stderr, True)]
        self._followers = [follow(stream, to_stderr, heard) for stream, to_stderr in streams if stream]

    def code(self) -> int | None:
        code = self._process.poll()
        if code is not None:
            for follower in self._followers:
                follower.join(timeout=5)  # a rank that outlives its launcher would hold the stream
        return code

    def ask_to_stop(self) -> None:
        """Signals the ranks of this machine, who tell the others; a launcher would give them seconds only."""
        for rank in (ranks := self._local_ranks()):
            rank.terminate()
        if not ranks:
            self.end()

    def _local_ranks(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if child.cmdline()[-3:] == self._rank_line:
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def end(self) -> None:
        self._process.terminate()


JOBS: dict[str, Callable[[str, int, Local, Heard], Job]] = {
    "horovodrun": LocalJob,
    "mpirun": LocalJob,
    "slurm": SlurmJob,
    "kubernetes": KubernetesJob,
}
