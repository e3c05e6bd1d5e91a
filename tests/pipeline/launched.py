"""What test_launch.py and test_many_hosts.py start.

`python -m tests.pipeline.launched FOLDER` launches two ranks of this module, where EFFDET_ variables say. A rank notes
its process id in FOLDER, and does then what FOLDER/RANK says:

  sleep   for a minute
  deaf    the same, whatever signal comes
  fail    with a word
  save    on SIGTERM, for longer than horovodrun waits, then ends with 75
  hang    comes to the third allreduce of all ranks not at all
  freeze  stops as a whole there
  meet    at the allreduces, and ends
"""

import os
import signal
import sys
import time
from pathlib import Path

from pipeline import local
from pipeline.errors import RETRY_EXIT, run
from pipeline.launch import launch
from pipeline.launchers import WORKER

RANKS = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")
SAVING = 7  # seconds; horovodrun kills a rank 5 s after its signal


def rank() -> None:
    folder = Path(os.environ["LAUNCHED_FOLDER"])
    number = next(os.environ[name] for name in RANKS if name in os.environ)
    task = (folder / number).read_text()
    if task == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if task == "save":
        signal.signal(signal.SIGTERM, lambda *_: save(folder, number))
    (folder / f".{number}").write_text(str(os.getpid()))
    (folder / f".{number}").rename(folder / f"pid-{number}")
    while len(list(folder.glob("pid-*"))) < 2:
        time.sleep(0.05)
    if task == "fail":
        sys.exit("error: this rank was told to fail")
    if task in ("meet", "hang", "freeze"):
        meet(folder, number, task)
    else:
        for _ in range(600):
            time.sleep(0.1)


def save(folder: Path, number: str) -> None:
    time.sleep(SAVING)
    (folder / f"saved-{number}").write_text("")
    sys.exit(RETRY_EXIT)


def meet(folder: Path, number: str, task: str) -> None:
    import tensorflow as tf

    from effdet.distributed import connect

    ranks = connect(2)
    step = tf.function(lambda x: ranks.average([x, 2 * x], "gradients"))
    for turn in range(4):
        if turn == 2 and task == "hang":
            time.sleep(600)
        if turn == 2 and task == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        (mean, _) = step(tf.constant(float(ranks.rank + turn)))
    (folder / f"mean-{number}").write_text(str(float(mean)))


def main() -> None:
    os.environ["LAUNCHED_FOLDER"] = sys.argv[1]
    launch("tests.pipeline.launched", ranks=2, where=local.load())


if __name__ == "__main__":
    if sys.argv[1] == WORKER:
        rank()
    else:
        run(main)
