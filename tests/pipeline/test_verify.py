"""`python -m pipeline.verify`: real git and real DVC on a small pipeline."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import verify
from pipeline.errors import PipelineError
from tests.pipeline.small_pipeline import FILES, Repository, made, merged

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return made(tmp_path_factory.mktemp("made") / "repository")


@pytest.fixture
def repository(run_once: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A copy of its own, in which the test stands."""
    copied = run_once.copy(tmp_path / "repository")
    monkeypatch.chdir(copied.path)
    return copied


def lock() -> dict[str, Any]:
    return verify.read_lock(Path("dvc.lock").read_text())


def standings(found: verify.Verification) -> dict[str, str]:
    return {verdict.stage: verdict.standing for verdict in found.verdicts}


def remove_runs(repository: Repository) -> None:
    shutil.rmtree(repository.path / ".dvc/cache/runs")


def test_what_was_run_is_verified(repository: Repository) -> None:
    found = verify.verify()
    assert standings(found) == {"fetch": "as committed", "prepare": "run", "train": "run"}
    assert (found.warnings, found.cannot, found.exit_status) == ([], "", 0)


def test_a_cleanly_merged_lock_is_found(repository: Repository) -> None:
    merged(repository)
    assert "up to date" in repository.run("dvc", "status")
    found = verify.verify()
    # Each entry fits to the files and to the others: only the run-cache, and for `fetch` history, can tell.
    assert standings(found) == {"fetch": "not run", "prepare": "run", "train": "not run"}
    assert [warning.partition(";")[0] for warning in found.warnings] == [
        "fetch: DVC files no runs of it (a persist output, or none), and no commit has this entry but a merge",
        "train: no run produced this entry: its inputs in this combination are not in the run-cache",
    ]
    repository.run("dvc", "repro", "--quiet")  # is of no help: DVC takes all for up to date
    assert "warning: train" in repository.run("python", "-m", "pipeline.verify", exit_status=1)
    repository.run("dvc", "repro", "--quiet", "--force")
    assert standings(verify.verify())["train"] == "run"


def test_a_merge_not_committed_yet_is_found(repository: Repository) -> None:
    merged(repository)
    repository.run("git", "reset", "--quiet", "--hard", "HEAD^")
    repository.run("git", "merge", "--quiet", "--no-commit", "--no-ff", "code")
    assert standings(verify.verify()) == {"fetch": "not run", "prepare": "run", "train": "not run"}


def test_a_remote_with_data_and_no_run_cache_is_not_enough(repository: Repository, tmp_path: Path) -> None:
    repository.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    repository.run("dvc", "push", "--quiet")
    remove_runs(repository)
    assert verify.verify().cannot.startswith("no run-cache here and none on the remote")


def test_a_run_cache_on_the_remote_alone_is_enough(repository: Repository, tmp_path: Path) -> None:
    merged(repository)
    repository.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    repository.commit("remote")
    repository.run("dvc", "push", "--quiet", "--run-cache")
    repository.run("git", "checkout", "--quiet", "parameters", "--")
    repository.run("git", "checkout", "main", "--", ".dvc/config")
    remove_runs(repository)
    assert standings(verify.verify()) == {"fetch": "as committed", "prepare": "run", "train": "run"}
    repository.run("git", "checkout", "--quiet", "--force", "main")
    assert standings(verify.verify())["train"] == "not run"
    assert not (repository.path / ".dvc/cache/runs").exists()


@pytest.mark.parametrize(
    ("remote", "says"),
    [
        (None, "no run-cache here, and no default remote that could have one"),
        ("no-such-folder", "no run-cache here and none on the remote"),
        ("http://127.0.0.1:9/store", "no run-cache here, and no default remote that could have one"),
        ("ssh://127.0.0.1:9/store", "remote 'store' does not answer"),
        ("s3://bucket/store", "remote 'store' does not answer"),
    ],
)
def test_without_any_run_cache_nothing_is_verified(repository: Repository, remote: str | None, says: str) -> None:
    remove_runs(repository)
    if remote:
        repository.run("dvc", "remote", "add", "--default", "store", remote)
    found = verify.verify()
    assert standings(found) == {"fetch": "as committed", "prepare": "cannot verify", "train": "cannot verify"}
    assert found.cannot.startswith(says)
    assert found.exit_status == 2


