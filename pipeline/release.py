"""The release bundle's files: exports, checked against what the evaluated model detects, and what tells of them."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from effdet.postprocess import PostprocessConfig
from effdet.preprocess import decode
from pipeline.bootstrap import intervals
from pipeline.coco_metrics import NOTHING_TO_FIND
from pipeline.export_check import (
    BOUNDS,
    AveragePrecision,
    Comparison,
    check_average_precision,
    check_export,
    found_of_results,
)
from pipeline.exports import CALIBRATION_IMAGES, FILES, write_export
from pipeline.files import checksum, read_json, write_json
from pipeline.gate import Decision
from pipeline.model_card import Likely, model_card
from pipeline.model_files import MODEL_FILE, WEIGHTS_FILE, StoredModel
from pipeline.params import Format, Params
from pipeline.project import PYPROJECT, name_and_version
from pipeline.shard_files import MANIFEST, SHARDS, all_images, ground_truth_path, shard_paths, spread_images

MODEL = Path("data/model")
EVALUATION = Path("data/eval")
LOCK = Path("requirements/ml.txt")  # the environment that exports

COMPARED_IMAGES = 64  # of the gate's split, on which each export is compared


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
            outcomes[path.name] = check_export(path, BOUNDS[format_name], images, found, stored, nms)
    return outcomes


def training_parameters(settings: Params) -> dict[str, Any]:
    """What the model was trained with. The path of the first weights is left out: their content is in provenance."""
    train = settings.train.model_dump(mode="json", exclude={"init_from", "init_checksum"})
    return {"model": settings.model.model_dump(mode="json"), "train": train}


def dvc_md5(folder: Path) -> str:
    """The hash of a folder's content as it stands in dvc.lock."""
    files = sorted((path.relative_to(folder) for path in folder.rglob("*") if path.is_file()), key=Path.as_posix)
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
        "project": name_and_version(PYPROJECT.read_text()),
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
    exports: Mapping[str, Comparison | AveragePrecision],
) -> None:
    """What a bundle holds beside its exports. `exports`: write_exports'."""
    made_of = provenance(judged, settings)
    for name in (MODEL_FILE, WEIGHTS_FILE):
        shutil.copyfile(MODEL / name, folder / name)
    write_json(folder / "classes.json", [row.model_dump() for row in stored.classes])
    write_json(folder / "decision.json", decision.model_dump(mode="json"))
    write_json(folder / "provenance.json", made_of)
    split, bootstrapped = judged["gate_split"], settings.promote.bootstrap
    found = read_json(EVALUATION / f"detections_{split}.json", "detections")
    likely = Likely(bootstrapped.confidence, intervals(ground_truth_path(split), found, **bootstrapped.model_dump()))
    files_to_serve = {folder / name: outcome for name, outcome in exports.items()}
    card = model_card(stored, manifest, judged, likely, decision, files_to_serve, made_of)
    (folder / "model_card.md").write_text(card, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{checksum(path, 'sha256').removeprefix('sha256:')}  {path.relative_to(folder)}\n" for path in files]
    (folder / "checksums.sha256").write_text("".join(lines))
