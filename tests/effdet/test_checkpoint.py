"""Checkpoints: exact, whole or not there, and never trusted unseen. Here and in a store at a URL alike."""

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
import safetensors.numpy

from effdet import checkpoint
from effdet.checkpoint import Checkpoint, CheckpointError
from effdet.folder import Folder, FolderError
from tests.effdet import saving

STEP_1, STEP_2 = "step-00000001.safetensors", "step-00000002.safetensors"


@pytest.fixture(params=["here", "at a URL"])
def place(request, tmp_path):
    """A folder that does not exist yet."""
    if request.param == "here":
        yield tmp_path / "run"
    else:
        yield "memory://bucket/run"
        store = fsspec.filesystem("memory")
        if store.exists("/bucket"):
            store.rm("/bucket", recursive=True)


def made(step, best_step=None):
    values = np.random.default_rng(step)
    arrays = {
        "weights": values.standard_normal(1000).astype(np.float32),
        "optimizer/iterations": np.array(step, np.int64),  # of no dimension
        "turned": values.standard_normal((3, 5)).T,
        "none": np.zeros((0, 4), np.float16),
    }
    return Checkpoint(step, arrays, {"best_ap": 0.1 + 0.2, "rows": [{"epoch": 1}]}, best_step)


def assert_same(found, expected):
    assert (found.step, found.state, found.best_step) == (expected.step, expected.state, expected.best_step)
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()


def names(place):
    return Folder(place).names()


def change(place, name, edit):
    """A file's content edited where it lies."""
    folder = Folder(place)
    content = bytearray(folder.read(name))
    folder.write(name, bytes(edit(content) or content))


def flip_last_bit(content):
    content[-1] ^= 1


def test_comes_back_bit_for_bit(place):
    checkpoint.save(place, "step", made(120))
    assert names(place) == ["step-00000120.safetensors"]
    assert_same(checkpoint.load(place, "step", 120), made(120))


def test_a_file_tells_what_it_is(tmp_path):
    checkpoint.save(tmp_path, "best", made(1))
    checkpoint.save(tmp_path, "step", made(1, best_step=1))
    copied = tmp_path / "mine.safetensors"
    copied.write_bytes((tmp_path / STEP_1).read_bytes())
    assert checkpoint.is_checkpoint(copied)
    assert_same(checkpoint.read(copied), made(1, best_step=1))
    told = checkpoint.describe(copied)
    assert (told["step"], told["best_step"], told["state"]) == (1, 1, made(1).state)


@pytest.mark.parametrize("content", [b"", b"text of no such kind", safetensors.numpy.save({"a": np.zeros(3)})])
def test_other_files_are_no_checkpoints(tmp_path, content):
    (tmp_path / "other.safetensors").write_bytes(content)
    assert not checkpoint.is_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: damaged: "):
        checkpoint.read(tmp_path / "other.safetensors")


def test_none_in_an_empty_or_missing_folder(tmp_path, place):
    assert checkpoint.latest(tmp_path, report=pytest.fail) is None
    assert checkpoint.latest(place, report=pytest.fail) is None
    assert checkpoint.newest(place, "step") is None


def test_the_newest_by_number(place):
    for step in (2, 99_999_999, 100_000_000):  # nine digits: by name it stands before the others
        checkpoint.save(place, "best", made(step))
    assert checkpoint.newest(place, "best") == 100_000_000
    assert checkpoint.newest(place, "step") is None


DAMAGES = {
    "length": lambda content: content.__setitem__(7, 255),
    "header": lambda content: content.__setitem__(8, 0),
    "state": lambda content: content.replace(b"best_ap", b"best_ax"),
    "name of an array": lambda content: content.replace(b'"weights"', b'"weighty"'),
    "type of an array": lambda content: content.replace(b'"I64"', b'"F64"'),
    "a bit of an array": flip_last_bit,
    "cut": lambda content: content[:-1],
    "cut in the header": lambda content: content[:100],
    "empty": lambda content: b"\n",
}