def test_the_command_ends_with_2_when_it_cannot_verify(repository: Repository) -> None:
    remove_runs(repository)
    assert "cannot verify: no run-cache here" in repository.run("python", "-m", "pipeline.verify", exit_status=2)


def test_an_entry_accepted_by_commit_is_named(repository: Repository) -> None:
    repository.edit("train.sh", FILES["train.sh"], FILES["train.sh"] + "# a comment\n")
    repository.run("dvc", "commit", "--force", "--quiet", "train")
    found = verify.verify()
    notes = {verdict.stage: verdict.note for verdict in found.verdicts}
    assert notes["train"].startswith("accepted by `dvc commit`, or run again to the same bytes: since ")
    assert notes["train"].endswith(" changed train.sh")
    assert notes["prepare"] == ""
    assert found.exit_status == 0


def test_another_files_parameters_are_called_by_its_name() -> None:
    def entry(rate: float, version: str) -> dict[str, Any]:
        return {"cmd": "a", "params": {"params.yaml": {"rate": rate}, "pyproject.toml": {"project.version": version}}}

    assert verify.changed_inputs(entry(0.1, "1"), entry(0.1, "2")) == ["pyproject.toml"]
    assert verify.changed_inputs(entry(0.1, "1"), entry(0.2, "2")) == ["parameters", "pyproject.toml"]
    assert verify.changed_inputs(entry(0.1, "1"), {"cmd": "a"}) == ["parameters", "pyproject.toml"]


def test_a_run_with_other_outputs_is_not_said_to_be_accepted(repository: Repository) -> None:
    repository.edit("params.yaml", "rate: 0.1", "rate: 0.2")
    repository.run("dvc", "repro", "--quiet")
    assert [verdict.note for verdict in verify.verify().verdicts] == ["", "", ""]


def test_outputs_that_the_inputs_did_not_give(repository: Repository) -> None:
    entries = lock()
    entries["train"]["outs"][0]["md5"] = "0" * 32
    found = verify.verify(entries)
    assert found.warnings == [
        "train: runs with these inputs produced other outputs; run `dvc repro --force` or restore the entry"
    ]


def test_a_lock_composed_of_two_runs(repository: Repository) -> None:
    before = lock()
    repository.edit("params.yaml", "seed: 1", "seed: 2")
    repository.run("dvc", "repro", "--quiet")
    both = verify.composed(lock(), {"train": before["train"]})
    assert verify.disagreements(lock()) == {"fetch": [], "prepare": [], "train": []}
    old, new = before["prepare"]["outs"][0]["md5"][:8], lock()["prepare"]["outs"][0]["md5"][:8]
    words = f"was run on data.txt {old}, and prepare's is {new}"
    assert verify.disagreements(both) == {"fetch": [], "prepare": [], "train": [words]}
    found = verify.verify(both)
    assert standings(found)["train"] == "run"
    assert found.warnings == [f"train: {words}"]


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("params.yaml", "rate: 0.1", "rate: 0.3", "train: params.yaml: train.rate: 0.3 here, and 0.1 in the entry"),
        ("params.yaml", "seed: 1", "seed: null", "prepare: params.yaml: seed: None here, and 1 in the entry"),
        ("train.sh", "cat", "cat ", "train: not what the entry says: train.sh; run `dvc repro`"),
        ("scores.json", "0.5", "0.6", "train: not what the entry says: scores.json; run `dvc repro`"),
        ("dvc.yaml", "sh train.sh", "bash train.sh", "dvc.yaml's cmd is 'bash train.sh', the entry's 'sh train.sh'"),
        (
            "dvc.yaml",
            "deps: [data.txt, train.sh]",
            "deps: [data.txt]",
            "among deps of the entry alone: train.sh",
        ),
        ("dvc.yaml", "[model.txt]", "[model.txt, more.txt]", "train: among outs of dvc.yaml alone: more.txt"),
        ("dvc.yaml", "  train:", "  judge:", "train: dvc.lock has an entry, and dvc.yaml no such stage"),
        ("dvc.lock", "  prepare:", "  renamed:", "prepare: dvc.lock has no entry: it never ran; run `dvc repro`"),
    ],
)
def test_an_entry_that_does_not_fit(repository: Repository, file: str, old: str, new: str, says: str) -> None:
    repository.edit(file, old, new)
    found = verify.verify()
    assert any(says in warning for warning in found.warnings), found.warnings
    assert found.exit_status == 1


