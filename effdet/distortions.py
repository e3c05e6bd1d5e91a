"""Colour distortion, RandAugment and GridMask: what is done to a training picture after it came to its place.

A picture is uint8 [h, w, 3] without padding, of any size, and keeps it: what moves, moves inside of it, so that the
part of the input that counts as picture stays what it is. Where nothing is left to show it becomes FILL.

colour: as SSD (arXiv:1512.02325) and its code: brightness, contrast, saturation and hue, all four of every picture. At
strength 1 -32..32 levels are added, contrast and saturation get factors of 0.5..1.5, hue turns by -18..18 degrees; the
ranges shrink with the strength. One linear map (saturation and hue in YIQ), clipped once, at its end.

rand_augment: RandAugment (arXiv:1909.13719): `layers` times one of its 14 operations; those that move pixels move
boxes with them, as in arXiv:1906.11172. Their strength is magnitude / 10, its sign drawn, of these ranges: rotate 30
degrees; shear 0.3; translate 150/331 of the side; colour, contrast, brightness, sharpness by 1 -+ 0.9; posterize to 4
bits; solarize from 0 on. autocontrast and equalize have none.

grid_mask: GridMask (arXiv:2001.04086) in a share of the pictures: squares in a grid become FILL, 1 - 0.6 of its period
wide; the period is 96/224 to 224/224 of the shorter side (the paper's numbers for ImageNet), its phase drawn.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet import sampling
from effdet.augment import Augmentation, RandAugment, to_the_front
from effdet.boxes import PADDING, clip
from effdet.errors import EffdetError
from effdet.sampling import Chance

FILL = 114  # grey: ImageNet's mean over pixels and channels, which comes near 0 when normalized, as padding is
LUMA = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)
YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])  # of RGB
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, 0.5, 0.5, math.radians(18)
ENHANCEMENT = 0.9
ROTATION, SHEAR, TRANSLATION = math.radians(30), 0.3, 150 / 331
POSTERIZED_BITS = 4
GRID_KEPT = 0.6
GRID_PERIOD = (96 / 224, 1.0)

COLOUR_DRAWS = 4
LAYER_DRAWS = 2
GRID_DRAWS = 4


def _streams(augmentation: Augmentation) -> list[tuple[Chance, int]]:
    """The random numbers of a sample, by their chance and place in it, in the order in which `distort` takes them."""
    layers = augmentation.rand_augment.layers if augmentation.rand_augment else 0
    counts = {
        Chance.COLOUR: COLOUR_DRAWS if augmentation.colour else 0,
        Chance.RAND_AUGMENT: layers * LAYER_DRAWS,
        Chance.GRID_MASK: GRID_DRAWS if augmentation.grid_mask else 0,
    }
    return [(chance, number) for chance, count in counts.items() for number in range(count)]


def num_draws(augmentation: Augmentation) -> int:
    """How many random numbers a sample needs; 0 where nothing is distorted."""
    return len(_streams(augmentation))


def draw(
    seed: int, epochs: NDArray[np.int64], records: NDArray[np.int64], augmentation: Augmentation
) -> NDArray[np.float64]:
    """The random numbers of n samples: float64 [n, num_draws(augmentation)] in [0, 1)."""
    draws = np.empty((len(records), num_draws(augmentation)))
    for column, (chance, number) in enumerate(_streams(augmentation)):
        draws[:, column] = sampling.uniform(seed, epochs, chance, records, number)
    return draws


def distort(
    image: tf.Tensor, boxes: tf.Tensor, class_ids: tf.Tensor, draws: tf.Tensor, augmentation: Augmentation
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """A picture uint8 [h, w, 3] and its boxes float32 [M, 4], class ids int32 [M], distorted: the same shapes.

    draws: float64 [k], a sample's row of `draw`. Boxes that left the picture are dropped, the others in front.
    """
    numbers = iter(tf.unstack(tf.cast(draws, tf.float32)))
    image = tf.ensure_shape(image, [None, None, 3])
    if augmentation.colour:
        image = colour(image, [next(numbers) for _ in range(COLOUR_DRAWS)], augmentation.colour)
    if augmentation.rand_augment:
        for _ in range(augmentation.rand_augment.layers):
            chosen, sign = (next(numbers) for _ in range(LAYER_DRAWS))
            image, boxes, class_ids = rand_augment(image, boxes, class_ids, chosen, sign, augmentation.rand_augment)
    if augmentation.grid_mask:
        masked, *numbers_of_grid = (next(numbers) for _ in range(GRID_DRAWS))
        image = tf.cond(masked < augmentation.grid_mask, lambda: grid_mask(image, numbers_of_grid), lambda: image)
    return image, boxes, class_ids


# Colour distortion ----------------------------------------------------------------------------------------------------


def colour(image: tf.Tensor, draws: list[tf.Tensor], strength: float) -> tf.Tensor:
    """Brightness, contrast, saturation and hue by four float32 draws in [0, 1)."""
    brightness, contrast, saturation, hue = ((2 * value - 1) * strength for value in draws)
    chroma = 1 + SATURATION * saturation
    cosine, sine = chroma * tf.cos(HUE * hue), chroma * tf.sin(HUE * hue)
    zero, one = tf.zeros([]), tf.ones([])
    turn = tf.reshape(tf.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine]), [3, 3])  # of Y, I, Q
    to_rgb, to_yiq = tf.constant(np.linalg.inv(YIQ), tf.float32), tf.constant(YIQ, tf.float32)
    matrix = (1 + CONTRAST * contrast) * (to_rgb @ turn @ to_yiq)
    return _linear(image, matrix, BRIGHTNESS * brightness)


def _linear(image: tf.Tensor, matrix: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    """Each pixel's colour by a matrix [3, 3] and an offset, a number or [3], rounded and clipped."""
    flat = tf.reshape(tf.cast(image, tf.float32), [-1, 3])
    mapped = tf.matmul(flat, matrix, transpose_b=True) + (offset + 0.5)
    return tf.reshape(tf.saturate_cast(mapped, tf.uint8), tf.shape(image))


