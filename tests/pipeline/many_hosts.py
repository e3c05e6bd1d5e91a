"""Two machines on one: network namespaces with an address and an sshd each, for test_many_hosts.py.

Processes, files and users are shared; the network is not: what one side says to the other goes over a cable (veth)
that can be cut. Needs root, ip and sshd.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PREFIX = "effdet-test-"
SIDES = ("a", "b")
ADDRESSES = {"a": "10.213.77.1", "b": "10.213.77.2"}
INTERFACE = "effdet0"  # the same name on both sides, as Gloo asks
NAMES = {side: Path("/etc/netns") / (PREFIX + side) / "hosts" for side in SIDES}
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def run(*line: str) -> None:
    subprocess.run(line, check=True, capture_output=True)


class TwoHosts:
    """Use it as a context: at its end nothing of it is left, whatever happened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "TwoHosts":
        self._remove()  # what a killed test left
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()

    def _build(self) -> None:
        for side in SIDES:
            run("ip", "netns", "add", PREFIX + side)
            self.on(side, "ip", "link", "set", "lo", "up")
            # `ip netns exec` puts it in the place of /etc/hosts: a host's name leads to an address that others reach.
            NAMES[side].parent.mkdir(parents=True)
            NAMES[side].write_text(f"127.0.0.1 localhost\n{ADDRESSES[side]} {socket.gethostname()}\n")
        ends = ["name", INTERFACE, "netns", PREFIX + "b"]
        run("ip", "link", "add", INTERFACE, "netns", PREFIX + "a", "type", "veth", "peer", *ends)
        for side in SIDES:
            self.on(side, "ip", "address", "add", f"{ADDRESSES[side]}/24", "dev", INTERFACE)
            self.on(side, "ip", "link", "set", INTERFACE, "up")
        for key in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        shutil.copy(self.folder / "user.pub", self.folder / "authorized_keys")
        config = {
            "HostKey": self.folder / "host",
            "AuthorizedKeysFile": self.folder / "authorized_keys",
            "PidFile": "none",
            "StrictModes": "no",  # the folder is the test's, and not only its user's
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "MaxStartups": "100",
        }
        (self.folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in config.items()))
        # horovodrun and mpirun call ssh by its name: the first on PATH is one with our key, and no file of the user's.
        (self.folder / "bin").mkdir()
        ssh = self.folder / "bin" / "ssh"
        options = f"-F none -i {self.folder / 'user'} -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} -o LogLevel=ERROR "$@"\n')
        ssh.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd will not start without
        for side in SIDES:
            self.start_sshd(side)

    def start_sshd(self, side: str) -> None:
        line = [str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config"), "-o", f"ListenAddress={ADDRESSES[side]}"]
        with (self.folder / f"sshd-{side}.log").open("ab") as log:
            self._daemons.append(subprocess.Popen(self.line_on(side, *line), stderr=log, start_new_session=True))
        deadline = time.monotonic() + 30
        probe = ["bash", "-c", f"exec 3<>/dev/tcp/{ADDRESSES[side]}/22"]
        while subprocess.run(self.line_on(side, *probe), capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, (self.folder / f"sshd-{side}.log").read_text()
            time.sleep(0.1)

    def line_on(self, side: str, *line: str) -> list[str]:
        """The command line that runs `line` on a side."""
        return ["ip", "netns", "exec", PREFIX + side, *line]

    def on(self, side: str, *line: str) -> None:
        run(*self.line_on(side, *line))

    def environment(self) -> dict[str, str]:
        """For commands that are to reach the other side by ssh."""
        return {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def cut(self) -> None:
        """Pulls the cable: packets are lost, and nobody is told."""
        self.on("b", "ip", "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        self.on("b", "ip", "link", "set", INTERFACE, "up")

    def processes(self, side: str) -> list[int]:
        found = subprocess.run(
            ["ip", "netns", "pids", PREFIX + side], capture_output=True, text=True, check=False
        ).stdout
        return [int(pid) for pid in found.split()]

    def kill(self, side: str) -> None:
        """As a power cut does: every process of a side. start_sshd brings it back."""
        for pid in self.processes(side):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _remove(self) -> None:
        for side in SIDES:
            self.kill(side)
        for daemon in self._daemons:
            daemon.wait(timeout=30)
        for side in SIDES:
            subprocess.run(["ip", "netns", "delete", PREFIX + side], capture_output=True, check=False)
            shutil.rmtree(NAMES[side].parent, ignore_errors=True)
