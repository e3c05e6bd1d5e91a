"""Promotion from a clone of its own, with real git, DVC and GTO: what an approval changes, and what it must not."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from pipeline import promotion, publish, smoke_test
from pipeline.errors import PipelineError, Preempted
from pipeline.local import Local, Retraining
from pipeline.promotion import Approval
from tests.pipeline.small_registry import (
    ENVIRONMENT,
    clone,
    commit_candidate,
    consume,
    run,
    write_models,
    write_repository,
)

pytestmark = pytest.mark.slow
ANN = Approval(approved_by="Ann Example", note="twice the night pictures")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A remote with a pipeline on main, no champion, and candidates on branches retrain/..., run and pushed."""
    folder = tmp_path_factory.mktemp("promotion")
    write_models(folder / "models")
    run(folder, "git", "init", "-q", "--bare", "-b", "main", "origin")
    write_repository(folder / "repo", folder / "models", str(folder / "origin"), "../store")
    repo = folder / "repo"
    run(repo, "dvc", "remote", "modify", "store", "url", str(folder / "store"))
    commit_candidate(repo, 0.3)
    for name, ap, added in (("good", 0.4, 1), ("better", 0.5, 2), ("bad", 0.05, 2)):
        run(repo, "git", "switch", "-q", "-c", f"retrain/{name}", "main")
        commit_candidate(repo, ap, added)
        run(repo, "dvc", "push", "-q", "--run-cache")
    run(repo, "git", "switch", "-q", "main")
    run(repo, "git", "push", "-q", "--all", "origin")
    return folder


@pytest.fixture
def place(first, tmp_path, monkeypatch):
    """The same for one test."""
    folder = tmp_path / "place"
    shutil.copytree(first, folder, symlinks=True)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    run(folder / "repo", "git", "remote", "set-url", "origin", str(folder / "origin"))
    run(folder / "repo", "dvc", "remote", "modify", "store", "url", str(folder / "store"))
    run(folder / "repo", "git", "commit", "-q", "-a", "-m", "Store here")
    run(folder / "repo", "git", "push", "-q", "origin", "main")
    return folder


@pytest.fixture
def machine(place):
    """Has nothing yet; another one for each call."""
    return Local(retraining=Retraining(work_dir=str(place / "machine"), min_free_gib=0.0))


def refs(place):
    return run(place / "origin", "git", "for-each-ref", "--format", "%(refname) %(objectname)")


def at(place, path, revision="main"):
    return run(place / "origin", "git", "show", f"{revision}:{path}")


def tags(place):
    return run(place / "origin", "git", "tag").split()


def message(place, tag):
    return run(place / "origin", "git", "for-each-ref", "--format", "%(contents)", f"refs/tags/{tag}")


