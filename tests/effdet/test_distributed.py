"""One process and many: the same collectives, the same training."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from effdet.distributed import SIZE_VARIABLES, OneProcess, connect
from effdet.errors import EffdetError
from tests.effdet import horovod_job

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def job(folder, started, expected, *arguments):
    """Runs horovod_job on `started` processes that expect to be `expected`."""
    folder.mkdir()
    line = ["horovodrun", "--gloo", "-np", str(started), sys.executable, "-m", "tests.effdet.horovod_job"]
    return subprocess.run(
        [*line, str(folder), str(expected), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1000
    )


def results(folder, size):
    """Each rank's results of a job that succeeds."""
    done = job(folder, size, size)
    assert done.returncode == 0, done.stdout + done.stderr
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)]


def part(arrays, name):
    return {key.removeprefix(name): value for key, value in arrays.items() if key.startswith(name)}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []


def test_one_process():
    ranks = connect(1)
    assert isinstance(ranks, OneProcess)
    assert (ranks.rank, ranks.size, ranks.local_rank) == (0, 1, 0)
    tensors = [tf.constant(1.0), tf.constant([2.0])]
    assert ranks.average(tensors) == tensors
    assert ranks.sum(tensors[0]) is tensors[0]
    assert ranks.gather("x") == ["x"]


@pytest.mark.parametrize("name", SIZE_VARIABLES)
def test_one_process_refuses_to_be_one_of_many(monkeypatch, name):
    monkeypatch.setenv(name, "4")
    with pytest.raises(EffdetError, match=rf"a launcher started several processes \({name}=4\), but ranks is 1"):
        connect(1)


@pytest.mark.slow
def test_too_few_processes_are_refused(tmp_path):
    done = job(tmp_path / "job", 1, 2)
    assert done.returncode != 0
    assert "ranks is 2, but Horovod counts 1" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results(tmp_path_factory.mktemp("two") / "job", 2)


@pytest.mark.slow
def test_collectives(two):
    for arrays in two:
        found = part(arrays, "collective/")
        assert found["mean"] == 0.5
        assert found["means"] == [5.0]
        assert found["sum"] == 3.0
        assert found["broadcast"] == 5.0
        assert found["gathered"].tolist() == [0, 1]


@pytest.mark.slow
def test_ranks_end_with_the_same_state(two):
    assert_same_bits(part(two[0], "free/"), part(two[1], "free/"))


@pytest.mark.slow
def test_two_ranks_equal_one_with_double_batch(two):
    """BatchNorm frozen. Covers the normalizer, L2, the mean over ranks, and the draws of stochastic depth."""
    found, expected = part(two[0], "frozen/"), horovod_job.trained(horovod_job.frozen_model(), OneProcess())
    start = np.concatenate([v.numpy().ravel() for v in horovod_job.frozen_model().trainable_variables])
    moved = np.abs(expected["weights"] - start).max()
    np.testing.assert_allclose(found["weights"], expected["weights"], rtol=0, atol=1e-4 * moved)
    np.testing.assert_allclose(found["ema_weights"], expected["ema_weights"], rtol=0, atol=1e-4 * moved)
    np.testing.assert_allclose(found["records"], expected["records"], rtol=1e-4)


@pytest.mark.slow
def test_every_rank_names_the_one_whose_loss_is_not_finite(two):
    for arrays in two:
        assert "step 1: not finite" in str(arrays["error"])
        assert "rank 1: loss nan, image ids [1003, 1004, 1005]" in str(arrays["error"])
        assert "rank 0" not in str(arrays["error"])


@pytest.mark.slow
def test_every_rank_skips_the_step_in_which_one_overflows(two):
    first, last = (part(arrays, "overflow/") for arrays in two)
    assert first["finite"].tolist() == [True, True, True]  # what each rank gave to the mean
    assert last["finite"].tolist() == [True, False, True]
    assert np.isfinite(first["norms"]).tolist() == [True, False, True]
    assert first["scales"].tolist() == [2.0**8, horovod_job.TOO_MUCH / 2, 2.0**8]
    start, once, skipped, on = first["weights"]
    assert np.array_equal(once, skipped)
    assert not np.array_equal(start, once)
    assert not np.array_equal(skipped, on)
    for name in first.keys() - {"finite"}:
        assert first[name].tobytes() == last[name].tobytes(), name


@pytest.mark.slow
def test_three_ranks_are_bit_identical_over_runs_though_one_is_slow(tmp_path):
    """From three ranks on the order of sums matters."""
    first = results(tmp_path / "first", 3)
    done = job(tmp_path / "second", 3, 3, "1")
    assert done.returncode == 0, done.stdout + done.stderr
    for rank, arrays in enumerate(first):
        assert_same_bits(dict(np.load(tmp_path / "second" / f"{rank}.npz")), arrays)
