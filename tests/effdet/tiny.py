"""A network of the family that is small enough to be traced and trained in a test, and batches for it."""

import dataclasses
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from effdet.config import BACKBONES, Backbone, ModelConfig, model_config
from effdet.distributed import OneProcess, Ranks
from effdet.losses import LossConfig
from effdet.model import build
from effdet.schedule import Schedule
from effdet.train_state import TrainState
from effdet.training import Optimization, Trainer

CONFIG = dataclasses.replace(
    model_config("efficientdet-lite0", num_classes=3),
    backbone="tiny",
    image_size=(64, 64),
    fpn_channels=16,
    fpn_repeats=1,
    head_repeats=1,
    max_level=5,
    survival_probability=0.8,  # of the last residual block: stochastic depth takes part
)

OPTIMIZATION = Optimization(
    batch_size=4,
    accumulate=1,
    schedule=Schedule(learning_rate=0.05, warmup_learning_rate=0.01, warmup_epochs=0.5, epochs=4.0),
    momentum=0.9,
    weight_decay=4e-5,
    clip_norm=10.0,
    ema_decay=0.99,
    losses=LossConfig(
        focal_alpha=0.25,
        focal_gamma=1.5,
        label_smoothing=0.0,
        huber_delta=0.1,
        box_loss_weight=50.0,
        box_loss="huber",
    ),
    jit_compile=False,
    gradient_checkpointing=False,
    sync_batch_norm=False,
    compression="none",
    reduction="average",
    max_bad_steps=0,
    seed=3,
)
IMAGES_AN_EPOCH = 20  # 5 steps of 4


def tiny_model(config: ModelConfig = CONFIG, precision: str = "float32", seed: int = 1) -> keras.Model:
    """The network with weights that depend on the seed alone."""
    keras.utils.set_random_seed(seed)
    with mock.patch.dict(BACKBONES, {"tiny": Backbone(width=0.25, depth=0.3, lite=True)}):
        return build(config, precision)


def tiny_trainer(state: TrainState, ranks: Ranks | None = None, **changes: Any) -> Trainer:
    """The trainer of CONFIG; `changes` are to OPTIMIZATION. It keeps no bad batch: it names its step."""
    optimization = dataclasses.replace(OPTIMIZATION, **changes)
    return Trainer(state, CONFIG, optimization, ranks or OneProcess(), lambda step, batch: f"batch {step}")


def tiny_batch(step: int, size: int = OPTIMIZATION.batch_size) -> dict[str, tf.Tensor]:
    """A batch as effdet.input_pipeline gives it; the same for the same step. Its first image is empty."""
    values = np.random.default_rng(step)
    centers = values.uniform(8, 56, (size, 5, 2))
    half_sides = values.uniform(4, 24, (size, 5, 2))
    boxes = np.clip(np.concatenate([centers - half_sides, centers + half_sides], axis=-1), 0, 64)
    class_ids = values.integers(0, 3, (size, 5))
    class_ids[:, 4] = class_ids[0] = -1
    boxes[class_ids < 0] = 0
    return {
        "image": tf.constant(values.integers(0, 256, (size, 64, 64, 3)), tf.uint8),
        "content_size": tf.constant([[64, 64]] * size, tf.int32),
        "boxes": tf.constant(boxes, tf.float32),
        "class_ids": tf.constant(class_ids, tf.int32),
        "image_id": tf.constant(1000 * step + np.arange(size), tf.int64),
        "scale": tf.ones([size]),
    }
