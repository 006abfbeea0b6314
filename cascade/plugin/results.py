"""The findings of a session's tests, collected from all processes, and their reports."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from cascade.core.errors import os_reason
from cascade.core.printable import printable
from cascade.core.schema import from_plain, to_plain
from cascade.gate.records import (
    BudgetOutcome,
    MissingBaseline,
    NamedComparison,
    SessionRecord,
    session_record,
)
from cascade.plugin.settings import Settings, shown

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

#: The files of `--cascade-report`.
REPORT_FILES = ("report.json", "report.md", "report.html")


@dataclass
class Findings:
    """The outcomes of all checks, and the tests that were selected and run.

    Attributes:
        comparisons: Comparisons with baselines.
        budgets: Outcomes of budget files.
        missing: Baselines that do not exist.
        regenerated: Paths of regenerated baselines.
        used: Marker -> paths of the baselines that a check used.
        selected: Marker -> ids of the selected tests with this marker.
        ran: Marker -> ids of the tests that were run.
        deselected: The markers of deselected tests.
        notes: Lines for the summary about what was not checked.
    """

    comparisons: list[NamedComparison] = field(default_factory=list)
    budgets: list[BudgetOutcome] = field(default_factory=list)
    missing: list[MissingBaseline] = field(default_factory=list)
    regenerated: list[str] = field(default_factory=list)
    used: dict[str, list[str]] = field(default_factory=dict)
    selected: dict[str, list[str]] = field(default_factory=dict)
    ran: dict[str, list[str]] = field(default_factory=dict)
    deselected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def dump(self) -> str:
        """Return all findings as text, for a worker to send."""
        return json.dumps(to_plain(self), allow_nan=False)

    def absorb(self, text: str) -> None:
        """Add the findings of another process; duplicates count once."""
        other = from_plain(json.loads(text), Findings)
        _extend(self.comparisons, other.comparisons)
        _extend(self.budgets, other.budgets)
        _extend(self.missing, other.missing)
        _extend(self.regenerated, other.regenerated)
        _extend(self.deselected, other.deselected)
        _extend(self.notes, other.notes)
        for mine, theirs in (
            (self.used, other.used),
            (self.selected, other.selected),
            (self.ran, other.ran),
        ):
            for marker, values in theirs.items():
                _extend(mine.setdefault(marker, []), values)

    def note_deselected(self, marker: str) -> None:
        """Record that a test with this marker was deselected."""
        _extend(self.deselected, [marker])

    def note_used(self, marker: str, path: str) -> None:
        """Record that a check used a baseline."""
        _extend(self.used.setdefault(marker, []), [path])

    def note_selected(self, marker: str, test: str) -> None:
        """Record that a test with this marker was selected."""
        _extend(self.selected.setdefault(marker, []), [test])

    def note_ran(self, marker: str, test: str) -> None:
        """Record that a test with this marker was run."""
        _extend(self.ran.setdefault(marker, []), [test])

    def record(self, unused: Iterable[str] = ()) -> SessionRecord | None:
        """Return the session's record; None if no test compared anything with a baseline."""
        if not any((self.comparisons, self.budgets, self.missing, self.regenerated)):
            return None
        missing = {entry.path: entry for entry in self.missing}
        return session_record(
            # Two tests can compare with the same baseline; equal outcomes count once.
            _distinct(self.comparisons, lambda part: (part.path, part.headline, part.verdict)),
            _distinct(self.budgets, lambda part: (part.path, part.verdict, *part.overruns)),
            [entry for path, entry in missing.items() if path not in self.regenerated],
            dict.fromkeys(self.regenerated),
            unused,
        )

    def unused(self, folder: Path) -> list[str]:
        """Return the baselines that no test used.

        Only kinds whose tests were all run are listed, because a test that did not run might have
        used the others.

        Args:
            folder: The folder of all baselines.
        """
        found = []
        for marker, used in self.used.items():
            selected = set(self.selected.get(marker, ()))
            if marker in self.deselected or not selected <= set(self.ran.get(marker, ())):
                continue
            try:
                present = sorted(folder.glob(f"*/*.{marker}.json"))
            except OSError as error:
                note = f"Cannot list {error.filename}: {os_reason(error)}"
                self.notes += [note] if note not in self.notes else []
                continue
            found += [shown(path) for path in present if shown(path) not in used]
        return found


def _extend(items: list[T], more: Iterable[T]) -> None:
    items += [item for item in more if item not in items]


def _distinct(parts: Iterable[T], key: Callable[[T], Hashable]) -> list[T]:
    """Return the first part of each key."""
    found: dict[Hashable, T] = {}
    for part in parts:
        found.setdefault(key(part), part)
    return list(found.values())


# --- Reports ---------------------------------------------------------------------------------


def drawn(
    show: Callable[[T, Console], None],
    record: T,
    *,
    width: int = 100,
    colour: bool = False,
) -> str:
    """Return the text that the terminal shows for a record.

    Args:
        show: The function that prints the record.
        record: The record.
        width: The width in columns.
        colour: Whether the terminal supports colours.
    """
    from rich.console import Console

    text = io.StringIO()
    console = Console(
        file=text,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        legacy_windows=False,
    )
    show(record, console)
    return text.getvalue().rstrip()


def write_reports(settings: Settings, record: SessionRecord) -> list[str]:
    """Write the report folder and the job summary, if they are configured.

    Args:
        settings: The settings of the session.
        record: The session's record.

    Returns:
        The paths of the written files.

    Raises:
        OutputError: A file cannot be written.
    """
    written = []
    if settings.report is not None:
        from cascade.core.records import to_file
        from cascade.core.run_folder import RunFolder
        from cascade.report.gate.markdown import report_markdown
        from cascade.report.gate.page import report_page

        contents = (to_file(record), report_markdown(record), report_page(record))
        with RunFolder(settings.report, REPORT_FILES, overwrite=True, wait=60) as folder:
            for name, content in zip(REPORT_FILES, contents, strict=True):
                folder.write(name, content)
        written.append(shown(settings.report / "report.html"))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        from cascade.report.gate.markdown import report_markdown

        _append(Path(summary), report_markdown(record) + "\n")
        written.append(shown(Path(summary)))
    return written


def _append(path: Path, text: str) -> None:
    from cascade.core.errors import OutputError, os_reason

    try:
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(
            f"cannot write {path} (from GITHUB_STEP_SUMMARY): {os_reason(error)}"
        ) from error


def show_summary(
    terminal: pytest.TerminalReporter, record: SessionRecord | None, lines: Iterable[str]
) -> None:
    """Print the last section: the record, if any, and the paths of the written reports."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    terminal.write_sep("=", "cascade")
    text = ""
    if record is not None:
        from cascade.report.gate.terminal import print_report

        text = drawn(print_report, record, width=width, colour=terminal.hasmarkup)
    for line in [*text.splitlines(), *map(printable, lines)]:
        terminal.write_line(line)
