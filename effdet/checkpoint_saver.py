"""Saving checkpoints beside training: the loop hands over copies of its arrays and goes on."""

import json
import os
import socket
import uuid
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from effdet import checkpoint
from effdet.checkpoint import Checkpoint, CheckpointError
from effdet.folder import Folder, FolderError

OWNER_FILE = "owner.json"
WAITING = 2  # checkpoints in memory at most: one being written, and one behind it; a third call waits


class Saver:
    """Writes checkpoints in one thread, in the order given, and prunes after each "step".

    Where one is not written, none after it is: a step never names best weights that are not there. Every later call
    raises that error, CheckpointError as a rule. Leaving the block waits for what was handed over; and so does an
    interpreter that ends without leaving it.

    At a URL no lock can be held. There the last Saver made for a folder owns it, and one made before (of a run whose
    machine was given up as lost, and lives) finds its next save refused.
    """

    def __init__(self, folder: Folder, keep: int) -> None:
        """`keep`: the checkpoints of a step that stay. FolderError, OSError where the folder cannot be written."""
        owner = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "id": uuid.uuid4().hex,
        }
        self._owner = json.dumps(owner).encode()
        if not folder.is_here:
            folder.write(OWNER_FILE, self._owner)
        self._folder = folder
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._jobs: deque[Future[None]] = deque()
        self._error: Exception | None = None

    def save(self, kind: str, given: Checkpoint) -> None:
        """Hands over a checkpoint of `kind`, "step" or "best"; its arrays are the saver's from now on.

        Waits only while two are still to be written.
        """
        while len(self._jobs) >= WAITING:
            self._jobs.popleft().result()
        self._raise()
        self._jobs.append(self._thread.submit(self._write, kind, given))

    def wait(self) -> None:
        """Until all that was handed over is written."""
        while self._jobs:
            self._jobs.popleft().result()
        self._raise()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:  # else that one is told
            self.close()

    def _write(self, kind: str, given: Checkpoint) -> None:
        if self._error:
            return
        try:
            self._check_owner(checkpoint.file_name(kind, given.step))
            checkpoint.save(self._folder, kind, given)
            if kind == "step":
                checkpoint.prune(self._folder, self._keep, given.step)
        except Exception as error:
            self._error = error

    def _check_owner(self, name: str) -> None:
        if self._folder.is_here:
            return
        try:
            owner = self._folder.read(OWNER_FILE)
        except FileNotFoundError:  # a person's doing, no other run's
            return
        except FolderError as error:
            raise checkpoint.not_written(self._folder, name, error) from None
        if owner != self._owner:
            raise CheckpointError(
                f"{self._folder}/{name}: checkpoint not written: another process trains there now: "
                f"{owner.decode(errors='replace')}; end it, or leave it the folder"
            )

    def _raise(self) -> None:
        if self._error:
            raise self._error
