"""Losses against the reference, by hand, and where they could overflow."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from effdet import losses
from effdet.anchors import decode, encode
from effdet.assign import BACKGROUND, IGNORED, Targets
from effdet.errors import EffdetError
from effdet.losses import LossConfig, detection_loss, focal_loss, huber_loss, iou_loss
from tests.effdet import golden

PUBLISHED = LossConfig(
    focal_alpha=0.25,
    focal_gamma=1.5,
    label_smoothing=0.0,
    huber_delta=0.1,
    box_loss_weight=50.0,
    box_loss="huber",
)
SMOOTHED = dataclasses.replace(PUBLISHED, label_smoothing=0.1)


def golden_targets():
    arrays = golden.arrays()
    return Targets(*(tf.constant(arrays[name]) for name in Targets._fields))


def with_gradient(logits, deltas, config):
    """Losses and gradients of the total for the golden targets."""
    inputs, targets = [tf.convert_to_tensor(logits), tf.convert_to_tensor(deltas)], golden_targets()
    normalizer = tf.reduce_sum(targets.num_positives) + 1.0
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        found = detection_loss(*inputs, targets, normalizer, config)
    return found, tape.gradient(found["total"], inputs)


@pytest.mark.parametrize(("name", "config"), [("default", PUBLISHED), ("label_smoothing_0.1", SMOOTHED)])
@pytest.mark.parametrize("inside_step", [None, False, True], ids=["eager", "in a step", "in a compiled step"])
def test_golden(name, config, inside_step):
    run = with_gradient if inside_step is None else tf.function(with_gradient, jit_compile=inside_step, autograph=False)
    found, gradients = run(*golden.head_outputs(golden.SEED + 1, 1.0, -3.0), config)
    expected = golden.losses()[name]
    assert float(found["class"]) == pytest.approx(expected["cls_loss"], rel=1e-6)
    assert float(found["box"]) == pytest.approx(expected["box_loss"], rel=1e-6)
    assert float(found["total"]) == pytest.approx(expected["det_loss"], rel=1e-6)
    assert float(tf.linalg.global_norm(gradients)) == pytest.approx(expected["grad_norm"], rel=1e-6)


def test_focal_loss_by_hand():
    logits = tf.constant([[[np.log(3.0), 0.0], [0.0, np.log(3.0)]]], tf.float32)  # p = 3/4, 1/2; 1/2, 3/4
    found = focal_loss(logits, tf.constant([[0, BACKGROUND]]), PUBLISHED)
    is_class = 0.25 * (1 / 4) ** 1.5 * -np.log(3 / 4)  # alpha (1 - p)^gamma -log p
    background = [0.75 * p**1.5 * -np.log(1 - p) for p in (1 / 2, 3 / 4)]
    assert found.numpy().tolist() == [pytest.approx([is_class + background[0], sum(background)])]


def test_smoothing_changes_the_labels_of_the_cross_entropy_only():
    found = focal_loss(tf.constant([[[np.log(3.0)]]], tf.float32), tf.constant([[0]]), SMOOTHED)
    cross_entropy = -(0.95 * np.log(3 / 4) + 0.05 * np.log(1 / 4))
    assert float(found[0, 0]) == pytest.approx(0.25 * (1 / 4) ** 1.5 * cross_entropy)


def test_ignored_anchor_has_no_loss_and_no_gradient():
    logits = tf.constant([[[1.0, -2.0], [3.0, 4.0]]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        found = focal_loss(logits, tf.constant([[1, IGNORED]]), PUBLISHED)
    gradient = tape.gradient(found, logits).numpy()
    assert found[0, 1] == 0
    assert gradient[0, 1].tolist() == [0, 0]
    assert gradient[0, 0].all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5])
def test_extreme_logits_and_deltas_keep_everything_finite(gamma):
    logits, deltas = golden.head_outputs(golden.SEED + 1, 1.0, 0.0)
    logits = np.resize(np.float32([1e3, -1e3, 0, 88, -88, 20]), logits.shape)
    found, gradients = with_gradient(logits, deltas * 1e4, dataclasses.replace(SMOOTHED, focal_gamma=gamma))
    assert all(np.isfinite(loss) for loss in found.values())
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_gradient_at_logit_0_is_the_slope():
    def loss(value):
        return float(focal_loss(tf.constant([[[value]]], tf.float32), tf.constant([[0]]), PUBLISHED)[0, 0])

    logits = tf.zeros([1, 1, 1])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        found = focal_loss(logits, tf.constant([[0]]), PUBLISHED)
    slope = (loss(0.01) - loss(-0.01)) / 0.02
    assert float(tape.gradient(found, logits)[0, 0, 0]) == pytest.approx(slope, rel=1e-3)


def test_other_backends_form_is_the_compiled_one(monkeypatch):
    logits = tf.constant(golden.head_outputs(golden.SEED + 1, 1.0, -3.0)[0])
    targets = golden_targets().class_targets
    results = {}
    for fused in (True, False):
        monkeypatch.setattr(losses, "on_tensorflow", lambda fused=fused: fused)
        with tf.GradientTape() as tape:
            tape.watch(logits)
            found = focal_loss(logits, targets, SMOOTHED)
        results[fused] = found, tape.gradient(found, logits)
    for compiled, plain in zip(*results.values(), strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-5, atol=1e-9)


def test_sum_over_a_full_picture_is_exact():
    # 4.4 million terms, most of them 1e-9 of the sum: added one by one in float32, they would get lost.
    logits = np.random.default_rng(0).normal(-7.0, 1.0, (1, 49_104, 90)).astype(np.float32)
    class_targets = np.full((1, 49_104), BACKGROUND, np.int32)
    targets = Targets(class_targets, tf.zeros([1, 49_104, 4]), tf.zeros([1]))
    found = detection_loss(logits, tf.zeros([1, 49_104, 4]), targets, 1.0, PUBLISHED)
    softplus = np.logaddexp(0, logits.astype(np.float64))
    exact = (0.75 * np.exp(1.5 * (logits - softplus)) * softplus).sum()
    assert float(found["class"]) == pytest.approx(exact, rel=1e-6)


def test_huber_loss_by_hand():
    targets = tf.constant([[[1.0, 1.0, 0.0, 1.0]]])
    deltas = tf.constant([[[1.06, -1.0, 9.0, 1.0]]])  # errors 0.06, 2; no target; 0
    found = huber_loss(deltas, targets, PUBLISHED)
    assert float(found[0, 0]) == pytest.approx(0.06**2 / 2 + 0.1 * (2 - 0.1 / 2), rel=1e-5)


def test_losses_are_summed_weighted_and_divided_by_the_normalizer():
    logits, deltas = tf.zeros([2, 3, 1]), tf.ones([2, 3, 4])
    targets = Targets(tf.fill([2, 3], BACKGROUND), tf.constant([0.0, 2.0, 0.0])[:, None] * tf.ones([2, 3, 4]), None)
    found = detection_loss(logits, deltas, targets, tf.constant(5.0), PUBLISHED)
    class_loss = 6 * 0.75 * 0.5**1.5 * np.log(2) / 5
    box_loss = 2 * 4 * 0.1 * (1 - 0.1 / 2) / (4 * 5)  # one of three anchors has a target
    assert float(found["class"]) == pytest.approx(class_loss)
    assert float(found["box"]) == pytest.approx(box_loss)
    assert float(found["total"]) == pytest.approx(class_loss + 50 * box_loss)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_outputs_are_counted_in_float32(dtype):
    logits = tf.constant([[[-12.0]]], dtype)  # a loss of 1e-13, which no float16 holds
    found = focal_loss(logits, tf.constant([[BACKGROUND]]), PUBLISHED)
    assert found.dtype == tf.float32
    assert float(found[0, 0]) == pytest.approx(0.75 * np.exp(-12 * 2.5), rel=1e-4)
    deltas = tf.constant([[[400.0, 0, 0, 0]]], dtype)
    assert huber_loss(deltas, tf.ones([1, 1, 4]), PUBLISHED).dtype == tf.float32


# --- IoU losses ---------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", ["giou", "ciou"])
ANCHORS = np.float32([[100, 200, 110, 220], [40, 0, 60, 10]])  # height 10, width 20; height 20, width 10


@pytest.fixture
def uncompiled(monkeypatch):
    """The same terms without XLA, which takes a second for each shape."""
    monkeypatch.setattr(losses, "on_tensorflow", lambda: False)


def box_losses(boxes, target_boxes, kind, anchor=0):
    """iou_loss of pairs of boxes [N][4], all of one anchor."""
    anchors = tf.constant(ANCHORS[[anchor] * len(boxes)])
    deltas, target_deltas = (encode(tf.constant([corners], tf.float32), anchors) for corners in (boxes, target_boxes))
    targets = Targets(tf.zeros([1, len(boxes)], tf.int32), target_deltas, None)
    return iou_loss(deltas, targets, anchors, kind)[0].numpy().tolist()


def exact_losses(deltas, target_deltas, anchors, kind, trade_offs=None):
    """The papers' formulas in float64, on corners in pixels; and the trade-offs alpha that CIoU holds constant."""
    centers, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    (top, left, bottom, right), (t_top, t_left, t_bottom, t_right) = (
        np.concatenate([at - half, at + half], axis=-1).T
        for at, half in (
            (delta[:, :2] * sides + centers, np.exp(delta[:, 2:]) * sides / 2) for delta in (deltas, target_deltas)
        )
    )
    height, width, t_height, t_width = bottom - top, right - left, t_bottom - t_top, t_right - t_left
    overlaps = np.maximum(np.minimum(bottom, t_bottom) - np.maximum(top, t_top), 0) * np.maximum(
        np.minimum(right, t_right) - np.maximum(left, t_left), 0
    )
    unions = height * width + t_height * t_width - overlaps
    hull_height = np.maximum(bottom, t_bottom) - np.minimum(top, t_top)
    hull_width = np.maximum(right, t_right) - np.minimum(left, t_left)
    if kind == "giou":
        hulls = hull_height * hull_width
        return 1 - overlaps / unions + (hulls - unions) / hulls, None
    distances = ((top + bottom - t_top - t_bottom) ** 2 + (left + right - t_left - t_right) ** 2) / 4
    unlikeness = 4 / np.pi**2 * (np.arctan(t_width / t_height) - np.arctan(width / height)) ** 2
    if trade_offs is None:
        trade_offs = unlikeness / (1 - overlaps / unions + unlikeness)
    diagonals = hull_height**2 + hull_width**2
    return 1 - overlaps / unions + distances / diagonals + trade_offs * unlikeness, trade_offs


