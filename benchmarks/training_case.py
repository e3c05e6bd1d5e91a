"""A training step to be measured: effdet.training's, whole, on uint8 pictures at random."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from effdet import layers
from effdet.augment import Augmentation
from effdet.config import model_config
from effdet.distributed import Ranks
from effdet.input_pipeline import Batch, train_batches
from effdet.losses import LossConfig
from effdet.model import build
from effdet.schedule import Schedule
from effdet.train_state import TrainState
from effdet.training import Optimization, Trainer

CLASSES = 90
MAX_BOXES = 100
STOCK = {  # instead of effdet.layers'
    "FusedBatchNormalization": lambda momentum, epsilon, **options: keras.layers.BatchNormalization(
        momentum=momentum, epsilon=epsilon, **options
    ),
    "Swish": lambda **options: keras.layers.Activation("swish", **options),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    model: str
    size: int  # side of the input, pixels
    batch_size: int  # images a rank
    precision: str = "float32"
    stock: bool = False  # keras.layers.BatchNormalization and Keras' swish
    jit_compile: bool = False
    gradient_checkpointing: bool = False


def build_trainer(case: Case, ranks: Ranks) -> Trainer:
    """The trainer of a fresh model."""
    config = model_config(case.model, CLASSES, (case.size, case.size))
    keras.utils.set_random_seed(1)
    with mock.patch.multiple(layers, **STOCK) if case.stock else contextlib.nullcontext():
        model = build(config, case.precision)
    optimization = Optimization(
        batch_size=case.batch_size,
        accumulate=1,
        schedule=Schedule(learning_rate=0.01, warmup_learning_rate=0.001, warmup_epochs=1, epochs=10),
        momentum=0.9,
        weight_decay=4e-5,
        clip_norm=10.0,
        ema_decay=0.999,
        losses=LossConfig(
            focal_alpha=0.25,
            focal_gamma=1.5,
            label_smoothing=0.0,
            huber_delta=0.1,
            box_loss_weight=50.0,
            box_loss="huber",
        ),
        jit_compile=case.jit_compile,
        gradient_checkpointing=case.gradient_checkpointing,
        sync_batch_norm=False,
        compression="none",
        reduction="average",
        max_bad_steps=0,
        seed=1,
    )
    state = TrainState(model, 0.9, case.precision == "mixed_float16")
    return Trainer(state, config, optimization, ranks, lambda step, batch: "no file")


def constant_batches(case: Case) -> Iterator[Batch]:
    """One batch again and again: 15 boxes a picture, of 20 places."""
    random = np.random.default_rng(1)
    shape = (case.batch_size, 20)
    centers, half_sides = random.uniform(0, case.size, (*shape, 2)), random.uniform(4, case.size / 4, (*shape, 2))
    boxes = np.clip(np.concatenate([centers - half_sides, centers + half_sides], axis=-1), 0, case.size)
    class_ids = random.integers(0, CLASSES, shape)
    class_ids[:, 15:], boxes[:, 15:] = -1, 0
    pixels = random.integers(0, 256, (case.batch_size, case.size, case.size, 3))
    batch = {
        "image": tf.constant(pixels, tf.uint8),
        "content_size": tf.fill([case.batch_size, 2], case.size),
        "boxes": tf.constant(boxes, tf.float32),
        "class_ids": tf.constant(class_ids, tf.int32),
        "image_id": tf.range(case.batch_size, dtype=tf.int64),
        "scale": tf.ones([case.batch_size]),
    }
    while True:
        yield batch


def real_batches(case: Case, ranks: Ranks, shards: list[str], workers: int) -> Iterator[Batch]:
    """The input pipeline's batches of the published recipes, of shards with at most 90 classes."""
    batches: Iterator[Batch] = iter(
        train_batches(
            [Path(shard) for shard in shards],
            image_size=(case.size, case.size),
            max_boxes=MAX_BOXES,
            batch_size=case.batch_size,
            rank=ranks.rank,
            num_ranks=ranks.size,
            seed=1,
            start=0,
            augmentation=Augmentation(horizontal_flip=True, jitter_min=0.1, jitter_max=2.0),
            workers=workers,
        )
    )
    return batches
