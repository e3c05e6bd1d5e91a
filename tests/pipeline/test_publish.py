"""prepare, publish and clean_up with real git and real DVC, on the small pipeline behind a bare remote."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from pipeline.clean_up import clean_up
from pipeline.errors import PipelineError
from pipeline.prepare import overridden, prepare
from pipeline.publish import publish
from pipeline.stage_runner import Result, run_stage
from pipeline.verify import read_lock
from tests.pipeline.retraining import STAGES, Team, run_all
from tests.pipeline.small_forge import TOKEN, running
from tests.pipeline.small_pipeline import ENVIRONMENT, Repository
from tests.walking import blocks, walk

pytestmark = pytest.mark.slow

CHECK = """\
import sys
text = open("params.yaml").read()
sys.exit(0 if "rate: 0." in text else f"error: params.yaml: train.rate: expected a fraction in {text}")
"""


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    return Team(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Team, dict[str, Result]]:
    """A run with seed 7, not published; only read."""
    team = Team(tmp_path_factory.mktemp("finished"))
    return team, run_all(team.request("one", seed=7), team.machine("a"))


def on_hub(team: Team, revision: str, path: str) -> str:
    return Repository(team.hub).run("git", "show", f"{revision}:{path}")


def with_its_own_check(team: Team) -> str:
    """The commit, pushed."""
    (team.person.path / "pipeline").mkdir()
    (team.person.path / "pipeline/__init__.py").touch()
    (team.person.path / "pipeline/params_check.py").write_text(CHECK)
    team.person.commit("its own check")
    team.push()
    return team.person.run("git", "rev-parse", "HEAD").strip()


def test_prepare_pins_a_commit_of_a_branch_and_checked_parameters(team: Team) -> None:
    pushed = with_its_own_check(team)
    machine = team.machine("a")
    found = prepare(str(team.hub), "main", machine, reason="more\n data", overrides={"train.rate": 0.25})
    assert (found.revision, found.base, found.reason) == (pushed, "main", "more data")
    assert "rate: 0.25" in found.params
    assert prepare(str(team.hub), pushed[:10], machine, reason="by commit").base == "main"
    assert prepare(str(team.hub), None, machine, reason="the default branch").revision == pushed
    with pytest.raises(PipelineError, match=r"train\.rate: expected a fraction"):
        prepare(str(team.hub), "main", machine, reason="wrong", overrides={"train.rate": "$(touch /tmp/x)"})
    assert not [*(team.folder / "a/tries").glob("*/*")]  # it takes no failed stage's place
    with pytest.raises(PipelineError, match=r"train\.rat: no such key"):
        prepare(str(team.hub), "main", machine, reason="wrong", overrides={"train.rat": 0.1})
    with pytest.raises(PipelineError, match=r"GiB are free, retraining\.min_free_gib wants"):
        prepare(str(team.hub), "main", team.machine("b", min_free_gib=1e6), reason="full")
    team.person.run("git", "commit", "--quiet", "--allow-empty", "--message", "unpushed")
    unpushed = team.person.run("git", "rev-parse", "HEAD").strip()
    with pytest.raises(PipelineError, match="is no revision of"):
        prepare(str(team.hub), unpushed, machine, reason="wrong")
    team.person.run("git", "push", "--quiet", "origin", "HEAD:refs/tags/of-no-branch")
    with pytest.raises(PipelineError, match="is on no branch of"):
        prepare(str(team.hub), "of-no-branch", machine, reason="wrong")
    for run_id in ("../x", "-x", "a/b"):
        with pytest.raises(PipelineError, match="run: run: string should match"):
            prepare(str(team.hub), "main", machine, reason="wrong", run_id=run_id)


def test_overrides_keep_comments() -> None:
    text = "a: 1  # why\nn: null\nb:\n  c: [1, 2]  # these\n"
    assert overridden(text, {"b.c": [3], "a": 2}) == "a: 2  # why\nn: null\nb:\n  c: [3]     # these\n"
    assert overridden(text, {}) == text


def test_a_run_becomes_one_commit_on_its_branch_and_stays_it(team: Team) -> None:
    machine = team.machine("a")
    request = team.request("one", seed=7)
    results = run_all(request, machine)
    results["train"] = results["train"].model_copy(update={"timings": "7\n"})  # for the report alone
    found = publish(request, list(results.values()), team.machine("b"))
    assert (found.branch, found.base, found.behind, found.pull_request) == ("retrain/one", "main", "", "")
    lock = read_lock(on_hub(team, found.branch, "dvc.lock"))
    assert lock == {name: results[name].entry for name in STAGES}
    assert "seed: 7" in on_hub(team, found.branch, "params.yaml")
    assert (found.decision, found.split, found.AP, found.table) == ("", "", None, "")  # it has no metrics.json
    report = on_hub(team, found.branch, "report.md")
    assert report.startswith(f"# Review of this branch against commit {request.revision[:8]}")
    assert "| `seed` | `1` | `7` |" in report
    changed = Repository(team.hub).run("git", "diff", "--name-only", "main", found.branch).split()
    assert changed == ["dvc.lock", "params.yaml", "report.md"]  # scores.json came out the same
    assert "Retraining-Run: one" in Repository(team.hub).run("git", "log", "-1", "--format=%B", found.branch)
    assert publish(request, list(results.values()), machine) == found  # a retry
    assert on_hub(team, "refs/candidates/one", "dvc.lock") == on_hub(team, found.branch, "dvc.lock")
    other = team.request("one", seed=8)
    with pytest.raises(PipelineError, match=r"retrain/one: published already, with other dvc\.lock, params\.yaml"):
        publish(other, list(run_all(other, machine).values()), machine)
    with pytest.raises(PipelineError, match="one is published already, as retrain/one"):
        prepare(str(team.hub), "main", machine, reason="again", run_id="one")


def test_the_commands_of_the_page_make_a_candidate(
    team: Team, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    with_its_own_check(team)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EFFDET_RETRAINING", team.machine("a").retraining.model_dump_json())
    (team.folder / "caller").mkdir()
    words = {
        "ssh://git.local/detector.git": team.hub,
        "train.epochs=40": "train.rate=0.4",
        "download validate shard train evaluate promote": " ".join(STAGES),
    }
    steps = blocks("stage_runner.md", f"walk: tests/pipeline/test_publish.py::{request.node.name}")
    walk(Repository(team.folder / "caller"), steps, words)
    run = json.loads((team.folder / "caller" / "run.json").read_text())["run"]
    assert "rate: 0.4" in on_hub(team, f"retrain/{run}", "params.yaml")
    assert set(read_lock(on_hub(team, f"retrain/{run}", "dvc.lock"))) == set(STAGES)


def test_main_that_moved_elsewhere_is_built_upon(team: Team) -> None:
    request = team.request("one", seed=7)
    results = list(run_all(request, team.machine("a")).values())
    (team.person.path / "README").write_text("words\n")
    team.person.commit("words")
    team.push()
    found = publish(request, results, team.machine("a"))
    assert found.behind == ""
    assert Repository(team.hub).run("git", "rev-parse", f"{found.branch}^", "main").split()[0] == (
        team.person.run("git", "rev-parse", "HEAD").strip()
    )
    assert on_hub(team, found.branch, "README") == "words\n"


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("train.sh", "cat", "cat  ", "main moved on, and the run is none of its code: warning: train: not what"),
        ("params.yaml", "rate: 0.1", "rate: 0.2", "main has other parameters since the run began"),
    ],
)
def test_main_that_moved_under_the_run_is_named_and_the_run_not_lost(
    team: Team, file: str, old: str, new: str, reason: str
) -> None:
    request = team.request("one", seed=7)
    results = list(run_all(request, team.machine("a")).values())
    team.person.edit(file, old, new)
    team.person.commit("other inputs")
    team.push()
    found = publish(request, results, team.machine("a"))
    assert found.behind.startswith(reason)
    parent = Repository(team.hub).run("git", "rev-parse", f"{found.branch}^").strip()
    assert parent == request.revision


def test_results_of_two_runs_are_refused(finished: tuple[Team, dict[str, Result]]) -> None:
    team, results = finished
    machine = team.machine("b")
    other = run_stage(team.request("two", seed=8), "prepare", [], machine)
    mixed = [results["fetch"], other, results["train"]]
    with pytest.raises(PipelineError, match=r"not of one run:\ntrain: was run on data\.txt"):
        publish(team.request("one", seed=7), mixed, machine)
    with pytest.raises(PipelineError, match="results: none of train; every stage"):
        publish(team.request("one", seed=7), mixed[:2], machine)
    with pytest.raises(PipelineError, match="does not verify on its own revision"):  # other parameters than were run
        publish(team.request("one", seed=9), list(results.values()), machine)
    assert "retrain/" not in Repository(team.hub).run("git", "branch", "--list")


def test_a_pull_request_is_opened_where_a_token_is(
    finished: tuple[Team, dict[str, Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    team, results = finished
    with running() as forge:
        monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
        monkeypatch.setenv("GITHUB_REPOSITORY", "o/r")
        monkeypatch.setenv("GITHUB_API_URL", forge.url)
        found = publish(team.request("one", seed=7), list(results.values()), team.machine("a"))
        assert found.pull_request.startswith(f"{forge.url}/o/r/pull/")
        assert forge.pulls[0]["head"].endswith("retrain/one")
        assert "| train | run |" in forge.pulls[0]["body"]
        publish(team.request("one", seed=7), list(results.values()), team.machine("a"))
        assert len(forge.pulls) == 1


def test_clean_up_frees_what_nothing_needs(team: Team) -> None:
    team.push_data()
    machine = team.machine("a")
    for run, seed in (("kept", 7), ("dropped", 8)):
        request = team.request(run, seed=seed)
        results = run_all(request, machine)
        if run == "kept":
            publish(request, list(results.values()), machine)
    objects = team.folder / "a/cache/files/md5"
    store = team.folder / "store/files/md5"
    kept, dropped = (path_of(f"seed: {seed}\n") for seed in (7, 8))
    stray, waiting, done = (team.folder / "a/checkpoints" / run / "train/step" for run in ("dropped", "waits", "kept"))
    for path in (stray, waiting, done):
        path.parent.mkdir(parents=True)
        path.write_text("state")
    for path in (stray, stray.parent):
        os.utime(path, (0, 0))
    said = clean_up(str(team.hub), machine, dry_run=True, also_remote=True)
    assert any("would free" in line and "checkpoints/dropped/train" in line for line in said)
    assert all(path.exists() for path in (stray, objects / kept, objects / dropped, store / dropped))
    clean_up(str(team.hub), machine, dry_run=False, also_remote=False)
    assert not stray.exists()
    assert not done.exists()  # its run is published
    assert waiting.exists()  # for the next try of a run of which no work tree is left
    assert (objects / kept).exists()
    assert not (objects / dropped).exists()
    assert (store / dropped).exists()
    clean_up(str(team.hub), machine, dry_run=False, also_remote=True)
    assert not (store / dropped).exists()
    assert all((store / path_of(f"seed: {seed}\n")).exists() for seed in (1, 7))  # main's and retrain/kept's
    again = run_stage(team.request("again", seed=8), "prepare", [], machine)
    assert not again.cached  # its record alone is no result
    assert (store / dropped).exists()


def path_of(content: str) -> Path:
    """Below files/md5."""
    digest = hashlib.md5(content.encode()).hexdigest()
    return Path(digest[:2], digest[2:])
