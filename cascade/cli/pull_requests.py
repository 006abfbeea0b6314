"""Comments in a pull request on GitHub: found by their marker, edited or created, best effort.

A job names its pull request and its token in environment variables. The REST API is called with the
standard library.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec

from cascade.core.errors import first_line
from cascade.core.printable import printable
from cascade.core.reading import UnreadableError, read_json

T = TypeVar("T")

#: Seconds that a call may wait for the network.
TIMEOUT = 20.0

#: Comments per page of a list; the API allows no more.
PAGE = 100

#: The most pages that are read, so that a list without an end cannot keep a job waiting.
_MOST_PAGES = 100

#: The most bytes of an answer: a page of the longest comments that GitHub accepts.
_MOST_BYTES = 1 << 26

_API = "https://api.github.com"

#: What to do about an answer, by its status.
_REMEDIES = {
    401: "check the token in GITHUB_TOKEN",
    403: "give the job `permissions: pull-requests: write`; for a pull request from a fork, GitHub "
    "gives a token that can only read",
}


class NotPostedError(Exception):
    """A comment cannot be posted; the message says why, in one line."""


@dataclass(frozen=True)
class PullRequest:
    """A pull request, and how to reach it.

    Attributes:
        repository: "owner/name".
        number: Its number.
        commit: Its newest commit when the job began; None if unknown.
        run: The address of the job's run; None if unknown.
        api: The address of the REST API.
        token: The token of the job.
    """

    repository: str
    number: int
    commit: str | None
    run: str | None
    api: str
    token: str = field(repr=False)


class _Account(msgspec.Struct):
    login: str


class _Comment(msgspec.Struct):
    """A comment as the API returns it, as far as it is read."""

    id: int
    html_url: str = ""
    body: str | None = None
    user: _Account | None = None


def pull_request(environment: Mapping[str, str]) -> PullRequest:
    """Return the pull request that a job of GitHub Actions runs for.

    Args:
        environment: The variables of the job: GITHUB_EVENT_PATH, GITHUB_REPOSITORY, GITHUB_TOKEN,
            and GITHUB_API_URL, GITHUB_SERVER_URL and GITHUB_RUN_ID where they are set.

    Raises:
        NotPostedError: The job runs for no pull request, or a variable is missing or invalid.
    """
    event = _event(environment)
    about = _entry(event, "pull_request")
    number = _entry(about, "number")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        name = environment.get("GITHUB_EVENT_NAME", "unknown")
        raise NotPostedError(f"the event {name} is of no pull request")
    repository = environment.get("GITHUB_REPOSITORY", "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise NotPostedError(f"expected GITHUB_REPOSITORY to be OWNER/NAME, got {repository!r}")
    token = environment.get("GITHUB_TOKEN", "").strip()
    # The token is never shown, not even an invalid one.
    if not re.fullmatch(r"[!-~]+", token):
        raise NotPostedError(
            "expected a token in GITHUB_TOKEN; set it to ${{ github.token }} in the step's env"
        )
    api = (environment.get("GITHUB_API_URL") or _API).rstrip("/")
    if not re.match("https?://", api):
        raise NotPostedError(f"expected GITHUB_API_URL to be an http address, got {api!r}")
    commit = _entry(_entry(about, "head"), "sha")
    return PullRequest(
        repository=repository,
        number=number,
        commit=commit if isinstance(commit, str) else None,
        run=_run(environment, repository),
        api=api,
        token=token,
    )


def post_comment(pull: PullRequest, text: str, *, marker: str, author: str) -> tuple[str, bool]:
    """Edit the earlier comment of a pull request, or create one if there is none.

    Args:
        pull: The pull request.
        text: The new text; it begins with the marker.
        marker: How the earlier comment begins.
        author: The account that wrote the earlier comment. A comment of anybody else is left alone,
            whatever it begins with.

    Returns:
        The address of the comment, and whether it existed before.

    Raises:
        NotPostedError: The API refused, could not be reached, or answered with something else.
    """
    comments = f"/repos/{pull.repository}/issues/{pull.number}/comments"
    earlier = _earlier(pull, comments, marker, author)
    if earlier is None:
        made, _ = _call(pull, "POST", comments, _Comment, {"body": text})
        return made.html_url, False
    place = f"/repos/{pull.repository}/issues/comments/{earlier.id}"
    edited, _ = _call(pull, "PATCH", place, _Comment, {"body": text})
    return edited.html_url, True


def _earlier(pull: PullRequest, comments: str, marker: str, author: str) -> _Comment | None:
    for page in range(1, _MOST_PAGES + 1):
        place = f"{comments}?per_page={PAGE}&page={page}"
        found, link = _call(pull, "GET", place, list[_Comment])
        for comment in found:
            is_ours = comment.user is not None and comment.user.login == author
            if is_ours and (comment.body or "").startswith(marker):
                return comment
        if 'rel="next"' not in link:
            return None
    raise NotPostedError(f"its {_MOST_PAGES * PAGE:,} newest comments have no end")


# --- The API ---------------------------------------------------------------------------------


def _call(
    pull: PullRequest, method: str, place: str, kind: type[T], body: Any = None
) -> tuple[T, str]:
    """Call the API; return its answer, and the header that links to the next page.

    Raises:
        NotPostedError: The API refused, could not be reached, or answered with something else.
    """
    try:
        request = Request(
            pull.api + place,
            data=None if body is None else json.dumps(body, allow_nan=False).encode(),
            headers={
                "Accept": "application/vnd.github+json",
                "Content-Type": "application/json",
                "User-Agent": "cascade-exit",
                "X-GitHub-Api-Version": "2022-11-28",
            },
            method=method,
        )
        # A redirection to another host must not take the token along.
        request.add_unredirected_header("Authorization", f"Bearer {pull.token}")
        with urlopen(request, timeout=TIMEOUT) as answer:
            data, link = answer.read(_MOST_BYTES), answer.headers.get("Link", "")
    except HTTPError as error:
        raise NotPostedError(_refusal(method, error)) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = first_line(getattr(error, "reason", None) or error)
        raise NotPostedError(f"cannot reach {printable(pull.api)}: {reason}") from error
    try:
        return msgspec.json.decode(data, type=kind), link
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise NotPostedError(
            f"{method} was answered with something else than expected ({first_line(error)})"
        ) from error


def _refusal(method: str, error: HTTPError) -> str:
    """Return in one line what the API answered, and what to do."""
    said = error.reason
    with contextlib.suppress(Exception):  # the status says enough where the text is broken
        said = _entry(json.loads(error.read(1 << 16)), "message") or said
    text = f"{method} was answered with {error.code} ({' '.join(printable(str(said)).split())})"
    remedy = _REMEDIES.get(error.code)
    return f"{text}; {remedy}" if remedy else text


# --- The job ---------------------------------------------------------------------------------


def _event(environment: Mapping[str, str]) -> Any:
    path = environment.get("GITHUB_EVENT_PATH")
    if not path:
        raise NotPostedError("GITHUB_EVENT_PATH is not set, so this is no job of GitHub Actions")
    try:
        return read_json(Path(path), foreign=True)
    except (FileNotFoundError, UnreadableError) as error:
        raise NotPostedError(f"cannot read the event {path}: {first_line(error)}") from error


def _run(environment: Mapping[str, str], repository: str) -> str | None:
    server, number = (environment.get(f"GITHUB_{name}", "") for name in ("SERVER_URL", "RUN_ID"))
    if not re.fullmatch(r"https?://[\w.:-]+", server) or not number.isdecimal():
        return None
    return f"{server}/{repository}/actions/runs/{number}"


def _entry(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