def test_files_that_are_missing_do_not_fit(repository: Repository) -> None:
    (repository.path / "params.yaml").unlink()
    (repository.path / "train.sh").unlink()
    warnings = verify.verify().warnings
    assert "train: params.yaml is missing" in warnings
    assert "train: not what the entry says: train.sh; run `dvc repro`" in warnings


def test_data_need_not_be_here(repository: Repository) -> None:
    for name in ("data.txt", "model.txt", "raw/file"):
        (repository.path / name).unlink()
    assert verify.verify().exit_status == 0


def test_a_file_that_dvc_tracks_is_held_against_its_dvc_file(repository: Repository) -> None:
    (repository.path / "champion").write_text("one")
    repository.run("dvc", "add", "--quiet", "champion")
    repository.edit("dvc.yaml", "deps: [data.txt, train.sh]", "deps: [champion, data.txt, train.sh]")
    repository.run("dvc", "repro", "--quiet")
    assert verify.verify().exit_status == 0
    (repository.path / "champion").write_text("two")
    repository.run("dvc", "add", "--quiet", "champion")
    assert verify.verify().warnings == ["train: not what the entry says: champion; run `dvc repro`"]


def test_a_folder_with_data_of_dvc_in_it_need_not_be_here(repository: Repository) -> None:
    bundle = repository.path / "champion/bundle"
    bundle.mkdir(parents=True)
    (bundle / "a").write_text("one")
    (repository.path / "champion/notes").write_text("in git")
    (repository.path / "champion/detections").write_text("[]")
    repository.run("dvc", "add", "--quiet", "champion/bundle", "champion/detections")
    repository.edit("dvc.yaml", "deps: [data.txt, train.sh]", "deps: [champion, data.txt, train.sh]")
    repository.run("dvc", "repro", "--quiet")
    repository.commit("champion")
    shutil.rmtree(bundle)
    assert verify.verify().warnings == []
    (repository.path / "champion/notes").write_text("changed")
    assert verify.verify().warnings == ["train: not what the entry says: champion; run `dvc repro`"]
    shutil.rmtree(repository.path / ".dvc/cache/files")
    assert verify.verify().warnings == [
        "train: cannot be compared: champion/bundle is not in the cache, and there is no default remote"
    ]


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\na: 1\n=======\n", "- a\n", "stages: 3\n", "stages: {train: {}}\n"])
def test_a_lock_that_is_none(text: str) -> None:
    with pytest.raises(PipelineError, match=r"(?s)^dvc\.lock: .*run `dvc repro`$"):
        verify.read_lock(text)


def test_no_lock_at_all(repository: Repository) -> None:
    (repository.path / "dvc.lock").unlink()
    assert len(verify.verify().warnings) == 3
    assert verify.verify().exit_status == 1


def test_a_pipeline_that_cannot_be_read(repository: Repository) -> None:
    (repository.path / "dvc.yaml").write_text("stages: {a: {}}\n")
    with pytest.raises(PipelineError, match=r"^dvc\.yaml: DVC cannot read it"):
        verify.verify()
