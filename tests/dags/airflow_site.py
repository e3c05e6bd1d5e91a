"""A real Airflow for tests: PostgreSQL, its parts as processes, and edge workers that are machines of their own.

A worker lives in a process namespace: killing it ends all that it started at once, as pulling a machine's plug does.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests

from dags.standalone import end

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-airflow" / "bin" / "python"
DAG = "efficientdet_retrain"
PARTS = {
    "api-server": ["api-server"],
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def webhook(secret: str) -> Iterator[tuple[str, list[str]]]:
    """A chat service's webhook on loopback: its address, which ends in the secret, and the texts that it was sent."""
    texts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == f"/{secret}":
                texts.append(content["text"])
            self.send_response(200 if self.path == f"/{secret}" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{secret}", texts
        server.shutdown()


class Database:
    """A PostgreSQL cluster of its own on loopback. It refuses to be root's."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.port = free_port()
        programs = Path(next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]), "/usr/local/bin"))
        self.as_user: list[str] = []
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
            self.as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
        cluster = str(self.folder / "cluster")
        subprocess.run(
            [*self.as_user, programs / "initdb", "-D", cluster, "-U", "airflow", "-A", "trust", "--no-sync"],
            check=True, capture_output=True, cwd="/",
        )  # fmt: skip
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(self.folder), "fsync": "off"}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self.process = subprocess.Popen(
            [*self.as_user, programs / "postgres", "-D", cluster, "-p", str(self.port), *words],
            cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.ask("postgres", "create database airflow")

    def ask(self, database: str, statement: str) -> str:
        line = ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "airflow", "-d", database, "-Atc", statement]
        for _ in range(100):
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if not done.returncode:
                return done.stdout
            time.sleep(0.2)
        raise AssertionError(done.stderr)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # fast shutdown
        self.process.wait(timeout=60)
        shutil.rmtree(self.folder)


class Site:
    """The parts, with `variables` in their environment; `start` and `stop`, or `with`."""

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self.folder, self.database = folder, Database()
        self.address = f"http://127.0.0.1:{free_port()}"
        folder.mkdir()
        (folder / "passwords.json").write_text('{"admin": "admin"}')
        connection = f"airflow@127.0.0.1:{self.database.port}/airflow"
        settings = {
            "API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "API__BASE_URL": self.address,
            "API__HOST": "127.0.0.1",
            "API__PORT": self.address.rpartition(":")[2],
            "API__SECRET_KEY": secrets.token_hex(16),
            "API__WORKERS": "1",
            "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "CORE__DAGS_FOLDER": str(ROOT / "dags"),
            "CORE__DEFAULT_TASK_RETRY_DELAY": "1",
            "CORE__EXECUTION_API_SERVER_URL": f"{self.address}/execution/",
            "CORE__EXECUTOR": "airflow.providers.edge3.executors.EdgeExecutor",
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(folder / "passwords.json"),
            "DATABASE__EXTERNAL_DB_MANAGERS": "airflow.providers.edge3.models.db.EdgeDBManager",
            "DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{connection}",
            "DATABASE__SQL_ALCHEMY_CONN_ASYNC": f"postgresql+asyncpg://{connection}",
            "EDGE__API_ENABLED": "True",
            "EDGE__API_URL": f"{self.address}/edge_worker/v1/rpcapi",
            "EDGE__HEARTBEAT_INTERVAL": "2",
            "EDGE__JOB_POLL_INTERVAL": "1",
            "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "5",
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
        }
        self.common = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
            **{f"AIRFLOW__{name}": value for name, value in settings.items()},
            "PYTHONPATH": str(ROOT),
        }
        self.server = {**self.common, **variables, "AIRFLOW_HOME": str(folder / "server")}
        self.parts: dict[str, subprocess.Popen[bytes]] = {}
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.token = ""

    def __enter__(self) -> "Site":
        migrate = [PYTHON, "-m", "airflow", "db", "migrate"]
        with (self.folder / "migrate.log").open("wb") as log:
            subprocess.run(migrate, env=self.server, stdout=log, stderr=log, check=True)
        for name in PARTS:
            self.start(name)
        return self

    def __exit__(self, *error: object) -> None:
        for name in [*self.workers]:
            self.pull_the_plug(name)
        for name in ("scheduler", "triggerer", "dag-processor", "api-server"):
            if name in self.parts:
                end(self.parts[name])
        self.database.stop()

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.parts[name] = subprocess.Popen(
                [PYTHON, "-m", "airflow", *PARTS[name]], env=self.server, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, name: str) -> None:
        """A part of the server, and what it started."""
        os.killpg(self.parts[name].pid, signal.SIGKILL)
        self.parts[name].wait()

    def add_worker(self, name: str, variables: Mapping[str, str]) -> None:
        """A machine with two slots."""
        line = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL", str(PYTHON), "-m", "airflow"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.workers[name] = subprocess.Popen(
                [*line, "edge", "worker", "--edge-hostname", name, "--concurrency", "2"],
                env={**self.common, "AIRFLOW_HOME": str(self.folder / name), **variables},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def pull_the_plug(self, name: str) -> None:
        """Every process of a machine ends at once."""
        worker = self.workers.pop(name)
        worker.kill()
        worker.wait()

    # ---- REST

    def ask(self, method: str, path: str, content: Any = None, status: int = 200) -> Any:
        """The answer, whose status is demanded."""
        if not self.token:
            login = {"username": "admin", "password": "admin"}
            answer = until(lambda: self._login(login), 120, "the API answers")
            self.token = answer.json()["access_token"]
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = requests.request(method, f"{self.address}{path}", json=content, headers=headers, timeout=60)
        assert answer.status_code == status, answer.text
        return answer.json()

    def _login(self, login: Mapping[str, str]) -> requests.Response | None:
        try:
            answer = requests.post(f"{self.address}/auth/token", json=login, timeout=10)
        except requests.ConnectionError:
            return None
        return answer if answer.status_code == 201 else None

    def trigger(self, **conf: Any) -> str:
        """The DAG run's id."""
        content = {"logical_date": None, "conf": conf}
        return str(self.ask("POST", f"/api/v2/dags/{DAG}/dagRuns", content)["dag_run_id"])

    def state(self, run: str) -> str:
        return str(self.ask("GET", f"/api/v2/dags/{DAG}/dagRuns/{run}")["state"])

    def tasks(self, run: str) -> dict[str, Any]:
        """Task -> its instance."""
        found = self.ask("GET", f"/api/v2/dags/{DAG}/dagRuns/{run}/taskInstances")["task_instances"]
        return {task["task_id"]: task for task in found}

    def answer(self, run: str, task: str) -> Any:
        """What a task handed on."""
        path = f"/api/v2/dags/{DAG}/dagRuns/{run}/taskInstances/{task}/xcomEntries/return_value?deserialize=false"
        value = self.ask("GET", path)["value"]
        return json.loads(value) if isinstance(value, str) else value

    def log(self, run: str, task: str, number: int) -> str:
        """A try's log."""
        path = f"/api/v2/dags/{DAG}/dagRuns/{run}/taskInstances/{task}/logs/{number}?full_content=true"
        lines = self.ask("GET", path)["content"]
        return "\n".join(str(line["event"]) if isinstance(line, dict) else line for line in lines)


def until(happens: Callable[[], Any], seconds: float, what: str) -> Any:
    """What `happens` gives, once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.5)
    return found
