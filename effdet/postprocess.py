"""From the network's outputs to detections: top-k, decoding, per-class NMS.

Results as google/automl efficientdet @6a54c87 with its TensorFlow NMS: hard, or soft with a Gaussian
(arXiv:1704.04503, sigma as that paper writes it). Like there, boxes may reach over the border.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from effdet.anchors import decode
from effdet.boxes import PADDING, iou
from effdet.errors import EffdetError

Tensor = Any  # a tf.Tensor, eager or symbolic

METHODS = ("hard", "gaussian")


@dataclasses.dataclass(frozen=True)
class PostprocessConfig:
    """How detections are chosen. The defaults are those behind the published COCO results."""

    method: str = "gaussian"  # or "hard"
    iou_threshold: float = 0.5  # hard: a box over this IoU with a better one of its class is dropped
    sigma: float = 0.5  # gaussian: its score is multiplied by exp(-IoU**2 / sigma) instead
    score_threshold: float = 0.001  # what ends with a score over this is kept
    max_detections: int = 100  # an image
    # (anchor, class) pairs an image that enter NMS. None: every anchor, but with its best class only,
    # as the published model does outside of its COCO evaluation.
    pre_nms_top_k: int | None = 5000

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise EffdetError(f"NMS method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if not 0.0 <= self.score_threshold < 1.0:
            raise EffdetError(f"NMS score_threshold: expected 0 <= score < 1, got {self.score_threshold}")


def detect(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: np.ndarray | Tensor,
    scales: Tensor,
    config: PostprocessConfig,
    portable: bool = False,
) -> dict[str, Tensor]:
    """The detections of a batch, best first, in places of which the last may be empty.

    class_logits [B,A,K] and box_deltas [B,A,4] are the model's outputs, anchors float32 [A,4] yxyx,
    scales float32 [B] the factor from input pixels to those of the original image. Gives {"boxes":
    float32 [B,D,4] yxyx original pixels, "scores": float32 [B,D], "class_ids": int32 [B,D], "count":
    int32 [B]}, D = max_detections; places from count on hold 0, 0 and PADDING. A pure function of
    tensors: it may stand inside any tf.function. portable takes what every runtime has, for exports: no
    XLA, no shape that depends on values. The results are the same, the time is about double.
    """
    class_logits = tf.cast(class_logits, tf.float32)  # half precision would make ties of near scores
    if config.pre_nms_top_k is None:
        logits, anchor_indices, class_ids = best_class_candidates(class_logits)
    else:
        logits, anchor_indices, class_ids = top_candidates(class_logits, config.pre_nms_top_k, portable)
    boxes = decode(tf.gather(box_deltas, anchor_indices, batch_dims=1), tf.gather(anchors, anchor_indices))
    nms = _greedy_nms if portable else _compiled_greedy_nms
    chosen, scores = nms(
        boxes,
        tf.sigmoid(logits),
        class_ids,
        config.max_detections,
        config.score_threshold,
        iou_threshold=config.iou_threshold if config.method == "hard" else None,
        sigma=config.sigma if config.method == "gaussian" else None,
    )
    found = chosen >= 0
    places = tf.maximum(chosen, 0)
    boxes = tf.gather(boxes, places, batch_dims=1) * scales[:, None, None]
    return {
        "boxes": tf.where(found[..., None], boxes, 0.0),
        "scores": scores,
        "class_ids": tf.where(found, tf.gather(class_ids, places, batch_dims=1), PADDING),
        "count": tf.reduce_sum(tf.cast(found, tf.int32), axis=1),
    }


def top_candidates(class_logits: Tensor, k: int, portable: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The k best (anchor, class) pairs of each image's logits [B,A,K], or all where there are fewer.

    Gives logits [B,k], anchor indices and class ids int32 [B,k], best first, of equals the first:
    what top_k over A*K gives, in a third of its time (portable: in half of it).
    """
    num_anchors, num_classes = class_logits.shape[1:]
    # Each of the k best pairs belongs to one of the k anchors whose best class is highest. Their indices
    # are sorted, so that ties keep the order they have among all pairs.
    best, anchor_indices = tf.math.top_k(tf.reduce_max(class_logits, axis=2), min(k, num_anchors))
    anchor_indices = tf.sort(anchor_indices, axis=1)
    pairs = tf.gather(class_logits, anchor_indices, batch_dims=1)  # [B,k,K]
    pairs = tf.reshape(pairs, [-1, pairs.shape[1] * num_classes])
    if portable:
        logits, indices = tf.math.top_k(pairs, min(k, pairs.shape[1]))
        return logits, *_pairs(indices, anchor_indices, num_classes)
    # And none is below the last of those anchors' best classes: of k*K pairs few more than k are left.
    least = best[:, -1] if num_anchors >= k else tf.fill(tf.shape(best)[:1], -np.inf)
    least = tf.where(tf.math.is_finite(least), least, -np.inf)  # among NaN the order means nothing: none is left out
    logits, indices = tf.map_fn(
        lambda image: _top_k_above(image[0], image[1], min(k, pairs.shape[1])),
        (pairs, least),
        fn_output_signature=(tf.float32, tf.int32),
    )
    return logits, *_pairs(indices, anchor_indices, num_classes)


