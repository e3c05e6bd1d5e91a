"""Versions of the model and the stages they are in, as git tags (GTO): `python -m pipeline.promote COMMAND`.

A version is a release bundle that the gate accepted: `detector@v0.2.0` stands on the commit whose dvc.lock names the
bundle, and the same bundle under another commit is the same version. `detector#prod#3` puts a version in a stage; the
newest such tag says what production is, also for `dvc artifacts get`. The name is fixed, not the model's: champions
follow each other in one line when the network changes. Who, when and why stand in the tags.

The version in prod is the champion, against which the promote stage holds the next candidate. champion.json and
champion/ say so in git, and change in one commit with it. Every command can be given again: what is done is said to be
done, and stays.

pipeline.promote loads this by name, so that none of it is a dependency of the stage.
"""

import argparse
import datetime
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import gto.api
from gto.exceptions import GTOException
from gto.registry import GitRegistry
from ruamel.yaml import YAML

from pipeline.champion import CHAMPION, Champion, read_champion, read_decision
from pipeline.errors import PipelineError
from pipeline.files import checksum, read_json, write_json, written_whole
from pipeline.gate import Decision, Rule, times_of
from pipeline.history_page import Assignment, Judged, Version, day, page, table
from pipeline.project import PYPROJECT, name_and_version

ARTIFACT = "detector"  # in dvc.yaml's artifacts
FIRST = "v0.1.0"
PROD = "prod"  # the stage whose version is the champion
ROLLED_BACK = (
    "Rolled-back: "  # in the message of a tag that puts the version before back, and what it was put back from
)
JUDGE = "promote"  # the stage that judges, and writes the bundle
OVERRIDE = "Override: "  # in a version's tag: why the gate's decision does not count
MOST_AHEAD = 5  # seconds that another machine's clock may be
BRANCH_OR_NOTHING = ("git", "symbolic-ref", "--quiet", "--short", "HEAD")

CHAMPION_FOLDER = Path("champion")
RELEASE = "data/release"
DATA = "data/shards"
CHANGED = (str(CHAMPION), str(CHAMPION_FOLDER), "dvc.lock", "metrics.json")  # by a promotion


# What git and GTO know


def versions() -> list[Version]:
    """The registered versions, oldest first."""
    with _gto_errors(), GitRegistry.from_url(".") as registry:
        artifact = registry.find_artifact(ARTIFACT, create_new=True)
        found = artifact.get_versions(active_only=True, include_non_explicit=False)
    made = [
        Version(version.version, version.commit_hexsha, version.created_at, version.author, version.message.strip())
        for version in found
    ]
    return sorted(made, key=lambda version: version.number)


def assignments(stage: str | None = None) -> list[Assignment]:
    """Which version came into a stage (or any) when, oldest first."""
    with _gto_errors():
        events = gto.api.history(".", ARTIFACT)
    made = [
        Assignment(
            event["stage"],
            event["version"],
            event["timestamp"],
            event["author"],
            event["message"].strip(),
            event["ref"],
        )
        for event in events
        if event["event"] == "assignment" and stage in (None, event["stage"])
    ]
    return sorted(made, key=lambda assignment: (assignment.date, assignment.number))


def standing(stage: str) -> str | None:
    """The version that is in a stage: its newest tag says, as for `dvc artifacts get`.

    GTO's own find_versions_in_stage takes the highest version that ever stood there, also after a rollback.
    """
    made = assignments(stage)
    return made[-1].version if made else None


def turns_of(stage: str) -> list[Assignment]:
    """The same without those that changed nothing, of the versions that are there."""
    known = {version.name for version in versions()}
    order = [made for made in assignments(stage) if made.version in known]
    return [made for place, made in enumerate(order) if place == 0 or made.version != order[place - 1].version]


def in_production(version: Version) -> bool:
    """By the tags, and as this folder's champion."""
    return standing(PROD) == version.name and champion_version() == _named(version)


def version_named(name: str) -> Version:
    """PipelineError where none has this name."""
    known = {version.name: version for version in versions()}
    if name not in known:
        listed = ", ".join(known) or "none"
        raise PipelineError(
            f"{name}: no version of {ARTIFACT}; registered here: {listed} (`git fetch --tags` for more)"
        )
    return known[name]


def locked_outs(lock: str) -> dict[str, dict[str, str]]:
    """dvc.lock's text -> stage -> path -> hash of each output."""
    stages = YAML(typ="safe", pure=True).load(lock)["stages"]
    return {name: {out["path"]: out.get("md5", "") for out in stage.get("outs", [])} for name, stage in stages.items()}


def outs_at(commit: str) -> dict[str, dict[str, str]]:
    """The same of a commit; PipelineError where it has no dvc.lock."""
    return locked_outs(_run("git", "show", f"{commit}:dvc.lock"))


