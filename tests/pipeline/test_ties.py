"""Ties broken as an export breaks them: what comes out is always a result of NMS, and nothing else passes for a tie."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from effdet.anchors import anchors
from effdet.config import model_config
from effdet.inference import Found
from effdet.postprocess import PostprocessConfig, detect
from effdet.weights import published_variables
from pipeline.detectors import decode_picture, keras_detection
from pipeline.errors import PipelineError
from pipeline.export_check import EXACT, check_export, match, of_classes
from pipeline.exports import write_export
from pipeline.model_files import read_model
from pipeline.shard_files import spread_images
from pipeline.ties import LOGIT_ROUNDING, SCORE_ROUNDING, Candidates, candidates, chosen_like
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


def heads(seed, spread, mean=0.0, deltas=0.3):
    """Raw outputs on a small picture, many boxes over each other. mean, spread: of the logits."""
    config = model_config("efficientdet-lite0", 3, (128, 128))
    rng = np.random.default_rng(seed)
    boxes = anchors(config)
    return boxes, rng.normal(mean, spread, (1, len(boxes), 3)), rng.normal(0, deltas, (1, len(boxes), 4))


def detected(boxes, logits, deltas, nms):
    outputs = detect(tf.constant(logits, tf.float32), tf.constant(deltas, tf.float32), boxes, tf.ones([1]), nms)
    arrays = {name: tensor.numpy()[0] for name, tensor in outputs.items()}
    return Found(*(arrays[name][: arrays["count"]] for name in ("boxes", "scores", "class_ids")))


def offered(boxes, logits, deltas, nms):
    return candidates(logits[0].astype(np.float32), deltas[0].astype(np.float32), boxes, 1.0, nms.pre_nms_top_k)


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
@pytest.mark.parametrize("top_k", [5000, None])
@pytest.mark.parametrize(
    ("mean", "spread", "rounding", "in_use"),
    [(0.0, 5e-4, 3e-6, [0, 1, 2]), (-1.0, 5e-5, 1e-5, [0, 2])],  # all compared; the ten best, and a class not in use
    ids=["high", "low"],
)
def test_rounding_that_changes_the_result_is_a_tie(nms, top_k, mean, spread, rounding, in_use):
    """Logits as near to each other as a hardly trained model's, rounded otherwise."""
    nms = dataclasses.replace(nms, pre_nms_top_k=top_k)
    rng = np.random.default_rng(0)
    changed = 0
    for seed in range(20):
        boxes, logits, deltas = heads(seed, spread, mean)
        rounded = [array + rng.uniform(-rounding, rounding, array.shape) for array in (logits, deltas)]
        ours, theirs = (of_classes(detected(boxes, *outputs, nms), in_use) for outputs in ((logits, deltas), rounded))
        changed += not same(ours, theirs)
        for shown in (ours, theirs):
            like = of_classes(chosen_like(shown, offered(boxes, logits, deltas, nms), nms), in_use)
            assert same(like, shown), seed
    assert changed  # else nothing was tried


@BOTH
def test_more_than_rounding_is_no_tie(nms):
    """The same with logits that are off by as much as int8 makes of them."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        boxes, logits, deltas = heads(seed, spread=0.001)
        theirs = detected(boxes, logits + rng.normal(0, 0.01, logits.shape), deltas, nms)
        assert not same(chosen_like(theirs, offered(boxes, logits, deltas, nms), nms), theirs), seed


@BOTH
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (-4.6, 0.01)], ids=["wide", "low"])
@pytest.mark.parametrize("fault", ["lost", "moved", "other class", "twice", "made up"])
def test_faults_are_not_followed(nms, fault, mean, spread):
    raw = heads(1, spread, mean)
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


def class_blind(boxes, logits, deltas, nms):
    """TensorFlow's own NMS, to which boxes of other classes are rivals."""
    some = offered(boxes, logits, deltas, nms)
    chosen, scores = tf.image.non_max_suppression_with_scores(
        some.boxes,
        tf.constant((some.lowest + some.highest) / 2, tf.float32),
        nms.max_detections,
        iou_threshold=nms.iou_threshold if nms.method == "hard" else 1.0,
        score_threshold=nms.score_threshold,
        soft_nms_sigma=nms.sigma / 2 if nms.method == "gaussian" else 0.0,  # it writes exp(-IoU**2 / (2 * sigma))
    )
    return Found(some.boxes[chosen.numpy()], scores.numpy(), some.class_ids[chosen.numpy()])


def test_the_other_nms_is_one():
    """With one class it is the model's."""
    for nms in (HARD, GAUSSIAN):
        boxes, logits, deltas = heads(1, spread=1.0)
        one = boxes, logits[..., :1], deltas
        assert same(detected(*one, nms), class_blind(*one, nms))


