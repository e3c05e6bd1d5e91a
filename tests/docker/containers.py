"""Services of a compose file as processes of this machine, where there is no Docker engine: for test_compose.py.

A service gets namespaces of its own for mounts, processes and the host's name; its volumes and tmpfs lie where the file
says, other services are found by their names, and its environment is the file's. The network is one for all, apart from
the machine's. In the images' place stands this machine, with the checkout at /opt/effdet, or the root file systems that
are given. Needs root, ip, mount and unshare, and for the file's PostgreSQL initdb.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

NETWORK = "effdet-compose"  # a network namespace
HOSTS = Path("/etc/netns") / NETWORK / "hosts"  # `ip netns exec` puts it in the place of /etc/hosts
USER = "effdet"
# As the Dockerfile has them, and Debian.
IMAGE = {"PATH": "/opt/effdet/.venv-airflow/bin:/opt/effdet/.venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
         "PYTHONPATH": "/opt/effdet", "PYTHONUNBUFFERED": "1", "AIRFLOW_HOME": "/opt/airflow", "HOME": f"/home/{USER}",
         "AIRFLOW__CORE__DAGS_FOLDER": "/opt/effdet/dags", "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}  # fmt: skip
# As the official image of PostgreSQL has it, and what its entrypoint does at the first start.
POSTGRES_BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere"))
POSTGRES = {"PATH": f"{POSTGRES_BIN}:/usr/bin:/bin", "PGDATA": "/var/lib/postgresql/data"}
POSTGRES_ENTRYPOINT = """
chown postgres "$PGDATA"; mkdir -p /run/postgresql; chown postgres /run/postgresql; cd /
as() { setpriv --reuid postgres --regid postgres --clear-groups -- "$@"; }
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  as initdb --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --auth-host=scram-sha-256 >/dev/null
  echo "listen_addresses = '*'" >>"$PGDATA/postgresql.conf"
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
  echo "CREATE DATABASE \\"$POSTGRES_DB\\"" | as postgres --single postgres >/dev/null
