"""What distortions do to pixels, and that boxes stay on what they held, read from pictures with drawn marks."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from effdet import distortions
from effdet.augment import Augmentation, RandAugment
from effdet.boxes import PADDING
from effdet.distortions import COLOURS, FILL, MOVES, OPERATIONS
from effdet.errors import EffdetError

HEIGHT, WIDTH = 61, 84
WITHOUT_STRENGTH = ("autocontrast", "equalize")


def picture(seed=0, height=HEIGHT, width=WIDTH):
    """Soft with some noise, and of all values but the brightest and the darkest."""
    random = np.random.default_rng(seed)
    soft = tf.image.resize(random.integers(0, 256, (4, 5, 3)), (height, width), "bicubic").numpy()
    return np.round((soft + random.normal(0, 8, soft.shape)).clip(20, 220)).astype(np.uint8)


def augmentation(**options):
    return Augmentation(horizontal_flip=False, jitter_min=1.0, jitter_max=1.0, **options)


def operate(name, image, magnitude, sign=0.9, boxes=None, class_ids=None):
    """One operation: picture, boxes and class ids. Signs from 0.5 on are positive."""
    boxes = np.zeros((2, 4), np.float32) if boxes is None else np.asarray(boxes, np.float32)
    ids = np.full(len(boxes), PADDING, np.int32) if class_ids is None else np.asarray(class_ids, np.int32)
    settings = RandAugment(1, magnitude, (name,))
    found = distortions.rand_augment(
        tf.constant(image), tf.constant(boxes), tf.constant(ids), tf.constant(0.3), tf.constant(sign), settings
    )
    return [value.numpy() for value in found]


def strengthen(image, magnitude, of):
    return np.asarray(of(Image.fromarray(image)).enhance(1 + 0.9 * magnitude / 10))


# Colours --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (1, 1), (2, 300), (300, 2)])
def test_shape_and_type_stay(name, shape):
    image = operate(name, picture(1, *shape), 10.0)[0]
    assert image.shape == (*shape, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in WITHOUT_STRENGTH])
@pytest.mark.parametrize("sign", [0.1, 0.9])
def test_magnitude_0_changes_nothing(name, sign):
    image, boxes, class_ids = operate(name, picture(), 0.0, sign, [[3, 5, 20, 30], [0, 0, 0, 0]], [7, PADDING])
    np.testing.assert_array_equal(image, picture())
    np.testing.assert_array_equal(boxes, [[3, 5, 20, 30], [0, 0, 0, 0]])
    np.testing.assert_array_equal(class_ids, [7, PADDING])


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "identity"])
def test_magnitude_10_changes_much(name):
    assert np.abs(operate(name, picture(), 10.0)[0].astype(int) - picture()).mean() > 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("autocontrast", lambda image: ImageOps.autocontrast(Image.fromarray(image))),
        ("equalize", lambda image: ImageOps.equalize(Image.fromarray(image))),
        ("posterize", lambda image: ImageOps.posterize(Image.fromarray(image), 6)),  # 8 - 4 * 5 / 10
        ("solarize", lambda image: ImageOps.solarize(Image.fromarray(image), 128)),
        ("colour", lambda image: strengthen(image, 5, ImageEnhance.Color)),
        ("contrast", lambda image: strengthen(image, 5, ImageEnhance.Contrast)),
        ("brightness", lambda image: strengthen(image, 5, ImageEnhance.Brightness)),
        ("sharpness", lambda image: strengthen(image, 5, ImageEnhance.Sharpness)),
    ],
)
def test_colours_are_pillows(name, expected):
    """Pillow rounds between its steps: up to two levels, and a little more where contrast is stretched."""
    difference = np.abs(operate(name, picture(), 5.0)[0].astype(int) - np.asarray(expected(picture())))
    assert difference.max() <= 3
    assert difference.mean() < 0.8


def test_a_picture_of_one_colour_stays_in_autocontrast_and_equalize():
    image = np.full((9, 7, 3), (10, 100, 200), np.uint8)
    for name in WITHOUT_STRENGTH:
        np.testing.assert_array_equal(operate(name, image, 5.0)[0], image)


def test_smoothing_is_sharpness_against_its_sign():
    smooth = np.asarray(Image.fromarray(picture()).filter(ImageFilter.SMOOTH)).astype(float)
    found = operate("sharpness", picture(), 10.0, sign=0.1)[0]  # 0.1 of the picture, 0.9 of the smoothed one
    np.testing.assert_allclose(found, 0.1 * picture() + 0.9 * smooth, atol=1.1)


def distorted(image, draws, boxes=None, class_ids=None, **options):
    boxes = tf.zeros([1, 4]) if boxes is None else tf.constant(boxes, tf.float32)
    ids = tf.constant([PADDING] * len(boxes) if class_ids is None else class_ids)
    found = distortions.distort(tf.constant(image), boxes, ids, tf.constant(draws, tf.float64), augmentation(**options))
    return [value.numpy() for value in found]


def test_colour_distortion_by_hand():
    grey = np.full((2, 2, 3), 100, np.uint8)
    # brightness 1 - 2 * 0.25 = -0.5 of 32: 84; grey has no chroma
    np.testing.assert_array_equal(distorted(grey, [0.25, 0.5, 0.5, 0.5], colour=1.0)[0], np.full((2, 2, 3), 84))
    # contrast 1 + 0.5 * 0.5 * 0.8 = 1.2
    np.testing.assert_array_equal(distorted(grey, [0.5, 0.75, 0.9, 0.1], colour=0.8)[0], np.full((2, 2, 3), 120))
    red = np.full((1, 1, 3), (200, 50, 50), np.uint8)
    # luma 0.299 * 150 + 50 = 94.85; saturation 0.5 halves the distance to it: 147.4, 72.4, 72.4
    np.testing.assert_array_equal(distorted(red, [0.5, 0.5, 0.0, 0.5], colour=1.0)[0][0, 0], [147, 72, 72])
    # hue by -18 or 18 degrees keeps luma, 0.299 * 60 + 90, and makes red an orange or a pink
    pale = np.full((1, 1, 3), (150, 90, 90), np.uint8)
    for draw, sign in ((0.0, 1), (1.0, -1)):
        turned = distorted(pale, [0.5, 0.5, 0.5, draw], colour=1.0)[0][0, 0].astype(float)
        assert turned @ distortions.LUMA == pytest.approx(107.94, abs=0.6)
        assert sign * (turned[1] - turned[2]) > 20


def test_colour_distortion_in_the_middle_of_its_ranges_changes_nothing():
    np.testing.assert_array_equal(distorted(picture(), [0.5] * 4, colour=1.0)[0], picture())


# GridMask -------------------------------------------------------------------------------------------------------------


def test_grid_mask_by_hand():
    image = np.full((224, 300, 3), 9, np.uint8)
    # period 96 of the shorter side's 224: squares of 0.4 * 96 = 38.4 from the upper left corner on
    found = distorted(image, [0.2, 0.0, 0.0, 0.0], grid_mask=0.3)[0]
    masked = np.flatnonzero((found == FILL).all(axis=(0, 2)) | (found[0, :, 0] == FILL))
    np.testing.assert_array_equal(masked, [x for x in range(300) if x % 96 < 38.4])
    np.testing.assert_array_equal(found[39:96], image[39:96])
    # half a period on
    np.testing.assert_array_equal(distorted(image, [0.2, 0.0, 0.5, 0.0], grid_mask=0.3)[0][:48], image[:48])
    # the draw is not below the share
    np.testing.assert_array_equal(distorted(image, [0.3, 0.0, 0.0, 0.0], grid_mask=0.3)[0], image)


def test_grid_mask_takes_a_sixth_of_the_pixels_and_no_boxes():
    random = np.random.default_rng(0)
    shares = []
    for _ in range(30):
        found, boxes, class_ids = distorted(
            np.zeros((200, 260, 3), np.uint8), [0, *random.random(3)], [[3, 4, 9, 9]], [5], grid_mask=1.0
        )
        shares.append(np.mean(found == FILL))
        np.testing.assert_array_equal(boxes, [[3, 4, 9, 9]])
        np.testing.assert_array_equal(class_ids, [5])
    assert np.mean(shares) == pytest.approx(0.16, abs=0.04)  # 0.4 squared


# Moves ----------------------------------------------------------------------------------------------------------------

MARK = (20, 30, 38, 55)


def marked(box=MARK):
    """White on black, with grey FILL to come: above 185 lies what is mostly white."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    top, left, bottom, right = box
    image[top:bottom, left:right] = 255
    return image


