"""The small pipeline behind a bare git remote, with a folder for DVC's, and machines that share nothing else."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline import stage_runner
from pipeline.local import Local, Retraining
from pipeline.stage_runner import Result, Run
from tests.pipeline.small_pipeline import ENVIRONMENT, Repository, made

STAGES = ("fetch", "prepare", "train")
UPSTREAM = {"fetch": (), "prepare": (), "train": ("prepare",)}


@functools.cache
def _made_once() -> tuple[Repository, tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory(prefix="small-pipeline-")  # goes when the tests end
    return made(Path(folder.name) / "repository"), folder


class Team:
    """A bare remote, a work tree of a person's, and a DVC remote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.person = _made_once()[0].copy(folder / "person")
        self.hub = folder / "hub.git"
        self.person.run("git", "clone", "--quiet", "--bare", str(self.person.path), str(self.hub))
        self.person.run("git", "remote", "add", "origin", str(self.hub))

    def machine(self, name: str, **settings: Any) -> Local:
        given = {"remote": str(self.folder / "store"), "min_free_gib": 0.0, **settings}
        return Local(retraining=Retraining(work_dir=str(self.folder / name), **given))

    def request(self, run: str, revision: str = "main", **values: object) -> Run:
        """As pipeline.prepare pins it; `values` are lines of params.yaml."""
        commit = self.person.run("git", "rev-parse", revision).strip()
        params = self.person.run("git", "show", f"{revision}:params.yaml")
        for key, value in values.items():
            lines = [f"{line.split(':')[0]}: {value}" if line.strip().startswith(f"{key}:") else line
                     for line in params.splitlines()]  # fmt: skip
            params = "\n".join(lines) + "\n"
        return Run(
            run=run, remote=str(self.hub), revision=commit, base="main", params=params,
            created="2026-01-02T03:04:05+00:00", reason="a test",
        )  # fmt: skip

    def push(self) -> None:
        self.person.run("git", "push", "--quiet", "origin", "HEAD:main")

    def push_data(self) -> None:
        """What the person has, to DVC's remote."""
        self.person.run("dvc", "remote", "add", "--local", "--force", "--default", "store", str(self.folder / "store"))
        self.person.run("dvc", "push", "--quiet")

    def copy_of_store(self) -> str:
        """A remote with the same in it, that a test may push to."""
        shutil.copytree(self.folder / "store", self.folder / "other store")
        return str(self.folder / "other store")


def run_all(request: Run, *machines: Local) -> dict[str, Result]:
    """Each stage on the next machine in turn."""
    results: dict[str, Result] = {}
    for number, name in enumerate(STAGES):
        upstream = [results[other] for other in UPSTREAM[name]]
        results[name] = stage_runner.run_stage(request, name, upstream, machines[number % len(machines)])
    return results


def out(result: Result, path: str) -> str:
    """The hash of an output."""
    return {item["path"]: item["md5"] for item in result.entry["outs"]}[path]


def consumed(result: Result) -> str:
    """The hash of data.txt as `train` read it."""
    return {item["path"]: item["md5"] for item in result.entry["deps"]}["data.txt"]


def start(folder: Path, request: Run, stage: str, upstream: list[Result], where: Local) -> "subprocess.Popen[str]":
    """The command, as another program calls it."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(request.model_dump_json())
    for result in upstream:
        (folder / f"{result.stage}.json").write_text(result.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.stage_runner", stage, "--run", "run.json",
         "--upstream", *[f"{result.stage}.json" for result in upstream]],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "EFFDET_RETRAINING": json.dumps(where.retraining.model_dump())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
