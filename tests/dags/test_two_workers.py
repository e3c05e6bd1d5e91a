"""Real Airflow over two machines that share an ssh server alone: PostgreSQL, EdgeExecutor, the real stages, small.

One scenario, since starting it costs most: two runs at once, a machine whose plug is pulled in the middle of training,
a scheduler that is killed, a refused run and a late one, both told to a webhook, a run that is stopped, and the whole
DAG by dag.test(), which finds all cached.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.dags import small_repository
from tests.dags.airflow_site import DAG, PYTHON, ROOT, Site, until, webhook
from tests.effdet.test_checkpoint_remote import Server
from tests.pipeline import small_forge

pytestmark = [pytest.mark.system, pytest.mark.needs("psql", "sshd", "unshare"), pytest.mark.timeout(3600)]

STAGES = ["download", "validate", "shard", "train", "evaluate", "promote"]
SECRET = "made-for-this-test-only"  # of the DVC remote
HOOK = "T0001-made-for-this-test"  # in the webhook's address
PATIENCE = 1200  # seconds, for a shared machine
FIRST = {"train.epochs": 3, "train.schedule_epochs": 3}
SECOND = {"train.seed": 2}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path / "server")
    yield started
    started.stop()


def connection(**content: Any) -> str:
    return json.dumps({"conn_type": "generic", **content})


def test_two_runs_on_two_machines(server: Server, tmp_path: Path) -> None:
    hub = small_repository.made(tmp_path)
    client = server.client()
    with small_forge.running() as forge, webhook(HOOK) as (alerts, told):
        forge_extra = {"repository": "o/r", "address": forge.url}
        connections = {
            "AIRFLOW_CONN_EFFDET_GIT": connection(extra={"address": f"ssh://stores{hub}"}),
            "AIRFLOW_CONN_EFFDET_DVC": connection(
                extra={"address": f"ssh://stores{tmp_path}/store", "environment": {"SOME_STORES_KEY": SECRET}}
            ),
            "AIRFLOW_CONN_EFFDET_FORGE": connection(password=small_forge.TOKEN, extra=forge_extra),
            "AIRFLOW_CONN_EFFDET_ALERTS": connection(password=alerts),
        }
        late = {"AIRFLOW_VAR_RETRAIN_LATE_HOURS": "-1"}  # at once, if it is known how long a run takes

        def machine(name: str) -> dict[str, str]:
            return {
                **client,
                "ML_PYTHON": sys.executable,
                "EFFDET_RETRAINING": json.dumps({"work_dir": str(tmp_path / name), "min_free_gib": 0.0}),
                "EFFDET_CHECKPOINT_DIR": f"sftp://stores{tmp_path}/checkpoints",
            }

        with Site(tmp_path / "site", {**connections, **late}) as site:
            until(lambda: is_there(site), 300, "the DAG is there")
            for name in ("a", "b"):
                site.add_worker(name, machine(name))
            refused = site.trigger(reason="wrong", revision="no-such-branch")
            first, second = site.trigger(reason="first", **FIRST), site.trigger(reason="$(id)", **SECOND)
            lose_a_machine_that_trains(site, tmp_path / "checkpoints", first)
            site.kill("scheduler")
            site.start("scheduler")
            site.add_worker("c", machine("c"))  # in its place, and empty
            for run in (first, second, refused):
                until(lambda: site.state(run) in ("success", "failed"), PATIENCE, "the run is over")  # noqa: B023
            check_finished(site, first, second, hub)
            check_gone_on(site, first)
            check_refused(site, refused)
            assert {pull["title"] for pull in forge.pulls} == {"Retrain: first", "Retrain: $(id)"}
            stopped = site.trigger(reason="stopped", **{"train.seed": 3})
            check_alerts(site, refused, stopped, told)
            stop_one_that_trains(site, stopped)
            check_nothing_told(site, tmp_path, [SECRET, small_forge.TOKEN, HOOK])
        check_all_cached(tmp_path, {**machine("d"), **connections}, FIRST)


def is_there(site: Site) -> bool:
    found = site.ask("GET", "/api/v2/dags")["dags"]
    return DAG in {dag["dag_id"] for dag in found}


def lose_a_machine_that_trains(site: Site, checkpoints: Path, run: str) -> None:
    """After the first checkpoint of this run."""
    until(lambda: "success" in (site.tasks(run)["prepare"]["state"] or ""), PATIENCE, "the run is pinned")
    name = site.answer(run, "prepare")["run"]
    until(lambda: [*checkpoints.glob(f"{name}/train/*/step-*")], PATIENCE, "a checkpoint is there")
    site.pull_the_plug(str(site.tasks(run)["train"]["hostname"]))


def check_finished(site: Site, first: str, second: str, hub: Path) -> None:
    """Both runs are whole, each of its own parameters, and Airflow knows which version each asset has."""
    events = site.ask("GET", "/api/v2/assets/events?limit=100")["asset_events"]
    for run, epochs, seed in ((first, 3, 1), (second, 1, 2)):
        assert site.state(run) == "success"
        results = {stage: site.answer(run, stage) for stage in STAGES}
        candidate = site.answer(run, "publish")
        lock = git(hub, "show", f"{candidate['branch']}:dvc.lock")
        train = YAML(typ="safe").load(git(hub, "show", f"{candidate['branch']}:params.yaml"))["train"]
        assert (train["epochs"], train["seed"]) == (epochs, seed)
        told = {event["name"]: event["extra"] for event in events if event["source_run_id"] == run}
        for stage, path, asset in (
            ("download", "data/raw", "raw_data"),
            ("shard", "data/shards", "shards"),
            ("train", "data/model", "model"),
            ("promote", "metrics.json", "metrics"),
        ):
            digest = {out["path"]: out["md5"] for out in results[stage]["entry"]["outs"]}[path]
            assert digest in lock
            assert told[asset]["hash"] == digest
            assert told[asset]["revision"] == git(hub, "rev-parse", "main").strip()
            assert told[asset]["run"] == candidate["run"]
            assert told[asset]["size"] > 0
        assert told["metrics"]["AP"] == told["candidate"]["AP"]
        assert 0 <= told["model"]["AP"] <= 1
        assert told["candidate"]["commit"] == git(hub, "rev-parse", candidate["branch"]).strip()
        assert "| val | no champion yet | candidate |" in told["candidate"]["table"]
        report = git(hub, "show", f"{candidate['branch']}:report.md")
        assert "# Review of this branch" in report
        assert "SavedModel, as measured for this decision: " in report
    models = {event["extra"]["hash"] for event in events if event["name"] == "model"}
    assert len(models) == 2


def check_gone_on(site: Site, run: str) -> None:
    """The lost training went on from its checkpoint, on whichever machine."""
    number, most = (site.tasks(run)["train"][key] for key in ("try_number", "max_tries"))
    assert number > 1
    assert most == 100
    log = site.log(run, "train", number)
    assert "going on after epoch" in log
    assert "epoch 1/3" not in log
    assert "To track the changes" not in log


def check_refused(site: Site, run: str) -> None:
    assert site.state(run) == "failed"
    task = site.tasks(run)["prepare"]
    assert (task["state"], task["try_number"]) == ("failed", 1)
    log = site.log(run, "prepare", 1)
    assert "revision: 'no-such-branch' is no revision of ssh://stores" in log
    assert "Traceback" not in log


def check_alerts(site: Site, refused: str, late: str, told: list[str]) -> None:
    """Who is alerted hears of the refused run, once, and of the late one, which goes on; of no try that is repeated."""
    until(lambda: len(told) > 1, PATIENCE, "the late run is told of")
    assert site.state(late) == "running"
    failure, lateness = told
    assert failure.startswith(f"{DAG}: prepare of {refused} failed, try 1: error: revision: 'no-such-branch' is no")
    assert lateness == f"{DAG}: {late} is late, and goes on"


def stop_one_that_trains(site: Site, run: str) -> None:
    """A person marks the run failed: all that trains for it ends, on every machine."""
    until(lambda: "Running stage 'train'" in log_so_far(site, run), PATIENCE, "it trains")
    name = site.answer(run, "prepare")["run"]
    until(lambda: processes_of(name), 60, "its processes are there")
    site.ask("PATCH", f"/api/v2/dags/{DAG}/dagRuns/{run}", {"state": "failed"})
    until(lambda: not processes_of(name), PATIENCE, "its processes ended")


def log_so_far(site: Site, run: str) -> str:
    return site.log(run, "train", 1) if site.tasks(run)["train"]["state"] == "running" else ""


def processes_of(run: str) -> list[Path]:
    """With a try of this run in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"/tries/{run}/".encode() in path.read_bytes():
                found.append(path)
        except OSError:  # ended meanwhile
            continue
    return found


