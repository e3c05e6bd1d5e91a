"""What the ranks and their launcher say, handed on as it comes, and read for why they ended (Horovod 0.28)."""

import os
import re
import sys
import threading
from typing import IO

from pipeline.errors import RETRY_EXIT

RANK = re.compile(r"^(?:\[(?:\d+,)?(\d+)\]<std(?:out|err)>:|(\d+): )")  # horovodrun, mpirun --tag-output; srun --label
EXIT = re.compile(r"^Process (\d+) exit with status code (\d+)\.")  # horovodrun, which itself ends with 1
MISSING = re.compile(r"(\d+)!?: \[(.+)\]\s*$")  # "1!: [gradients_1of3, gradients_2of3]", a line a rank
TIMED_OUT = "Timed out waiting"  # Gloo's words: another process gave no answer
NODE = re.compile(r"\{\{node ([^}]+)\}\}")  # TensorFlow's words: the operation that failed


class Heard:
    """What was heard so far. Two threads tell it: one for each stream."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._lock = threading.Lock()
        self._listing = 0  # lines in which Horovod's list of missing ranks may stand
        self._late: dict[int, set[str]] = {}  # rank -> tensors that it did not come to
        self._waited: set[int] = set()  # the ranks whose time ran out
        self._tensors: set[str] = set()  # what operations waited for
        self.preempted = False  # a rank ended with RETRY_EXIT

    def line(self, line: str) -> None:
        with self._lock:
            self._read(line)

    def _read(self, line: str) -> None:
        rank = RANK.match(line)
        if ended := EXIT.match(line):
            self.preempted |= int(ended[2]) == RETRY_EXIT
        if "Missing ranks:" in line:
            self._listing = 2 * self._ranks + 2  # others' lines may stand between
        elif self._listing and (missing := MISSING.search(line)):
            names = {tensor_name(name) for name in missing[2].split(", ")}
            self._late.setdefault(int(missing[1]), set()).update(names)
        self._listing = max(0, self._listing - 1)
        if TIMED_OUT in line and rank:
            self._waited.add(int(rank[1] or rank[2]))
        self._tensors.update(tensor_name(name) for name in NODE.findall(line))

    def reason(self) -> str | None:
        """Why the ranks ended, for a person, where one of them kept the others waiting."""
        with self._lock:
            if self._late:
                each = (f"rank {rank} did not come to {_listed(names)}" for rank, names in sorted(self._late.items()))
                return "; ".join(each)
            if self._waited:
                silent = sorted(set(range(self._ranks)) - self._waited)
                who = f"ranks {silent} gave" if len(silent) != 1 else f"rank {silent[0]} gave"
                at = f" in {_listed(self._tensors)}" if self._tensors else ""
                return f"{who} no answer, while ranks {sorted(self._waited)} waited{at}"
            return None


def tensor_name(name: str) -> str:
    """Horovod numbers the tensors of a group: "gradients_3of493" is one of "gradients"."""
    return re.sub(r"_\d+of\d+( \.\.\.)?$", "", name)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def follow(source: IO[bytes], to_stderr: bool, heard: Heard) -> threading.Thread:
    """Hands a stream on to this process's own, until it ends, and tells `heard` its lines."""

    def copy() -> None:
        target = (sys.stderr if to_stderr else sys.stdout).buffer
        rest = b""
        while chunk := os.read(source.fileno(), 1 << 16):
            target.write(chunk)
            target.flush()
            *lines, rest = re.split(rb"[\r\n]", rest + chunk)
            for line in lines:
                heard.line(line.decode(errors="replace"))

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread
