"""Was every entry of dvc.lock produced by a run? `python -m pipeline.verify`

git merges two branches' dvc.lock into a combination that nobody ran, without a conflict, and `dvc status` then calls it
up to date. DVC files each run in its run-cache under a key made of the stage's command, dependencies, parameters and
the paths of its outputs: an entry whose key is not there, or is there with other outputs, is one that no run produced.
The run-cache of the default remote is asked for what the local one has not.

Exit 0: every entry is what a run produced. 1: some are not, or do not fit to each other or to the files. 2: cannot
verify, there is no run-cache here and none on a remote.

DVC keeps no record of a stage with a `persist` output. Such an entry has to stand, whole, in a commit that is no merge.
`dvc commit` files its entry as a run does. What gives it away are outputs that stayed the same while inputs changed,
which a run gives too that comes to the same bytes: such an entry is named, and no warning.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.stage.cache import _get_cache_hash
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import revision
from pipeline.errors import PipelineError, run
from pipeline.files import checksum
from pipeline.locked_data import LockedData, MissingError

LOCK = Path("dvc.lock")
SHOWN = 8  # digits of a hash, for a person
NAMED = 5  # files in a line, at most
CANNOT_VERIFY = 2  # exit

Entry = Mapping[str, Any]  # of a stage in dvc.lock: cmd, deps, params, outs
Standing = Literal["run", "not run", "as committed", "not committed yet", "missing", "cannot verify"]


@dataclass(frozen=True)
class Verdict:
    """On one stage."""

    stage: str
    standing: Standing
    words: str  # on its standing
    warnings: list[str]  # what fails
    note: str = ""  # what a reviewer should know and need not fail: an entry accepted by `dvc commit`


@dataclass(frozen=True)
class Verification:
    """On the lock."""

    verdicts: list[Verdict]
    warnings: list[str]  # every verdict's, the stage named
    cannot: str  # why it cannot be verified; empty where it can

    @property
    def exit_status(self) -> int:
        """As the command ends."""
        return CANNOT_VERIFY if self.cannot else int(bool(self.warnings))


class Records:
    """The runs that the run-cache has a record of, here and on the default remote, which is asked last."""

    def __init__(self, repo: Repo) -> None:
        self._repo = repo
        self._here = Path(repo.stage_cache.cache_dir)

    def outputs(self, key: str, wanted: str) -> set[str]:
        """Hashes of what the runs under a key produced; the remote's only where `wanted` is not among those here."""
        here = {path.name for path in (self._here / key[:2] / key).glob("*")}
        return here if wanted in here else here | self._on_remote(key)

    @functools.cached_property
    def missing(self) -> str:
        """Why there is nothing to look an entry up in; empty where there is."""
        if any(path.is_file() for path in self._here.rglob("*")):
            return ""
        if self._remote is None:
            return "no run-cache here, and no default remote that could have one; add one, or run `dvc repro`"
        filesystem, runs = self._remote
        if not self._asked(lambda: filesystem.exists(runs)):
            return "no run-cache here and none on the remote; where the stages ran, call `dvc push --run-cache`"
        return ""

    @functools.cached_property
    def _remote(self) -> tuple[Any, str] | None:
        """The remote's file system and the folder of its run-cache."""
        if not self._repo.config["core"].get("remote"):
            return None
        odb = self._asked(lambda: self._repo.cloud.get_remote_odb(command="pull --run-cache", hash_name="md5-dos2unix"))
        if odb.fs.protocol in ("http", "https"):  # which DVC does not keep a run-cache on
            return None
        return odb.fs, odb.fs.join(odb.path, "runs")

    def _on_remote(self, key: str) -> set[str]:
        if self._remote is None:
            return set()
        filesystem, runs = self._remote
        folder = filesystem.join(runs, key[:2], key)
        found = self._asked(lambda: list(filesystem.find(folder)) if filesystem.exists(folder) else [])
        return {filesystem.name(path) for path in found}

    def _asked(self, question: Callable[[], Any]) -> Any:
        """The answer; CannotVerifyError where the remote gives none."""
        try:
            return question()
        except Exception as error:  # each kind of remote has its own kinds
            name = self._repo.config["core"]["remote"]
            raise CannotVerifyError(f"remote {name!r} does not answer: {error}") from None


