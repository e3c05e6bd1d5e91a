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
from tests.effdet.tiny import tiny_model
from tests.pipeline.tiny_training import make_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def job(folder, started, expected, *arguments):
    """Runs horovod_job on `started` processes that expect to be `expected`."""
    make_shards(folder / "shards")
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
    assert ranks.average(tensors, "x") == tensors
    assert ranks.sum(tensors[0], "x") is tensors[0]
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
def two_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two") / "job"


@pytest.fixture(scope="module")
def two(two_folder):
    return results(two_folder, 2)


@pytest.mark.slow
def test_collectives(two):
    for arrays in two:
        found = part(arrays, "collective/")
        assert found["mean"] == 0.5
        assert found["means"] == [5.0]
        assert found["sum"] == 3.0
        assert found["stacked"].tolist() == [[0, 10], [1, 10]]
        assert found["broadcast"] == 5.0
        assert found["gathered"].tolist() == [0, 1]
        for name in ("fp16", "bf16"):  # [60000, -1, 0.5, 0, 0] and [60000, -1, 1.5, 0, 2]
            np.testing.assert_allclose(found[name], [60000, -1, 1, 0, 1], rtol={"fp16": 2**-11, "bf16": 2**-8}[name])
    assert_adasum(two)


@pytest.mark.slow
def test_ranks_end_with_the_same_state(two):
    assert_same_bits(part(two[0], "free/"), part(two[1], "free/"))


@pytest.mark.slow
def test_two_ranks_equal_one_with_double_batch(two, two_folder):
    """BatchNorm frozen. Covers the normalizer, L2, the mean over ranks, augmentation, the draws of stochastic depth."""
    model = horovod_job.frozen_model()
    start = np.concatenate([v.numpy().ravel() for v in model.trainable_variables])
    expected = horovod_job.trained(model, OneProcess(), horovod_job.from_shards(two_folder, OneProcess()))
    found = part(two[0], "frozen/")
    assert found.keys() == expected.keys()
    moved = np.abs(expected["weights"] - start).max()
    for name in ("weights", "ema_weights"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-4 * moved)
    np.testing.assert_allclose(found["records"], expected["records"], rtol=1e-4)


@pytest.mark.slow
def test_two_ranks_with_synchronized_batch_norm_equal_one_with_double_batch(two, two_folder):
    """In the first step: fresh weights enlarge rounding, a hundred times by its gradient, and more from step to step.

    TensorFlow's kernel sums a batch's values in float32 and in another order for another size.
    """
    whole = horovod_job.from_shards(two_folder, OneProcess())
    expected = horovod_job.trained(tiny_model(), OneProcess(), whole, steps=1)["records"][0]
    found = part(two[0], "synchronized/")["records"][0]
    apart = part(two[0], "apart/")["records"][0]
    np.testing.assert_allclose(found[:5], expected[:5], rtol=2e-5)  # rate, losses
    np.testing.assert_allclose(found[5], expected[5], rtol=0.02)  # the gradient's norm
    assert abs(apart[1] - expected[1]) > 1e-3 * expected[1]  # each rank by its own images


@pytest.mark.slow
def test_compressed_gradients_train_nearly_the_same(two):
    found, expected = part(two[0], "narrow/"), part(two[0], "frozen/")
    assert not np.array_equal(found["weights"], expected["weights"])
    np.testing.assert_allclose(found["records"], expected["records"], rtol=0.02)
    assert_same_bits(found, part(two[1], "narrow/"))


@pytest.mark.slow
def test_adasum_trains_and_ranks_stay_the_same(two):
    found, averaged = part(two[0], "adasum/"), part(two[0], "frozen/")
    losses, norms = found["records"][:, 1], found["records"][:, 5]
    assert losses[0] == averaged["records"][0, 1]  # the same weights still
    assert norms[0] > averaged["records"][0, 5]  # of orthogonal gradients the sum
    assert losses[-1] < losses[0]
    assert_same_bits(found, part(two[1], "adasum/"))


@pytest.mark.slow
def test_every_rank_names_the_one_whose_loss_is_not_finite(two):
    for arrays in two:
        assert "step 1: not finite" in str(arrays["error/text"])
        assert "rank 1: loss nan, image ids [1004, 1005, 1006, 1007]" in str(arrays["error/text"])
        assert "rank 0" not in str(arrays["error/text"])


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
@pytest.mark.parametrize("size", [2, 4])
def test_bit_identical_over_runs_though_one_is_slow(size, two, tmp_path):
    """From three ranks on the order of sums matters."""
    first = two if size == 2 else results(tmp_path / "first", size)
    done = job(tmp_path / "second", size, size, "1")
    assert done.returncode == 0, done.stdout + done.stderr
    for rank, arrays in enumerate(first):
        second = dict(np.load(tmp_path / "second" / f"{rank}.npz"))
        assert second["free/images"] == 400  # 50 steps
        assert_same_bits(part(second, "free/"), part(arrays, "free/"))
    if size == 4:
        assert_adasum(first)


def assert_adasum(ranks):
    """Against the paper's formula in float64, part by part."""

    def added(one, other):
        both = one @ other
        return (1 - both / (2 * one @ one)) * one + (1 - both / (2 * other @ other)) * other

    gradients = [horovod_job.own_gradient(rank).numpy().astype(np.float64) for rank in range(len(ranks))]
    cut = horovod_job.GRADIENT_PARTS[0]
    expected = []
    for piece in (slice(None, cut), slice(cut, None)):
        pieces = [gradient[piece] for gradient in gradients]
        while len(pieces) > 1:
            pieces = [added(one, other) for one, other in zip(pieces[::2], pieces[1::2], strict=True)]
        expected.append(pieces[0])
    for arrays in ranks:
        np.testing.assert_allclose(arrays["collective/adasum"], np.concatenate(expected), rtol=1e-5, atol=1e-6)
        assert arrays["collective/adasum"].tobytes() == ranks[0]["collective/adasum"].tobytes()
