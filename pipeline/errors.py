"""The errors of the stages, and how a stage ends when one is met: one line for a person, exit 1 (75: run it again)."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from effdet.errors import EffdetError

RETRY_EXIT = os.EX_TEMPFAIL  # 75: what a job ends with that was told to stop, and goes on when it is run again


class PipelineError(Exception):
    """Names what is wrong, where it stands, what was found and what to do."""


class Preempted(PipelineError):  # noqa: N818 nothing went wrong
    """The job was told to stop and has saved what it did; run again, it goes on there. Exit 75."""


def run(main: Callable[[], None]) -> None:
    """Runs a stage or a command. An error that a person can mend ends it with one line and exit 1, no traceback."""
    signal.signal(signal.SIGTERM, _end)
    try:
        main()
    except Preempted as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(RETRY_EXIT)
    except (PipelineError, EffdetError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """As Ctrl-C ends it: what is half written is removed on the way out."""
    raise KeyboardInterrupt
