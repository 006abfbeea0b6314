"""What the tests of a session found, gathered over processes, and the reports drawn from it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cascade.gate.session import Record, session_record
from cascade.plugin.settings import Settings, shown

if TYPE_CHECKING:
    from rich.console import Console

#: The files of `--cascade-report`.
REPORT_FILES = ("report.json", "report.md", "report.html")


@dataclass
class Findings:
    """What was held to which baseline, and which tests there were to do so.

    Attributes:
        comparisons: Records of comparisons, with `name` and `path`.
        budgets: What came of budgets, with `name` and `path`.
        missing: `path` and `command` of baselines that are not there.
        regenerated: Paths of baselines that were made anew.
        used: Marker -> paths of the baselines that a check asked for.
        selected: Marker -> ids of the tests that carry it.
        ran: Marker -> ids of those that were run.
        left_out: Markers of tests that were deselected.
    """

    comparisons: list[Record] = field(default_factory=list)
    budgets: list[Record] = field(default_factory=list)
    missing: list[Record] = field(default_factory=list)
    regenerated: list[str] = field(default_factory=list)
    used: dict[str, list[str]] = field(default_factory=dict)
    selected: dict[str, list[str]] = field(default_factory=dict)
    ran: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def dump(self) -> str:
        """Return everything as text, which is what workers can send."""
        return json.dumps(asdict(self))

    def absorb(self, text: str) -> None:
        """Add what another process found; what both found counts once."""
        for name, value in json.loads(text).items():
            mine = getattr(self, name)
            if isinstance(mine, dict):
                for key, items in value.items():
                    _extend(mine.setdefault(key, []), items)
            else:
                _extend(mine, value)

    def leave_out(self, marker: str) -> None:
        """Remember that a test of this marker was deselected."""
        _extend(self.left_out, [marker])

    def note(self, kind: str, marker: str, value: str) -> None:
        """Add one value to `used`, `selected` or `ran`."""
        _extend(getattr(self, kind).setdefault(marker, []), [value])

    def record(self, unused: Iterable[str] = ()) -> Record | None:
        """Return the session's record; None where no test held anything to a baseline."""
        if not any((self.comparisons, self.budgets, self.missing, self.regenerated)):
            return None
        missing = {entry["path"]: entry for entry in self.missing}
        return session_record(
            _distinct(self.comparisons),
            _distinct(self.budgets),
            [entry for path, entry in missing.items() if path not in self.regenerated],
            dict.fromkeys(self.regenerated),
            unused,
        )

    def unused(self, folder: Path) -> list[str]:
        """Return the baselines that no test asked for.

        Only of kinds whose tests were all run: what was left out might have used them.

        Args:
            folder: The folder of all baselines.
        """
        found = []
        for marker, used in self.used.items():
            selected = set(self.selected.get(marker, ()))
            if marker in self.left_out or not selected <= set(self.ran.get(marker, ())):
                continue
            present = sorted(folder.glob(f"*/*.{marker}.json"))
            found += [shown(path) for path in present if shown(path) not in used]
        return found


def _extend(items: list[Any], more: Iterable[Any]) -> None:
    items += [item for item in more if item not in items]


def _distinct(parts: list[Record]) -> list[Record]:
    """Return one of those that say the same of the same baseline: two tests can ask for one."""
    found: dict[Any, Record] = {}
    for part in parts:
        key = part["path"], part.get("headline"), part["verdict"], json.dumps(part.get("overruns"))
        found.setdefault(key, part)
    return list(found.values())


# --- Reports ---------------------------------------------------------------------------------


def drawn(
    show: Callable[[Record, Console], None],
    record: Record,
    *,
    width: int = 100,
    colour: bool = False,
) -> str:
    """Return a record as the terminal shows it.

    Args:
        show: One of the report's functions.
        record: What it draws.
        width: Columns.
        colour: Whether the terminal shows colours.
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


def write_reports(settings: Settings, record: Record) -> list[str]:
    """Write the report folder and the job's summary, where they are wanted.

    Args:
        settings: Of the session.
        record: Of kind `report`.

    Returns:
        What was written, and where.

    Raises:
        OutputError: A file cannot be written.
    """
    written = []
    if settings.report is not None:
        from cascade.core.files import RunFolder
        from cascade.core.records import to_json
        from cascade.report.gate.markdown import report_markdown
        from cascade.report.gate.page import report_page

        contents = (to_json(record) + "\n", report_markdown(record), report_page(record))
        with RunFolder(settings.report, REPORT_FILES, overwrite=True) as folder:
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
            f"cannot write {path}, which GITHUB_STEP_SUMMARY names: {os_reason(error)}"
        ) from error


def show_summary(
    terminal: pytest.TerminalReporter, record: Record | None, lines: Iterable[str]
) -> None:
    """Print the last section: the record, if there is one, and where its reports lie."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    terminal.write_sep("=", "cascade")
    text = ""
    if record is not None:
        from cascade.report.gate.terminal import print_report

        text = drawn(print_report, record, width=width, colour=terminal.hasmarkup)
    for line in [*text.splitlines(), *lines]:
        terminal.write_line(line)
