"""DAG efficientdet_promote: a candidate that passed the gate waits for a person's word, and goes to production.

It starts with each candidate that efficientdet_retrain publishes. One that failed the gate asks nobody; who wants it
anyway triggers this DAG with the candidate's branch and a reason, which is recorded in the version's tag.
"""

import datetime

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import DAG, Param, Variable

from dags import alerts
from dags.assets import CANDIDATE
from dags.promotion import look_at_candidate, promote

APPROVERS = Variable.get("approvers", default=[], deserialize_json=True)  # ids of users; none: everyone who may edit
HOURS = float(Variable.get("approval_hours", default="72"))  # without an answer: Reject

with DAG(
    "efficientdet_promote",
    description="asks for approval, and puts the candidate into production",
    doc_md=__doc__,
    schedule=[CANDIDATE],
    catchup=False,
    max_active_runs=16,  # each may wait for days
    params={
        "candidate": Param(
            None, "Branch retrain/RUN, or a commit of it. Empty: the one that was just published.",
            type=["null", "string"], pattern=r"^[A-Za-z0-9][^\s\x00]*$", title="Candidate",
        ),
        "override": Param(
            None, "Why it is to be promoted though the gate did not accept it. Stands in the tag.",
            type=["null", "string"], pattern=r"^[^\x00]*\S[^\x00]*$", maxLength=500, title="Override the gate",
        ),
    },
    default_args={"on_failure_callback": alerts.task_failed},
    tags=["efficientdet"],
) as dag:  # fmt: skip
    found = look_at_candidate.override(doc_md=look_at_candidate.function.__doc__)()
    approval = ApprovalOperator(
        task_id="approve",
        subject="Put {{ ti.xcom_pull('look_at_candidate')['branch'] }} into production?",
        body="{{ ti.xcom_pull('look_at_candidate')['text'] }}",
        defaults=ApprovalOperator.REJECT,
        response_timeout=datetime.timedelta(hours=HOURS),
        params={"note": Param(None, "Why; stands in the tag.", type=["null", "string"], maxLength=500, title="Note")},
        assigned_users=[{"id": user, "name": user} for user in APPROVERS],
        doc_md="Waits for Approve or Reject, under Required Actions, without a worker. No answer in time is Reject.",
    )
    found >> approval
    promote.override(doc_md=promote.function.__doc__)(found, approval.output)
