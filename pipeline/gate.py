"""The gate: may a candidate take the champion's place? A decision with every rule and its two figures.

A decision is "accepted", "rejected" (a figure was missed) or "refused" (the two cannot be compared: other classes, a
champion that does not load, a figure that is missing). Only the first is a pass. What both are judged on is the
candidate's ground truth; pipeline.champion sees to it.

AP must rise by promote.min_gain, and the whole interval of the difference must lie at 0 or above: at a confidence of
0.95, a model that is no better passes by chance once in forty. With promote.refresh, AP may fall by promote.max_loss,
and the whole interval must lie at or above that: the candidate is shown to be no worse by more, where a test of
equality would pass whatever was judged on few images. Classes and sizes, of which there are many, are held by their
figures alone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.class_table import Class
from pipeline.files import read_json, write_json
from pipeline.params import Promote
from pipeline.settings import Section

DIGITS = 9  # to which differences of AP are rounded: in binary, 0.41 - 0.40 falls short of 0.01
SIZES = ("APs", "APm", "APl")
TIMES = "data/timings/promote.json"  # where measured times stand: in the release, they would differ in every run
OUTCOME = {True: "pass", False: "FAIL"}

Figure = float | str | None


class Judged(Section):
    """A model as it was judged: what a comparison needs to know of it."""

    detector: str  # sha256 of all that makes one: weights, configuration, classes, post-processing
    split: str  # on which it was judged
    ground_truth: str  # its sha256
    classes: list[Class]
    metrics: dict[str, float | None]  # COCO's twelve; null where there was nothing to measure
    per_class: dict[str, float | None]  # AP by pipeline.class_table.labels


class Difference(Section):
    """By how much the candidate's figure is above the champion's. None where there was nothing to measure."""

    difference: float | None
    low: float | None  # of the interval, at promote.bootstrap.confidence
    high: float | None


class Differences(Section):
    """The same of each figure."""

    confidence: float  # of the intervals
    metrics: dict[str, Difference]
    per_class: dict[str, Difference]


class Rule(Section):
    """One rule and how it came out."""

    rule: str
    candidate: Figure
    required: Figure  # what it is held against
    passed: bool

    def words(self) -> tuple[str, str, str]:
        """Both figures and the outcome, for a person."""
        figures = (self.candidate, self.required)
        candidate, required = (f"{figure:.6g}" if isinstance(figure, float) else str(figure) for figure in figures)
        return candidate, required, OUTCOME[self.passed]


class Decision(Section):
    """All that the gate says."""

    decision: Literal["accepted", "rejected", "refused"]
    candidate: Judged
    champion: Judged | None  # on the candidate's ground truth; None where there is none, or it could not be judged
    differences: Differences | None  # likewise
    rules: list[Rule]


@dataclasses.dataclass(frozen=True)
class Incumbent:
    """The champion on the candidate's ground truth."""

    judged: Judged
    differences: Differences


@dataclasses.dataclass(frozen=True)
class Served:
    """What was measured on the exported model, a SavedModel."""

    megabytes: float
    images: int  # sample images that it was given in a fresh process
    answered: int  # on which it detected
    milliseconds: float | None  # an image; None: it did not run
    champion_milliseconds: float | None  # the champion's, in turn; None: it did not run, or there is none


def must(rule: str, candidate: Figure, required: Figure) -> Rule:
    """The rule that both are the same."""
    return Rule(rule=rule, candidate=candidate, required=required, passed=candidate == required)


def at_least(rule: str, candidate: float, required: float) -> Rule:
    return Rule(rule=rule, candidate=candidate, required=required, passed=round(candidate - required, DIGITS) >= 0)


def at_most(rule: str, candidate: float, required: float) -> Rule:
    return Rule(rule=rule, candidate=candidate, required=required, passed=round(candidate - required, DIGITS) <= 0)


def decide(
    candidate: Judged, checks: list[Rule], incumbent: Incumbent | None, served: Served, limits: Promote
) -> Decision:
    """The decision on a candidate that is not the champion.

    checks: what must hold before figures are compared, beside the candidate's AP; where one does not, the decision is
    "refused". incumbent None: there is no champion, or a check failed.
    """
    ap = candidate.metrics.get("AP")
    checks = [Rule(rule="AP was measured", candidate=ap, required="a number", passed=ap is not None), *checks]
    against, differences = (incumbent.judged, incumbent.differences) if incumbent else (None, None)
    made: Literal["accepted", "rejected", "refused"] = "refused"
    rules = checks
    if ap is not None and all(rule.passed for rule in checks):
        rules = [*checks, *(_against_champion(ap, incumbent, limits) if incumbent else [_floor(ap, limits)])]
        rules += _of_served(served, incumbent is not None, limits)
        made = "accepted" if all(rule.passed for rule in rules) else "rejected"
    return Decision(decision=made, candidate=candidate, champion=against, differences=differences, rules=rules)


