"""Ranks are started as said, and end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effdet.distributed import SIZE_VARIABLES
from pipeline import launch
from pipeline.errors import RETRY_EXIT, PipelineError, Preempted
from pipeline.local import Local

ROOT = Path(__file__).parents[2]

# What horovodrun 0.28.1 says.
HOROVODRUN_WITH_75 = "print('Process 1 exit with status code 75.'); raise SystemExit(1)"
STALLED = """
print('[0]<stderr>:One or more tensors were submitted to be reduced, gathered or broadcasted by subset of ranks')
print('[0]<stderr>:Missing ranks:')
print('[2]<stderr>:words of another rank')
print('[0]<stderr>:1!: [gradients_1of3, gradients_2of3, gradients_3of3 ..., losses]')
print('[0]<stderr>:One or more rank (marked by "!") is stalled for longer than 9 seconds. Will shutdown.')
raise SystemExit(1)
"""
TIMED_OUT = """
print('[0]<stderr>:[0]: Horovod background loop uncaught exception: Timed out waiting 15000ms for recv operation')
print('[0]<stderr>:W0000 Horovod has been shut down. [[{{node step/gradients}}]]')
print('[2]<stderr>:[2]: Horovod background loop uncaught exception: Timed out waiting 15000ms for send operation')
raise SystemExit(1)
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_inside_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(PipelineError, match=r"a launcher has started this process already \(OMPI_COMM_WORLD_SIZE=2\)"):
        launch.launch("pipeline.train", 2, Local())


def test_missing_launcher_is_named(monkeypatch):
    monkeypatch.setattr(launch, "command", lambda *arguments: ["/nowhere/horovodrun"])
    with pytest.raises(PipelineError, match=r"/nowhere/horovodrun: not found: ranks 2 needs it"):
        launch.launch("pipeline.train", 2, Local())


def launch_program(monkeypatch, text):
    """Launches a program in the place of horovodrun."""
    monkeypatch.setattr(launch, "command", lambda *arguments: [sys.executable, "-c", text])
    launch.launch("pipeline.train", 3, Local())


def test_end_and_output(monkeypatch, capfdbinary):
    launch_program(monkeypatch, r"import sys; print('a\rb'); sys.stderr.write('c')")
    assert capfdbinary.readouterr() == (b"a\rb\n", b"c")


def test_exit_code_is_told(monkeypatch):
    with pytest.raises(PipelineError, match=r"pipeline.train failed on 3 ranks \(exit 3\)"):
        launch_program(monkeypatch, "raise SystemExit(3)")


@pytest.mark.parametrize("text", ["raise SystemExit(75)", HOROVODRUN_WITH_75], ids=["mpirun", "horovodrun"])
def test_ranks_that_saved_and_stopped_make_a_retry(monkeypatch, text):
    with pytest.raises(Preempted, match=r"pipeline\.train: all 3 ranks saved and ended; run it again"):
        launch_program(monkeypatch, text)


def test_horovods_words_name_the_rank_and_the_tensors(monkeypatch):
    message = r"stalled .* \(stall_seconds 600\): rank 1 did not come to gradients, losses"
    with pytest.raises(PipelineError, match=message):
        launch_program(monkeypatch, STALLED)


def test_a_rank_without_an_answer_is_named(monkeypatch):
    with pytest.raises(PipelineError, match=r"rank 1 gave no answer, while ranks \[0, 2\] waited in step/gradients$"):
        launch_program(monkeypatch, TIMED_OUT)


@pytest.fixture
def two_ranks(tmp_path):
    """Starts two ranks of tests.pipeline.launched, each told what to do."""
    started = []

    def start(rank_0="sleep", rank_1="sleep"):
        (tmp_path / "0").write_text(rank_0)
        (tmp_path / "1").write_text(rank_1)
        line = [sys.executable, "-m", "tests.pipeline.launched", str(tmp_path)]
        started.append(subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[0]

    yield start
    started[0].kill()
    started[0].wait()


def worker_pids(folder):
    deadline = time.monotonic() + 300
    while len(found := sorted(folder.glob("pid-*"))) < 2:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.1)
    return [int(path.read_text()) for path in found]


def assert_gone(pids):
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_every_rank(two_ranks, tmp_path, number):
    process = two_ranks()
    pids = worker_pids(tmp_path)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"all 2 ranks were ended by {number.name}" in output
    assert_gone(pids)


@pytest.mark.slow
def test_ranks_that_save_are_waited_for_and_make_a_retry(two_ranks, tmp_path):
    process = two_ranks("save", "save")
    pids = worker_pids(tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == RETRY_EXIT, output
    assert "all 2 ranks saved and ended on SIGTERM; run it again" in output
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]  # 7 s each
    assert_gone(pids)


@pytest.mark.slow
def test_a_second_signal_ends_ranks_that_do_not_stop(two_ranks, tmp_path):
    process = two_ranks("deaf", "deaf")
    pids = worker_pids(tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "all 2 ranks were ended by SIGTERM, SIGINT" in output
    assert_gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("hang", "rank 1 did not come to gradients"),  # its main thread sleeps
        ("freeze", "rank 1 gave no answer, while ranks [0] waited in gradients"),  # the whole process is stopped
    ],
)
def test_a_rank_that_stays_away_is_named(monkeypatch, two_ranks, tmp_path, task, words):
    monkeypatch.setenv("EFFDET_STALL_SECONDS", "12")
    process = two_ranks("meet", task)
    pids = worker_pids(tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    last = output.strip().splitlines()[-1]
    assert last == f"error: tests.pipeline.launched stalled on 2 ranks (stall_seconds 12): {words}", output
    assert_gone(pids)


@pytest.mark.slow
def test_failed_rank_ends_the_other_and_its_words_are_seen(two_ranks, tmp_path):
    process = two_ranks(rank_1="fail")
    pids = worker_pids(tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "[1]<stderr>:error: this rank was told to fail" in output
    assert output.strip().splitlines()[-1].startswith("error: tests.pipeline.launched failed on 2 ranks")
    assert_gone(pids)
