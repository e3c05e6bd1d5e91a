"""The tasks of a retraining: they hand each step's result to the next, and tell Airflow which version each asset has.

What is done is done by pipeline.prepare, pipeline.stage_runner and pipeline.publish: docs/stage_runner.md.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule, get_current_context, task

from dags import form
from dags.assets import CANDIDATE, OF_OUTPUT
from dags.ml import forge_environment, git_remote, remotes_environment, run_ml

METRICS = "metrics.json"
REFUSED = RetryRule(SystemExit, RetryAction.FAIL)  # wrong however often it is tried; a machine that was lost is not

log = logging.getLogger(__name__)


@task(show_return_value_in_logs=False, retries=2, retry_policy=ExceptionRetryPolicy([REFUSED]))
def prepare() -> dict[str, Any]:
    """Pins what the run is: git revision, parameters, id. It refuses what is wrong, and says why."""
    given = get_current_context()["params"]
    words = {
        "remote": git_remote(),
        "reason": given["reason"],
        "revision": given["revision"],
        "recipe": given["recipe"],
    }
    options = [f"--{name}={value}" for name, value in words.items() if value is not None]
    overrides = form.overrides(given)
    options += [f"--set={key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
    run = run_ml("pipeline.prepare", options, environment=remotes_environment())
    changed = ", ".join(f"{key} = {json.dumps(value)}" for key, value in overrides.items()) or "no parameter"
    log.info("run %s: revision %s of %s, recipe %s, %s overridden", run["run"], run["revision"], run["base"],
             given["recipe"], changed)  # fmt: skip
    return run


@task(show_return_value_in_logs=False)
def run_stage(stage: str, run: dict[str, Any], upstream: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Reproduces one stage from what upstream gave, or takes it from the cache."""
    files = {"run.json": run, **{f"{result['stage']}.json": result for result in upstream}}
    arguments = [stage, "--run", "run.json", "--upstream", *(f"{result['stage']}.json" for result in upstream)]
    result = run_ml("pipeline.stage_runner", arguments, files=files, environment=remotes_environment())
    log.info("%s: %s in %s s on %s", stage, "cached" if result["cached"] else "run", result["seconds"], result["host"])
    tell_assets(run, result)
    return result


def tell_assets(run: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """The version of each output that is an asset, as the event's extra."""
    events = get_current_context()["outlet_events"]
    for out in result["entry"]["outs"]:
        if asset := OF_OUTPUT.get(out["path"]):
            events[asset].extra = {
                "hash": out["md5"],
                "size": out["size"],
                "revision": run["revision"],
                "run": run["run"],
                "cached": result["cached"],
                **average_precision(result["files"]),
            }


def average_precision(files: Mapping[str, str]) -> dict[str, Any]:
    """AP on the gate's split, as metrics.json has it; empty where it is not among the files."""
    if METRICS not in files:
        return {}
    content = json.loads(files[METRICS])
    return {"AP": content[content["gate"]["split"].split()[0]]["AP"]}


@task(show_return_value_in_logs=False, outlets=[CANDIDATE], retries=3)
def publish(run: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The single writer: parameters, lock, metrics and report on a branch of its own, and a pull request."""
    files = {"run.json": run, **{f"{result['stage']}.json": result for result in results}}
    arguments = ["--run", "run.json", "--results", *(f"{result['stage']}.json" for result in results)]
    published = run_ml(
        "pipeline.publish", arguments, files=files, environment={**remotes_environment(), **forge_environment()}
    )
    report = published["pull_request"] or f"{published['branch']}:report.md"
    candidate = {**published, "run": run["run"], "remote": run["remote"], "report": report}
    get_current_context()["outlet_events"][CANDIDATE].extra = candidate
    log.info("published: branch %s %s %s", published["branch"], published["pull_request"], published["behind"])
    return candidate
