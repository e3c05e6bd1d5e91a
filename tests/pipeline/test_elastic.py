"""Ranks that come and go: two hosts (network namespaces) train together, one is lost, and returns."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import launchers
from pipeline.local import Elastic, Local
from tests.pipeline.many_hosts import ADDRESSES, INTERFACE, TwoHosts
from tests.pipeline.tiny_training import make_shards

pytestmark = [pytest.mark.system, pytest.mark.needs("ip", "sshd")]

ROOT = Path(__file__).parents[2]
EPOCHS = 80


@pytest.fixture
def two_hosts(tmp_path):
    if os.geteuid():
        pytest.fail("network namespaces are root's")
    (tmp_path / "hosts").mkdir()
    with TwoHosts(tmp_path / "hosts") as hosts:
        yield hosts


@pytest.fixture
def job(two_hosts, tmp_path):
    """An elastic training of one to two ranks, its words in a file."""
    folder = tmp_path / "run"
    make_shards(folder / "shards")
    discovery = tmp_path / "discovery.sh"
    discovery.write_text("#!/bin/sh\n" + "".join(f"echo {address}:1\n" for address in ADDRESSES.values()))
    discovery.chmod(0o755)
    elastic = Elastic(min_ranks=1, max_ranks=2, discovery=str(discovery), cooldown_seconds=5)
    line = launchers.horovodrun(2, Local(network_interface=INTERFACE, elastic=elastic, stall_seconds=30))
    train = {"ranks": 2, "epochs": EPOCHS, "schedule_epochs": EPOCHS, "evaluate_every": EPOCHS}
    program = [sys.executable, "-m", "tests.pipeline.tiny_training", str(folder), "--slow", "0.4"]
    environment = {**two_hosts.environment(), "PYTHONUNBUFFERED": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            two_hosts.line_on("a", *line, *program, "--train", json.dumps(train)),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    yield folder, process
    process.kill()
    process.wait()


def wait_for(job, pattern, count=1):
    folder, process = job
    deadline = time.monotonic() + 400
    while len(re.findall(pattern, (folder / "log").read_text())) < count:
        assert process.poll() is None, (folder / "log").read_text()[-6000:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-6000:]
        time.sleep(0.5)


def test_lost_host_is_dropped_and_training_goes_on_and_a_returning_one_joins(two_hosts, job):
    folder, process = job
    wait_for(job, r"epoch 4/80")
    two_hosts.kill("b")
    wait_for(job, r"going on after epoch \d+, step \d+")
    two_hosts.start_sshd("b")
    wait_for(job, r"going on after epoch \d+, step \d+", count=2)
    process.wait(timeout=600)
    assert process.returncode == 0, (folder / "log").read_text()[-6000:]
    sizes = json.loads((folder / "model" / "provenance.json").read_text())["ranks_from_step"]
    assert [size for _, size in sizes] == [2, 1, 2]
    assert sorted(step for step, _ in sizes) == [step for step, _ in sizes]
    history = (folder / "model" / "dvclive" / "plots" / "metrics" / "train" / "loss.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in history[1:]] == [str(epoch) for epoch in range(1, EPOCHS + 1)]
