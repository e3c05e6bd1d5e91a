"""A small pipeline whose stages write what a report reads, with the names and keys of the real ones."""

import json
from pathlib import Path
from typing import Any

from tests.pipeline.small_pipeline import Repository

DVC_YAML = """\
stages:
  shard:
    cmd: python make.py shard
    params: [data]
    deps: [make.py]
    outs: [data/raw, data/shards, data/reports/validation]
  evaluate:
    cmd: python make.py evaluate
    params: [evaluate]
    deps: [data/shards, make.py]
    outs: [data/eval]
  promote:
    cmd: python make.py promote
    params: [promote]
    deps: [data/eval, make.py]
    outs: [data/release]
"""
PARAMS: dict[str, Any] = {
    "data": {"images": 3, "boxes": [2, 2], "classes": ["cat", "dog"]},
    "evaluate": {"picture_score": 0.3, "score": 0.5, "ap": 0.4, "per_class": [0.3, 0.5]},
    "promote": {"min_ap": 0.1, "bootstrap": {"confidence": 0.95, "resamples": 1000, "seed": 1}},
}
MAKE = '''\
"""Writes a stage's outputs as params.yaml says."""
import hashlib, io, json, pathlib, sys, zipfile
from PIL import Image
p = json.loads(pathlib.Path("params.yaml").read_text())
def write(path, content):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(content if isinstance(content, str) else json.dumps(content))
classes = [{"class_id": n, "category_id": n + 1, "name": name} for n, name in enumerate(p["data"]["classes"])]
categories = [{"id": row["category_id"], "name": row["name"]} for row in classes]
images = [{"id": n, "file_name": f"{n}.jpg", "height": 24, "width": 32} for n in range(1, p["data"]["images"] + 1)]
def shard():
    pathlib.Path("data/raw").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile("data/raw/val.zip", "w") as archive:
        for image in images:
            file = io.BytesIO()
            Image.new("RGB", (32, 24), (9 * image["id"], 99, 99)).save(file, "JPEG")
            archive.writestr(zipfile.ZipInfo("val/" + image["file_name"]), file.getvalue())
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0} for n in (1, 2)]
    write("data/shards/ground_truth_val.json", {"images": images, "annotations": boxes, "categories": categories})
    counts = dict(zip(p["data"]["classes"], p["data"]["boxes"]))
    write("data/shards/manifest.json", {"apply_exif": False, "classes": classes,
        "source": {"val": {"annotations_sha256": str(counts)}},
        "splits": {"val": {"images": len(images), "boxes": sum(counts.values()), "left_out": {}, "shards": []}}})
    failed = [] if min(counts.values()) > 1 else [{"split": "val", "table": "categories", "severity": "warning",
        "expectation": "each class has boxes", "count": 1}]
    write("data/reports/validation/report.json",
        {"success": True, "failed": failed, "distributions": {"val": {"classes": counts}}})
def evaluate():
    truth = hashlib.sha256(pathlib.Path("data/shards/ground_truth_val.json").read_bytes()).hexdigest()
    e = p["evaluate"]
    rows = [{"image_id": 1, "category_id": 1, "bbox": [2, 2, 10, 10], "score": e["score"]},
            {"image_id": 2, "category_id": 2, "bbox": [2, 2, 10, 10], "score": 0.9}]
    write("data/eval/detections_val.json", rows)
    rows = ["recall,IoU50,IoU75", "0.0,1.0,1.0", f"0.2,{e['score']},0.25", "1.0,0.0,0.0"]
    write("data/eval/precision_recall_val.csv", "\\n".join(rows))
    metrics = {"AP": e["ap"], "AP50": 0.75, "APs": None}
    names = dict(zip(p["data"]["classes"], e["per_class"]))
    write("data/eval/metrics.json", {"gate_split": "val", "splits": {"val": {"metrics": metrics, "per_class": names,
        "images": len(images), "ground_truth": "sha256:" + truth}}})
def promote():
    ap = json.loads(pathlib.Path("data/eval/metrics.json").read_text())["splits"]["val"]["metrics"]["AP"]
    passed = ap is not None and ap >= p["promote"]["min_ap"]
    figures = {"candidate": ap, "required": p["promote"]["min_ap"], "passed": passed}
    rule = {"rule": "AP is at least promote.min_ap", **figures}
    write("data/release/decision.json", {"decision": "accepted" if passed else "rejected", "rules": [rule]})
globals()[sys.argv[1]]()
'''


def write_params(repository: Repository, **changes: Any) -> None:
    """params.yaml with some values changed, as section__key=value."""
    content = json.loads(json.dumps(PARAMS))
    for name, value in changes.items():
        section, _, key = name.partition("__")
        content[section][key] = value
    (repository.path / "params.yaml").write_text(json.dumps(content))


def made(path: Path) -> Repository:
    """Branch main: a commit without a lock, tagged `before-all`, and a run. Branch `change` is where one stands."""
    path.mkdir(parents=True)
    repository = Repository(path)
    repository.run("git", "init", "--quiet", "--initial-branch", "main")
    repository.run("dvc", "init", "--quiet")
    (path / ".gitignore").write_text("/data/\n")
    repository.commit("nothing")
    repository.run("git", "tag", "before-all")
    (path / "dvc.yaml").write_text(DVC_YAML)
    (path / "make.py").write_text(MAKE)
    (path / "requirements").mkdir()
    (path / "requirements/ml.txt").write_text("numpy==1.0 \\\n    --hash=sha256:00\npillow==2.0\n")
    write_params(repository)
    repository.run("dvc", "repro", "--quiet")
    repository.commit("run")
    repository.run("git", "checkout", "--quiet", "-b", "change")
    return repository
