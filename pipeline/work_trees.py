"""The folders in which stages are run: a work tree of its own for each try, made from a mirror of the git remote.

Below local `retraining.work_dir`:

mirrors/KEY.git              a bare mirror of each git remote's branches, tags and candidates
tries/RUN/STAGE/NUMBER/      one try: its work tree, its part of DVC's cache, its lock
checkpoints/RUN/STAGE/       where local `checkpoint_dir` names no other place; gone when the stage is done
cache/                       DVC's objects and run-cache, the machine's (local `retraining.cache_dir`)

A try that was killed is known by its lock, which nobody holds. What it left is never used again, but for the caches and
the checkpoints, in which nothing half-written has its final name.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fsspec.core import url_to_fs

from pipeline.errors import PipelineError, Preempted
from pipeline.local import Local

TRY_VARIABLE = "STAGE_RUNNER_TRY"  # in the environment of all that a try starts: its folder
WAIT = ("--wait-for-lock",)  # DVC gives up after 3 s otherwise
CANDIDATES = "refs/candidates/"  # and the run: what was published, also when the branch is deleted after a squash
REFSPECS = tuple(f"+{refs}*:{refs}*" for refs in ("refs/heads/", "refs/tags/", CANDIDATES))
LAST_LINES = 20  # of a failed command, in the error
GRACE_SECONDS = 60  # from TERM to KILL: a training saves its state
GIB = 1 << 30


@dataclass(frozen=True)
class Try:
    """A try of a stage of a run, alive while its process holds the lock."""

    folder: Path

    @property
    def tree(self) -> Path:
        """The work tree."""
        return self.folder / "tree"

    @property
    def cache(self) -> Path:
        """What DVC takes for its cache: the machine's objects, and run-cache entries of this try's own."""
        return self.folder / "cache"

    @property
    def name(self) -> str:
        """RUN/STAGE/NUMBER."""
        return "/".join(self.folder.parts[-3:])


def work_dir(where: Local) -> Path:
    """Absolute, made where it is not there."""
    path = Path(where.retraining.work_dir).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def cache_dir(where: Local) -> Path:
    """DVC's cache of this machine, absolute."""
    return Path(where.retraining.cache_dir or work_dir(where) / "cache").absolute()


