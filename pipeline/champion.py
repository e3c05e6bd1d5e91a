"""The champion: what is in production, and how the candidate is held against it. Files on which promote depends.

champion.json names the champion's version and commit and holds the decision under which it was accepted, or is `{}`
where there is none; champion/ has its bundle, and the detections that it was judged by. `python -m pipeline.promote
promote` writes both (pipeline.registry).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from effdet.inference import run_detection
from effdet.input_pipeline import evaluation_batches
from effdet.postprocess import PostprocessConfig
from pipeline import bootstrap, local, params
from pipeline.class_table import first_difference, labels
from pipeline.coco_metrics import Detections, coco_results
from pipeline.errors import PipelineError
from pipeline.files import checksum, read_json
from pipeline.gate import DIGITS, Decision, Difference, Differences, Incumbent, Judged, Rule, must
from pipeline.model_files import StoredModel, read_model
from pipeline.settings import Section
from pipeline.shard_files import ground_truth_path, shard_paths

CHAMPION = Path("champion.json")
BUNDLE = Path("champion/bundle")
DETECTIONS = Path("champion/detections.json")

BATCH = 8  # images
INTERVAL_DIGITS = 6  # of differences, as they stand in a decision

Read = TypeVar("Read", bound=Section)


class Champion(Section):
    """champion.json."""

    version: str  # v0.2.0
    revision: str  # the commit of its candidate, that the version's tag stands on
    decision: Decision
    detections: str  # sha256 of champion/detections.json
    ground_truth: str  # sha256 of what these were judged on


def read_champion(path: Path = CHAMPION) -> Champion | None:
    """None where there is no champion yet. PipelineError for anything else, a candidate that was rejected among it."""
    content = read_json(path, "champion")
    if content == {}:
        return None
    advice = "`python -m pipeline.promote promote` writes it; {} means no champion"
    champion = _validated(Champion, content, path, advice)
    if champion.decision.decision != "accepted":
        raise PipelineError(
            f"{path}: holds a candidate that was {champion.decision.decision}; only an accepted one can be the champion"
        )
    return champion


def read_decision(path: Path) -> Decision:
    """A release's decision.json. PipelineError for anything else."""
    return _validated(Decision, read_json(path, "decision"), path, "the promote stage writes it; run `dvc repro`")


def _validated(kind: type[Read], content: object, path: Path, advice: str) -> Read:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        details = error.errors()[0]
        where = ".".join(str(key) for key in details["loc"]) or "the file"
        raise PipelineError(f"{path}: {where}: {details['msg']}, got {details['input']!r:.80}; {advice}") from None


def require_bundle() -> None:
    """PipelineError where the bundle of the champion is not here."""
    if not BUNDLE.is_dir():
        raise PipelineError(f"{BUNDLE}: the champion's bundle is not here; run `dvc pull {BUNDLE}`")


def read_bundle(champion: Champion) -> tuple[StoredModel, Mapping[str, Any]]:
    """The champion's model and its post-processing. PipelineError where champion/ has another one."""
    stored = read_model(BUNDLE)
    nms = read_json(BUNDLE / "provenance.json", "provenance of the champion").get("post_processing")
    made = detector(stored, nms)
    if made != champion.decision.candidate.detector:
        raise PipelineError(
            f"{BUNDLE}: is the model {made}, and {CHAMPION} says {champion.decision.candidate.detector}; "
            f"run `dvc checkout {BUNDLE}`"
        )
    return stored, nms


def detector(stored: StoredModel, nms: Mapping[str, Any]) -> str:
    """sha256 of all that makes detections: the same hash is the same model."""
    makes_it = {
        "model": dataclasses.asdict(stored.config),
        "classes": [row.model_dump() for row in stored.classes],
        "weights": stored.weights.sha256,
        "nms": nms,
        "apply_exif": stored.apply_exif,
    }
    return "sha256:" + hashlib.sha256(json.dumps(makes_it, sort_keys=True).encode()).hexdigest()


