"""The data behind data.base_url changes: the watcher sees it, and the new checksum reaches the model's provenance."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import checksums, release
from pipeline.local import Local, Retraining
from pipeline.params import load
from pipeline.prepare import overridden, prepare
from pipeline.stage_runner import run_stage
from tests.dags.airflow_site import PYTHON as AIRFLOW
from tests.dags.airflow_site import ROOT
from tests.dags.small_repository import made
from tests.pipeline.conftest import own_data  # noqa: F401  a fixture
from tests.pipeline.small_registry import ENVIRONMENT, identify, run

pytestmark = [pytest.mark.system]

SMALL = {  # of recipes/finetune-lite0.yaml: seconds on two cores
    "model.image_size": [64, 64],
    "train.batch_size": 5,
    "train.epochs": 1,
    "train.schedule_epochs": 1,
    "train.warmup_epochs": 0,
    "train.init_from": None,
    "train.freeze": None,
    "train.allow_head_mismatch": False,
    "train.evaluate_every": 1,
}
UPSTREAM = {"download": "", "validate": "download", "shard": "download validate", "train": "shard"}
RUN_WATCH = """\
import json, sys
from airflow.models import DagRun
from airflow.utils.session import create_session
from dags.efficientdet_watch import dag
done = dag.test(run_conf={})
with create_session() as session:
    runs = session.query(DagRun).filter(DagRun.dag_id == "efficientdet_retrain").all()
    print("RUNS", json.dumps([[run.run_id, run.conf] for run in runs]))
print("STATES", json.dumps({ti.task_id: ti.state for ti in done.get_task_instances()}))
"""
RUN_TRIGGER = """\
import asyncio, pathlib, sys
from dags.data_watch import DataChanged
place, path = sys.argv[1:]
async def change():
    await asyncio.sleep(1)
    pathlib.Path(path).write_text("longer than before")
async def main():
    known = None
    for number in range(2):
        fired = DataChanged({"file": [place + ".none", place]}, known or {"file": "none"}, 0.1).run()
        if number:
            asyncio.get_running_loop().create_task(change())
        known = (await anext(fired)).payload
        print(known["file"])
asyncio.run(main())
"""


@pytest.fixture
def site(own_data):  # noqa: F811
    """The folder, and its address: a server on loopback."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(own_data)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield own_data, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def write_pipeline(folder, address):
    """This repository's pipeline behind a bare remote, with the data at an address pinned by its checksums."""
    hub = made(folder)
    repo = folder / "person"
    text = (ROOT / "recipes" / "finetune-lite0.yaml").read_text()
    names = ("instances_train.json", "train.zip", "instances_val.json", "val.zip")
    pinned = {"data.base_url": address, "data.checksums": dict.fromkeys(names)}
    (repo / "params.yaml").write_text(overridden(text, {**SMALL, **pinned}))
    checksums.write(repo / "params.yaml", checksums.compute(load(repo / "params.yaml").data))
    identify(repo)
    run(repo, "git", "commit", "-q", "-a", "-m", "Our data")
    run(repo, "git", "push", "-q", str(hub), "main")
    return repo, str(hub)


def test_changed_data_is_retrained_on(site, tmp_path, monkeypatch):
    data, address = site
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    repo, hub = write_pipeline(tmp_path, address)
    store = str(tmp_path / "store")
    where = Local(retraining=Retraining(work_dir=str(tmp_path / "work"), remote=store, min_free_gib=0.0))
    airflow = functools.partial(
        run,
        repo,
        str(AIRFLOW),
        **{
            "PYTHONPATH": str(repo),
            "AIRFLOW_HOME": str(tmp_path / "airflow"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DAGS_FOLDER": str(repo / "dags"),
            "AIRFLOW_CONN_EFFDET_GIT": json.dumps({"conn_type": "generic", "extra": {"address": hub}}),
            "AIRFLOW_VAR_WATCH_SECONDS": "1",
            "EFFDET_RETRAINING": where.retraining.model_dump_json(),
            "ML_PYTHON": sys.executable,
        },
    )
    airflow("-m", "airflow", "db", "migrate")
    airflow("-m", "airflow", "dags", "reserialize")
    before, states = watch(airflow)
    assert before == []
    assert states["read_checksums"] == states["retrain"] == "skipped"  # these bytes are those that are pinned

    content = json.loads((data / "instances_train.json").read_text())
    content["annotations"] = content["annotations"][1:]
    (data / "instances_train.json").write_text(json.dumps(content))
    digest = hashlib.sha256((data / "instances_train.json").read_bytes()).hexdigest()
    runs, states = watch(airflow)
    assert set(states.values()) == {"success"}
    [(run_id, conf)] = runs
    assert run_id.startswith("data-")
    assert conf["overrides"]["data.checksums"]["instances_train.json"] == f"sha256:{digest}"
    assert "instances_train.json" in conf["reason"]
    assert "val.zip" not in conf["reason"]

    request = prepare(hub, None, where, reason=conf["reason"], overrides=conf["overrides"])
    results = {}
    for stage, upstream in {
        "download": "",
        "validate": "download",
        "shard": "download validate",
        "train": "shard",
    }.items():
        results[stage] = run_stage(request, stage, [results[name] for name in upstream.split()], where)
        assert not results[stage].cached
    outs = {out["path"]: out for result in results.values() for out in result.entry["outs"]}
    monkeypatch.chdir(repo)
    for path in ("data/shards", "data/model"):
        laid_down(Path(store), outs[path]["md5"], Path(path))
    Path("data/eval").mkdir()
    Path("data/eval/metrics.json").write_text("{}")
    (tmp_path / "params.yaml").write_text(request.params)
    told = release.provenance({"splits": {}, "nms": {}}, load(tmp_path / "params.yaml"))
    assert told["data"]["train"]["annotations_sha256"] == f"sha256:{digest}"
    assert {path: told["dvc_lock"][path] for path in ("data/shards", "data/model")} == {
        path: outs[path]["md5"] for path in ("data/shards", "data/model")
    }


def watch(airflow):
    """A run of the DAG: the retrainings that there are after it, and how its tasks ended."""
    told = dict(
        line.split(" ", 1) for line in airflow("-c", RUN_WATCH).splitlines() if line.startswith(("RUNS", "STATES"))
    )
    return json.loads(told["RUNS"]), json.loads(told["STATES"])


def laid_down(store, md5, target):
    """A folder, from DVC's remote."""

    def stored(digest):
        return store / "files" / "md5" / digest[:2] / digest[2:]

    for entry in json.loads(stored(md5).read_text()):
        path = target / entry["relpath"]
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stored(entry["md5"]), path)


def test_data_that_returns_to_an_earlier_version_is_retrained_on():
    code = """\
from dags.data_watch import run_id
first, second = {"a": "sha256:1", "b": "sha256:3"}, {"b": "sha256:3", "a": "sha256:2"}
ids = [run_id(first, second), run_id(dict(reversed(first.items())), second), run_id(second, first)]
print([ids.index(one) for one in ids])
"""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(AIRFLOW), "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.stdout == "[0, 0, 2]\n", done.stderr


def test_trigger_fires_when_a_file_becomes_another(site):
    data, address = site
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    for place in (f"{address}/watched", str(data / "watched")):
        (data / "watched").write_text("before")
        done = subprocess.run(
            [str(AIRFLOW), "-c", RUN_TRIGGER, place, str(data / "watched")],
            env=variables, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()[-2:]
        assert first != second
