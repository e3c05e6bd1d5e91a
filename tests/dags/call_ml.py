"""Run by Airflow's Python: a command by dags.ml.run_ml, as a task runs it. The command is this file too."""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType


def answer() -> None:
    run = json.loads(Path(sys.argv[3]).read_text())
    print(json.dumps({"arguments": sys.argv[1:], "run": run, "variables": sorted(os.environ)}))


def fail() -> None:
    print("To track the changes with git, run:", file=sys.stderr)
    sys.exit(
        "error: params.yaml: a is wrong\nparams.yaml: b is wrong\nERROR: failed to reproduce\nerror: of the caller"
    )


def wait() -> None:
    def told(number: int, frame: FrameType | None) -> None:
        Path(sys.argv[2]).write_text("told to stop")
        sys.exit(os.EX_TEMPFAIL)

    signal.signal(signal.SIGTERM, told)
    print("waits", file=sys.stderr, flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__" and "ML_PYTHON" in os.environ and "CALLED" not in os.environ:
    from dags.ml import run_ml

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    found = run_ml(
        "tests.dags.call_ml",
        [*sys.argv[1:], "run.json"],
        files={"run.json": {"a": 1}},
        environment={"MINE": "1", "CALLED": "1"},
    )
    print(json.dumps(found))
elif __name__ == "__main__":
    {"answer": answer, "fail": fail, "wait": wait}[sys.argv[1]]()
