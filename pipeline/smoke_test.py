"""Does a consumer get production's model, and does it detect? `python -m pipeline.smoke_test REPOSITORY --bundle HASH`

It knows what a consumer knows, the repository's address: `dvc artifacts get` into a new folder, from a clone of its
own; every file held to the bundle's checksums; the SavedModel loaded in a fresh process, and a picture given to it.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline import synthetic
from pipeline.errors import PipelineError, run
from pipeline.exports import FILES
from pipeline.files import checksum
from pipeline.latency import run_in_turn
from pipeline.registry import ARTIFACT, PROD
from pipeline.release import dvc_md5

CHECKSUMS = "checksums.sha256"


def smoke_test(repository: str, bundle: str, store: str | None = None) -> None:
    """PipelineError names what a consumer of the stage prod would meet.

    bundle: the hash in dvc.lock that it has to be. store: a DVC remote's URL in place of the repository's own.
    """
    if Path(repository).exists():  # by its path DVC would take a bare repository for a part of one around it
        repository = Path(repository).absolute().as_uri()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        words = [sys.executable, "-P", "-m", "dvc", "artifacts", "get", repository, ARTIFACT, "--stage", PROD]
        words += ["--remote", "smoke-test", "--remote-config", f"url={store}"] if store else []
        done = subprocess.run([*words, "--out", str(folder)], cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            told = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
            raise PipelineError(f"`dvc artifacts get`: {told[-1]}")
        check_files(folder)
        if (found := dvc_md5(folder)) != bundle:
            raise PipelineError(f"{PROD} gives the bundle {found}, and the version's is {bundle}")
        picture = next(synthetic.pictures("val", 1, seed=1)).jpeg
        ran = run_in_turn([folder / FILES["saved_model"]], [picture])[0]
        if ran.fault or not ran.answered:
            raise PipelineError(f"the SavedModel does not detect: {ran.fault or 'scores or boxes are no numbers'}")


def check_files(folder: Path) -> None:
    """PipelineError unless the bundle's files are those of its checksums, none more, none less, none changed."""
    if not (folder / CHECKSUMS).is_file():
        raise PipelineError(f"{CHECKSUMS}: not in the bundle")
    lines = (folder / CHECKSUMS).read_text().splitlines()
    listed = {name: f"sha256:{digest}" for digest, _, name in (line.partition("  ") for line in lines)}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / CHECKSUMS]
    found = {path.relative_to(folder).as_posix(): checksum(path, "sha256") for path in files}
    if differ := sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name)):
        raise PipelineError(f"{CHECKSUMS}: does not say what came: {', '.join(differ)}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.smoke_test", description=__doc__.splitlines()[0])
    parser.add_argument("repository", help="git's address: a URL or a path")
    parser.add_argument("--bundle", required=True, help="the hash in dvc.lock of the version's bundle")
    parser.add_argument("--store", help="a DVC remote's URL, where the repository names none that is reached from here")
    given = parser.parse_args()
    smoke_test(given.repository, given.bundle, given.store)
    print("the model of prod came whole, and detects")


if __name__ == "__main__":
    run(main)
