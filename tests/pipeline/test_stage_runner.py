"""The stage runner with real git, real DVC and real kills, on the small pipeline; each protection shown by its absence."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import lock_entries, stage_runner, work_trees
from pipeline.errors import PipelineError
from pipeline.lock_entries import Stage, read_stages
from pipeline.stage_runner import Result, run_stage
from tests.pipeline.retraining import STAGES, Team, out, run_all, start
from tests.pipeline.small_pipeline import merged

pytestmark = pytest.mark.slow


@pytest.fixture
def team(tmp_path: Path) -> Team:
    return Team(tmp_path)


def test_two_machines_hand_over_and_a_third_finds_all_cached(team: Team) -> None:
    first = run_all(team.request("one", seed=7), team.machine("a"), team.machine("b"))
    assert [result.cached for result in first.values()] == [False, False, False]
    assert first["train"].files == {"scores.json": '{"AP": 0.5}\n'}
    assert list(first["train"].entry) == ["cmd", "deps", "params", "outs"]
    cold = team.machine("c")
    second = run_all(team.request("two", seed=7), cold)
    assert [result.cached for result in second.values()] == [False, True, True]  # fetch: see the next test
    assert {name: result.entry for name, result in second.items()} == {
        name: result.entry for name, result in first.items()
    }
    assert second["train"].files == first["train"].files
    assert not list((Path(cold.retraining.work_dir) / "tries").glob("*/"))  # nothing is left of what went well


def test_a_persisted_output_is_begun_with_and_cached_once_committed(team: Team) -> None:
    machine = team.machine("a")
    team.person.run("dvc", "push", "--remote", str(team.folder / "store")) if False else None
    changed = run_stage(team.request("one", address="there"), "fetch", [], machine)
    assert not changed.cached
    team.person.run("git", "checkout", "--quiet", "-b", "retrain/one")
    lock = stage_runner.read_lock((team.person.path / "dvc.lock").read_text())
    lock_entries.write_lock(team.person.path, {**lock, "fetch": changed.entry})
    team.person.commit("what publish does")
    team.person.run("git", "push", "--quiet", "origin", "HEAD")
    again = run_stage(team.request("two", "main", address="there"), "fetch", [], team.machine("b"))
    assert again.cached
    assert again.entry == changed.entry
