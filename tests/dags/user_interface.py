"""What a person does in Airflow's web pages, in headless Chromium: retrains, looks, and approves the candidate.

`python -m tests.dags.user_interface ADDRESS PASSWORD FOLDER REASON KEY=NUMBER NOTE`, with Airflow's environment. KEY is
a field of the form's section Training. The pages' pictures are left in the folder. The last line on stdout is the
branch that went to production.
"""

import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from playwright.sync_api import Page, expect, sync_playwright

RETRAIN, PROMOTE = "efficientdet_retrain", "efficientdet_promote"
SIZE = {"width": 1280, "height": 1040}
PATIENCE = 180_000  # milliseconds, for a page or an answer
LONGEST = 1200  # seconds, a run of a DAG


class Browser:
    """A page of one who has logged in."""

    def __init__(self, page: Page, address: str, pictures: Path) -> None:
        self.page = page
        self.address = address
        self.pictures = pictures

    def picture(self, name: str) -> None:
        self.page.wait_for_timeout(1000)  # what slides in has come
        self.page.screenshot(path=str(self.pictures / f"{name}.png"))

    def go(self, path: str) -> None:
        self.page.goto(f"{self.address}{path}")

    def ask(self, path: str) -> Any:
        """The API's answer to this person."""
        answer = self.page.request.get(f"{self.address}/api/v2{path}", timeout=PATIENCE)
        assert answer.ok, f"{path}: {answer.status} {answer.text()}"
        return answer.json()

    def trigger(self, dag: str, **conf: str) -> str:
        """The run."""
        content = {"logical_date": None, "conf": conf}
        answer = self.page.request.post(f"{self.address}/api/v2/dags/{dag}/dagRuns", data=content, timeout=PATIENCE)
        assert answer.ok, f"{dag}: {answer.status} {answer.text()}"
        return str(answer.json()["dag_run_id"])

    def set_variables(self, **values: str) -> None:
        """Airflow's, in place of what they were."""
        entities = [{"key": key, "value": value} for key, value in values.items()]
        action = {"action": "create", "action_on_existence": "overwrite", "entities": entities}
        answer = self.page.request.patch(f"{self.address}/api/v2/variables", data={"actions": [action]})
        assert answer.ok, f"{answer.status} {answer.text()}"

    def asked(self, run: str) -> None:
        """Waits until a run of the promotion asks for an answer."""
        deadline = time.monotonic() + LONGEST
        while self.states(f"{PROMOTE}/dagRuns/{run}").get("approve") != "awaiting_input":
            assert time.monotonic() < deadline, f"{run}: nobody is asked"
            time.sleep(1)

    def states(self, run: str) -> dict[str, str]:
        """Task -> state, of a run "DAG/dagRuns/RUN"."""
        return {one["task_id"]: one["state"] for one in self.ask(f"/dags/{run}/taskInstances")["task_instances"]}

    def finished(self, run: str) -> None:
        """Waits for a run, "DAG/dagRuns/RUN", which has to succeed."""
        deadline = time.monotonic() + LONGEST
        while (state := self.ask(f"/dags/{run}")["state"]) in ("queued", "running"):
            assert time.monotonic() < deadline, f"{run}: still {state}"
            time.sleep(2)
        assert state == "success", f"{run}: {state}"

    def nodes(self, *names: str) -> None:
        """Waits for these in a graph."""
        for name in names:
            expect(self.page.locator(".react-flow__node").filter(has_text=name).first).to_be_visible()


def log_in(browser: Browser, password: str) -> None:
    page = browser.page
    browser.go("/")
    page.locator("[name=username]").fill("admin")
    page.locator("[name=password]").fill(password)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("link", name="Dags", exact=True)).to_be_visible()


def retrain(browser: Browser, reason: str, override: str) -> str:
    """Fills the form; the run."""
    page = browser.page
    deadline = time.monotonic() + LONGEST
    while not {RETRAIN, PROMOTE} <= {dag["dag_id"] for dag in browser.ask("/dags")["dags"]}:  # not parsed yet
        assert time.monotonic() < deadline, "no DAGs"
        time.sleep(1)
    browser.go(f"/dags/{RETRAIN}")
    page.get_by_role("button", name="Trigger Dag").click()
    form = page.get_by_role("dialog")
    form.locator("[name='element_reason']").fill(reason)
    browser.picture("trigger_form")
    form.get_by_role("button", name="Training").click()
    key, _, number = override.partition("=")
    form.locator(f"[name='element_{key}']").fill(number)
    form.get_by_role("button", name="Trigger", exact=True).click()
    page.wait_for_url(re.compile("/runs/"))
    return unquote(page.url.partition("/runs/")[2].partition("?")[0])


