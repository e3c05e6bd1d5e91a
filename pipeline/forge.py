"""The forge's API (GitHub REST, version 2022-11-28): one comment on a pull request, and a pull request, up to date.

GITHUB_TOKEN and GITHUB_REPOSITORY ("owner/name") come from the environment, and GITHUB_API_URL, which GitHub's own
runners set and an enterprise server or a compatible forge needs. The token is sent to that server alone, over https (or
to this machine), and stands in no message. `python -m pipeline.forge NUMBER FILE` puts a file on a pull request.
"""

import argparse
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase

from pipeline.errors import PipelineError, run

URL = "https://api.github.com"
VERSION = "2022-11-28"
COMMENT_LIMIT = 65_536  # characters of a comment's or a pull request's text; more is a 422
REVIEW = "<!-- effdet: review -->"  # first line of the comment with the report
ACTIONS = "github-actions[bot]"  # as whom a workflow's token writes; it may not ask
TIMEOUT = 30  # seconds without an answer
TRIES = 4
PAUSE = 2.0  # seconds before the second try, twice as long before each further one
LONGEST_WAIT = 120  # seconds to wait for a rate limit; past that it is an error
LOOPBACK = ("127.0.0.1", "::1", "localhost")
HELP = {
    401: "the token is not accepted; give a valid GITHUB_TOKEN",
    403: "the token may not; it needs the permission `pull-requests: write`",
    404: "not there, or the token may not see it; look at GITHUB_REPOSITORY and the number",
    410: "gone",
    422: "refused what was sent",
}

Answer = TypeVar("Answer")


class _TryAgainError(Exception):
    """A failure that may pass; its words, and how long the forge asks to wait, in seconds."""

    def __init__(self, words: str, wait: float | None = None) -> None:
        super().__init__(words)
        self.wait = wait


