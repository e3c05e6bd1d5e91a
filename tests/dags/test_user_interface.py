"""A person retrains and approves in Airflow's web pages, with real Airflow and Chromium; git has what follows of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dags.standalone import end
from tests.dags.airflow_site import PYTHON, free_port, until
from tests.dags.small_deployment import ROOT, write_deployment
from tests.pipeline.small_registry import ENVIRONMENT, run

REASON, RATE, NOTE = "more pictures at night", "0.4", "as good by day, better at night"
pytestmark = [pytest.mark.system, pytest.mark.needs("chromium")]


@pytest.fixture
def repo(tmp_path):
    """A deployment as `make airflow` makes it, running."""
    repo = tmp_path / "repo"
    write_deployment(repo)
    retraining = {"work_dir": str(tmp_path / "work"), "min_free_gib": 0.0}
    variables = {"ML_PYTHON": sys.executable, "EFFDET_RETRAINING": json.dumps(retraining)}
    with (tmp_path / "airflow.log").open("w") as log:
        process = subprocess.Popen(
            [PYTHON, "-m", "dags.standalone", str(free_port())], cwd=repo, stdout=log, stderr=log,
            env={**os.environ, **ENVIRONMENT, **variables}, start_new_session=True,
        )  # fmt: skip
    try:
        until((repo / ".airflow" / "address").exists, 300, f"Airflow starts; {tmp_path / 'airflow.log'}")
        yield repo
    finally:
        end(process)


def test_form_graph_lineage_and_approval(repo, tmp_path):
    hub = repo / ".airflow" / "remote.git"
    main = run(hub, "git", "rev-parse", "main").strip()
    passwords = json.loads((repo / ".airflow" / "simple_auth_manager_passwords.json.generated").read_text())
    address = (repo / ".airflow" / "address").read_text()
    line = [str(PYTHON), "-m", "tests.dags.user_interface", address, passwords["admin"], str(tmp_path)]
    branch = run(ROOT, *line, REASON, f"train.learning_rate={RATE}", NOTE).splitlines()[-1]

    # The form's words are in the candidate's commit.
    assert run(hub, "git", "log", "-1", "--format=%s", branch).strip() == f"Retrain: {REASON}"
    assert f"learning_rate: {RATE} " in run(hub, "git", "show", f"{branch}:params.yaml")

    # The approval is in the tags, on the candidate's commit, and in one commit on main.
    candidate = run(hub, "git", "rev-parse", branch).strip()
    tags = run(hub, "git", "for-each-ref", "--format=%(refname:lstrip=2) %(*objectname)", "refs/tags").splitlines()
    assert tags == [f"detector#prod#1 {candidate}", f"detector@v0.1.0 {candidate}"]
    words = run(hub, "git", "for-each-ref", "--format=%(contents)", "refs/tags/detector#prod#1")
    assert words.startswith(f"{NOTE}\n\nCandidate: {branch} ({candidate})\nApproved-by: admin\n")
    assert run(hub, "git", "rev-list", "main").split()[1] == main
    champion = json.loads(run(hub, "git", "show", "main:champion.json"))
    assert (champion["version"], champion["revision"]) == ("v0.1.0", candidate)
    assert sorted(path.stem for path in Path(tmp_path).glob("*.png")) == ["approval", "assets", "graph", "trigger_form"]