@pytest.mark.parametrize("damage", [*DAMAGES, "a folder in its place"])
def test_damaged_newest_is_reported_and_the_one_before_used(tmp_path, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, "step", made(step))
    if damage == "a folder in its place":
        (tmp_path / STEP_2).unlink()
        (tmp_path / STEP_2).mkdir()
    else:
        before = (tmp_path / STEP_2).read_bytes()
        change(tmp_path, STEP_2, DAMAGES[damage])
        assert (tmp_path / STEP_2).read_bytes() != before
    told = []
    assert_same(checkpoint.latest(tmp_path, report=told.append), made(1))
    assert len(told) == 1
    assert f"{tmp_path / STEP_2}: damaged: " in told[0]


def test_no_bit_can_change_unseen(tmp_path):
    """Whichever bit of the file is another: an error, or the same checkpoint (a bit of the padding)."""
    checkpoint.save(tmp_path, "step", made(1))
    whole = (tmp_path / STEP_1).read_bytes()
    same = 0
    for place in random.Random(0).sample(range(len(whole) * 8), 100):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        (tmp_path / STEP_1).write_bytes(content)
        try:
            assert_same(checkpoint.load(tmp_path, "step", 1), made(1))
            same += 1
        except CheckpointError:
            pass
    assert same < 10  # of 100


def test_damaged_newest_in_a_store(place):
    for step in (1, 2):
        checkpoint.save(place, "step", made(step))
    change(place, STEP_2, flip_last_bit)
    told = []
    assert_same(checkpoint.latest(place, report=told.append), made(1))
    assert f"{place}/{STEP_2}: damaged: " in told[0]


def test_checkpoint_whose_best_weights_are_damaged_is_not_used(tmp_path):
    checkpoint.save(tmp_path, "best", made(1))
    checkpoint.save(tmp_path, "step", made(1, best_step=1))
    checkpoint.save(tmp_path, "best", made(2))
    checkpoint.save(tmp_path, "step", made(2, best_step=2))
    change(tmp_path, "best-00000002.safetensors", flip_last_bit)
    told = []
    assert_same(checkpoint.latest(tmp_path, report=told.append), made(1, best_step=1))
    assert "best-00000002" in told[0]


def test_damaged_best_weights_do_not_cost_the_run(tmp_path):
    checkpoint.save(tmp_path, "best", made(1))
    checkpoint.save(tmp_path, "step", made(1, best_step=1))
    checkpoint.save(tmp_path, "step", made(2, best_step=1))
    change(tmp_path, "best-00000001.safetensors", flip_last_bit)
    told = []
    assert_same(checkpoint.latest(tmp_path, report=told.append), made(2))
    assert "best weights are sought anew" in told[-1]


def test_best_weights_of_another_course_are_not_those_that_it_names(place):
    """Step 2 and its best weights were written; the run left that course, and was killed between writing both anew."""
    for step in (1, 2):
        checkpoint.save(place, "best", made(step))
        checkpoint.save(place, "step", made(step, best_step=step))
    checkpoint.save(place, "best", Checkpoint(2, made(3).arrays, {}))
    told = []
    assert_same(checkpoint.latest(place, report=told.append), made(1, best_step=1))
    assert told[0].startswith(f"{place}/best-00000002.safetensors: others than {STEP_2} names")


def test_a_checkpoint_never_names_best_weights_that_are_not_there(place):
    with pytest.raises(CheckpointError, match=r"best-00000001\.safetensors: damaged: "):
        checkpoint.save(place, "step", made(2, best_step=1))
    assert names(place) == []


def test_that_nothing_is_left_is_said(tmp_path):
    checkpoint.save(tmp_path, "step", made(1))
    change(tmp_path, STEP_1, flip_last_bit)
    told = []
    assert checkpoint.latest(tmp_path, report=told.append) is None
    assert "begins anew" in told[-1]