# GridMask -------------------------------------------------------------------------------------------------------------


def grid_mask(image: tf.Tensor, draws: list[tf.Tensor]) -> tf.Tensor:
    """Squares of a grid in FILL, by float32 draws in [0, 1) of its period and its phase, down and across."""
    size = tf.shape(image)[:2]
    shortest, longest = (share * tf.cast(tf.reduce_min(size), tf.float32) for share in GRID_PERIOD)
    period = shortest + draws[0] * (longest - shortest)
    rows, columns = (
        tf.math.floormod(tf.range(tf.cast(size[axis], tf.float32)) + draws[1 + axis] * period, period)
        < (1 - GRID_KEPT) * period
        for axis in (0, 1)
    )
    return tf.where((rows[:, None] & columns)[..., None], tf.constant(FILL, tf.uint8), image)


# RandAugment ----------------------------------------------------------------------------------------------------------


def rand_augment(
    image: tf.Tensor,
    boxes: tf.Tensor,
    class_ids: tf.Tensor,
    chosen: tf.Tensor,
    sign: tf.Tensor,
    settings: RandAugment,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """One layer, by two float32 draws in [0, 1): which operation, and which way it goes.

    EffdetError where the settings name an operation that there is not.
    """
    names = settings.operations or OPERATIONS
    if unknown := [name for name in names if name not in OPERATIONS]:
        raise EffdetError(
            f"RandAugment: no operation is called {unknown[0]!r}; expected some of {', '.join(OPERATIONS)}"
        )
    strength = tf.where(sign < 0.5, -1.0, 1.0) * (settings.magnitude / 10)
    branches = [functools.partial(_operate, name, image, boxes, class_ids, strength) for name in names]
    image, boxes, class_ids = tf.switch_case(tf.cast(chosen * len(names), tf.int32), branches)
    return image, boxes, class_ids


def _identity(image: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    return tf.identity(image)


def _autocontrast(image: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    """Each channel stretched to 0..255; a channel of one value stays."""
    low, high = (tf.cast(of(image, axis=[0, 1]), tf.float32) for of in (tf.reduce_min, tf.reduce_max))
    varies = high > low
    factor = tf.where(varies, 255 / tf.where(varies, high - low, 1.0), 1.0)  # [3]
    return _linear(image, tf.linalg.diag(factor), tf.where(varies, -low * factor, 0.0))


def _equalize(image: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    """Each channel's values spread so that all are as frequent, as far as whole values allow; one value stays."""
    counts = _histogram(image)
    brightest = tf.range(256)[:, None] == tf.cast(tf.reduce_max(image, axis=[0, 1]), tf.int32)
    step = tf.reduce_sum(tf.where(brightest, 0, counts), axis=0) // 255  # [3] pixels a level
    below = tf.cumsum(counts, axis=0, exclusive=True)
    levels = tf.where(step > 0, (below + step // 2) // tf.maximum(step, 1), tf.range(256)[:, None])
    return _by_table(image, tf.saturate_cast(levels, tf.uint8))


def _histogram(image: tf.Tensor) -> tf.Tensor:
    """How many pixels have each value: int32 [256, 3]."""
    values = tf.reshape(tf.cast(image, tf.int32) * 3 + tf.range(3), [-1])
    return tf.reshape(tf.math.bincount(values, minlength=256 * 3, maxlength=256 * 3), [256, 3])


def _by_table(image: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """Each value replaced by what the table uint8 [256, 3] has for it in its channel."""
    return tf.gather(tf.reshape(table, [-1]), tf.cast(image, tf.int32) * 3 + tf.range(3))


def _posterize(image: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    """The lowest bits become 0."""
    bits = tf.cast(tf.round(tf.abs(strength) * (8 - POSTERIZED_BITS)), tf.uint8)
    return tf.bitwise.bitwise_and(image, tf.bitwise.left_shift(tf.constant(255, tf.uint8), bits))


def _solarize(image: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    """What is at least as bright as a threshold is inverted."""
    values = tf.cast(image, tf.float32)
    inverted = tf.cast(values >= 256 * (1 - tf.abs(strength)), tf.float32)
    return tf.cast(tf.abs(values - 255 * inverted), tf.uint8)


def _saturation(image: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    factor = 1 + ENHANCEMENT * strength
    return _linear(image, factor * tf.eye(3) + (1 - factor) * tf.constant([LUMA] * 3), tf.zeros([]))


def _contrast(image: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    """Towards the mean grey of the picture, or away from it."""
    factor = 1 + ENHANCEMENT * strength
    mean = tf.reduce_mean(tf.cast(image, tf.float32), axis=[0, 1])
    return _linear(image, factor * tf.eye(3), (1 - factor) * tf.reduce_sum(mean * LUMA))


def _brightness(image: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    return _linear(image, (1 + ENHANCEMENT * strength) * tf.eye(3), tf.zeros([]))


def _sharpness(image: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    """Away from a smoothed picture, or towards it; the outermost pixels stay."""
    values = tf.cast(image, tf.float32)
    columns = values[:-2] + values[1:-1] + values[2:]
    inner = values[1:-1, 1:-1]
    smooth = (columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * inner) / 13
    sharper = inner + ENHANCEMENT * strength * (inner - smooth)
    small = tf.reduce_min(tf.shape(image)[:2]) < 3  # without any inner pixel
    framed = tf.pad(sharper - inner, [[1, 1], [1, 1], [0, 0]])
    return tf.cond(small, lambda: image, lambda: tf.saturate_cast(values + framed + 0.5, tf.uint8))


# Moves: a matrix (a, b, c, d) and an offset (x, y) for x' = a x + b y + x, y' = c x + d y + y, around the centre of a
# picture of this size (width, height) in pixels.

Move = tuple[tuple[Any, Any, Any, Any], tuple[Any, Any]]


def _rotate(strength: tf.Tensor, size: tf.Tensor) -> Move:
    cosine, sine = tf.cos(ROTATION * strength), tf.sin(ROTATION * strength)
    return (cosine, -sine, sine, cosine), (0.0, 0.0)


def _shear_x(strength: tf.Tensor, size: tf.Tensor) -> Move:
    return (1.0, SHEAR * strength, 0.0, 1.0), (0.0, 0.0)


def _shear_y(strength: tf.Tensor, size: tf.Tensor) -> Move:
    return (1.0, 0.0, SHEAR * strength, 1.0), (0.0, 0.0)


def _translate_x(strength: tf.Tensor, size: tf.Tensor) -> Move:
    return (1.0, 0.0, 0.0, 1.0), (tf.round(TRANSLATION * strength * size[0]), 0.0)


def _translate_y(strength: tf.Tensor, size: tf.Tensor) -> Move:
    return (1.0, 0.0, 0.0, 1.0), (0.0, tf.round(TRANSLATION * strength * size[1]))


def _shifted(image: tf.Tensor, move: Move) -> tf.Tensor:
    """The picture moved by whole pixels."""
    size = tf.shape(image)[:2]
    offset = tf.cast(tf.stack(move[1][::-1]), tf.int32)  # down, right
    before, behind = tf.maximum(offset, 0), tf.maximum(-offset, 0)
    paddings = tf.concat([tf.stack([before, behind], axis=1), [[0, 0]]], axis=0)
    padded = tf.pad(image, paddings, constant_values=tf.constant(FILL, tf.uint8))
    return padded[behind[0] : behind[0] + size[0], behind[1] : behind[1] + size[1]]


def _warped(image: tf.Tensor, move: Move) -> tf.Tensor:
    """The picture moved in any way: twenty times the work of shifting it."""
    (a, b, c, d), (right, down) = move
    center_x, center_y = tf.unstack(tf.cast(tf.shape(image)[1::-1], tf.float32) / 2)
    # The kernel asks where an output pixel comes from, and counts pixels by their centres.
    determinant = a * d - b * c
    e, f, g, h = d / determinant, -b / determinant, -c / determinant, a / determinant
    x, y = center_x + right - 0.5, center_y + down - 0.5
    source = [e, f, center_x - e * x - f * y - 0.5, g, h, center_y - g * x - h * y - 0.5, 0.0, 0.0]
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=tf.stack(source)[None],
        output_shape=tf.shape(image)[:2],
        fill_value=float(FILL),
        interpolation="BILINEAR",  # cuts fractions off: half a level darker
        fill_mode="CONSTANT",
    )[0]


def _moved_boxes(boxes: tf.Tensor, class_ids: tf.Tensor, move: Move, size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A box around each box's moved corners, clipped; what is left without area is dropped."""
    (a, b, c, d), (right, down) = move
    center_x, center_y = tf.unstack(size / 2)
    y1, x1, y2, x2 = tf.unstack(boxes, axis=1)
    xs = tf.stack([x1, x2, x1, x2]) - center_x  # [4, M] of the corners
    ys = tf.stack([y1, y1, y2, y2]) - center_y
    xs, ys = a * xs + b * ys + center_x + right, c * xs + d * ys + center_y + down
    around = [of(values, axis=0) for of in (tf.reduce_min, tf.reduce_max) for values in (ys, xs)]
    clipped = clip(tf.stack(around, axis=1), size[1], size[0])
    kept = (class_ids != PADDING) & (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    return to_the_front(clipped, class_ids, kept)


COLOURS: dict[str, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = {
    "identity": _identity,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "posterize": _posterize,
    "solarize": _solarize,
    "colour": _saturation,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}
MOVES: dict[str, Callable[[tf.Tensor, tf.Tensor], Move]] = {
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
SHIFTS = ("translate_x", "translate_y")  # of these moves
OPERATIONS = (*COLOURS, *MOVES)  # of RandAugment; in an order that drawn numbers depend on


def _operate(
    name: str, image: tf.Tensor, boxes: tf.Tensor, class_ids: tf.Tensor, strength: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """One operation by its name; strength float32 -1..1."""
    if name in COLOURS:
        return COLOURS[name](image, strength), boxes, class_ids
    size = tf.cast(tf.shape(image)[1::-1], tf.float32)
    move = MOVES[name](strength, size)
    moved = _shifted(image, move) if name in SHIFTS else _warped(image, move)
    return moved, *_moved_boxes(boxes, class_ids, move, size)
