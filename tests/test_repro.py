"""`dvc repro` re-runs what a change concerns, and nothing else: the real stages on a small synthetic set."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.walking import STAND_IN, blocks, walk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[1]
SMALL = {
    "train_images: ": 24,
    "val_images: ": 8,
    "images_per_shard: ": 8,
    "image_size: ": [128, 128],
    "batch_size: ": 4,
    "epochs: ": 1,
    "schedule_epochs: ": 1,
    "warmup_epochs: ": 0,
    "init_from: ": "null",
    "min_ap: ": 0.0,
    "formats: ": "[saved_model]",
}

RUNNING = re.compile(r"^Running stage '(\w+)'", re.MULTILINE)


class Repository:
    """A clone in which commands are run as a user would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str) -> str:
        """What the command prints; its words where it fails."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@localhost",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@localhost",
        }
        done = subprocess.run(
            command,
            cwd=self.path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=1800,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
        return done.stdout

    def repro(self) -> list[str]:
        """The stages whose commands were run."""
        return RUNNING.findall(self.run("dvc", "repro"))

    def replace(self, file: str, old: str, new: str) -> None:
        text = (self.path / file).read_text()
        assert old in text
        (self.path / file).write_text(text.replace(old, new, 1))

    def restore(self) -> None:
        """Back to what is committed, results out of the cache."""
        self.run("git", "checkout", "--quiet", ".")
        self.run("dvc", "checkout", "--quiet")


def work_tree(path: Path) -> Repository:
    """A copy of what git has and of what was edited here, less the results of runs; not a repository yet."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and name not in ("dvc.lock", "metrics.json"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path / name)
    return Repository(path)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A small run from start to end, committed."""
    repository = work_tree(tmp_path_factory.mktemp("repository"))
    path = repository.path
    params = (path / "params.yaml").read_text()
    for key, value in SMALL.items():
        params, count = re.subn(rf"^(\s+){key}.*$", rf"\g<1>{key}{value}", params, flags=re.MULTILINE)
        assert count, key
    (path / "params.yaml").write_text(params)
    repository.run("git", "init", "--quiet", "--initial-branch", "main")
    repository.run("git", "add", ".")
    repository.run("git", "commit", "--quiet", "--message", "small parameters")
    repository.run("bash", "-euc", STAND_IN)
    said = repository.run("make", "demo")
    assert RUNNING.findall(said) == ["download", "validate", "shard", "train", "evaluate", "promote"]
    assert "AP75" in said
    repository.run("git", "add", ".")
    repository.run("git", "commit", "--quiet", "--message", "small run")
    assert "Bit for bit what dvc.lock and metrics.json say." in repository.run("make", "demo")
    return repository


@pytest.fixture
def repository(reproduced: Repository) -> Iterator[Repository]:
    yield reproduced
    reproduced.restore()


def test_a_second_run_does_nothing(repository: Repository) -> None:
    assert repository.repro() == []
    assert "up to date" in repository.run("dvc", "status")
    assert repository.run("git", "status", "--porcelain") == ""


def test_an_evaluation_parameter_concerns_evaluate_and_promote(repository: Repository) -> None:
    repository.replace("params.yaml", "pre_nms_top_k: 5000", "pre_nms_top_k: 50")
    assert repository.repro() == ["evaluate", "promote"]


def test_a_gate_parameter_concerns_promote(repository: Repository) -> None:
    repository.replace("params.yaml", "min_ap: 0.0", "min_ap: 0.9")
    assert repository.repro() == ["promote"]
    assert '"rejected"' in (repository.path / "metrics.json").read_text()


def test_a_new_version_of_this_project_concerns_promote(repository: Repository) -> None:
    repository.replace("pyproject.toml", "line-length = 120", "line-length = 99")
    assert "up to date" in repository.run("dvc", "status")
    repository.replace("pyproject.toml", 'version = "', 'version = "1.')
    assert re.findall(r"^(\w+):$", repository.run("dvc", "status"), re.MULTILINE) == ["promote"]


def test_the_batch_size_concerns_train_and_what_follows(repository: Repository) -> None:
    repository.replace("params.yaml", "batch_size: 4", "batch_size: 3")
    assert repository.repro() == ["train", "evaluate", "promote"]


def test_the_data_concerns_all(repository: Repository) -> None:
    repository.replace("params.yaml", "val_images: 8", "val_images: 7")
    assert repository.repro() == ["download", "validate", "shard", "train", "evaluate", "promote"]


def test_a_threshold_of_the_validation_trains_nothing(repository: Repository) -> None:
    repository.replace("params.yaml", "min_boxes_per_class: 5", "min_boxes_per_class: 1000")
    repository.run("python", "-m", "pipeline.data_baseline")
    assert '"classes"' in (repository.path / "data_baseline.json").read_text()
    assert repository.repro() == ["validate"]


def test_an_edit_of_the_losses_concerns_train(repository: Repository) -> None:
    (repository.path / "effdet/losses.py").open("a").write("\n# edited\n")
    ran = repository.repro()
    assert ran[0] == "train"
    assert set(ran) <= {"train", "evaluate", "promote"}


def test_an_edit_that_cannot_matter_is_accepted_by_commit(repository: Repository) -> None:
    (repository.path / "effdet/losses.py").open("a").write("\n# edited\n")
    repository.run("dvc", "commit", "--force", "train")
    assert repository.repro() == []


def test_parameters_metrics_and_plots_are_compared(repository: Repository) -> None:
    repository.replace("params.yaml", "pre_nms_top_k: 5000", "pre_nms_top_k: 50")
    repository.repro()
    assert "evaluate.nms.pre_nms_top_k" in repository.run("dvc", "params", "diff")
    shown = json.loads(repository.run("dvc", "metrics", "show", "--json"))
    assert "AP" in json.dumps(shown)
    repository.run("dvc", "metrics", "diff", "--all")
    repository.run("dvc", "plots", "diff", "HEAD")
    assert (repository.path / "dvc_plots" / "index.html").exists()
    assert "promote" in repository.run("dvc", "dag")


def test_experiments_in_place_queued_and_in_a_folder_of_their_own(
    repository: Repository, request: pytest.FixtureRequest
) -> None:
    day_to_day = blocks("running.md", f"walk: tests/test_repro.py::{request.node.name}")
    said = walk(repository, day_to_day, {})
    assert "learning_rate: 0.1 " in (repository.path / "params.yaml").read_text()
    assert all(column in said for column in ("train.learning_rate", "val.AP"))
    repository.restore()
    repository.run("dvc", "exp", "run", "--temp", "--name", "apart", "-S", "evaluate.pictures=1")
    assert "pictures: 16" in (repository.path / "params.yaml").read_text()
    repository.run("dvc", "exp", "run", "--queue", "--name", "later", "-S", "evaluate.pictures=2")
    repository.run("dvc", "exp", "run", "--run-all", "--jobs", "1")
    shown = repository.run("dvc", "exp", "show", "--csv")
    assert all(name in shown for name in ("apart", "later"))
    repository.run("dvc", "exp", "apply", "later")
    assert "pictures: 2" in (repository.path / "params.yaml").read_text()
