"""The DAGs as Airflow loads them, in an environment without TensorFlow and DVC, against dvc.yaml and params.py."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from dags import standalone
from pipeline import form
from tests.dags.airflow_site import PYTHON, ROOT, until

pytestmark = pytest.mark.system

IDENTITY = ["-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "commit.gpgSign=false"]
STAGES = ["download", "validate", "shard", "train", "evaluate", "promote"]
ALL_SETTINGS = "{queue: gpu, pool: training, retries: 4, timeout_minutes: 90, executor: EdgeExecutor}"
REFUSED = {
    "0 is less than the minimum": {"train.epochs": 0},
    "'two' is not of type 'null', 'integer'": {"train.epochs": "two"},
    "'$(id)' is not one of": {"recipe": "$(id)"},
    "'../params' is not one of": {"recipe": "../params"},
    "does not match": {"revision": "--upload-pack=touch /tmp/x"},
    "should be non-empty": {"reason": ""},
    "'train.rate' was unexpected": {"overrides": {"train.rate": 0.1}},
    "'`id`' is not of type 'number'": {"overrides": {"train.momentum": "`id`"}},
    "2 is greater than the maximum of 1": {"overrides": {"train.momentum": 2}},
}
TAKEN = [
    {"train.epochs": 3, "train.schedule_epochs": 3, "revision": "main", "recipe": "synthetic"},
    {"overrides": {"shard.reencode": None, "train.augment.mosaic": 0.5, "model.image_size": [128, 128]}},
]


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("airflow")
    (folder / "dvc.yaml").write_text(
        f"stages:\n  a:\n    cmd: a\n    meta:\n      airflow: {ALL_SETTINGS}\n  b:\n    cmd: b\n"
    )
    confs = json.dumps([*REFUSED.values(), *TAKEN])
    environment = {"AIRFLOW_HOME": str(folder), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "PYTHONPATH": str(ROOT)}
    line = [PYTHON, ROOT / "tests/dags/look.py", ROOT / "dags", folder / "dvc.yaml", confs]
    done = subprocess.run(line, env={**environment, "PATH": os.defpath}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def tasks(airflow: Mapping[str, Any]) -> Mapping[str, Any]:
    found: dict[str, Any] = airflow["dags"]["efficientdet_retrain"]["tasks"]
    return found


def test_the_dags_load_without_the_ml_environment(airflow: Mapping[str, Any]) -> None:
    assert airflow["errors"] == {}
    assert airflow["dags"]["efficientdet_retrain"]["callbacks"]


def test_edges_are_those_of_dvc_dag(tasks: Mapping[str, Any]) -> None:
    drawn = subprocess.run(["dvc", "dag", "--dot"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    edges = set(re.findall(r'"(\S+)" -> "(\S+)"', drawn))
    of_stages = {edge for edge in edges if set(edge) <= set(STAGES)}
    assert ("download", "validate") in of_stages
    ours = {(name, other) for name in STAGES for other in tasks[name]["downstream"] if other in STAGES}
    assert ours == of_stages
    assert set(tasks) == {"prepare", *STAGES, "publish"}
    assert set(tasks["prepare"]["downstream"]) == {*STAGES, "publish"}
    assert all("publish" in tasks[name]["downstream"] for name in STAGES)


def test_settings_are_those_of_meta_airflow(airflow: Mapping[str, Any]) -> None:
    assert airflow["stages"] == {
        "a": {
            "queue": "gpu",
            "pool": "training",
            "retries": 4,
            "executor": "EdgeExecutor",
            "execution_timeout": "1:30:00",
        },
        "b": {},
    }  # fmt: skip
    # What the scheduler goes by is the serialized DAG.
    serialized = airflow["dags"]["efficientdet_retrain"]["serialized"]
    for name, stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items():
        task, given = serialized[name], stage["meta"]["airflow"]
        assert (task["retries"], task["execution_timeout"]) == (given["retries"], given["timeout_minutes"] * 60)
        assert task.get("queue") == given.get("queue")
        assert task["has_retry_policy"]
    assert serialized["train"]["retries"] == 100
    assert (serialized["prepare"]["retries"], serialized["prepare"]["has_retry_policy"]) == (2, True)


def test_lineage_is_what_the_stages_read_and_write(tasks: Mapping[str, Any]) -> None:
    lineage = {name: (task["inlets"], task["outlets"]) for name, task in tasks.items() if name != "prepare"}
    assert lineage == {
        "download": ([], ["raw_data"]),
        "validate": (["raw_data"], []),
        "shard": (["raw_data"], ["shards"]),
        "train": (["shards"], ["model"]),
        "evaluate": (["shards", "model"], []),
        "promote": (["shards", "model"], ["metrics"]),
        "publish": (["model", "metrics"], ["candidate"]),
    }


def test_every_task_and_dag_says_what_it_does(airflow: Mapping[str, Any]) -> None:
    for dag in airflow["dags"].values():
        assert dag["docs"]
        assert all(task["docs"] for task in dag["tasks"].values())
    assert "report.md" in airflow["dags"]["efficientdet_retrain"]["docs"]


def test_the_form_takes_what_params_py_takes(airflow: Mapping[str, Any]) -> None:
    for words, told in zip(REFUSED, airflow["refused"], strict=False):
        assert words in told
    assert airflow["refused"][len(REFUSED) :] == [""] * len(TAKEN)
    shown = airflow["dags"]["efficientdet_retrain"]["params"]
    assert shown["train.precision"]["schema"]["enum"] == [None, "float32", "mixed_float16", "mixed_bfloat16"]
    assert shown["train.batch_size"]["description"].startswith("Images a rank works on at a time.")
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert set(shown["recipe"]["schema"]["enum"]) == {None, *recipes}


def test_the_forms_file_is_that_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert json.loads(form.FORM_FILE.read_text()) == form.parameters(), "run `python -m pipeline.form`"


def call(*words: str, variables: Mapping[str, str]) -> "subprocess.Popen[str]":
    """run_ml in Airflow's Python."""
    environment = {"AIRFLOW_HOME": variables["AIRFLOW_HOME"], "PYTHONPATH": str(ROOT), "ML_PYTHON": sys.executable}
    return subprocess.Popen(
        [PYTHON, ROOT / "tests/dags/call_ml.py", *words],
        env={**environment, "PATH": os.environ["PATH"], **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_command_gets_words_as_they_are_and_no_secret_of_airflow(tmp_path: Path) -> None:
    variables = {"AIRFLOW_HOME": str(tmp_path), "AIRFLOW__CORE__FERNET_KEY": "", "AIRFLOW_CONN_X": "http://u:p@h"}
    odd = "$(touch pwned) `id` ; \"'\n--x"
    told, _ = call("answer", odd, variables=variables).communicate(timeout=120)
    answer = json.loads(told.splitlines()[-1])
    assert answer["arguments"][1] == odd
    assert answer["run"] == {"a": 1}
    assert not [name for name in answer["variables"] if name.startswith("AIRFLOW")]
    assert "MINE" in answer["variables"]
    told, _ = call("fail", variables=variables).communicate(timeout=120)
    assert "error: params.yaml: a is wrong\nparams.yaml: b is wrong" in told  # whole, and without what follows it
    assert told.splitlines()[-1] == "error: params.yaml: a is wrong"
    assert "Traceback" not in told
    assert "To track the changes" not in told


def test_a_shallow_clone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (
        ["init", "-q", "whole"],
        ["-C", "whole", *IDENTITY, "commit", "-q", "--allow-empty", "-m", "one"],
        ["-C", "whole", *IDENTITY, "commit", "-q", "--allow-empty", "-m", "two"],
        ["clone", "-q", "--depth", "1", (tmp_path / "whole").as_uri(), "shallow"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(standalone, "ROOT", tmp_path / "whole")
    standalone.check_whole()
    monkeypatch.setattr(standalone, "ROOT", tmp_path / "shallow")
    with pytest.raises(SystemExit, match=r"error: .*/shallow: a shallow clone.* run `git fetch --unshallow`"):
        standalone.check_whole()


def told_by_airflow(code: str, folder: Path) -> str:
    """What the code prints in Airflow's Python."""
    environment = {"AIRFLOW_HOME": str(folder), "PYTHONPATH": str(ROOT), "PATH": os.defpath}
    done = subprocess.run([PYTHON, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_of_candidates_that_came_at_once_the_newest_accepted_one_is_asked_about(tmp_path: Path) -> None:
    code = """\
from types import SimpleNamespace
from dags.promotion import published
came = [(3, "rejected"), (2, "accepted"), (4, "rejected"), (1, "accepted")]
events = [SimpleNamespace(timestamp=when, extra={"branch": when, "decision": what}) for when, what in came]
print([one["branch"] for one in published(events)])
"""
    assert told_by_airflow(code, tmp_path) == "[3, 4, 1, 2]\n"


def test_errors_give_up_soon_and_pre_emptions_do_not(tmp_path: Path) -> None:
    code = """\
from types import SimpleNamespace
from airflow.sdk.exceptions import AirflowTaskTimeout
from dags.retraining import GiveUp
wrong, away, stopped = (SystemExit(f"{words}") for words in ("error: a", "error: git fetch: no route", "stopped: b"))
def action(tries, error, number, most, retries):
    return GiveUp(tries).evaluate(error, number, most, {"task": SimpleNamespace(retries=retries)}).action.value
for case in (
    (1, wrong, 1, 2, 2), (1, away, 1, 2, 2), (1, stopped, 1, 2, 2),
    (4, wrong, 3, 100, 100), (4, wrong, 4, 100, 100), (4, stopped, 50, 100, 100),
    (4, AirflowTaskTimeout(), 4, 100, 100),
    (4, wrong, 9, 108, 100), (4, wrong, 12, 108, 100),  # cleared after its 8th try
):
    print(action(*case), end=" ")
"""
    assert told_by_airflow(code, tmp_path).split() == [
        *("fail", "default", "default"),
        *("default", "fail", "default", "fail"),
        *("default", "fail"),
    ]


def test_an_alert_that_reaches_nobody_is_a_warning(tmp_path: Path) -> None:
    code = """\
import asyncio, json, logging, os, sys
from types import SimpleNamespace
from dags import alerts
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", force=True)
ti = SimpleNamespace(dag_id="d", task_id="t", run_id="r", try_number=2)
for address in (None, "no-address", "http://[::", "http://127.0.0.1:1/secret"):
    os.environ["AIRFLOW_CONN_EFFDET_ALERTS"] = json.dumps({"conn_type": "generic", "password": address})
    alerts.task_failed({"ti": ti, "exception": SystemExit("error: a")})
    asyncio.run(alerts.deadline_missed(context={"dag_run": {"dag_id": "d", "dag_run_id": "r"}}))
"""
    told = told_by_airflow(code, tmp_path).splitlines()
    kinds = ["UnsupportedProtocol", "UnsupportedProtocol", "InvalidURL", "ConnectError"]
    alerts = ["d: t of r failed, try 2: error: a", "d: r is late, and goes on"]
    assert [line for line in told if line.startswith(("ERROR", "WARNING"))] == [
        line
        for kind in kinds
        for alert in alerts
        for line in (f"ERROR {alert}", f"WARNING effdet_alerts: nobody was told: {kind}")
    ]


def test_an_address_with_a_password_or_token_is_refused(tmp_path: Path) -> None:
    code = """\
from airflow.sdk.exceptions import AirflowException
from dags.ml import without_secret
for address in (
    "https://token@h/r.git", "https://u:p@h/r", "git+ssh://u:p@h/r", "webdavs://u:p@h/r", "https://u:@h/r", "ssh://:p@h/r",
    "https://h/r.git", "ssh://git@h/r.git", "git@h:r.git", "/srv/a@b:c.git", "s3://bucket/dvc", "file:///srv/r",
):
    try:
        print("taken" if without_secret(address, "x") == address else "changed", end=" ")
    except AirflowException:
        print("refused", end=" ")
"""
    assert told_by_airflow(code, tmp_path).split() == ["refused"] * 6 + ["taken"] * 6


@pytest.mark.parametrize("number", [15, 9])
def test_a_task_that_is_ended_ends_its_command(tmp_path: Path, number: int) -> None:
    marks = tmp_path / "marks"
    process = call("wait", str(marks), variables={"AIRFLOW_HOME": str(tmp_path)})
    assert process.stdout is not None
    while "waits" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    told, _ = process.communicate(timeout=60)
    until(lambda: marks.exists() and marks.read_text() == "told to stop", 60, "the command ends, also without its task")
    if number == 15:
        assert told.splitlines()[-1] == "stopped: the next try goes on from what it saved"
