"""Commands of pipeline/ as processes of the ML environment, with the settings that Airflow's connections hold.

Connections, all of them optional but the first:

effdet_git     extra: {"address": git remote, "environment": {variables for git, such as GIT_CONFIG_COUNT...}}
effdet_dvc     extra: {"address": DVC remote, "environment": {variables for DVC, such as AWS_SECRET_ACCESS_KEY}}
effdet_forge   password: the token; extra: {"repository": "owner/name", "address": the API's, null: GitHub's}

A worker's own settings stand in local.yaml or the environment, as outside of Airflow; ML_PYTHON names the interpreter.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from airflow.sdk import BaseHook, Connection
from airflow.sdk.exceptions import AirflowException, AirflowNotFoundException
from airflow.sdk.log import mask_secret

ROOT = Path(__file__).parents[1]
RETRY_EXIT = os.EX_TEMPFAIL  # pipeline.errors: told to stop, has saved what it did
GRACE_SECONDS = 90  # from TERM to KILL; pipeline.work_trees gives a stage 60
# Lines of libraries that tell a reader of the log nothing: shown at level debug alone.
NOISE = re.compile(
    r"^([IWEF]\d{4} |WARNING: All log messages before absl|.*(Deprecation|Future|User)Warning\b|$"
    r"|To track the changes with git|\tgit add|To enable auto staging|\tdvc config core|Use `dvc push`|Updating lock)"
)
OURS = ("AIRFLOW", "_AIRFLOW")  # variables with database, keys and connections: not for the ML environment

log = logging.getLogger(__name__)


def run_ml(
    module: str,
    arguments: Sequence[str],
    *,
    files: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs `python -m MODULE ARGUMENTS`; the last line of its stdout, which is JSON. Its stderr goes to the task's log.

    `files`: name -> content, laid down as JSON; an argument that is such a name becomes the file's path.
    Where it fails, SystemExit holds its own words, and Airflow tries again or not, as the task says. A task that is
    stopped stops it, and all that it started.
    """
    with tempfile.TemporaryDirectory(prefix="task-") as scratch:
        paths = {name: Path(scratch, name) for name in files or {}}
        for name, content in (files or {}).items():
            paths[name].write_text(json.dumps(content))
        words = [str(ml_python()), "-m", module, *(str(paths.get(word, word)) for word in arguments)]
        with Path(scratch, "stdout").open("w+") as stdout:
            lines, status = _run(words, _variables(environment or {}), stdout)
            stdout.seek(0)
            told = stdout.read().splitlines()
    if status:
        why = error_of(module, lines, status)
        log.error(why)
        sys.exit(why.splitlines()[0])  # as a task, it has failed: no traceback of Airflow's hides the words
    answer: dict[str, Any] = json.loads(told[-1])
    return answer


def ml_python() -> Path:
    """The interpreter of the ML environment on this machine."""
    path = Path(os.environ.get("ML_PYTHON", ROOT / ".venv" / "bin" / "python"))
    if not path.exists():
        raise AirflowException(f"{path}: no ML environment; run `make setup`, or let ML_PYTHON name its python")
    return path


def _run(words: list[str], variables: Mapping[str, str], stdout: Any) -> tuple[list[str], int]:
    # setpriv: the kernel tells it TERM when this process is killed, and no training goes on that nobody waits for.
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", "--", *words],
        cwd=ROOT,  # where local.yaml is
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines = []
    with _ended_with_the_task(process) as told:
        for line in process.stderr or ():
            lines.append(line.rstrip())
            log.log(logging.DEBUG if NOISE.match(lines[-1]) else logging.INFO, "%s", lines[-1])
        status = process.wait()
    return lines, RETRY_EXIT if told else status


