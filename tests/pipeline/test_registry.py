"""Versions, stages and the champion, in a small repository with real git, DVC and GTO; remotes are folders and ssh."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from pipeline import registry
from pipeline.errors import PipelineError
from pipeline.gate import Served, write_times
from pipeline.params import Promote as Limits
from tests.pipeline.small_registry import (
    ENVIRONMENT,
    clone,
    commit_candidate,
    consume,
    params,
    run,
    write_models,
    write_repository,
)

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A repository with a candidate that was accepted, and its remotes beside it."""
    folder = tmp_path_factory.mktemp("registry")
    write_models(folder / "models")
    run(folder, "git", "init", "-q", "--bare", "-b", "main", "origin")
    write_repository(folder / "repo", folder / "models", "../origin", "../store")
    run(folder / "repo", "dvc", "remote", "modify", "store", "url", str(folder / "store"))
    commit_candidate(folder / "repo", 0.4, added=1)
    return folder


@pytest.fixture
def place(first, tmp_path, monkeypatch):
    """The same for one test, which stands in the repository."""
    folder = tmp_path / "place"
    shutil.copytree(first, folder, symlinks=True)
    config = folder / "repo" / ".dvc" / "config"
    config.write_text(config.read_text().replace(str(first), str(folder)))
    run(folder / "repo", "git", "commit", "-q", "-a", "-m", "Store here")
    monkeypatch.chdir(folder / "repo")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """command("rollback prod") -> what it printed. PipelineError as it comes."""

    def call(line, *more):
        monkeypatch.setattr(sys, "argv", ["promote", *line.split(), *more])
        capsys.readouterr()
        registry.main()
        return capsys.readouterr().out

    return call


def state(repo):
    """All that a command may change, in git and on the remote."""
    return [
        run(repo, "git", "status", "--porcelain"),
        run(repo, "git", "for-each-ref", "--format", "%(refname) %(objectname)"),
        run(repo, "git", "ls-remote", "origin"),
    ]


def test_two_versions_promoted_rolled_back_and_listed(place, command, tmp_path):
    repo, origin = place / "repo", place / "origin"
    commit_1 = run(repo, "git", "rev-parse", "HEAD").strip()
    command("promote --push origin --why", "first model")
    assert registry.standing("prod") == "v0.1.0"
    assert registry.version_named("v0.1.0").commit == commit_1  # the candidate's, not the champion's commit behind it
    check_champion(repo, "v0.1.0", commit_1, ap="0.4")
    check_second_call(repo, command, "promote --push origin")
    command("check")

    # Another clone gets the same, and has nothing to run.
    clone(origin, place / "clone")
    run(place / "clone", "dvc", "pull", "-q")
    assert run(place / "clone", "dvc", "status").strip() == "Data and pipelines are up to date."
    run(place / "clone", "dvc", "repro", "-q")
    assert run(place / "clone", "git", "status", "--porcelain") == ""
    assert consume(origin, tmp_path / "got-1") == 6  # 5 + 1

    commit_2 = commit_candidate(repo, 0.5, added=2)
    command("promote --push origin --why", "more data")
    check_champion(repo, "v0.2.0", commit_2, ap="0.5")
    assert consume(origin, tmp_path / "got-2") == 7
    assert consume(place / "repo", tmp_path / "got-here") == 7

    command("rollback --push origin --why", "misses small boxes")
    check_champion(repo, "v0.1.0", commit_1, ap="0.4")
    assert consume(origin, tmp_path / "got-3") == 6
    check_second_call(repo, command, "rollback --push origin")
    command("check")

    words = command("history --html", str(tmp_path / "versions.html"))
    versions, made = words.split("\n\n")
    rows = [re.split(" {2,}", line) for line in versions.splitlines()[1:]]
    assert [(row[0], row[1]) for row in rows] == [("v0.2.0", "0.5000"), ("v0.1.0", "0.4000")]
    assert ["prod" in row for row in rows] == [False, True]
    whys = [re.split(" {2,}", line)[-1] for line in made.splitlines()[1:4]]
    assert whys == ["misses small boxes", "more data", "first model"]
    assert made.count("Ann Example") == 3
    drawn = (tmp_path / "versions.html").read_text()
    assert drawn.count("<circle") == 2
    assert drawn.count("<polyline") == 1  # the same data
    assert "http" not in drawn

    # What was rolled back comes again only when it was held against the champion that is.
    with pytest.raises(PipelineError, match=r"not what .* says: promote; "):
        command("promote")
    run(repo, "dvc", "repro", "-q")
    run(repo, "git", "commit", "-q", "-a", "-m", "Judge it again")
    command("promote")
    check_champion(repo, "v0.2.0", commit_2, ap="0.5")

    # An older version that somebody chose is none that was put back.
    for name in ("v0.2.0", "v0.1.0"):
        command(f"assign {name} staging")
    command("rollback staging")
    assert registry.standing("staging") == "v0.2.0"
    assert len(registry.versions()) == 2


