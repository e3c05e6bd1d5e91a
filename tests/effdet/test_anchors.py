"""Anchors against the reference and by hand; coding forth and back."""

import numpy as np
import pytest
import tensorflow as tf

from effdet import boxes
from effdet.anchors import MAX_LOG_SCALE, anchors, decode, encode
from effdet.config import MODELS, model_config
from tests.effdet import golden


def test_golden():
    ours = anchors(model_config("efficientdet-d0", 90, (128, 128)))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, golden.arrays()["anchors"])


@pytest.mark.parametrize("name", MODELS)
def test_as_many_as_the_model_has_outputs(name):
    assert anchors(MODELS[name]).shape == (MODELS[name].num_anchors, 4)


ANCHOR_SCALES = {"d7": 5, "lite0": 3, "lite1": 3, "lite2": 3, "lite3x": 3}  # published; 4 for the others


@pytest.mark.parametrize("image_size", [None, (256, 512)])
@pytest.mark.parametrize("name", MODELS)
def test_anchors_are_equal_to_the_published_rules(name, image_size):
    config = model_config(name, 90, image_size)
    (height, width), expected = config.image_size, []
    side_y, side_x = height, width
    for level in range(1, 9 if name == "efficientdet-d7x" else 8):
        side_y, side_x = (side_y - 1) // 2 + 1, (side_x - 1) // 2 + 1
        if level < 3:
            continue
        step_y, step_x = height / side_y, width / side_x
        x, y = np.meshgrid(np.arange(step_x / 2, width, step_x), np.arange(step_y / 2, height, step_y))
        shapes = []
        for octave in range(3):
            for aspect in (1.0, 2.0, 0.5):
                scale = ANCHOR_SCALES.get(name.removeprefix("efficientdet-"), 4)
                half_x = scale * step_x * 2 ** (octave / 3) * np.sqrt(aspect) / 2
                half_y = scale * step_y * 2 ** (octave / 3) * (1 / np.sqrt(aspect)) / 2
                shapes.append(np.stack([y - half_y, x - half_x, y + half_y, x + half_x], axis=-1).reshape(-1, 4))
        expected.append(np.stack(shapes, axis=1).reshape(-1, 4))
    np.testing.assert_array_equal(anchors(config), np.concatenate(expected).astype(np.float32))


def test_order_is_level_row_column_shape():
    ours = anchors(model_config("efficientdet-d0", 90, (128, 256)))
    first, right, below = ours[0], ours[9], ours[9 * 256 // 8]
    np.testing.assert_array_equal(first, [4 - 16, 4 - 16, 4 + 16, 4 + 16])  # the first cell's centre; 4 strides of 8
    np.testing.assert_array_equal(right - first, [0, 8, 0, 8])
    np.testing.assert_array_equal(below - first, [8, 0, 8, 0])
    wide = 32 * np.sqrt(2)  # aspect ratio 2 = width / height, and the same area
    np.testing.assert_allclose(ours[1], [4 - wide / 4, 4 - wide / 2, 4 + wide / 4, 4 + wide / 2], rtol=1e-6)
    larger = 32 * 2 ** (1 / 3)  # the next octave's square
    np.testing.assert_allclose(ours[3], [4 - larger / 2, 4 - larger / 2, 4 + larger / 2, 4 + larger / 2], rtol=1e-6)
    level_4 = ours[9 * (16 * 32)]
    np.testing.assert_array_equal(level_4, [8 - 32, 8 - 32, 8 + 32, 8 + 32])


def test_level_that_rounds_up_has_an_uneven_stride():
    lite0 = model_config("efficientdet-lite0", 90, (320, 256))
    squares = anchors(lite0)[-3 * 2 * 9 :: 9]  # 320 / 128 = 2.5: 3 rows of 320 / 3 pixels; 2 columns of 128
    y = (squares[:, 0] + squares[:, 2]) / 2
    np.testing.assert_allclose(y, np.repeat([160 / 3, 160, 800 / 3], 2), rtol=1e-6)
    height, width = squares[0, 2:] - squares[0, :2]
    assert (height, width) == (pytest.approx(3 * 320 / 3), pytest.approx(3 * 128))  # anchor scale 3


def test_encode_by_hand():
    anchor = tf.constant([[0.0, 0.0, 10.0, 20.0]])
    box = tf.constant([[10.0, 5.0, 15.0, 25.0]])  # centre 12.5, 15 against 5, 10; sides 5, 20 against 10, 20
    np.testing.assert_allclose(encode(box, anchor), [[7.5 / 10, 5 / 20, np.log(5 / 10), 0]], rtol=1e-6)


def test_decode_undoes_encode():
    corners = np.random.default_rng(0).uniform(0, 500, (2, 1000, 2, 2))
    corners = np.sort(corners, axis=2) + np.array([[0], [1]])  # no side below 1 px
    truth, anchor = corners.reshape(2, -1, 4).astype(np.float32)
    np.testing.assert_allclose(decode(encode(truth, anchor), anchor), truth, atol=2e-3)


def test_zero_size_box_encodes_to_finite_numbers():
    deltas = encode(tf.constant([[5.0, 5.0, 5.0, 5.0]]), tf.constant([[0.0, 0.0, 10.0, 10.0]]))
    np.testing.assert_allclose(deltas, [[0, 0, np.log(1e-9), np.log(1e-9)]], rtol=1e-6)  # 1e-8 px of 10 px


def test_extreme_deltas_decode_to_boxes_with_finite_overlaps():
    anchor = anchors(MODELS["efficientdet-d7x"])[-9:]  # the largest there are
    for value in (1e3, -1e3):
        decoded = decode(tf.fill([9, 4], value), anchor)
        assert np.isfinite(decoded).all()
        assert np.isfinite(boxes.iou(decoded[:, None], decoded)).all()


def test_deltas_up_to_the_limit_are_taken_as_they_are():
    anchor = tf.constant([[0.0, 0.0, 2.0, 2.0]])
    decoded = decode(tf.constant([[0, 0, MAX_LOG_SCALE, 0]]), anchor)
    assert float(decoded[0, 2] - decoded[0, 0]) == pytest.approx(2 * np.exp(MAX_LOG_SCALE), rel=1e-5)


def test_half_precision_deltas_decode_in_float32():
    anchor = tf.constant([[500.0, 500.0, 516.0, 516.0]])
    decoded = decode(tf.constant([[0.125, 0, 0, 0]], tf.float16), anchor)
    np.testing.assert_array_equal(decoded, [[502, 500, 518, 516]])  # 516 + 2 has no float16 beyond steps of 0.5
    assert decoded.dtype == tf.float32
