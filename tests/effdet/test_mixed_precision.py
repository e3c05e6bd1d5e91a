"""float16 and bfloat16 against float32: networks trained on a real picture, and what is float32 whatever comes in."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from effdet import boxes, model, weight_sources, weights
from effdet.anchors import anchors, decode, encode
from effdet.assign import BACKGROUND, IGNORED, Targets, assign_targets
from effdet.config import model_config
from effdet.distributed import OneProcess
from effdet.layers import FusedBatchNormalization
from effdet.losses import detection_loss
from effdet.postprocess import PostprocessConfig, detect
from effdet.preprocess import normalize, resize
from effdet.schedule import Schedule
from effdet.train_state import TrainState
from effdet.training import Trainer
from tests.effdet.golden import GOLDEN
from tests.effdet.tiny import OPTIMIZATION

# Of tests/golden/images/000000005001.jpg, as COCO 2017 val has them: x, y, width, height in pixels; persons, 0, but
# for a pair of scissors, 1, and a handbag, 2.
XYWH = (
    (174, 205, 108, 238), (225, 256, 127, 224), (77, 245, 113, 235), (41, 96, 107, 378), (119, 81, 69, 188),
    (11, 33, 58, 169), (171, 31, 80, 154), (297, 50, 58, 87), (211, 88, 124, 193), (355, 92, 163, 379),
    (435, 41, 71, 120), (536, 275, 59, 72),
)  # fmt: skip
CLASS_IDS = np.array([1] + [0] * 10 + [2], np.int32)
WINDOWS = ((0, 0, 480, 640), (0, 0, 480, 400), (0, 240, 480, 640), (80, 120, 400, 520))  # yxyx: all of it, three parts


def real_batch(config):
    """Four views of the picture, as effdet.input_pipeline gives them."""
    picture = tf.io.decode_jpeg((GOLDEN / "images" / "000000005001.jpg").read_bytes(), channels=3)
    corners = boxes.xywh_to_yxyx(np.array(XYWH, np.float32))
    images, sizes, found, class_ids = [], [], [], []
    for top, left, bottom, right in WINDOWS:
        view, size, scale = resize(picture[top:bottom, left:right], config.image_size)
        below, beside = np.array(config.image_size) - size.numpy()
        images.append(np.pad(view.numpy().round().astype(np.uint8), [(0, below), (0, beside), (0, 0)]))
        sizes.append(size)
        inside = boxes.clip(corners - np.float32([top, left, top, left]), bottom - top, right - left)
        seen = boxes.area(inside) > 0.5 * boxes.area(corners)
        first = np.argsort(~seen, kind="stable")  # padding stands at the end
        found.append(np.where(seen[:, None], inside / scale.numpy(), 0)[first])
        class_ids.append(np.where(seen, CLASS_IDS, boxes.PADDING)[first])
    return {
        "image": tf.stack(images),
        "content_size": tf.stack(sizes),
        "boxes": tf.constant(np.array(found), tf.float32),
        "class_ids": tf.constant(np.array(class_ids)),
        "image_id": tf.range(4, dtype=tf.int64),
        "scale": tf.ones([4]),
    }


def train(config, steps, backbone=None):
    """A network that has learnt the picture. Random weights will not do: they pass rounding on many times enlarged."""
    keras.utils.set_random_seed(1)
    net = model.build(config)
    if backbone:
        weight_sources.load(net, config, backbone)
    for layer in net.layers:
        if isinstance(layer, FusedBatchNormalization):
            layer.momentum = 0.9  # the published 0.99 takes more steps
    schedule = Schedule(learning_rate=0.06, warmup_learning_rate=0.006, warmup_epochs=steps / 10, epochs=float(steps))
    state = TrainState(net, OPTIMIZATION.momentum, loss_scaling=False)
    optimization = dataclasses.replace(OPTIMIZATION, schedule=schedule)
    trainer = Trainer(state, config, optimization, OneProcess(), lambda step, batch: f"batch {step}")
    losses = [
        record.loss for record in trainer.run(itertools.repeat(real_batch(config)), steps, OPTIMIZATION.batch_size)
    ]
    assert losses[-1] < 0.6 * losses[0]
    return net


@pytest.fixture(scope="module", params=["efficientdet-d0", "efficientdet-lite0"])
def trained(request):
    """Config, images, network and its float32 outputs."""
    config = model_config(request.param, 3, (128, 128))
    net = train(config, steps=100, backbone="imagenet" if request.param == "efficientdet-lite0" else None)
    batch = real_batch(config)
    images = normalize(batch["image"], batch["content_size"], config)
    return config, images, net, net(images, training=False)


def matched(expected, actual, iou, score):
    """The share of expected detections of score 0.3 and more that are found again, and how many they are."""
    found = []
    for b in range(len(expected["count"])):
        theirs = actual["boxes"][b].numpy()
        for i in np.flatnonzero(expected["scores"][b] >= 0.3):
            overlaps = boxes.iou(expected["boxes"][b, i].numpy(), theirs)
            differences = np.abs(actual["scores"][b] - expected["scores"][b, i])
            same_class = np.equal(actual["class_ids"][b], expected["class_ids"][b, i])
            found.append(np.any((overlaps >= iou) & (differences <= score) & same_class))
    return np.mean(found), len(found)


# In standard deviations of an output: the root mean square of the errors, and the worst. Twice what a CPU showed: 0.005
# and 0.04 in float16; 0.021 and 0.19 in bfloat16, whose numbers have three bits less. Detections: the share that is
# found again at this IoU and difference of scores; 0.98 to 1 of about 30 were.
BOUNDS = {
    "mixed_float16": {"rms": 0.01, "worst": 0.08, "iou": 0.95, "score": 0.02, "share": 0.95},
    "mixed_bfloat16": {"rms": 0.04, "worst": 0.4, "iou": 0.9, "score": 0.05, "share": 0.9},
}


@pytest.mark.slow
@pytest.mark.parametrize("policy", BOUNDS)
def test_trained_network_on_real_images(trained, policy):
    config, images, net, expected = trained
    mixed, bound = model.build(config, policy), BOUNDS[policy]
    weights.assign(mixed, {name: np.asarray(each) for name, each in weights.published_variables(net).items()})
    actual = mixed(images, training=False)
    for key, values in expected.items():
        spread, errors = np.std(values), np.asarray(actual[key]) - values
        assert spread > 0.1
        assert 0 < np.sqrt(np.mean(errors**2)) <= bound["rms"] * spread, key
        assert np.abs(errors).max() <= bound["worst"] * spread, key
    for method in ("hard", "gaussian"):
        nms = PostprocessConfig(method=method, score_threshold=0.05)
        found = [
            detect(each["class_logits"], each["box_deltas"], anchors(config), tf.ones([4]), nms)
            for each in (expected, actual)
        ]
        share, count = matched(*found, bound["iou"], bound["score"])
        assert count > 15, method
        assert share >= bound["share"], method


# --- what is float32 whatever comes in ----------------------------------------------------------

HALF = pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16], ids=lambda dtype: dtype.name)
DTYPES = pytest.mark.parametrize("dtype", [tf.float32, tf.float16, tf.bfloat16], ids=lambda dtype: dtype.name)
METHODS = pytest.mark.parametrize("method", ["hard", "gaussian"])
CONFIG = model_config("efficientdet-d0", 5, (128, 128))
ANCHORS = anchors(CONFIG)
NUM_ANCHORS = len(ANCHORS)


def head_outputs(dtype):
    """Class logits [2,A,5] and box deltas [2,A,4]."""
    random = np.random.default_rng(3)
    logits = random.normal(-3.0, 2.0, (2, NUM_ANCHORS, 5))
    return tf.cast(logits, dtype), tf.cast(random.normal(0.0, 0.5, (2, NUM_ANCHORS, 4)), dtype)


def some_targets():
    """Of two images with boxes of ordinary size, one without area, and an ignored anchor."""
    corners = [[10, 20, 60, 90], [30, 30, 30, 70], [70, 70, 70, 70], [64, 8, 126, 110]]
    targets = assign_targets(ANCHORS, tf.constant([corners] * 2, tf.float32), tf.constant([[0, 1, 2, 3]] * 2))
    class_targets = tf.where(tf.range(NUM_ANCHORS) == 7, IGNORED, targets.class_targets)
    return targets._replace(class_targets=class_targets)


def losses_and_gradients(logits, deltas):
    targets = some_targets()
    with tf.GradientTape() as tape:
        tape.watch([logits, deltas])
        losses = detection_loss(logits, deltas, targets, tf.reduce_sum(targets.num_positives) + 1, OPTIMIZATION.losses)
    return losses, tape.gradient(losses["total"], [logits, deltas])


@pytest.mark.slow
@HALF
def test_losses_are_those_of_the_outputs_in_float32(dtype):
    half = head_outputs(dtype)
    losses, gradients = losses_and_gradients(*half)
    expected, expected_gradients = losses_and_gradients(*(tf.cast(each, tf.float32) for each in half))
    assert {loss.dtype for loss in losses.values()} == {tf.float32}
    assert {key: float(loss) for key, loss in losses.items()} == {key: float(loss) for key, loss in expected.items()}
    for gradient, wide in zip(gradients, expected_gradients, strict=True):
        assert np.any(gradient != 0)
        np.testing.assert_array_equal(gradient, tf.cast(wide, dtype))  # rounded once, at the end


@HALF
def test_boxes_are_decoded_in_float32(dtype):
    deltas = head_outputs(dtype)[1]
    decoded = decode(deltas, ANCHORS)
    assert decoded.dtype == tf.float32
    np.testing.assert_array_equal(decoded, decode(tf.cast(deltas, tf.float32), ANCHORS))
    assert np.any(tf.cast(tf.cast(decoded, dtype), tf.float32) != decoded)  # no half precision holds them


@pytest.mark.slow
@HALF
@METHODS
def test_detections_are_those_of_the_outputs_in_float32(dtype, method):
    half, nms = head_outputs(dtype), PostprocessConfig(method=method)
    found = detect(*half, ANCHORS, tf.ones([2]), nms)
    expected = detect(*(tf.cast(each, tf.float32) for each in half), ANCHORS, tf.ones([2]), nms)
    assert (found["boxes"].dtype, found["scores"].dtype) == (tf.float32, tf.float32)
    assert found["count"].numpy().tolist() == [100, 100]
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values)


# --- extremes -----------------------------------------------------------------------------------


def extremes(dtype):
    """Logits of 1e3 and -1e3 (in float16 and bfloat16 likewise), and deltas as large."""
    logits = np.resize(np.float32([1e3, -1e3, -1e3, 0.5, -1e3, 1e3, 88.0]), (2, NUM_ANCHORS, 5))
    deltas = np.resize(np.float32([1e3, -1e3, 0.0, -20.0, 20.0, 0.1, 1.0]), (2, NUM_ANCHORS, 4))
    return tf.cast(logits, dtype), tf.cast(deltas, dtype)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_of_extreme_outputs_are_finite(dtype, compiled):
    run = tf.function(losses_and_gradients, jit_compile=True, autograph=False) if compiled else losses_and_gradients
    losses, gradients = run(*extremes(dtype))
    assert all(np.isfinite(loss) and loss > 1 for loss in losses.values())
    for gradient in gradients:
        assert gradient.dtype == dtype
        assert np.isfinite(tf.cast(gradient, tf.float32)).all()
        assert np.any(gradient != 0)


@pytest.mark.slow
@DTYPES
@METHODS
@pytest.mark.parametrize("top_k", [500, None])
def test_detections_of_extreme_outputs_are_finite(dtype, method, top_k):
    nms = PostprocessConfig(method=method, pre_nms_top_k=top_k)
    found = detect(*extremes(dtype), ANCHORS, tf.ones([2]), nms)
    assert all(np.isfinite(values).all() for values in found.values())
    assert found["scores"].numpy().max() == 1
    assert (found["count"] > 0).numpy().all()


@DTYPES
def test_overlaps_of_boxes_without_area_are_0(dtype):
    corners = tf.constant([[5, 5, 5, 5], [5, 2, 5, 8], [2, 5, 8, 5], [2, 2, 8, 8]], dtype)
    overlaps = boxes.iou(corners[:, None], corners)
    assert overlaps.dtype == dtype
    np.testing.assert_array_equal(tf.cast(overlaps, tf.float32), np.diag([0, 0, 0, 1]))


@pytest.mark.slow
@DTYPES
def test_boxes_without_area_have_finite_targets_and_losses(dtype):
    corners = tf.constant([[[5, 5, 5, 5], [0, 9, 0, 9], [64, 0, 64, 128], [0, 64, 128, 64]]], tf.float32)
    targets = assign_targets(ANCHORS, corners, tf.constant([[0, 1, 2, 3]]))
    assert (targets.class_targets.numpy() == BACKGROUND).all()
    assert not targets.box_targets.numpy().any()
    # Also of an anchor that did take such a box.
    forced = encode(tf.cast(corners[0, :1], dtype), ANCHORS)
    assert forced.dtype == tf.float32
    assert np.isfinite(forced).all()
    targets = Targets(tf.zeros([1, NUM_ANCHORS], tf.int32), forced[None], None)
    logits, deltas = (each[:1] for each in extremes(dtype))
    losses = detection_loss(logits, deltas, targets, tf.constant(1.0), OPTIMIZATION.losses)
    assert all(np.isfinite(loss) for loss in losses.values())


@pytest.mark.slow
@DTYPES
@METHODS
def test_boxes_without_area_are_detected_and_suppress_nothing(dtype, method):
    logits = tf.constant([[[2.0], [1.0], [0.5]]], dtype)
    deltas = tf.constant([[[0, 0, -1e3, -1e3]] * 3], dtype)  # e^-1000 of a side
    same = np.array([[0, 0, 10, 10]] * 3, np.float32)
    found = detect(logits, deltas, same, tf.ones([1]), PostprocessConfig(method=method, max_detections=5))
    assert found["count"].numpy().tolist() == [3]
    np.testing.assert_array_equal(found["boxes"][0, :3], np.full((3, 4), 5))
    np.testing.assert_allclose(found["scores"][0, :3], 1 / (1 + np.exp([-2.0, -1.0, -0.5])), rtol=1e-6)
