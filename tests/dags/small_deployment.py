"""A repository with this one's DAGs, code and parameters, and a pipeline of three stages that take a second each."""

import shutil
from pathlib import Path

from pipeline.prepare import overridden
from tests.pipeline.small_registry import run, write_models, write_repository

ROOT = Path(__file__).parents[2]
COPIED = ("dags", "pipeline", "effdet", "recipes")


def write_deployment(repo: Path) -> None:
    """The pipeline, run with an AP that the gate rejects, and committed. The DAGs are rendered of its own dvc.yaml."""
    models = repo.parent / "models"
    write_models(models)
    write_repository(repo, models, str(repo / ".airflow" / "remote.git"), str(repo / ".airflow" / "store"))
    for name in COPIED:
        shutil.copytree(ROOT / name, repo / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "params.yaml").read_text()
    (repo / "params.yaml").write_text(overridden(text, {"train.learning_rate": 0.05, "train.seed": 1}))
    (repo / ".gitignore").write_text("/data\n/.airflow\n/retraining\n__pycache__\n")
    run(repo, "dvc", "repro", "-q")
    run(repo, "git", "add", "--all")
    run(repo, "git", "commit", "-q", "-m", "Begin")
