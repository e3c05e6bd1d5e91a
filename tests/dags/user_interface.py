"""What a person does in Airflow's web pages, in headless Chromium: python -m tests.dags.user_interface ADDRESS PASSWORD
PICTURES NOTE. Run in Airflow's environment; pictures of the pages are left in a folder. Prints the retraining's branch.
"""

import re
import sys
import time
from pathlib import Path

from playwright.sync_api import Locator, Page, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
RETRAIN, PROMOTE = "efficientdet_retrain", "efficientdet_promote"
SIZE = {"width": 1280, "height": 800}


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

    def ask(self, path: str) -> dict:
        """The API's answer, as this person."""
        answer = self.page.request.get(f"{self.address}/api/v2{path}")
        assert answer.ok, f"{path}: {answer.status} {answer.text()}"
        return answer.json()

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def log_in(self, password: str) -> None:
        self.go("/")
        self.page.get_by_label("Username").fill("admin")
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name=re.compile("sign in|log ?in", re.I)).click()
        expect(self.page.get_by_role("link", name="Dags", exact=True)).to_be_visible()


def wait_for(what, seconds: float):
    """What `what` gives, once it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(1)
    return found


def main() -> None:
    address, password, pictures, note = sys.argv[1:]
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport=SIZE, locale="en")
        page.set_default_timeout(60_000)
        browser = Browser(page, address, Path(pictures))
        browser.log_in(password)
        chromium.close()


if __name__ == "__main__":
    main()
