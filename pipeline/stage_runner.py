"""Runs one stage of one retraining on any machine.

`python -m pipeline.stage_runner STAGE --run RUN --upstream RESULT ...`: RUN is what pipeline.prepare printed, a RESULT
what this command printed for a stage that STAGE depends on, each a file of JSON. The last line on stdout is the result
(the fields of Result); all that a person reads goes to stderr.

Nothing is taken from what lies on the machine but DVC's cache and the stage's checkpoints;
docs/stage_runner.md tells how.
"""

import argparse
import json
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline import local
from pipeline.errors import PipelineError, run
from pipeline.files import read_json, written_whole
from pipeline.local import Local
from pipeline.lock_entries import Stage, data_files, producers, read_stages, to_pull, write_data_file, write_lock
from pipeline.settings import Section, read_yaml, validated
from pipeline.verify import LOCK, Entry, hashes, key_of, read_lock, value_of
from pipeline.work_trees import (
    Try,
    cache_dir,
    check_out,
    check_space,
    dvc,
    forget_failed,
    fresh_try,
    git,
    mirror,
    prepare_dvc,
    remove_folder,
    work_dir,
)

PARAMS = "params.yaml"
MODEL = "data/model"
BRANCH = "retrain/"  # and the run's id: the branch that pipeline.publish pushes

RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]  # a folder's and a branch's name


class Run(Section):
    """What pipeline.prepare pinned, the same for every stage of a run."""

    run: RunId
    remote: Annotated[str, Field(pattern=r"^[^-\s]\S*$")]  # git's
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    base: str  # the branch that the revision is on, and the pull request goes to
    params: str  # the text of params.yaml
    created: str  # ISO 8601, UTC
    reason: str  # why, for the reader of the commit


class Result(Section):
    """What a stage of a run gave."""

    stage: str
    entry: dict[str, Any]  # of dvc.lock
    files: dict[str, str]  # path -> text of the outputs that travel by git alone
    AP: float | None  # of the model, where that is among the outputs: trained_ap
    timings: str  # the text of its file in data/timings, which is no output; empty where it did not run or left none
    cached: bool  # the command was not run
    seconds: float  # in all, transfers included
    host: str


def run_stage(request: Run, stage_name: str, upstream: Sequence[Result], where: Local) -> Result:
    """Reproduces one stage from what upstream gave. PipelineError where it fails, or consumed anything else."""
    began = time.monotonic()
    forget_failed(where)
    check_space(where)
    source = mirror(request.remote, where)
    with fresh_try(request.run, stage_name, where) as found:
        check_out(source, request.revision, found.tree)
        prepare_dvc(found, where)
        check_remote(found, where)
        stages = read_stages(found.tree)
        if stage_name not in stages:
            raise PipelineError(f"dvc.yaml: no stage {stage_name!r}; there are {', '.join(stages)}")
        stage = stages[stage_name]
        (found.tree / PARAMS).write_text(request.params)
        entries = entries_of(stage, stages, upstream)
        begin_lock(found, stage, entries, source, request.revision)
        pull_dependencies(found, stage, stages)
        cached = reproduce(found, stage, request, where)
        entry = read_lock((found.tree / LOCK).read_text())[stage_name]
        check_consumed(stage, stages, entry, entries, data_files(found.tree))
        keep_record(found, entry, where)
        push(found, stage, entry)
        files = {path: (found.tree / path).read_text() for path in stage.outs if path in stage.in_git}
        measured = found.tree / timings_file(stage_name)
        timings = measured.read_text() if measured.is_file() else ""
        ap = trained_ap(found.tree / MODEL) if MODEL in stage.outs else None
    remove_folder(checkpoints(request, stage_name, where))
    return Result(
        stage=stage_name,
        entry=entry,
        files=files,
        AP=ap,
        timings=timings,
        cached=cached,
        seconds=round(time.monotonic() - began, 1),
        host=socket.gethostname(),
    )


