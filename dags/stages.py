"""The stages of dvc.yaml as tasks need them: in order, with the stages upstream, and what `meta.airflow` says."""

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DVC_FILE = Path(__file__).parents[1] / "dvc.yaml"
SETTINGS = ("queue", "pool", "retries", "timeout_minutes", "executor")  # keys of meta.airflow


@dataclass(frozen=True)
class Stage:
    """A stage, and the task that runs it."""

    name: str
    description: str
    upstream: tuple[str, ...]  # stages, as edges of `dvc dag`
    outs: tuple[str, ...]
    settings: Mapping[str, Any]  # arguments of the task


def read_stages(path: Path = DVC_FILE) -> list[Stage]:
    """In dvc.yaml's order, which is one to run them in. ValueError names a key of meta.airflow that there is not."""
    content = yaml.safe_load(path.read_text())["stages"]
    outs = {name: tuple(_paths(stage, "outs", "metrics", "plots")) for name, stage in content.items()}
    producers = {out: name for name, paths in outs.items() for out in paths}
    return [
        Stage(
            name,
            stage.get("desc", ""),
            tuple(dict.fromkeys(producers[dep] for dep in _paths(stage, "deps") if dep in producers)),
            outs[name],
            _settings(name, (stage.get("meta") or {}).get("airflow") or {}),
        )
        for name, stage in content.items()
    ]


def _paths(stage: Mapping[str, Any], *kinds: str) -> Iterable[str]:
    for kind in kinds:
        for item in stage.get(kind) or []:
            yield from item if isinstance(item, dict) else [item]


def _settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(given.keys() - set(SETTINGS)):
        raise ValueError(
            f"dvc.yaml: {name}: meta.airflow: unknown {', '.join(unknown)}; there are {', '.join(SETTINGS)}"
        )
    found = {key: value for key, value in given.items() if key != "timeout_minutes"}
    if "timeout_minutes" in given:
        found["execution_timeout"] = datetime.timedelta(minutes=given["timeout_minutes"])
    return found
