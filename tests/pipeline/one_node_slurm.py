"""Slurm on this machine for test_many_hosts.py: munged, slurmctld, slurmd as children, on loopback, in one folder."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CONFIG = """
ClusterName=effdet-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=10
NodeName=effdet NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=effdet Default=YES MaxTime=INFINITE State=UP
"""


class OneNodeSlurm:
    """Use it as a context: at its end no daemon is left. `environment` is what sbatch and its friends need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "OneNodeSlurm":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        ports = {"controller_port": free_port(), "node_port": free_port()}
        (self.folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=self.folder, **ports))
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files = [f"--{option}={self.folder / name}" for option, name in names.items()]
        self._daemon("munged", "--foreground", "--force", *files, f"--log-file={self.folder / 'munge.log'}")
        self._wait_for("munge", f"--socket={self.folder / 'munge.socket'}", "--no-input")
        self._daemon("slurmctld", "-D")
        self._wait_for("scontrol", "ping")
        self._daemon("slurmd", "-D", "-N", "effdet")
        self._wait_for("sh", "-c", "sinfo --noheader --format=%t | grep -qx idle")

    def _daemon(self, name: str, *options: str) -> None:
        program = str(shutil.which(name, path=PATH))
        with (self.folder / f"{name}.out").open("wb") as log:
            self._daemons.append(
                subprocess.Popen([program, *options], env=self.environment, stdout=log, stderr=log, process_group=0)
            )

    def _wait_for(self, *line: str) -> None:
        deadline = time.monotonic() + 60
        while subprocess.run(line, env=self.environment, capture_output=True, check=False).returncode:
            logs = (path.read_text()[-2000:] for path in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, "\n".join([" ".join(line), *logs])
            time.sleep(0.2)

    def __exit__(self, *error: object) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
