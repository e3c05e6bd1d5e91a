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
"""

import dataclasses
import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from effdet.inference import prepare_device
from effdet.postprocess import PostprocessConfig
from effdet.preprocess import decode
from pipeline import params
from pipeline.class_table import class_rows, require_same
from pipeline.coco_metrics import NOTHING_TO_FIND
from pipeline.errors import PipelineError, run
from pipeline.export_check import (
    BOUNDS,
    AveragePrecision,
    Comparison,
    check_average_precision,
    check_export,
    found_of_results,
)
from pipeline.exports import CALIBRATION_IMAGES, FILES, write_export
from pipeline.files import checksum, read_json, write_json, written_whole
from pipeline.gate import Decision, Judged, decide, is_champion, read_champion
from pipeline.model_card import model_card
from pipeline.model_files import MODEL_FILE, WEIGHTS_FILE, StoredModel, read_model, require_same_pictures
from pipeline.params import Format, Params
from pipeline.shard_files import MANIFEST, all_images, ground_truth_path, shard_paths, spread_images

CHAMPION = Path("champion.json")
CHAMPION_BUNDLE = Path("champion/bundle")
SHARDS = Path("data/shards")
MODEL = Path("data/model")
EVALUATION = Path("data/eval")
LOCK = Path("requirements/ml.txt")  # the environment that exports
OUT = Path("data/release")
METRICS = Path("metrics.json")

COMPARED_IMAGES = 64  # of the gate's split, on which each export is compared
METRIC_DIGITS = 6  # of what stands in git


def candidate_of(stored: StoredModel, judged: Mapping[str, Any]) -> Judged:
    """The model as the gate sees it, from evaluate's metrics.json."""
    split = judged["splits"][judged["gate_split"]]
    makes_it = {
        "model": dataclasses.asdict(stored.config),
        "classes": [row.model_dump() for row in stored.classes],
        "weights": stored.weights.sha256,
        "nms": judged["nms"],
        "apply_exif": stored.apply_exif,
    }
    return Judged(
        detector="sha256:" + hashlib.sha256(json.dumps(makes_it, sort_keys=True).encode()).hexdigest(),
        split=judged["gate_split"],
        ground_truth=split["ground_truth"],
        classes=stored.classes,
        metrics=split["metrics"],
    )


def write_exports(
    folder: Path, stored: StoredModel, manifest: Mapping[str, Any], judged: Mapping[str, Any], formats: Sequence[Format]
) -> dict[str, Comparison | AveragePrecision]:
    """The model in each format, with the post-processing that it was judged with: file -> how it compares with that."""
    nms = PostprocessConfig(**judged["nms"])
    split = judged["gate_split"]
    images = spread_images(shard_paths(manifest, split), COMPARED_IMAGES)
    results = read_json(EVALUATION / f"detections_{split}.json", "detections")
    found = {image_id: found_of_results(results, image_id, stored.classes) for image_id in images}
    outcomes: dict[str, Comparison | AveragePrecision] = {}
    for format_name in tqdm(formats, desc="export", unit=" formats", disable=None):
        path = folder / FILES[format_name]
        if format_name == "litert_int8":
            examples = spread_images(shard_paths(manifest, "train"), CALIBRATION_IMAGES)
            calibration = [decode(encoded, stored.apply_exif).numpy() for encoded in examples.values()]
            write_export(path, format_name, stored, nms, calibration)
            val, model_ap = all_images(shard_paths(manifest, "val")), judged["splits"]["val"]["metrics"]["AP"]
            model_ap = NOTHING_TO_FIND if model_ap is None else model_ap
            outcomes[path.name] = check_average_precision(path, val, ground_truth_path("val"), model_ap, stored, nms)
        else:
            write_export(path, format_name, stored, nms)
            outcomes[path.name] = check_export(path, BOUNDS[format_name], images, found, stored.config, nms)
    return outcomes


def training_parameters(settings: Params) -> dict[str, Any]:
    """What the model was trained with. The path of the first weights is left out: their content is in provenance."""
    train = settings.train.model_dump(mode="json", exclude={"init_from", "init_checksum"})
    return {"model": settings.model.model_dump(mode="json"), "train": train}


