"""Frees what no run needs any more on this machine: `python -m pipeline.clean_up --git-remote URL`.

Work trees of failed tries beyond the newest, and of published runs; checkpoints of published runs, and those that
nobody wrote to for CHECKPOINT_DAYS, since a run that was stopped may be gone on with; DVC's cache but for what a tag,
an open retrain/ branch or the default branch needs. `--dry-run` only says what it would free. `--remote` is for the DVC
remote too, in an hour in which no run is in flight anywhere: what a run pushed is on no branch before it is published.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline import local
from pipeline.errors import PipelineError, run
from pipeline.local import Local
from pipeline.stage_runner import BRANCH
from pipeline.work_trees import (
    GIB,
    Try,
    check_out,
    default_branch,
    dvc,
    failed_tries,
    forgotten,
    fresh_try,
    git,
    live_tries,
    mirror,
    prepare_dvc,
    remove_folder,
    remove_try,
    tries_locked,
    work_dir,
)

CHECKPOINT_DAYS = 14


def clean_up(remote: str, where: Local, *, dry_run: bool, also_remote: bool) -> list[str]:
    """What was freed, or would be, one a line. PipelineError while a try is running here."""
    source = mirror(remote, where)
    with fresh_try("clean-up", "cache", where) as found, tries_locked(where):
        if others := [path for path in live_tries(where) if path != found.folder]:
            raise PipelineError(f"{others[0]}: is running; nothing was freed, clean up when it is done")
        tries = unneeded_tries(source, where)
        folders = [*tries, *unneeded_checkpoints(source, where)]
        told = [f"{'would free' if dry_run else 'freed'} {_gib(path)}: {path}" for path in folders]
        if not dry_run:
            for path in tries:
                remove_try(path)
            for path in folders[len(tries) :]:
                remove_folder(str(path))
        _check_out_kept(source, remote, found)
        prepare_dvc(found, where)
        words = ["gc", "--all-branches", "--all-tags", "--force"]
        return told + dvc(found, *words, *["--cloud"] * also_remote, *["--dry"] * dry_run)


def published_runs(source: Path) -> set[str]:
    """Runs that have a branch."""
    return set(git(source, "for-each-ref", "--format=%(refname:lstrip=3)", f"refs/heads/{BRANCH}").split())


def unneeded_tries(source: Path, where: Local) -> list[Path]:
    """Failed tries beyond the newest, and all of published runs."""
    published, beyond = published_runs(source), set(forgotten(where))
    return [path for path in failed_tries(where) if path in beyond or path.parts[-3] in published]


def unneeded_checkpoints(source: Path, where: Local) -> Iterator[Path]:
    """Checkpoint folders in the work folder, of published runs, and old ones."""
    published, oldest = published_runs(source), time.time() - CHECKPOINT_DAYS * 24 * 3600
    for path in sorted((work_dir(where) / "checkpoints").glob("*/*")):
        if path.parent.name in published or max(file.lstat().st_mtime for file in (path, *path.rglob("*"))) < oldest:
            yield path


def _check_out_kept(source: Path, remote: str, found: Try) -> None:
    """A clone whose branches are the default one and retrain/*: DVC keeps what the branches of a clone need."""
    branch = default_branch(source, remote)
    if not branch:
        raise PipelineError(f"{remote}: has no default branch; set its HEAD")
    check_out(source, f"refs/remotes/origin/{branch}", found.tree)
    for made in git(found.tree, "for-each-ref", "--format=%(refname)", "refs/heads").split():
        git(found.tree, "update-ref", "-d", made)
    for kept in (branch, f"{BRANCH}*"):
        git(found.tree, "fetch", "--quiet", "--tags", "origin", f"+refs/heads/{kept}:refs/heads/{kept}")


def _gib(folder: Path) -> str:
    """The space a folder takes, links and what it shares by hard links included."""
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return f"{size / GIB:.2f} GiB"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.clean_up", description="frees what no run needs any more")
    parser.add_argument("--git-remote", required=True, help="as for pipeline.prepare")
    parser.add_argument("--dry-run", action="store_true", help="only says what it would free")
    parser.add_argument("--remote", action="store_true", help="the DVC remote too, while no run is in flight anywhere")
    given = parser.parse_args()
    for line in clean_up(given.git_remote, local.load(), dry_run=given.dry_run, also_remote=given.remote):
        print(line)


if __name__ == "__main__":
    run(main)
