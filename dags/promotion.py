"""The tasks of a promotion: what the approver is shown, and what follows from the answer.

What is done is done by pipeline.candidate and pipeline.promotion: docs/promotion.md.
"""

import logging
from collections.abc import Sequence
from typing import Any

from airflow.sdk import get_current_context, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from dags.assets import CANDIDATE, PRODUCTION
from dags.ml import git_remote, remotes_environment, run_ml

log = logging.getLogger(__name__)


@task(retries=2)
def look_at_candidate() -> dict[str, Any]:
    """What git holds of the candidate. One that the gate did not accept asks nobody, unless it is overridden."""
    context = get_current_context()
    given, told = context["params"], published(context["triggering_asset_events"].get(CANDIDATE, []))
    if not given["candidate"] and not told:
        raise AirflowFailException("no candidate: name one (retrain/RUN), or let efficientdet_retrain make one")
    *others, newest = told or [{}]
    if others:  # Airflow makes one run of all that wait
        log.warning(
            "came at the same time, and ask nobody; who wants one triggers this DAG with its branch: %s",
            ", ".join(f"{one.get('branch')} ({one.get('decision')})" for one in others),
        )
    revision = given["candidate"] or newest["commit"]
    found = run_ml("pipeline.candidate", ["--remote", git_remote(), "--", revision], environment=remotes_environment())
    if found["decision"] != "accepted" and not given["override"]:
        log.warning(
            "%s: the gate's decision is %s, on %s: nobody is asked; who wants it anyway triggers this DAG with that "
            "candidate and a reason",
            found["branch"],
            found["decision"],
            found["split"],
        )
        raise AirflowSkipException(f"the gate's decision is {found['decision']}")
    report = newest.get("report") if not given["candidate"] else f"{found['branch']}:report.md"
    return {**found, "override": given["override"], "text": question(found, report, given["override"])}


def published(events: Sequence[Any]) -> list[dict[str, Any]]:
    """What the events tell of their candidates, as they came; the newest that the gate accepted is the last."""
    told = [event.extra for event in sorted(events, key=lambda event: event.timestamp)]
    return sorted(told, key=lambda one: bool(one.get("decision") == "accepted"))


def question(found: dict[str, Any], report: str | None, override: str | None) -> str:
    """Markdown: the figures, and where the rest stands."""
    link = f"[{report}]({report})" if report and report.startswith("http") else f"`{report}`"
    lines = [
        f"`{found['branch']}` at `{found['commit'][:10]}`. The gate: **{found['decision']}** on {found['split']}.",
        *([f"**The gate is overridden**: {override}"] if override else []),
        found["table"],
        f"What changed: {link}",
        "Approve: it becomes the champion and production's model. Reject, or no answer in time: nothing changes.",
    ]
    return "\n\n".join(lines)


@task(outlets=[PRODUCTION], retries=10)  # an unproven model may be in production until one succeeds
def promote(found: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Tags, champion, push, smoke test; the way back where that fails. A killed try is made again, a refusal is not."""
    person = answer["responded_by_user"]
    words = {
        "remote": git_remote(),
        "approved-by": person["name"] or person["id"],
        "note": (answer["params_input"].get("note") or "").strip(),
        "override": found["override"],
    }
    options = [f"--{name}={value}" for name, value in words.items() if value]
    try:
        done = run_ml("pipeline.promotion", [*options, "--", found["commit"]], environment=remotes_environment())
    except SystemExit as error:
        if str(error).startswith("error: "):
            raise AirflowFailException(str(error)) from None
        raise
    get_current_context()["outlet_events"][PRODUCTION].extra = {**done, "AP": found["AP"], "split": found["split"]}
    log.info("%s is in production, after %s", done["version"], done["after"] or "none")
    return done
