"""Ties broken as an export breaks them: what comes out is always a result of NMS, and nothing else passes for a tie."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from effdet.anchors import anchors
from effdet.config import model_config
from effdet.inference import Found
from effdet.postprocess import PostprocessConfig, candidates, detect
from effdet.weights import published_variables
from pipeline.detectors import decode_picture, keras_detection
from pipeline.errors import PipelineError
from pipeline.export_check import EXACT, check_export, match, of_classes
from pipeline.exports import write_export
from pipeline.model_files import read_model
from pipeline.shard_files import spread_images
from pipeline.ties import SAME_SCORE, chosen_like
from tests.pipeline.judged_model import steady, write_shards, write_trained

HARD, GAUSSIAN = (PostprocessConfig(method=method) for method in ("hard", "gaussian"))
BOTH = pytest.mark.parametrize("nms", [HARD, GAUSSIAN], ids=["hard", "gaussian"])
LEFT, RIGHT = [0.0, 0.0, 10.0, 10.0], [0.0, 2.0, 10.0, 12.0]  # IoU 2/3
BELOW = [3.0, 0.0, 13.0, 10.0]  # IoU 7/13 with LEFT, 56/144 with RIGHT
AWAY = [100.0, 100.0, 110.0, 110.0]


def found(*rows):
    boxes, scores, class_ids = zip(*rows, strict=True) if rows else ([], [], [])
    return Found(np.reshape(boxes, (-1, 4)).astype(float), np.array(scores, float), np.array(class_ids, np.int32))


def rows(here):
    return list(zip(here.boxes.tolist(), here.scores.round(6).tolist(), here.class_ids.tolist(), strict=True))


# Random heads ---------------------------------------------------------------------------------------------------------


def heads(seed, spread, deltas=0.3):
    """Raw outputs on a small picture, many boxes over each other. spread: deviation of the logits."""
    config = model_config("efficientdet-lite0", 3, (128, 128))
    rng = np.random.default_rng(seed)
    boxes = anchors(config)
    return boxes, rng.normal(0, spread, (1, len(boxes), 3)), rng.normal(0, deltas, (1, len(boxes), 4))


def detected(boxes, logits, deltas, nms):
    outputs = detect(tf.constant(logits, tf.float32), tf.constant(deltas, tf.float32), boxes, tf.ones([1]), nms)
    arrays = {name: tensor.numpy()[0] for name, tensor in outputs.items()}
    return Found(*(arrays[name][: arrays["count"]] for name in ("boxes", "scores", "class_ids")))


def offered(boxes, logits, deltas, nms):
    arrays = candidates(tf.constant(logits, tf.float32), tf.constant(deltas, tf.float32), boxes, nms)
    return Found(*(array.numpy()[0] for array in arrays))


def same(ours, theirs):
    return match(ours, theirs, EXACT).found.all() and match(theirs, ours, EXACT).found.all()


@BOTH
@pytest.mark.parametrize("top_k", [5000, None])
@pytest.mark.parametrize("max_detections", [20, 2000])  # the second: until nothing is left
def test_own_choice_is_that_of_nms(nms, top_k, max_detections):
    """Whether it is shown its own result, or another's of whom it can take nothing."""
    options = {"pre_nms_top_k": top_k, "max_detections": max_detections, "score_threshold": 0.5}
    nms = PostprocessConfig(nms.method, **options)
    raw = heads(1, spread=1.0)
    own = detected(*raw, nms)
    assert (len(own.scores) == max_detections) == (max_detections == 20)
    for shown in (own, found(), found((AWAY, 0.9, 7))):
        chosen = chosen_like(shown, offered(*raw, nms), nms)
        assert chosen.class_ids.tolist() == own.class_ids.tolist()
        np.testing.assert_allclose(chosen.boxes, own.boxes, atol=1e-4)
        np.testing.assert_allclose(chosen.scores, own.scores, atol=1e-6)


