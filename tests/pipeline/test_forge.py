"""The forge's API, spoken with a server on loopback."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import forge
from pipeline.errors import PipelineError
from pipeline.forge import COMMENT_LIMIT, Forge
from tests.pipeline.small_forge import LOGIN, TOKEN, Fault, State, running

MARKER = "<!-- marker -->"


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setattr(forge, "PAUSE", 0.001)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    with running() as found:
        yield found


def ours(state: State) -> Forge:
    return Forge("o/r", TOKEN, state.url)


def put(state: State, text: str = "text") -> str:
    return ours(state).put_comment(7, MARKER, text)


def test_the_comment_is_made_once_and_then_changed(state: State) -> None:
    first = put(state, "one")
    assert put(state, "two") == first == f"{state.url}/o/r/pull/7#issuecomment-1"
    assert [comment["body"] for comment in state.comments] == [f"{MARKER}\ntwo"]


def test_the_same_text_is_not_written_again(state: State) -> None:
    put(state)
    put(state)
    assert [line for line in state.asked if not line.startswith("GET")] == ["POST /repos/o/r/issues/7/comments"]


def test_the_comment_is_found_on_the_third_page(state: State) -> None:
    for number in range(250):
        state.add_comment("somebody", f"comment {number}")
    state.comments[229] |= {"user": {"login": LOGIN}, "body": f"{MARKER}\nold"}
    put(state, "new")
    assert state.comments[229]["body"] == f"{MARKER}\nnew"
    assert len(state.comments) == 250
    assert state.asked.count("GET /repos/o/r/issues/7/comments") == 3


def test_another_ones_comment_with_the_marker_is_left_alone(state: State) -> None:
    state.add_comment("somebody", f"{MARKER}\nmine")
    state.add_comment(LOGIN, f"about {MARKER}")
    put(state)
    assert [comment["body"] for comment in state.comments] == [f"{MARKER}\nmine", f"about {MARKER}", f"{MARKER}\ntext"]


def test_a_comment_of_a_deleted_user_is_passed_over(state: State) -> None:
    state.add_comment(LOGIN, MARKER)
    state.comments[0]["user"] = None
    put(state)
    assert len(state.comments) == 2


def test_a_workflow_writes_as_its_bot_and_does_not_ask(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    state.add_comment("github-actions[bot]", f"{MARKER}\nold")
    put(state)
    assert [comment["body"] for comment in state.comments] == [f"{MARKER}\ntext"]
    assert "GET /user" not in state.asked


def test_what_is_sent_is_what_the_api_documents(state: State) -> None:
    put(state)
    for headers in state.headers:
        assert headers["authorization"] == f"Bearer {TOKEN}"
        assert headers["accept"] == "application/vnd.github+json"
        assert headers["x-github-api-version"] == "2022-11-28"


def test_a_netrc_does_not_take_the_tokens_place(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    put(state)
    assert len(state.comments) == 1


def test_a_pull_request_is_opened_once_and_then_changed(state: State) -> None:
    first = ours(state).open_pull_request("one", "branch", "main", "text")
    assert ours(state).open_pull_request("two", "branch", "main", "other") == first
    ours(state).open_pull_request("three", "another", "main", "text")
    assert [(pull["title"], pull["head"], pull["base"], pull["body"]) for pull in state.pulls] == [
        ("two", "branch", "main", "other"),
        ("three", "another", "main", "text"),
    ]


def test_a_pull_request_without_commits_is_an_error(state: State) -> None:
    with pytest.raises(PipelineError, match=r"422 Validation Failed .*No commits between.*refused what was sent"):
        ours(state).open_pull_request("t", "main", "main", "")


def test_a_wrong_token_is_an_error_that_does_not_name_it(state: State) -> None:
    with pytest.raises(PipelineError, match="401 Bad credentials: the token is not accepted") as caught:
        Forge("o/r", "a-wrong-token", state.url).put_comment(7, MARKER, "text")
    assert "a-wrong-token" not in str(caught.value)
    assert len(state.asked) == 1
    assert "a-wrong-token" not in repr(Forge("o/r", "a-wrong-token", state.url))


def test_a_token_in_the_forges_answer_is_not_printed(state: State) -> None:
    state.faults.append(Fault(422, message=f"you sent {TOKEN}"))
    with pytest.raises(PipelineError, match=r"you sent \*\*\*"):
        put(state)


@pytest.mark.parametrize(("status", "says"), [(403, "`pull-requests: write`"), (422, "refused"), (410, "gone")])
def test_an_answer_that_stays_is_not_asked_for_again(state: State, status: int, says: str) -> None:
    state.faults.append(Fault(status))
    with pytest.raises(PipelineError, match=says):
        put(state)
    assert len(state.asked) == 1


def test_a_pull_request_that_is_not_there(state: State) -> None:
    with pytest.raises(PipelineError, match="404 Not Found: not there"):
        ours(state).put_comment(8, MARKER, "text")


def test_a_repository_that_moved(state: State) -> None:
    state.faults.append(Fault(301, {"Location": f"{state.url}/elsewhere"}))
    with pytest.raises(PipelineError, match="the repository has moved"):
        put(state)


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_failure_that_passes_is_tried_again(state: State, status: int) -> None:
    state.faults += [Fault(status), Fault(status)]
    put(state)
    assert len(state.comments) == 1


def test_a_comment_whose_answer_was_lost_is_not_made_twice(state: State) -> None:
    state.faults += [None, None, Fault(502, after=True)]  # who am I, the comments, the new one
    put(state)
    assert [comment["body"] for comment in state.comments] == [f"{MARKER}\ntext"]
    assert state.asked.count("POST /repos/o/r/issues/7/comments") == 1


def test_a_failure_that_stays_is_an_error_after_four_tries(state: State) -> None:
    state.faults += [Fault(502)] * 4
    with pytest.raises(PipelineError, match="502 made to fail: given up after 4 tries"):
        put(state)
    assert len(state.asked) == 4


def test_a_rate_limit_is_waited_for(state: State) -> None:
    state.faults.append(Fault(403, {"Retry-After": "0"}))
    reset = str(int(time.time()) - 5)
    state.faults.append(Fault(429, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": reset, "Retry-After": "0"}))
    put(state)
    assert len(state.comments) == 1


def test_a_long_rate_limit_is_an_error_that_says_how_long(state: State) -> None:
    state.faults.append(Fault(403, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(time.time()) + 900)}))
    with pytest.raises(PipelineError, match=r"asks to wait (89\d|90\d) s; run this later"):
        put(state)
    assert len(state.asked) == 1


def test_a_next_page_on_another_server_is_refused(state: State) -> None:
    state.comments += [{"id": n, "user": None, "body": ""} for n in range(101)]
    real, state.url = state.url, "http://127.0.0.2:9"  # as which the server now names itself
    with pytest.raises(PipelineError, match="another server"):
        Forge("o/r", TOKEN, real).put_comment(7, MARKER, "text")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forge, "PAUSE", 0.001)
    with pytest.raises(PipelineError, match=r"ConnectionError.*given up after 4 tries"):
        Forge("o/r", TOKEN, "http://127.0.0.1:9").put_comment(7, MARKER, "text")


def test_a_text_at_the_limit_and_one_above(state: State) -> None:
    room = COMMENT_LIMIT - len(MARKER) - 1
    put(state, "x" * room)
    assert len(state.comments[0]["body"]) == 65_536
    with pytest.raises(PipelineError, match="65,537 characters, and the forge takes 65,536"):
        put(state, "x" * (room + 1))


@pytest.mark.parametrize(
    ("repository", "token", "url", "says"),
    [
        ("o/r", TOKEN, "http://example.org", "expected https"),
        ("o/r", TOKEN, "ftp://127.0.0.1", "expected https"),
        ("o/r/x", TOKEN, "https://example.org", "expected owner/name"),
        ("o/r", "two words", "https://example.org", "GITHUB_TOKEN"),
        ("o/r", "line\n", "https://example.org", "GITHUB_TOKEN"),
    ],
)
def test_what_is_no_forge(repository: str, token: str, url: str, says: str) -> None:
    with pytest.raises(PipelineError, match=says):
        Forge(repository, token, url)


@pytest.mark.parametrize("name", ["GITHUB_TOKEN", "GITHUB_REPOSITORY"])
def test_a_variable_that_is_not_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
    monkeypatch.setenv("GITHUB_REPOSITORY", "o/r")
    monkeypatch.delenv("GITHUB_API_URL", raising=False)
    assert Forge.from_environment().url == "https://api.github.com"
    monkeypatch.setenv(name, "")
    with pytest.raises(PipelineError, match=f"{name} is not set"):
        Forge.from_environment()


def test_the_command(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.md").write_text("# Ä report", encoding="utf-8")
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
    monkeypatch.setenv("GITHUB_REPOSITORY", "o/r")
    monkeypatch.setenv("GITHUB_API_URL", f"{state.url}/")
    monkeypatch.setattr("sys.argv", ["forge", "7", str(tmp_path / "report.md")])
    forge.main()
    assert state.comments[0]["body"] == "<!-- effdet: review -->\n# Ä report"
    assert TOKEN not in capsys.readouterr().out
