"""The gate: each rule on both sides of its limit."""

import json

import pytest

from pipeline.class_table import Class
from pipeline.errors import PipelineError
from pipeline.gate import Decision, Judged, decide, is_champion, read_champion
from pipeline.params import Promote

CLASSES = [Class(class_id=0, category_id=1, name="cat"), Class(class_id=1, category_id=2, name="dog")]
FIELDS = {"version": "v0.1.0", "revision": "0" * 40, "detections": "sha256:d", "ground_truth": "sha256:truth"}


def limits(min_ap, min_gain):
    licences = {"data": None, "initial_weights": None}
    return Promote(min_ap=min_ap, min_gain=min_gain, formats=("saved_model",), licences=licences)


LIMITS = limits(min_ap=0.3, min_gain=0.01)


def judged(ap=0.4, detector="sha256:a", **changes):
    fields = {"split": "val", "ground_truth": "sha256:truth", "classes": CLASSES, "metrics": {"AP": ap}}
    return Judged(detector=detector, **{**fields, **changes})


@pytest.fixture
def champion():
    return decide(judged(0.4), None, LIMITS)


def champion_file(made, /, **changes):
    """champion.json's text, with other words in its decision."""
    return json.dumps({**FIELDS, "decision": {**made.model_dump(mode="json"), **changes}})


def failed(decision):
    return [rule.rule for rule in decision.rules if not rule.passed]


@pytest.mark.parametrize(("ap", "outcome"), [(0.3, "accepted"), (0.2999, "rejected"), (0.9, "accepted")])
def test_floor_without_a_champion(ap, outcome):
    decision = decide(judged(ap), None, LIMITS)
    assert decision.decision == outcome
    assert decision.champion is None
    assert [(rule.candidate, rule.required) for rule in decision.rules] == [(ap, "a number"), (ap, 0.3)]


# 0.4 + 0.01 in binary is above 0.41 by a rounding: it must not decide
@pytest.mark.parametrize(("ap", "outcome"), [(0.41, "accepted"), (0.4099, "rejected"), (0.4, "rejected")])
def test_gain_over_the_champion(champion, ap, outcome):
    decision = decide(judged(ap, "sha256:b"), champion, LIMITS)
    assert decision.decision == outcome
    assert decision.champion == champion.candidate
    assert decision.rules[-1].candidate == ap
    assert decision.rules[-1].required == pytest.approx(0.41)
    assert all(rule.passed for rule in decision.rules[:-1])


def test_champion_below_the_floor_counts_alone():
    low = decide(judged(0.1), None, limits(min_ap=0.0, min_gain=0.0))
    assert decide(judged(0.2, "sha256:b"), low, LIMITS).decision == "accepted"


def test_other_ground_truth_is_refused(champion):
    decision = decide(judged(0.9, "sha256:b", ground_truth="sha256:other"), champion, LIMITS)
    assert decision.decision == "refused"
    assert failed(decision) == ["judged on the champion's ground truth"]


def test_other_split_is_refused(champion):
    decision = decide(judged(0.9, "sha256:b", split="test"), champion, LIMITS)
    assert decision.decision == "refused"
    assert failed(decision) == ["judged on the champion's split"]


def test_other_classes_are_refused_and_named(champion):
    renamed = [CLASSES[0], Class(class_id=1, category_id=2, name="wolf")]
    decision = decide(judged(0.9, "sha256:b", classes=renamed), champion, LIMITS)
    assert decision.decision == "refused"
    (rule,) = (rule for rule in decision.rules if not rule.passed)
    assert (rule.candidate, rule.required) == ("class 1 is 'wolf' (category 2)", "class 1 is 'dog' (category 2)")


@pytest.mark.parametrize("metrics", [{}, {"AP": None}])
def test_missing_metric_is_refused(champion, metrics):
    assert decide(judged(metrics=metrics), None, limits(min_ap=0.0, min_gain=0.0)).decision == "refused"
    bare = champion.model_copy(update={"candidate": judged(metrics=metrics)})
    decision = decide(judged(0.9, "sha256:b"), bare, LIMITS)
    assert decision.decision == "refused"
    assert failed(decision) == ["the champion's AP was measured"]


def test_champion_itself_keeps_its_decision(champion):
    again = judged(0.4)
    assert is_champion(again, champion)
    # neither higher limits nor min_gain, which no model reaches over itself, touch it
    assert decide(again, champion, limits(min_ap=0.99, min_gain=0.5)) == champion


def test_champions_model_on_other_ground_truth_is_refused(champion):
    elsewhere = judged(0.4, ground_truth="sha256:other")
    assert not is_champion(elsewhere, champion)
    assert decide(elsewhere, champion, LIMITS).decision == "refused"


def test_champion_file(tmp_path, champion):
    path = tmp_path / "champion.json"
    path.write_text("{}\n")
    assert read_champion(path) is None
    path.write_text(champion_file(champion))
    assert read_champion(path) == champion


def test_rejected_candidate_is_no_champion(tmp_path):
    path = tmp_path / "champion.json"
    path.write_text(champion_file(decide(judged(0.1), None, LIMITS)))
    with pytest.raises(PipelineError, match=r"champion\.json: holds a candidate that was rejected"):
        read_champion(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decision": "perhaps"}, "decision.decision: .*'perhaps'"),
        ({"extra": 1}, "decision.extra: "),
        ({"candidate": {"detector": "sha256:a"}}, "decision.candidate.split: Field required"),
    ],
)
def test_champion_file_that_cannot_be_read(tmp_path, champion, change, words):
    path = tmp_path / "champion.json"
    path.write_text(champion_file(champion, **change))
    with pytest.raises(PipelineError, match=words):
        read_champion(path)


def test_champion_file_without_a_version(tmp_path, champion):
    path = tmp_path / "champion.json"
    path.write_text(champion.model_dump_json())  # a decision alone
    with pytest.raises(PipelineError, match=r"version: Field required.* promote` writes it"):
        read_champion(path)


def test_champion_file_that_is_no_json(tmp_path):
    path = tmp_path / "champion.json"
    path.write_text("{")
    with pytest.raises(PipelineError, match="champion is not JSON"):
        read_champion(path)


def test_decision_survives_json(champion):
    assert Decision.model_validate(json.loads(json.dumps(champion.model_dump(mode="json")))) == champion
