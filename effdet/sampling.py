"""Which record stands where in training: an endless stream of entries, epoch after epoch, in index space.

An epoch is an order of all entries, the same for the same (seed, epoch). Global batch t of the stream holds entries
t * G to (t + 1) * G, and rank r takes the r-th part of it: so ranks are disjoint, have equal steps, see the same global
batches whatever their number, and any step can be started at without a look at what came before.

Epoch e begins with step floor(e * n / G) of n entries in global batches of G: what is left of an epoch, less than one
global batch, opens the first batch of the next one. Epochs may differ by one step; with G > n some have none.

An epoch has an entry for each record, and more for records of rare classes where a run repeats those (the repeat factor
of LVIS, arXiv:1908.03195): `index_list` says which record an entry shows, the same in all epochs.
"""

import enum
import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from effdet.errors import EffdetError

RUN = 256  # neighbouring records that stay together: about 40 MB of COCO, read nearly in sequence
WINDOW = 4096  # records shuffled among each other: 16 runs, about 0.6 GB of COCO, which a page cache holds

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Chance(enum.IntEnum):
    """What a random number decides. Each has a stream of its own; a new one goes to the end."""

    RUN_ORDER = 0
    WINDOW_ORDER = 1
    FLIP = 2
    SCALE = 3
    CROP_Y = 4
    CROP_X = 5
    COLOUR = 6  # from here on with a number behind the record: which one of several
    RAND_AUGMENT = 7
    GRID_MASK = 8
    MOSAIC = 9
    MIXUP = 10
    REPEAT = 11


def hash64(*keys: ArrayLike) -> NDArray[np.uint64]:
    """Hash of integer keys, broadcast against each other (finalizer of SplitMix64, Steele et al. 2014)."""
    state = np.zeros(1, np.uint64)  # an array, not a scalar: arrays wrap around in silence
    for key in keys:
        state = (state ^ np.asarray(key).astype(np.uint64)) + GOLDEN
        state = (state ^ (state >> np.uint64(30))) * MULTIPLIERS[0]
        state = (state ^ (state >> np.uint64(27))) * MULTIPLIERS[1]
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(*keys: ArrayLike) -> NDArray[np.float64]:
    """Hash of integer keys as float64 in [0, 1), in steps of 2**-53."""
    return (hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@functools.lru_cache(maxsize=2)  # the epoch being read, and the next one where a batch spans both
def epoch_order(seed: int, epoch: int, num_records: int) -> NDArray[np.int64]:
    """The order of an epoch: int64 [num_records], each record once. Read-only.

    Runs of records are shuffled, laid end to end and cut into windows, and each window is shuffled: up to WINDOW
    records that is a plain shuffle, above it reads stay within a few runs at a time.
    """
    if num_records < 1:
        raise EffdetError("training data: the shards hold no record; at least one is needed")
    num_runs = -(-num_records // RUN)
    run_order = np.argsort(hash64(seed, epoch, Chance.RUN_ORDER, np.arange(num_runs)), kind="stable")
    run_places = np.argsort(run_order, kind="stable")  # [num_runs] where each run comes to lie
    laid_out = np.argsort(run_places[np.arange(num_records) // RUN], kind="stable")  # [n] records
    window_of_place = np.arange(num_records) // WINDOW
    keys = hash64(seed, epoch, Chance.WINDOW_ORDER, laid_out)
    order = laid_out[np.lexsort((keys, window_of_place))]
    order.flags.writeable = False
    return order


def entries(seed: int, num_records: int, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Epoch and record of each position of the stream: int64, shaped as `positions`.

    EffdetError where there is no record.
    """
    epochs, places = np.divmod(positions, max(num_records, 1))
    records = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        records[chosen] = epoch_order(seed, int(epoch), num_records)[places[chosen]]
    return epochs, records


def partners(
    seed: int, num_records: int, positions: NDArray[np.int64], chance: Chance, number: int
) -> NDArray[np.int64]:
    """An entry to be joined with that of each position: int64, shaped as `positions`; it may be the same one.

    Drawn from WINDOW neighbours of the epoch's order, so that reads stay within the few runs that are read anyway, by
    the hash of (seed, epoch, record) and of `number`, for those that are joined with several.
    """
    epochs, records = entries(seed, num_records, positions)
    places = positions - epochs * num_records
    starts = np.minimum(places // WINDOW * WINDOW, max(num_records - WINDOW, 0))  # the last window is whole, too
    drawn = uniform(seed, epochs, chance, records, number) * min(WINDOW, num_records)
    return entries(seed, num_records, epochs * num_records + starts + drawn.astype(np.int64))[1]


def repeat_factors(classes: Sequence[Sequence[int]], threshold: float) -> NDArray[np.float64]:
    """How often an epoch shows each record, on average: float64 [n], 1 or more.

    A class that stands in the share f of the records asks for max(1, sqrt(threshold / f)); a record is shown as often
    as the rarest of its classes asks for.

    Args:
        classes: of each record, each class once.
        threshold: the share of records below which a class is rare.
    """
    records_of = Counter(itertools.chain.from_iterable(classes))
    factors = {class_: max(1.0, math.sqrt(threshold * len(classes) / count)) for class_, count in records_of.items()}
    return np.array([max((factors[class_] for class_ in row), default=1.0) for row in classes], np.float64)


def index_list(seed: int, factors: NDArray[np.float64]) -> NDArray[np.int64]:
    """The record of each entry of an epoch, in the records' order: int64 [m].

    A record stands there floor(factor) times, and once more by the chance that is left, drawn once for all epochs, so
    that these are of one length. All copies of a record are neighbours, read together and augmented each in its way.
    """
    whole = np.floor(factors)
    more = uniform(seed, 0, Chance.REPEAT, np.arange(len(factors)), 0) < factors - whole
    return np.repeat(np.arange(len(factors), dtype=np.int64), whole.astype(np.int64) + more)


def rank_positions(step: int, batch_size: int, rank: int, num_ranks: int) -> NDArray[np.int64]:
    """Positions of the stream that make up a rank's batch of a step: int64 [batch_size]."""
    return (step * num_ranks + rank) * batch_size + np.arange(batch_size, dtype=np.int64)


def steps_until(epochs: float, position: int, num_entries: int, global_batch: int) -> int:
    """How many whole steps lie between a position of the stream and a time in epochs; 0 where that is past."""
    end = math.floor(epochs * num_entries + 1e-6)  # a tenth of an epoch, ten times, is an epoch
    return max(0, (end - position) // global_batch)