def release_of(outs: Mapping[str, Mapping[str, str]], where: str) -> str:
    """The hash of the bundle."""
    for stage in outs.values():
        if RELEASE in stage:
            return stage[RELEASE]
    raise PipelineError(f"dvc.lock of {where}: no {RELEASE}; run `dvc repro` and commit dvc.lock")


def judged_at(commit: str) -> Judged:
    """What metrics.json of a commit says on the candidate."""
    try:
        metrics = json.loads(_run("git", "show", f"{commit}:metrics.json"))
        split = metrics["gate"]["split"]
        decision, figures = metrics["gate"]["decision"], metrics[split.split()[0]]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise PipelineError(f"metrics.json of {commit[:10]}: is not what the promote stage writes") from None
    data = next((outs[DATA] for outs in outs_at(commit).values() if DATA in outs), "")
    return Judged(decision, split, figures, data)


def champion_version() -> str | None:
    """The version that champion.json names."""
    champion = read_champion(CHAMPION)
    return f"{champion.version} ({champion.revision})" if champion else None


# Commands


def register(why: str) -> Version:
    """The version of HEAD's bundle, new where the bundle is. PipelineError unless the gate accepted what HEAD holds."""
    commit = _candidate()
    return register_commit(commit, why, times_of(read_json(Path(RELEASE, "decision.json"), "decision")))


def register_commit(commit: str, why: str, times: str = "") -> Version:
    """The same of a commit that the caller has looked at.

    why: text that the tag's message begins with. times: pipeline.gate.times_of its decision.
    """
    outs = outs_at(commit)
    known = version_of(commit)
    if known:
        print(f"{known.name} is registered: the bundle of {commit[:10]} is that of {known.commit[:10]}")
        return known
    name = {"bump_minor": True} if versions() else {"version": FIRST}
    with _gto_errors(), GitRegistry.from_url(".") as registry:
        message = _registration(commit, outs, why, times)
        made = registry.register(ARTIFACT, commit, message=message, simple=True, **name)
    print(f"registered {made.version}: tag {made.tag} on {commit[:10]}")
    return version_named(made.version)


def assign(version: Version, stage: str, why: str, *, judge_anew: bool = False) -> None:
    """Puts a version in a stage. In prod it becomes the champion first, in a commit of its own.

    `judge_anew`: the promote stage runs before that commit, so that the commit holds what `dvc repro` makes of it. Only
    where HEAD's candidate is that version: its bundle must come out as it was.
    """
    if stage == PROD:
        _crown(version, judge_anew)
    put(version, stage, why)


def put(version: Version, stage: str, why: str) -> None:
    """The tag that says so, where it does not stand; in prod the champion has to follow."""
    before = standing(stage)
    if before == version.name:
        print(f"{version.name} is in {stage}")
        return
    _wait_for_a_new_second()
    judged = judged_at(version.commit)
    message = f"{why or f'{version.name} into {stage}'}\n\nafter {before or 'none'}; {judged.words()}"
    with _gto_errors(), GitRegistry.from_url(".") as registry:
        # A version that was there before and comes back gets a tag of its own.
        made = registry.assign(ARTIFACT, stage, version=version.name, message=message, simple=False, force=True)
    print(f"{version.name} is in {stage}: tag {made.tag}" + (f", after {before}" if before else ""))


def promote(why: str) -> None:
    """HEAD's candidate, which the gate accepted, becomes a version, the champion, and production."""
    commit = _clean_head()
    known = version_of(commit)
    if known and in_production(known):
        print(f"{known.name} is in {PROD}, and the champion: nothing to do")
        return
    assign(register(why), PROD, why, judge_anew=True)


def roll_back(stage: str, why: str) -> None:
    """The version that stood in a stage before the newest; done once, it is done."""
    turns = turns_of(stage)
    if len(turns) < 2:
        stood = f"only {turns[0].version} stood there" if turns else "no version stood there"
        raise PipelineError(f"{stage}: nothing to roll back to, {stood}; see `python -m pipeline.promote history`")
    last, before = turns[-1], turns[-2]
    if re.search(f"^{ROLLED_BACK}", last.message, re.MULTILINE):
        print(f"{stage} was rolled back from {before.version} to {last.version} by {last.author} on {last.day}")
        print(f"for another one: python -m pipeline.promote assign VERSION {stage}")
        assign(version_named(last.version), stage, why)  # what a rollback that broke off left undone
        return
    words = f"{why or f'roll back from {last.version}'}\n\n{ROLLED_BACK}{last.version}"
    assign(version_named(before.version), stage, words)
    if stage == PROD:
        print("HEAD's candidate was held against the former champion: `dvc repro` holds it against this one")


