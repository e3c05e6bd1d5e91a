"""A repository whose last three stages are small and real for DVC: what the registry's commands are tried on.

`candidate` is the model: its AP, and what the SavedModel adds to each pixel. The release holds a real SavedModel.
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
    deps: [candidate, data/shards]
    outs: [data/eval]
  promote:
    cmd: python stage.py promote
    deps: [candidate, champion.json, champion, data/eval, models]
    outs: [data/release]
    metrics: [metrics.json: {cache: false}]
artifacts:
  detector: {path: data/release, type: model}
"""

# The release does not tell what it was held against, and so it stays when it becomes the champion.
STAGE = """\
import hashlib, json, pathlib, shutil, sys
root = pathlib.Path("data")
ap, _, added = pathlib.Path("candidate").read_text().partition(" ")
def write(name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) if not isinstance(content, str) else content)
if sys.argv[1] == "shard":
    write("shards/ground_truth_val.json", pathlib.Path("truth").read_text())
elif sys.argv[1] == "evaluate":
    write("eval/detections_val.json", [float(ap)])
else:
    release = root / "release"
    shutil.rmtree(release, ignore_errors=True)
    shutil.copytree(pathlib.Path("models") / added.strip(), release / "saved_model")
    decision = "accepted" if float(ap) >= 0.1 else "rejected"
    write("release/decision.json", {"decision": decision, "candidate": {"ground_truth": "sha256:0", "ap": ap}})
    files = sorted(path for path in release.rglob("*") if path.is_file())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(release)}" for path in files]
    write("release/checksums.sha256", "".join(line + chr(10) for line in sums))
    gate = {"decision": decision, "split": "val (also used for selection)"}
    figures = {"AP": float(ap), "AP50": float(ap), "AP75": None}
    pathlib.Path("metrics.json").write_text(json.dumps({"val": figures, "gate": gate}))
"""

MODELS = """\
import sys, tensorflow as tf
class Adds(tf.Module):
    def __init__(self, number):
        self.number = tf.Variable(number)
    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
    def __call__(self, pixels):
        return {"found": pixels + self.number}
for number in (1.0, 2.0):
    model = Adds(number)
    tf.saved_model.save(model, f"{sys.argv[1]}/{number:.0f}", signatures=model.__call__)
"""

CONSUMER = """\
import sys, tensorflow as tf
found = tf.saved_model.load(sys.argv[1] + "/saved_model").signatures["serving_default"](pixels=tf.constant([5.0]))
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
    }.items():
        (repo / name).write_text(text)


def commit_candidate(repo, ap, added=1):
    """A run of the pipeline, and a commit."""
    (repo / "candidate").write_text(f"{ap} {added}")
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
