"""A benchmark's worker: a process, or a Horovod job of several, that works when it is told to and else stands still."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

from effdet.distributed import Ranks

WORKER = "--worker"
# A rank that stands still is no dead one: neither Gloo nor the stall check shall end it.
PATIENT = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "86400", "HOROVOD_STALL_CHECK_DISABLE": "1"}


class Job:
    """`python -m module --worker ADDRESS TASK`, on so many ranks of this machine."""

    def __init__(
        self, module: str, ranks: int, task: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts it and waits until it serves. `task` is what `worker_task` gives there: what json holds."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that who ends the benchmark ends the jobs
        self._listener = Listener(family="AF_UNIX")
        address = str(self._listener.address)
        launcher = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "-np", str(ranks)] if ranks > 1 else []
        self._process = subprocess.Popen(
            [*launcher, sys.executable, "-m", module, WORKER, address, json.dumps(task)],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **PATIENT, **(environment or {})},
        )
        threading.Thread(target=self._give_up, args=(address,), daemon=True).start()
        self._pids: list[int] = []
        try:
            self._pipe = self._listener.accept()
            self._pids = self._answer()
        except BaseException:
            self._process.terminate()
            raise
        self._signal(signal.SIGSTOP)

    def tell(self, command: object) -> Any:
        """Its answer to a command. It stands still before and after."""
        self._signal(signal.SIGCONT)
        self._pipe.send(command)
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        """Ends it."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.wait()
        self._listener.close()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise SystemExit("a worker has ended; its error stands above") from None

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _give_up(self, address: str) -> None:
        """One that ends before it has called would be waited for, for ever."""
        self._process.wait()
        with contextlib.suppress(OSError):
            Client(address).close()


def local_rank() -> int:
    """This rank's number, 0 alone; before Horovod has started."""
    return int(os.environ.get("HOROVOD_LOCAL_RANK", "0"))


def worker_task() -> dict[str, Any]:
    """What this worker was started for."""
    task: dict[str, Any] = json.loads(sys.argv[sys.argv.index(WORKER) + 2])
    return task


def serve(ranks: Ranks, answer: Callable[[Any], Any]) -> None:
    """Does commands until the benchmark ends: `answer(command)` on every rank at once; rank 0's answer is sent."""
    pipe = Client(sys.argv[sys.argv.index(WORKER) + 1]) if ranks.rank == 0 else None
    pids = ranks.gather(os.getpid())
    if pipe:
        pipe.send(pids)
    while (command := ranks.gather(pipe.recv() if pipe else None)[0]) is not None:
        answered = answer(command)
        if pipe:
            pipe.send(answered)


def peak_gib() -> float:
    """This process's peak memory."""
    status = Path("/proc/self/status").read_text()  # getrusage counts what the parent held, too
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def machine() -> str:
    """Date, processor, cores and TensorFlow, for the head of a table."""
    import datetime
    from importlib.metadata import version

    from pipeline.provenance import hardware

    found = hardware()
    return f"{datetime.date.today()}, {found['cpu']}, {found['cpus']} cores, TensorFlow {version('tensorflow')}"