def check() -> None:
    """PipelineError unless champion.json names what the tags have in prod."""
    name, champion = standing(PROD), champion_version()
    tagged = _named(version_named(name)) if name else None
    if tagged != champion:
        raise PipelineError(
            f"{CHAMPION}: the champion is {champion or 'none'}, and the tags have {tagged or 'none'} in {PROD}; "
            f"`git fetch --tags`, or `python -m pipeline.promote assign VERSION {PROD}` with the right one"
        )
    print(f"{champion or 'no version'} is in {PROD} and the champion" if champion else f"no champion, none in {PROD}")


def history(html: Path | None) -> None:
    """The versions and who put them where, printed; as a page with AP over versions, too."""
    known = versions()
    judged = {version.name: judged_at(version.commit) for version in known}
    made = assignments()
    now = {stage: name for stage in sorted({one.stage for one in made}) if (name := standing(stage))}
    print(table(known, judged, now, made))
    if html:
        with written_whole(html) as part:
            part.write_text(page(ARTIFACT, known, judged, now, made), encoding="utf-8")
        print(f"wrote {html}")


def push(remote: str) -> None:
    """Data first, then branch and tags at once: whoever sees the tag gets the model."""
    branch = _branch()
    _show("dvc", "push", "--run-cache")  # by its records pipeline.verify knows that a run made what dvc.lock holds
    tags = [f"refs/tags/{ARTIFACT}{mark}*:refs/tags/{ARTIFACT}{mark}*" for mark in "@#"]
    _run("git", "push", "--quiet", "--atomic", remote, f"HEAD:refs/heads/{branch}", *tags)
    print(f"pushed the data, {branch} and the tags of {ARTIFACT} to {remote}")


# How they do it


def _wait_for_a_new_second() -> None:
    """Tags tell seconds, and the newest counts."""
    newest = max((made.date for made in assignments()), default=None)
    while newest and (ahead := (newest - datetime.datetime.now(datetime.UTC)).total_seconds()) > -1:
        if ahead > MOST_AHEAD:
            raise PipelineError(
                f"the newest tag is of {day(newest)} UTC, which this machine's clock has yet to reach: a new one would "
                "not be the newest; set the clock"
            )
        time.sleep(0.1)


def _candidate() -> str:
    """HEAD, where it holds what a run produced and the gate accepted."""
    commit = _clean_head()
    status = json.loads(_run("dvc", "status", "--json"))
    if status:
        raise PipelineError(
            f"not what {commit[:10]} says: {', '.join(sorted(status))}; `dvc pull` what is missing, `dvc repro` what "
            "changed, and commit"
        )
    decision = judged_at(commit).decision
    if decision != "accepted":
        raise PipelineError(f"metrics.json of {commit[:10]}: the gate's decision is {decision}; only accepted goes on")
    return commit


def _clean_head() -> str:
    changed = _run("git", "status", "--porcelain").splitlines()
    if changed:
        raise PipelineError(f"not committed: {', '.join(line[3:] for line in changed)}; commit or remove it first")
    return _run("git", "rev-parse", "HEAD").strip()


def _branch() -> str:
    try:
        return _run(*BRANCH_OR_NOTHING).strip()
    except PipelineError:
        raise PipelineError("HEAD is on no branch, and a new champion is a commit; `git switch` to one") from None


def version_of(commit: str) -> Version | None:
    """The version of a commit's bundle, which another commit may have registered."""
    release = release_of(outs_at(commit), commit)
    return next((one for one in versions() if release_of(outs_at(one.commit), one.name) == release), None)


def _named(version: Version) -> str:
    return f"{version.name} ({version.commit})"


def _registration(commit: str, outs: Mapping[str, Mapping[str, str]], why: str, times: str) -> str:
    """The tag's message: why, how good, the hashes of all that dvc.lock says was made on the way, and by what."""
    lines = [f"  {stage} {path} {hash_}" for stage, paths in outs.items() for path, hash_ in paths.items()]
    environment = hashlib.sha256(_run("git", "show", f"{commit}:requirements/ml.txt").encode()).hexdigest()
    lines += [
        f"requirements/ml.txt sha256:{environment}",
        name_and_version(_run("git", "show", f"{commit}:{PYPROJECT}")),
    ]
    figures = [judged_at(commit).words(), *([times] if times else [])]
    return "\n".join([why or f"Candidate of {commit[:10]}", "", *figures, "dvc.lock", *lines])


