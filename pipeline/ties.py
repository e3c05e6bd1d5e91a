"""What the model detects, with ties broken as given detections break them.

Of two boxes that overlap, NMS lets the better one stay. Where their scores are equal but for the last bits of float32,
which every runtime rounds in its own way, either may, and the rest of the picture follows from it. No bound on how far
detections may be apart tells that from a fault; making the model's own choice again does.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet.anchors import anchors
from effdet.boxes import iou
from effdet.export import pixels_function
from effdet.inference import Found
from effdet.postprocess import PostprocessConfig, candidates
from pipeline.model_files import StoredModel

SAME_SCORE = 2e-5  # twice what the scores of two runtimes were seen to differ by, 9e-6 with random weights
SAME_OVERLAP = 1e-4  # at the limit of hard NMS


def candidates_of(stored: StoredModel, nms: PostprocessConfig) -> Callable[[NDArray[np.uint8]], Found]:
    """From a picture uint8 [h,w,3] to what the model's NMS chooses from on it, of classes in use, best first."""
    network = pixels_function(stored.model, stored.config, None, batch=1)
    model_anchors = anchors(stored.config)

    def offered(picture: NDArray[np.uint8]) -> Found:
        heads = network(tf.constant(picture[None]))
        arrays = candidates(heads["class_logits"], heads["box_deltas"], model_anchors, nms)
        boxes, scores, class_ids = (array.numpy()[0] for array in arrays)
        here = np.isin(class_ids, [row.class_id for row in stored.classes])
        boxes = boxes * np.max(np.array(picture.shape[:2]) / stored.config.image_size)
        return Found(boxes[here], scores[here], class_ids[here])

    return offered


def chosen_like(found: Found, offered: Found, nms: PostprocessConfig) -> Found:
    """What NMS finds of `offered`, which takes, where several are the best but for rounding, the one `found` has.

    That is a result of the model's as good as any other, however far `found` is from it. found: all detections on the
    picture, in their order.
    """
    least = most = offered.scores.astype(np.float64)  # in hard NMS rounding may decide whether a box is still there
    chosen: list[int] = []
    scores = []
    for place in range(nms.max_detections):
        goes_on = place < len(found.scores)
        limit = nms.score_threshold + (-SAME_SCORE if goes_on else SAME_SCORE)
        if (most if goes_on else least).max(initial=-1.0) <= limit:
            break
        taken = int(most.argmax())
        if goes_on:
            best = (most >= least.max() - SAME_SCORE) & (offered.class_ids == found.class_ids[place])
            distances = np.abs(offered.boxes - found.boxes[place]).max(axis=1)
            taken = int(np.where(best, distances, np.inf).argmin()) if best.any() else taken
        chosen.append(taken)
        scores.append(most[taken])
        rivals = offered.class_ids == offered.class_ids[taken]
        overlaps = iou(offered.boxes, offered.boxes[taken])
        if nms.method == "gaussian":
            least = most = np.where(rivals, most * np.exp(-(overlaps**2) / nms.sigma), most)
        else:
            least = np.where(rivals & (overlaps > nms.iou_threshold - SAME_OVERLAP), -1.0, least)
            most = np.where(rivals & (overlaps > nms.iou_threshold + SAME_OVERLAP), -1.0, most)
        least[chosen] = most[chosen] = -1.0
    return Found(offered.boxes[chosen], np.array(scores), offered.class_ids[chosen])