@pytest.mark.parametrize(
    ("nms", "other"),
    [
        (HARD, {"iou_threshold": 0.3}),
        (HARD, {"iou_threshold": 0.45}),
        (HARD, {"method": "gaussian"}),
        (HARD, {"pre_nms_top_k": 60}),
        (HARD, "class-blind"),
        (GAUSSIAN, {"sigma": 0.4}),
        (GAUSSIAN, {"method": "hard"}),
        (GAUSSIAN, {"pre_nms_top_k": 60}),
        (GAUSSIAN, "class-blind"),
    ],
)
def test_another_nms_is_no_tie(nms, other):
    """Whether scores lie apart, near each other, near 0 or near 1."""
    found_else = 0
    for mean, spread in ((0.0, 1.0), (0.0, 0.01), (-4.6, 0.01), (5.0, 1.0)):
        for seed in range(4):
            raw = heads(seed, spread, mean)
            blind = other == "class-blind"
            theirs = class_blind(*raw, nms) if blind else detected(*raw, dataclasses.replace(nms, **other))
            if not same(detected(*raw, nms), theirs):
                found_else += 1
                assert not same(chosen_like(theirs, offered(*raw, nms), nms), theirs), (mean, seed)
    assert found_else >= 12


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


def choices(*rows, certain=True):
    """Candidates with these scores, which rounding of the logits may move."""
    boxes, scores, class_ids = (np.array(column) for column in zip(*rows, strict=True))
    reach = scores * (1 - scores) * LOGIT_ROUNDING + SCORE_ROUNDING
    return Candidates(boxes, class_ids, scores - reach, scores + reach, np.full(len(scores), certain))


def test_the_other_box_of_a_tie_stays_and_the_rest_follows():
    some = choices((LEFT, 0.8 + 1e-7, 1), (RIGHT, 0.8, 1), (BELOW, 0.5, 1), (AWAY, 0.3, 2))
    assert rows(chosen_like(found((LEFT, 0.8, 1)), some, HARD)) == [(LEFT, 0.8, 1), (AWAY, 0.3, 2)]
    assert rows(chosen_like(found((RIGHT, 0.8, 1)), some, HARD)) == [(RIGHT, 0.8, 1), (BELOW, 0.5, 1), (AWAY, 0.3, 2)]


@BOTH
@pytest.mark.parametrize("score", [0.002, 0.01, 0.3, 0.5, 0.9, 0.9999])
def test_scores_are_equal_within_rounding_of_both(nms, score):
    reach = 2 * (score * (1 - score) * LOGIT_ROUNDING + SCORE_ROUNDING)
    for gap, taken in ((0.9 * reach, RIGHT), (1.1 * reach, LEFT)):
        some = choices((LEFT, score, 1), (RIGHT, score - gap, 1))
        assert chosen_like(found((RIGHT, score, 1)), some, nms).boxes[0].tolist() == taken


def test_rounding_is_that_of_logits():
    logits = np.array([[-9.0, -6.0, 0.0, 3.0, 14.0]], np.float32)
    made = candidates(logits, np.zeros((1, 4), np.float32), np.array([AWAY], np.float32), 2.0, 5000)
    assert made.class_ids.tolist() == [0, 1, 2, 3, 4]
    assert made.boxes.tolist() == [[200.0, 200.0, 220.0, 220.0]] * 5
    assert made.certain.all()
    scores = 1 / (1 + np.exp(-logits[0].astype(float)))
    reach = scores * (1 - scores) * LOGIT_ROUNDING + SCORE_ROUNDING
    np.testing.assert_allclose(made.highest - scores, reach, rtol=1e-4)
    np.testing.assert_allclose(scores - made.lowest, reach, rtol=1e-4)


@pytest.mark.parametrize(
    ("top_k", "logits", "taken", "certain"),
    [
        (2, [[3.0, 2.0], [1.0, 0.0]], [(0, 0), (0, 1)], [True, True]),
        (2, [[3.0, 2.0], [2.00004, 0.0]], [(0, 0), (0, 1), (1, 0)], [True, False, False]),
        (2, [[3.0, 2.0], [2.0001, 0.0]], [(0, 0), (1, 0)], [True, True]),
        (9, [[3.0, 3.0], [3.0, 3.0]], [(0, 0), (0, 1), (1, 0), (1, 1)], [True] * 4),
        (None, [[3.0, 2.0], [1.0, 1.5]], [(0, 0), (1, 1)], [True, True]),
        (None, [[3.0, 2.0], [1.5, 1.50004]], [(0, 0), (1, 0), (1, 1)], [True, False, False]),
    ],
)
def test_which_are_candidates(top_k, logits, taken, certain):
    places = np.array([LEFT, AWAY], np.float32)
    made = candidates(np.array(logits, np.float32), np.zeros((2, 4), np.float32), places, 1.0, top_k)
    anchor_ids = [[LEFT, AWAY].index(box) for box in made.boxes.tolist()]
    assert list(zip(anchor_ids, made.class_ids.tolist(), strict=True)) == taken
    assert made.certain.tolist() == certain


def test_a_candidate_that_is_not_certain_may_be_missing():
    some = choices((LEFT, 0.9, 1), (AWAY, 0.8, 1), certain=False)
    assert rows(chosen_like(found((AWAY, 0.8, 1)), some, HARD)) == [(AWAY, 0.8, 1)]
    assert rows(chosen_like(found(), some, HARD)) == []