class _Bearer(AuthBase):
    """The token; as `auth`, since a ~/.netrc would otherwise take its place."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


@dataclass(frozen=True, repr=False)
class Forge:
    """One repository on the forge."""

    repository: str  # "owner/name"
    token: str
    url: str = URL

    def __post_init__(self) -> None:
        address = urlsplit(self.url)
        if address.scheme != "https" and not (address.scheme == "http" and address.hostname in LOOPBACK):
            raise PipelineError(f"GITHUB_API_URL: expected https, got {self.url!r}; a token is not sent in the clear")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repository):
            raise PipelineError(f"GITHUB_REPOSITORY: expected owner/name, got {self.repository!r}")
        if not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise PipelineError("GITHUB_TOKEN: empty, or has spaces, line ends or letters that no token has")

    @classmethod
    def from_environment(cls) -> "Forge":
        """PipelineError names a variable that is not set."""
        for name in ("GITHUB_TOKEN", "GITHUB_REPOSITORY"):
            if not os.environ.get(name):
                raise PipelineError(f"environment: {name} is not set; the forge's API needs it")
        url = os.environ.get("GITHUB_API_URL") or URL
        return cls(os.environ["GITHUB_REPOSITORY"], os.environ["GITHUB_TOKEN"], url.rstrip("/"))

    def put_comment(self, number: int, marker: str, text: str) -> str:
        """The one comment of ours that begins with the marker, made or changed to hold the text; its web address."""
        body = _limited(f"{marker}\n{text}", "the comment")
        return self._tried(lambda: self._put_comment(number, marker, body))

    def open_pull_request(self, title: str, head: str, base: str, text: str) -> str:
        """From branch `head` into `base`; one that is open already gets title and text. Its web address."""
        body = _limited(text, "the pull request's text")
        return self._tried(lambda: self._open_pull_request(title, head, base, body))

    def _put_comment(self, number: int, marker: str, body: str) -> str:
        comments = f"/repos/{self.repository}/issues/{number}/comments"
        login = self._login()
        for comment in self._pages(comments):
            if (comment.get("user") or {}).get("login") == login and (comment.get("body") or "").startswith(marker):
                if comment["body"].replace("\r\n", "\n") == body:
                    return str(comment["html_url"])
                where = f"/repos/{self.repository}/issues/comments/{comment['id']}"
                return str(self._ask("PATCH", where, {"body": body})["html_url"])
        return str(self._ask("POST", comments, {"body": body})["html_url"])

    def _open_pull_request(self, title: str, head: str, base: str, body: str) -> str:
        pulls, owner = f"/repos/{self.repository}/pulls", self.repository.partition("/")[0]
        asked = {"state": "open", "head": f"{owner}:{head}", "base": base}
        for pull in self._pages(pulls, asked):
            return str(self._ask("PATCH", f"{pulls}/{pull['number']}", {"title": title, "body": body})["html_url"])
        content = {"title": title, "head": head, "base": base, "body": body}
        return str(self._ask("POST", pulls, content)["html_url"])

    def _login(self) -> str:
        """As whom the token writes."""
        if os.environ.get("GITHUB_ACTIONS") == "true":
            return ACTIONS
        return str(self._ask("GET", "/user")["login"])

    def _pages(self, path: str, asked: dict[str, str] | None = None) -> Iterator[dict[str, Any]]:
        """All items of a list, page after page as its Link headers lead."""
        where: str | None = f"{self.url}{path}"
        parameters: dict[str, str] | None = {**(asked or {}), "per_page": "100"}
        while where:
            answer = self._send("GET", where, parameters=parameters)
            yield from _json(answer)
            where, parameters = answer.links.get("next", {}).get("url"), None
            if where and urlsplit(where)[:2] != urlsplit(self.url)[:2]:
                raise PipelineError(f"{self.url}: the next page is said to be on another server: {where}")

    def _ask(self, method: str, path: str, content: dict[str, str] | None = None) -> Any:
        return _json(self._send(method, f"{self.url}{path}", content))

    def _send(
        self, method: str, where: str, content: dict[str, str] | None = None, parameters: dict[str, str] | None = None
    ) -> requests.Response:
        """One request. PipelineError for an answer that stays what it is, _TryAgainError for one that may pass."""
        headers = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": VERSION}
        try:
            answer = requests.request(
                method,
                where,
                json=content,
                params=parameters,
                headers=headers,
                auth=_Bearer(self.token),
                timeout=TIMEOUT,
                allow_redirects=False,  # a POST would become a GET
            )
        except requests.RequestException as error:
            raise _TryAgainError(f"{method} {where}: {type(error).__name__}: {error}") from None
        words = f"{method} {where}: {answer.status_code} {self._message(answer)}"
        if answer.status_code >= 500 or answer.status_code == 429 or _is_limited(answer):
            raise _TryAgainError(words, _wait(answer))
        if answer.is_redirect:
            raise PipelineError(f"{words}: the repository has moved; set GITHUB_REPOSITORY to its new name")
        if not answer.ok:
            raise PipelineError(f"{words}: {HELP.get(answer.status_code, 'the forge refused')}")
        return answer

    def _message(self, answer: requests.Response) -> str:
        """The forge's own words."""
        try:
            content = answer.json()
            words = " ".join(str(content[key]) for key in ("message", "errors") if content.get(key))
        except (ValueError, AttributeError, TypeError):
            words = answer.reason or ""
        return words.replace(self.token, "***")[:400]

    def _tried(self, operation: Callable[[], Answer]) -> Answer:
        """The whole operation again after a failure that may pass: it looks first, so nothing is written twice."""
        pause = PAUSE
        for left in reversed(range(TRIES)):
            try:
                return operation()
            except _TryAgainError as error:
                wait = pause if error.wait is None else error.wait
                if wait > LONGEST_WAIT:
                    raise PipelineError(f"{error}: the forge asks to wait {wait:.0f} s; run this later") from None
                if not left:
                    raise PipelineError(f"{error}: given up after {TRIES} tries; run this later") from None
                time.sleep(wait)
                pause *= 2
        raise AssertionError("the last try returns or raises")


def _json(answer: requests.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        raise PipelineError(f"{answer.url}: no JSON came; is GITHUB_API_URL the API's address?") from None


def _is_limited(answer: requests.Response) -> bool:
    """Whether a 403 is a rate limit: the primary one has no request left, a secondary one says how long to wait."""
    spent = answer.headers.get("x-ratelimit-remaining") == "0"
    return answer.status_code == 403 and (spent or "retry-after" in answer.headers)


def _wait(answer: requests.Response) -> float | None:
    """Seconds that the forge asks to wait; None where it does not say."""
    after, reset = (answer.headers.get(name, "") for name in ("retry-after", "x-ratelimit-reset"))
    if after.isdigit():
        return float(after)
    if answer.headers.get("x-ratelimit-remaining") == "0" and reset.isdigit():
        return max(0.0, int(reset) - time.time()) + 1  # the clocks may differ a little
    return None


def _limited(text: str, what: str) -> str:
    if len(text) > COMMENT_LIMIT:
        raise PipelineError(f"{what} has {len(text):,} characters, and the forge takes {COMMENT_LIMIT:,}; shorten it")
    return text


def main() -> None:
    """Puts the report on a pull request."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.forge", description="puts a report on a pull request")
    parser.add_argument("number", type=int, help="of the pull request")
    parser.add_argument("file", type=Path, help="Markdown")
    arguments = parser.parse_args()
    try:
        text = arguments.file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PipelineError(f"{arguments.file}: not UTF-8: {error}") from None
    print(Forge.from_environment().put_comment(arguments.number, REVIEW, text))


if __name__ == "__main__":
    run(main)
