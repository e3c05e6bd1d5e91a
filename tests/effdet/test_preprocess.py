"""Evaluation's preprocessing against the reference's pixels, its sizes and padding; and turns by EXIF."""

import numpy as np
import pytest
import tensorflow as tf

from effdet.config import model_config
from effdet.preprocess import decode, fit, normalize, orientation, resize, upright
from tests.effdet import golden
from tests.effdet.made_exif import DAMAGED, TURNS, WHOLE, jpeg, turned

D0 = model_config("efficientdet-d0", 90)
IMAGE = "000000005001"
COLOUR_STEP = 1 / (0.225 * 255)  # of 0..255, after normalization


def test_golden():
    with np.load(golden.GOLDEN / "preprocess-512.npz") as file:
        expected = {key.removeprefix(f"{IMAGE}_"): file[key] for key in file}
    encoded = (golden.GOLDEN / "images" / f"{IMAGE}.jpg").read_bytes()
    picture, content_size, scale = resize(tf.io.decode_jpeg(encoded, channels=3), (512, 512))
    padded = tf.pad(picture, [[0, 512 - picture.shape[0]], [0, 512 - picture.shape[1]], [0, 0]])
    image = normalize(padded[None], content_size[None], D0)[0].numpy()

    assert scale == expected["scale_to_original"]
    values = image[tuple(expected["index"].T)]
    np.testing.assert_allclose(values, expected["value"], atol=1e-4 * COLOUR_STEP)
    padding = (expected["value"] == 0).all(axis=1)
    assert 500 < padding.sum() < 1500  # a quarter of 4,000
    assert not values[padding].any()
    assert image.mean(dtype=np.float64) == pytest.approx(expected["mean"], abs=1e-6)


@pytest.mark.parametrize(
    ("size", "content_size", "scale"),
    [
        ((480, 640), (384, 512), 1.25),
        ((424, 640), (339, 512), 1.25),  # 339.2
        ((640, 480), (512, 384), 1.25),
        ((128, 256), (256, 512), 0.5),  # smaller pictures grow
        ((375, 500), (384, 512), 500 / 512),  # 375 * 1.024 = 384 in float32 too
        ((1, 2000), (1, 512), 2000 / 512),  # 0.256
    ],
)
def test_sizes(size, content_size, scale):
    picture, found_size, found_scale = resize(np.zeros((*size, 3), np.uint8), (512, 512))
    assert picture.shape == (*content_size, 3)
    assert picture.dtype == tf.float32
    assert found_size.numpy().tolist() == list(content_size)
    assert float(found_scale) == pytest.approx(scale)


def test_oblong_input_is_filled_as_far_as_the_aspect_goes():
    assert resize(np.zeros((100, 100, 3), np.uint8), (128, 256))[1].numpy().tolist() == [128, 128]
    assert resize(np.zeros((100, 400, 3), np.uint8), (128, 256))[1].numpy().tolist() == [64, 256]


def test_resized_values_are_not_rounded():
    columns = np.array([[[0] * 3, [101] * 3]], np.uint8)
    picture = resize(columns, (8, 4))[0]
    assert picture[0, :, 0].numpy().tolist() == [0, 25.25, 75.75, 101]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalize_by_hand(dtype):
    images = np.full((2, 4, 6, 3), 200, dtype)
    normalized = normalize(images, tf.constant([[4, 6], [2, 3]]), D0).numpy()
    expected = (200 - np.array([0.485, 0.456, 0.406]) * 255) / (np.array([0.229, 0.224, 0.225]) * 255)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized[0], np.broadcast_to(expected, (4, 6, 3)), rtol=1e-6)
    np.testing.assert_allclose(normalized[1, :2, :3], np.broadcast_to(expected, (2, 3, 3)), rtol=1e-6)
    assert not normalized[1, 2:].any()
    assert not normalized[1, :, 3:].any()


def test_lite_models_have_their_own_mean():
    lite = model_config("efficientdet-lite0", 90)
    normalized = normalize(np.full((1, 1, 1, 3), 255, np.uint8), tf.constant([[1, 1]]), lite)
    assert normalized[0, 0, 0].numpy().tolist() == [1, 1, 1]  # (255 - 127) / 128


@pytest.mark.parametrize("size", [(64, 64), (40, 100), (300, 70), (7, 5), (1, 200)])
def test_fit_is_resize_for_a_batch(size):
    """In gathers, for runtimes that know no picture's size beforehand: the same numbers where the picture is."""
    pictures = np.random.default_rng(1).integers(0, 256, (2, *size, 3), np.uint8)
    images, content_size, scale = fit(tf.constant(pictures), (64, 96))
    assert images.shape == (2, 64, 96, 3)
    for picture, image in zip(pictures, images.numpy(), strict=True):
        expected, (height, width), expected_scale = resize(tf.constant(picture), (64, 96))
        assert content_size.numpy().tolist() == [[height, width]]
        assert scale.numpy() == [expected_scale]
        np.testing.assert_allclose(image[:height, :width], expected, atol=1e-3)


def test_decode_takes_what_pictures_come_as():
    for encoded in (tf.io.encode_jpeg(np.zeros((4, 6, 1), np.uint8)), tf.io.encode_png(np.zeros((4, 6, 4), np.uint8))):
        assert decode(encoded).shape == (4, 6, 3)


# EXIF -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_orientation_eager_and_in_tf_data():
    numbers = {
        **{(number, order): number for number in range(1, 9) for order in "<>"},
        **dict.fromkeys(WHOLE, 6),
        **dict.fromkeys(DAMAGED, 1),
        "none": 1,
    }
    files = [*(turned(number, order) for number in range(1, 9) for order in "<>"), *WHOLE.values(), *DAMAGED.values()]
    dataset = tf.data.Dataset.from_tensor_slices([*files, jpeg()]).map(orientation)
    assert dataset.element_spec == tf.TensorSpec([], tf.int32)
    assert dict(zip(numbers, (int(number) for number in dataset), strict=True)) == numbers
    for file, expected in ((turned(8, ">"), 8), (jpeg(), 1), (b"", 1)):
        found = orientation(file)
        assert (found.dtype, found.shape, int(found)) == (tf.int32, (), expected)


@pytest.mark.parametrize(
    ("number", "rows"),
    [
        (1, ["abc", "def"]),
        (2, ["cba", "fed"]),
        (3, ["fed", "cba"]),
        (4, ["def", "abc"]),
        (5, ["ad", "be", "cf"]),
        (6, ["da", "eb", "fc"]),  # the first row becomes the right side
        (7, ["fc", "eb", "da"]),
        (8, ["cf", "be", "ad"]),  # the first row becomes the left side
    ],
)
def test_upright_by_hand(number, rows):
    stored, expected = (np.array([list(row.encode()) for row in r], np.uint8) for r in (["abc", "def"], rows))
    found = upright(np.repeat(stored[..., None], 3, 2), tf.constant(number))
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, 2))
    np.testing.assert_array_equal(TURNS[number](stored), expected)  # what other tests compare with


@pytest.mark.parametrize("number", range(1, 9))
def test_decode_turns_on_request_alone(number):
    stored = tf.image.decode_image(jpeg(), channels=3, expand_animations=False).numpy()
    np.testing.assert_array_equal(decode(turned(number)), stored)
    np.testing.assert_array_equal(decode(turned(number), apply_exif=True), TURNS[number](stored))
