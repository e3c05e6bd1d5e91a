"""The order of training in index space, proved by counting entries."""

import numpy as np
import pytest

from effdet import sampling
from effdet.errors import EffdetError


def batches(seed, num_records, batch_size, num_ranks, steps):
    """(epoch, record) pairs, int64 [steps, num_ranks, batch_size, 2]."""
    positions = np.stack(
        [[sampling.rank_positions(step, batch_size, rank, num_ranks) for rank in range(num_ranks)] for step in steps]
    )
    return np.stack(sampling.entries(seed, num_records, positions), axis=-1)


def test_hash_is_splitmix64():
    # the generator's outputs for seed 0 are the hashes of 0 and of its increment, taken from its reference code
    assert hex(sampling.hash64(0)[0]) == "0xe220a8397b1dcdaf"
    assert hex(sampling.hash64(0x9E3779B97F4A7C15)[0]) == "0x6e789e6aa1b965f4"


def test_hash_depends_on_every_key_and_its_place():
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (-1, 0)]
    assert len({int(sampling.hash64(*key)[0]) for key in keys}) == len(keys)


def test_uniform_is_flat():
    values = sampling.uniform(3, 0, sampling.Chance.SCALE, np.arange(100_000))
    assert values.min() >= 0
    assert values.max() < 1
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert np.abs(counts - 10_000).max() < 400  # 4 standard deviations of 95
    other = sampling.uniform(3, 1, sampling.Chance.SCALE, np.arange(100_000))
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.01


@pytest.mark.parametrize("num_records", [1, 7, sampling.RUN + 1, 3 * sampling.WINDOW + 5])
def test_epoch_holds_each_record_once(num_records):
    order = sampling.epoch_order(1, 0, num_records)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(num_records))


def test_order_depends_on_seed_and_epoch_alone():
    order = sampling.epoch_order(1, 5, 1000).copy()
    sampling.epoch_order.cache_clear()
    np.testing.assert_array_equal(order, sampling.epoch_order(1, 5, 1000))
    for other in (sampling.epoch_order(2, 5, 1000), sampling.epoch_order(1, 6, 1000)):
        assert np.mean(order == other) < 0.01


def test_up_to_a_window_the_shuffle_is_plain():
    # the mean distance of two independent uniform places in [0, n) is n / 3
    distance = np.abs(sampling.epoch_order(1, 0, sampling.WINDOW) - np.arange(sampling.WINDOW))
    assert distance.mean() == pytest.approx(sampling.WINDOW / 3, rel=0.05)


def test_a_window_reads_from_few_runs_and_windows_differ_between_epochs():
    num_records = 20 * sampling.WINDOW
    windows = [sampling.epoch_order(1, epoch, num_records)[: sampling.WINDOW] for epoch in (0, 1)]
    runs = [set(window // sampling.RUN) for window in windows]
    assert [len(chosen) for chosen in runs] == [sampling.WINDOW // sampling.RUN] * 2
    assert len(runs[0] & runs[1]) < 8  # of 16, out of 320


def test_ranks_share_the_global_batch_of_one_rank():
    one_rank = batches(1, 23, batch_size=8, num_ranks=1, steps=range(10))
    four_ranks = batches(1, 23, batch_size=2, num_ranks=4, steps=range(10))
    np.testing.assert_array_equal(one_rank.reshape(10, 8, 2), four_ranks.reshape(10, 8, 2))


def test_remainder_opens_the_next_epoch():
    # 10 records in batches of 4: epoch 0 ends in the middle of step 2, epoch 1 with step 4
    stream = batches(1, 10, batch_size=4, num_ranks=1, steps=range(5)).reshape(-1, 2)
    np.testing.assert_array_equal(stream[:, 0], [0] * 10 + [1] * 10)
    for epoch in (0, 1):
        np.testing.assert_array_equal(np.sort(stream[stream[:, 0] == epoch, 1]), np.arange(10))
    assert [sampling.steps_until(epoch, 0, 10, 4) for epoch in range(4)] == [0, 2, 5, 7]


def test_global_batch_larger_than_the_data_set():
    # 3 records, 8 entries a step: epochs 0 and 1 and two entries of epoch 2
    stream = batches(1, 3, batch_size=4, num_ranks=2, steps=[0]).reshape(-1, 2)
    np.testing.assert_array_equal(stream[:, 0], [0, 0, 0, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(np.sort(stream[:6, 1].reshape(2, 3), axis=1), [[0, 1, 2]] * 2)
    assert [sampling.steps_until(epoch, 0, 3, 8) for epoch in range(4)] == [0, 0, 0, 1]


def test_no_record_is_named():
    with pytest.raises(EffdetError, match="no record"):
        sampling.entries(1, 0, np.arange(4))


# Repeat factor --------------------------------------------------------------------------------------------------------


def test_repeat_factors_by_hand():
    # class 0 in 8 of 8 images, 1 in 2, 2 in 1; threshold 0.5: sqrt(0.5 / 0.25) and sqrt(0.5 / 0.125)
    classes = [[0, 1, 2], [0, 1], *([[0]] * 6)]
    np.testing.assert_allclose(sampling.repeat_factors(classes, 0.5), [2, 2**0.5, *([1] * 6)])
    np.testing.assert_array_equal(sampling.repeat_factors([[], [3]], 0.001), [1, 1])  # no object: once
    np.testing.assert_array_equal(sampling.repeat_factors(classes, 0.0), [1] * 8)


def test_index_list_repeats_by_the_factor():
    factors = np.array([1.0, 2.0, 1.5, 3.25] * 1000)
    entries = sampling.index_list(1, factors)
    assert entries.dtype == np.int64
    assert (np.diff(entries) >= 0).all()
    counts = np.bincount(entries, minlength=4000).reshape(-1, 4)
    np.testing.assert_array_equal(counts[:, :2], [[1, 2]] * 1000)
    assert set(counts[:, 2]) == {1, 2}
    assert set(counts[:, 3]) == {3, 4}
    np.testing.assert_allclose(counts.mean(axis=0), factors[:4], atol=0.065)  # 4 standard deviations of 0.0158


def test_index_list_depends_on_the_seed_alone():
    factors = np.full(1000, 1.5)
    np.testing.assert_array_equal(sampling.index_list(1, factors), sampling.index_list(1, factors))
    # a record's chance is its own: others that come behind it change nothing
    np.testing.assert_array_equal(
        sampling.index_list(1, factors[:300]),
        sampling.index_list(1, factors)[:450][sampling.index_list(1, factors)[:450] < 300],
    )
    assert len(np.setdiff1d(*(np.flatnonzero(np.bincount(sampling.index_list(seed, factors)) == 2) for seed in (1, 2))))


def test_every_record_once_without_rare_classes():
    np.testing.assert_array_equal(sampling.index_list(1, np.ones(7)), np.arange(7))