class CannotVerifyError(Exception):
    """The remote was needed and could not be asked."""


def read_lock(text: str | None, where: str = str(LOCK)) -> dict[str, dict[str, Any]]:
    """Stage -> entry, of a lock's text; none of None. PipelineError for what is no lock, as after a conflict."""
    try:
        content = YAML(typ="safe", pure=True).load(text or "")
    except YAMLError as error:
        raise PipelineError(f"{where}: not YAML: {error}; after a conflict, run `dvc repro`") from None
    stages = (content or {}).get("stages", {}) if isinstance(content or {}, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(entry, dict) and "cmd" in entry for entry in stages.values()):
        raise PipelineError(f"{where}: no lock of DVC's: expected `stages` with a `cmd` each; run `dvc repro`")
    return stages


def composed(lock: Mapping[str, Entry], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """A lock with some stages' entries replaced, to be verified before it is written."""
    return {**lock, **entries}


def key_of(entry: Entry) -> str:
    """Under which the run-cache files the runs of an entry's inputs."""
    return str(_get_cache_hash(copy.deepcopy(dict(entry)), key=True))


def value_of(entry: Entry) -> str:
    """Under which, below the key, it files a run with the entry's outputs."""
    return str(_get_cache_hash(copy.deepcopy(dict(entry))))


def hashes(items: list[dict[str, Any]] | None) -> dict[str, str | None]:
    """Path -> hash of an entry's deps or outs."""
    return {item["path"]: item.get("md5") for item in items or []}


def changed_inputs(entry: Entry, other: Entry) -> list[str]:
    """Dependencies, parameters and `cmd` that differ between two entries of a stage, by name."""
    here, there = hashes(entry.get("deps")), hashes(other.get("deps"))
    names = sorted(path for path in here.keys() | there.keys() if here.get(path) != there.get(path))
    ours, theirs = entry.get("params") or {}, other.get("params") or {}
    files = [file for file in sorted(ours.keys() | theirs.keys()) if ours.get(file) != theirs.get(file)]
    names += ["parameters" if file == "params.yaml" else file for file in files]
    return names + (["cmd"] if entry["cmd"] != other["cmd"] else [])


def disagreements(lock: Mapping[str, Entry]) -> dict[str, list[str]]:
    """Stage -> its dependencies that are another stage's output in the lock with another hash."""
    made = {path: (name, found) for name, entry in lock.items() for path, found in hashes(entry.get("outs")).items()}
    return {
        name: [
            f"was run on {path} {_short(found)}, and {made[path][0]}'s is {_short(made[path][1])}"
            for path, found in hashes(entry.get("deps")).items()
            if path in made and made[path][1] != found
        ]
        for name, entry in lock.items()
    }


def verify(lock: Mapping[str, Entry] | None = None) -> Verification:
    """The lock, by default this repository's, against the run-cache, itself and the files. All is only read.

    It is called in the repository's root.
    """
    if lock is None:
        lock = read_lock(LOCK.read_text() if LOCK.exists() else None)
    try:
        with Repo() as repo:
            return _verify(lock, repo)
    except DvcException as error:
        raise PipelineError(f"dvc.yaml: DVC cannot read it: {error}") from None


def _verify(lock: Mapping[str, Entry], repo: Repo) -> Verification:
    found = {stage.name: stage for stage in repo.index.stages if isinstance(stage, PipelineStage)}
    stages = {name: stage for name, stage in found.items() if Path(stage.path) == Path(repo.root_dir, "dvc.yaml")}
    records, between = Records(repo), disagreements(lock)
    tracked = {
        Path(out.fs_path).relative_to(repo.root_dir).as_posix(): out.hash_info.value
        for other in repo.index.stages
        if not isinstance(other, PipelineStage)
        for out in other.outs
        if out.is_in_repo
    }
    verdicts = []
    for name, stage in stages.items():
        if name not in lock:
            words = "dvc.lock has no entry: it never ran; run `dvc repro`"
            verdicts.append(Verdict(name, "missing", words, [words]))
            continue
        entry = lock[name]
        standing, words = _standing(name, entry, stage, records)
        warnings = [words] if standing == "not run" else []
        warnings += [*between[name], *_against_files(entry, stage, lock, tracked)]
        verdicts.append(Verdict(name, standing, words, warnings, _accepted(name, entry, stage)))
    gone = [f"{name}: dvc.lock has an entry, and dvc.yaml no such stage" for name in lock if name not in stages]
    cannot = list(dict.fromkeys(verdict.words for verdict in verdicts if verdict.standing == "cannot verify"))
    if not stages:
        cannot.append("dvc.yaml has no stages")
    told = [f"{verdict.stage}: {warning}" for verdict in verdicts for warning in verdict.warnings]
    return Verification(verdicts, told + gone, "; ".join(cannot))


def _standing(name: str, entry: Entry, stage: PipelineStage, records: Records) -> tuple[Standing, str]:
    """What is known of an entry's origin."""
    if not _is_recorded(stage):
        return _in_history(name, entry)
    try:
        value = value_of(entry)
        produced = records.outputs(key_of(entry), value)
        if value in produced:
            return "run", "as a run produced it"
        if records.missing:
            return "cannot verify", records.missing
    except CannotVerifyError as error:
        return "cannot verify", str(error)
    if produced:
        return "not run", "runs with these inputs produced other outputs; run `dvc repro --force` or restore the entry"
    return "not run", (
        "no run produced this entry: its inputs in this combination are not in the run-cache; "
        f"run `dvc repro --force --single-item {name}`, or where it ran call `dvc push --run-cache`"
    )


def _is_recorded(stage: PipelineStage) -> bool:
    """Whether DVC files the runs of a stage (dvc.stage.cache._can_hash, of what it asks the stage alone)."""
    outs = [out for out in stage.outs if out.protocol == "local" and not out.persist and out.is_in_repo]
    return bool(stage.deps) and bool(stage.outs) and len(outs) == len(stage.outs) and not stage.always_changed


def _in_history(name: str, entry: Entry) -> tuple[Standing, str]:
    """Of a stage whose runs DVC does not file: whether somebody committed the entry as it is, or a merge made it."""
    why = "DVC files no runs of it (a persist output, or none)"
    folder = revision.git_folder()
    if folder is None:
        return "cannot verify", f"{why}, and this is no git repository"
    merging = (folder / "MERGE_HEAD").exists()
    if not merging and _committed(revision.commit_of("HEAD")).get(name) != entry:
        return "not committed yet", f"{why}; the entry is not committed yet"
    for commit in revision.commits_of(str(LOCK)):
        if _committed(commit).get(name) == entry:
            return "as committed", f"{why}; as it was committed in {commit[:SHOWN]}"
    if revision.is_shallow():
        return "cannot verify", f"{why}, and this clone's history is cut off; run `git fetch --unshallow`"
    return "not run", f"{why}, and no commit has this entry but a merge; run `dvc repro --force --single-item {name}`"


@functools.cache
def _committed(commit: str) -> dict[str, dict[str, Any]]:
    """The lock of a commit; an unreadable one of the past counts as none."""
    try:
        return read_lock(revision.text_at(commit, str(LOCK)), f"{commit[:SHOWN]}:{LOCK}")
    except PipelineError:
        return {}


def _accepted(name: str, entry: Entry, stage: PipelineStage) -> str:
    """Words on an entry with the outputs of the entry before it and other inputs; empty for any other."""
    if stage.frozen:
        return "frozen in dvc.yaml: it does not run, whatever changes"
    for commit in revision.commits_of(str(LOCK)):
        before = _committed(commit).get(name)
        if before is None or before == entry:
            continue
        changed = changed_inputs(entry, before)
        if not changed or hashes(before.get("outs")) != hashes(entry.get("outs")):
            return ""
        since = f"since {commit[:SHOWN]} changed {_few(changed)}"
        return f"accepted by `dvc commit`, or run again to the same bytes: {since}"
    return ""


def _against_files(
    entry: Entry, stage: PipelineStage, lock: Mapping[str, Entry], tracked: Mapping[str, str | None]
) -> Iterator[str]:
    """What of an entry differs from dvc.yaml, params.yaml and the files that git has."""
    if entry["cmd"] != stage.cmd:
        yield f"dvc.yaml's cmd is {stage.cmd!r}, the entry's {entry['cmd']!r}"
    deps: dict[str, Output] = {dep.def_path: dep for dep in stage.deps if dep not in stage.params}
    outs: dict[str, Output] = {out.def_path: out for out in stage.outs}
    locked, locked_outs = hashes(entry.get("deps")), hashes(entry.get("outs"))
    for what, ours, theirs in (("deps", locked, deps), ("outs", locked_outs, outs)):
        for where, names in (("the entry", ours.keys() - theirs.keys()), ("dvc.yaml", theirs.keys() - ours.keys())):
            if names:
                yield f"among {what} of {where} alone: {_few(sorted(names))}"
    made = {path for other in lock.values() for path in hashes(other.get("outs"))}
    in_git = {path: dep for path, dep in deps.items() if path in locked and path not in made | tracked.keys()}
    by_git = {path: out for path, out in outs.items() if path in locked_outs and not out.use_cache}
    try:
        folders = {path: _folder(path, tracked, stage.repo) for path in in_git}
    except MissingError as error:
        yield f"cannot be compared: {error}"
        return
    changed = [path for path, dep in in_git.items() if (folders[path] or _content(dep)) != locked[path]]
    changed += [path for path, out in by_git.items() if _content(out) != locked_outs[path]]  # they merge as text
    changed += [path for path, found in tracked.items() if path in locked and found != locked[path]]  # its .dvc file
    if changed:
        yield f"not what the entry says: {_few(changed)}; run `dvc repro`"
    for params in stage.params:
        yield from _other_params(params.def_path, entry.get("params", {}).get(params.def_path) or {}, params)


def _folder(path: str, tracked: Mapping[str, str | None], repo: Repo) -> str | None:
    """The hash of a folder of git's with data of .dvc files in it, which need not be here; None for any other."""
    inside = {out: digest for out, digest in tracked.items() if out.startswith(f"{path}/")}
    if not inside:
        return None
    data = LockedData(repo, {path: {"outs": [{"path": out, "md5": digest} for out, digest in inside.items()]}})
    files = {name: checksum(Path(name), "md5").removeprefix("md5:") for name in revision.files_below(path)}
    files |= {f"{out}/{name}".rstrip("/"): digest for out in inside for name, digest in data.files(out).items()}
    tree = Tree()  # type: ignore[no-untyped-call]
    for name, digest in files.items():
        tree.add(PurePosixPath(name).relative_to(path).parts, None, HashInfo("md5", digest))
    tree.digest()
    return str(tree.hash_info.value)


def _content(item: Output) -> str | None:
    """The hash of a file or folder as it lies here; None where it does not."""
    return item.get_hash().value if item.exists else None


def _other_params(file: str, locked: Mapping[str, Any], params: Any) -> Iterator[str]:
    if not params.exists:
        yield f"{file} is missing"
        return
    here = params.read_params(flatten=False)
    here = {key: _at(here, key) for key in params.params} if params.params else here
    for name in sorted(here.keys() | locked.keys()):
        if here.get(name) != locked.get(name):
            inner = _first_difference(here.get(name), locked.get(name))
            yield f"{file}: {name}{inner[0]}: {inner[1]!r:.60} here, and {inner[2]!r:.60} in the entry"


def _at(content: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _first_difference(here: Any, locked: Any) -> tuple[str, Any, Any]:
    """The dotted way to the first value that differs, and both."""
    if isinstance(here, Mapping) and isinstance(locked, Mapping):
        for key in sorted(here.keys() | locked.keys()):
            if here.get(key) != locked.get(key):
                way, ours, theirs = _first_difference(here.get(key), locked.get(key))
                return f".{key}{way}", ours, theirs
    return "", here, locked


def _few(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _short(found: str | None) -> str:
    return "nothing" if found is None else found[:SHOWN] + (".dir" if found.endswith(".dir") else "")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.verify", description="was every entry of dvc.lock run?")
    parser.parse_args()
    found = verify()
    for verdict in found.verdicts:
        print(f"{verdict.stage:<12} {verdict.words}" + (f"; {verdict.note}" if verdict.note else ""), flush=True)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if found.cannot:
        print(f"cannot verify: {found.cannot}", file=sys.stderr)
    sys.exit(found.exit_status)


if __name__ == "__main__":
    run(main)
