"""`cascade comment`: one comment in a pull request, against a local server that imitates GitHub."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.build_comparisons import a_session, clean, moved
from support.commands import Done, Run, check_refusal
from support.github_server import BOT, TOKEN, Fault, GitHub, Handler, github_server

from cascade.cli import pull_requests
from cascade.core.records import write_record

MARKER = "<!-- cascade-gate cascade -->\n"


@pytest.fixture
def github() -> Iterator[GitHub]:
    with github_server() as server:
        yield server


@pytest.fixture
def job(here: Path, github: GitHub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of GitHub Actions for pull request 7, whose gate has failed."""
    event = {"number": 7, "pull_request": {"number": 7, "head": {"sha": "0123456789abcdef"}}}
    (here / "event.json").write_text(json.dumps(event))
    variables = {
        "GITHUB_API_URL": github.address,
        "GITHUB_EVENT_NAME": "pull_request",
        "GITHUB_EVENT_PATH": str(here / "event.json"),
        "GITHUB_REPOSITORY": github.repository,
        "GITHUB_RUN_ID": "42",
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    report(here, moved())
    return here


def report(here: Path, *records: object) -> None:
    (here / "report").mkdir(exist_ok=True)
    write_record(here / "report/report.json", a_session(*records))  # type: ignore[arg-type]


pytestmark = pytest.mark.usefixtures("job")


def test_the_first_run_posts_a_comment_with_the_verdict_first(run: Run, github: GitHub) -> None:
    done = run("comment", "report")
    assert (done.status, done.out) == (0, "")
    assert done.err == "Posted the comment https://github.com/owner/name/pull/7#0\n"
    (body,) = github.bodies()
    assert body.startswith(f"{MARKER}## CASCADE: FAIL\n")
    assert "| 2 | mean | 0.730652 | 0.740652 |" in body
    assert "Commit 0123456789ab. The [run of the job](https://github.com/owner/name/act" in body
    assert "/owner/name/actions/runs/42)" in body
    assert github.calls == ["GET 1", "POST"]


def test_the_next_run_edits_the_comment(run: Run, github: GitHub, job: Path) -> None:
    run("comment", "report/report.json")
    report(job, clean())
    done = run("comment", "report")
    assert done.err == "Edited the comment https://github.com/owner/name/pull/7#0\n"
    (body,) = github.bodies()
    assert body.startswith(f"{MARKER}## CASCADE: PASS\n")
    assert github.calls == ["GET 1", "POST", "GET 1", "PATCH"]


@pytest.mark.parametrize(("before", "pages"), [(99, 1), (100, 2), (250, 3)])
def test_the_comment_is_found_on_any_page(
    run: Run, github: GitHub, before: int, pages: int
) -> None:
    for number in range(before):
        github.add(f"talk {number}", "someone")
    github.add(f"{MARKER}old")
    for number in range(120):
        github.add(f"more talk {number}", "someone")
    assert run("comment", "report", "--quiet").err == ""
    (body,) = github.bodies()
    assert "CASCADE: FAIL" in body
    assert github.calls == [*(f"GET {page}" for page in range(1, pages + 1)), "PATCH"]


def test_comments_of_others_are_left_alone(run: Run, github: GitHub) -> None:
    others = [f"{MARKER}someone's own", f"> {MARKER}quoted"]
    github.add(others[0], "someone")
    github.add(others[1])
    github.add("no marker")
    github.comments.append({"id": 5, "body": None, "user": None})  # of a deleted account
    run("comment", "report")
    assert github.calls == ["GET 1", "POST"]
    assert github.comments[0]["body"] == others[0]
    run("comment", "report", "--author", "someone")
    assert github.comments[0]["body"] != others[0]


def test_each_name_has_its_own_comment(run: Run, github: GitHub) -> None:
    for name in ("a", "b --> <b>", "a"):
        run("comment", "report", "--name", name)
    assert [body.splitlines()[0] for body in github.bodies()] == [
        "<!-- cascade-gate a -->",
        "<!-- cascade-gate b%20%2D%2D%3E%20%3Cb%3E -->",
    ]


def test_a_gate_without_a_report_replaces_the_old_verdict(
    run: Run, github: GitHub, job: Path
) -> None:
    run("comment", "report")
    (job / "report/report.json").unlink()
    check_refusal(run("comment", "report"), ["no record report/report.json"])
    assert run("comment", "report", "--gate-status", 4).status == 0
    (body,) = github.bodies()
    assert body.startswith(f"{MARKER}## CASCADE: NO VERDICT\n\nThe gate ended with exit status 4 ")


# --- What cannot be posted -------------------------------------------------------------------


def not_posted(done: Done) -> str:
    """Return why a comment was not posted: one line, and exit status 0."""
    assert (done.status, done.out) == (0, "")
    (line,) = done.err.splitlines()
    start = "cascade: no comment in the pull request: "
    assert line.startswith(start)
    assert TOKEN not in line
    return line.removeprefix(start)


def answering(status: int, data: bytes, *, method: str = "GET", link: str = "") -> Fault:
    def fault(handler: Handler) -> bool:
        if handler.command != method:
            return False
        handler.send(status, data, link=link)
        return True

    return fault


def message(text: str) -> bytes:
    return json.dumps({"message": text}).encode()


def hanging_up(handler: Handler) -> bool:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def cut_off(handler: Handler) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"[")
    handler.close_connection = True
    return True


