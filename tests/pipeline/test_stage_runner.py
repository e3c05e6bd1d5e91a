"""The stage runner with real git, real DVC and real kills; each protection shown by its absence too."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import lock_entries, stage_runner, work_trees
from pipeline.errors import PipelineError, Preempted
from pipeline.lock_entries import Stage, read_stages
from pipeline.stage_runner import Result, run_stage, trained_ap
from pipeline.verify import Entry, read_lock
from pipeline.work_trees import Try
from tests.pipeline.retraining import Team, consumed, out, run_all, start
from tests.pipeline.small_pipeline import merged

pytestmark = pytest.mark.slow


@pytest.fixture
def team(tmp_path: Path) -> Team:
    return Team(tmp_path)


def test_two_machines_hand_over_and_a_third_finds_all_cached(team: Team) -> None:
    team.person.edit("train.sh", "cat", "mkdir -p data/timings\necho 7 > data/timings/train.json\ncat")
    team.person.commit("measures")
    team.push()
    first = run_all(team.request("one", seed=7), team.machine("a"), team.machine("b"))
    assert [result.cached for result in first.values()] == [False, False, False]
    assert [result.timings for result in first.values()] == ["", "", "7\n"]
    assert first["train"].files == {"scores.json": '{"AP": 0.5}\n'}
    cold = team.machine("c")
    second = run_all(team.request("two", seed=7), cold)
    assert [result.cached for result in second.values()] == [True, True, True]
    assert [result.timings for result in second.values()] == ["", "", ""]  # nothing was measured
    for name, result in second.items():
        assert (result.entry, result.files) == (first[name].entry, first[name].files)
    assert not list((team.folder / "c" / "tries").glob("*/*"))  # nothing is left of what went well


def test_a_persisted_output_is_cached_once_its_run_is_on_a_branch(team: Team) -> None:
    changed = run_stage(team.request("one", address="there"), "fetch", [], team.machine("a"))
    assert not changed.cached
    team.person.run("git", "checkout", "--quiet", "-b", "retrain/one")
    lock = read_lock((team.person.path / "dvc.lock").read_text())
    lock_entries.write_lock(team.person.path, {**lock, "fetch": changed.entry})
    team.person.commit("as publish does")
    team.person.run("git", "push", "--quiet", "origin", "HEAD")
    again = run_stage(team.request("two", address="there"), "fetch", [], team.machine("b"))
    assert again.cached
    assert again.entry == changed.entry


def whole_lock(found: Try, stage: Stage, entries: Mapping[str, Entry], source: Path, revision: str) -> None:
    """In place of begin_lock: the revision's lock, with upstream's entries."""
    lock_entries.write_lock(found.tree, {**read_lock((found.tree / "dvc.lock").read_text()), **entries})


def test_a_false_skip_is_prevented_and_found(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    request, machine = team.request("one", seed=7), team.machine("a")
    upstream = [run_stage(request, "prepare", [], machine)]
    assert consumed(run_stage(request, "train", upstream, machine)) == out(upstream[0], "data.txt")
    team.push_data()
    monkeypatch.setattr(stage_runner, "begin_lock", whole_lock)
    monkeypatch.setattr(stage_runner, "pull_dependencies", lambda *given: None)
    fresh = team.machine("b")
    with pytest.raises(
        PipelineError, match=r"train: consumed data\.txt [0-9a-f]{32}, and prepare produced [0-9a-f]{32}"
    ):
        run_stage(request, "train", upstream, fresh)
    monkeypatch.setattr(stage_runner, "check_consumed", lambda *given: None)
    wrong = run_stage(request, "train", upstream, fresh)
    assert wrong.cached  # "up to date", on other data than upstream's
    assert consumed(wrong) != out(upstream[0], "data.txt")


def test_a_lock_merged_by_git_is_not_believed(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    team.push_data()
    merged(team.person)
    team.push_data()
    team.push()
    request, machine = team.request("one"), team.machine("a")
    upstream = [run_stage(request, "prepare", [], machine)]
    assert not run_stage(request, "train", upstream, machine).cached
    assert not run_stage(request, "fetch", [], machine).cached
    monkeypatch.setattr(stage_runner, "begin_lock", whole_lock)
    other = team.request("two")
    assert run_stage(other, "train", upstream, team.machine("b")).cached  # which nobody ever ran
    assert run_stage(other, "fetch", [], team.machine("b")).cached


def test_a_lock_that_another_dvc_holds_is_waited_for(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Try(team.folder / "try")
    team.person.copy(found.tree)
    held = "import time\nfrom dvc.repo import Repo\nwith Repo().lock:\n    print(flush=True)\n    time.sleep(5)"

    def status() -> list[str]:
        with subprocess.Popen([sys.executable, "-c", held], cwd=found.tree, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            return work_trees.dvc(found, "status")

    assert "Data and pipelines are up to date." in status()
    monkeypatch.setattr(work_trees, "WAIT", ())
    with pytest.raises(PipelineError, match="Unable to acquire lock"):
        status()


def test_eight_at_once_on_one_cache(team: Team) -> None:
    machine = team.machine("a")
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(run_stage, team.request(f"r{n}", seed=n), "prepare", [], machine) for n in range(8)]
        found = [future.result() for future in futures]
    for number, result in enumerate(found):
        assert not result.cached or number == 1  # the committed seed
        expected = hashlib.md5(f"seed: {number}\n".encode()).hexdigest()
        assert out(result, "data.txt") == expected
        assert (team.folder / "store/files/md5" / expected[:2] / expected[2:]).exists()


def test_killed_at_any_point_it_is_run_again(team: Team) -> None:
    request, machine = team.request("one", seed=7), team.machine("a")
    upstream = [run_stage(request, "prepare", [], team.machine("b"))]
    unkilled = run_stage(
        team.request("other", seed=7), "train", upstream, team.machine("c", remote=team.copy_of_store())
    )
    assert not unkilled.cached
    for tenth in range(1, 10, 2):
        process = start(team.folder / "caller", request, "train", upstream, machine)
        time.sleep(unkilled.seconds * tenth / 10)
        process.kill()
        process.communicate()
    again = start(team.folder / "caller", request, "train", upstream, machine)
    told, log = again.communicate(timeout=120)
    assert again.returncode == 0, log
    result = Result(**json.loads(told.splitlines()[-1]))
    assert (result.entry, result.files) == (unkilled.entry, unkilled.files)
    cold = run_stage(team.request("third", seed=7), "train", upstream, team.machine("d"))
    assert cold.cached  # what was pushed is whole
    assert cold.entry == unkilled.entry


def test_what_a_killed_runner_left_running_is_ended(team: Team) -> None:
    team.person.edit(
        "prepare.sh", "grep", "echo $$ >> ../../../../../pids\nsleep 0.1\n[ -e ../../../../../go ] || sleep 600\ngrep"
    )
    team.person.commit("slow")
    team.push()
    request, machine = team.request("one", seed=7), team.machine("a")
    process = start(team.folder / "caller", request, "prepare", [], machine)
    pids = team.folder / "a" / "pids"
    while not pids.exists() or not pids.read_text().strip():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    orphan = int(pids.read_text().split()[0])
    os.kill(orphan, 0)  # is alive
    (team.folder / "a" / "go").touch()
    assert not run_stage(request, "prepare", [], machine).cached
    assert not work_trees.processes_of(team.folder / "a/tries/one/prepare/1")
    with contextlib.suppress(ProcessLookupError):
        os.kill(orphan, signal.SIGKILL)
        pytest.fail("the first try still runs")


def test_a_failed_stage_says_why_and_the_last_failed_trees_stay(team: Team) -> None:
    team.person.edit("prepare.sh", "grep", "echo no such seed\nexit 3\ngrep")
    team.person.commit("broken")
    team.push()
    machine = team.machine("a", keep_failed=2)
    for run in ("one", "two", "three", "four"):
        with pytest.raises(
            PipelineError, match=rf"{run}/prepare/1: dvc .* stays in .*\n(.*\n)*no such seed\n(.*\n)*.*exited with 3"
        ):
            run_stage(team.request(run), "prepare", [], machine)
    left = sorted(path.name for path in (team.folder / "a" / "tries").iterdir() if path.is_dir())
    assert left == ["four", "three", "two"]  # the two before the last began, and that


def test_checkpoints_are_the_runs_own_and_go_when_the_stage_is_done(team: Team) -> None:
    stops_once = "at=$EFFDET_CHECKPOINT_DIR\n[ -e $at/step ] || { mkdir -p $at; touch $at/step; exit 75; }\ngrep"
    team.person.edit("prepare.sh", "grep", stops_once)
    team.person.commit("with checkpoints")
    team.push()
    request, machine = team.request("one"), team.machine("a")
    with pytest.raises(Preempted):
        run_stage(request, "prepare", [], machine)
    assert (team.folder / "a/checkpoints/one/prepare/step").exists()
    run_stage(request, "prepare", [], machine)
    assert not (team.folder / "a/checkpoints/one/prepare").exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [("train", "train: depends on prepare; its result was not given"), ("trian", "no stage 'trian'; there are fetch,")],
)
def test_a_wrong_call_is_named(team: Team, stage: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        run_stage(team.request("one"), stage, [], team.machine("a"))


def test_too_little_space_or_no_remote_is_said_first(team: Team) -> None:
    with pytest.raises(PipelineError, match=r"[0-9.]+ GiB are free, retraining.min_free_gib wants 1000000.0"):
        run_stage(team.request("one"), "prepare", [], team.machine("a", min_free_gib=1e6))
    with pytest.raises(PipelineError, match="no DVC remote to hand data over"):
        run_stage(team.request("one"), "prepare", [], team.machine("a", remote=None))


def test_a_models_ap_is_that_of_its_weights(tmp_path: Path) -> None:
    def model(epoch: int, table: str) -> Path:
        (tmp_path / "model.json").write_text(json.dumps({"weights": {"epoch": epoch}}))
        history = tmp_path / "dvclive/plots/metrics/val"
        history.mkdir(parents=True, exist_ok=True)
        (history / "AP.tsv").write_text(table)
        return tmp_path

    assert trained_ap(model(4, "step\tAP\n4\t0.5\n7\t0.25\n")) == 0.5  # not the last one
    assert trained_ap(model(7, "step\tAP\n7\t-1.0\n")) is None  # val has no boxes
    assert trained_ap(model(5, "step\tAP\n4\t0.5\n")) is None
    assert trained_ap(model(4, "AP\n0.5\n")) is None  # another layout
    (model(4, "step\tAP\n4\t0.5\n") / "model.json").write_text('{"weights": null}')
    assert trained_ap(tmp_path) is None
    assert trained_ap(tmp_path / "none") is None


def test_a_dependency_inside_an_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  a: {cmd: a, outs: [data]}\n  b: {cmd: b, deps: [data/part], outs: [c]}\n"
    )
    stages = read_stages(tmp_path)
    with pytest.raises(PipelineError, match="b depends on data/part, and a makes data; name data itself"):
        lock_entries.producers(stages["b"], stages)