@BOTH
def test_rounding_that_changes_the_result_is_a_tie(nms):
    """Logits as near to each other as a hardly trained model's, rounded otherwise."""
    nms = dataclasses.replace(nms, pre_nms_top_k=20_000)  # all: which are the last of the best is another tie
    rng = np.random.default_rng(0)
    changed = 0
    for seed in range(20):
        boxes, logits, deltas = heads(seed, spread=0.0005)
        rounded = [array + rng.uniform(-3e-6, 3e-6, array.shape) for array in (logits, deltas)]
        theirs = detected(boxes, *rounded, nms)
        changed += not same(detected(boxes, logits, deltas, nms), theirs)
        assert same(chosen_like(theirs, offered(boxes, logits, deltas, nms), nms), theirs), seed
    assert changed >= 5  # else nothing was tried


@BOTH
def test_more_than_rounding_is_no_tie(nms):
    """The same with logits that are off by as much as int8 makes of them."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        boxes, logits, deltas = heads(seed, spread=0.001)
        theirs = detected(boxes, logits + rng.normal(0, 0.01, logits.shape), deltas, nms)
        assert not same(chosen_like(theirs, offered(boxes, logits, deltas, nms), nms), theirs), seed


@BOTH
@pytest.mark.parametrize("fault", ["lost", "moved", "other class", "twice", "made up"])
def test_faults_are_not_followed(nms, fault):
    raw = heads(1, spread=1.0)
    own = detected(*raw, nms)
    assert len(own.scores) == 100
    kept = np.delete(np.arange(100), 3) if fault == "lost" else np.arange(100)
    boxes, scores, class_ids = own.boxes[kept], own.scores[kept], own.class_ids[kept]
    if fault == "moved":
        boxes[3] += 1.0
    elif fault == "other class":
        class_ids[3] = (class_ids[3] + 1) % 3
    elif fault == "twice":
        boxes[3], class_ids[3], scores[3] = boxes[2], class_ids[2], scores[2]
    elif fault == "made up":
        boxes[3], scores[3] = AWAY, 0.99
    theirs = Found(boxes, scores, class_ids)
    assert not same(chosen_like(theirs, offered(*raw, nms), nms), theirs)


def hardly_trained(arrays):
    """Weights with which all anchors of a picture score nearly the same."""
    arrays = steady(arrays)
    arrays["class_net/class-predict/pointwise_kernel"] *= 1e-5
    return arrays


@pytest.mark.slow
@BOTH
def test_export_of_a_hardly_trained_model(tmp_path, nms):
    """A real runtime's ties are told from an export of other weights."""
    write_trained(tmp_path / "model", change=hardly_trained)
    write_shards(tmp_path / "shards", {"val": 7})
    images = spread_images([tmp_path / "shards" / "val-00000-of-00001.tfrecord"], 7)
    stored = read_model(tmp_path / "model")
    in_use = [row.class_id for row in stored.classes]
    write_export(tmp_path / "m.tflite", "litert_float32", stored, nms)

    def compared():
        detect = keras_detection(stored, nms, 8)
        pictures = [decode_picture(content, "a test", False) for content in images.values()]
        judged = {key: of_classes(here, in_use) for key, here in zip(images, detect(pictures), strict=True)}
        return check_export(tmp_path / "m.tflite", EXACT, images, judged, stored, nms)

    assert compared().ties >= 2
    for name, change in (("box_net/box-predict/bias", 0.05), ("class_net/class-predict/bias", 0.01)):
        variable = published_variables(stored.model)[name]
        variable.assign_add(np.full(variable.shape, change))
        with pytest.raises(PipelineError, match=r"m\.tflite: .* on 7 of 7 images"):
            compared()
        variable.assign_sub(np.full(variable.shape, change))


# By hand --------------------------------------------------------------------------------------------------------------


def test_the_other_box_of_a_tie_stays_and_the_rest_follows():
    choices = found((LEFT, 0.8 + 1e-7, 1), (RIGHT, 0.8, 1), (BELOW, 0.5, 1), (AWAY, 0.3, 2))
    one = HARD
    assert rows(chosen_like(found((LEFT, 0.8, 1)), choices, one)) == [(LEFT, 0.8, 1), (AWAY, 0.3, 2)]
    assert rows(chosen_like(found((RIGHT, 0.8, 1)), choices, one)) == [(RIGHT, 0.8, 1), (BELOW, 0.5, 1), (AWAY, 0.3, 2)]