def no_http(handler: Handler) -> bool:
    handler.wfile.write(b"SSH-2.0\r\n\r\n")
    handler.close_connection = True
    return True


READ_ONLY = "Resource not accessible by integration"
FAULTS: dict[str, tuple[Fault, str]] = {
    "a list that is refused": (
        answering(403, message(READ_ONLY)),
        rf"GET was answered with 403 \({READ_ONLY}\); give the job `permissions: pull-requests: ",
    ),
    "a read-only token": (
        answering(403, message(READ_ONLY), method="POST"),
        rf"POST was answered with 403 \({READ_ONLY}\); .* fork, GitHub gives a token that can only",
    ),
    "an invalid token": (
        answering(401, message("Bad credentials")),
        r"GET was answered with 401 \(Bad credentials\); check the token in GITHUB_TOKEN",
    ),
    "a server error": (
        answering(500, b"<html>Unicorn!</html>"),
        r"GET was answered with 500 \(Internal Server Error\)$",
    ),
    "a server error when writing": (
        answering(502, message("a\n::error::b\x1b[2J"), method="POST"),
        r"POST was answered with 502 \(a\\n::error::b\\x1b\[2J\)$",
    ),
    "a rate limit": (answering(429, message("slow down")), r"with 429 \(slow down\)$"),
    "HTML": (answering(200, b"<html>"), "GET was answered with something else than expected"),
    "nothing": (answering(200, b""), "GET was answered with something else than expected"),
    "no UTF-8": (answering(200, b'[{"id": 1, "body": "\xff"}]'), "something else than expected"),
    "nested without end": (answering(200, b"[" * 100_000), "something else than expected"),
    "an object, no list": (answering(200, message("x")), "something else than expected"),
    "a list of texts": (answering(200, b'["x"]'), "something else than expected"),
    "an answer without id": (answering(201, b"{}", method="POST"), "POST was answered with some"),
    "a list without end": (
        answering(200, b"[]", link='<x>; rel="next"'),
        "its 10,000 newest comments have no end",
    ),
    "a connection that closes": (hanging_up, "cannot reach http://127.0.0.1:"),
    "an answer that is cut off": (cut_off, "GET was answered with something else than expected"),
    "another protocol": (no_http, "cannot reach http://127.0.0.1:"),
}


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS)
def test_a_comment_that_cannot_be_posted_is_one_line_and_no_failure(
    run: Run, github: GitHub, fault: Fault, words: str
) -> None:
    github.fault = fault
    assert re.search(words, not_posted(run("comment", "report")))
    assert github.comments == []


