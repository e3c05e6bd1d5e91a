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

from playwright.sync_api import Page, TimeoutError, expect, sync_playwright

RETRAIN = "efficientdet_retrain"
SIZE = {"width": 1280, "height": 800}
PATIENCE = 60_000  # milliseconds, for a page
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
        answer = self.page.request.get(f"{self.address}/api/v2{path}")
        assert answer.ok, f"{path}: {answer.status} {answer.text()}"
        return answer.json()

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
    browser.picture("graph")
    browser.go("/assets")
    page.get_by_role("link", name="candidate", exact=True).click()
    browser.nodes(RETRAIN, "shards", "metrics", "candidate", "efficientdet_promote", "production")
    expect(page.get_by_text("1 Asset Event").first).to_be_visible()
    browser.picture("assets")


def approve(browser: Browser, branch: str, note: str) -> str:
    """Answers the question; the run of the promotion."""
    page = browser.page
    question = page.get_by_role("link", name=f"Put {branch} into production?")
    for _ in range(60):
        browser.go("/required_actions")
        try:
            question.click(timeout=5000)
            break
        except TimeoutError:
            continue
    page.get_by_role("button", name="Show Grid").click()  # narrower than the graph
    page.locator("[name='element_note']").fill(note)
    expect(page.get_by_text("accepted")).to_be_visible()
    browser.picture("approval")
    page.get_by_role("button", name="Approve", exact=True).click()
    expect(page.get_by_text("Response received at")).to_be_visible()
    return unquote(page.url.partition("/runs/")[2].partition("/tasks/")[0])


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
        promotion = approve(browser, branch, note)
        browser.finished(f"efficientdet_promote/dagRuns/{promotion}")
        chromium.close()
    print(branch)


if __name__ == "__main__":
    main()
