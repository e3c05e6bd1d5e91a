"""Detections against the reference, against TensorFlow's own operations a class at a time, and by hand."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from effdet.anchors import decode
from effdet.boxes import PADDING
from effdet.errors import EffdetError
from effdet.postprocess import PostprocessConfig, detect, top_candidates
from tests.effdet import golden

HARD = PostprocessConfig(method="hard", iou_threshold=0.5, score_threshold=0.05)
GAUSSIAN = PostprocessConfig(method="gaussian", sigma=0.5, score_threshold=0.0)
METHODS = pytest.mark.parametrize("config", [HARD, GAUSSIAN], ids=["hard", "gaussian"])


def head_outputs():
    return golden.head_outputs(golden.SEED + 2, 1.5, -5.0)


PORTABLE = pytest.mark.parametrize("portable", [False, True])


@METHODS
@PORTABLE
def test_golden(config, portable):
    expected = {
        key: golden.arrays()[f"det_{config.method}_{key}"] for key in ("boxes", "scores", "categories", "count")
    }
    assert len(np.unique(expected["scores"])) == 200
    # the golden detections have one class an anchor
    one_class = dataclasses.replace(config, pre_nms_top_k=None)
    found = detect(*head_outputs(), golden.arrays()["anchors"], tf.constant([1.0, 1.7]), one_class, portable)
    np.testing.assert_array_equal(found["class_ids"] + 1, expected["categories"])
    np.testing.assert_array_equal(found["count"], expected["count"])
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-4)
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-6)


def straightforward(logits, deltas, anchors, scale, config):
    """One image: top-k over all pairs, then tf.image's NMS for each class, then the best of all classes."""
    num_classes = logits.shape[-1]
    top, indices = tf.math.top_k(tf.reshape(logits, [-1]), config.pre_nms_top_k)
    boxes = decode(tf.gather(deltas, indices // num_classes), tf.gather(anchors, indices // num_classes))
    found = []
    for class_id in range(num_classes):
        own = tf.where(indices % num_classes == class_id)[:, 0]
        chosen, scores = tf.image.non_max_suppression_with_scores(
            tf.gather(boxes, own),
            tf.gather(tf.sigmoid(top), own),
            config.max_detections,
            iou_threshold=config.iou_threshold if config.method == "hard" else 1.0,
            score_threshold=config.score_threshold,
            soft_nms_sigma=0.0 if config.method == "hard" else config.sigma / 2,  # half of the paper's
        )
        for box, score in zip(tf.gather(boxes, tf.gather(own, chosen)).numpy(), scores.numpy(), strict=True):
            found.append((score, class_id, box * scale))
    return sorted(found, key=lambda detection: -detection[0])[: config.max_detections]


@METHODS
@PORTABLE
def test_equals_the_straightforward_way(config, portable):
    logits, deltas = head_outputs()
    anchors = golden.arrays()["anchors"]
    config = dataclasses.replace(config, pre_nms_top_k=2000, score_threshold=0.2)
    found = detect(logits, deltas, anchors, tf.constant([1.0, 1.7]), config, portable)
    for b, scale in enumerate([1.0, 1.7]):
        scores, class_ids, boxes = zip(*straightforward(logits[b], deltas[b], anchors, scale, config), strict=True)
        count = int(found["count"][b])
        assert count == len(scores)
        np.testing.assert_array_equal(found["class_ids"][b, :count], class_ids)
        np.testing.assert_allclose(found["boxes"][b, :count], boxes, atol=1e-4)
        np.testing.assert_allclose(found["scores"][b, :count], scores, atol=1e-6)


@PORTABLE
@pytest.mark.parametrize("decimals", [5, 1, 0])  # 0: nearly all are ties
def test_two_stages_give_the_top_k_of_all_pairs_in_their_order(decimals, portable):
    logits = np.random.default_rng(0).standard_normal((2, 600, 20)).round(decimals).astype(np.float32)
    top, anchor_indices, class_ids = top_candidates(tf.constant(logits), 100, portable)
    expected, indices = tf.math.top_k(logits.reshape(2, -1), 100)
    np.testing.assert_array_equal(top, expected)
    np.testing.assert_array_equal(anchor_indices * 20 + class_ids, indices)


def test_fewer_anchors_than_k_still_give_k_pairs():
    logits = np.random.default_rng(0).standard_normal((2, 30, 20)).astype(np.float32)
    top, anchor_indices, class_ids = top_candidates(tf.constant(logits), 100)
    expected, indices = tf.math.top_k(logits.reshape(2, -1), 100)
    np.testing.assert_array_equal(top, expected)
    np.testing.assert_array_equal(anchor_indices * 20 + class_ids, indices)


def test_fewer_pairs_than_k_are_all_candidates():
    top, anchor_indices, class_ids = top_candidates(tf.constant([[[1.0, 4.0], [3.0, 2.0]]]), 5000)
    assert (top.numpy().tolist(), anchor_indices.numpy().tolist()) == ([[4, 3, 2, 1]], [[0, 1, 1, 0]])
    assert class_ids.numpy().tolist() == [[1, 0, 1, 0]]


# Three anchors: the second overlaps the first by 50 / 150; the third stands apart.
ANCHORS = np.array([[0, 0, 10, 10], [0, 5, 10, 15], [50, 50, 60, 60]], np.float32)
LOGIT = {score: float(np.log(score / (1 - score))) for score in (0.9, 0.8, 0.6, 0.01)}


def detect_by_hand(scores, config, scales=(1.0, 1.0)):
    """Two images, whose scores [2,3,K] are given, with the anchors as boxes; as lists, without empty places."""
    logits = tf.constant([[[LOGIT[score] for score in classes] for classes in image] for image in scores])
    found = detect(logits, tf.zeros([2, 3, 4]), ANCHORS, tf.constant(scales), config)
    for key, filler in (("boxes", 0), ("scores", 0), ("class_ids", PADDING)):
        for b in range(2):
            assert found[key].shape[1] == config.max_detections
            assert (found[key][b, found["count"][b] :].numpy() == filler).all()
    return {
        key: [found[key][b, : found["count"][b]].numpy().tolist() for b in range(2)]
        for key in ("boxes", "scores", "class_ids")
    }


def test_hard_nms_by_hand():
    low = dataclasses.replace(HARD, iou_threshold=0.3, max_detections=5)
    found = detect_by_hand([[[0.9], [0.8], [0.6]], [[0.01], [0.8], [0.01]]], low, scales=(2.0, 0.5))
    assert found["boxes"][0] == [[0, 0, 20, 20], [100, 100, 120, 120]]  # the second is dropped: 1/3 > 0.3
    assert found["boxes"][1] == [[0, 2.5, 5, 7.5]]
    assert found["scores"] == [pytest.approx([0.9, 0.6]), pytest.approx([0.8])]
    assert found["class_ids"] == [[0, 0], [0]]


def test_gaussian_nms_by_hand():
    found = detect_by_hand([[[0.9], [0.8], [0.01]]] * 2, dataclasses.replace(GAUSSIAN, max_detections=5))
    assert found["scores"][0] == pytest.approx([0.9, 0.8 * np.exp(-(1 / 9) / 0.5), 0.01])


def test_decayed_score_below_the_threshold_is_no_detection():
    config = dataclasses.replace(GAUSSIAN, max_detections=5, score_threshold=0.65)  # 0.8 e^(-2/9) = 0.64
    assert detect_by_hand([[[0.9], [0.8], [0.01]]] * 2, config)["scores"][0] == pytest.approx([0.9])


@METHODS
def test_classes_leave_each_other_alone(config):
    config = dataclasses.replace(config, iou_threshold=0.1, max_detections=5, score_threshold=0.05)
    found = detect_by_hand([[[0.9, 0.8], [0.01, 0.6], [0.01, 0.01]], [[0.01, 0.01]] * 3], config)
    assert found["class_ids"][0][:2] == [0, 1]
    assert found["scores"][0][:2] == pytest.approx([0.9, 0.8])  # the same anchor for both
    assert found["scores"][1] == []


def test_best_detections_are_kept_where_there_are_more():
    assert detect_by_hand([[[0.6], [0.8], [0.9]]] * 2, dataclasses.replace(HARD, max_detections=2))["scores"][0] == (
        pytest.approx([0.9, 0.8])
    )


@METHODS
def test_extreme_outputs_give_finite_detections(config):
    logits, deltas = head_outputs()
    config = dataclasses.replace(config, pre_nms_top_k=2000, score_threshold=0.2)
    found = detect(logits * 1e3, deltas * 1e4, golden.arrays()["anchors"], tf.constant([1.0, 1.7]), config)
    assert found["count"].numpy().tolist() == [100, 100]
    assert all(np.isfinite(values).all() for values in found.values())


@pytest.mark.parametrize(("key", "value"), [("method", "soft"), ("score_threshold", -0.1)])
def test_bad_config_names_what_was_found(key, value):
    with pytest.raises(EffdetError, match=f"{key}: expected .*{value}"):
        PostprocessConfig(**{key: value})
