"""Training augmentation without state: horizontal flip, scale jitter and crop, as google/automl @6a54c87 does them.

Every random number is a hash of (seed, epoch, record): no rank, worker or order of work changes a sample, and any
sample can be made again by its key.

A picture is scaled so that it just fits into `factor` times the input, factor uniform in jitter_min..jitter_max. What
stands over the input is cut off at a random place, what is missing is padded at the bottom right. The cut is made in
whole source pixels before the resize, so that only what is kept need be decoded, and boxes follow the same map.
Boxes are clipped to the edge of the picture; the published code stops at the index of the last pixel, one short of it.
What else may happen to a picture stands in composites.py and distortions.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet import sampling
from effdet.boxes import PADDING, clip
from effdet.sampling import Chance

DRAWS = (Chance.FLIP, Chance.SCALE, Chance.CROP_Y, Chance.CROP_X)


@dataclass(frozen=True)
class RandAugment:
    """How RandAugment is applied (distortions.py)."""

    layers: int  # operations, one after the other
    magnitude: float  # 0..10, their strength
    operations: tuple[str, ...] | None = None  # these alone, to look at them; None: all


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training picture. What is not said to happen does not."""

    horizontal_flip: bool  # of every second picture
    jitter_min: float  # scale of the picture against the input
    jitter_max: float
    colour: float = 0.0  # 0..1, strength of brightness, contrast, saturation, hue
    rand_augment: RandAugment | None = None
    grid_mask: float = 0.0  # share of the pictures; so the next two
    mosaic: float = 0.0
    mixup: float = 0.0


class Placement(NamedTuple):
    """How n pictures come into the input."""

    window: tf.Tensor  # int32 [n, 4]: top, left, height, width kept of the source; source pixels
    content_size: tf.Tensor  # int32 [n, 2]: height, width the window is resized to; input pixels
    flip: tf.Tensor  # bool [n]: mirrored after the resize
    scale: tf.Tensor  # float32 [n]: input pixels -> source pixels


def draw(seed: int, epochs: NDArray[np.int64], records: NDArray[np.int64], slot: int = 0) -> NDArray[np.float64]:
    """The random numbers by which n pictures are placed: float64 [n, len(DRAWS)] in [0, 1).

    `records` are those of the samples; of a sample of several pictures each has numbers of its own, by its `slot`.
    """
    more = (slot,) if slot else ()
    return np.stack([sampling.uniform(seed, epochs, chance, records, *more) for chance in DRAWS], axis=1)


def place(
    draws: tf.Tensor, sizes: tf.Tensor, image_size: tuple[int, int] | tf.Tensor, augmentation: Augmentation
) -> Placement:
    """Where n pictures come to lie.

    draws: float64 [n, len(DRAWS)]; sizes: int64 [n, 2], height and width in source pixels;
    image_size: height, width of the input, or int32 [n, 2] of the place that each picture has there.
    """
    flip, jitter, *offsets = tf.unstack(draws, axis=1)
    factor = augmentation.jitter_min + jitter * (augmentation.jitter_max - augmentation.jitter_min)
    source = tf.cast(sizes, tf.float64)  # float64: a factor of 1 must give the input's size exactly
    goal = tf.cast(image_size, tf.float64)
    ratio = factor * tf.reduce_min(goal / source, axis=1)  # [n] input pixels a source pixel
    scaled = tf.maximum(tf.round(source * ratio[:, None]), 1)  # [n, 2]
    content = tf.minimum(scaled, goal)
    kept = tf.maximum(tf.round(source * content / scaled), 1)  # [n, 2] source pixels
    corner = tf.floor(tf.stack(offsets, axis=1) * (source - kept + 1))
    return Placement(
        window=tf.cast(tf.concat([corner, kept], axis=1), tf.int32),
        content_size=tf.cast(content, tf.int32),
        flip=(flip < 0.5) & augmentation.horizontal_flip,
        scale=tf.cast(1 / ratio, tf.float32),
    )


def place_boxes(boxes: tf.Tensor, class_ids: tf.Tensor, placement: Placement) -> tuple[tf.Tensor, tf.Tensor]:
    """Boxes in input pixels. What stands outside the window is clipped; boxes left without area are dropped.

    boxes: float32 [n, M, 4] yxyx source pixels; class_ids: int32 [n, M], PADDING where there is no box.
    Returns the same shapes, boxes in front in their order, zeros and PADDING behind.
    """
    window = tf.cast(placement.window, tf.float32)
    content = tf.cast(placement.content_size, tf.float32)
    corner = tf.tile(window[:, :2], [1, 2])[:, None]  # [n, 1, 4]
    ratio = tf.tile(content / window[:, 2:], [1, 2])[:, None]
    height, width = content[:, :1], content[:, 1:]
    clipped = clip((boxes - corner) * ratio, height, width)
    y1, x1, y2, x2 = tf.unstack(clipped, axis=2)
    flip = placement.flip[:, None]
    x1, x2 = tf.where(flip, width - x2, x1), tf.where(flip, width - x1, x2)
    kept = (class_ids != PADDING) & (y2 > y1) & (x2 > x1)
    return to_the_front(tf.stack([y1, x1, y2, x2], axis=2), class_ids, kept)


def to_the_front(boxes: tf.Tensor, class_ids: tf.Tensor, kept: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The boxes [..., M, 4] and class ids [..., M] that are kept, in their order; zeros and PADDING behind them."""
    order = tf.argsort(tf.cast(kept, tf.int32), direction="DESCENDING", stable=True)
    batch_dims = len(kept.shape) - 1
    return (
        tf.gather(tf.where(kept[..., None], boxes, 0), order, batch_dims=batch_dims),
        tf.gather(tf.where(kept, class_ids, PADDING), order, batch_dims=batch_dims),
    )
