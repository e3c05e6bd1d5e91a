"""`make retrain`: what is committed here, retrained by the Airflow of `make airflow`, and followed to its end.

Exit 0 where a candidate was published, 1 where it failed. Ctrl-C leaves the run to Airflow.
"""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from dags.standalone import ADDRESS, HUB, ROOT, USER, password, update_remote

DAG = "efficientdet_retrain"
PAUSE = 2  # seconds between two looks
OVER = {"success", "failed"}
ERROR_LINES = 12  # of a failed task's log, here


class Api:
    """Airflow's REST API."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.token = ""
        self.token = self.ask("POST", "/auth/token", {"username": USER, "password": password()})["access_token"]

    def ask(self, method: str, path: str, content: Any = None) -> Any:
        """The answer, JSON. Ends with Airflow's words where it refuses."""
        request = urllib.request.Request(  # noqa: S310 loopback's
            f"{self.address}{path}",
            method=method,
            data=None if content is None else json.dumps(content).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                return json.load(answer)
        except urllib.error.HTTPError as error:
            sys.exit(f"error: Airflow refuses: {error.read().decode(errors='replace')[:2000]}")
        except urllib.error.URLError as error:
            sys.exit(f"error: {self.address}: {error.reason}; is `make airflow` running?")


def git(*words: str) -> str:
    """What git says of this repository."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


def follow(api: Api, run: str) -> str:
    """Prints a line for each change of a task; the run's state at its end."""
    path, seen = f"/api/v2/dags/{DAG}/dagRuns/{run}", dict[str, tuple[str, int]]()
    while True:
        state = str(api.ask("GET", path)["state"])  # before its tasks: none of their last changes is missed
        tasks = api.ask("GET", f"{path}/taskInstances")["task_instances"]
        for task in sorted(tasks, key=lambda task: task["start_date"] or "9"):
            now = (task["state"] or "waiting", task["try_number"])
            if now != seen.get(task["task_id"], ("waiting", 0)) and now[0] not in ("waiting", "scheduled", "queued"):
                again = f", try {now[1]}" if now[1] > 1 else ""
                print(
                    f"{time.strftime('%H:%M:%S')}  {task['task_id']:10} {now[0]}{again}{told(api, path, task)}",
                    flush=True,
                )
                if now[0] in ("failed", "up_for_retry"):
                    print_errors(api, path, task)
            seen[task["task_id"]] = now
        if state in OVER:
            return state
        time.sleep(PAUSE)


def told(api: Api, path: str, task: Any) -> str:
    """Of a stage that is done: whether it came from the cache, and how long it took."""
    if task["state"] != "success":
        return ""
    result = answer(api, path, task["task_id"])
    return f": {'cached' if result['cached'] else 'run'}, {result['seconds']:.0f} s" if "cached" in result else ""


def answer(api: Api, path: str, task: str) -> Any:
    """What a task handed on."""
    value = api.ask("GET", f"{path}/taskInstances/{task}/xcomEntries/return_value")["value"]
    return json.loads(value) if isinstance(value, str) else value


def print_errors(api: Api, path: str, task: Any) -> None:
    """What the failed try's log says of it."""
    log = api.ask("GET", f"{path}/taskInstances/{task['task_id']}/logs/{task['try_number']}?full_content=true")
    lines = [line["event"] for line in log["content"] if isinstance(line, dict) and line.get("level") == "error"]
    for line in "\n".join(lines).splitlines()[:ERROR_LINES]:
        print(f"            {line}")


def main() -> None:
    """The command: reason, and what else the trigger form takes (JSON)."""
    reason, given = sys.argv[1:]
    if not ADDRESS.exists():
        sys.exit("error: Airflow is not running here; start it in another terminal: make airflow")
    api = Api(ADDRESS.read_text())
    if problem := update_remote():
        print(f"warning: {HUB} was not brought up to date:\n{problem}", file=sys.stderr)
    if git("status", "--porcelain", "--untracked-files=no"):
        print("note: what is not committed here is not in the run")
    conf = {"reason": reason, "revision": git("rev-parse", "HEAD"), **json.loads(given)}
    run = api.ask("POST", f"/api/v2/dags/{DAG}/dagRuns", {"logical_date": None, "conf": conf})["dag_run_id"]
    print(f"run {run}: {api.address}/dags/{DAG}/runs/{run}", flush=True)
    try:
        state = follow(api, run)
    except KeyboardInterrupt:
        sys.exit("\nleft; the run goes on in Airflow")
    if state != "success":
        sys.exit(f"error: the retraining failed: {api.address}/dags/{DAG}/runs/{run}")
    candidate = answer(api, f"/api/v2/dags/{DAG}/dagRuns/{run}", "publish")
    print(f"{candidate.get('decision', 'done')}: AP {candidate.get('AP')} on {candidate.get('split')}; "
          f"branch {candidate['branch']} of {candidate['remote']} {candidate['pull_request']}")  # fmt: skip
    print(f"look at it: git fetch {candidate['remote']} {candidate['branch']} && git show FETCH_HEAD:report.md")


if __name__ == "__main__":
    main()