def look(browser: Browser, run: str) -> None:
    """At the graph, and at the assets' lineage."""
    page = browser.page
    browser.go(f"/dags/{RETRAIN}/runs/{run}")
    page.get_by_role("button", name="Show Graph").click()
    browser.nodes("prepare", "shard", "evaluate", "promote", "publish")
    page.get_by_role("button", name="Collapse Details Panel").click()
    page.get_by_role("button", name="Fit View").click()
    browser.picture("graph")
    browser.go("/assets")
    page.get_by_role("link", name="candidate", exact=True).click()
    browser.nodes(RETRAIN, "shards", "metrics", "candidate", PROMOTE, "production")
    expect(page.get_by_text("1 Asset Event").first).to_be_visible()
    browser.picture("assets")


def answer(browser: Browser, run: str, choice: str, note: str) -> None:
    """Approve or Reject, in a run of the promotion; waits for the run's end."""
    page = browser.page
    browser.asked(run)
    browser.go(f"/dags/{PROMOTE}/runs/{run}/tasks/approve/required_actions")
    page.get_by_role("button", name="Show Grid").click()  # narrower than the graph
    page.locator("[name='element_note']").fill(note)
    expect(page.get_by_text("accepted", exact=True)).to_be_visible()
    if choice == "Approve":
        browser.picture("approval")
    page.get_by_role("button", name=choice, exact=True).click()
    expect(page.get_by_text("approve response successful")).to_be_visible()
    browser.finished(f"{PROMOTE}/dagRuns/{run}")


def answer_unasked(browser: Browser, branch: str) -> str:
    """One who is not among the approvers is refused; the run, whose question nobody else answers."""
    (published,) = browser.ask(f"/dags/{PROMOTE}/dagRuns")["dag_runs"]
    browser.asked(published["dag_run_id"])  # that one has its approvers and its time already
    browser.set_variables(approvers='["ann"]', approval_hours="0.05")  # three minutes
    run = browser.trigger(PROMOTE, candidate=branch)
    browser.asked(run)
    question = f"{PROMOTE}/dagRuns/{run}/taskInstances/approve/-1/hitlDetails"
    given = {"chosen_options": ["Approve"], "params_input": {"note": None}}
    refusal = browser.page.request.patch(f"{browser.address}/api/v2/dags/{question}", data=given, timeout=PATIENCE)
    assert (refusal.status, "is not a respondent" in refusal.text()) == (403, True), refusal.text()
    browser.set_variables(approvers='["admin"]', approval_hours="72")
    return f"{PROMOTE}/dagRuns/{run}"


def promote(browser: Browser, branch: str, note: str) -> None:
    """A failed gate asks nobody; Reject ends a promotion, and no answer in time; Approve carries it out."""
    unanswered = answer_unasked(browser, branch)
    failed = f"{PROMOTE}/dagRuns/{browser.trigger(PROMOTE, candidate='main')}"  # what main holds, the gate rejected
    rejected = browser.trigger(PROMOTE, candidate=branch)
    answer(browser, rejected, "Reject", "one more look")
    assert browser.states(f"{PROMOTE}/dagRuns/{rejected}")["promote"] == "skipped"
    browser.finished(failed)
    assert set(browser.states(failed).values()) == {"skipped"}
    browser.finished(unanswered)
    assert browser.states(unanswered) == {"look_at_candidate": "success", "approve": "success", "promote": "skipped"}
    told = browser.ask(f"/dags/{unanswered}/taskInstances/approve/-1/hitlDetails")
    assert (told["chosen_options"], told["responded_by_user"]) == (["Reject"], None)
    browser.go("/required_actions")
    browser.page.get_by_role("link", name=f"Put {branch} into production?").first.click()
    browser.page.wait_for_url(re.compile("/tasks/approve"))
    run = unquote(browser.page.url.partition("/runs/")[2].partition("/tasks/")[0])
    answer(browser, run, "Approve", note)
    assert set(browser.states(f"{PROMOTE}/dagRuns/{run}").values()) == {"success"}


def main() -> None:
    """The whole visit."""
    address, password, pictures, reason, override, note = sys.argv[1:]
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport=SIZE, locale="en")
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        browser = Browser(page, address, Path(pictures))
        log_in(browser, password)
        run = retrain(browser, reason, override)
        browser.finished(f"{RETRAIN}/dagRuns/{run}")
        look(browser, run)
        task = f"/dags/{RETRAIN}/dagRuns/{run}/taskInstances/publish"
        branch = browser.ask(f"{task}/xcomEntries/return_value")["value"]["branch"]
        promote(browser, branch, note)
        chromium.close()
    print(branch)


if __name__ == "__main__":
    main()