def _crown(version: Version, judge_anew: bool) -> None:
    """champion.json and champion/ in a commit, or nothing."""
    if champion_version() == _named(version):
        return
    _clean_head()
    _branch()
    try:
        write_champion(version)
        if judge_anew:
            _show("dvc", "repro", "--single-item", JUDGE)
            require_same_release(version)
        _run("git", "add", "--all", "--", *CHANGED)
        _run("git", "commit", "--quiet", "--message", f"Make {version.name} the champion")
    except BaseException:
        _run("git", "reset", "--quiet", "--hard")  # the tree was clean
        _run("git", "clean", "--quiet", "--force", "-d", "-x", "--", str(CHAMPION_FOLDER))
        tracked = [str(path) for path in CHAMPION_FOLDER.glob("*.dvc")]
        try:
            _run("dvc", "checkout", "--quiet", "--force", RELEASE, *tracked)
        except PipelineError as error:  # what broke off is told all the same
            print(f"not put back: {error}", file=sys.stderr)
        raise
    print(f"{version.name} is the champion: commit {_run('git', 'rev-parse', 'HEAD')[:10]}")


def require_same_release(version: Version) -> None:
    """PipelineError unless the bundle that dvc.lock names here is the version's."""
    here, there = locked_outs(Path("dvc.lock").read_text()), outs_at(version.commit)
    if release_of(here, "this folder") != release_of(there, version.name):
        raise PipelineError(f"{RELEASE}: came out otherwise than {version.name}, now that it is the champion")


def write_champion(version: Version) -> None:
    """The bundle and the detections of a version, from the cache or the DVC remote, and what stands in git on them."""
    split = judged_at(version.commit).split.split()[0]
    with tempfile.TemporaryDirectory() as scratch:
        bundle, detections = Path(scratch) / "bundle", Path(scratch) / "detections.json"
        _run("dvc", "get", ".", RELEASE, "--rev", version.commit, "--out", str(bundle))
        source = f"data/eval/detections_{split}.json"
        _run("dvc", "get", ".", source, "--rev", version.commit, "--out", str(detections))
        decision = _accepted(version, read_decision(bundle / "decision.json"))
        for path in (bundle, detections):
            target = CHAMPION_FOLDER / path.name
            if target.is_dir():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            shutil.move(path, target)
    _run("dvc", "add", "--quiet", str(CHAMPION_FOLDER / "bundle"), str(CHAMPION_FOLDER / "detections.json"))
    champion = Champion(
        version=version.name,
        revision=version.commit,
        decision=decision,
        detections=checksum(CHAMPION_FOLDER / "detections.json", "sha256"),
        ground_truth=decision.candidate.ground_truth,
    )
    write_json(CHAMPION, champion.model_dump(mode="json"))


def _accepted(version: Version, decision: Decision) -> Decision:
    """The gate's decision, or what a person made of it: the version's tag says who, and why."""
    if decision.decision == "accepted":
        return decision
    found = re.search(rf"^{OVERRIDE}(.*)$", version.message, re.MULTILINE)
    if not found:
        raise PipelineError(f"{version.name}: the gate's decision is {decision.decision}, and its tag overrides it not")
    rule = Rule(rule=f"overridden: {found[1]}", candidate=decision.decision, required="accepted", passed=True)
    return decision.model_copy(update={"decision": "accepted", "rules": [*decision.rules, rule]})


@contextmanager
def _gto_errors() -> Iterator[None]:
    try:
        yield
    except GTOException as error:
        raise PipelineError(str(error)) from None


def _run(*line: str) -> str:
    """What it prints; PipelineError with its words where it fails."""
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip() or f"exit {done.returncode}"
        raise PipelineError(f"`{' '.join(line[:3])}`: {words}")
    return done.stdout


def _show(*line: str) -> None:
    """The same for what takes a while: a person sees what it says."""
    done = subprocess.run(line, check=False)
    if done.returncode:
        raise PipelineError(f"`{' '.join(line)}` failed, exit {done.returncode}; it says above why")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.promote", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str, *, writes: bool) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        if writes:
            added.add_argument("--why", default="", help="stands in the tag")
            added.add_argument("--push", metavar="REMOTE", help="pushes data, branch and tags there")
        return added

    command("promote", "register HEAD's candidate, make it the champion, put it in prod", writes=True)
    command("register", "give HEAD's candidate a version", writes=True)
    place = command("assign", "put a version in a stage", writes=True)
    place.add_argument("version")
    place.add_argument("stage")
    command("rollback", "put the version before back", writes=True).add_argument("stage", nargs="?", default=PROD)
    command("check", "hold champion.json against the tag of prod", writes=False)
    command("history", "versions, figures, stages, who and why", writes=False).add_argument(
        "--html", type=Path, metavar="FILE", help="a page, too, that draws AP over versions"
    )
    told = parser.parse_args()
    do: dict[str, Callable[[], object]] = {
        "promote": lambda: promote(told.why),
        "register": lambda: register(told.why),
        "assign": lambda: assign(version_named(told.version), told.stage, told.why),
        "rollback": lambda: roll_back(told.stage, told.why),
        "check": check,
        "history": lambda: history(told.html),
    }
    do[told.command]()
    if getattr(told, "push", None):
        push(told.push)
