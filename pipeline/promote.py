"""The promote stage: the gate's decision on the candidate, and the release.

A candidate that the gate turns down is a result, not a fault: the stage ends well, and decision.json, the model card
and metrics.json say "rejected" or "refused" with every rule and its figures, so that a reviewer sees them and `dvc exp`
can compare them. Only a release whose decision is "accepted" may be promoted: `python -m pipeline.promote promote`
makes it the champion (pipeline.registry, docs/promotion.md). Input that cannot be understood, and an export that does
not detect what the evaluated model does, are faults.

data/release/
  saved_model/, model.onnx, model_*.tflite   for serving: the formats of promote.formats, see effdet.export
  model.json, weights.safetensors            to train on from
  classes.json, model_card.md, decision.json, provenance.json, checksums.sha256
metrics.json                                 in git: what a reviewer compares
data/timings/promote.json                    measured times, and of which decision; no output of the stage
"""

import importlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effdet.inference import prepare_device
from pipeline import champion, params
from pipeline.champion import Champion
from pipeline.class_table import class_rows, require_same
from pipeline.errors import PipelineError, run
from pipeline.exports import FILES
from pipeline.files import megabytes, read_json, write_json, written_whole
from pipeline.gate import Decision, Judged, Rule, Served, decide, must, times_of, write_times
from pipeline.latency import run_in_turn
from pipeline.model_files import MODEL_FILE, StoredModel, read_model, require_same_pictures
from pipeline.params import Params
from pipeline.release import EVALUATION, MODEL, write_exports, write_release
from pipeline.shard_files import MANIFEST, shard_paths, spread_images
from pipeline.timings import run_stage

OUT = Path("data/release")
METRICS = Path("metrics.json")

SAMPLE_IMAGES = 8  # of the gate's split, on which the SavedModel is run and timed
METRIC_DIGITS = 6  # of what stands in git


def candidate_of(stored: StoredModel, judged: Mapping[str, Any]) -> Judged:
    """The model as the gate sees it, from evaluate's metrics.json."""
    split = judged["splits"][judged["gate_split"]]
    return Judged(
        detector=champion.detector(stored, judged["nms"]),
        split=judged["gate_split"],
        ground_truth=split["ground_truth"],
        classes=stored.classes,
        metrics=split["metrics"],
        per_class=split["per_class"],
    )


def judge(
    folder: Path, candidate: Judged, incumbent: Champion | None, manifest: Mapping[str, Any], limits: params.Promote
) -> Decision:
    """The decision on a candidate whose exports are in `folder`. What was measured is printed, and written beside."""
    images = list(spread_images(shard_paths(manifest, candidate.split), SAMPLE_IMAGES).values())
    checks: list[Rule] = []
    against = None
    saved_model = FILES["saved_model"]
    paths = [folder / saved_model]
    if incumbent:
        paths.append(champion.BUNDLE / saved_model)
        found = read_json(EVALUATION / f"detections_{candidate.split}.json", "detections")
        checks, against = champion.compare(incumbent, candidate, found, manifest, limits.bootstrap)
    ran, *theirs = run_in_turn(paths, images)
    for whose, one in zip(("candidate", "champion"), (ran, *theirs), strict=False):
        if one.fault:
            print(f"the {whose}'s SavedModel does not run: {one.fault}", file=sys.stderr)
    checks += [
        must("the champion's SavedModel detects in a fresh process", one.answered, len(images)) for one in theirs
    ]
    champion_ms = theirs[0].milliseconds if theirs else None
    served = Served(megabytes(paths[0]), len(images), ran.answered, ran.milliseconds, champion_ms)
    made = decide(candidate, checks, against, served, limits)
    write_times(made, served, limits)
    print(times_of(made.model_dump(mode="json")))
    return made


def summary(stored: StoredModel, judged: Mapping[str, Any], decision: Decision) -> dict[str, Any]:
    """metrics.json: what `dvc metrics diff`, `dvc exp show` and a reviewer compare.

    Without AP by class, which would be a column each; data/eval has it, for `dvc plots`.
    """
    gate_split, weights = judged["gate_split"], stored.weights
    return {
        **{split: _rounded(figures["metrics"]) for split, figures in judged["splits"].items()},
        "gate": {
            "decision": decision.decision,
            "split": f"{gate_split} ({judged['splits'][gate_split]['used_for']})",
        },
        "weights": f"{weights.kind}, epoch {weights.epoch}, selected by {weights.selected_by}",
    }


def _rounded(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, METRIC_DIGITS) for name, value in metrics.items()}


def main() -> None:
    """Reads the candidate and the champion; writes data/release and metrics.json, whole or not at all."""
    prepare_device()
    settings = params.load()
    incumbent = champion.read_champion()
    manifest = read_json(MANIFEST, "manifest of the shards")
    judged = read_json(EVALUATION / "metrics.json", "evaluation")
    stored = read_model(MODEL)
    require_same(stored.classes, MODEL / MODEL_FILE, class_rows(manifest["classes"]), MANIFEST)
    require_same_pictures(stored.apply_exif, MODEL / MODEL_FILE, manifest["apply_exif"], MANIFEST)
    if judged["weights"] != stored.weights.model_dump():
        raise PipelineError(
            f"{EVALUATION / 'metrics.json'}: judges weights {judged['weights']['sha256']}, and {MODEL} holds "
            f"{stored.weights.sha256}; run `dvc repro`"
        )
    candidate = candidate_of(stored, judged)
    if incumbent:
        champion.require_bundle()
    same = incumbent is not None and incumbent.decision.candidate.detector == candidate.detector
    with written_whole(OUT) as folder:
        if incumbent and same:
            champion.read_bundle(incumbent)
            decision = incumbent.decision
            shutil.copytree(champion.BUNDLE, folder)
        else:
            folder.mkdir()
            decision = release(folder, stored, candidate, incumbent, manifest, judged, settings)
    metrics = summary(stored, judged, decision)
    write_json(METRICS, metrics)
    if same:
        print("the candidate is the champion: the release is the champion's")
    else:
        tell(decision, metrics["gate"]["split"])


def release(
    folder: Path,
    stored: StoredModel,
    candidate: Judged,
    incumbent: Champion | None,
    manifest: Mapping[str, Any],
    judged: Mapping[str, Any],
    settings: Params,
) -> Decision:
    """Writes the bundle of a candidate that is not the champion; the decision on it."""
    exports = write_exports(folder, stored, manifest, judged, settings.promote.formats)
    decision = judge(folder, candidate, incumbent, manifest, settings.promote)
    write_release(folder, stored, manifest, judged, decision, settings, exports)
    return decision


def tell(decision: Decision, split: str) -> None:
    """Prints the decision for a person."""
    print(f"candidate {decision.decision}, on {split}")
    for rule in decision.rules:
        ours, required, outcome = rule.words()
        print(f"  {outcome}  {rule.rule}: {ours}, required {required}")
    if decision.decision == "refused":
        print(f"for other classes, or a champion that is lost, begin anew with {{}} in {champion.CHAMPION}")


if __name__ == "__main__":
    # Commands, as `promote`, `rollback` and `history`, change git. They are loaded by name: the stage, which is run
    # without a word, does not depend on their code.
    if sys.argv[1:]:
        run(importlib.import_module("pipeline.registry").main)
    else:
        run_stage("promote", main)
