"""Puts an approved candidate into production, from any machine.

`python -m pipeline.promotion retrain/RUN --remote URL --approved-by NAME --note WORDS`; the last line on stdout is JSON
(the fields of Promoted). What a person does with `python -m pipeline.promote promote` in a work tree of theirs, it does
in a clone of its own, for a commit on any branch:

1. GTO's tags on the candidate's commit: a version, and that it is in prod. Who approved what, and why, stands in them;
2. one commit on the remote's default branch: the candidate's params.yaml, dvc.lock and metrics, and the champion;
3. data, then branch and tags are pushed, all or none;
4. the smoke test, as a consumer (pipeline.smoke_test). Where it fails the commit is reverted and the version before is
   put back. Where that is not possible now, it ends with exit 75: run again, it goes on there.

Given again, after a kill -9 too, it goes on: nothing that was pushed is half done, and the smoke test is made again.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline import local, registry
from pipeline.champion import CHAMPION
from pipeline.errors import PipelineError, Preempted, run
from pipeline.history_page import Version
from pipeline.local import Local
from pipeline.lock_entries import read_stages
from pipeline.publish import candidate_at, unfit
from pipeline.registry import ARTIFACT, CHAMPION_FOLDER, JUDGE, OVERRIDE, PROD, ROLLED_BACK
from pipeline.settings import Section, validated
from pipeline.stage_runner import PARAMS, keep_record, pull_dependencies, push
from pipeline.verify import LOCK, read_lock
from pipeline.work_trees import (
    Try,
    branch_tip,
    check_out,
    check_space,
    default_branch,
    dvc,
    fresh_try,
    git,
    mirror,
    prepare_dvc,
)

ATTEMPTS = 3  # of a push that another one was faster than
IDENTITY = {"user.email": "promotion@localhost", "commit.gpgSign": "false", "tag.gpgSign": "false"}  # and a name

Line = Annotated[str, Field(pattern=r"^\S(.*\S)?$")]


class Approval(Section):
    """Who lets a candidate into production, and why. Stands in the tags."""

    approved_by: Annotated[str, Field(pattern=r"^[^<>\s]([^<>\n\r]{0,98}[^<>\s])?$")]  # as git takes a name
    note: Line | None = None
    override: Line | None = None  # why a candidate is taken that the gate did not accept

    def words(self, candidate: str) -> str:
        """What the tag's message begins with."""
        lines = [
            self.note or f"Promote {candidate.split()[0]}",
            "",
            f"Candidate: {candidate}",
            f"Approved-by: {self.approved_by}",
        ]
        return "\n".join(lines + ([f"{OVERRIDE}{self.override}"] if self.override else []))


class Promoted(Section):
    """What is in production."""

    version: str
    candidate: str  # the commit that the version's tag stands on
    branch: str  # the remote's default branch
    champion: str  # its commit that made the version the champion
    after: str  # the version that was in production before; empty: none


@dataclasses.dataclass(frozen=True)
class Work:
    """A clone of the remote at its default branch, and what it knows of the remote."""

    found: Try
    remote: str
    branch: str  # the default one
    seen: str  # branch and tags of the remote, as the clone has them
    where: Local


def promote(remote: str, revision: str, approval: Approval, where: Local) -> Promoted:
    """Promotes the commit that `revision` names. PipelineError where the gate did not accept it and nothing overrides
    that, where the default branch has become another pipeline, and where the smoke test failed, after the way back.
    """
    check_space(where)
    for _ in range(ATTEMPTS):
        commit, branch = candidate_at(mirror(remote, where), remote, revision)
        with work_on(remote, commit, approval.approved_by, where) as work:
            version = advance(work, commit, branch, approval)
            if version:
                try_out(work, version)
                return Promoted(
                    version=version.name,
                    candidate=version.commit,
                    branch=work.branch,
                    champion=crowning(work),
                    after=before(),
                )
    raise Preempted(f"{remote} changed during each of {ATTEMPTS} tries; nothing was pushed; run it again")


