"""The gate: each rule on both sides of its limit."""

import json

import pytest

from pipeline.class_table import Class
from pipeline.gate import (
    Decision,
    Difference,
    Differences,
    Incumbent,
    Judged,
    Served,
    decide,
    must,
    times_of,
    write_times,
)
from pipeline.params import Bootstrap, Promote

CLASSES = [Class(class_id=0, category_id=1, name="cat"), Class(class_id=1, category_id=2, name="dog")]
METRICS = {"AP": 0.4, "APs": 0.2, "APm": 0.4, "APl": None}
PER_CLASS = {"cat": 0.5, "dog": 0.3}
LIMITS = Promote(
    min_ap=0.3,
    refresh=False,
    min_gain=0.01,
    max_loss=0.02,
    max_class_loss=0.1,
    max_size_loss=0.05,
    bootstrap=Bootstrap(confidence=0.95, resamples=100, seed=1),
    max_megabytes=20.0,
    max_latency_ms=100.0,
    max_latency_ratio=1.5,
    formats=("saved_model",),
    licences={"data": None, "initial_weights": None},
)
GOOD = Served(megabytes=10.0, images=8, answered=8, milliseconds=50.0, champion_milliseconds=50.0)
REFRESH = {"refresh": True}


def judged(ap=0.4, **changes):
    fields = {"split": "val", "ground_truth": "sha256:truth", "classes": CLASSES, "per_class": PER_CLASS}
    return Judged(detector="sha256:a", metrics={**METRICS, "AP": ap}, **{**fields, **changes})


def by(difference, low=None):
    return Difference(difference=difference, low=difference if low is None else low, high=difference)


def incumbent(low=0.005, metrics=None, per_class=None):
    """A champion of AP 0.4, and by how much the candidate is above it."""
    metrics = {"AP": Difference(difference=0.0, low=low, high=0.1), "APs": by(0.0), "APm": by(0.0), **(metrics or {})}
    nothing = Difference(difference=None, low=None, high=None)
    per_class = {"cat": by(0.0), "dog": by(0.0), **(per_class or {})}
    differences = Differences(confidence=0.95, metrics={"APl": nothing, **metrics}, per_class=per_class)
    return Incumbent(judged(), differences)


def against(ap, champion=None, served=GOOD, checks=(), **limits):
    return decide(judged(ap), list(checks), champion or incumbent(), served, LIMITS.model_copy(update=limits))


def failed(decision):
    return [(rule.rule, rule.candidate, rule.required) for rule in decision.rules if not rule.passed]


def figures(decision, words):
    (rule,) = (rule for rule in decision.rules if words in rule.rule)
    return rule.candidate, rule.required


@pytest.mark.parametrize(("ap", "outcome"), [(0.3, "accepted"), (0.2999, "rejected"), (0.9, "accepted")])
def test_floor_without_a_champion(ap, outcome):
    decision = decide(judged(ap), [], None, GOOD, LIMITS)
    assert decision.decision == outcome
    assert decision.champion is None
    assert decision.differences is None
    assert figures(decision, "promote.min_ap") == (ap, 0.3)


# 0.4 + 0.01 in binary is above 0.41 by a rounding: it must not decide
@pytest.mark.parametrize(("ap", "outcome"), [(0.41, "accepted"), (0.4099, "rejected"), (0.4, "rejected")])
def test_gain_over_the_champion(ap, outcome):
    decision = against(ap)
    assert decision.decision == outcome
    assert decision.champion == judged()
    assert figures(decision, "promote.min_gain") == (ap, pytest.approx(0.41))
    assert len(failed(decision)) == (outcome == "rejected")


# 0.4 - 0.02 = 0.38
@pytest.mark.parametrize(("ap", "outcome"), [(0.38, "accepted"), (0.3799, "rejected"), (0.5, "accepted")])
def test_loss_in_a_refresh(ap, outcome):
    decision = against(ap, refresh=True)
    assert decision.decision == outcome
    assert figures(decision, "is at least the champion's - promote.max_loss") == (ap, pytest.approx(0.38))


@pytest.mark.parametrize(
    ("refresh", "low", "outcome"),
    [
        (False, 0.0, "accepted"),
        (False, -0.0001, "rejected"),
        (True, -0.02, "accepted"),
        (True, -0.0201, "rejected"),
    ],
)
def test_the_whole_interval_counts(refresh, low, outcome):
    decision = against(0.45, incumbent(low), refresh=refresh)
    assert decision.decision == outcome
    assert figures(decision, "interval of AP's difference") == (low, -0.02 if refresh else 0.0)


# dog has 0.3: 0.1 less is 0.2. cat may fall by as much.
@pytest.mark.parametrize(("fall", "outcome"), [(-0.1, "accepted"), (-0.1001, "rejected")])
def test_no_class_may_fall_by_more(fall, outcome):
    decision = against(0.45, incumbent(per_class={"cat": by(-0.05), "dog": by(fall)}))
    assert decision.decision == outcome
    # the one that fell most
    assert figures(decision, "promote.max_class_loss") == (pytest.approx(0.3 + fall), pytest.approx(0.2))
    assert "AP of dog is" in next(rule.rule for rule in decision.rules if "class_loss" in rule.rule)