def check_champion(repo, version, commit, ap):
    champion = json.loads((repo / "champion.json").read_text())
    assert (champion["version"], champion["revision"]) == (version, commit)
    assert champion["decision"]["candidate"]["metrics"] == {"AP": float(ap)}
    assert json.loads((repo / "champion" / "detections.json").read_text()) == [float(ap)]
    assert run(repo, "git", "log", "-1", "--format=%s").strip() == f"Make {version} the champion"
    assert run(repo, "git", "status", "--porcelain") == ""


def check_second_call(repo, command, line):
    before = state(repo)
    command(line)
    assert state(repo) == before


def test_tag_says_why_and_of_what(place, command):
    commit = run(place / "repo", "git", "rev-parse", "HEAD").strip()
    made = registry.read_decision(place / "repo" / "data" / "release" / "decision.json")
    write_times(made, Served(1.0, 8, 8, 20.0, 16.0), Limits.model_construct(max_latency_ms=9.0, max_latency_ratio=9.0))
    command("register --why", "the first")
    assert "v0.1.0 is registered" in command("register")
    message = registry.version_named("v0.1.0").message
    assert message.startswith(
        "the first\n\naccepted on val (also used for selection): AP 0.4000, AP50 0.4000, AP75 none\n"
        "SavedModel, as measured for this decision: 20 ms an image, the champion's 16, ratio 1.25\ndvc.lock\n"
    )
    for stage, outs in registry.outs_at(commit).items():
        for path, hash_ in outs.items():
            assert f"  {stage} {path} {hash_}\n" in message
    assert re.search(r"\nrequirements/ml.txt sha256:[0-9a-f]{64}\nsmall 1\.2\.0$", message)
    assert registry.standing("prod") is None
    assert (place / "repo" / "champion.json").read_text() == "{}\n"


def test_another_stage_leaves_the_champion(place, command):
    head = run(place / "repo", "git", "rev-parse", "HEAD")
    command("register")
    command("assign v0.1.0 staging")
    assert "v0.1.0 is in staging" in command("assign v0.1.0 staging")
    assert [made.tag for made in registry.assignments()] == ["detector#staging#1"]
    assert run(place / "repo", "git", "rev-parse", "HEAD") == head
    assert "no champion" in command("check")


def test_what_was_not_accepted_is_not_registered(place, command):
    commit_candidate(place / "repo", 0.05)
    for line in ("register", "promote"):
        with pytest.raises(PipelineError, match=r"the gate's decision is rejected; only accepted goes on"):
            command(line)
    assert run(place / "repo", "git", "tag") == ""


def test_what_is_not_committed_is_not_registered(place, command):
    (place / "repo" / "params.yaml").write_text(params(0.6))
    with pytest.raises(PipelineError, match=r"not committed: params\.yaml; "):
        command("promote")
    run(place / "repo", "git", "commit", "-q", "-a", "-m", "No run made this")
    with pytest.raises(PipelineError, match=r"not what .* says: evaluate, promote; "):
        command("promote")