@contextlib.contextmanager
def work_on(remote: str, commit: str, name: str, where: Local) -> Iterator[Work]:
    """Stands in a fresh clone, as pipeline.registry wants it, whose words go to stderr. Git writes down the name."""
    source = mirror(remote, where)
    branch = default_branch(source, remote)
    tip = branch_tip(source, branch)
    if not tip:
        raise PipelineError(f"{remote}: has no default branch to which a champion could be written")
    with fresh_try(commit[:12], "promotion", where) as found:
        check_out(source, tip, found.tree)
        prepare_dvc(found, where)
        for key, value in {**IDENTITY, "user.name": name}.items():
            git(found.tree, "config", key, value)
        with contextlib.chdir(found.tree), contextlib.redirect_stdout(sys.stderr):
            yield Work(found, remote, branch, refs(str(source), branch), where)


def refs(place: str, branch: str) -> str:
    """What a promotion changes in git."""
    return git(Path(), "ls-remote", "--refs", "--", place, f"refs/heads/{branch}", f"refs/tags/{ARTIFACT}*")


def advance(work: Work, commit: str, branch: str, approval: Approval) -> Version | None:
    """The version, in production as far as git tells; None where the remote has changed meanwhile."""
    known = registry.version_of(commit)
    if known and registry.in_production(known):
        print(f"{known.name} is in {PROD}, and the champion")
        return known
    decision = registry.judged_at(commit).decision
    if decision != "accepted" and not approval.override:
        raise PipelineError(
            f"{branch} ({commit[:10]}): the gate's decision is {decision}; only accepted goes on, or an override "
            "with a reason"
        )
    take_over(work, commit)
    words = approval.words(f"{branch} ({commit})")
    version = registry.register_commit(commit, words)
    registry.put(version, PROD, words)
    crown(work, version, words)
    return version if pushed(work) else None


def take_over(work: Work, commit: str) -> None:
    """Writes params.yaml, dvc.lock and what else travels by git, as the candidate has them."""
    tree = work.found.tree
    in_git = [path for stage in read_stages(tree).values() for path in sorted(stage.in_git)]
    files = {path: git(tree, "show", f"{commit}:{path}") for path in (PARAMS, *in_git)}
    entries = read_lock(git(tree, "show", f"{commit}:{LOCK}"), f"{LOCK} of {commit[:10]}")
    if problem := unfit(work.found, entries, files):
        raise PipelineError(
            f"{work.branch} has another code or champion than {commit[:10]} was run and judged with; nothing was "
            f"changed; retrain from {work.branch}: {problem}"
        )


def crown(work: Work, version: Version, words: str) -> None:
    """Makes the version the champion, in a commit that holds what `dvc repro` makes of it. Its data is pushed."""
    found = work.found
    registry.write_champion(version)
    stages = read_stages(found.tree)
    stage = stages[JUDGE]
    pull_dependencies(found, stage, stages)
    dvc(found, "repro", "--single-item", stage.name, environment=local.as_environment(work.where))
    registry.require_same_release(version)
    entry = read_lock(LOCK.read_text())[stage.name]
    keep_record(found, entry, work.where)
    push(found, stage, entry)
    dvc(found, "push", *[str(path) for path in sorted(CHAMPION_FOLDER.glob("*.dvc"))])
    in_git = {path for other in stages.values() for path in other.in_git}
    git(found.tree, "add", "--all", "--", PARAMS, str(LOCK), *in_git, str(CHAMPION), str(CHAMPION_FOLDER))
    commit_staged(found, f"Make {version.name} the champion\n\n{words}")


def commit_staged(found: Try, message: str) -> None:
    """Without hooks of the repository."""
    git(found.tree, "commit", "--quiet", "--no-verify", "--message", message)