def trained_ap(model: Path) -> float | None:
    """AP on val by which training chose the weights: that of their epoch, which need not be the last one judged.

    None where there was nothing to find, or the revision lays its model down in another way.
    """
    try:
        epoch = json.loads((model / "model.json").read_text())["weights"]["epoch"]
        _, *lines = (model / "dvclive/plots/metrics/val/AP.tsv").read_text().splitlines()
        judged = {int(step): float(ap) for step, ap in (line.split("\t") for line in lines)}
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return ap if (ap := judged.get(epoch, -1.0)) >= 0 else None  # -1: COCO's word for nothing to find


def timings_file(stage: str) -> Path:
    """Where a stage leaves what it measured (pipeline.evaluate, pipeline.gate)."""
    return Path("data", "timings", f"{stage}.json")


def entries_of(stage: Stage, stages: Mapping[str, Stage], upstream: Sequence[Result]) -> dict[str, Entry]:
    """The entries that the stage depends on; others are left out. PipelineError for one that was not given."""
    given = {result.stage: result.entry for result in upstream}
    needed = set(producers(stage, stages).values())
    if missing := sorted(needed - given.keys()):
        raise PipelineError(f"{stage.name}: depends on {', '.join(missing)}; its result was not given (--upstream)")
    return {name: given[name] for name in stages if name in needed}


def begin_lock(found: Try, stage: Stage, entries: Mapping[str, Entry], source: Path, revision: str) -> None:
    """dvc.lock with what upstream gave, and nothing of the revision's own.

    An entry of the stage itself would be believed where git merged it out of two. Without one DVC looks the run up by
    all its inputs. It does not for a stage with a `persist` output: that one begins with an entry of a commit.
    """
    own = committed_entry(found, stage, source, revision) if stage.persist else None
    write_lock(found.tree, {**entries, **({stage.name: own} if own else {})})


def committed_entry(found: Try, stage: Stage, source: Path, revision: str) -> Entry | None:
    """The newest entry with the present parameters that a commit other than a merge holds; else the newest."""
    words = ["--full-history", "--no-merges", "--max-count=50", "--format=%H", revision, f"--branches={BRANCH}*"]
    settings = read_yaml(found.tree / PARAMS)
    held: list[Entry] = []
    for commit in git(source, "log", *words, "--", str(LOCK)).split():
        if str(LOCK) in git(source, "ls-tree", "--name-only", commit).split():
            entry = read_lock(git(source, "show", f"{commit}:{LOCK}"), f"{commit[:8]}:{LOCK}").get(stage.name)
            held += [entry] if entry else []
    return next((entry for entry in held if _has_params(entry, settings)), held[0] if held else None)


def _has_params(entry: Entry, settings: Any) -> bool:
    locked = (entry.get("params") or {}).get(PARAMS) or {}
    return all(value_at(settings, key) == value for key, value in locked.items())


