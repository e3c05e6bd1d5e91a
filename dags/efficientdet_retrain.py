"""DAG efficientdet_retrain: the stages of dvc.yaml as tasks, on machines that share a git and a DVC remote alone."""

import datetime
from typing import Any

from airflow.sdk import DAG, AsyncCallback, DeadlineAlert, DeadlineReference, Variable

from dags import alerts, form
from dags.assets import OF_OUTPUT
from dags.retraining import prepare, publish, run_stage
from dags.stages import read_stages

DOCS = """
A retraining: `prepare` pins git revision, parameters and run id; each stage of `dvc.yaml` runs once, on whichever
machine, on exactly what the stages upstream produced, or comes from the cache; `publish` pushes one commit to branch
`retrain/RUN` of the git remote, and opens a pull request where a token is configured.

- What the run changed: `report.md` on that branch. The event of asset *candidate* names branch, report and figures.
- The pages: `dvc get REMOTE data/eval --rev retrain/RUN`, likewise `data/reports/validation`; `index.html` in there.
- The assets *raw_data*, *shards*, *model* and *metrics* tell which version was made from which.

A run that was stopped or failed: clear the failed task, and it goes on; train goes on at its last checkpoint.
"""
STAGE_DOCS = """
Stage `{0.name}`: {0.description}.

It takes what {1} handed on, pulls it, runs `dvc repro --single-item {0.name}`, checks that it consumed just that, and
pushes {2}. Its result is in XCom: the stage's entry of `dvc.lock`, whether it was cached, seconds and host.
"""

with DAG(
    "efficientdet_retrain",
    description="from data to a judged candidate on a branch of its own",
    doc_md=DOCS,
    schedule=Variable.get("retrain_schedule", default=None),  # cron; none: by hand, and by efficientdet_watch
    catchup=False,
    max_active_runs=4,
    params=form.params(),
    default_args={"on_failure_callback": alerts.task_failed},
    deadline=DeadlineAlert(  # not of DAGRUN_QUEUED_AT: no task could be cleared (apache/airflow#70368)
        DeadlineReference.AVERAGE_RUNTIME(max_runs=10, min_runs=1),
        datetime.timedelta(hours=float(Variable.get("retrain_late_hours", default="12"))),
        AsyncCallback(alerts.deadline_missed),
    ),
    tags=["efficientdet"],
) as dag:
    run = prepare.override(doc_md=prepare.function.__doc__)()
    results: dict[str, Any] = {}
    for stage in read_stages():
        one = run_stage.override(
            task_id=stage.name,
            doc_md=STAGE_DOCS.format(stage, ", ".join(stage.upstream) or "nobody", ", ".join(stage.outs)),
            inlets=[OF_OUTPUT[dep] for dep in stage.deps if dep in OF_OUTPUT],
            outlets=[OF_OUTPUT[out] for out in stage.outs if out in OF_OUTPUT],
            **stage.settings,
        )
        results[stage.name] = one(stage.name, run, [results[name] for name in stage.upstream])
    publish.override(doc_md=publish.function.__doc__)(run, list(results.values()))
