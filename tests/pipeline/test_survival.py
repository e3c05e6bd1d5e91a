"""What ends a run, and what is left of it: kills, signals, bad numbers, ranks that disagree. Real processes."""

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from pipeline.errors import RETRY_EXIT
from tests.pipeline.tiny_training import ROOT, make_shards

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, "-m", "tests.pipeline.tiny_training"]
STEPS = 5  # of two ranks of 4 images: 10 images an epoch, so that the 4 epochs end after steps 1, 2, 3 and 5


def contents(folder):
    """Every file's bytes, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train(folder, *options, ranks=1):
    """Runs the tiny training of `folder` to its end, whatever that is."""
    if not (folder / "shards").exists():
        make_shards(folder / "shards")
    launcher = ["horovodrun", "--gloo", "-np", str(ranks)] if ranks > 1 else []
    line = [*launcher, *PROGRAM, str(folder), *options]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=1000)


def trained(folder, *options, ranks=1):
    done = train(folder, *options, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def wait_for_the_end(folder):
    """Until no process of the job is left: a rank may outlive its launcher for a while."""
    deadline = time.monotonic() + 300
    while True:
        left = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                left += [process] if str(folder) in (process.info["cmdline"] or []) else []
        if not left:
            return
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two ranks hand on that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    trained(folder, ranks=2)
    return contents(folder / "model")


@pytest.mark.parametrize("what", ["kill", "kill-all", "kill-launcher"])
def test_killed_at_a_random_step_and_resumed_hands_on_the_same_bytes(whole, tmp_path, what):
    step = random.randrange(1, STEPS)
    killed = train(tmp_path, "--at", str(step), what, ranks=2)
    assert killed.returncode != 0, f"at step {step}"
    assert not (tmp_path / "model" / "model.json").exists()
    wait_for_the_end(tmp_path)
    trained(tmp_path, ranks=2)
    assert contents(tmp_path / "model") == whole, f"at step {step}"
    assert len(json.loads(whole["provenance.json"])["ranks"]) == 2


def test_asked_to_stop_all_ranks_stop_after_one_step_and_go_on_to_the_same_bytes(whole, tmp_path):
    stopped = train(tmp_path, "--at", "1", "term", ranks=2)
    assert stopped.returncode != 0
    told = re.findall(r"stopped: training: asked to stop; saved after step (\d)", stopped.stderr + stopped.stdout)
    assert len(told) == 2  # a rank each
    assert len(set(told)) == 1
    assert f"going on after epoch {1 if told[0] == '2' else 2}, step {told[0]}" in trained(tmp_path, ranks=2)
    assert contents(tmp_path / "model") == whole


@pytest.fixture(scope="module")
def whole_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole_alone")
    trained(folder)
    return contents(folder / "model")


def test_a_stopped_process_asks_to_be_started_again(whole_alone, tmp_path):
    stopped = train(tmp_path, "--at", "3", "term")
    assert stopped.returncode == RETRY_EXIT == 75
    assert "stopped: training: asked to stop; saved after step 5; the same command goes on from there" in stopped.stderr
    assert list(tmp_path.glob("checkpoints/*/step-00000005.safetensors"))  # epoch 2 ends there: 3 and 4 were at work
    trained(tmp_path)
    assert contents(tmp_path / "model") == whole_alone


def test_position_within_an_epoch_comes_back(whole_alone, tmp_path):
    """10 images an epoch in steps of 4: a checkpoint after each step, also within epochs."""
    options = ("--train", json.dumps({"checkpoint_every": 0.4}))
    killed = train(tmp_path, "--at", "7", "kill", *options)
    assert killed.returncode == -signal.SIGKILL
    # Epoch 3 takes the seventh step to its end at 28 images. Saving goes on beside training: the last may be lost.
    assert re.search("going on after epoch 2, step [67]", trained(tmp_path, *options))
    assert contents(tmp_path / "model") == whole_alone


def test_numbers_that_are_none_end_the_run_and_leave_the_batch(tmp_path):
    done = train(
        tmp_path,
        "--train",
        json.dumps({"learning_rate": 1e30, "clip_norm": 1e30, "warmup_epochs": 1.0, "evaluate_every": 4}),
    )
    assert done.returncode == 1
    told = re.search(
        r"error: training: step (\d+): not finite .* rank 0: loss nan, image ids \[([\d, ]+)\]; "
        r"4 such steps in a row \(max_bad_steps 3\); the batch is in (\S+):",
        done.stderr,
    )
    assert told, done.stderr
    with np.load(told[3]) as batch:
        assert batch["image_id"].tolist() == json.loads(f"[{told[2]}]")
        assert batch["image"].dtype == np.uint8
    assert "left out" in done.stdout


def test_ranks_that_disagree_are_refused_and_what_differs_is_named(tmp_path):
    done = train(tmp_path, "--others", json.dumps({"seed": 9}), ranks=2)
    assert done.returncode != 0
    message = "training: ranks [1] have other shards, parameters or code than rank 0 (train.seed: 1, there 9)"
    assert (done.stdout + done.stderr).count(message) == 2  # on both


def test_another_number_of_ranks_goes_on_and_says_so(tmp_path):
    assert train(tmp_path, "--at", "2", "kill", ranks=2).returncode != 0
    wait_for_the_end(tmp_path)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    local = json.dumps({"resume_from": str(folder)})
    output = trained(tmp_path, "--local", local)
    assert re.search(r"goes on after step [12] of 2 ranks on 1: from here a step is of 4 images, and the", output)
    sizes = json.loads((tmp_path / "model" / "provenance.json").read_text())["ranks_from_step"]
    assert [size for _, size in sizes] == [2, 1]
    # and what is not another number of ranks is refused
    done = train(tmp_path, "--local", local, "--train", json.dumps({"seed": 9, "weight_decay": 0.0}))
    assert done.returncode == 1
    assert "its checkpoints are of other inputs: train.seed: 9, there 1; train.weight_decay: 0.0, there" in done.stderr


def test_checkpoints_put_in_another_runs_folder_are_refused(tmp_path):
    trained(tmp_path, "--train", json.dumps({"epochs": 1}))
    (first,) = (tmp_path / "checkpoints").iterdir()
    other = ("--train", json.dumps({"epochs": 1, "seed": 9}))
    trained(tmp_path, *other)
    (second,) = set((tmp_path / "checkpoints").iterdir()) - {first}
    for path in first.glob("*.safetensors"):
        (second / path.name).write_bytes(path.read_bytes())
    done = train(tmp_path, *other)
    assert done.returncode == 1
    assert "its checkpoints are of other inputs: train.seed: 9, there 1" in done.stderr