def test_a_read_only_token_leaves_the_old_comment(run: Run, github: GitHub) -> None:
    github.add(f"{MARKER}old")
    github.fault = answering(403, message(READ_ONLY), method="PATCH")
    assert "PATCH was answered with 403" in not_posted(run("comment", "report"))
    assert github.bodies() == [f"{MARKER}old"]


def test_a_server_that_does_not_answer_ends_the_call(
    run: Run, github: GitHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(handler: Handler) -> bool:
        time.sleep(3)
        return True

    github.fault = wait
    monkeypatch.setattr(pull_requests, "TIMEOUT", 0.2)
    start = time.perf_counter()
    assert "timed out" in not_posted(run("comment", "report"))
    assert time.perf_counter() - start < 2.5


def test_no_network_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:  # bound, but nobody listens
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("GITHUB_API_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert "Connection refused" in not_posted(run("comment", "report"))


def test_a_redirection_does_not_get_the_token(run: Run, github: GitHub) -> None:
    seen: list[str | None] = []

    def redirect(handler: Handler) -> bool:
        if not handler.path.startswith("/elsewhere"):
            handler.send_response(302)
            handler.send_header("Location", f"{github.address}/elsewhere")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        else:
            seen.append(handler.headers.get("Authorization"))
            handler.answer(401, {"message": "who are you?"})
        return True

    github.fault = redirect
    assert "401 (who are you?)" in not_posted(run("comment", "report"))
    assert seen == [None]


# --- Jobs ------------------------------------------------------------------------------------

JOBS: dict[str, tuple[str, str | None, str]] = {
    "no job": ("GITHUB_EVENT_PATH", None, "GITHUB_EVENT_PATH is not set"),
    "no event": ("GITHUB_EVENT_PATH", "nowhere.json", "cannot read the event nowhere.json"),
    "an event that is torn": ("GITHUB_EVENT_PATH", "texts.jsonl", "cannot read the event"),
    "a push": ("GITHUB_EVENT_PATH", "push.json", "the event pull_request is of no pull request"),
    "no repository": ("GITHUB_REPOSITORY", None, "expected GITHUB_REPOSITORY to be OWNER/NAME"),
    "a bad repository": ("GITHUB_REPOSITORY", "../..?", "got '../..?'"),
    "no token": ("GITHUB_TOKEN", None, "expected a token in GITHUB_TOKEN"),
    "an empty token": ("GITHUB_TOKEN", "", "expected a token in GITHUB_TOKEN"),
    "a token of two lines": ("GITHUB_TOKEN", f"{TOKEN}\nX: y", "expected a token in GITHUB_TOKEN"),
    "a file as API": ("GITHUB_API_URL", "file:///etc/passwd", "GITHUB_API_URL to be an http addr"),
    "no API": ("GITHUB_API_URL", "http://[", "cannot reach"),
    "another token": ("GITHUB_TOKEN", "another", "401 (Bad credentials)"),
    "another pull request": ("GITHUB_EVENT_PATH", "other.json", "404 (Not Found)"),
}


@pytest.mark.parametrize(("name", "value", "words"), JOBS.values(), ids=JOBS)
def test_a_job_without_a_pull_request_or_token_is_one_line(
    run: Run,
    github: GitHub,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str | None,
    words: str,
) -> None:
    Path("push.json").write_text('{"ref": "refs/heads/main", "pull_request": null}')
    Path("other.json").write_text('{"pull_request": {"number": 8}}')
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert words in not_posted(run("comment", "report"))
    assert github.comments == []


def test_a_report_that_is_broken_is_refused_before_anything_is_posted(
    run: Run, github: GitHub, job: Path
) -> None:
    check_refusal(run("comment", "nowhere"), ["no record nowhere/report.json"])
    path = job / "report/report.json"
    path.write_text(path.read_text().replace("FAIL", "PASS"))
    check_refusal(run("comment", "report"), ["was changed after it was written"])
    check_refusal(run("comment", "report", "--name", "x" * 101), ["1 to 100 characters"])
    assert github.calls == []


def test_the_account_of_a_job_is_the_default_author() -> None:
    from cascade.cli.commands.comment import AUTHOR

    assert AUTHOR == BOT
