"""A server on 127.0.0.1 that lists, creates and edits comments as GitHub's API does."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

#: The account that a job's token writes as.
BOT = "github-actions[bot]"

TOKEN = "a-token"

#: Answers a call in place of the API: gets the handler, answers, returns whether it did.
Fault = Callable[["Handler"], bool]


@dataclass
class GitHub:
    """The state of the server.

    Attributes:
        repository: "owner/name".
        number: The pull request.
        comments: Its comments, oldest first.
        calls: The method of each call, with its page for lists.
        fault: Answers instead, if set.
        address: The server's address.
    """

    repository: str = "owner/name"
    number: int = 7
    comments: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    fault: Fault | None = None
    address: str = ""

    def add(self, body: str, login: str = BOT) -> dict[str, Any]:
        made = {
            "id": 1000 + len(self.comments),
            "html_url": f"https://github.com/{self.repository}/pull/{self.number}#{len(self.comments)}",
            "body": body,
            "user": {"login": login, "type": "Bot" if "[bot]" in login else "User"},
        }
        self.comments.append(made)
        return made

    def bodies(self, login: str = BOT) -> list[str]:
        return [one["body"] for one in self.comments if one["user"]["login"] == login]


class Handler(BaseHTTPRequestHandler):
    """Answers calls as the API does, as far as comments go."""

    github: GitHub

    def answer(self, status: int, value: Any, *, link: str = "") -> None:
        self.send(status, json.dumps(value).encode(), link=link)

    def send(self, status: int, data: bytes, *, link: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if link:
            self.send_header("Link", link)
        self.end_headers()
        self.wfile.write(data)

    def handle_call(self) -> None:
        github = self.github
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        place = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(place.query).items()}
        github.calls.append(" ".join([self.command, *filter(None, [query.get("page")])]))
        if github.fault is not None and github.fault(self):
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"message": "Bad credentials"})
            return
        issues = f"/repos/{github.repository}/issues"
        edited = re.fullmatch(rf"{re.escape(issues)}/comments/(\d+)", place.path)
        if self.command == "PATCH" and edited:
            (comment,) = (one for one in github.comments if one["id"] == int(edited[1]))
            comment["body"] = body["body"]
            self.answer(200, comment)
        elif place.path != f"{issues}/{github.number}/comments":
            self.answer(404, {"message": "Not Found"})
        elif self.command == "POST":
            self.answer(201, github.add(body["body"]))
        else:
            self.list_comments(int(query.get("per_page", 30)), int(query.get("page", 1)))

    def list_comments(self, size: int, page: int) -> None:
        comments = self.github.comments
        size = min(size, 100)
        more = page * size < len(comments)
        link = '<https://example.org/next>; rel="next", <https://example.org/last>; rel="last"'
        self.answer(200, comments[(page - 1) * size : page * size], link=link if more else "")

    do_GET = do_POST = do_PATCH = handle_call  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def github_server() -> Iterator[GitHub]:
    """Run the server until the context ends."""
    github = GitHub()
    handler = type("Bound", (Handler,), {"github": github})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    github.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield github
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
