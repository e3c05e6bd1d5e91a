"""docker/compose.yaml: its services, started from the file, retrain a detector; after a restart all is there."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.dags import small_repository
from tests.docker.containers import Stack

ROOT = Path(__file__).parents[2]
DAG = "/api/v2/dags/efficientdet_retrain/dagRuns"


def git(repository: Path, *words: str) -> str:
    line = ["git", "-c", "safe.directory=*", "-C", repository, *words]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


def log_in(stack: Stack) -> str:
    """As the person who reads the password where the documentation says it is."""
    passwords = stack.run("api-server", "cat", "/opt/airflow/simple_auth_manager_passwords.json.generated").stdout
    login = {"username": "admin", "password": json.loads(passwords)["admin"]}
    return str(stack.ask("POST", "/auth/token", login)["access_token"])


@pytest.mark.system
@pytest.mark.needs("ip", "mount", "psql", "sshd", "unshare")
def test_a_retraining_goes_through_every_service_and_stays(tmp_path: Path) -> None:
    small_repository.made(tmp_path)
    checkout = tmp_path / "person"
    for environment in (".venv", ".venv-airflow"):
        (checkout / environment).symlink_to((ROOT / environment).resolve())
    stack = Stack(
        checkout / "docker/compose.yaml", tmp_path / "stack", checkout, {"AUTHORIZED_KEYS": "ssh-ed25519 AAAA me"}
    )
    with stack:
        for name in stack.services:
            stack.up(name)
        for name, service in stack.services.items():
            if "healthcheck" in service:
                stack.wait_until_healthy(name)
        conf = json.dumps({"reason": "a first run"})
        stack.run("scheduler", "airflow", "dags", "trigger", "efficientdet_retrain", "--conf", conf)
        token = log_in(stack)
        run = stack.ask("GET", DAG, token=token)["dag_runs"][0]["dag_run_id"]
        deadline = time.monotonic() + 900
        while (state := stack.ask("GET", f"{DAG}/{run}", token=token)["state"]) in ("queued", "running"):
            assert time.monotonic() < deadline, stack.log("worker-data") + stack.log("worker-train")
            stack.revive()
            time.sleep(2)
        tasks = stack.ask("GET", f"{DAG}/{run}/taskInstances", token=token)["task_instances"]
        assert state == "success", {task["task_id"]: task["state"] for task in tasks}
        machines = {task["task_id"]: task["hostname"] for task in tasks}
        assert machines["train"] == machines["evaluate"] == "worker-train"
        assert machines["download"] == machines["publish"] == "worker-data"

        hub = tmp_path / "stack" / "git" / "detector.git"
        head = git(checkout, "rev-parse", "HEAD")
        (branch,) = git(hub, "for-each-ref", "--format=%(refname:short)", "refs/heads/retrain").split()
        assert git(hub, "rev-parse", "main", f"{branch}~1").split() == [head, head]
        assert any((tmp_path / "stack" / "dvc" / "files").rglob("*"))
        keys = {path: path.read_bytes() for path in (tmp_path / "stack" / "secrets").iterdir()}

        stack.down()
        for name in ("api-server", "git"):
            stack.up(name)
            stack.wait_until_healthy(name)
        assert stack.ask("GET", f"{DAG}/{run}", token=log_in(stack))["state"] == "success"
        assert {path: path.read_bytes() for path in (tmp_path / "stack" / "secrets").iterdir()} == keys
        assert git(hub, "rev-parse", "main") == head
