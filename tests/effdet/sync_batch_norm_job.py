"""What the ranks of test_sync_batch_norm.py run.

    horovodrun -np N python -m tests.effdet.sync_batch_norm_job FOLDER N

Every rank writes what it found to FOLDER/RANK.npz. A third argument is the rank that is slow.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet import layers
from effdet.distributed import Ranks, connect
from effdet.layers import FusedBatchNormalization
from effdet.recompute import recomputing
from tests.effdet.tiny import tiny_model

IMAGES = 6  # in all, for 1, 2 and 3 ranks
CHANNELS = 5
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")

Arrays = dict[str, NDArray[Any]]


def rows(ranks: Ranks) -> slice:
    """This rank's images."""
    own = IMAGES // ranks.size
    return slice(ranks.rank * own, (ranks.rank + 1) * own)


def over_ranks(
    ranks: Ranks, stack: Callable[[tf.Tensor], tf.Tensor] | None = None
) -> contextlib.AbstractContextManager:
    """Batch normalization over the ranks, where there are several."""
    return layers.synchronized(stack or ranks.stack, ranks.size) if ranks.size > 1 else contextlib.nullcontext()


def images() -> NDArray[np.float32]:
    """Of values about 0, 10, .. 50, scattered by 1, 2, .. 6: a rank's mean is far outside of another's values."""
    values = np.random.default_rng(0).standard_normal((IMAGES, 8, 7, CHANNELS))
    order = np.arange(IMAGES).reshape(-1, 1, 1, 1)
    return (values * (order + 1) + 10.0 * order).astype(np.float32)


def layer_results(ranks: Ranks, policy: str) -> Arrays:
    """Output, new statistics and the gradients of this rank's part of a loss of all images."""
    layer = FusedBatchNormalization(0.9, 1e-3, dtype=policy)
    layer.build((None, 8, 7, CHANNELS))
    drawn = np.random.default_rng(1).standard_normal((2, CHANNELS)).astype(np.float32)
    layer.set_weights([*drawn, np.full(CHANNELS, 2.0), np.full(CHANNELS, 3.0)])
    x = tf.cast(images()[rows(ranks)], layer.compute_dtype)
    weights = np.random.default_rng(2).standard_normal((IMAGES, 8, 7, CHANNELS)).astype(np.float32)[rows(ranks)]
    sources = [x, layer.gamma.value, layer.beta.value]

    @tf.function(autograph=False)
    def run() -> tuple[tf.Tensor, list[tf.Tensor]]:
        with over_ranks(ranks), tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(tf.cast(y, tf.float32) * weights)
        return y, tape.gradient(loss, sources)

    y, gradients = run()
    found = {"y": y, **dict(zip(("x", "gamma", "beta"), gradients, strict=True))}
    found |= {"mean": layer.moving_mean.value, "variance": layer.moving_variance.value}
    arrays = {name: tf.cast(tensor, tf.float32).numpy() for name, tensor in found.items()}
    return {**arrays, "dtype": np.array(y.dtype.name)}


def network_results(ranks: Ranks, again: bool = False, sleep: float = 0.0) -> Arrays:
    """A network's outputs, statistics, mean gradient over the ranks, and how often it asked the others.

    `again`: with gradient checkpointing.
    """
    model = tiny_model()
    network = recomputing(model) if again else model
    pixels = np.random.default_rng(3).standard_normal((IMAGES, 64, 64, 3)).astype(np.float32)
    noise = np.random.default_rng(4).uniform(size=(IMAGES, layers.num_stochastic_depths(model))).astype(np.float32)
    variables = [variable.value for variable in model.trainable_variables]
    asked = []

    def stack(tensor: tf.Tensor) -> tf.Tensor:
        asked.append(tensor)
        return ranks.stack(tensor)

    @tf.function(autograph=False)
    def run() -> tuple[dict[str, tf.Tensor], list[tf.Tensor]]:
        with over_ranks(ranks, stack), layers.depth_noise(tf.constant(noise[rows(ranks)])):
            with tf.GradientTape() as tape:
                outputs = network(tf.constant(pixels[rows(ranks)]), training=True)
                loss = ranks.size * sum(tf.reduce_sum(tf.sin(output)) for output in outputs.values())
            gradients = tape.gradient(loss, variables)
        return outputs, ranks.average(gradients, "gradients") if ranks.size > 1 else gradients

    time.sleep(sleep)
    outputs, gradients = run()
    flat = np.concatenate([np.ravel(gradient) for gradient in gradients])
    statistics = np.concatenate([np.ravel(variable) for variable in model.non_trainable_variables])
    numbers = {"gradient": flat, "statistics": statistics, "stacks": np.array(len(asked))}
    return {**{name: output.numpy() for name, output in outputs.items()}, **numbers}


def main(folder: Path, size: int, slow: int | None) -> None:
    ranks = connect(size)
    sleep = 2.0 if ranks.rank == slow else 0.0
    parts = {"network": network_results(ranks, sleep=sleep)}
    if size == 2:
        parts |= {policy: layer_results(ranks, policy) for policy in POLICIES}
        parts["again"] = network_results(ranks, again=True)
    np.savez(
        folder / f"{ranks.rank}.npz",
        **{f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
