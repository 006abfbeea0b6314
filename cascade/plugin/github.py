"""What a session prints for GitHub Actions: annotations at the baselines' files."""

from __future__ import annotations

import os
from pathlib import Path

from cascade.gate.records import SessionRecord


def annotation_lines(record: SessionRecord, *, strict: bool) -> list[str]:
    """Return the lines that make GitHub annotate what did not pass; none outside of GitHub Actions.

    Args:
        record: The session's record.
        strict: Whether an inconclusive result fails.
    """
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return []
    from cascade.report.gate.annotations import annotation_commands, session_paths

    places = {path: in_repository(Path(path)) for path in session_paths(record)}
    files = {path: place for path, place in places.items() if place is not None}
    return annotation_commands(record, files, strict=strict)


def in_repository(path: Path) -> str | None:
    """Return a path relative to the top of its repository, as GitHub names files.

    Args:
        path: A file, which need not exist.

    Returns:
        The path, with slashes; None for a file that is in no repository, such as a baseline that
        ships with the package.
    """
    place = Path(os.path.abspath(path))
    # A job can check out a repository into any folder of its workspace.
    tops = [folder for folder in place.parents if os.path.lexists(folder / ".git")]
    workspace = os.environ.get("GITHUB_WORKSPACE")
    if not tops and workspace and place.is_relative_to(workspace):
        tops = [Path(workspace)]
    return place.relative_to(tops[0]).as_posix() if tops else None
