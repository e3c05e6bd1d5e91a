"""The single writer of a retraining: its stages' results become one commit on branch retrain/RUN of the git remote.

`python -m pipeline.publish --run RUN --results RESULT ...`; the last line on stdout is JSON (the fields of Published).
Run again, it finds what it did.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import local
from pipeline.errors import PipelineError, run
from pipeline.files import read_json
from pipeline.forge import Forge
from pipeline.local import Local
from pipeline.lock_entries import read_stages, write_lock
from pipeline.prepare import pinned
from pipeline.settings import Section, validated
from pipeline.stage_runner import BRANCH, PARAMS, Result, Run, check_remote, read_request, timings_file
from pipeline.verify import LOCK, Entry, disagreements
from pipeline.work_trees import (
    CANDIDATES,
    Try,
    branch_tip,
    check_out,
    command,
    failed_tries,
    fresh_try,
    git,
    mirror,
    prepare_dvc,
    remove_try,
)

ROOT = Path(__file__).parents[1]
REPORT = "report.md"
METRICS, CHAMPION = "metrics.json", "champion.json"
ORDER = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
TITLE_LIMIT = 250  # characters; the forge takes 256
WRITER = ("-c", "user.name=retraining", "-c", "user.email=retraining@localhost", "-c", "commit.gpgSign=false")


class Published(Section):
    """Where a run stands in git."""

    branch: str
    commit: str
    base: str  # the branch that it goes to
    pull_request: str  # its web address; empty where no token is configured
    behind: str  # why the commit stands on the pinned revision, though base has moved on; empty where it is on base
    decision: str  # of the gate; so the rest, which is empty where the pipeline has no metrics.json
    split: str  # that it was judged on
    AP: float | None
    table: str  # Markdown: the split's figures against the champion's, as each was judged


def publish(request: Run, results: Sequence[Result], where: Local) -> Published:
    """Commits and pushes the run, with report.md on what it changed since the pinned revision.

    PipelineError where the results are not of one run, or something else is published.
    """
    source = mirror(request.remote, where)
    with fresh_try(request.run, "publish", where) as found:
        check_out(source, request.revision, found.tree)
        prepare_dvc(found, where)
        check_remote(found, where)
        files = {PARAMS: request.params, **{path: text for result in results for path, text in result.files.items()}}
        entries = compose(found.tree, results)
        write(found.tree, entries, files)
        figures = figures_of(found.tree)
        lay_timings(found.tree, results)
        files[REPORT] = report(found, request)
        commit, behind = commit_on(source, found, request, entries, files)
        branch = f"{BRANCH}{request.run}"
        there = branch_tip(source, branch)
        if there:
            compared = [*(files.keys() - {REPORT}), str(LOCK)]  # a report also tells which data could be had
            commit = published_before(found, there, commit, compared, branch)
        else:
            git(found.tree, "push", "--quiet", "--", request.remote, f"{commit}:refs/heads/{branch}")
        try:
            git(found.tree, "push", "--quiet", "--", request.remote, f"{commit}:{CANDIDATES}{request.run}")
        except PipelineError as error:  # a forge that takes branches and tags alone
            print(f"warning: once {branch} is deleted it cannot be promoted: {error}", file=sys.stderr)
    for left in failed_tries(where):  # the run is over: nobody looks for why they failed
        if left.parts[-3] == request.run:
            remove_try(left)
    opened = pull_request(request, results, branch, behind, figures["table"])
    return Published(branch=branch, commit=commit, base=request.base, pull_request=opened, behind=behind, **figures)


def candidate_at(source: Path, remote: str, revision: str) -> tuple[str, str]:
    """The commit, and the branch it is on, or was when the run was published. PipelineError where it is neither."""
    try:
        return pinned(source, remote, revision)
    except PipelineError:
        lines = git(source, "for-each-ref", "--format=%(objectname) %(refname:lstrip=2)", CANDIDATES).splitlines()
        for commit, run_id in (line.split() for line in lines):
            if revision in (commit, f"{BRANCH}{run_id}"):
                return commit, f"{BRANCH}{run_id}"
        raise


def lay_timings(tree: Path, results: Sequence[Result]) -> None:
    """What the stages measured, for the report; it is not committed."""
    for result in results:
        if result.timings:
            path = tree / timings_file(result.stage)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(result.timings)


def report(found: Try, request: Run) -> str:
    """pipeline.report's Markdown on the work tree, which holds the run, against the pinned revision."""
    command(found, [sys.executable, "-P", "-m", "pipeline.report", request.revision], {"PYTHONPATH": str(ROOT)})
    return (found.tree / "data" / "reports" / "review" / REPORT).read_text()