def test_a_checkpoint_of_the_first_format_is_named(tmp_path):
    old = tmp_path / "step-00000005"
    old.mkdir()
    for name in ("arrays.safetensors", "state.json"):
        (old / name).write_bytes(b"")
    words = r"step-00000005: expected a checkpoint of format 2, got format 1; use the version"
    for call in (
        lambda: checkpoint.latest(tmp_path, report=pytest.fail),
        lambda: checkpoint.newest(tmp_path, "best"),
        lambda: checkpoint.newest(old, "best"),  # that folder itself, as a source of weights
    ):
        with pytest.raises(CheckpointError, match=words):
            call()


def test_a_checkpoint_of_a_later_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    checkpoint.save(tmp_path, "step", made(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"00001\.safetensors: expected a checkpoint of format 2, got format 3"):
        checkpoint.load(tmp_path, "step", 1)


def test_what_a_killed_save_left_is_no_checkpoint_and_goes(place):
    checkpoint.save(place, "step", made(1))
    for step in (1, 2, 7):
        Folder(place).write(f".step-0000000{step}.safetensors.part", b"half")
    Folder(place).write("network.json", b"{}")  # not ours
    assert checkpoint.latest(place, report=pytest.fail).step == 1
    checkpoint.save(place, "step", made(2))
    checkpoint.prune(place, keep=2, newest=2)
    assert names(place) == ["network.json", STEP_1, STEP_2]


def test_written_again_replaces(place):
    checkpoint.save(place, "step", made(1))
    checkpoint.save(place, "step", Checkpoint(1, made(2).arrays, {}))
    assert names(place) == [STEP_1]
    assert_same(checkpoint.load(place, "step", 1), Checkpoint(1, made(2).arrays, {}))


def test_a_file_url_is_here(tmp_path):
    folder = Folder(f"file://{tmp_path}/run")
    assert folder.is_here
    checkpoint.save(folder, "step", made(1))
    assert_same(checkpoint.load(tmp_path / "run", "step", 1), made(1))


@contextlib.contextmanager
def files_at_most(size):
    """A disk with no room for a longer file: real writes that fail half way, with EFBIG in place of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("step", [1, 2], ids=["in place of an old one", "a new one"])
def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path, step):
    checkpoint.save(tmp_path, "step", made(1))
    large = Checkpoint(step, {"a": np.zeros(100_000)}, {})
    words = rf"{tmp_path}/step-0000000{step}\.safetensors: checkpoint not written: .*File too large; earlier ones are"
    with files_at_most(100_000), pytest.raises(CheckpointError, match=words):
        checkpoint.save(tmp_path, "step", large)
    assert names(tmp_path) == [STEP_1]
    assert_same(checkpoint.latest(tmp_path, report=pytest.fail), made(1))
    checkpoint.save(tmp_path, "step", large)  # room again
    assert checkpoint.load(tmp_path, "step", step).arrays["a"].size == 100_000


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"file/step-00000001\.safetensors: checkpoint not written: "):
        checkpoint.save(tmp_path / "file", "step", made(1))


def test_prune_removes_the_course_that_was_left(place):
    """Steps 11 and 12 were damaged, and training began anew."""
    checkpoint.save(place, "best", made(8))
    for step in (11, 12):
        checkpoint.save(place, "step", made(step, best_step=8))
    checkpoint.save(place, "best", made(1))
    checkpoint.save(place, "step", made(1, best_step=1))
    checkpoint.prune(place, keep=2, newest=1)
    assert names(place) == ["best-00000001.safetensors", STEP_1]


def test_prune_keeps_the_last_and_the_best_they_name(place):
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4)):
        if best == step:
            checkpoint.save(place, "best", made(step))
        checkpoint.save(place, "step", made(step, best))
    checkpoint.prune(place, keep=2, newest=4)
    kept = ["best-00000001", "best-00000004", "step-00000003", "step-00000004"]
    assert names(place) == [f"{name}.safetensors" for name in kept]
    checkpoint.prune(place, keep=1, newest=4)
    assert names(place) == ["best-00000004.safetensors", "step-00000004.safetensors"]


def test_a_damaged_one_that_stays_costs_no_other(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, "step", made(step, best_step=None))
    change(tmp_path, STEP_2, DAMAGES["header"])
    checkpoint.prune(tmp_path, keep=2, newest=2)
    assert names(tmp_path) == [STEP_1, STEP_2]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nosuch://host/run", r"nosuch://host/run: ValueError: Protocol not known: nosuch"),
        ("sftp://me:secret@host/run", r"^sftp://host/run: holds a password; leave it out"),
        ("sftp://me@localhost:1/run", r"^sftp://localhost:1/run: \w*Error"),
    ],
)
def test_a_url_that_cannot_be_used(where, words):
    with pytest.raises(FolderError, match=words) as raised:
        checkpoint.latest(where, report=pytest.fail)
    assert "secret" not in str(raised.value)
    assert "me@" not in str(raised.value)


def kill_while_it_saves(place, first, seconds):
    """The last pair (step, generation) that a saving process said was saved, when it was killed."""
    line = [sys.executable, "-m", "tests.effdet.saving", str(place), str(first)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        said = [process.stdout.readline()]
        time.sleep(seconds)
        process.kill()
        said += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    whole = [line for line in said if line.endswith("\n")]
    step, generation = whole[-1].split()
    return int(step), int(generation)


def assert_whole_after(place, saved):
    """What was said to be saved, or what came after it, is there and no mixture."""
    found = checkpoint.latest(place, report=pytest.fail)
    generation = found.state["generation"]
    assert (found.step, generation) >= saved
    assert found.best_step == found.step
    assert_same(found, saving.made(found.step, generation))
    return found.step


def survives_kills(place, kills, longest):
    """Saving processes killed at random times up to `longest` seconds, and on until one was killed within a write."""
    moments, met, step = random.Random(1), False, 0
    for number in range(100):
        if number >= kills and met:
            break
        saved = kill_while_it_saves(place, step + 1, moments.uniform(0, longest))
        met |= any(name.endswith(".part") for name in names(place))
        step = assert_whole_after(place, saved)
    assert met, "no kill met a write; the test proves nothing"
    checkpoint.prune(place, saving.KEEP, step)
    assert len(names(place)) == 2 * saving.KEEP
    assert not [name for name in names(place) if name.endswith(".part")]


@pytest.mark.slow
def test_killed_at_any_time_every_saved_checkpoint_is_whole(tmp_path):
    survives_kills(tmp_path, kills=10, longest=0.05)


FULL = """
import json, os, subprocess, sys
import numpy as np
from effdet import checkpoint
from effdet.checkpoint import Checkpoint
place = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], check=True)
told = ""
for step in range(1, 9):
    try:
        checkpoint.save(place, "step", Checkpoint(step, {"a": np.full(100_000, step, np.float64)}, {}))
    except checkpoint.CheckpointError as error:
        told = str(error)
        break
found = checkpoint.latest(place, report=print)
print(json.dumps([told, step, found.step, float(found.arrays["a"].sum()), sorted(os.listdir(place))]))
"""


@pytest.mark.system
@pytest.mark.needs("mount", "unshare")
def test_a_full_disk(tmp_path):
    line = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), sys.executable, "-c", FULL]
    done = subprocess.run([*line, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told, step, found, total, there = json.loads(done.stdout)
    assert step == 4  # 3 MiB hold three of 0.8 MB and not a fourth
    assert told == (
        f"{tmp_path}/step-00000004.safetensors: checkpoint not written: "
        f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}; earlier ones are intact; "
        "make room, or mend what is said, and start again"
    )
    assert (found, total) == (3, 300_000)
    assert there == [f"step-0000000{number}.safetensors" for number in (1, 2, 3)]
