"""Focal loss (arXiv:1708.02002) and Huber loss, as google/automl efficientdet @6a54c87; in place of Huber's the IoU
losses GIoU (arXiv:1902.09630) and CIoU (arXiv:1911.08287).

google/automl adds an IoU loss to Huber's, divides it by 4 x positives, and takes a corner whose delta should be 0 for
0; here it is the mean of 1 - IoU over the positive anchors.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import tensorflow as tf
from keras import ops

from effdet.anchors import MAX_LOG_SCALE
from effdet.assign import IGNORED, Targets
from effdet.errors import EffdetError
from effdet.layers import on_tensorflow

Tensor = Any  # of whichever backend, eager or symbolic

MAX_SHIFT = math.exp(MAX_LOG_SCALE)  # anchor sides; squared it still fits float32


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What shapes the loss. The published values stand behind each."""

    focal_alpha: float  # weight of the positive class, 1 - alpha of the others; 0.25
    focal_gamma: float  # how much less an easy example counts; 1.5
    label_smoothing: float  # 0.0
    huber_delta: float  # error from which on the loss is linear; 0.1
    box_loss_weight: float  # 50.0 for Huber's; an IoU loss wants one near 1
    box_loss: Literal["huber", "giou", "ciou"]


def detection_loss(
    class_logits: Tensor,
    box_deltas: Tensor,
    targets: Targets,
    normalizer: Tensor,
    config: LossConfig,
    anchors: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses of a batch, float32 scalars: {"class", "box", "total"}, total = class + weight * box.

    class_logits [B,A,K] and box_deltas [B,A,4] are the model's outputs. normalizer is the scalar that
    the sums are divided by: the published one is the positive anchors of the whole batch, plus 1.
    `anchors` [A,4] yxyx: the IoU losses need them.
    """
    class_loss = ops.sum(focal_loss(class_logits, targets.class_targets, config)) / normalizer
    if config.box_loss == "huber":
        box_loss = ops.sum(huber_loss(box_deltas, targets.box_targets, config)) / (4.0 * normalizer)
    else:
        box_loss = ops.sum(iou_loss(box_deltas, targets, anchors, config.box_loss)) / normalizer
    return {
        "class": class_loss,
        "box": box_loss,
        "total": class_loss + config.box_loss_weight * box_loss,
    }


def huber_loss(box_deltas: Tensor, box_targets: Tensor, config: LossConfig) -> Tensor:
    """Huber loss float32 [B,A] of each anchor, summed over (ty, tx, th, tw), all [B,A,4].

    A target of exactly 0 does not count: so the published code leaves out anchors without a box.
    """
    box_deltas = ops.cast(box_deltas, "float32")  # a sum over thousands of small terms
    errors = ops.abs(box_deltas - box_targets)
    near = ops.minimum(errors, config.huber_delta)
    losses = 0.5 * near * near + config.huber_delta * (errors - near)
    return ops.sum(ops.where(box_targets != 0.0, losses, 0.0), axis=-1)


def focal_loss(class_logits: Tensor, class_targets: Tensor, config: LossConfig) -> Tensor:
    """Focal loss float32 [B,A] of each anchor, summed over its K classes; 0 where IGNORED.

    class_logits [B,A,K]; class_targets int32 [B,A], 0..K-1, BACKGROUND or IGNORED. Finite, with its
    gradient, for any finite logits.
    """
    logits = ops.cast(class_logits, "float32")  # the loss of an easy example is below float16's least
    settings = (config.focal_alpha, config.focal_gamma, config.label_smoothing)
    if not on_tensorflow():
        return _focal_terms(logits, class_targets, *settings)

    # [B,A,K] is the largest tensor of a training step: 3.5 GB in float32 at 200 images of 512x512.
    return _compiled_focal_terms(logits, class_targets, *settings)


def _focal_terms(logits: Tensor, class_targets: Tensor, alpha: float, gamma: float, label_smoothing: float) -> Tensor:
    is_class = class_targets[..., None] == ops.arange(logits.shape[-1], dtype="int32")  # [B,A,K]
    softplus = ops.softplus(logits)  # -log(1 - p); softplus - logits is -log(p)
    # (1 - p_t) ** gamma, in logarithms: neither it nor its gradient overflows, whatever the logit.
    modulator = ops.exp(-gamma * ops.where(is_class, softplus, softplus - logits))
    # Smoothed labels are for the cross-entropy only; in p_t they would blow up the loss.
    labels = ops.where(is_class, 1.0 - label_smoothing / 2, label_smoothing / 2)
    cross_entropy = softplus - logits * labels
    weights = ops.where(is_class, alpha, 1.0 - alpha)
    losses = ops.sum(weights * modulator * cross_entropy, axis=-1)
    return ops.where(class_targets == IGNORED, 0.0, losses)


def iou_loss(box_deltas: Tensor, targets: Targets, anchors: Tensor, kind: str) -> Tensor:
    """1 - GIoU or 1 - CIoU, float32 [B,A], of the boxes that deltas [B,A,4] and box targets stand for; 0 where an
    anchor is not positive.

    `anchors` [A,4] yxyx. `kind`: "giou", 0..2, or "ciou". Finite, with its gradient, for any finite deltas: coordinates
    are clipped as the decoder clips. EffdetError where the kind is another or anchors are missing.
    """
    if kind not in ("giou", "ciou") or anchors is None:
        raise EffdetError(f"losses: expected box_loss giou or ciou and anchors, got {kind!r} and anchors {anchors}")
    box_deltas = ops.cast(box_deltas, "float32")  # products of sides overflow float16
    anchors = ops.cast(anchors, "float32")
    aspects = (anchors[:, 3] - anchors[:, 1]) / (anchors[:, 2] - anchors[:, 0])  # [A] width / height
    terms = _compiled_iou_terms if on_tensorflow() else _iou_terms
    return terms(box_deltas, targets.box_targets, targets.class_targets >= 0, aspects, kind)


def _iou_terms(box_deltas: Tensor, box_targets: Tensor, positive: Tensor, aspects: Tensor, kind: str) -> Tensor:
    """In units of the anchor's height and width: ratios of areas are the same in them."""
    y, x, height, width = _boxes(box_deltas)  # [B,A] each
    target_y, target_x, target_height, target_width = _boxes(box_targets)
    overlap_height, hull_height = _overlap_and_hull(y - target_y, height, target_height)
    overlap_width, hull_width = _overlap_and_hull(x - target_x, width, target_width)
    intersections = overlap_height * overlap_width
    unions = height * width + target_height * target_width - intersections
    ious = intersections / unions
    if kind == "giou":
        hulls = hull_height * hull_width
        return ops.where(positive, 1.0 - ious + (hulls - unions) / hulls, 0.0)

    # Distances and angles are not: here a unit is the anchor's height.
    distances = ops.square(y - target_y) + ops.square((x - target_x) * aspects)
    diagonals = ops.square(hull_height) + ops.square(hull_width * aspects)
    angles = ops.arctan(target_width * aspects / target_height) - ops.arctan(width * aspects / height)
    unlikeness = 4.0 / math.pi**2 * ops.square(angles)  # of shape, 0..1
    # A constant in the gradient, as in the paper. The paper's code also leaves a factor of 1 / (height^2 + width^2)
    # out of the angle's gradient, which explodes for small sides; for their logarithms it is at most 1/2, and stays.
    trade_off = ops.stop_gradient(unlikeness / (ops.maximum(1.0 - ious, 1e-9) + unlikeness))
    return ops.where(positive, 1.0 - ious + distances / diagonals + trade_off * unlikeness, 0.0)


def _boxes(deltas: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre y, x and sides, each [B,A], of deltas [B,A,4], in sides of the anchor and from its centre."""
    # From below too, so that no side and no area is 0.
    sides = ops.exp(ops.clip(deltas[..., 2:], -MAX_LOG_SCALE, MAX_LOG_SCALE))
    centers = ops.clip(deltas[..., :2], -MAX_SHIFT, MAX_SHIFT)
    return centers[..., 0], centers[..., 1], sides[..., 0], sides[..., 1]


def _overlap_and_hull(shifts: Tensor, sides: Tensor, target_sides: Tensor) -> tuple[Tensor, Tensor]:
    """What two intervals whose centres lie a shift apart share, and what spans both; each as `shifts`."""
    shifts, mean_sides = ops.abs(shifts), (sides + target_sides) / 2
    overlaps = ops.minimum(mean_sides - shifts, ops.minimum(sides, target_sides))
    hulls = ops.maximum(mean_sides + shifts, ops.maximum(sides, target_sides))
    return ops.maximum(overlaps, 0.0), hulls


def _compiled(terms: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`terms` and its gradient by the first argument, one pass over the tensors each; only the arguments are kept."""
    forward = tf.function(terms, jit_compile=True, autograph=False)

    @tf.function(jit_compile=True, autograph=False)  # type: ignore[untyped-decorator]
    def backward(outputs: Tensor, upstream: Tensor, *others: Any) -> Tensor:
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            losses = terms(outputs, *others)
        return tape.gradient(losses, outputs, output_gradients=upstream)

    def compiled(outputs: Tensor, *others: Any) -> Tensor:
        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def with_gradient(outputs: Tensor) -> Tensor:
            return forward(outputs, *others), lambda upstream: backward(outputs, upstream, *others)

        return with_gradient(outputs)

    return compiled


_compiled_focal_terms = _compiled(_focal_terms)
_compiled_iou_terms = _compiled(_iou_terms)