def test_every_class_that_fell_is_told():
    decision = against(0.45, incumbent(per_class={"cat": by(-0.2), "dog": by(-0.3)}))
    assert [rule.split(" is ")[0] for rule, *_ in failed(decision)] == ["AP of dog", "AP of cat"]


@pytest.mark.parametrize("size", ["APs", "APm"])
@pytest.mark.parametrize(("fall", "outcome"), [(-0.05, "accepted"), (-0.0501, "rejected")])
def test_no_size_may_fall_by_more(size, fall, outcome):
    decision = against(0.45, incumbent(metrics={size: by(fall)}))
    assert decision.decision == outcome
    theirs = METRICS[size]
    assert figures(decision, "promote.max_size_loss") == (pytest.approx(theirs + fall), pytest.approx(theirs - 0.05))


@pytest.mark.parametrize("champion", [None, incumbent()])
@pytest.mark.parametrize(("megabytes", "outcome"), [(20.0, "accepted"), (20.000001, "rejected")])
def test_size_of_the_saved_model(champion, megabytes, outcome):
    decision = decide(judged(0.45), [], champion, Served(megabytes, 8, 8, 50.0, 50.0), LIMITS)
    assert decision.decision == outcome
    assert figures(decision, "promote.max_megabytes") == (megabytes, 20.0)


# 1.5 x 50 = 75
@pytest.mark.parametrize(("milliseconds", "outcome"), [(75.0, "accepted"), (75.1, "rejected"), (None, "rejected")])
def test_time_against_the_champion(milliseconds, outcome):
    decision = against(0.45, served=Served(10.0, 8, 8, milliseconds, 50.0))
    assert decision.decision == outcome
    assert figures(decision, "promote.max_latency_ratio") == ("see data/timings/promote.json", 1.5)


@pytest.mark.parametrize(("milliseconds", "outcome"), [(100.0, "accepted"), (100.1, "rejected"), (None, "rejected")])
def test_time_without_a_champion(milliseconds, outcome):
    decision = decide(judged(0.45), [], None, Served(10.0, 8, 8, milliseconds, None), LIMITS)
    assert decision.decision == outcome
    assert figures(decision, "promote.max_latency_ms") == ("see data/timings/promote.json", 100.0)


def test_measured_times_are_not_in_the_decision():
    assert against(0.45) == against(0.45, served=Served(10.0, 8, 8, 51.234, 49.876))


def test_measured_times_are_told_of_their_own_decision_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, other = (json.loads(against(ap).model_dump_json()) for ap in (0.45, 0.46))
    assert times_of(made) == ""  # measured elsewhere
    write_times(against(0.45), Served(10.0, 8, 8, 60.0, 50.0), LIMITS)
    words = "SavedModel, as measured for this decision: "
    assert times_of(made) == f"{words}60 ms an image, the champion's 50, ratio 1.2"
    assert times_of(other) == ""
    write_times(against(0.45), Served(10.0, 8, 8, 60.0, None), LIMITS)
    assert times_of(made) == f"{words}60 ms an image"
    write_times(against(0.45), Served(10.0, 8, 0, None, None), LIMITS)
    assert times_of(made) == f"{words}it did not run"


@pytest.mark.parametrize(("answered", "outcome"), [(8, "accepted"), (7, "rejected")])
def test_the_export_answers_every_sample_image(answered, outcome):
    decision = against(0.45, served=Served(10.0, 8, answered, 50.0, 50.0))
    assert decision.decision == outcome
    assert figures(decision, "fresh process") == (f"{answered} of 8 images", "8 of 8 images")


def test_champion_below_the_floor_counts_alone():
    assert against(0.41, min_ap=0.9).decision == "accepted"


def test_a_check_that_fails_is_a_refusal_whatever_the_figures():
    decision = against(0.9, checks=[must("the champion's classes", "a", "a"), must("it loads", "no", "yes")])
    assert decision.decision == "refused"
    assert failed(decision) == [("it loads", "no", "yes")]
    assert [rule.rule for rule in decision.rules] == ["AP was measured", "the champion's classes", "it loads"]


@pytest.mark.parametrize("metrics", [{}, {"AP": None}])
@pytest.mark.parametrize("champion", [None, incumbent()])
def test_missing_metric_is_refused(champion, metrics):
    bare = judged().model_copy(update={"metrics": metrics})
    decision = decide(bare, [], champion, GOOD, LIMITS.model_copy(update={"min_ap": 0.0}))
    assert decision.decision == "refused"
    assert failed(decision) == [("AP was measured", None, "a number")]


def test_decision_survives_json():
    decision = against(0.45)
    assert Decision.model_validate(json.loads(json.dumps(decision.model_dump(mode="json")))) == decision
