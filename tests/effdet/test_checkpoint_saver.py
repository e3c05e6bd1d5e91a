"""Saving beside training: in order, bounded, no error lost, and nothing lost where the interpreter ends."""

import os
import resource
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

from effdet import checkpoint
from effdet.checkpoint import Checkpoint, CheckpointError
from effdet.checkpoint_saver import OWNER_FILE, Saver
from effdet.folder import Folder


def made(step, best_step=None, size=1000):
    return Checkpoint(step, {"a": np.full(size, step, np.float64)}, {"epochs": step}, best_step)


class GatedFolder(Folder):
    """A slow disk: what is to be written waits for the gate."""

    def __init__(self, where):
        super().__init__(where)
        self.gate = threading.Event()

    def write(self, name, content):
        assert self.gate.wait(60)
        super().write(name, content)


def test_written_in_order_and_pruned(tmp_path):
    with Saver(Folder(tmp_path), keep=2) as saver:
        for step in range(1, 7):
            if step % 2:
                saver.save("best", made(step))
            saver.save("step", made(step, best_step=step - 1 + step % 2))
    kept = ["best-00000005", "step-00000005", "step-00000006"]
    assert Folder(tmp_path).names() == [f"{name}.safetensors" for name in kept]
    found = checkpoint.latest(tmp_path, report=pytest.fail)
    assert (found.step, found.best_step, found.state) == (6, 5, {"epochs": 6})
    assert found.arrays["a"].tolist() == [6.0] * 1000


def test_two_go_on_at_once_and_a_third_waits(tmp_path):
    """The best and the step that names it are handed over at once; more would fill the memory."""
    folder = GatedFolder(tmp_path)
    with Saver(folder, keep=9) as saver:
        saver.save("best", made(1))
        saver.save("step", made(1, best_step=1))
        assert folder.names() == []  # and here training goes on
        third = threading.Thread(target=saver.save, args=("step", made(2)))
        third.start()
        third.join(0.2)
        assert third.is_alive()
        folder.gate.set()
        third.join(60)
        assert not third.is_alive()
        saver.wait()
        assert len(folder.names()) == 3


def test_what_is_written_is_let_go(tmp_path):
    with Saver(Folder(tmp_path), keep=1) as saver:
        given = made(1)
        array = weakref.ref(given.arrays["a"])
        saver.save("step", given)
        del given
        saver.wait()
        assert array() is None


def test_an_error_is_told_at_every_later_call_and_nothing_more_is_written(tmp_path):
    saver = Saver(Folder(tmp_path), keep=9)
    saver.save("step", made(1))
    saver.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        saver.save("step", made(2, size=100_000))
        words = r"step-00000002\.safetensors: checkpoint not written: .*File too large; earlier ones are intact"
        with pytest.raises(CheckpointError, match=words):
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for call in (lambda: saver.save("step", made(3)), saver.wait, saver.close):
        with pytest.raises(CheckpointError, match=words):
            call()
    assert Folder(tmp_path).names() == ["step-00000001.safetensors"]


def test_after_one_that_failed_the_one_that_waits_is_not_written(tmp_path):
    (tmp_path / "step-00000001.safetensors").mkdir()  # in the way
    folder = GatedFolder(tmp_path)
    saver = Saver(folder, keep=9)
    saver.save("step", made(1))
    saver.save("step", made(2))
    folder.gate.set()
    with pytest.raises(CheckpointError, match="step-00000001"):
        saver.close()
    assert folder.names() == ["step-00000001.safetensors"]


def test_leaving_by_another_error_writes_what_was_handed_over_and_tells_that_error(tmp_path):
    def train():
        with Saver(Folder(tmp_path), keep=1) as saver:
            saver.save("step", made(1, size=100_000))
            raise RuntimeError("fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        train()
    assert checkpoint.latest(tmp_path, report=pytest.fail).step == 1


def test_at_a_url_the_saver_made_last_owns_the_folder():
    """A run was given up as lost and begun again elsewhere, and lives."""
    place = "memory://owned/run"
    with Saver(Folder(place), keep=3) as second_chance:
        second_chance.save("step", made(1))
    lost = Saver(Folder(place), keep=3)
    lost.save("step", made(2))
    lost.wait()
    with Saver(Folder(place), keep=3) as again:
        lost.save("step", made(3))
        name = f"{place}/step-00000003.safetensors"
        words = rf"^{name}: checkpoint not written: another process trains there now: .*{os.getpid()}.*; end it"
        with pytest.raises(CheckpointError, match=words):
            lost.close()
        again.save("step", made(4))
    assert Folder(place).names() == [OWNER_FILE, *(f"step-0000000{step}.safetensors" for step in (1, 2, 4))]


ENDS = """
import sys
import numpy as np
from effdet.checkpoint import Checkpoint
from effdet.checkpoint_saver import Saver
from effdet.folder import Folder
saver = Saver(Folder(sys.argv[1]), 1)
saver.save("best", Checkpoint(1, {"a": np.ones(5_000_000)}, {}))
saver.save("step", Checkpoint(1, {"a": np.ones(5_000_000)}, {}, 1))
raise RuntimeError("training fell over")
"""


@pytest.mark.slow
def test_an_interpreter_that_falls_over_ends_and_loses_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: training fell over")
    found = checkpoint.latest(tmp_path, report=pytest.fail)
    assert (found.step, found.best_step) == (1, 1)