def test_tie_of_scores_that_were_lowered():
    """Gaussian: LEFT takes 2/3 and 7/13 of overlap from the others' scores, and they are equal after it."""
    lowered = [np.exp(-(shared**2) / 0.5) for shared in (2 / 3, 7 / 13)]
    some = choices((LEFT, 0.9, 1), (RIGHT, 0.1 / lowered[0], 1), (BELOW, 0.1 / lowered[1] - 1e-6, 1))
    others = {}
    for first, other in ((RIGHT, BELOW), (BELOW, RIGHT)):
        chosen = chosen_like(found((LEFT, 0.9, 1), (first, 0.1, 1), (other, 0.05, 1)), some, GAUSSIAN)
        assert chosen.boxes.tolist() == [LEFT, first, other]
        others[str(other)] = chosen.scores[2]
    shared = 56 / 144
    assert others == pytest.approx({str(box): 0.1 * np.exp(-(shared**2) / 0.5) for box in (RIGHT, BELOW)}, abs=1e-5)


@pytest.mark.parametrize(("limit", "stays"), [(2 / 3, True), (2 / 3 - 1e-5, True), (2 / 3 - 3e-5, False)])
def test_overlap_at_the_limit_may_stay(limit, stays):
    nms = PostprocessConfig("hard", iou_threshold=limit)
    shown = found((LEFT, 0.9, 1), (RIGHT, 0.8, 1))
    both = chosen_like(shown, choices((LEFT, 0.9, 1), (RIGHT, 0.8, 1)), nms)
    assert (both.boxes.tolist() == [LEFT, RIGHT]) == stays


@pytest.mark.parametrize(("limit", "goes"), [(2 / 3, True), (2 / 3 + 1e-5, True), (2 / 3 + 3e-5, False)])
def test_overlap_at_the_limit_may_go(limit, goes):
    nms = PostprocessConfig("hard", iou_threshold=limit)
    some = choices((LEFT, 0.9, 1), (RIGHT, 0.8, 1), (AWAY, 0.7, 1))
    chosen = chosen_like(found((LEFT, 0.9, 1), (AWAY, 0.7, 1)), some, nms)
    assert (chosen.boxes.tolist() == [LEFT, AWAY]) == goes


@BOTH
def test_score_at_the_threshold_may_stay_or_go(nms):
    for score in (0.001 + 1e-7, 0.001 - 1e-7):
        some = choices((LEFT, 0.9, 1), (AWAY, score, 2))
        assert len(chosen_like(found((LEFT, 0.9, 1)), some, nms).scores) == 1
        assert len(chosen_like(found((LEFT, 0.9, 1), (AWAY, 0.001, 2)), some, nms).scores) == 2


@BOTH
def test_a_tie_does_not_take_a_box_away(nms):
    """Boxes that do not overlap are both there, the better one first."""
    apart = [[0.0, 20.0 * place, 10.0, 20.0 * place + 10] for place in range(4)]
    some = choices(*((box, 0.4 - place * 1e-7, 1) for place, box in enumerate(apart)))
    shown = found(*((box, 0.4, 1) for box in (apart[0], apart[3], apart[2])))  # apart[1] is lost
    assert chosen_like(shown, some, nms).boxes.tolist() == apart


@BOTH
def test_classes_that_are_not_shown_take_their_places(nms):
    two = dataclasses.replace(nms, max_detections=2)
    some = choices((LEFT, 0.9, 1), (AWAY, 0.8, 0), (BELOW, 0.7, 2))
    assert rows(chosen_like(found((LEFT, 0.9, 1)), some, two)) == [(LEFT, 0.9, 1), (AWAY, 0.8, 0)]
    assert rows(chosen_like(found((BELOW, 0.7, 2)), some, nms)) == [(LEFT, 0.9, 1), (AWAY, 0.8, 0), (BELOW, 0.7, 2)]


@BOTH
def test_nothing_scores_enough(nms):
    assert rows(chosen_like(found(), choices((LEFT, 0.0005, 1)), nms)) == []
    assert rows(chosen_like(found((LEFT, 0.0005, 1)), choices((LEFT, 0.0005, 1)), nms)) == []
    nan = np.full((1, 1), np.nan, np.float32)
    nothing = candidates(nan, np.zeros((1, 4), np.float32), np.array([AWAY], np.float32), 1.0, 5000)
    assert rows(chosen_like(found((AWAY, 0.9, 0)), nothing, nms)) == []


@BOTH
def test_threshold_of_zero_takes_no_box_twice(nms):
    everything = dataclasses.replace(nms, score_threshold=0.0)
    shown = [(LEFT, 0.9, 1), (AWAY, 0.8, 1)]
    again = found(*shown, (LEFT, 0.0, 1), (LEFT, 0.9, 1))
    assert rows(chosen_like(again, choices(*shown), everything)) == shown
