"""`make airflow`: Airflow for one person on one machine, until Ctrl-C. SQLite, LocalExecutor, loopback alone.

All that it keeps lies in .airflow/: database, logs (NAME.log of each part), password, and the remotes that a retraining
needs, which are made on the first start: remote.git, a bare clone of this repository, and store/, DVC's. Connections
effdet_git and effdet_dvc name them, until somebody names others there.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".airflow"
HUB, STORE = HOME / "remote.git", HOME / "store"
ADDRESS = HOME / "address"  # where the running one listens
USER = "admin"
# In the order in which they start; they end in the other, so that a task that is stopped finds the API to say so.
PARTS = {
    "api-server": ["api-server"],
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer", "--skip-serve-logs"],  # logs are read from disk; their server would listen everywhere
    "scheduler": ["scheduler", "--skip-serve-logs"],
}
START_SECONDS, STOP_SECONDS = 180, 90


def environment(port: int) -> dict[str, str]:
    """Of all its processes."""
    address = f"http://127.0.0.1:{port}"
    settings = {
        "CORE__DAGS_FOLDER": ROOT / "dags",
        "CORE__LOAD_EXAMPLES": False,
        "CORE__DAGS_ARE_PAUSED_AT_CREATION": False,
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": 4,
        "CORE__DEFAULT_TASK_RETRY_DELAY": 15,  # seconds
        "CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{HOME / 'airflow.db'}",
        "API__HOST": "127.0.0.1",
        "API__PORT": port,
        "API__BASE_URL": address,
        "API__WORKERS": 1,
        "API__INSTANCE_NAME": "EfficientDet",
        "LOGGING__BASE_LOG_FOLDER": HOME / "logs",
    }
    ours = {f"AIRFLOW__{name}": str(value) for name, value in settings.items()}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW__")}
    return {**inherited, **ours, "AIRFLOW_HOME": str(HOME), "PYTHONPATH": str(ROOT)}


def airflow(*words: str) -> list[str]:
    """The command line of Airflow's own command, of this environment."""
    return [sys.executable, "-m", "airflow", *words]


def update_remote() -> str:
    """What was committed here since, to the remote. Words where a branch there went another way; it stays as it is."""
    if not HUB.exists():
        subprocess.run(["git", "clone", "--quiet", "--bare", "--", str(ROOT), str(HUB)], check=True)
        return ""
    words = ["git", "-C", str(HUB), "fetch", "--quiet", "--", str(ROOT), "refs/heads/*:refs/heads/*"]
    return subprocess.run([*words, "refs/tags/*:refs/tags/*"], capture_output=True, text=True, check=False).stderr


def set_up(variables: Mapping[str, str]) -> None:
    """Database, remotes and connections; what is there stays."""
    done = HOME / "set-up"  # the first one, whole
    STORE.mkdir(exist_ok=True)
    update_remote()
    log = HOME / "set-up.log"
    with log.open("w") as file:
        steps = [airflow("db", "migrate")]
        if not done.exists():
            extra = {"effdet_git": HUB, "effdet_dvc": STORE}
            given = {name: {"conn_type": "generic", "extra": {"address": str(path)}} for name, path in extra.items()}
            (HOME / "connections.json").write_text(json.dumps(given))
            steps.append(airflow("connections", "import", str(HOME / "connections.json")))
        for words in steps:
            if subprocess.run(words, env=dict(variables), stdout=file, stderr=file, check=False).returncode:
                sys.exit(f"error: `airflow {' '.join(words[3:5])}` failed; {log} says why")
    done.touch()


@contextlib.contextmanager
def running(variables: Mapping[str, str]) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """All parts, each in a process group of its own."""
    parts: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, words in PARTS.items():
            with (HOME / f"{name}.log").open("ab") as file:
                parts[name] = subprocess.Popen(
                    airflow(*words), env=dict(variables), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    cwd=ROOT, start_new_session=True,
                )  # fmt: skip
            wait(variables["AIRFLOW__API__BASE_URL"], parts, {"metadatabase"})  # a task that finds no API fails
        yield parts
    finally:
        for process in reversed(parts.values()):
            end(process)


def end(process: "subprocess.Popen[Any]") -> None:
    """TERM to its group, and KILL for what stays."""
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def wait(address: str, parts: Mapping[str, "subprocess.Popen[bytes]"], names: set[str]) -> None:
    """Until the API says that all of these are healthy."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        check_alive(parts)
        with contextlib.suppress(OSError, ValueError):
            with urllib.request.urlopen(f"{address}/api/v2/monitor/health", timeout=5) as answer:  # noqa: S310 ours
                states = json.load(answer)
            if all(states[name]["status"] == "healthy" for name in names):
                return
        time.sleep(0.5)
    sys.exit(f"error: Airflow did not start within {START_SECONDS} s; {HOME}/*.log say why")


def check_alive(parts: Mapping[str, "subprocess.Popen[bytes]"]) -> None:
    """Ends where a part has ended."""
    for name, process in parts.items():
        if process.poll() is not None:
            sys.exit(f"error: Airflow's {name} ended (exit {process.returncode}); {HOME / name}.log says why")


def check_port(port: int) -> None:
    """Ends where somebody else listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            sys.exit(f"error: port {port} is taken on this machine; take another: make airflow PORT={port + 1}")


def check_whole() -> None:
    """Ends where this repository has not all of its history, which the remote's clones need."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    if subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == "true":
        sys.exit(f"error: {ROOT}: a shallow clone, which no remote can be made of; run `git fetch --unshallow`")


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C or TERM: once."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    print("\nstopping; a stage that runs is given time to save its work, and goes on at the next `make airflow`")
    sys.exit(0)


def main() -> None:
    """The command: PORT."""
    port = int(sys.argv[1])
    check_port(port)
    check_whole()
    os.umask(0o077)  # the password and the keys are this user's
    HOME.mkdir(exist_ok=True)
    variables = environment(port)
    print("setting up Airflow's database (half a minute at the first time)", flush=True)
    set_up(variables)
    address = variables["AIRFLOW__API__BASE_URL"]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with running(variables) as parts:
        print("starting Airflow", flush=True)
        wait(address, parts, {"metadatabase", "scheduler", "triggerer", "dag_processor"})
        ADDRESS.write_text(address)
        print(f"\nAirflow is ready: {address}\nuser {USER}, password {password()}\n")
        print("`make retrain` in another terminal trains; Ctrl-C here ends Airflow", flush=True)
        try:
            while True:
                check_alive(parts)
                time.sleep(1)
        finally:
            ADDRESS.unlink()


def password() -> str:
    """Of USER, which Airflow made up at its first start."""
    found: str = json.loads((HOME / "simple_auth_manager_passwords.json.generated").read_text())[USER]
    return found


if __name__ == "__main__":
    main()