def extent(image):
    rows, columns = (np.flatnonzero(image[..., 0].max(axis) > 185) for axis in (1, 0))
    return [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("sign", [0.1, 0.9])
@pytest.mark.parametrize("magnitude", [0.7, 3.3, 6.0])
def test_boxes_move_with_their_objects(name, sign, magnitude):
    image, boxes, class_ids = operate(name, marked(), magnitude, sign, [MARK, (0, 0, 0, 0)], [3, PADDING])
    # a turned corner is a tip of less than a pixel's brightness
    np.testing.assert_allclose(boxes[0], extent(image), atol=1.6 if name == "rotate" else 1.01)
    np.testing.assert_array_equal(class_ids, [3, PADDING])
    np.testing.assert_array_equal(boxes[1], [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("name", "sign", "expected"),
    [
        ("translate_x", 0.9, [20, 49, 38, 74]),  # round(150 / 331 * 0.5 * 84) = 19
        ("translate_x", 0.1, [20, 11, 38, 36]),
        ("translate_y", 0.9, [34, 30, 52, 55]),  # round(150 / 331 * 0.5 * 61) = 14
        ("translate_y", 0.1, [6, 30, 24, 55]),
        # 0.15 of the distance to the middle row, 30.5: rows 20 and 38 move by -1.575 and 1.125
        ("shear_x", 0.9, [20, 28.425, 38, 56.125]),
        # and of that to the middle column, 42: columns 30 and 55 by -1.8 and 1.95
        ("shear_y", 0.9, [18.2, 30, 39.95, 55]),
    ],
)
def test_moves_by_hand(name, sign, expected):
    np.testing.assert_allclose(operate(name, marked(), 5.0, sign, [MARK], [3])[1][0], expected, atol=1e-4)


def test_rotation_by_hand():
    """30 degrees about the middle (42, 30.5), clockwise for the positive sign: the y axis points down."""
    angle = np.radians(30)
    corners = np.array([(x - 42, y - 30.5) for y in (20, 38) for x in (30, 55)])
    turned = corners @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + (42, 30.5)
    expected = [*turned.min(axis=0)[::-1], *turned.max(axis=0)[::-1]]
    np.testing.assert_allclose(operate("rotate", marked(), 10.0, 0.9, [MARK], [3])[1][0], expected, atol=1e-3)


def test_translation_keeps_pixels_and_fills_grey():
    moved = operate("translate_x", picture(), 5.0)[0]
    np.testing.assert_array_equal(moved[:, 19:], picture()[:, :-19])
    assert (moved[:, :19] == FILL).all()


def test_boxes_that_leave_the_picture_are_dropped_and_the_others_move_up():
    boxes = [[5, 70, 20, 84], [20, 30, 38, 55], [0, 0, 0, 0], [5, 50, 10, 80]]
    _, found, class_ids = operate("translate_x", picture(), 5.0, 0.9, boxes, [1, 2, PADDING, 3])
    np.testing.assert_array_equal(class_ids, [2, 3, PADDING, PADDING])
    np.testing.assert_array_equal(found, [[20, 49, 38, 74], [5, 69, 10, 84], [0, 0, 0, 0], [0, 0, 0, 0]])


# Draws ----------------------------------------------------------------------------------------------------------------

ALL = {"colour": 0.5, "rand_augment": RandAugment(3, 5.0), "grid_mask": 0.5}


def test_draws_belong_to_the_sample():
    epochs, records = np.array([0, 0, 1]), np.array([4, 5, 4])
    draws = distortions.draw(1, epochs, records, augmentation(**ALL))
    assert draws.shape == (3, distortions.num_draws(augmentation(**ALL))) == (3, 4 + 3 * 2 + 4)
    assert len(np.unique(draws)) == draws.size
    np.testing.assert_array_equal(distortions.draw(1, epochs[2:], records[2:], augmentation(**ALL))[0], draws[2])
    # one augmentation's numbers do not depend on another
    np.testing.assert_array_equal(distortions.draw(1, epochs, records, augmentation(grid_mask=0.1)), draws[:, -4:])


def test_nothing_is_drawn_for_nothing():
    assert distortions.draw(1, np.array([0]), np.array([4]), augmentation()).shape == (1, 0)


def test_every_operation_is_drawn_as_often():
    draws = distortions.draw(1, np.zeros(7000, int), np.arange(7000), augmentation(rand_augment=RandAugment(1, 5.0)))
    counts = np.bincount((draws[:, 0] * len(OPERATIONS)).astype(int), minlength=len(OPERATIONS))
    assert len(OPERATIONS) == 14
    assert np.abs(counts - 500).max() < 90  # 4 standard deviations of 21.5


@pytest.mark.slow
def test_the_same_in_a_graph_and_in_the_order_that_is_drawn():
    """Two layers: a translation to the right, then one down."""
    settings = RandAugment(2, 5.0, ("translate_x", "translate_y"))
    draws = [0.2, 0.9, 0.7, 0.9]  # first of two and positive, second of two and positive
    eager = distorted(marked(), draws, [MARK], [3], rand_augment=settings)
    np.testing.assert_array_equal(eager[1], [[34, 49, 52, 74]])

    @tf.function(input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)])
    def traced(image):
        boxes, ids = tf.constant([MARK], tf.float32), tf.constant([3])
        return distortions.distort(image, boxes, ids, tf.constant(draws), augmentation(rand_augment=settings))

    for one, other in zip(eager, traced(tf.constant(marked())), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_operation_that_is_not_there_is_named():
    with pytest.raises(EffdetError, match=r"'wiggle'; expected some of identity.*rotate"):
        operate("wiggle", picture(), 5.0)


def test_all_colours_and_moves_are_operations():
    assert (*COLOURS, *MOVES) == OPERATIONS
