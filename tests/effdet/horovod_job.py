"""What the ranks of test_distributed.py run: `horovodrun -np N python -m tests.effdet.horovod_job FOLDER N`.

Every rank writes what it ended with to FOLDER/RANK.npz.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet.distributed import Ranks, connect
from effdet.errors import EffdetError
from effdet.layers import FusedBatchNormalization
from effdet.training import Trainer, TrainState
from tests.effdet.tiny import CONFIG, OPTIMIZATION, tiny_batch, tiny_model

GLOBAL_BATCH = 6  # for 1, 2 and 3 ranks
STEPS = 6
TOO_MUCH = 2.0**18  # a loss scale: a positive anchor's gradient leaves float16, a background's does not


def frozen_model() -> keras.Model:
    """BatchNorm by its moving statistics: a batch's images do not see each other."""
    model = tiny_model()
    for layer in model.layers:
        if isinstance(layer, FusedBatchNormalization):
            layer.trainable = False
    return model


def batches(ranks: Ranks, slow_rank: int | None = None) -> Iterator[dict[str, tf.Tensor]]:
    """This rank's parts of the global batches."""
    size = GLOBAL_BATCH // ranks.size
    for step in itertools.count():
        if ranks.rank == slow_rank:
            time.sleep(0.1)
        whole = tiny_batch(step, GLOBAL_BATCH)
        yield {key: value[ranks.rank * size :][:size] for key, value in whole.items()}


def trained(model: keras.Model, ranks: Ranks, slow_rank: int | None = None) -> dict[str, NDArray[np.generic]]:
    """The state after some steps, and each step's figures."""
    optimization = dataclasses.replace(OPTIMIZATION, batch_size=GLOBAL_BATCH // ranks.size)
    state = TrainState(model, OPTIMIZATION.momentum, loss_scaling=False)
    trainer = Trainer(state, CONFIG, optimization, ranks)
    records = [dataclasses.astuple(record) for record in trainer.run(batches(ranks, slow_rank), STEPS, 5.0)]
    return {**state.arrays(), "records": np.array(records)}


def collectives(ranks: Ranks) -> dict[str, NDArray[np.generic]]:
    """What each collective gives, for rank r: of r and 10 r, of r + 1, and so on."""
    variable = tf.Variable(float(ranks.rank + 5))
    ranks.broadcast([variable])
    means = ranks.average([tf.constant(float(ranks.rank)), tf.constant([10.0 * ranks.rank])])
    told = ranks.gather({"rank": ranks.rank, "text": "x" * ranks.rank})
    return {
        "mean": means[0].numpy(),
        "means": means[1].numpy(),
        "sum": ranks.sum(tf.constant(ranks.rank + 1.0)).numpy(),
        "broadcast": variable.numpy(),
        "gathered": np.array([about["rank"] for about in told]),
    }


def not_finite(ranks: Ranks) -> str:
    """The error where the last rank's second batch spoils the loss."""
    state = TrainState(tiny_model(), OPTIMIZATION.momentum, loss_scaling=False)
    optimization = dataclasses.replace(OPTIMIZATION, batch_size=GLOBAL_BATCH // ranks.size)

    def spoilt() -> Iterator[dict[str, tf.Tensor]]:
        for step, batch in enumerate(batches(ranks)):
            bad = step == 1 and ranks.rank == ranks.size - 1
            yield {**batch, "image": tf.cast(batch["image"], tf.float32) * float("nan")} if bad else batch

    try:
        list(Trainer(state, CONFIG, optimization, ranks).run(spoilt(), 4, 5.0))
    except EffdetError as error:
        return str(error)
    return "no error"


class Watched:
    """The ranks, and whether what this one last gave to the mean was finite."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.rank, self.size = ranks.rank, ranks.size
        self.sum, self.broadcast, self.gather = ranks.sum, ranks.broadcast, ranks.gather
        self.finite = tf.Variable(True)

    def average(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        self.finite.assign(tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors]))
        return self._ranks.average(tensors)


def overflow(ranks: Ranks) -> dict[str, NDArray[np.generic]]:
    """Three steps in float16; in the second the gradient of the last rank alone overflows: it alone has boxes.

    A loss scale that lets the others' gradients pass is too much for a box's.
    """
    watched = Watched(ranks)
    state = TrainState(tiny_model(precision="mixed_float16"), OPTIMIZATION.momentum, loss_scaling=True)
    optimization = dataclasses.replace(OPTIMIZATION, batch_size=GLOBAL_BATCH // ranks.size)
    trainer = Trainer(state, CONFIG, optimization, watched)
    scales, finite, norms, weights = [], [], [], [state.weights.numpy()]
    for step, batch in enumerate(itertools.islice(batches(ranks), 3)):
        if ranks.rank < ranks.size - 1:
            batch = {
                **batch,
                "boxes": tf.zeros_like(batch["boxes"]),
                "class_ids": tf.fill(batch["class_ids"].shape, -1),
            }
        state.optimizer.dynamic_scale.assign(TOO_MUCH if step == 1 else 2.0**8)
        (record,) = trainer.run(iter([batch]), 1, 5.0)
        scales.append(state.loss_scale)
        finite.append(watched.finite.numpy())
        norms.append(record.gradient_norm)
        weights.append(state.weights.numpy())
    found = {"scales": scales, "finite": finite, "norms": norms, "weights": weights}
    return {name: np.array(values) for name, values in found.items()} | {
        f"state/{name}": value for name, value in state.arrays().items()
    }


def main(folder: Path, size: int) -> None:
    ranks = connect(size)
    results = {f"collective/{name}": value for name, value in collectives(ranks).items()}
    if size <= 2:
        results |= {f"frozen/{name}": value for name, value in trained(frozen_model(), ranks).items()}
        results["error"] = np.array(not_finite(ranks))
        results |= {f"overflow/{name}": value for name, value in overflow(ranks).items()}
    slow_rank = int(sys.argv[3]) if len(sys.argv) > 3 else None
    # Each rank starts from other weights; rank 0's are to win.
    model = tiny_model(seed=1 + ranks.rank)
    results |= {f"free/{name}": value for name, value in trained(model, ranks, slow_rank).items()}
    np.savez(folder / f"{ranks.rank}.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