def _pairs(indices: Tensor, anchor_indices: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Anchor indices and class ids of places among the pairs of the anchors."""
    return tf.gather(anchor_indices, indices // num_classes, batch_dims=1), indices % num_classes


def _top_k_above(values: Tensor, least: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of values [n], at least k of which are not below `least`, and their indices int32 [k]."""
    indices = tf.where(~(values < least))[:, 0]  # so that NaN stays, and shows in the scores
    top, places = tf.math.top_k(tf.gather(values, indices), k)
    return top, tf.cast(tf.gather(indices, places), tf.int32)


def best_class_candidates(class_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each anchor of logits [B,A,K] with its best class, of equals the first.

    Gives logits [B,A], anchor indices and class ids int32 [B,A], in the anchors' order.
    """
    class_ids = tf.argmax(class_logits, axis=2, output_type=tf.int32)
    anchor_indices = tf.broadcast_to(tf.range(tf.shape(class_ids)[1]), tf.shape(class_ids))
    return tf.reduce_max(class_logits, axis=2), anchor_indices, class_ids


def _greedy_nms(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor,
    max_detections: int,
    score_threshold: float,
    iou_threshold: float | None,
    sigma: float | None,
) -> tuple[Tensor, Tensor]:
    """Takes the best candidate again and again, suppressing its neighbours of the same class.

    boxes float32 [B,N,4], scores float32 [B,N] >= 0, class_ids int32 [B,N]. Hard where iou_threshold
    is given, else Gaussian. Gives candidate indices int32 [B,D], -1 where none, and scores [B,D], 0
    there. One loop over all classes and images; the IoU is that of the boxes as they are (the usual
    trick, shifting each class aside for a class-blind NMS, rounds their coordinates and so the scores).
    """
    num_images, num_candidates = tf.shape(scores)[0], scores.shape[1]  # an exported batch has any size

    def take_best(i: Tensor, scores: Tensor, chosen: Tensor, chosen_scores: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        best = tf.argmax(scores, axis=1, output_type=tf.int32)[:, None]  # [B,1] of equals the first
        best_score = tf.gather(scores, best, batch_dims=1)  # [B,1]
        rivals = class_ids == tf.gather(class_ids, best, batch_dims=1)  # [B,N]
        overlaps = iou(boxes, tf.gather(boxes, best, batch_dims=1))  # [B,N]
        if sigma is not None:
            scores = tf.where(rivals, scores * tf.exp(-overlaps * overlaps / sigma), scores)
        else:
            scores = tf.where(rivals & (overlaps > iou_threshold), -1.0, scores)
        scores = tf.where(tf.range(num_candidates) == best, -1.0, scores)
        here = (tf.range(max_detections) == i) & (best_score > score_threshold)  # [B,D]
        chosen = tf.where(here, best, chosen)
        chosen_scores = tf.where(here, best_score, chosen_scores)
        return i + 1, scores, chosen, chosen_scores, tf.reduce_max(best_score)

    _, _, chosen, chosen_scores, _ = tf.while_loop(
        lambda i, *state: (i < max_detections) & (state[-1] > score_threshold),
        take_best,
        [
            tf.constant(0),
            scores,
            tf.fill([num_images, max_detections], -1),
            tf.zeros([num_images, max_detections]),
            tf.constant(1.0),  # the best score of the last round
        ],
    )
    return chosen, chosen_scores


_compiled_greedy_nms = tf.function(_greedy_nms, jit_compile=True, autograph=False)
