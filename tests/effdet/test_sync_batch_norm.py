"""Batch normalization over the images of all ranks: several processes with parts of a batch, and one with all of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effdet.distributed import SIZE_VARIABLES, OneProcess
from effdet.layers import FusedBatchNormalization
from tests.effdet import sync_batch_norm_job
from tests.effdet.tiny import tiny_model

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def results(folder, size, *arguments):
    """Each rank's results of a job, by part and name."""
    folder.mkdir()
    line = ["horovodrun", "--gloo", "-np", str(size), sys.executable, "-m", "tests.effdet.sync_batch_norm_job"]
    done = subprocess.run(
        [*line, str(folder), str(size), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in SIZE_VARIABLES:
            patch.delenv(name, raising=False)
        return results(tmp_path_factory.mktemp("two") / "job", 2)


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# Half precision rounds y and x's gradient once, as one process does: most are the same numbers, none is off by more
# than the last of 11 or 8 bits. What is of statistics is float32 throughout.
@pytest.mark.parametrize(("policy", "bound"), [("float32", 1e-6), ("mixed_float16", 2**-10), ("mixed_bfloat16", 2**-7)])
def test_two_ranks_with_half_the_images_are_one_with_all(two, policy, bound):
    """Though each rank's values are far from the other's."""
    own_means = sync_batch_norm_job.images().reshape(2, -1).mean(axis=1)
    assert own_means[1] - own_means[0] > 25
    expected = sync_batch_norm_job.layer_results(OneProcess(), policy)
    by_rank = [{name: arrays[f"{policy}/{name}"] for name in expected} for arrays in two]
    assert by_rank[0]["dtype"] == expected["dtype"] == policy.removeprefix("mixed_")
    for name in ("y", "x"):  # x: the gradient with respect to it
        found = np.concatenate([arrays[name] for arrays in by_rank])
        assert relative_error(found, expected[name]) < bound, name
    for name in ("gamma", "beta"):  # the ranks' shares of the gradient
        assert relative_error(by_rank[0][name] + by_rank[1][name], expected[name]) < 2e-6, name
    for name in ("mean", "variance"):
        assert by_rank[0][name].tobytes() == by_rank[1][name].tobytes()
        assert relative_error(by_rank[0][name], expected[name]) < 1e-6, name


def test_not_synchronized_they_are_not(two):
    """What the tests above would find."""
    parts = np.split(sync_batch_norm_job.images(), 2)
    alone = [FusedBatchNormalization(0.9, 1e-3)(part, training=True) for part in parts]
    together = FusedBatchNormalization(0.9, 1e-3)(np.concatenate(parts), training=True)
    assert relative_error(np.concatenate(alone), np.asarray(together)) > 0.1


@pytest.fixture(scope="module")
def one():
    return sync_batch_norm_job.network_results(OneProcess())


@pytest.mark.parametrize("part", ["network", "again"])
def test_a_network_on_two_ranks_is_the_one_on_one(two, one, part):
    """With gradient checkpointing, `again`, too."""
    for name in ("class_logits", "box_deltas"):
        assert one[name].std() > 0.1
        found = np.concatenate([arrays[f"{part}/{name}"] for arrays in two])
        assert relative_error(found, one[name]) < 1e-4, name
    for name in ("gradient", "statistics"):
        assert two[0][f"{part}/{name}"].tobytes() == two[1][f"{part}/{name}"].tobytes()
        assert relative_error(two[0][f"{part}/{name}"], one[name]) < 1e-4, name


def test_each_layer_asks_the_ranks_once_forward_and_once_backward(two, one):
    """Though checkpointing computes it twice."""
    num_layers = sum(isinstance(layer, FusedBatchNormalization) for layer in tiny_model().layers)
    for arrays in two:
        assert arrays["network/stacks"] == arrays["again/stacks"] == 2 * num_layers
    assert one["stacks"] == 0


def test_three_ranks_are_bit_identical_over_runs_though_one_is_slow(tmp_path):
    first = results(tmp_path / "first", 3)
    second = results(tmp_path / "second", 3, "1")
    for arrays, again in zip(first, second, strict=True):
        assert [name for name in arrays if arrays[name].tobytes() != again[name].tobytes()] == []
    for name in ("network/gradient", "network/statistics"):
        assert len({arrays[name].tobytes() for arrays in first}) == 1
