"""Files as they stand in a git revision, without touching the work tree."""

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import PipelineError


def commit_of(revision: str) -> str:
    """The commit's 40 digits. PipelineError where there is no such revision."""
    try:
        return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
    except subprocess.CalledProcessError:
        raise PipelineError(
            f"{revision}: no revision of this repository; fetch it (`git fetch origin {revision}`) or name another"
        ) from None


def merge_base(commit: str, other: str) -> str | None:
    """The commit from which both went their ways; None where there is none, or a shallow clone does not have it."""
    try:
        return _git("merge-base", commit, other).strip()
    except subprocess.CalledProcessError:
        return None


@functools.cache
def text_at(commit: str, path: str) -> str | None:
    """The content of a text file, its path from the repository's root; None where the commit has no such file."""
    try:
        return _git("show", f"{commit}:{path}")
    except subprocess.CalledProcessError:
        return None


def changed_files(commit: str) -> list[str]:
    """Files that differ between the commit and the work tree, new ones that git does not ignore among them, sorted."""
    differ = _git("diff", "--name-only", "--no-renames", "-z", commit, "--").split("\0")
    new = _git("ls-files", "--others", "--exclude-standard", "-z").split("\0")
    return sorted(filter(None, {*differ, *new}))


def commits_of(path: str) -> Iterator[str]:
    """The commits, newest first and no merges among them, that changed a file. None outside of a repository."""
    try:
        yield from _git("log", "--full-history", "--no-merges", "--format=%H", "HEAD", "--", path).split()
    except subprocess.CalledProcessError:
        return


def is_shallow() -> bool:
    """Whether the clone's history was cut off."""
    try:
        return _git("rev-parse", "--is-shallow-repository").strip() == "true"
    except subprocess.CalledProcessError:
        return False


def git_folder() -> Path | None:
    """Where git keeps its state; None outside of a repository."""
    try:
        return Path(_git("rev-parse", "--absolute-git-dir").strip())
    except subprocess.CalledProcessError:
        return None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, capture_output=True, check=True, encoding="utf-8", errors="replace").stdout