fi
exec setpriv --reuid postgres --regid postgres --clear-groups -- "$@"
"""

ASK = """
import sys, urllib.request
method, path, content, token = sys.argv[1:]
request = urllib.request.Request("http://127.0.0.1:8080" + path, content.encode() if content != "null" else None,
    {"Content-Type": "application/json", "Authorization": "Bearer " + token}, method=method)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """${NAME:-default}, as compose takes it from the environment."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], text)


class Stack:
    """Use it as a context: at its end nothing runs, and the volumes are in `folder`."""

    def __init__(self, file: Path, folder: Path, checkout: Path, variables: Mapping[str, str]) -> None:
        content = YAML(typ="safe", pure=True).load(interpolated(file.read_text(), variables))
        self.services: dict[str, dict[str, Any]] = content["services"]
        self.volumes = set(content["volumes"])
        self.folder, self.checkout, self.file = folder, checkout, file
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.ended: set[str] = set()

    def __enter__(self) -> "Stack":
        self._remove()  # what a killed test left
        HOSTS.parent.mkdir(parents=True)
        names = [f"127.0.1.{number} {name}\n" for number, name in enumerate(self.services, 1)]
        HOSTS.write_text("".join(["127.0.0.1 localhost\n", *names]))
        for line in (["netns", "add", NETWORK], ["-n", NETWORK, "link", "set", "lo", "up"]):
            subprocess.run(["ip", *line], check=True)
        self.folder.mkdir(exist_ok=True)
        # Users of the image: this machine's interpreters may be readable by root alone.
        passwd = [f"{USER}:x:0:0::/home/{USER}:/bin/bash", *Path("/etc/passwd").read_text().splitlines()]
        (self.folder / "passwd").write_text("\n".join(passwd) + "\n")
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()

    def up(self, name: str) -> None:
        """Starts a service and what it depends on, as its conditions ask."""
        if name in self.running or name in self.ended:
            return
        for other, how in self.services[name].get("depends_on", {}).items():
            self.up(other)
            if how["condition"] == "service_healthy":
                self.wait_until_healthy(other)
            else:
                assert how["condition"] == "service_completed_successfully"
                self.wait_until_ended(other)
        with (self.folder / f"{name}.log").open("ab") as log:
            line = self._line(name, self.services[name]["command"])
            self.running[name] = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def revive(self) -> None:
        """Starts what ended, as `restart: unless-stopped` asks."""
        for name in [name for name, process in self.running.items() if process.poll() is not None]:
            assert self.services[name]["restart"] == "unless-stopped", self.log(name)
            del self.running[name]
            self.up(name)

    def run(self, name: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command in a running service: `docker compose exec`."""
        inside = ["nsenter", f"--target={self._first_process(name)}", "--mount", "--pid", "--uts", "--net", "--"]
        given = [f"{key}={value}" for key, value in self._environment(name).items()]
        line = [*inside, "env", "-i", "--chdir=/opt/effdet", *given, *command]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
        assert not check or done.returncode == 0, f"{name}: {command}: {done.stdout}{done.stderr}"
        return done

    def wait_until_healthy(self, name: str) -> None:
        """By the service's own check."""
        kind, *test = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        deadline = time.monotonic() + 240
        while self.run(name, *test, check=False).returncode:
            assert self.running[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.5)

    def ask(self, method: str, path: str, content: Any = None, token: str = "") -> Any:
        """Airflow's API, as the port that the file publishes has it."""
        line = ["ip", "netns", "exec", NETWORK, sys.executable, "-c", ASK, method, path, json.dumps(content), token]
        return json.loads(subprocess.run(line, capture_output=True, text=True, check=True, timeout=120).stdout)

    def wait_until_ended(self, name: str) -> None:
        if name not in self.ended:
            status = self.running.pop(name).wait(timeout=240)
            assert status == 0, self.log(name)
            self.ended.add(name)

    def down(self) -> None:
        """Ends all services, as `docker compose down` does: TERM to each first process, and KILL for what stays."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for name, process in self.running.items():
                if process.poll() is None:
                    os.kill(self._first_process(name), number)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and any(process.poll() is None for process in self.running.values()):
                time.sleep(0.2)
        self.running.clear()
        self.ended.clear()

    def _first_process(self, name: str) -> int:
        """Of a service's namespace; in this machine's numbers."""
        started = self.running[name].pid
        children = Path(f"/proc/{started}/task/{started}/children").read_text().split()
        return int((children or [started])[0])

    def log(self, name: str) -> str:
        return f"{name}: {(self.folder / f'{name}.log').read_text()[-5000:]}"

    def _environment(self, name: str) -> dict[str, str]:
        own = {key: str(value) for key, value in self.services[name].get("environment", {}).items()}
        return {**(POSTGRES if self._is_postgres(name) else IMAGE), **own}

    def _is_postgres(self, name: str) -> bool:
        return "/postgres:" in self.services[name]["image"]

    def _line(self, name: str, command: list[str]) -> list[str]:
        mounts = ["set -eu", "mount --make-rprivate /", f"hostname {name}"]
        # Folders that the image has and this machine need not have: laid over its own, which stay as they are.
        scratch = self.folder / f"{name}.scratch"
        mounts += [f"mkdir -p {scratch} && mount -t tmpfs tmpfs {scratch}"]
        for place in ("home", "opt", "run", "srv", *(["var/lib/postgresql"] if self._is_postgres(name) else [])):
            upper, work = scratch / place / "upper", scratch / place / "work"
            layers = f"lowerdir=/{place},upperdir={upper},workdir={work}"
            mounts += [f"mkdir -p {upper} {work} && mount -t overlay -o {layers} overlay /{place}"]
        mounts += ["mkdir -p /opt/effdet /opt/airflow /run/sshd", f"mount --bind {self.checkout} /opt/effdet"]
        mounts += [f"mount --bind {self.folder / 'passwd'} /etc/passwd"]
        mounts += [
            f"mount --bind {self.checkout}/docker/{file} /etc/ssh/{file}" for file in ("sshd_config", "ssh_config")
        ]
        for volume in self.services[name].get("volumes", []):
            source, target, *options = volume.split(":")
            assert options in ([], ["ro"])
            if source in self.volumes:
                path = self.folder / source
                path.mkdir(exist_ok=True)
            else:
                path = (self.file.parent / source).resolve()
            mounts += [f"mkdir -p {target} && mount --bind {shlex.quote(str(path))} {target}"]
            mounts += [f"mount -o remount,ro,bind {target}"] if options else []
        mounts += [f"mkdir -p {place.split(':')[0]} && mount -t tmpfs tmpfs {place.split(':')[0]}"
                   for place in self.services[name].get("tmpfs", [])]  # fmt: skip
        entrypoint = POSTGRES_ENTRYPOINT if self._is_postgres(name) else 'cd /opt/effdet; exec "$@"'
        given = [f"{key}={value}" for key, value in self._environment(name).items()]
        run = ["exec", "env", "-i", *given, "bash", "-euc", entrypoint, "entrypoint", *command]
        script = "\n".join([*mounts, shlex.join(run)])
        unshare = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", NETWORK, *unshare, "bash", "-c", script]

    def _remove(self) -> None:
        self.down()
        found = subprocess.run(["ip", "netns", "pids", NETWORK], capture_output=True, text=True, check=False).stdout
        for pid in found.split():
            subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "delete", NETWORK], capture_output=True, check=False)
        shutil.rmtree(HOSTS.parent, ignore_errors=True)
