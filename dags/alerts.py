"""Who is told when a retraining fails or is late: the log, and the webhook of connection effdet_alerts if there is one.

The webhook gets {"text": one line} by POST, as chat services take it. The connection's password is its whole address,
since such an address is a secret.
"""

import logging
from typing import Any

import httpx
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

TIMEOUT = 10  # seconds

log = logging.getLogger(__name__)


def task_failed(context: Any) -> None:
    """Of a task that is not tried again."""
    ti = context["ti"]
    words = f"{ti.dag_id}: {ti.task_id} of {ti.run_id} failed, try {ti.try_number}: {context.get('exception')}"
    log.error(words)
    try:
        address = BaseHook.get_connection("effdet_alerts").password or ""
    except AirflowNotFoundException:
        return
    try:
        httpx.post(address, json={"text": words}, timeout=TIMEOUT).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        log.warning("effdet_alerts: nobody was told: %s", type(error).__name__)  # its words hold the address


async def deadline_missed(**context: Any) -> None:
    """Of a run that is late. It goes on. The triggerer calls it."""
    run = (context.get("context") or {}).get("dag_run") or {}
    words = f"{run.get('dag_id', 'a retraining')}: {run.get('dag_run_id', '')} is late, and goes on"
    log.error(words)
    try:
        address = (await BaseHook.aget_connection("effdet_alerts")).password or ""
    except AirflowNotFoundException:
        return
    try:
        async with httpx.AsyncClient(timeout=TIMEOUT) as client:
            (await client.post(address, json={"text": words})).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        log.warning("effdet_alerts: nobody was told: %s", type(error).__name__)