@pytest.mark.parametrize(("gap", "taken"), [(0.9 * SAME_SCORE, RIGHT), (1.1 * SAME_SCORE, LEFT)])
@BOTH
def test_scores_are_equal_within_rounding(nms, gap, taken):
    choices = found((LEFT, 0.5, 1), (RIGHT, 0.5 - gap, 1))
    assert chosen_like(found((RIGHT, 0.5, 1)), choices, nms).boxes[0].tolist() == taken


def test_tie_of_scores_that_were_lowered():
    """Gaussian: LEFT takes 2/3 and 7/13 of overlap from the others' scores, and they are equal after it."""
    lowered = [np.exp(-(overlap**2) / 0.5) for overlap in (2 / 3, 7 / 13)]
    choices = found((LEFT, 0.9, 1), (RIGHT, 0.1 / lowered[0], 1), (BELOW, 0.1 / lowered[1] - 1e-6, 1))
    others = {}
    for first, other in ((RIGHT, BELOW), (BELOW, RIGHT)):
        chosen = chosen_like(found((LEFT, 0.9, 1), (first, 0.1, 1), (other, 0.05, 1)), choices, GAUSSIAN)
        assert chosen.boxes.tolist() == [LEFT, first, other]
        others[str(other)] = chosen.scores[2]
    overlap = 56 / 144
    assert others == pytest.approx({str(box): 0.1 * np.exp(-(overlap**2) / 0.5) for box in (RIGHT, BELOW)}, abs=1e-5)


@pytest.mark.parametrize(("limit", "stays"), [(2 / 3, True), (2 / 3 - 5e-5, True), (2 / 3 - 2e-4, False)])
def test_overlap_at_the_limit_may_stay(limit, stays):
    nms = PostprocessConfig("hard", iou_threshold=limit)
    choices = found((LEFT, 0.9, 1), (RIGHT, 0.8, 1))
    both = chosen_like(choices, choices, nms)
    assert (both.boxes.tolist() == [LEFT, RIGHT]) == stays


@pytest.mark.parametrize(("limit", "goes"), [(2 / 3, True), (2 / 3 + 5e-5, True), (2 / 3 + 2e-4, False)])
def test_overlap_at_the_limit_may_go(limit, goes):
    nms = PostprocessConfig("hard", iou_threshold=limit)
    choices = found((LEFT, 0.9, 1), (RIGHT, 0.8, 1), (AWAY, 0.7, 1))
    chosen = chosen_like(found((LEFT, 0.9, 1), (AWAY, 0.7, 1)), choices, nms)
    assert (chosen.boxes.tolist() == [LEFT, AWAY]) == goes


@BOTH
def test_score_at_the_threshold_may_stay_or_go(nms):
    choices = found((LEFT, 0.9, 1), (AWAY, 0.001 + 1e-6, 2))
    assert len(chosen_like(found((LEFT, 0.9, 1)), choices, nms).scores) == 1
    assert len(chosen_like(choices, choices, nms).scores) == 2
    below = found((LEFT, 0.9, 1), (AWAY, 0.001 - 1e-6, 2))
    assert len(chosen_like(below, below, nms).scores) == 2
    assert len(chosen_like(found((LEFT, 0.9, 1)), below, nms).scores) == 1


@BOTH
def test_nothing_scores_enough(nms):
    assert rows(chosen_like(found(), found((LEFT, 0.0005, 1)), nms)) == []
    assert rows(chosen_like(found((LEFT, 0.9, 1)), found(), nms)) == []


@BOTH
def test_threshold_of_zero_takes_no_box_twice(nms):
    everything = PostprocessConfig(nms.method, score_threshold=0.0)
    choices = found((LEFT, 0.9, 1), (AWAY, 0.8, 1))
    again = found((LEFT, 0.9, 1), (AWAY, 0.8, 1), (LEFT, 0.0, 1), (LEFT, 0.0, 1))
    assert rows(chosen_like(again, choices, everything)) == rows(choices)