@contextlib.contextmanager
def _ended_with_the_task(process: "subprocess.Popen[str]") -> Iterator[list[int]]:
    """TERM (the task is stopped, cleared or its worker shut down) is handed on; so ends a task that ran out of time.

    Yields the signals that came.
    """
    told: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        log.warning("told to stop: the stage is given time to save what it did")
        told.append(number)
        _signal(process, signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield told
    except BaseException:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        _signal(process, signal.SIGKILL)
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def error_of(module: str, lines: Sequence[str], status: int) -> str:
    """What went wrong, in the words of the command that met it first."""
    if status == RETRY_EXIT:
        generic = "stopped: the next try goes on from what it saved"
        return next((line for line in lines if line.startswith("stopped: ")), generic)
    begins = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
    if begins is None:
        last = next((line for line in reversed(lines) if not NOISE.match(line)), "")
        return f"{module}: {f'killed by signal {-status}' if status < 0 else f'exit {status}'}; it said last: {last}"
    told = [lines[begins]]
    for line in lines[begins + 1 :]:
        if not line or line.startswith(("error: ", "ERROR: ")):
            break
        told.append(line)
    return "\n".join(told)


def _variables(given: Mapping[str, str]) -> dict[str, str]:
    """The process's environment: this one's without Airflow's own, quiet libraries, and what was given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONWARNINGS": "ignore", "GX_ANALYTICS_ENABLED": "false"}
    return {**inherited, **quiet, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **given}


# ---- connections


def connection(name: str) -> Connection | None:
    """None where the deployment has none of that name. What is secret in it is masked in logs from now on."""
    try:
        found: Connection = BaseHook.get_connection(name)
    except AirflowNotFoundException:
        return None
    for secret in (found.password, *found.extra_dejson.get("environment", {}).values()):
        if secret:
            mask_secret(str(secret))
    return found


def git_remote() -> str:
    """The git remote's address. It may hold no password: it is shown in logs and commits."""
    found = connection("effdet_git")
    address = found.extra_dejson.get("address") if found else None
    if not address:
        raise AirflowException('connection effdet_git: none, or without {"address": the git remote} in its extra')
    return without_secret(str(address), "effdet_git")


def without_secret(address: str, name: str) -> str:
    """The address as it is. AirflowException where it holds a password, or a token in a user name's place."""
    parts = urlsplit(address)
    if parts.password or (parts.username and parts.scheme in ("http", "https")):
        raise AirflowException(f"connection {name}: the address holds a password or token; use ssh, or `environment`")
    return address


def remotes_environment() -> dict[str, str]:
    """Variables with which a command of pipeline/ reaches both remotes."""
    variables: dict[str, str] = {}
    for name in ("effdet_git", "effdet_dvc"):
        if found := connection(name):
            variables |= {key: str(value) for key, value in found.extra_dejson.get("environment", {}).items()}
            if name == "effdet_dvc" and found.extra_dejson.get("address"):
                address = without_secret(str(found.extra_dejson["address"]), name)
                retraining = {**_retraining_here(), "remote": address}
                variables["EFFDET_RETRAINING"] = json.dumps(retraining)
    return variables


def forge_environment() -> dict[str, str]:
    """Variables for pipeline.publish and pipeline.forge; empty where no token is configured."""
    found = connection("effdet_forge")
    if not (found and found.password):
        return {}
    given = {
        "GITHUB_TOKEN": found.password,
        "GITHUB_REPOSITORY": found.extra_dejson.get("repository"),
        "GITHUB_API_URL": found.extra_dejson.get("address"),
    }
    return {name: str(value) for name, value in given.items() if value}


def _retraining_here() -> dict[str, Any]:
    """The block `retraining` of this machine, in which a connection sets the remote."""
    if "EFFDET_RETRAINING" in os.environ:
        return dict(yaml.safe_load(os.environ["EFFDET_RETRAINING"]))
    path = ROOT / "local.yaml"
    content = (yaml.safe_load(path.read_text()) if path.exists() else None) or {}
    return dict(content.get("retraining") or {})
