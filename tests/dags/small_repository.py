"""This repository with small parameters, behind a bare git remote: what a retraining of tests is made of."""

import re
import shutil
import subprocess
from pathlib import Path

from tests.test_repro import ROOT, SMALL


def made(folder: Path) -> Path:
    """A bare repository in `folder`, whose branch main has the code as it lies here, and no lock."""
    work = folder / "person"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name not in ("dvc.lock", "metrics.json"):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, work / name)
    params = (work / "params.yaml").read_text()
    for key, value in SMALL.items():
        params = re.sub(rf"^(\s+){key}.*$", rf"\g<1>{key}{value}", params, flags=re.MULTILINE)
    (work / "params.yaml").write_text(params)
    who = ("-c", "user.name=a", "-c", "user.email=a@localhost")
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "small parameters"]):
        subprocess.run(["git", *who, *words], cwd=work, check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(work), str(folder / "hub.git")], check=True)
    return folder / "hub.git"
