"""Training pictures made of several: mosaic (arXiv:2004.10934) and mixup, as arXiv:2107.08430 (YOLOX) does it.

A sample has slots for entries: its own, three for the other quarters of a mosaic, one for what it is mixed with.
A mosaic cuts the input into four at a random point; each picture comes into its quarter by the rule by which a picture
comes into the input, and is pushed to that point, what is left being FILL. Mixup is the mean of two pictures that both
stand at the top left, FILL around the smaller one; a mosaic may be mixed, with a single picture.
A sample has the boxes of all its pictures; of more than there are places for, the largest stay, as in the shards.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet import sampling
from effdet.augment import Augmentation
from effdet.boxes import PADDING, area
from effdet.distortions import FILL
from effdet.sampling import Chance

OWN = 0
# slot -> in the lower half of the input, in the right one
QUARTERS = {OWN: (False, False), 1: (False, True), 2: (True, False), 3: (True, True)}
MIXED = 4
EMPTY = -1
FIRST_PARTNER = 2  # of the numbers by which a chance is drawn: before it whether, and where the quarters meet
CENTRE = (0.25, 0.75)  # where the quarters may meet, as a share of the input's height and width


class Choice(NamedTuple):
    """What n samples are made of; its slots are `slots(augmentation)`."""

    entries: NDArray[np.int64]  # [slots, n] the entry in each slot, or EMPTY
    centre: NDArray[np.float64]  # [n, 2] where the quarters meet, shares of the input's height and width; 1 of a single


def slots(augmentation: Augmentation) -> list[int]:
    """The slots that some sample may need."""
    quarters = list(QUARTERS) if augmentation.mosaic else [OWN]
    return quarters + [MIXED] * (augmentation.mixup > 0)


def choose(seed: int, positions: NDArray[np.int64], num_entries: int, augmentation: Augmentation) -> Choice:
    """What the samples at `positions` [n] of the stream are made of."""
    epochs, own = sampling.entries(seed, num_entries, positions)

    def drawn(chance: Chance, number: int) -> NDArray[np.float64]:
        return sampling.uniform(seed, epochs, chance, own, number)

    chosen = {OWN: own}
    mosaic = drawn(Chance.MOSAIC, 0) < augmentation.mosaic
    mixed = drawn(Chance.MIXUP, 0) < augmentation.mixup
    for slot in slots(augmentation)[1:]:
        chance, used = (Chance.MIXUP, mixed) if slot == MIXED else (Chance.MOSAIC, mosaic)
        partners = sampling.partners(seed, num_entries, positions, chance, FIRST_PARTNER + slot)
        chosen[slot] = np.where(used, partners, EMPTY)
    low, high = CENTRE
    centre = np.stack([low + drawn(Chance.MOSAIC, 1 + axis) * (high - low) for axis in (0, 1)], axis=1)
    return Choice(np.stack(list(chosen.values())), np.where(mosaic[:, None], centre, 1.0))


def quarter(slot: int, centre: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    """Height and width of the place that a slot's pictures have: int32 [n, 2]. `centre`: float64 [n, 2] as Choice's."""
    size = tf.constant(image_size, tf.int32)
    if slot == MIXED:
        return tf.broadcast_to(size, tf.shape(centre))
    point = tf.cast(tf.round(centre * tf.cast(size, tf.float64)), tf.int32)
    return tf.maximum(tf.where(tf.constant(QUARTERS[slot]), size - point, point), 1)  # 1: of an empty slot


def corner(slot: int, centre: tf.Tensor, content_size: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    """Where in the input the top left corner of a slot's picture of `content_size` [n, 2] lies: int32 [n, 2]."""
    if slot == MIXED:
        return tf.zeros_like(content_size)
    first = quarter(OWN, centre, image_size)
    pushed = tf.where(tf.constant(QUARTERS[slot]), first, first - content_size)
    return tf.where(is_mosaic(centre)[:, None], pushed, 0)


