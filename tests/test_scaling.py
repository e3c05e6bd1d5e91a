"""The scaling model against arithmetic by hand."""

import pytest

from benchmarks.scaling import Link, all_to_all, exchange, fit, ring, step

FAST, SLOW = Link(1e9, 1e-6), Link(1e8, 1e-5)


def test_a_ring_sends_all_but_a_part_of_the_bytes_twice() -> None:
    # 4 members, 8 MB: 6 messages of 2 MB at 1 GB/s, 2 ms each, and 6 latencies of 1 us
    assert ring(4, 8e6, FAST) == pytest.approx(6 * 2e-3 + 6e-6)


def test_one_alone_sends_nothing() -> None:
    assert ring(1, 8e6, FAST) == 0
    assert step(1, 0.5, "float32, ring", FAST, SLOW) == (0.0, 0.5)


def test_one_node_does_not_use_the_network() -> None:
    assert exchange(8, 8e6, FAST, SLOW) == ring(8, 8e6, FAST)


def test_between_nodes_the_slow_link_is_added() -> None:
    # inside: 14 messages of 1 MB at 1 GB/s, 1 ms; between 2 nodes: 2 messages of 4 MB at 0.1 GB/s, 40 ms
    expected = 14 * (1e-3 + 1e-6) + 2 * (40e-3 + 1e-5)
    assert exchange(16, 8e6, FAST, SLOW) == pytest.approx(expected)


def test_a_part_of_a_node_more_is_refused() -> None:
    with pytest.raises(ValueError, match="12 GPUs: expected whole nodes of 8"):
        exchange(12, 8e6, FAST, SLOW)


def test_all_to_all_in_a_node_sends_what_a_ring_sends() -> None:
    # 8 GPUs, 8 MB: 7 MB out at 1 GB/s, all messages at once; then the ring's second half, 7 messages of 1 MB
    assert all_to_all(8, 8e6, FAST, SLOW) == pytest.approx(7e-3 + 1e-6 + 7 * (1e-3 + 1e-6))


def test_all_to_all_sends_more_between_nodes_than_a_ring() -> None:
    # 16 GPUs, 8 MB: each sends 7/16 inside, 3.5 ms, and 8/16 outside: 8 x 4 MB a node at 0.1 GB/s, 320 ms
    gather = exchange(16, 8e6, FAST, SLOW) / 2  # 40 ms between the nodes
    assert all_to_all(16, 8e6, FAST, SLOW) == pytest.approx(3.5e-3 + 1e-6 + 320e-3 + 1e-5 + gather)


def test_a_step_is_compute_and_what_follows_it() -> None:
    size = 2 * 3_880_067 + 4 * 47_140  # the gradient in 16 bits; statistics and four losses in 32
    seconds, whole = step(8, 0.5, "16 bits, ring", FAST, SLOW)
    # two waits of a millisecond; 14 messages of a byte each, 14 of an eighth
    assert seconds == pytest.approx(2e-3 + 14 * (1e-9 + 1e-6) + 14 * (size / 8 / 1e9 + 1e-6))
    assert whole == pytest.approx(0.5 + seconds)


def test_fit_finds_the_line_through_two_exchanges() -> None:
    # 3 ms and 1 ns a byte: 1 MB takes 4 ms, 11 MB take 14 ms
    overhead, bandwidth = fit([1e6, 11e6], [4e-3, 14e-3])
    assert (overhead, bandwidth) == (pytest.approx(3e-3), pytest.approx(1e9))