def check_space(where: Local) -> None:
    """PipelineError, with the figure, where the disk has less left than `retraining.min_free_gib`."""
    folder = work_dir(where)
    free, wanted = shutil.disk_usage(folder).free / GIB, where.retraining.min_free_gib
    if free < wanted:
        raise PipelineError(
            f"{folder}: {free:.1f} GiB are free, retraining.min_free_gib wants {wanted:.1f}; "
            "free some with `python -m pipeline.clean_up`"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock and holds it. The kernel lets go of it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_alive(folder: Path) -> bool:
    """Whether a process holds the try's lock."""
    try:
        with (folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


# ---- git


def git(folder: Path, *words: str, environment: Mapping[str, str] | None = None) -> str:
    """What git prints. PipelineError with its words where it fails; it never asks for a password."""
    variables = {**os.environ, "GIT_TERMINAL_PROMPT": "0", **(environment or {})}
    done = subprocess.run(["git", *words], cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError(f"git {words[0]}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


def mirror(remote: str, where: Local) -> Path:
    """The bare mirror of a remote's branches, tags and candidates, as they are now."""
    folder = work_dir(where) / "mirrors"
    path = folder / f"{hashlib.sha256(remote.encode()).hexdigest()[:12]}.git"
    with locked(path.with_suffix(".lock")):
        if not (path / "complete").exists():  # or a killed process left half of it
            shutil.rmtree(path, ignore_errors=True)
            git(folder, "init", "--quiet", "--bare", str(path))
            git(path, "config", "gc.auto", "0")  # work trees borrow its objects
            (path / "complete").touch()
        for left in [*path.glob("*.lock"), *path.glob("refs/**/*.lock")]:  # of a fetch that was killed
            left.unlink()
        git(path, "fetch", "--quiet", "--prune", "--no-write-fetch-head", "--", remote, *REFSPECS)
    return path


def branch_tip(source: Path, branch: str) -> str:
    """The commit of a mirror's branch; empty where there is none of that name."""
    try:
        return git(
            source, "rev-parse", "--verify", "--quiet", "--end-of-options", f"refs/heads/{branch}^{{commit}}"
        ).strip()
    except PipelineError:
        return ""


def default_branch(source: Path, remote: str) -> str:
    """The branch that the remote's HEAD names; empty where it names none."""
    head = re.search(
        r"^ref: refs/heads/(\S+)\s", git(source, "ls-remote", "--symref", "--", remote, "HEAD"), re.MULTILINE
    )
    return head[1] if head else ""


def check_out(source: Path, revision: str, tree: Path) -> None:
    """A clone that shares the mirror's objects and nothing else, at a revision."""
    git(source, "clone", "--quiet", "--shared", "--no-checkout", "--", str(source), str(tree))
    git(tree, "checkout", "--quiet", "--detach", revision)


# ---- tries


@contextlib.contextmanager
def fresh_try(run: str, stage: str, where: Local) -> Iterator[Try]:
    """A folder for a try, removed at its end; where it fails it stays.

    What older tries of the same stage of the same run left running on this machine is ended: the caller has given them
    up, and they would work on the same checkpoints.
    """
    parent = work_dir(where) / "tries" / run / stage
    with contextlib.ExitStack() as held:
        with tries_locked(where):
            parent.mkdir(parents=True, exist_ok=True)
            older = sorted(int(path.name) for path in parent.iterdir())
            for number in older:
                end_processes(parent / str(number))
            folder = parent / str(max(older, default=0) + 1)
            folder.mkdir()
            held.enter_context(locked(folder / "lock"))
        yield Try(folder)
        remove_try(folder)


def tries_locked(where: Local) -> contextlib.AbstractContextManager[None]:
    """While it is held no try begins on this machine."""
    return locked(work_dir(where) / "tries" / "lock")


def live_tries(where: Local) -> list[Path]:
    """Folders of tries that run."""
    return [path for path in (work_dir(where) / "tries").glob("*/*/*") if path.is_dir() and is_alive(path)]


def failed_tries(where: Local) -> list[Path]:
    """Folders of tries that failed or were killed, the newest first."""
    found = [path for path in (work_dir(where) / "tries").glob("*/*/*") if path.is_dir() and not is_alive(path)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def forgotten(where: Local) -> list[Path]:
    """Folders of failed tries beyond the newest `retraining.keep_failed`."""
    return failed_tries(where)[where.retraining.keep_failed :]


def forget_failed(where: Local) -> None:
    """Removes failed tries beyond the newest."""
    with tries_locked(where):
        for path in forgotten(where):
            remove_try(path)


def remove_try(folder: Path) -> None:
    """The folder, what runs in it, and the folders of run and stage where nothing else is in them."""
    end_processes(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, folder.parent.parent):
        with contextlib.suppress(OSError):
            parent.rmdir()


def remove_folder(path: str) -> None:
    """A folder or a URL of one, and all in it; nothing where there is none."""
    filesystem, inner = url_to_fs(path)
    if filesystem.exists(inner):
        filesystem.rm(inner, recursive=True)


def end_processes(folder: Path) -> None:
    """Ends what a try started and its killed runner left behind: TERM, and KILL for what stays."""
    number, deadline = signal.SIGTERM, time.monotonic() + GRACE_SECONDS
    told: set[int] = set()
    while processes := processes_of(folder):
        if time.monotonic() > deadline and number != signal.SIGKILL:
            number, told = signal.SIGKILL, set()
        for process in set(processes) - told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
            told.add(process)
        time.sleep(0.05)


def processes_of(folder: Path) -> list[int]:
    """Processes with the try in their environment, this one left out."""
    mark = f"{TRY_VARIABLE}={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


# ---- dvc


def prepare_dvc(found: Try, where: Local) -> None:
    """Gives a try's work tree the machine's cache: objects shared, run-cache entries copied in.

    DVC lists and rewrites the run-cache as a whole, and would meet other tries' half-written entries there.
    """
    shared = cache_dir(where)
    (shared / "files").mkdir(parents=True, exist_ok=True)
    found.cache.mkdir()
    (found.cache / "files").symlink_to(shared / "files")
    for path in (shared / "runs").glob("??/*/*"):
        if not path.name.startswith("."):
            copy = found.cache / path.relative_to(shared)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    site = found.folder / "site"
    site.mkdir(mode=0o700)  # DVC would let all users write into it, and opens the pickles that lie there
    remote = where.retraining.remote
    (found.tree / ".dvc" / "config.local").write_text(
        "[core]\n"
        f"    site_cache_dir = {site}\n"
        "    hardlink_lock = true\n"  # works on NFS too
        + ("    remote = retraining\n" if remote else "")
        + f"[cache]\n    dir = {found.cache}\n    type = reflink,hardlink,symlink,copy\n"
        + (f"['remote \"retraining\"']\n    url = {remote}\n" if remote else "")
    )


def dvc(found: Try, *words: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """The lines that dvc prints, shown on stderr as they come. It waits for a lock that another dvc holds."""
    return command(found, [sys.executable, "-P", "-m", "dvc", *WAIT, *words], environment)


def command(found: Try, words: list[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """Runs a program in a try's work tree; the lines that it prints, shown on stderr as they come.

    PipelineError with the last ones where it fails; Preempted where it says that it is to be run again.
    """
    variables = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "DVC_NO_ANALYTICS": "1",
        TRY_VARIABLE: str(found.folder),
        **(environment or {}),
    }
    variables.pop("GITHUB_TOKEN", None)  # pipeline.publish's alone
    process = subprocess.Popen(
        words, cwd=found.tree, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []
    try:
        for line in process.stdout or ():
            sys.stderr.write(line)
            lines.append(line.rstrip())
        status = process.wait()
    except BaseException:  # told to stop: to be told again changes nothing
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_processes(found.folder)
        process.wait()
        raise
    if status:
        told = "\n".join(lines[-LAST_LINES:])
        what = " ".join(words[words.index("-m") + 1 :] if "-m" in words else words)
        kind = Preempted if f"exited with {os.EX_TEMPFAIL}" in told else PipelineError
        raise kind(f"{found.name}: {what}: exit {status}; it stays in {found.folder}\n{told}")
    return lines
