"""What the model detects, with ties broken as given detections break them.

Of two boxes that overlap, NMS lets the better one stay. Where their scores are equal but for the last bits of float32,
which every runtime rounds in its own way, either may, and the rest of the picture follows from it. No bound on how far
detections may be apart tells that from a fault; making the model's own choice again does.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet.anchors import anchors, decode
from effdet.boxes import iou
from effdet.export import pixels_function
from effdet.inference import Found
from effdet.postprocess import PostprocessConfig
from pipeline.model_files import StoredModel

SAME_CORNERS = 0.01  # pixels; boxes so near are one: rounding moves the IoU of the smallest
SAME_IOU = 0.99
# What rounding moves. Seen between a trained model's outputs in TensorFlow, ONNX Runtime and LiteRT: logits by 2.4e-5,
# box deltas by 1.0e-5, which is twice that in an overlap.
LOGIT_ROUNDING = 2.5e-5
OVERLAP_ROUNDING = 2e-5
SCORE_ROUNDING = 1.2e-7  # of the sigmoid, at 1


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What NMS chooses from on a picture: N pairs of anchor and class, each score within what rounding leaves open."""

    boxes: NDArray[np.float32]  # [N,4] yxyx, pixels of the picture
    class_ids: NDArray[np.int64]  # [N]
    lowest: NDArray[np.float64]  # [N]
    highest: NDArray[np.float64]  # [N]
    certain: NDArray[np.bool_]  # [N], False where rounding decides whether the pair is one of the candidates


def overlap(boxes: NDArray[np.floating], others: NDArray[np.floating]) -> NDArray[np.floating]:
    """IoU [...] of boxes [...,4] yxyx in pixels; 1 where they are one but for SAME_CORNERS."""
    return np.where(np.abs(boxes - others).max(axis=-1) <= SAME_CORNERS, 1.0, iou(boxes, others))


def candidates_of(stored: StoredModel, nms: PostprocessConfig) -> Callable[[NDArray[np.uint8]], Candidates]:
    """From a picture uint8 [h,w,3] to what the model's NMS chooses from on it."""
    network = pixels_function(stored.model, stored.config, None, batch=1)
    model_anchors = anchors(stored.config)

    def on(picture: NDArray[np.uint8]) -> Candidates:
        heads = network(tf.constant(picture[None]))
        logits, deltas = (heads[name].numpy()[0] for name in ("class_logits", "box_deltas"))
        scale = np.max(np.array(picture.shape[:2]) / stored.config.image_size)
        return candidates(logits, deltas, model_anchors, scale, nms.pre_nms_top_k)

    return on


def candidates(
    class_logits: NDArray[np.float32],
    box_deltas: NDArray[np.float32],
    model_anchors: NDArray[np.float32],
    scale: float,
    top_k: int | None,
) -> Candidates:
    """Of outputs [A,K] and [A,4]: the top_k pairs, or each anchor's best, and what rounding may put in their place."""
    pairs, k = (class_logits, 1) if top_k is None else (class_logits.reshape(1, -1), top_k)
    k = min(k, pairs.shape[1])
    last = np.partition(pairs, -k, axis=1)[:, [-k]]
    chosen = pairs >= last - 2 * LOGIT_ROUNDING
    certain = chosen & ((chosen.sum(axis=1, keepdims=True) == k) | (pairs > last + 2 * LOGIT_ROUNDING))
    anchor_ids, class_ids = chosen.reshape(class_logits.shape).nonzero()
    logits = class_logits[anchor_ids, class_ids].astype(np.float64)
    lowest, highest = (1 / (1 + np.exp(-logits - rounding)) for rounding in (-LOGIT_ROUNDING, LOGIT_ROUNDING))
    return Candidates(
        decode(box_deltas[anchor_ids], model_anchors[anchor_ids]).numpy() * np.float32(scale),
        class_ids,
        lowest - SCORE_ROUNDING,
        highest + SCORE_ROUNDING,
        certain[chosen],
    )


def chosen_like(found: Found, offered: Candidates, nms: PostprocessConfig) -> Found:
    """What NMS finds of `offered` where it takes, of those that may be the best, the one that `found` has next.

    That is a result of the model's as good as any other, and however far `found` is from it: who follows nothing makes
    a choice of its own. Best first; found may leave out classes.
    """
    lowest, highest, certain = offered.lowest, offered.highest, offered.certain
    left = np.ones(len(certain), bool)
    taken: list[int] = []
    scores: list[float] = []
    shown = 0
    while len(taken) < nms.max_detections:
        least = lowest.max(initial=nms.score_threshold, where=certain & left)  # below it, none is the best
        best = left & (highest > least)
        if shown < len(found.scores):
            best &= offered.class_ids == found.class_ids[shown]
            best &= overlap(offered.boxes, found.boxes[shown]) >= SAME_IOU
        if shown < len(found.scores) and best.any():
            distances = np.abs(offered.boxes - found.boxes[shown]).max(axis=1)
            one = int(np.where(best, distances, np.inf).argmin())
            shown += 1
        elif least > nms.score_threshold:
            one = int(np.where(certain & left, lowest + highest, -1.0).argmax())
        else:
            break
        taken.append(one)
        scores.append((lowest[one] + highest[one]) / 2)
        left[one] = False
        rivals = left & (offered.class_ids == offered.class_ids[one])
        overlaps = iou(offered.boxes, offered.boxes[one])
        if nms.method == "gaussian":
            more, less = overlaps + OVERLAP_ROUNDING, np.maximum(overlaps - OVERLAP_ROUNDING, 0)
            rivals &= overlaps > 0
            lowest = np.where(rivals, lowest * np.exp(-(more**2) / nms.sigma), lowest)
            highest = np.where(rivals, highest * np.exp(-(less**2) / nms.sigma), highest)
        else:
            certain = certain & ~(rivals & (overlaps > nms.iou_threshold - OVERLAP_ROUNDING))
            left &= ~(rivals & (overlaps > nms.iou_threshold + OVERLAP_ROUNDING))
    order = np.argsort(-np.array(scores), kind="stable")  # of a tie that does not overlap, both are there
    places = np.array(taken, int)[order]
    return Found(offered.boxes[places], np.array(scores)[order], offered.class_ids[places])
