"""Checkpoints at a URL, with Debian's sshd on loopback: found by ssh's own configuration, cut off, frozen and full."""

import contextlib
import getpass
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import psutil
import pytest

from effdet import checkpoint
from effdet.checkpoint import CheckpointError
from effdet.checkpoint_saver import Saver
from effdet.folder import Folder, FolderError
from tests.effdet.test_checkpoint import assert_same, flip_last_bit, made, survives_kills
from tests.effdet.test_checkpoint_saver import ENDS

pytestmark = [pytest.mark.system, pytest.mark.needs("sshd")]
SSHD = "/usr/sbin/sshd"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """An sshd of this user's, and the home folder of one who may log in."""

    def __init__(self, folder):
        self.home, self.port = folder / "home", free_port()
        self.options = folder / "sshd_config"
        ssh = self.home / ".ssh"
        ssh.mkdir(parents=True, mode=0o700)
        for key in (folder / "host_key", ssh / "id_ed25519"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        host_key = (folder / "host_key.pub").read_text()
        (ssh / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}")
        (ssh / "config").write_text(
            f"Host stores\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {ssh}/id_ed25519\n"
        )
        self.options.write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {ssh}/id_ed25519.pub\nStrictModes no\nSubsystem sftp internal-sftp\nPrintLastLog no\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.start()

    def start(self, largest_file=resource.RLIM_INFINITY):
        def bounded():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write, as on a full disk, not the end
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))

        log = self.options.with_suffix(".log").open("ab")
        line = [SSHD, "-D", "-e", "-f", str(self.options)]
        self.process = psutil.Popen(line, stderr=log, preexec_fn=bounded)
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError(self.options.with_suffix(".log").read_text())

    def client(self):
        """Variables with which a program's ssh reaches it, as `stores`.

        OpenSSH looks for the user's configuration in the passwd's home, not in HOME: an ssh of its name brings it.
        """
        program = self.home / "bin" / "ssh"
        program.parent.mkdir()
        options = f"-F {self.home}/.ssh/config -o UserKnownHostsFile={self.home}/.ssh/known_hosts"
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
        program.chmod(0o755)
        return {"HOME": str(self.home), "PATH": f"{program.parent}:{os.environ['PATH']}"}

    def sessions(self):
        return self.process.children(recursive=True)

    def cut(self):
        """Ends the sessions; the server lives."""
        kill(self.sessions())

    def stop(self):
        if self.process.is_running():
            kill([self.process, *self.sessions()])


def kill(processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a session that ended by itself since it was listed
            process.kill()
    psutil.wait_procs(processes, timeout=60)


@pytest.fixture
def server(tmp_path, monkeypatch):
    started = Server(tmp_path / "server")
    monkeypatch.setenv("HOME", str(started.home))
    yield started
    started.stop()


@pytest.fixture
def place(server, tmp_path):
    return f"sftp://stores{tmp_path}/run"


def test_saved_read_and_pruned(place, tmp_path):
    checkpoint.save(place, "best", made(1))
    for step in (1, 2, 3):
        checkpoint.save(place, "step", made(step, best_step=1))
    checkpoint.prune(place, keep=2, newest=3)
    kept = ["best-00000001.safetensors", "step-00000002.safetensors", "step-00000003.safetensors"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == kept
    assert_same(checkpoint.latest(place, report=pytest.fail), made(3, best_step=1))
    assert_same(checkpoint.read(tmp_path / "run" / kept[-1]), made(3, best_step=1))  # the same file as here
    content = bytearray((tmp_path / "run" / kept[-1]).read_bytes())
    flip_last_bit(content)
    (tmp_path / "run" / kept[-1]).write_bytes(content)
    told = []
    assert_same(checkpoint.latest(place, report=told.append), made(2, best_step=1))
    assert f"{place}/{kept[-1]}: damaged: " in told[0]


def test_none_where_there_is_no_such_folder(place):
    assert checkpoint.latest(place, report=pytest.fail) is None


def test_killed_at_any_time_every_saved_checkpoint_is_whole(place):
    survives_kills(place, kills=6, longest=0.2)


def test_a_connection_cut_between_two_saves_costs_nothing(server, place):
    with Saver(Folder(place), keep=2) as saver:
        saver.save("step", made(1))
        saver.wait()
        assert server.sessions()
        server.cut()
        saver.save("step", made(2))
    assert checkpoint.latest(place, report=pytest.fail).step == 2


def test_a_server_that_is_gone_is_named_and_never_taken_for_an_empty_one(server, place, tmp_path):
    saver = Saver(Folder(place), keep=2)
    saver.save("step", made(1))
    saver.wait()
    server.stop()
    saver.save("step", made(2))
    name = f"{place}/step-00000002.safetensors"
    with pytest.raises(CheckpointError, match=f"^{name}: checkpoint not written: .*; earlier ones are intact"):
        saver.close()
    with pytest.raises(FolderError, match=f"^{place}: "):
        checkpoint.latest(place, report=pytest.fail)
    server.start()
    assert_same(checkpoint.latest(place, report=pytest.fail), made(1))


def test_a_server_that_falls_silent_ends_the_save(server, place, monkeypatch):
    """fsspec's configuration stands above our time-outs, which are longer than a test likes."""
    monkeypatch.setitem(fsspec.config.conf, "sftp", {"keepalive_interval": 1, "connect_timeout": 2})
    saver = Saver(Folder(place), keep=2)
    saver.save("step", made(1))
    saver.wait()
    frozen = [server.process, *server.sessions()]
    for process in frozen:
        process.suspend()
    saver.save("step", made(2))
    with pytest.raises(CheckpointError, match=f"^{place}/step-00000002.safetensors: checkpoint not written: "):
        saver.close()
    for process in frozen:
        process.resume()
    assert checkpoint.latest(place, report=pytest.fail).step == 1


def test_a_full_disk_there(server, place, tmp_path):
    checkpoint.save(place, "step", made(1))
    server.stop()
    server.start(largest_file=2_000)
    with pytest.raises(CheckpointError, match=r"step-00000002\.safetensors: checkpoint not written: .*earlier ones"):
        checkpoint.save(place, "step", made(2))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000001.safetensors"]
    assert_same(checkpoint.latest(place, report=pytest.fail), made(1))


def test_an_unknown_host_is_not_trusted(server, place):
    known = server.home / ".ssh" / "known_hosts"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(server.home / "other")], check=True)
    known.write_text(f"[127.0.0.1]:{server.port} {(server.home / 'other.pub').read_text()}")
    with pytest.raises(FolderError, match=r"^sftp://stores/.*HostKeyNotVerifiable"):
        checkpoint.latest(place, report=pytest.fail)


def test_an_interpreter_that_falls_over_ends_and_loses_nothing(place):
    done = subprocess.run([sys.executable, "-c", ENDS, place], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "RuntimeError: training fell over" in done.stderr
    found = checkpoint.latest(place, report=pytest.fail)
    assert (found.step, found.best_step) == (1, 1)