@pytest.mark.usefixtures("uncompiled")
def test_giou_by_hand():
    found = box_losses(
        [[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]],
        [[0, 0, 10, 5], [0, 30, 10, 40], [20, 30, 30, 40]],
        "giou",
    )
    inside = 1 - 50 / 100  # the hull is the outer box
    beside = 1 - 0 + (400 - 200) / 400  # a hull of 10 x 40
    across = 1 - 0 + (1200 - 200) / 1200  # of 30 x 40
    assert found == pytest.approx([inside, beside, across], rel=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_ciou_by_hand():
    found = box_losses(
        [[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 20, 20]],
        [[0, 30, 10, 40], [0, 0, 10, 5], [5, 0, 15, 20]],
        "ciou",
    )
    beside = 1 + 30**2 / (10**2 + 40**2)  # of one shape
    half = 4 / np.pi**2 * (np.arctan(5 / 10) - np.arctan(1)) ** 2
    inside = 1 - 0.5 + 2.5**2 / (10**2 + 10**2) + half**2 / (0.5 + half)
    flat = 4 / np.pi**2 * (np.arctan(20 / 10) - np.arctan(1)) ** 2
    same_centre = 1 - 0.5 + flat**2 / (0.5 + flat)
    assert found == pytest.approx([beside, inside, same_centre], rel=1e-5)


@KINDS
@pytest.mark.usefixtures("uncompiled")
def test_perfect_box_has_no_loss(kind):
    boxes = [[100, 200, 110, 220], [90, 190, 130, 195], [0.25, 3, 511, 512]]
    for anchor in (0, 1):
        assert box_losses(boxes, boxes, kind, anchor) == pytest.approx([0, 0, 0], abs=1e-6)


@KINDS
@pytest.mark.usefixtures("uncompiled")
def test_loss_of_two_boxes_does_not_depend_on_the_anchor(kind):
    boxes, others = [[95, 195, 112, 230], [10, 20, 30, 25]], [[100, 200, 110, 220], [14, 22, 60, 29]]
    assert box_losses(boxes, others, kind, 0) == pytest.approx(box_losses(boxes, others, kind, 1), rel=1e-4)


@KINDS
@pytest.mark.parametrize(
    ("fused", "inside_step"),
    [
        pytest.param(False, None, id="any backend"),
        pytest.param(True, None, id="compiled", marks=pytest.mark.slow),
        pytest.param(True, False, id="in a step", marks=pytest.mark.slow),
        pytest.param(True, True, id="in a compiled step", marks=pytest.mark.slow),
    ],
)
def test_iou_losses_and_gradients_are_the_papers(kind, fused, inside_step, monkeypatch):
    monkeypatch.setattr(losses, "on_tensorflow", lambda: fused)
    random = np.random.default_rng(0)
    anchors = np.tile(ANCHORS, (100, 1))
    deltas, target_deltas = random.normal(0, [[1, 1, 0.5, 0.5]], (2, 200, 4)).astype(np.float32)  # a third disjoint
    targets = Targets(tf.zeros([1, 200], tf.int32), tf.constant(target_deltas[None]), None)

    def with_gradient(deltas):
        with tf.GradientTape() as tape:
            tape.watch(deltas)
            found = iou_loss(deltas, targets, tf.constant(anchors), kind)
        return found, tape.gradient(found, deltas)

    run = with_gradient if inside_step is None else tf.function(with_gradient, jit_compile=inside_step, autograph=False)
    found, gradient = run(tf.constant(deltas[None]))
    exact, trade_offs = exact_losses(deltas.astype(np.float64), target_deltas, anchors, kind)
    np.testing.assert_allclose(found[0], exact, rtol=1e-5, atol=1e-6)
    assert 20 < (exact > 1).sum() < 180  # those that do not overlap are among them
    slopes = np.zeros_like(exact, shape=(200, 4))
    for i, step in enumerate(1e-6 * np.eye(4)):
        up, down = (exact_losses(deltas + sign * step, target_deltas, anchors, kind, trade_offs)[0] for sign in (1, -1))
        slopes[:, i] = (up - down) / 2e-6
    np.testing.assert_allclose(gradient[0], slopes, rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.usefixtures("uncompiled")
def test_a_box_that_does_not_overlap_is_pulled_closer(kind):
    deltas = tf.constant([[[30.0, -40.0, 0.0, 0.0]]])
    targets = Targets(tf.zeros([1, 1], tf.int32), tf.zeros([1, 1, 4]), None)
    with tf.GradientTape() as tape:
        tape.watch(deltas)
        found = iou_loss(deltas, targets, tf.constant(ANCHORS[:1]), kind)
    gradient = tape.gradient(found, deltas)[0, 0].numpy()
    assert gradient[0] > 0
    assert gradient[1] < 0


@pytest.mark.slow
@KINDS
def test_iou_losses_stay_finite_for_any_deltas(kind):
    values = np.float32([0, 1e-30, 3, -25, 100, -100, 3e38, -3e38])
    deltas = tf.constant(np.stack(np.meshgrid(*[values] * 4), axis=-1).reshape(1, -1, 4))  # [1, 4096, 4]
    num_deltas = deltas.shape[1]
    for target in ([0, 0, 0, 0], [0.3, 0.2, -25, -25], [-0.4, 0.2, 5, 0], deltas[0]):
        targets = Targets(tf.zeros([1, num_deltas], tf.int32), tf.zeros([1, num_deltas, 1]) + target, None)
        with tf.GradientTape() as tape:
            tape.watch(deltas)
            found = iou_loss(deltas, targets, tf.constant(np.tile(ANCHORS, (num_deltas // 2, 1))), kind)
        assert np.isfinite(found).all()
        assert np.isfinite(tape.gradient(found, deltas)).all()
        assert found.numpy().max() <= 3
        assert found.numpy().min() >= -1e-6


@KINDS
@pytest.mark.usefixtures("uncompiled")
def test_only_positive_anchors_count_in_an_iou_loss(kind):
    deltas = tf.random.stateless_normal([1, 4, 4], [1, 2])
    targets = Targets(tf.constant([[0, BACKGROUND, IGNORED, 2]]), tf.zeros([1, 4, 4]), None)  # a target may be all 0
    with tf.GradientTape() as tape:
        tape.watch(deltas)
        found = iou_loss(deltas, targets, tf.constant(np.tile(ANCHORS, (2, 1))), kind)
    assert (found[0].numpy() != 0).tolist() == [True, False, False, True]
    assert tape.gradient(found, deltas).numpy().any(axis=-1).tolist() == [[True, False, False, True]]


@pytest.mark.usefixtures("uncompiled")
def test_iou_losses_stand_where_hubers_stood():
    config = dataclasses.replace(PUBLISHED, box_loss="giou", box_loss_weight=2.0)
    targets = Targets(tf.constant([[BACKGROUND, 0]]), tf.zeros([1, 2, 4]), None)
    deltas = tf.constant([[[9.0, 9, 9, 9], [0.0, 0.0, 0.0, np.log(0.5)]]])  # half of the anchor's width
    found = detection_loss(tf.zeros([1, 2, 1]), deltas, targets, tf.constant(5.0), config, tf.constant(ANCHORS))
    assert float(found["box"]) == pytest.approx(0.5 / 5)
    assert float(found["total"]) == pytest.approx(float(found["class"]) + 2 * 0.5 / 5)


@KINDS
@pytest.mark.usefixtures("uncompiled")
def test_decoded_boxes_in_half_precision_are_counted_in_float32(kind):
    deltas = tf.constant([[[0.5, -0.5, 9.0, 9.0]]], tf.float16)  # e^18 anchors of area
    anchors = tf.constant(ANCHORS[:1])
    targets = Targets(tf.zeros([1, 1], tf.int32), tf.zeros([1, 1, 4]), None)
    found = iou_loss(deltas, targets, anchors, kind)
    assert found.dtype == tf.float32
    top, left, bottom, right = decode(deltas, anchors).numpy()[0, 0].astype(np.float64)
    inside = 1 - 10 * 20 / ((bottom - top) * (right - left))
    assert float(found[0, 0]) == pytest.approx(inside, rel=1e-5)  # of the same shape, and its centre is near


def test_an_iou_loss_needs_anchors_and_a_name():
    targets = Targets(tf.zeros([1, 2], tf.int32), tf.zeros([1, 2, 4]), None)
    config = dataclasses.replace(PUBLISHED, box_loss="ciou")
    with pytest.raises(EffdetError, match="got 'ciou' and anchors None"):
        detection_loss(tf.zeros([1, 2, 1]), tf.zeros([1, 2, 4]), targets, 1.0, config)
    with pytest.raises(EffdetError, match="got 'iou'"):
        iou_loss(tf.zeros([1, 2, 4]), targets, tf.constant(ANCHORS), "iou")