def test_promotion_that_breaks_off_leaves_nothing_and_goes_on(place, command, monkeypatch):
    repo = place / "repo"
    head = run(repo, "git", "rev-parse", "HEAD")
    monkeypatch.setattr(registry, "_show", lambda *line: (_ for _ in ()).throw(PipelineError("a full disk")))
    with pytest.raises(PipelineError, match="a full disk"):
        command("promote")
    assert run(repo, "git", "rev-parse", "HEAD") == head
    assert run(repo, "git", "status", "--porcelain") == ""
    assert registry.standing("prod") is None
    monkeypatch.undo()
    monkeypatch.chdir(repo)
    monkeypatch.setattr(sys, "argv", ["promote", "promote"])
    registry.main()
    assert registry.standing("prod") == "v0.1.0"
    assert len(registry.versions()) == 1


def test_a_second_promotion_that_breaks_off_leaves_the_first(place, command, monkeypatch):
    repo = place / "repo"
    command("promote")
    commit_candidate(repo, 0.6, 2)
    held = {path: path.read_bytes() for path in sorted((repo / "champion").rglob("*")) if path.is_file()}
    released = (repo / "data/release/decision.json").read_bytes()

    def broken(*line):
        (repo / "data/release/decision.json").unlink()
        raise PipelineError("a full disk")

    monkeypatch.setattr(registry, "_show", broken)
    with pytest.raises(PipelineError, match="a full disk"):
        command("promote")
    assert {path: path.read_bytes() for path in sorted((repo / "champion").rglob("*")) if path.is_file()} == held
    assert (repo / "data/release/decision.json").read_bytes() == released


def test_champion_that_the_tags_do_not_know(place, command):
    command("promote")
    run(place / "repo", "git", "tag", "-d", "detector#prod#1")
    with pytest.raises(PipelineError, match=r"champion is v0\.1\.0 \(.*\), and the tags have none in prod; "):
        command("check")
    command("promote")  # as after one that broke off between commit and tag
    command("check")
    assert run(place / "repo", "git", "log", "--format=%s").count("champion") == 1


def test_files_that_are_not_ours(place, command):
    (place / "repo" / "champion.json").write_text('{"decision": "accepted"}')
    with pytest.raises(PipelineError, match=r"champion\.json: version: Field required"):
        command("check")
    (place / "repo" / "metrics.json").write_text("[]")
    run(place / "repo", "git", "commit", "-q", "-a", "-m", "By hand")
    run(place / "repo", "gto", "register", "detector", "HEAD")
    with pytest.raises(PipelineError, match=r"metrics\.json of [0-9a-f]{10}: is not what the promote stage writes"):
        command("history")


def test_tag_of_a_clock_that_is_ahead(place, command):
    command("register")
    command("assign v0.1.0 staging")
    newest = {"GIT_COMMITTER_DATE": "2037-01-01T00:00:00Z"}
    run(place / "repo", "git", "tag", "-a", "-m", "later", "detector#staging#2", "detector@v0.1.0^{}", **newest)
    with pytest.raises(PipelineError, match=r"the newest tag is of 2037-01-01 00:00 UTC"):
        command("assign v0.1.0 canary")


def test_nothing_to_roll_back_to(place, command):
    with pytest.raises(PipelineError, match="nothing to roll back to, no version stood there"):
        command("rollback")
    command("promote")
    with pytest.raises(PipelineError, match=r"nothing to roll back to, only v0\.1\.0 stood there"):
        command("rollback")
    with pytest.raises(PipelineError, match=r"v9\.0\.0: no version of detector; registered here: v0\.1\.0"):
        command("assign v9.0.0 prod")


def test_commands_are_reached_through_promote(place):
    words = run(place / "repo", sys.executable, "-m", "pipeline.promote", "history", PYTHONPATH=str(ROOT))
    assert words == "no version is registered\n"


def test_path_of_the_artifact_is_the_release():
    from ruamel.yaml import YAML

    content = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
    assert content["artifacts"][registry.ARTIFACT]["path"] == registry.RELEASE
    assert registry.RELEASE in content["stages"]["promote"]["outs"]