def compare(
    champion: Champion, candidate: Judged, found: Detections, manifest: Mapping[str, Any], settings: params.Bootstrap
) -> tuple[list[Rule], Incumbent | None]:
    """The champion on the candidate's ground truth, and what must hold for that: rules, the last of them may fail.

    found: the candidate's detections.
    """
    rules = [_same_classes(candidate, champion.decision.candidate)]
    if not rules[0].passed:
        return rules, None
    try:
        theirs = detections(champion, candidate, manifest)
    except PipelineError as error:
        return [*rules, must("the champion can be judged on this ground truth", str(error), "it can")], None
    intervals = bootstrap.difference(ground_truth_path(candidate.split), found, theirs, **settings.model_dump())
    names = labels(candidate.classes)
    by_category = {row.category_id: names[row.class_id] for row in candidate.classes}
    per_class = {by_category[category]: one for category, one in intervals.per_class.items()}
    figures = Judged(
        detector=champion.decision.candidate.detector,
        split=candidate.split,
        ground_truth=candidate.ground_truth,
        classes=candidate.classes,
        metrics={name: one.champion for name, one in intervals.metrics.items()},
        per_class={name: one.champion for name, one in per_class.items()},
    )
    rules += _same_figures("the candidate's", candidate.metrics, {k: v.candidate for k, v in intervals.metrics.items()})
    if champion.ground_truth == candidate.ground_truth:
        rules += _same_figures("the champion's", champion.decision.candidate.metrics, figures.metrics)
    differences = Differences(
        confidence=settings.confidence,
        metrics={name: _rounded(one) for name, one in intervals.metrics.items()},
        per_class={name: _rounded(one) for name, one in per_class.items()},
    )
    return rules, Incumbent(figures, differences)


def _same_classes(candidate: Judged, champion: Judged) -> Rule:
    size = f"{len(candidate.classes)} classes"
    return must("the champion's classes", *(first_difference(candidate.classes, champion.classes) or (size, size)))


def _same_figures(whose: str, told: Mapping[str, float | None], found: Mapping[str, float | None]) -> list[Rule]:
    """The first figure that is missing, or another than the detections give; else one rule that passes, on AP."""
    rules = []
    for name, figure in found.items():
        here = told.get(name)
        same = figure == here if figure is None or here is None else round(figure - here, DIGITS) == 0
        rule = f"{whose} {name} is that of the detections"
        rules.append(Rule(rule=rule, candidate=here, required=figure, passed=same))
    return [next((rule for rule in rules if not rule.passed), rules[0])]


def _rounded(interval: bootstrap.Interval) -> Difference:
    values = (interval.difference, interval.low, interval.high)
    difference, low, high = (None if value is None else round(value, INTERVAL_DIGITS) for value in values)
    return Difference(difference=difference, low=low, high=high)


def detections(champion: Champion, candidate: Judged, manifest: Mapping[str, Any]) -> Detections:
    """The champion's COCO results on the candidate's split: those that it was judged by, or made anew for other data.

    PipelineError where the files are not the champion's, or it takes other pictures than the candidate.
    """
    if champion.ground_truth == candidate.ground_truth:
        found = checksum(DETECTIONS, "sha256") if DETECTIONS.is_file() else "not here"
        if found != champion.detections:
            raise PipelineError(
                f"{DETECTIONS}: is {found}, and {CHAMPION} says {champion.detections}; run `dvc checkout {DETECTIONS}`"
            )
        rows: Detections = read_json(DETECTIONS, "detections of the champion")
        return rows
    stored, nms = read_bundle(champion)
    try:
        post_processing = PostprocessConfig(**nms)
    except TypeError as error:
        raise PipelineError(f"{BUNDLE}: its post-processing is of another version of this code: {error}") from None
    if stored.apply_exif != manifest["apply_exif"]:
        raise PipelineError(
            f"{BUNDLE}: takes pictures with data.apply_exif {stored.apply_exif}, and the data has "
            f"{manifest['apply_exif']}: they cannot be judged on the same pictures"
        )
    batches = evaluation_batches(
        shard_paths(manifest, candidate.split),
        image_size=stored.config.image_size,
        max_boxes=manifest["max_boxes"],
        batch_size=BATCH,
        rank=0,
        num_ranks=1,
        workers=local.load().loader_workers,
    )
    return coco_results(run_detection(stored.model, stored.config, batches, post_processing), stored.classes)