def dvc_md5(folder: Path) -> str:
    """The hash of a folder's content as it stands in dvc.lock."""
    files = sorted(
        (path.relative_to(folder) for path in folder.rglob("*") if path.is_file()), key=lambda path: path.parts
    )
    entries = [
        {"md5": checksum(folder / path, "md5").removeprefix("md5:"), "relpath": path.as_posix()} for path in files
    ]
    content = json.dumps(entries, sort_keys=True).encode()
    return hashlib.md5(content, usedforsecurity=False).hexdigest() + ".dir"


def provenance(judged: Mapping[str, Any], settings: Params) -> dict[str, Any]:
    """What the release was made of. No time, host or path of this machine: the same inputs give the same file.

    The commit cannot be in it, which is made of it later, nor may dvc.lock: its entries change with code that changes
    no input of this stage, and then the bundle would tell of another run than the one that made it. `dvc_lock` is
    computed from what the stage reads; the tag of a version, on its commit, has the hashes of all the stages.
    """
    inputs = [MANIFEST, MODEL / MODEL_FILE, MODEL / WEIGHTS_FILE, EVALUATION / "metrics.json"]
    inputs += [EVALUATION / f"detections_{split}.json" for split in judged["splits"]]
    return {
        "commit": "that of the version's tag; champion.json names it, too",
        "dvc_lock": {str(path): dvc_md5(path) for path in (SHARDS, MODEL, EVALUATION)},
        "environment": {str(LOCK): checksum(LOCK, "sha256")},
        "parameters": training_parameters(settings),
        "licences": settings.promote.licences.model_dump(mode="json"),
        "inputs": {str(path): checksum(path, "sha256") for path in inputs},
        "data": read_json(MANIFEST, "manifest of the shards")["source"],
        "post_processing": judged["nms"],
        "training": read_json(MODEL / "provenance.json", "provenance of the model"),
    }


def write_release(
    folder: Path,
    stored: StoredModel,
    manifest: Mapping[str, Any],
    judged: Mapping[str, Any],
    decision: Decision,
    settings: Params,
) -> None:
    """The bundle, with each export checked before anything is said of it."""
    outcomes = write_exports(folder, stored, manifest, judged, settings.promote.formats)
    made_of = provenance(judged, settings)
    for name in (MODEL_FILE, WEIGHTS_FILE):
        shutil.copyfile(MODEL / name, folder / name)
    write_json(folder / "classes.json", [row.model_dump() for row in stored.classes])
    write_json(folder / "decision.json", decision.model_dump(mode="json"))
    write_json(folder / "provenance.json", made_of)
    card = model_card(
        stored, manifest, judged, decision, {folder / name: outcome for name, outcome in outcomes.items()}, made_of
    )
    (folder / "model_card.md").write_text(card, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{checksum(path, 'sha256').removeprefix('sha256:')}  {path.relative_to(folder)}\n" for path in files]
    (folder / "checksums.sha256").write_text("".join(lines))


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
    champion = read_champion(CHAMPION)
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
    decision = decide(candidate, champion, settings.promote)
    same = is_champion(candidate, champion)
    if same and not CHAMPION_BUNDLE.is_dir():
        raise PipelineError(f"{CHAMPION_BUNDLE}: the champion's bundle is not here; run `dvc pull {CHAMPION_BUNDLE}`")
    with written_whole(OUT) as folder:
        if same:
            shutil.copytree(CHAMPION_BUNDLE, folder)
        else:
            folder.mkdir()
            write_release(folder, stored, manifest, judged, decision, settings)
    write_json(METRICS, summary(stored, judged, decision))
    if same:
        print("the candidate is the champion: the release is the champion's")
    else:
        print(f"candidate {decision.decision}")
        for rule in decision.rules:
            ours, required, outcome = rule.words()
            print(f"  {outcome}  {rule.rule}: {ours}, required {required}")
        if decision.decision == "refused":
            print(f"for other data or other classes, begin anew with {{}} in {CHAMPION}")


if __name__ == "__main__":
    # Commands, as `promote`, `rollback` and `history`, change git. They are loaded by name: the stage, which is run
    # without a word, does not depend on their code.
    run(importlib.import_module("pipeline.registry").main if sys.argv[1:] else main)