def _floor(ap: float, limits: Promote) -> Rule:
    return at_least("AP is at least promote.min_ap (no champion)", ap, limits.min_ap)


def _against_champion(ap: float, incumbent: Incumbent, limits: Promote) -> list[Rule]:
    champion, differences = incumbent.judged, incumbent.differences
    theirs, low = champion.metrics["AP"], differences.metrics["AP"].low
    if theirs is None or low is None:
        return [Rule(rule="the champion's AP was measured", candidate=None, required="a number", passed=False)]
    share = f"{limits.bootstrap.confidence:.4g}"
    if limits.refresh:
        rules = [
            at_least(
                "AP is at least the champion's - promote.max_loss (promote.refresh)", ap, theirs - limits.max_loss
            ),
            at_least(
                f"the low end of the {share} interval of AP's difference is at least -promote.max_loss",
                low,
                -limits.max_loss,
            ),
        ]
    else:
        rules = [
            at_least("AP is at least the champion's + promote.min_gain", ap, theirs + limits.min_gain),
            at_least(f"the low end of the {share} interval of AP's difference is at least 0", low, 0.0),
        ]
    sizes = {name: differences.metrics[name] for name in SIZES}
    return [
        *rules,
        *_falls(sizes, champion.metrics, "{} is at least the champion's - promote.max_size_loss", limits.max_size_loss),
        *_falls(
            differences.per_class,
            champion.per_class,
            "AP of {} is at least the champion's - promote.max_class_loss",
            limits.max_class_loss,
        ),
    ]


def _falls(
    differences: Mapping[str, Difference], champion: Mapping[str, float | None], rule: str, limit: float
) -> list[Rule]:
    """A rule for each figure that fell by more than the limit, or for that which fell most."""
    known = sorted((one.difference, name) for name, one in differences.items() if one.difference is not None)
    rules = []
    for difference, name in known:
        theirs = champion[name]
        if theirs is not None:
            rules.append(at_least(rule.format(name), theirs + difference, theirs - limit))
    return [one for one in rules if not one.passed] or rules[:1]


def _of_served(served: Served, has_champion: bool, limits: Promote) -> list[Rule]:
    """The rules on the exported model. Measured times stay out of them, but for what came of them."""
    everywhere = f"{served.images} of {served.images} images"
    rules = [
        must("the SavedModel detects in a fresh process", f"{served.answered} of {served.images} images", everywhere),
        at_most("the SavedModel's MB are at most promote.max_megabytes", served.megabytes, limits.max_megabytes),
    ]
    if has_champion:
        rule, limit = (
            "the SavedModel's time is at most promote.max_latency_ratio of the champion's",
            limits.max_latency_ratio,
        )
        measured = ratio(served)
    else:
        rule, limit = (
            "the SavedModel's ms an image are at most promote.max_latency_ms (no champion)",
            limits.max_latency_ms,
        )
        measured = served.milliseconds
    passed = measured is not None and measured <= limit
    return [*rules, Rule(rule=rule, candidate=f"see {TIMES}", required=limit, passed=passed)]


def ratio(served: Served) -> float | None:
    """The candidate's time over the champion's, where both ran."""
    if served.milliseconds is None or not served.champion_milliseconds:
        return None
    return served.milliseconds / served.champion_milliseconds


def write_times(decision: Decision, served: Served, limits: Promote) -> None:
    """What was measured for a decision, into TIMES."""
    content = {
        "decision": _digest(decision.model_dump(mode="json")),
        "ms_an_image": served.milliseconds,
        "champions_ms_an_image": served.champion_milliseconds,
        "ratio": ratio(served),
        **limits.model_dump(include={"max_latency_ms", "max_latency_ratio"}),
    }
    write_json(Path(TIMES), content)


def times_of(decision: Mapping[str, Any]) -> str:
    """Words on the times that were measured for a decision, given as decision.json has it.

    Empty where TIMES is not here, or tells of another decision.
    """
    found = read_json(Path(TIMES), "measured times") if Path(TIMES).is_file() else {}
    if found.get("decision") != _digest(decision):
        return ""
    words = {
        "ms_an_image": "{:.3g} ms an image",
        "champions_ms_an_image": "the champion's {:.3g}",
        "ratio": "ratio {:.3g}",
    }
    told = [text.format(found[name]) for name, text in words.items() if found[name] is not None]
    return f"SavedModel, as measured for this decision: {', '.join(told) or 'it did not run'}"


def _digest(decision: Mapping[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(decision, sort_keys=True).encode()).hexdigest()
