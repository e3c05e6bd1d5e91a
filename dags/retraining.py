"""The tasks of a retraining: they hand each step's result to the next, and tell Airflow which version each asset has.

What is done is done by pipeline.prepare, pipeline.stage_runner and pipeline.publish: docs/stage_runner.md.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from airflow.sdk import RetryAction, RetryDecision, RetryPolicy, get_current_context, task
from airflow.sdk.exceptions import AirflowTaskTimeout

from dags import form
from dags.assets import CANDIDATE, METRICS, MODEL, OF_OUTPUT
from dags.ml import forge_environment, git_remote, remotes_environment, run_ml

METRICS_FILE = "metrics.json"

log = logging.getLogger(__name__)


class GiveUp(RetryPolicy):
    """Fails where so many tries were made and the last ended in an error of the pipeline, or ran out of time.

    A pre-empted training (exit 75), a lost worker, and a git remote that is not reached are tried again as often as
    the task's `retries` say.
    """

    def __init__(self, tries: int) -> None:
        self.tries = tries

    def evaluate(self, exception: BaseException, try_number: int, max_tries: int, context: Any = None) -> RetryDecision:
        """As Airflow asks after a failed try. A task that was cleared begins to count anew."""
        told, retries = str(exception), context["task"].retries
        wrong = told.startswith("error: ") and not told.startswith("error: git ")
        made = try_number - max(max_tries - retries, 0)
        if made >= self.tries and (wrong or isinstance(exception, AirflowTaskTimeout)):
            return RetryDecision(RetryAction.FAIL, reason=f"an error in try {made}")
        return RetryDecision()


@task(show_return_value_in_logs=False, retries=2, retry_policy=GiveUp(1))  # it refuses, however often it is asked
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


@task(show_return_value_in_logs=False, retry_policy=GiveUp(4))
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
                **average_precision(result),
            }


def average_precision(result: Mapping[str, Any]) -> dict[str, Any]:
    """AP on the gate's split where metrics.json was made, training's on val where a model was; empty for the rest."""
    if METRICS_FILE in result["files"]:
        content = json.loads(result["files"][METRICS_FILE])
        return {"AP": content[content["gate"]["split"].split()[0]]["AP"]}
    return {} if result["AP"] is None else {"AP": result["AP"]}


@task(show_return_value_in_logs=False, inlets=[MODEL, METRICS], outlets=[CANDIDATE], retries=3)
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
