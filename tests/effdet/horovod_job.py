"""What the ranks of test_distributed.py run: `horovodrun -np N python -m tests.effdet.horovod_job FOLDER N [SLOW]`.

FOLDER/shards is there (tests.pipeline.tiny_training). Every rank writes what it ended with to FOLDER/RANK.npz. With
SLOW, a rank that is slow, only the long training is done.
"""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet.augment import Augmentation
from effdet.distributed import Ranks, connect
from effdet.errors import EffdetError
from effdet.input_pipeline import train_batches
from effdet.layers import FusedBatchNormalization
from effdet.train_state import TrainState
from effdet.training import StepRecord
from tests.effdet.tiny import CONFIG, IMAGES_AN_EPOCH, OPTIMIZATION, tiny_batch, tiny_model, tiny_trainer

GLOBAL_BATCH = 8  # for 1, 2 and 4 ranks
STEPS = 6
MANY_STEPS = 50
AUGMENTATION = Augmentation(True, 0.5, 1.5, colour=0.5, mixup=0.3)
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


def from_shards(folder: Path, ranks: Ranks) -> Iterator[dict[str, tf.Tensor]]:
    """The same of real shards, augmented."""
    return iter(
        train_batches(
            [folder / "shards" / "train-00000-of-00001.tfrecord"],
            image_size=CONFIG.image_size,
            max_boxes=4,
            batch_size=GLOBAL_BATCH // ranks.size,
            rank=ranks.rank,
            num_ranks=ranks.size,
            seed=1,
            start=0,
            augmentation=AUGMENTATION,
            workers=1,
        )
    )


def trained(
    model: keras.Model, ranks: Ranks, data: Iterator[dict[str, tf.Tensor]], steps: int = STEPS, **changes: Any
) -> dict[str, NDArray[np.generic]]:
    """The state after some steps, and each step's figures. `changes` are to OPTIMIZATION."""
    state = TrainState(model, OPTIMIZATION.momentum, loss_scaling=False)
    trainer = tiny_trainer(state, ranks, batch_size=GLOBAL_BATCH // ranks.size, **changes)
    records = [figures(record) for record in trainer.run(data, steps, IMAGES_AN_EPOCH)]
    return {**state.arrays(), "records": np.array(records)}


def figures(record: StepRecord) -> list[float]:
    """What a record says of the step, without how long it took."""
    return [record.learning_rate, record.loss, record.class_loss, record.box_loss, record.l2_loss, record.gradient_norm]


GRADIENT_PARTS = (3, 4)


def own_gradient(rank: int) -> tf.Tensor:
    """A rank's gradient of two parts, for Adasum."""
    return tf.constant(np.random.default_rng(rank).normal(size=sum(GRADIENT_PARTS)), tf.float32)


def collectives(ranks: Ranks) -> dict[str, NDArray[np.generic]]:
    """What each collective gives, for rank r: of r and 10 r, of r + 1, and so on."""
    variable = tf.Variable(float(ranks.rank + 5))
    ranks.broadcast([variable])
    means = ranks.average([tf.constant(float(ranks.rank)), tf.constant([10.0 * ranks.rank])], "means")
    told = ranks.gather({"rank": ranks.rank, "text": "x" * ranks.rank})
    vector = tf.constant([60000.0, -1.0, ranks.rank + 0.5, 0.0, 2.0 * ranks.rank])  # the first adds up beyond float16
    return {
        "fp16": ranks.average_fp16(vector).numpy(),
        "bf16": ranks.average_bf16(vector).numpy(),
        "adasum": ranks.adasum(own_gradient(ranks.rank), GRADIENT_PARTS).numpy(),
        "mean": means[0].numpy(),
        "means": means[1].numpy(),
        "stacked": ranks.stack(tf.constant([ranks.rank, 10])).numpy(),
        "sum": ranks.sum(tf.constant(ranks.rank + 1.0), "sum").numpy(),
        "broadcast": variable.numpy(),
        "gathered": np.array([about["rank"] for about in told]),
    }


def not_finite(ranks: Ranks) -> str:
    """The error where the last rank's second batch spoils the loss."""
    state = TrainState(tiny_model(), OPTIMIZATION.momentum, loss_scaling=False)

    def spoilt() -> Iterator[dict[str, tf.Tensor]]:
        for step, batch in enumerate(batches(ranks)):
            bad = step == 1 and ranks.rank == ranks.size - 1
            yield {**batch, "image": tf.cast(batch["image"], tf.float32) * float("nan")} if bad else batch

    try:
        list(tiny_trainer(state, ranks, batch_size=GLOBAL_BATCH // ranks.size).run(spoilt(), 4, IMAGES_AN_EPOCH))
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

    def average(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        self.finite.assign(tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors]))
        return self._ranks.average(tensors, name)


def overflow(ranks: Ranks) -> dict[str, NDArray[np.generic]]:
    """Three steps in float16; in the second the gradient of the last rank alone overflows: it alone has boxes.

    A loss scale that lets the others' gradients pass is too much for a box's.
    """
    watched = Watched(ranks)
    state = TrainState(tiny_model(precision="mixed_float16"), OPTIMIZATION.momentum, loss_scaling=True)
    trainer = tiny_trainer(state, watched, batch_size=GLOBAL_BATCH // ranks.size)
    scales, finite, norms, weights = [], [], [], [state.weights.numpy()]
    for step, batch in enumerate(itertools.islice(batches(ranks), 3)):
        if ranks.rank < ranks.size - 1:
            batch = {
                **batch,
                "boxes": tf.zeros_like(batch["boxes"]),
                "class_ids": tf.fill(batch["class_ids"].shape, -1),
            }
        state.optimizer.dynamic_scale.assign(TOO_MUCH if step == 1 else 2.0**8)
        (record,) = trainer.run(iter([batch]), 1, IMAGES_AN_EPOCH)
        scales.append(float(state.optimizer.dynamic_scale))
        finite.append(watched.finite.numpy())
        norms.append(record.gradient_norm)
        weights.append(state.weights.numpy())
    found = {"scales": scales, "finite": finite, "norms": norms, "weights": weights}
    return {name: np.array(values) for name, values in found.items()} | {
        f"state/{name}": value for name, value in state.arrays().items()
    }


def main(folder: Path, size: int, slow_rank: int | None) -> None:
    ranks = connect(size)
    # Each rank starts from other weights; rank 0's are to win.
    model = tiny_model(seed=1 + ranks.rank)
    found = {"free": trained(model, ranks, batches(ranks, slow_rank), MANY_STEPS)}
    if slow_rank is None:
        found["collective"] = collectives(ranks)
    if slow_rank is None and size == 2:
        found["frozen"] = trained(frozen_model(), ranks, from_shards(folder, ranks))
        found["synchronized"] = trained(tiny_model(), ranks, from_shards(folder, ranks), steps=1, sync_batch_norm=True)
        found["apart"] = trained(tiny_model(), ranks, from_shards(folder, ranks), steps=1)
        found["narrow"] = trained(frozen_model(), ranks, from_shards(folder, ranks), compression="bf16")
        found["adasum"] = trained(frozen_model(), ranks, from_shards(folder, ranks), reduction="adasum")
        found["overflow"] = overflow(ranks)
        found["error"] = {"text": np.array(not_finite(ranks))}
    named = {f"{part}/{name}": value for part, values in found.items() for name, value in values.items()}
    np.savez(folder / f"{ranks.rank}.npz", **named)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