def pushed(work: Work, *gone: str) -> bool:
    """Branch and tags, all or none; false where the remote has changed meanwhile. `gone`: tags to take away."""
    tags = [f"refs/tags/{ARTIFACT}{mark}*:refs/tags/{ARTIFACT}{mark}*" for mark in "@#"]
    away = [f":refs/tags/{tag}" for tag in gone]
    words = ["push", "--quiet", "--atomic", "--", work.remote, f"HEAD:refs/heads/{work.branch}", *tags, *away]
    try:
        git(work.found.tree, *words)
    except PipelineError:
        if refs(work.remote, work.branch) == work.seen:
            raise
        return False
    return True


def crowning(work: Work) -> str:
    """The newest commit that changed the champion."""
    return git(work.found.tree, "log", "-1", "--format=%H", "--", str(CHAMPION)).strip()


def before() -> str:
    """The version that stood in production before the newest; empty where none did."""
    turns = registry.turns_of(PROD)
    return turns[-2].version if len(turns) > 1 else ""


def try_out(work: Work, version: Version) -> None:
    """The smoke test. PipelineError where it fails, once all is as before; Preempted where that has to wait."""
    from pipeline.smoke_test import smoke_test  # here: it brings TensorFlow, which a refusal needs not

    bundle = registry.release_of(registry.outs_at(version.commit), version.name)
    try:
        smoke_test(work.remote, bundle, work.where.retraining.remote)
        print("a consumer gets the model whole, and it detects")
    except (PipelineError, OSError, UnicodeError) as error:
        told = f"smoke test of {version.name}: {error}"
        try:
            back = take_back(work, version, str(error))
        except (PipelineError, OSError) as other:
            raise Preempted(
                f"{told}; not rolled back: {other}; run it again, which repeats the smoke test; "
                "`python -m pipeline.promote rollback` does it by hand"
            ) from None
        if back is None:
            raise PipelineError(f"{told}; not rolled back: it is in {PROD} no more") from None
        raise PipelineError(
            f"{told}; rolled back: {work.branch} holds the champion of before, and {back or 'no version'} is in {PROD}"
        ) from None


def take_back(work: Work, version: Version, reason: str) -> str | None:
    """Reverts the champion's commit and puts the version before in production; that version, None where `version` is
    in production no more.

    Where none was before, the tag is taken away: DVC would take its model for production's still.
    """
    name = git(work.found.tree, "config", "user.name").strip()
    for _ in range(ATTEMPTS):
        with work_on(work.remote, version.commit, name, work.where) as now:
            if not registry.in_production(version):
                return None
            back = before()
            words = f"Roll back {version.name}: its smoke test failed\n\n{reason}\n\n{ROLLED_BACK}{version.name}"
            git(now.found.tree, "revert", "--no-commit", crowning(now))
            commit_staged(now.found, words)
            gone = []
            if back:
                registry.put(registry.version_named(back), PROD, words)
            else:
                gone = [made.tag for made in registry.assignments(PROD)]
                git(now.found.tree, "tag", "--delete", *gone)
            if pushed(now, *gone):
                return back
    raise PipelineError(f"{work.remote} changed during each of {ATTEMPTS} tries")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.promotion", description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="the candidate: retrain/RUN, or a commit on a branch of the remote")
    parser.add_argument("--remote", required=True, help="git's: a URL or a path")
    parser.add_argument("--approved-by", required=True, help="a person's name")
    parser.add_argument("--note", help="why")
    parser.add_argument("--override", metavar="REASON", help="why it is taken though the gate did not accept it")
    given = parser.parse_args()
    words = {key: " ".join((getattr(given, key) or "").split()) or None for key in ("approved_by", "note", "override")}
    # The registry and the promote stage call git, dvc and python by name.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = promote(given.remote, given.revision, validated(Approval, words, Path("approval")), local.load())
    print(f"{found.version} is in {PROD}, after {found.after or 'none'}", file=sys.stderr)
    print(found.model_dump_json(), flush=True)


if __name__ == "__main__":
    run(main)
