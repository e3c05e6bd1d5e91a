"""Training over several machines, with the launchers themselves: two network namespaces, mpirun, Slurm on one node."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import launchers
from pipeline.errors import RETRY_EXIT
from pipeline.local import Local
from tests.pipeline.many_hosts import ADDRESSES, INTERFACE, TwoHosts
from tests.pipeline.one_node_slurm import OneNodeSlurm
from tests.pipeline.tiny_training import make_shards

ROOT = Path(__file__).parents[2]
TRAINING = [sys.executable, "-m", "tests.pipeline.tiny_training"]
LAUNCHED = [sys.executable, "-m", "tests.pipeline.launched"]


@pytest.fixture
def two_hosts(tmp_path):
    if os.geteuid():
        pytest.fail("network namespaces are root's")
    with TwoHosts(tmp_path) as hosts:
        yield hosts


def trained(folder, line, environment=None):
    """The weights of a tiny training whose ranks `line` starts."""
    make_shards(folder / "shards")
    done = subprocess.run(
        [*line, *TRAINING, str(folder)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return (folder / "model" / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The weights of two ranks on this machine."""
    folder = tmp_path_factory.mktemp("here")
    return trained(folder, launchers.horovodrun(2, Local()))


@pytest.mark.system
@pytest.mark.needs("ip", "sshd")
def test_two_hosts_train_what_one_does(two_hosts, here, tmp_path):
    hosts = [f"{address}:1" for address in ADDRESSES.values()]
    line = launchers.horovodrun(2, Local(hosts=hosts, network_interface=INTERFACE))
    weights = trained(tmp_path / "run", two_hosts.line_on("a", *line), two_hosts.environment())
    assert weights == here


@pytest.mark.system
@pytest.mark.needs("mpirun", "mpicxx")
def test_mpirun_trains_the_same(here, tmp_path):
    line = launchers.mpirun(2, Local(launcher="mpirun"))
    weights = trained(tmp_path, line)
    assert weights == here


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if os.geteuid():
        pytest.fail("slurmd starts jobs for others as root only")
    with OneNodeSlurm(tmp_path_factory.mktemp("slurm")) as node:
        yield node


def submit(slurm, folder):
    """Starts a job of two ranks with the project's own launcher, which waits for it."""
    environment = {
        **slurm.environment,
        "EFFDET_LAUNCHER": "slurm",
        "EFFDET_SLURM": "{ranks_per_node: 2}",
        "PYTHONPATH": str(ROOT),  # the job's folder is the test's: its log is written there
    }
    line = [*LAUNCHED, str(folder)]
    return subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def task(folder, word):
    for rank in "01":
        (folder / rank).write_text(word)


@pytest.mark.system
@pytest.mark.needs("slurmctld", "slurmd", "munged", "sbatch")
def test_slurm_job_brings_the_ranks_together(slurm, tmp_path):
    task(tmp_path, "meet")
    output, _ = (process := submit(slurm, tmp_path)).communicate(timeout=600)
    assert process.returncode == 0, output
    assert [(tmp_path / f"mean-{rank}").read_text() for rank in "01"] == ["3.5", "3.5"]  # of 0 + 3 and 1 + 3
    assert "Slurm job" in output


@pytest.mark.system
@pytest.mark.needs("slurmctld", "slurmd", "munged", "sbatch")
def test_slurm_ranks_are_asked_to_save(slurm, tmp_path):
    task(tmp_path, "save")
    process = submit(slurm, tmp_path)
    wait_for_ranks(tmp_path)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == RETRY_EXIT, output
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


@pytest.mark.system
@pytest.mark.needs("slurmctld", "slurmd", "munged", "sbatch")
def test_a_failed_rank_ends_the_slurm_job(slurm, tmp_path):
    task(tmp_path, "sleep")
    (tmp_path / "1").write_text("fail")
    output, _ = (process := submit(slurm, tmp_path)).communicate(timeout=300)
    assert process.returncode == 1
    assert "1: error: this rank was told to fail" in output
    assert output.strip().splitlines()[-1].startswith("error: tests.pipeline.launched failed on 2 ranks (exit")


@pytest.mark.system
@pytest.mark.needs("mpirun", "mpicxx")
def test_mpirun_hands_on_that_ranks_saved(tmp_path):
    task(tmp_path, "save")
    line = [*LAUNCHED, str(tmp_path)]
    environment = {**os.environ, "EFFDET_LAUNCHER": "mpirun"}
    process = subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_ranks(tmp_path)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == RETRY_EXIT, output
    assert len(list(tmp_path.glob("saved-*"))) == 2


def wait_for_ranks(folder):
    deadline = time.monotonic() + 300
    while len(list(folder.glob("pid-*"))) < 2:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.1)
