"""What dvc.yaml and the *.dvc files say of stages and data, and entries of dvc.lock on their own.

No stage is known here by name.
"""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.settings import read_yaml
from pipeline.verify import LOCK, Entry, hashes

DVC_FILE = "dvc.yaml"
OUTPUTS = ("outs", "metrics", "plots")


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml, as far as its runner has to know it."""

    name: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]  # all, in order
    in_git: frozenset[str]  # of them, `cache: false`
    persist: frozenset[str]  # of them, kept from run to run; DVC files no runs of such a stage


def read_stages(tree: Path) -> dict[str, Stage]:
    """The stages, in dvc.yaml's order."""
    content = read_yaml(tree / DVC_FILE) or {}
    stages = content.get("stages") or {}
    for name, stage in stages.items():
        if "foreach" in stage or "matrix" in stage or stage.get("wdir"):
            raise PipelineError(f"{DVC_FILE}: {name}: foreach, matrix and wdir are not for the stage runner")
    return {name: _stage(name, stage) for name, stage in stages.items()}


def _stage(name: str, content: Mapping[str, Any]) -> Stage:
    outs: dict[str, Mapping[str, Any]] = {}
    for kind in OUTPUTS:
        for item in content.get(kind) or []:
            outs |= {path: how or {} for path, how in item.items()} if isinstance(item, dict) else {item: {}}
    return Stage(
        name,
        tuple(content.get("deps") or []),
        tuple(outs),
        frozenset(path for path, how in outs.items() if how.get("cache") is False),
        frozenset(path for path, how in outs.items() if how.get("persist")),
    )


def producers(stage: Stage, stages: Mapping[str, Stage]) -> dict[str, str]:
    """Dependency -> the stage that makes it. PipelineError where a dependency is a part of an output."""
    made = {path: other.name for other in stages.values() for path in other.outs}
    for dep in stage.deps:
        for out in made:
            if dep != out and (_below(dep, out) or _below(out, dep)):
                raise PipelineError(
                    f"{DVC_FILE}: {stage.name} depends on {dep}, and {made[out]} makes {out}; name {out} itself, "
                    "so that what was consumed can be compared"
                )
    return {dep: made[dep] for dep in stage.deps if dep in made}


def data_files(tree: Path) -> dict[str, str]:
    """Path -> hash of what *.dvc files in git hold; those without a hash, which have no data yet, left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", "*.dvc"], cwd=tree, capture_output=True, text=True, check=True
    )
    found = {}
    for name in filter(None, listed.stdout.split("\0")):
        for path, digest in hashes((read_yaml(tree / name) or {}).get("outs")).items():
            if digest:
                found[str(Path(name).parent / path)] = digest
    return found


def to_pull(stage: Stage, stages: Mapping[str, Stage], tree: Path) -> list[str]:
    """The dependencies that are not in git: outputs of other stages, and data of *.dvc files."""
    data = data_files(tree)
    held = [path for path in data if any(path == dep or _below(path, dep) or _below(dep, path) for dep in stage.deps)]
    made = producers(stage, stages)
    return [dep for dep in made if dep not in stages[made[dep]].in_git] + held


def write_lock(tree: Path, entries: Mapping[str, Entry]) -> None:
    """dvc.lock with these entries and no others, as DVC lays it out."""
    _dump({"schema": "2.0", "stages": {name: dict(entry) for name, entry in entries.items()}}, tree / LOCK)


def write_data_file(path: Path, item: Mapping[str, Any]) -> None:
    """A *.dvc file that holds an entry's output, by the name of its file alone."""
    _dump({"outs": [{**item, "path": Path(item["path"]).name}]}, path)


def _dump(content: Any, path: Path) -> None:
    yaml = YAML()
    yaml.default_flow_style = False
    with path.open("w") as file:
        yaml.dump(content, file)


def _below(path: str, folder: str) -> bool:
    return Path(folder) in Path(path).parents
