"""Submits a training job to Slurm, shows its log while it runs, and hands on a request to stop (Slurm 20 and later)."""

import subprocess
import threading
import time

from pipeline.errors import PipelineError
from pipeline.launchers import SLURM_LOG, sbatch_script
from pipeline.local import Local
from pipeline.rank_output import Heard

LOOK_SECONDS = 0.5  # between looks at the log


class SlurmJob:
    """`sbatch --wait`, whose exit code is the job's."""

    def __init__(self, module: str, ranks: int, where: Local, heard: Heard) -> None:
        self._heard = heard
        SLURM_LOG.parent.mkdir(parents=True, exist_ok=True)
        script = SLURM_LOG.with_name("slurm.sh")
        script.write_text(sbatch_script(module, ranks, where))
        try:
            self._process = subprocess.Popen(
                ["sbatch", "--wait", "--parsable", str(script)],
                process_group=0,  # Ctrl-C in a terminal is for this process
                stdout=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError:
            raise PipelineError("sbatch: not found: launcher slurm needs Slurm's programs on this machine") from None
        said = next(iter(self._process.stdout or ()), "")  # "12" or "12;cluster"
        self._number = said.strip().partition(";")[0]
        if not self._number:
            self._process.wait()
            raise PipelineError("sbatch: took no job; it said why above")
        self._log = SLURM_LOG.with_name(SLURM_LOG.name.replace("%j", self._number))
        print(f"Slurm job {self._number}; its log: {self._log}", flush=True)
        self._ended = threading.Event()
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def _follow(self) -> None:
        """Shows the log as it grows, until the job has ended and all is shown."""
        while not self._log.exists():
            if self._ended.wait(LOOK_SECONDS):
                return
        with self._log.open(errors="replace") as log:
            rest = ""
            while True:
                ended = self._ended.is_set()  # before the reading: what was written until then is read
                text = log.read()
                print(text, end="", flush=True)
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    self._heard.line(line)
                if ended:
                    return
                time.sleep(LOOK_SECONDS)

    def code(self) -> int | None:
        code = self._process.poll()
        if code is not None:
            self._ended.set()
            self._follower.join()
        return code

    def ask_to_stop(self) -> None:
        """Signals the ranks; a job that waits for nodes is taken back."""
        subprocess.run(["scancel", "--state=PENDING", self._number], check=False)
        subprocess.run(["scancel", "--state=RUNNING", "--signal=TERM", self._number], check=False)

    def end(self) -> None:
        subprocess.run(["scancel", self._number], check=False)
