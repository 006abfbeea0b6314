"""`cascade comment`: post the verdict of a gate as a comment in its pull request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.app import command
from cascade.cli.console import echo, message
from cascade.cli.options import Quiet
from cascade.core.errors import RecordError, UsageError

if TYPE_CHECKING:
    from cascade.gate.records import SessionRecord

#: The record in the folder of `--cascade-report` and of `cascade gate --output`.
REPORT = "report.json"

#: Who GitHub names as the author of what a job's own token writes.
AUTHOR = "github-actions[bot]"


@command("comment")
def comment(
    report: Annotated[
        Path, typer.Argument(help="Folder of --cascade-report or `cascade gate --output`.")
    ],
    name: Annotated[
        str, typer.Option(help="Name that separates this comment from those of other gates.")
    ] = "cascade",
    gate_status: Annotated[
        int | None,
        typer.Option(min=0, help="Exit status of the gate, to say so if it wrote no report."),
    ] = None,
    author: Annotated[str, typer.Option(help="Account whose earlier comment is edited.")] = AUTHOR,
    quiet: Quiet = False,
) -> None:
    """Post the verdict of a gate as a comment in its pull request.

    For jobs of GitHub Actions. There is one comment for each name: the
    next run edits it. If it cannot be posted, one line on stderr says
    why, and the exit status is 0 nevertheless, because the job summary
    has the report.
    """
    from cascade.cli import pull_requests
    from cascade.report.gate.comment import CommentOrigin, comment_markdown, no_verdict_markdown

    if not 0 < len(name) <= 100:
        raise UsageError(f"expected --name to have 1 to 100 characters, got {len(name):,}")
    record = _record(report, gate_status)
    try:
        pull = pull_requests.pull_request(os.environ)
        origin = CommentOrigin(name, pull.commit, pull.run)
        text = (
            no_verdict_markdown(origin, gate_status or 0)
            if record is None
            else comment_markdown(record, origin)
        )
        where, existed = pull_requests.post_comment(pull, text, marker=origin.marker, author=author)
    except pull_requests.NotPostedError as error:
        echo(f"cascade: no comment in the pull request: {error}", err=True)
        return
    message(f"{'Edited' if existed else 'Posted'} the comment {where}")


def _record(report: Path, gate_status: int | None) -> SessionRecord | None:
    """Read the record of a session; None if the gate is known to have ended without one."""
    from cascade.core.records import read_typed
    from cascade.gate.records import SessionRecord

    path = report if report.suffix == ".json" else report / REPORT
    try:
        return read_typed(path, SessionRecord)
    except RecordError:
        if gate_status is None:
            raise
        return None
