"""The gate: may a candidate take the champion's place? A decision with every rule and its two figures.

A decision is "accepted", "rejected" (a figure was missed) or "refused" (the two cannot be compared: other ground
truth, other classes, a figure that is missing). Only the first is a pass.

champion.json names the champion's version and commit and holds the decision under which it was accepted, or is `{}`
where there is none; champion/ has its bundle, and the detections that it was judged by. `python -m pipeline.promote
promote` writes both (pipeline.registry).
"""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pipeline.class_table import Class, first_difference
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.params import Promote
from pipeline.settings import Section

DIGITS = 9  # to which differences of AP are rounded: in binary, 0.41 - 0.40 falls short of 0.01


class Judged(Section):
    """A model as it was judged: what a comparison needs to know of it."""

    detector: str  # sha256 of all that makes one: weights, configuration, classes, post-processing
    split: str  # on which it was judged
    ground_truth: str  # its sha256
    classes: list[Class]
    metrics: dict[str, float | None]  # COCO's twelve; null where there was nothing to measure


class Rule(Section):
    """One rule and how it came out."""

    rule: str
    candidate: float | str | None  # the candidate's figure
    required: float | str | None  # what it is held against
    passed: bool

    def words(self) -> tuple[str, str, str]:
        """Both figures and the outcome, for a person."""
        figures = (self.candidate, self.required)
        candidate, required = (f"{figure:.6g}" if isinstance(figure, float) else str(figure) for figure in figures)
        return candidate, required, "pass" if self.passed else "FAIL"


class Decision(Section):
    """All that the gate says."""

    decision: Literal["accepted", "rejected", "refused"]
    candidate: Judged
    champion: Judged | None  # as it was at the time
    rules: list[Rule]


class Champion(Section):
    """champion.json."""

    version: str  # v0.2.0
    revision: str  # the commit of its candidate, that the version's tag stands on
    decision: Decision
    detections: str  # sha256 of champion/detections.json
    ground_truth: str  # sha256 of what these were judged on


def read_champion(path: Path) -> Decision | None:
    """The decision that made the champion; None where there is no champion yet. PipelineError for anything else."""
    content = read_json(path, "champion")
    if content == {}:
        return None
    try:
        champion = Champion.model_validate(content).decision
    except ValidationError as error:
        details = error.errors()[0]
        where = ".".join(str(key) for key in details["loc"]) or "the file"
        raise PipelineError(
            f"{path}: {where}: {details['msg']}, got {details['input']!r:.80}; "
            "`python -m pipeline.promote promote` writes it; {} means no champion"
        ) from None
    if champion.decision != "accepted":
        raise PipelineError(
            f"{path}: holds a candidate that was {champion.decision}; only an accepted one can be the champion"
        )
    return champion


def is_champion(candidate: Judged, champion: Decision | None) -> bool:
    """Whether the candidate is the champion's model, judged on the same ground truth."""
    return (
        champion is not None
        and candidate.detector == champion.candidate.detector
        and candidate.ground_truth == champion.candidate.ground_truth
    )


def decide(candidate: Judged, champion: Decision | None, params: Promote) -> Decision:
    """The decision on a candidate; where it is the champion, the decision that was made then."""
    if champion is not None and is_champion(candidate, champion):
        return champion
    incumbent = champion.candidate if champion else None
    rules = _comparable(candidate, incumbent)
    if not all(rule.passed for rule in rules):
        return Decision(decision="refused", candidate=candidate, champion=incumbent, rules=rules)
    rules.append(_figures(candidate, incumbent, params))
    decision: Literal["accepted", "rejected"] = "accepted" if rules[-1].passed else "rejected"
    return Decision(decision=decision, candidate=candidate, champion=incumbent, rules=rules)


def _comparable(candidate: Judged, champion: Judged | None) -> list[Rule]:
    """What must hold before figures may be compared."""
    ap = candidate.metrics.get("AP")
    rules = [Rule(rule="AP was measured", candidate=ap, required="a number", passed=ap is not None)]
    if champion is None:
        return rules
    number = "a number" if champion.metrics.get("AP") is not None else None
    size = f"{len(candidate.classes)} classes"
    pairs = [
        ("the champion's AP was measured", number, "a number"),
        ("judged on the champion's split", candidate.split, champion.split),
        ("judged on the champion's ground truth", candidate.ground_truth, champion.ground_truth),
        ("the champion's classes", *(first_difference(candidate.classes, champion.classes) or (size, size))),
    ]
    return rules + [
        Rule(rule=rule, candidate=ours, required=theirs, passed=ours == theirs) for rule, ours, theirs in pairs
    ]


def _figures(candidate: Judged, champion: Judged | None, params: Promote) -> Rule:
    """The rule on AP, which both have: a floor without a champion, a gain over the champion with one."""
    if champion is None:
        rule, required = "AP is at least promote.min_ap (no champion)", params.min_ap
    else:
        rule, required = "AP is at least the champion's + promote.min_gain", _ap(champion) + params.min_gain
    passed = round(_ap(candidate) - required, DIGITS) >= 0
    return Rule(rule=rule, candidate=_ap(candidate), required=required, passed=passed)


def _ap(judged: Judged) -> float:
    ap = judged.metrics["AP"]
    if ap is None:
        raise ValueError("AP is missing; _comparable lets no such model pass")
    return ap
