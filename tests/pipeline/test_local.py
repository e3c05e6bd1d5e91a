"""local.yaml and the environment: where the work runs, read as strictly as params.yaml."""

from pathlib import Path

import pytest

from pipeline import local
from pipeline.errors import PipelineError


def test_without_file_and_environment_all_runs_here(tmp_path: Path) -> None:
    assert local.load(tmp_path / "local.yaml").hosts == []


def test_the_environment_stands_above_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "local.yaml"
    path.write_text("hosts: [a:4]\nloader_workers: 3\n")
    monkeypatch.setenv("EFFDET_HOSTS", "[b:2, c:2]")
    settings = local.load(path)
    assert settings.hosts == ["b:2", "c:2"]
    assert settings.loader_workers == 3


def test_a_block_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFDET_LAUNCHER", "slurm")
    monkeypatch.setenv("EFFDET_SLURM", "{ranks_per_node: 8, options: [--partition=gpu]}")
    settings = local.load(tmp_path / "local.yaml")
    assert settings.slurm == local.Slurm(ranks_per_node=8, options=["--partition=gpu"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hosts: [a]", "hosts.0: string should match"),
        ("host: [a:4]", "host: unknown key; did you mean hosts"),
        ("loader_workers: many", "loader_workers: expected an integer, got 'many'"),
        ("- a", "expected keys and values"),
        ("hosts: ['a:1,b:1']", "hosts.0: string should match"),
        ("launcher: ssh", "launcher: input should be 'horovodrun', 'mpirun', 'slurm' or 'kubernetes'"),
        ("launcher: slurm", "launcher slurm needs the block slurm"),
        ("launcher: slurm\nslurm: {ranks_per_node: 2, options: [-N2]}", "slurm.options.0: string should match"),
        ("launcher: slurm\nslurm: {ranks_per_node: 2}\nhosts: [a:1]", "finds the hosts itself; leave out hosts"),
        ("launcher: mpirun\nelastic: {min_ranks: 1, max_ranks: 2, discovery: x}", "elastic needs launcher horovodrun"),
        ("elastic: {min_ranks: 3, max_ranks: 2, discovery: x}", "elastic.min_ranks 3 is above max_ranks 2"),
        ("elastic: {min_ranks: 1, max_ranks: 2, discovery: x}\nhosts: [a:1]", "elastic.discovery names the hosts"),
        ("stall_seconds: 11", "stall_seconds: input should be greater than or equal to 12"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "local.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match=message):
        local.load(path)


def test_a_mistake_in_the_environment_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFDET_LOADER_WORKERS", "many")
    with pytest.raises(PipelineError, match="environment: loader_workers: expected an integer, got 'many'"):
        local.load(tmp_path / "local.yaml")
    monkeypatch.setenv("EFFDET_LOADER_WORKERS", "[")
    with pytest.raises(PipelineError, match="EFFDET_LOADER_WORKERS: not YAML"):
        local.load(tmp_path / "local.yaml")


def test_an_unknown_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFDET_LOADER_WORKER", "4")
    with pytest.raises(PipelineError, match="EFFDET_LOADER_WORKER: unknown key; there are EFFDET_LAUNCHER, "):
        local.load(tmp_path / "local.yaml")


def test_a_file_of_comments_is_none(tmp_path: Path) -> None:
    (tmp_path / "local.yaml").write_text("# hosts: [a:4]\n")
    assert local.load(tmp_path / "local.yaml") == local.Local()


def test_the_settings_reach_a_process_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "local.yaml"
    path.write_text("hosts: [a:4]\nlauncher: mpirun\nretraining: {work_dir: /scratch}\n")
    given = local.load(path)
    for name, value in local.as_environment(given).items():
        monkeypatch.setenv(name, value)
    there = local.load(tmp_path / "none")
    assert (there.hosts, there.launcher) == (["a:4"], "mpirun")
    assert there.retraining == local.Retraining()  # the stage runner's alone
