"""A server on loopback that answers as GitHub's REST API documents, for issues' comments and pull requests."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "made-for-a-test"
LOGIN = "robot"


@dataclass
class Fault:
    """An answer in place of the real one. `after`: what was asked is done first, and the answer is lost."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "made to fail"
    after: bool = False


@dataclass
class State:
    """What the forge holds, and what it was asked."""

    url: str = ""
    comments: list[dict[str, Any]] = field(default_factory=list)  # of issue 7
    pulls: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Fault | None] = field(default_factory=list)  # at the next requests, in turn; None: no fault
    asked: list[str] = field(default_factory=list)  # "METHOD path"
    headers: list[dict[str, str]] = field(default_factory=list)

    def add_comment(self, login: str, body: str) -> None:
        number = len(self.comments) + 1
        page = f"{self.url}/o/r/pull/7#issuecomment-{number}"
        self.comments.append({"id": number, "user": {"login": login}, "body": body, "html_url": page})


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        state: State = self.server.state
        content = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        address = urlsplit(self.path)
        state.asked.append(f"{self.command} {address.path}")
        state.headers.append({name.lower(): text for name, text in self.headers.items()})
        fault = state.faults.pop(0) if state.faults else None
        if fault and not fault.after:
            return self._answer(fault.status, {"message": fault.message}, fault.headers)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"message": "Bad credentials"})
        status, answer, headers = self._done(state, address.path, parse_qs(address.query), content)
        if fault:
            return self._answer(fault.status, {"message": fault.message}, fault.headers)
        return self._answer(status, answer, headers)

    do_POST = do_PATCH = do_GET  # noqa: N815

    def _done(
        self, state: State, path: str, query: dict[str, list[str]], content: Any
    ) -> tuple[int, Any, dict[str, str]]:
        match self.command, path.strip("/").split("/"):
            case "GET", ["user"]:
                return 200, {"login": LOGIN}, {}
            case "GET", ["repos", "o", "r", "issues", "7", "comments"]:
                return 200, *_page(f"{state.url}{path}", state.comments, query)
            case "POST", ["repos", "o", "r", "issues", "7", "comments"]:
                state.add_comment(LOGIN, content["body"])
                return 201, state.comments[-1], {}
            case "PATCH", ["repos", "o", "r", "issues", "comments", number]:
                state.comments[int(number) - 1]["body"] = content["body"]
                return 200, state.comments[int(number) - 1], {}
            case "GET", ["repos", "o", "r", "pulls"]:
                wanted = ("o:" in query["head"][0], query["head"][0][2:], query["base"][0])
                found = [pull for pull in state.pulls if (True, pull["head"], pull["base"]) == wanted]
                return 200, *_page(f"{state.url}{path}", found, query)
            case "POST", ["repos", "o", "r", "pulls"]:
                if content["head"] == content["base"]:
                    return 422, {"message": "Validation Failed", "errors": [{"message": "No commits between"}]}, {}
                number = len(state.pulls) + 1
                state.pulls.append({**content, "number": number, "html_url": f"{state.url}/o/r/pull/{number}"})
                return 201, state.pulls[-1], {}
            case "PATCH", ["repos", "o", "r", "pulls", number]:
                state.pulls[int(number) - 1].update(content)
                return 200, state.pulls[int(number) - 1], {}
        return 404, {"message": "Not Found"}, {}

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def _page(url: str, items: list[Any], query: dict[str, list[str]]) -> tuple[list[Any], dict[str, str]]:
    """A page of at most 100 items, and the way to the next."""
    size, page = min(100, int(query["per_page"][0])), int(query.get("page", ["1"])[0])
    more = len(items) > page * size
    link = {"Link": f'<{url}?per_page={size}&page={page + 1}>; rel="next"'} if more else {}
    return items[(page - 1) * size : page * size], link


@contextlib.contextmanager
def running() -> Iterator[State]:
    """The forge at state.url."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        state = State(f"http://127.0.0.1:{server.server_port}")
        server.state = state  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
