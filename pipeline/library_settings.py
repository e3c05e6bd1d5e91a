"""The train parameters as the model library takes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effdet.augment import Augmentation, RandAugment
from effdet.losses import LossConfig
from effdet.sampling import index_list, repeat_factors
from effdet.schedule import Schedule
from effdet.training import Optimization
from pipeline.errors import PipelineError
from pipeline.params import Augment, Train
from pipeline.shard_files import train_classes


def entries_of(settings: Train, manifest: Mapping[str, Any], shards: Path) -> NDArray[np.int64]:
    """The record that each entry of an epoch shows: int64 [entries]; each record once, or rare classes' more often."""
    records = int(manifest["splits"]["train"]["images"])
    threshold = settings.augment.repeat_factor
    if not threshold:
        return np.arange(records)
    classes = train_classes(shards)
    if len(classes) != records:
        raise PipelineError(
            f"{shards}: the list of the classes in each image has {len(classes)} images, the manifest {records}; run "
            "`dvc repro shard`"
        )
    return index_list(settings.seed, repeat_factors(classes, threshold))


def augmentation_of(settings: Augment) -> Augmentation:
    """The augment parameters as the library takes them."""
    rand_augment = settings.rand_augment
    return Augmentation(
        horizontal_flip=settings.horizontal_flip,
        jitter_min=settings.jitter_min,
        jitter_max=settings.jitter_max,
        colour=settings.colour,
        rand_augment=RandAugment(rand_augment.layers, rand_augment.magnitude) if rand_augment else None,
        grid_mask=settings.grid_mask,
        mosaic=settings.mosaic,
        mixup=settings.mixup,
    )


def optimization_of(settings: Train, num_ranks: int) -> Optimization:
    """The train parameters as the library takes them, for a number of ranks.

    The linear scaling rule (arXiv:1706.02677), where it is asked for: learning_rate is meant for learning_rate_batch
    images a step, and one for twice as many is twice as large.
    """
    images_a_step = num_ranks * settings.batch_size * settings.accumulate
    scaling = images_a_step / (settings.learning_rate_batch or images_a_step)
    return Optimization(
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        schedule=Schedule(
            settings.learning_rate * scaling,
            settings.warmup_learning_rate * scaling,
            settings.warmup_epochs,
            settings.schedule_epochs,
        ),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        ema_decay=settings.ema_decay,
        losses=LossConfig(
            focal_alpha=settings.focal_alpha,
            focal_gamma=settings.focal_gamma,
            label_smoothing=settings.label_smoothing,
            huber_delta=settings.huber_delta,
            box_loss_weight=settings.box_loss_weight,
            box_loss=settings.box_loss,
        ),
        jit_compile=settings.jit_compile,
        gradient_checkpointing=settings.gradient_checkpointing,
        sync_batch_norm=settings.sync_batch_norm,
        compression=settings.compression,
        reduction=settings.reduction,
        max_bad_steps=settings.max_bad_steps,
        seed=settings.seed,
    )