def test_approved_candidate_goes_to_production_and_a_squash_changes_nothing(place, machine, monkeypatch, tmp_path):
    origin = str(place / "origin")
    candidate = run(place / "origin", "git", "rev-parse", "retrain/good").strip()
    clone(origin, place / "clone")
    pushed, moved = promotion.pushed, []

    def late(work, *gone):  # someone pushes to main before the promotion does
        if not moved:
            moved.append(commit_and_push(place / "clone", "README", "words"))
        return pushed(work, *gone)

    monkeypatch.setattr(promotion, "pushed", late)
    done = promotion.promote(origin, "retrain/good", ANN, machine)
    assert (done.version, done.candidate, done.branch, done.after) == ("v0.1.0", candidate, "main", "")
    assert tags(place) == ["detector#prod#1", "detector@v0.1.0"]
    assert run(place / "origin", "git", "rev-list", "main").split()[:2] == [done.champion, *moved]  # one commit
    changed = run(place / "origin", "git", "diff", "--name-only", *moved, "main").split()
    assert changed == [
        "champion.json",
        "champion/.gitignore",
        "champion/bundle.dvc",
        "champion/detections.json.dvc",
        "dvc.lock",
        "metrics.json",
        "params.yaml",
    ]
    assert at(place, "params.yaml") == at(place, "params.yaml", candidate)
    champion = json.loads(at(place, "champion.json"))
    assert (champion["version"], champion["revision"]) == ("v0.1.0", candidate)
    for tag in tags(place):
        assert run(place / "origin", "git", "rev-parse", f"{tag}^{{commit}}").strip() == candidate
        words = message(place, tag)
        assert words.startswith(
            f"twice the night pictures\n\nCandidate: retrain/good ({candidate})\nApproved-by: Ann Example\n"
        )
        assert "accepted on val" in words
    who = run(place / "origin", "git", "for-each-ref", "--format", "%(taggername)", "refs/tags")
    assert who.splitlines() == ["Ann Example"] * 2
    assert not (place / "machine" / "tries" / candidate[:12]).exists()

    # Again, as after a kill between push and smoke test: nothing new.
    before = refs(place)
    assert promotion.promote(origin, candidate, ANN, machine) == done
    assert refs(place) == before

    # What main says is what `dvc repro` makes, and what was run.
    run(place / "clone", "git", "pull", "-q")
    run(place / "clone", "dvc", "pull", "-q")
    run(place / "clone", "dvc", "repro", "-q")
    assert run(place / "clone", "git", "status", "--porcelain") == ""
    run(place / "clone", sys.executable, "-m", "pipeline.verify", PYTHONPATH=str(publish.ROOT))

    # The pull request of the branch is squashed, as a forge does it: the registry stays as it is.
    tagged, champion = before.splitlines()[-2:], at(place, "champion.json")
    run(place / "clone", "git", "merge", "-q", "--squash", "-X", "ours", "origin/retrain/good")
    run(place / "clone", "git", "commit", "-q", "--allow-empty", "-m", "Retrain (#1)")
    run(place / "clone", "git", "push", "-q", "origin", "main")
    assert refs(place).splitlines()[-2:] == tagged
    assert at(place, "champion.json") == champion
    assert consume(origin, tmp_path / "got") == 6

    # A candidate that was held against no champion, and main has one now: it is refused, and nothing lost.
    before = refs(place)
    with pytest.raises(PipelineError, match=r"main has another code or champion than .* retrain from main: .*promote"):
        promotion.promote(origin, "retrain/better", ANN, machine)
    assert refs(place) == before

    # One whose SavedModel is none, though its checksums are right: what was before comes back.
    commit_and_push(place / "clone", "models/2/saved_model.pb", "none")
    run(place / "clone", "git", "switch", "-q", "-c", "retrain/broken")
    commit_candidate(place / "clone", 0.6, 2)
    run(place / "clone", "dvc", "push", "-q", "--run-cache")
    run(place / "clone", "git", "push", "-q", "origin", "retrain/broken")
    good = [at(place, path) for path in ("champion.json", "dvc.lock", "metrics.json", "champion/bundle.dvc")]
    words = r"smoke test of v0\.2\.0: the SavedModel does not detect: .*; rolled back: .* v0\.1\.0 is in prod"
    with pytest.raises(PipelineError, match=words):
        promotion.promote(origin, "retrain/broken", ANN, machine)
    assert [at(place, path) for path in ("champion.json", "dvc.lock", "metrics.json", "champion/bundle.dvc")] == good
    assert tags(place) == [*(f"detector#prod#{number}" for number in (1, 2, 3)), "detector@v0.1.0", "detector@v0.2.0"]
    assert message(place, "detector#prod#3").startswith("Roll back v0.2.0: its smoke test failed\n\nthe SavedModel")
    assert run(place / "origin", "git", "rev-parse", "detector#prod#3^{commit}").strip() == candidate


def commit_and_push(repo, path, text):
    (repo / path).write_text(text)
    run(repo, "git", "add", path)
    run(repo, "git", "commit", "-q", "-m", f"Write {path}")
    run(repo, "git", "push", "-q", "origin", "HEAD:main")
    return run(repo, "git", "rev-parse", "HEAD").strip()


