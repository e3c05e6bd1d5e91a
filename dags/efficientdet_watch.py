"""DAG efficientdet_watch: when the data behind data.base_url changed, retrains with the new checksums.

It waits in the triggerer, without a worker, for another ETag (or date and length) of a file than it last dealt with,
reads the files then, and starts efficientdet_retrain with their checksums in place of those that params.yaml pins. It
is paused until somebody turns it on: drawn data, the default, has nothing to watch.
"""

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG, Variable

from dags import alerts
from dags.data_watch import WaitForChange, look_at_data, read_checksums, remember

PAUSE = float(Variable.get("watch_seconds", default="300"))  # between two looks

with DAG(
    "efficientdet_watch",
    description="sees that the data changed, and starts a retraining on it",
    doc_md=__doc__,
    schedule="@hourly",  # a run waits until something changes; the next one begins at the full hour after it
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=True,
    default_args={"on_failure_callback": alerts.task_failed},
    tags=["efficientdet"],
) as dag:
    data = look_at_data.override(doc_md=look_at_data.function.__doc__)()
    changed = WaitForChange(task_id="wait_for_change", data=data, pause=PAUSE, doc_md=WaitForChange.__doc__)
    checksums = read_checksums.override(doc_md=read_checksums.function.__doc__)(data)
    retrain = TriggerDagRunOperator(
        task_id="retrain",
        trigger_dag_id="efficientdet_retrain",
        trigger_run_id="{{ ti.xcom_pull('read_checksums')['run_id'] }}",
        conf="{{ ti.xcom_pull('read_checksums')['conf'] | tojson }}",
        skip_when_already_exists=True,
        doc_md="Starts the retraining, once for the same data.",
    )
    # Also where the bytes are the pinned ones, and where a retraining on them was started before.
    dealt_with = remember.override(trigger_rule="none_failed", doc_md=remember.function.__doc__)(data, changed.output)
    changed >> checksums >> retrain >> dealt_with
