"""A repository with a DVC pipeline of small shell scripts, in which git and dvc are run as a person would."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

DVC_YAML = """\
stages:
  fetch:
    cmd: sh fetch.sh
    params: [address]
    deps: [fetch.sh]
    outs:
      - raw:
          persist: true
  prepare:
    cmd: sh prepare.sh
    params: [seed]
    deps: [prepare.sh]
    outs: [data.txt]
  train:
    cmd: sh train.sh
    params: [train.rate]
    deps: [data.txt, train.sh]
    outs: [model.txt]
    metrics:
      - scores.json:
          cache: false
"""
FILES = {
    "dvc.yaml": DVC_YAML,
    "params.yaml": "address: here\nseed: 1\ntrain:\n  rate: 0.1\n  unused: 3\n",
    "fetch.sh": "mkdir -p raw\ngrep address params.yaml > raw/file\n",
    "prepare.sh": "grep seed params.yaml > data.txt\n",
    "train.sh": "cat data.txt > model.txt\ngrep rate params.yaml >> model.txt\necho '{\"AP\": 0.5}' > scores.json\n",
}
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "DVC_NO_ANALYTICS": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@localhost",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@localhost",
}


class Repository:
    """A folder in which commands are run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str, exit_status: int = 0) -> str:
        """What the command prints, of which the exit status is demanded."""
        done = subprocess.run(
            command,
            cwd=self.path,
            env={**os.environ, **ENVIRONMENT},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=False,
        )
        assert done.returncode == exit_status, f"{' '.join(command)}\n{done.stdout}"
        return done.stdout

    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.path / file).read_text()
        assert old in text
        (self.path / file).write_text(text.replace(old, new, 1))

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)

    def copy(self, path: Path) -> "Repository":
        shutil.copytree(self.path, path, symlinks=True)
        return Repository(path)


def made(path: Path) -> Repository:
    """The pipeline, run and committed on branch main."""
    path.mkdir(parents=True)
    for name, content in FILES.items():
        (path / name).write_text(content)
    repository = Repository(path)
    repository.run("git", "init", "--quiet", "--initial-branch", "main")
    repository.run("dvc", "init", "--quiet")
    repository.run("dvc", "repro", "--quiet")
    repository.commit("run")
    return repository


def merged(repository: Repository) -> None:
    """Two branches, each run and committed, merged by git without a conflict into a lock that nobody ran.

    One changes parameters, the other a comment in the code: `fetch` and `train` take their code from one and their
    parameters and outputs from the other.
    """
    repository.run("git", "checkout", "--quiet", "-b", "parameters")
    repository.edit("params.yaml", "rate: 0.1", "rate: 0.2")
    repository.edit("params.yaml", "address: here", "address: there")
    repository.run("dvc", "repro", "--quiet")
    repository.commit("parameters")
    repository.run("git", "checkout", "--quiet", "-b", "code", "main")
    for name in ("fetch.sh", "train.sh"):
        repository.edit(name, FILES[name], FILES[name] + "# a comment\n")
    repository.run("dvc", "repro", "--quiet")
    repository.commit("code")
    repository.run("git", "checkout", "--quiet", "main")
    repository.run("git", "merge", "--quiet", "--no-edit", "--no-ff", "parameters")
    repository.run("git", "merge", "--quiet", "--no-edit", "--no-ff", "code")
    repository.run("dvc", "checkout", "--quiet")
