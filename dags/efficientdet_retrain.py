"""DAG efficientdet_retrain: the stages of dvc.yaml as tasks, on machines that share a git and a DVC remote alone."""

import datetime

from airflow.sdk import DAG, AsyncCallback, DeadlineAlert, DeadlineReference, Variable

from dags import alerts, form
from dags.assets import OF_OUTPUT
from dags.retraining import prepare, publish, run_stage
from dags.stages import read_stages

with DAG(
    "efficientdet_retrain",
    description="from data to a judged candidate on a branch of its own",
    doc_md=__doc__,
    schedule=Variable.get("retrain_schedule", default=None),  # cron; none: by hand, and by efficientdet_watch
    catchup=False,
    max_active_runs=4,
    params=form.params(),
    default_args={"on_failure_callback": alerts.task_failed},
    deadline=DeadlineAlert(
        DeadlineReference.DAGRUN_QUEUED_AT,
        datetime.timedelta(hours=float(Variable.get("retrain_deadline_hours", default="72"))),
        AsyncCallback(alerts.deadline_missed),
    ),
    render_template_as_native_obj=False,
    tags=["efficientdet"],
) as dag:
    run = prepare.override(doc_md=prepare.function.__doc__)()
    results = {}
    for stage in read_stages():
        one = run_stage.override(
            task_id=stage.name,
            doc_md=stage.description,
            outlets=[OF_OUTPUT[out] for out in stage.outs if out in OF_OUTPUT],
            **stage.settings,
        )
        results[stage.name] = one(stage.name, run, [results[name] for name in stage.upstream])
    publish.override(doc_md=publish.function.__doc__)(run, list(results.values()))
