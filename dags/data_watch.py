"""Waits, without a worker, until files behind addresses are other ones than before; and what follows from that.

A file's version is what its server says without sending it: ETag, or date and length. Of a path on this machine: date
and length, of a folder those of what is in it.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from airflow.sdk import BaseOperator, Variable, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from airflow.triggers.base import BaseTrigger, TriggerEvent

from dags.ml import git_remote, remotes_environment, run_ml

SEEN = "efficientdet_data_seen"  # Variable: {"base_url", "versions" as they were last dealt with}
TIMEOUT = 60  # seconds, a request
AT_ONCE = 8  # requests

log = logging.getLogger(__name__)


class DataChanged(BaseTrigger):
    """Fires with all versions once one of them is not that of `known`."""

    def __init__(self, files: Mapping[str, Sequence[str]], known: Mapping[str, str], pause: float) -> None:
        super().__init__()
        self.files = files  # name -> places in the order to try
        self.known = known  # name -> version
        self.pause = pause  # seconds between two looks

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """As Airflow hands it to a triggerer."""
        return "dags.data_watch.DataChanged", {"files": self.files, "known": self.known, "pause": self.pause}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Servers that do not answer are asked again: that is no change."""
        async with httpx.AsyncClient(follow_redirects=True, timeout=TIMEOUT) as client:
            while True:
                try:
                    found = await versions(client, self.files)
                except (httpx.HTTPError, OSError) as error:
                    log.warning("%s; asked again in %s s", error or type(error).__name__, self.pause)
                else:
                    if found != self.known:
                        yield TriggerEvent(found)
                        return
                await asyncio.sleep(self.pause)


async def versions(client: httpx.AsyncClient, files: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Name -> version. httpx.HTTPError, OSError where a file is in none of its places."""
    few = asyncio.Semaphore(AT_ONCE)

    async def one(places: Sequence[str]) -> str:
        async with few:
            *others, last = places
            for place in others:
                try:
                    return await version(client, place)
                except (httpx.HTTPStatusError, FileNotFoundError):
                    continue
            return await version(client, last)

    return dict(zip(files, await asyncio.gather(*(one(places) for places in files.values())), strict=True))


async def version(client: httpx.AsyncClient, place: str) -> str:
    """Of one place."""
    if not place.startswith(("http://", "https://")):
        return await asyncio.to_thread(version_here, Path(place))
    answer = await client.head(place)
    answer.raise_for_status()
    told = {name: answer.headers.get(name) for name in ("etag", "last-modified", "content-length")}
    if told["etag"]:
        return str(told["etag"])
    if told["last-modified"]:
        return f"{told['last-modified']}, {told['content-length']} bytes"
    raise httpx.HTTPError(f"{place}: the server tells neither ETag nor Last-Modified, and cannot be watched")


def version_here(path: Path) -> str:
    """Of a file or folder on this machine. FileNotFoundError where there is none."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    states = [(file.name, state.st_mtime_ns, state.st_size) for file in files for state in [file.stat()]]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


class WaitForChange(BaseOperator):
    """Defers until the data is other than what was last dealt with; gives the versions."""

    template_fields = ("data",)

    def __init__(self, *, data: Any, pause: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.data = data  # what look_at_data gives
        self.pause = pause

    def execute(self, context: Any) -> None:
        """Where nothing was dealt with yet, or another place, at once."""
        seen = Variable.get(SEEN, default={}, deserialize_json=True)
        known = seen["versions"] if seen.get("base_url") == self.data["base_url"] else {}
        self.defer(trigger=DataChanged(self.data["files"], known, self.pause), method_name="changed")

    def changed(self, context: Any, event: dict[str, str]) -> dict[str, str]:
        """With the trigger's answer."""
        return event


@task(retries=2)
def look_at_data() -> dict[str, Any]:
    """Which files data.base_url of the remote's default branch consists of, and which checksums are pinned there."""
    return run_ml("pipeline.watched_data", ["--remote", git_remote()], environment=remotes_environment())


@task(retries=2)
def read_checksums(data: dict[str, Any]) -> dict[str, Any]:
    """Reads the data, and says what a retraining on it is given. Skips where it is what params.yaml pins."""
    now = run_ml("pipeline.watched_data", ["--remote", git_remote(), "--compute"], environment=remotes_environment())
    if now["files"] != data["files"]:
        raise AirflowFailException("params.yaml names other files meanwhile; the next run looks at them")
    changed = sorted(name for name, checksum in now["found"].items() if now["checksums"][name] != checksum)
    if not changed:
        raise AirflowSkipException("these bytes are those that params.yaml pins")
    log.info("changed: %s", ", ".join(f"{name} {now['found'][name]}" for name in changed))
    reason = f"the data at {data['base_url']} changed: {', '.join(changed)}"
    return {
        "run_id": run_id(now["checksums"], now["found"]),
        "conf": {"reason": reason[:500], "overrides": {"data.checksums": now["found"]}},
    }


def run_id(pinned: Mapping[str, Any], found: Mapping[str, str]) -> str:
    """The same for the same data in place of the same, however often it is seen: one retraining. Data that goes back to
    what it was before the pinned one is another.
    """
    return f"data-{hashlib.sha256(json.dumps([pinned, found], sort_keys=True).encode()).hexdigest()[:16]}"


@task
def remember(data: dict[str, Any], found: dict[str, str]) -> None:
    """What was dealt with: the next run waits for other versions."""
    Variable.set(SEEN, {"base_url": data["base_url"], "versions": found}, serialize_json=True)