def is_mosaic(centre: tf.Tensor) -> tf.Tensor:
    """Whether a sample is a mosaic: bool [...], of `centre` [..., 2] as Choice's."""
    return centre[..., 0] < 1


def join(
    parts: dict[int, dict[str, tf.Tensor]],
    centre: tf.Tensor,
    mixed: tf.Tensor,
    image_size: tuple[int, int],
    max_boxes: int,
) -> dict[str, tf.Tensor]:
    """Samples of all slots' pictures, each placed for itself: those of the OWN slot with boxes and size of the whole.

    Of each part are taken content_size int32 [n, 2], boxes float32 [n, M, 4] and class_ids int32 [n, M]; the joined
    boxes, [n, max_boxes, 4], stand by their area, the largest first. `mixed`: bool [n], whether the MIXED slot's
    picture counts; the placement of an empty slot has a size, too.
    """
    own = parts[OWN]
    moved = []
    for slot, part in parts.items():
        shift = tf.cast(corner(slot, centre, part["content_size"], image_size), tf.float32)
        moved.append(part["boxes"] + tf.tile(shift, [1, 2])[:, None])
    boxes = tf.concat(moved, axis=1)
    class_ids = tf.concat([part["class_ids"] for part in parts.values()], axis=1)
    areas = tf.where(class_ids == PADDING, -1.0, area(boxes))
    order = tf.argsort(areas, axis=1, direction="DESCENDING", stable=True)[:, :max_boxes]
    boxes, class_ids = (tf.gather(values, order, batch_dims=1) for values in (boxes, class_ids))
    size = tf.where(is_mosaic(centre)[:, None], tf.constant(image_size, tf.int32), own["content_size"])
    if MIXED in parts:
        size = tf.where(mixed[:, None], tf.maximum(size, parts[MIXED]["content_size"]), size)
    return {
        **own,
        "content_size": size,
        "boxes": tf.where((class_ids == PADDING)[..., None], 0.0, boxes),
        "class_ids": class_ids,
    }


def compose(
    pictures: Sequence[Callable[[], tf.Tensor]],
    centre: tf.Tensor,
    mixed: tf.Tensor,
    augmentation: Augmentation,
    image_size: tuple[int, int],
) -> tf.Tensor:
    """The picture of a sample: uint8 [h, w, 3]. Pictures of slots that are empty are not asked for.

    Args:
        pictures: of each slot, what makes its picture uint8 [h, w, 3].
        centre: float64 [2], as Choice's.
        mixed: bool, whether there is a picture in the MIXED slot.
    """
    own = pictures[OWN]()
    if augmentation.mosaic:
        others = pictures[1 : len(QUARTERS)]
        own = tf.cond(
            is_mosaic(centre),
            lambda: _mosaic([own, *(other() for other in others)], centre, image_size),
            lambda: own,
        )
    if augmentation.mixup:
        own = tf.cond(mixed, lambda: _mean(own, pictures[-1]()), lambda: own)
    return own


def _mosaic(pictures: Sequence[tf.Tensor], centre: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    placed = []
    for slot, picture in enumerate(pictures):
        spare = quarter(slot, centre[None], image_size)[0] - tf.shape(picture)[:2]
        before = tf.where(tf.constant(QUARTERS[slot]), 0, spare)
        placed.append(_framed(picture, before, spare - before))
    upper, lower = (tf.concat(row, axis=1) for row in (placed[:2], placed[2:]))
    return tf.concat([upper, lower], axis=0)


def _mean(one: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    size = tf.maximum(tf.shape(one), tf.shape(other))[:2]
    summands = [tf.cast(_framed(picture, [0, 0], size - tf.shape(picture)[:2]), tf.float32) for picture in (one, other)]
    return tf.cast((summands[0] + summands[1] + 1) * 0.5, tf.uint8)  # halves go up


def _framed(picture: tf.Tensor, before: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
    """The picture in FILL: rows and columns before and behind it."""
    paddings = tf.concat([tf.stack([before, after], axis=1), [[0, 0]]], axis=0)
    return tf.pad(picture, paddings, constant_values=tf.constant(FILL, tf.uint8))
