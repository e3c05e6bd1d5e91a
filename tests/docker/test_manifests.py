"""docker/: compose file and clusters' manifests hold to their schemas; what launchers print is what lies there."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from pipeline import launchers, local, params
from tests.docker.containers import interpolated

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
CHECKOUT = Path("/shared/effdet")  # in what is printed for Slurm


def read(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(interpolated(path.read_text(), {}))


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the packages of requirements/deployment.txt, to import from."""
    folder = tmp_path_factory.mktemp("tools")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps", "--no-compile"]
    subprocess.run([*install, "--target", folder, "-r", ROOT / "requirements/deployment.txt"], check=True)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.mark.system
def test_the_dockerfile_has_no_findings(tools: Path, tmp_path: Path) -> None:
    program = tools / "bin" / "hadolint"
    found = subprocess.run([program, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN apt-get install git\n")  # it works
    found = subprocess.run([program, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert "DL3006" in found.stdout


@pytest.mark.system
def test_the_compose_files_hold_to_the_specification(tools: Path) -> None:
    from compose_spec import PyCompose

    whole = read(DOCKER / "compose.yaml")
    PyCompose.from_json(json.dumps(whole)).validate()
    PyCompose.from_json(json.dumps(read(DOCKER / "compose.gpu.yaml")))
    used = {volume.split(":")[0] for service in whole["services"].values() for volume in service.get("volumes", [])}
    assert used == {"..", *whole["volumes"]}
    for key, value in (("helthcheck", {}), ("ports", ["a:b:c"]), ("restart", "maybe")):  # it works
        broken = copy.deepcopy(whole)
        broken["services"]["git"][key] = value
        with pytest.raises(ValueError, match=r"\S"):
            PyCompose.from_json(json.dumps(broken)).validate()


@pytest.mark.system
def test_the_manifests_hold_to_kubernetes_schemas(tools: Path) -> None:
    import kubernetes_validate

    def check(resource: dict[str, Any]) -> None:
        kubernetes_validate.validate(resource, "1.33", strict=True)

    job = read(DOCKER / "kubernetes/mpijob.yaml")
    jsonschema.validate(job, json.loads((ROOT / "tests/docker/mpijob.schema.json").read_text()))
    for replicas in job["spec"]["mpiReplicaSpecs"].values():
        check({"apiVersion": "v1", "kind": "Pod", "metadata": job["metadata"], "spec": replicas["template"]["spec"]})
    workers = read(DOCKER / "kubernetes/workers.yaml")["items"]
    for worker in workers:
        check(worker)
        assert worker["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
    assert [worker["metadata"]["name"] for worker in workers] == ["worker-data", "worker-train"]
    broken = copy.deepcopy(workers[0])  # it works
    broken["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check(broken)


def test_the_airflow_charts_values_hold_to_its_schema() -> None:
    schema = json.loads((ROOT / "tests/docker/airflow_chart.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    values = read(DOCKER / "kubernetes/airflow-values.yaml")
    jsonschema.validate(values, schema)
    # What the workers beside the chart must have in common with it.
    worker = read(DOCKER / "kubernetes/workers.yaml")["items"][0]["spec"]["template"]["spec"]["containers"][0]
    environment = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in worker["env"]}
    assert environment["AIRFLOW__CORE__EXECUTOR"] == values["executor"]
    assert environment["AIRFLOW__EDGE__API_URL"] == values["config"]["edge"]["api_url"]
    assert environment["AIRFLOW__API_AUTH__JWT_SECRET"]["secretKeyRef"] == {
        "name": values["jwtSecretName"],
        "key": "jwt-secret",
    }
    for path, value in (  # it works
        (("schedular",), {}),
        (("triggerer", "livenessProbe", "comand"), ["true"]),
        (("logs", "persistence", "size"), 20),
        (("config", "core", "dags_folder"), None),
        (("executor",), "edge"),
    ):
        broken = copy.deepcopy(values)
        part = broken
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_manifest_and_job_script_are_what_a_dry_run_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in local.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    ranks = params.load(ROOT / "recipes/d0-coco-8xa100-amp.yaml").train.ranks
    where = local.load(DOCKER / "kubernetes/local.yaml")
    assert launchers.preview("pipeline.train", ranks, where) == (DOCKER / "kubernetes/mpijob.yaml").read_text()
    monkeypatch.setattr(Path, "cwd", lambda: CHECKOUT)
    monkeypatch.setattr(sys, "executable", str(CHECKOUT / ".venv/bin/python"))
    where = local.load(DOCKER / "slurm/local.yaml")
    assert launchers.preview("pipeline.train", ranks, where) == (DOCKER / "slurm/train.sh").read_text()


def test_versions_are_the_pinned_ones() -> None:
    pinned = dict(
        re.findall(
            r"^([a-z-]+)==(\S+)", "".join(path.read_text() for path in (ROOT / "requirements").glob("*.txt")), re.M
        )
    )
    dockerfile = (DOCKER / "Dockerfile").read_text()
    for title, package in (
        ("TensorFlow", "tensorflow"),
        ("Keras", "keras"),
        ("Horovod", "horovod"),
        ("Airflow", "apache-airflow"),
    ):
        assert re.findall(rf"{title} (\d\S*\d)", dockerfile) == [pinned[package]]
    assert read(DOCKER / "kubernetes/airflow-values.yaml")["airflowVersion"] == pinned["apache-airflow"]


def test_nothing_runs_as_root_and_no_image_holds_what_is_not_named() -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text()
    for target in ("train", "airflow"):  # worker begins with train
        assert re.search(rf"AS {target}\n(?:(?!\nFROM ).)*\nUSER 1000:1000\n", dockerfile, re.S), target
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line for line in ignored if line[:1] not in "#!"] == ["*", "**/__pycache__"]
    services = read(DOCKER / "compose.yaml")["services"]
    for name, service in services.items():
        assert name == "postgres" or service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_every_service_that_stays_has_a_health_check_and_every_queue_a_worker() -> None:
    services = read(DOCKER / "compose.yaml")["services"]
    assert {name for name, service in services.items() if "healthcheck" not in service} == {"set-up", "migrate"}
    commands = [service["command"] for service in services.values()]
    served = {command[command.index("--queues") + 1] for command in commands if "--queues" in command}
    stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"].values()
    assert served == {"default"} | {stage["meta"]["airflow"].get("queue", "default") for stage in stages}
