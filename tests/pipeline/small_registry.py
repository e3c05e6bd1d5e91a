"""A repository whose last three stages are small and real for DVC: what the registry's commands are tried on.

Two keys of params.yaml are the model: `train.learning_rate` is its AP, `train.seed` what the SavedModel adds to each
pixel. The release holds a real SavedModel, which takes pictures as well and finds nothing on them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "TF_CPP_MIN_LOG_LEVEL": "3"}

DVC_YAML = """\
stages:
  shard:
    cmd: python stage.py shard
    deps: [truth]
    outs: [data/shards]
  evaluate:
    cmd: python stage.py evaluate
    params: [train.learning_rate, train.seed]
    deps: [data/shards]
    outs: [data/eval]
  promote:
    cmd: python stage.py promote
    params: [train.learning_rate, train.seed]
    deps: [champion.json, champion, data/eval, models]
    outs: [data/release]
    metrics: [metrics.json: {cache: false}]
artifacts:
  detector: {path: data/release, type: model}
"""

# The release does not tell what it was held against, and so it stays when it becomes the champion.
STAGE = """\
import hashlib, json, pathlib, shutil, sys, ruamel.yaml
root = pathlib.Path("data")
model = ruamel.yaml.YAML(typ="safe").load(pathlib.Path("params.yaml"))["train"]
ap, added = model["learning_rate"], str(model["seed"])
def write(name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) if not isinstance(content, str) else content)
if sys.argv[1] == "shard":
    write("shards/ground_truth_val.json", pathlib.Path("truth").read_text())
elif sys.argv[1] == "evaluate":
    write("eval/detections_val.json", [ap])
else:
    release = root / "release"
    shutil.rmtree(release, ignore_errors=True)
    shutil.copytree(pathlib.Path("models") / added, release / "saved_model")
    decision = "accepted" if ap >= 0.1 else "rejected"
    table = [{"class_id": 0, "category_id": 1, "name": "cat"}]
    judged = {"detector": "sha256:" + added, "split": "val", "ground_truth": "sha256:0", "classes": table}
    judged |= {"metrics": {"AP": ap}, "per_class": {"cat": ap}}
    made = {"decision": decision, "candidate": judged, "champion": None, "differences": None, "rules": []}
    write("release/decision.json", made)
    files = sorted(path for path in release.rglob("*") if path.is_file())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(release)}" for path in files]
    write("release/checksums.sha256", "".join(line + chr(10) for line in sums))
    gate = {"decision": decision, "split": "val (also used for selection)"}
    figures = {"AP": ap, "AP50": ap, "AP75": None}
    pathlib.Path("metrics.json").write_text(json.dumps({"val": figures, "gate": gate}))
"""

MODELS = """\
import json, pathlib, sys, tensorflow as tf
class Adds(tf.Module):
    def __init__(self, number):
        self.number = tf.Variable(number)
    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
    def adds(self, pixels):
        return {"found": pixels + self.number}
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="images")])
    def detects(self, images):
        zeros = tf.zeros([tf.size(images), 1]) * self.number
        return {"boxes": tf.stack([zeros] * 4, -1), "scores": zeros, "classes": tf.cast(zeros, tf.int32)}
for number in (1.0, 2.0):
    model = Adds(number)
    folder = pathlib.Path(sys.argv[1], f"{number:.0f}")
    tf.saved_model.save(model, str(folder), signatures={"adds": model.adds, "serving_default": model.detects})
    (folder / "assets.extra").mkdir()
    table = {"category_ids": [1], "names": ["cat"], "apply_exif": False}
    (folder / "assets.extra/classes.json").write_text(json.dumps(table))
"""

CONSUMER = """\
import sys, tensorflow as tf
found = tf.saved_model.load(sys.argv[1] + "/saved_model").signatures["adds"](pixels=tf.constant([5.0]))
print("FOUND", float(found["found"][0]))
"""


def run(folder, *line, **environment):
    done = subprocess.run(
        line, cwd=folder, env={**os.environ, **ENVIRONMENT, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout


def write_models(folder):
    """SavedModels 1 and 2."""
    run(folder.parent, sys.executable, "-c", MODELS, str(folder))


def identify(repo):
    run(repo, "git", "config", "user.name", "Ann Example")
    run(repo, "git", "config", "user.email", "ann@example.org")


def write_repository(repo: Path, models: Path, origin: str, store: str):
    """With a git remote and a DVC remote, before any candidate."""
    repo.mkdir()
    run(repo, "git", "init", "-q", "-b", "main")
    identify(repo)
    run(repo, "git", "remote", "add", "origin", origin)
    run(repo, "dvc", "init", "-q")
    run(repo, "dvc", "remote", "add", "-q", "--default", "store", store)
    shutil.copytree(models, repo / "models")
    (repo / "champion").mkdir()
    (repo / "champion" / ".gitkeep").touch()
    (repo / "requirements").mkdir()
    for name, text in {
        "dvc.yaml": DVC_YAML,
        "stage.py": STAGE,
        "truth": "{}",
        "champion.json": "{}\n",
        ".gitignore": "/data\n",
        "requirements/ml.txt": "numpy==1\n",
        "pyproject.toml": '[project]\nname = "small"\nversion = "1.2.0"\n',
    }.items():
        (repo / name).write_text(text)


def params(ap, added=1):
    """params.yaml's text."""
    return f"train:\n  learning_rate: {ap}\n  seed: {added}\n"


def commit_candidate(repo, ap, added=1):
    """A run of the pipeline, and a commit."""
    (repo / "params.yaml").write_text(params(ap, added))
    run(repo, "dvc", "repro", "-q")
    run(repo, "git", "add", "--all")
    run(repo, "git", "commit", "-q", "-m", f"Try {ap}")
    return run(repo, "git", "rev-parse", "HEAD").strip()


def clone(origin, folder, **environment):
    run(folder.parent, "git", "clone", "-q", str(origin), str(folder), **environment)
    identify(folder)


def consume(origin, folder, stage="prod", **environment):
    """As one who has only the repository's address: the model of a stage, checked and run in a process of its own."""
    run(
        folder.parent,
        "dvc",
        "artifacts",
        "get",
        str(origin),
        "detector",
        "--stage",
        stage,
        "-o",
        folder.name,
        **environment,
    )
    run(folder, "sha256sum", "--check", "--strict", "checksums.sha256")
    words = run(folder, sys.executable, "-c", CONSUMER, str(folder))
    return float(words.split("FOUND ")[1])