def value_at(settings: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def pull_dependencies(found: Try, stage: Stage, stages: Mapping[str, Stage]) -> None:
    """What the stage reads, and no more. `dvc repro --single-item` would take its absence for no change."""
    if paths := to_pull(stage, stages, found.tree):
        dvc(found, "pull", *paths)
    lock = read_lock((found.tree / LOCK).read_text())
    if kept := sorted(stage.persist & hashes(lock.get(stage.name, {}).get("outs")).keys()):
        try:
            dvc(found, "pull", *kept)
        except PipelineError as error:  # never pushed
            print(f"{stage.name} begins without {', '.join(kept)}: {error}", file=sys.stderr)
            write_lock(found.tree, {name: entry for name, entry in lock.items() if name != stage.name})


def reproduce(found: Try, stage: Stage, request: Run, where: Local) -> bool:
    """Runs the stage, or takes its outputs from the cache where the same was run before: then it is true."""
    settings = local.as_environment(where)
    settings["EFFDET_CHECKPOINT_DIR"] = checkpoints(request, stage.name, where)
    lines = dvc(found, "repro", "--single-item", "--pull", stage.name, environment=settings)
    return f"Running stage '{stage.name}':" not in lines


def checkpoints(request: Run, stage: str, where: Local) -> str:
    """The stage's folder or URL, of this run alone: two runs at once never meet in it."""
    given = where.checkpoint_dir if "checkpoint_dir" in where.model_fields_set else str(work_dir(where) / "checkpoints")
    return f"{given if '://' in given else Path(given).absolute()}/{request.run}/{stage}"


def check_consumed(
    stage: Stage, stages: Mapping[str, Stage], entry: Entry, upstream: Mapping[str, Entry], data: Mapping[str, str]
) -> None:
    """PipelineError where the stage's locked dependencies are not what upstream produced, or what git's *.dvc hold."""
    consumed = hashes(entry.get("deps"))
    for dep, producer in producers(stage, stages).items():
        produced = hashes(upstream[producer].get("outs")).get(dep)
        if produced is None or consumed.get(dep) != produced:
            raise PipelineError(
                f"{stage.name}: consumed {dep} {consumed.get(dep)}, and {producer} produced {produced}; "
                "nothing was pushed; try again, and if it stays, look into the failed try's work tree"
            )
    for path in consumed.keys() & data.keys():
        if consumed[path] != data[path]:
            raise PipelineError(f"{stage.name}: consumed {path} {consumed[path]}, and its .dvc file holds {data[path]}")


def keep_record(found: Try, entry: Entry, where: Local) -> None:
    """Gives the run-cache entry of this run, where DVC made one, to the machine's cache; drops the others here.

    `dvc push --run-cache` sends all that it finds, each time.
    """
    record = Path("runs") / key_of(entry)[:2] / key_of(entry) / value_of(entry)
    kept = (found.cache / record).read_bytes() if (found.cache / record).exists() else None
    shutil.rmtree(found.cache / "runs", ignore_errors=True)
    if kept is not None:
        for folder in (found.cache, cache_dir(where)):
            with written_whole(folder / record) as part:
                part.write_bytes(kept)


def push(found: Try, stage: Stage, entry: Entry) -> None:
    """Outputs first: nobody finds a record in the remote whose outputs are not there.

    DVC restores a run from its record with the outputs that are in git too, and pushes these for no stage: they go as
    data of their own, so that other machines have the run.
    """
    targets = [stage.name] if set(stage.outs) - stage.in_git else []
    if (found.cache / "runs").exists():  # DVC keeps records of this stage
        folder = found.tree / "outputs_in_git"
        folder.mkdir()
        for number, item in enumerate(item for item in entry["outs"] if item["path"] in stage.in_git):
            write_data_file(folder / f"{number}.dvc", item)
            targets.append(f"{folder.name}/{number}.dvc")
    if targets:
        dvc(found, "push", *targets)
    dvc(found, "push", "--run-cache", stage.name)


def check_remote(found: Try, where: Local) -> None:
    """PipelineError where there is no DVC remote, before anything is run for it."""
    if not where.retraining.remote and not "".join(dvc(found, "config", "core.remote")).strip():
        raise PipelineError(
            "no DVC remote to hand data over: set retraining.remote in local.yaml, or a default one in .dvc/config"
        )


def read_request(path: Path) -> Run:
    """What pipeline.prepare printed. PipelineError names what is wrong in it."""
    return validated(Run, read_json(path, "run"), path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.stage_runner", description="runs one stage of one run")
    parser.add_argument("stage", help="a stage of dvc.yaml")
    parser.add_argument("--run", type=Path, required=True, help="what pipeline.prepare printed")
    parser.add_argument("--upstream", type=Path, nargs="*", default=[], help="results of the stages it depends on")
    given = parser.parse_args()
    upstream = [validated(Result, read_json(path, "result of a stage"), path) for path in given.upstream]
    result = run_stage(read_request(given.run), given.stage, upstream, local.load())
    print(json.dumps(result.model_dump()), flush=True)


if __name__ == "__main__":
    run(main)