def figures_of(tree: Path) -> dict[str, Any]:
    """What a release's approver reads first: the fields `decision`, `split`, `AP` and `table` of Published."""
    if not (tree / METRICS).exists():
        return {"decision": "", "split": "", "AP": None, "table": ""}
    found = read_json(tree / METRICS, "metrics")
    held = read_json(tree / CHAMPION, "champion") if (tree / CHAMPION).exists() else {}
    split = found["gate"]["split"].split()[0]
    theirs = held["decision"]["candidate"]["metrics"] if held else {}
    champion = f"champion {held['version']}" if held else "no champion yet"
    rows = [f"| {name} | {_figure(theirs.get(name))} | {_figure(found[split].get(name))} |" for name in ORDER]
    table = "\n".join([f"| {split} | {champion} | candidate |", "| --- | ---: | ---: |", *rows])
    return {"decision": found["gate"]["decision"], "split": split, "AP": found[split]["AP"], "table": table}


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def pull_request(request: Run, results: Sequence[Result], branch: str, behind: str, table: str) -> str:
    """Opens one, or brings it up to date, where GITHUB_TOKEN is set; its web address."""
    if not os.environ.get("GITHUB_TOKEN"):
        return ""
    rows = [f"| {result.stage} | {'cached' if result.cached else 'run'} | {result.seconds} |" for result in results]
    text = [f"Run {request.run} on {request.revision}.", "", "| stage | | seconds |", "| --- | --- | ---: |", *rows]
    text += ["", f"**{behind}** Merging it needs a new run."] if behind else []
    text += ["", table, "", f"`{REPORT}` on the branch tells what changed."]
    title = f"Retrain: {request.reason}"[:TITLE_LIMIT]
    return Forge.from_environment().open_pull_request(title, branch, request.base, "\n".join(text))


def compose(tree: Path, results: Sequence[Result]) -> dict[str, Entry]:
    """The lock, in dvc.yaml's order. PipelineError where a stage is missing, or two were not run on one another."""
    given = {result.stage: result.entry for result in results}
    stages = read_stages(tree)
    if missing := [name for name in stages if name not in given]:
        raise PipelineError(f"results: none of {', '.join(missing)}; every stage of dvc.yaml has one")
    if unknown := sorted(given.keys() - stages.keys()):
        raise PipelineError(f"results: {', '.join(unknown)}: no such stage in dvc.yaml")
    entries: dict[str, Entry] = {name: given[name] for name in stages}
    if wrong := [f"{name}: {words}" for name, found in disagreements(entries).items() for words in found]:
        raise PipelineError("results: not of one run:\n" + "\n".join(wrong))
    return entries


def commit_on(
    source: Path, found: Try, request: Run, entries: Mapping[str, Entry], files: Mapping[str, str]
) -> tuple[str, str]:
    """The commit on the base branch as it is now where it holds there too, else on the pinned revision, and why."""
    tip = branch_tip(source, request.base)
    if problem := unfit(found, entries, files):
        raise PipelineError(f"the run does not verify on its own revision:\n{problem}")
    if not tip:
        return _commit(found, request, files), f"branch {request.base} is gone"
    if tip == request.revision:
        return _commit(found, request, files), ""
    if git(source, "diff", "--name-only", request.revision, tip, "--", PARAMS):
        return _commit(found, request, files), f"{request.base} has other parameters since the run began"
    git(found.tree, "checkout", "--quiet", "--force", "--detach", tip)
    problem = unfit(found, entries, files)
    if problem:
        git(found.tree, "checkout", "--quiet", "--force", "--detach", request.revision)
        write(found.tree, entries, files)
        return _commit(found, request, files), f"{request.base} moved on, and the run is none of its code: {problem}"
    return _commit(found, request, files), ""


def unfit(found: Try, entries: Mapping[str, Entry], files: Mapping[str, str]) -> str:
    """Writes lock and files, and says what pipeline.verify finds wrong with them here; empty where nothing is."""
    write(found.tree, entries, files)
    words = [sys.executable, "-P", "-m", "pipeline.verify"]  # -P: this verify, whatever the revision has
    try:
        command(found, words, {"PYTHONPATH": str(ROOT)})
    except PipelineError as error:
        return "\n".join(line for line in str(error).splitlines() if line.startswith(("warning:", "cannot"))) or str(
            error
        )
    return ""


def write(tree: Path, entries: Mapping[str, Entry], files: Mapping[str, str]) -> None:
    """dvc.lock and what is committed beside it."""
    write_lock(tree, entries)
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)


def _commit(found: Try, request: Run, files: Mapping[str, str]) -> str:
    """The same commit each time it is made of the same run: its dates are the run's."""
    message = f"Retrain: {request.reason}\n\nRetraining-Run: {request.run}\nRetraining-Revision: {request.revision}\n"
    dates = {"GIT_AUTHOR_DATE": request.created, "GIT_COMMITTER_DATE": request.created}
    git(found.tree, "add", "--force", "--", *files, str(LOCK))
    words = ["commit", "--quiet", "--no-verify", "--allow-empty", "--message", message]
    git(found.tree, *WRITER, *words, environment=dates)
    return git(found.tree, "rev-parse", "HEAD").strip()


def published_before(found: Try, there: str, commit: str, paths: list[str], branch: str) -> str:
    """The commit that is on the branch already. PipelineError where it holds anything else than ours would."""
    if differ := git(found.tree, "diff", "--name-only", there, commit, "--", *paths).split():
        raise PipelineError(f"{branch}: published already, with other {', '.join(differ)}; nothing was pushed")
    return there


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.publish", description="commits and pushes a run")
    parser.add_argument("--run", type=Path, required=True, help="what pipeline.prepare printed")
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="of every stage")
    given = parser.parse_args()
    results = [validated(Result, read_json(path, "result of a stage"), path) for path in given.results]
    found = publish(read_request(given.run), results, local.load())
    print(f"{found.branch} {found.pull_request}{'; ' if found.behind else ''}{found.behind}", file=sys.stderr)
    print(found.model_dump_json(), flush=True)


if __name__ == "__main__":
    run(main)