def check_nothing_told(site: Site, folder: Path, secrets: list[str]) -> None:
    """No secret in a log, the database's XCom and rendered templates, or what lies in git."""
    tables = ["xcom", "rendered_task_instance_fields", "asset_event", "dag_run", "log", "serialized_dag"]
    texts = {table: site.database.ask("airflow", f"select * from {table}") for table in tables}
    texts |= {str(path): path.read_text(errors="replace") for path in (folder / "site").rglob("*.log")}
    texts["git"] = git(folder / "hub.git", "log", "--all", "--patch", "--", ".", ":!tests")  # which hold them
    assert "retrain/" in texts["xcom"]
    assert "going on after" in "".join(texts.values())
    for secret in secrets:
        assert not [name for name, text in texts.items() if secret in text]


def check_all_cached(folder: Path, variables: Mapping[str, str], conf: Mapping[str, Any]) -> None:
    """The whole DAG by dag.test(), on a machine that has nothing."""
    home = folder / "dag-test"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
        **variables,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([PYTHON, "-m", "airflow", "db", "migrate"], env=environment, check=True, capture_output=True)
    line = [PYTHON, ROOT / "tests/dags/run_dag.py", json.dumps({"reason": "again", **conf})]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["state"] == "success"
    assert told["cached"] == dict.fromkeys(STAGES, True)


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout
