"""How long a stage took stands beside its outputs, where it came to its end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.timings import STAGES

ROOT = Path(__file__).parents[2]
STAGE = """
from pipeline.errors import PipelineError
from pipeline.timings import run_stage
def main():
    {main}
run_stage("shard", main)
"""


@pytest.mark.parametrize(
    ("main", "arguments", "status", "left"),
    [
        ("pass", [], 0, ["shard.json"]),
        ("pass", ["--worker"], 0, []),  # a rank, whose stage is timed by who started it
        ("raise PipelineError('no such folder')", [], 1, []),
    ],
)
def test_a_stage_that_ended_well_leaves_its_seconds(tmp_path, main, arguments, status, left):
    line = [sys.executable, "-c", STAGE.format(main=main), *arguments]
    ran = subprocess.run(line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert ran.returncode == status
    found = sorted((tmp_path / STAGES).glob("*"))
    assert [path.name for path in found] == left
    for path in found:
        assert json.loads(path.read_text())["seconds"] >= 0