def test_a_failed_gate_is_overridden_with_a_reason_and_a_killed_promotion_run_again(place, machine):
    line = [sys.executable, "-m", "pipeline.promotion", "retrain/bad", "--remote", str(place / "origin")]
    line += ["--approved-by", "Ann Example", "--note", "twice  the\nnight pictures"]
    variables = {"EFFDET_RETRAINING": machine.retraining.model_dump_json(), "PYTHONPATH": str(publish.ROOT)}
    before = refs(place)
    refused = subprocess.run(line, cwd=place, env={**os.environ, **variables}, capture_output=True, text=True)
    assert refused.returncode == 1
    words = (
        r"error: retrain/bad \([0-9a-f]{10}\): the gate's decision is rejected; only accepted goes on, or an override"
    )
    assert re.match(words, refused.stderr.splitlines()[-1])
    assert refs(place) == before

    line += ["--override", "val is wrong"]
    with subprocess.Popen(
        line, cwd=place, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True
    ) as process:
        for text in process.stderr:
            if "Running stage 'promote'" in text:
                process.kill()
    assert process.returncode == -9
    assert refs(place) == before
    done = json.loads(run(place, *line, **variables).splitlines()[-1])
    assert (done["version"], done["after"]) == ("v0.1.0", "")
    assert tags(place) == ["detector#prod#1", "detector@v0.1.0"]
    said = f"twice the night pictures\n\nCandidate: retrain/bad ({done['candidate']})\nApproved-by: Ann Example\n"
    said += "Override: val is wrong\n"
    assert all(message(place, tag).startswith(said) for tag in tags(place))
    champion = json.loads(at(place, "champion.json"))["decision"]
    assert champion["decision"] == "accepted"
    assert champion["rules"][-1] == {
        "rule": "overridden: val is wrong",
        "candidate": "rejected",
        "required": "accepted",
        "passed": True,
    }
    assert json.loads(at(place, "metrics.json"))["gate"]["decision"] == "rejected"  # what the gate said stays


def test_the_first_version_that_fails_its_smoke_test_leaves_none_in_production(place, machine, monkeypatch):
    # Its pull request was squashed, and the branch deleted: what was published is there still.
    clone(str(place / "origin"), place / "clone")
    run(place / "clone", "git", "merge", "-q", "--squash", "origin/retrain/good")
    run(place / "clone", "git", "commit", "-q", "-m", "Retrain (#1)")
    run(place / "clone", "git", "push", "-q", "origin", "main")
    run(place / "origin", "git", "update-ref", "refs/candidates/good", "retrain/good")
    run(place / "origin", "git", "branch", "-q", "-D", "retrain/good")
    before = run(place / "origin", "git", "rev-parse", "main^{tree}")

    def unreachable(*_):
        raise PipelineError("`dvc artifacts get`: no route to store")

    monkeypatch.setattr(smoke_test, "smoke_test", unreachable)
    pushed, pushes = promotion.pushed, []

    def only_once(work, *gone):  # the network goes down between push and smoke test
        pushes.append(gone)
        if len(pushes) > 1:
            raise PipelineError("git push: no route to host")
        return pushed(work, *gone)

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "pushed", only_once)
        with pytest.raises(Preempted, match=r"no route to store; not rolled back: git push: no route to host; run it"):
            promotion.promote(str(place / "origin"), "retrain/good", ANN, machine)
    assert tags(place) == ["detector#prod#1", "detector@v0.1.0"]

    # Run again, it repeats the smoke test.
    with pytest.raises(PipelineError, match=r"no route to store; rolled back: .* no version is in prod"):
        promotion.promote(str(place / "origin"), "retrain/good", ANN, machine)
    assert tags(place) == ["detector@v0.1.0"]
    assert run(place / "origin", "git", "rev-parse", "main^{tree}") == before
    log = run(place / "origin", "git", "log", "--format=%an: %s", "main").splitlines()
    who = "Ann Example"
    assert log[:2] == [f"{who}: Roll back v0.1.0: its smoke test failed", f"{who}: Make v0.1.0 the champion"]


@pytest.mark.parametrize("name", ["", " Ann", "<ann>", "Ann\nExample"])
def test_a_name_that_git_would_not_take(name):
    with pytest.raises(ValueError, match="approved_by"):
        Approval(approved_by=name)
