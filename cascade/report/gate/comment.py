"""A session as a comment in a pull request: the verdict, then what moved, before and after."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

from cascade.core.printable import printable
from cascade.gate.records import BudgetOutcome, NamedComparison, SessionRecord
from cascade.report.common.sections import Block, Lead, Pairs, Section, plain, table_of
from cascade.report.gate.markdown import shortened, within
from cascade.report.gate.wording import (
    OVERRUN_HEADER,
    cell_header,
    cell_row,
    leftovers,
    mismatch_pairs,
    outcome,
    overrun_rows,
    overview,
    sentences,
    worst_cells,
    worst_first,
    worst_title,
)

#: GitHub accepts 65,536 characters.
_MOST_BYTES = 60_000

#: The number of shown cells of a comparison, and of shown budgets of a file.
_WORST = 5

#: What a comment calls the columns of a table of cells.
_COLUMNS = {"expected": "before", "obtained": "after"}


@dataclass(frozen=True)
class CommentOrigin:
    """Where a comment comes from.

    Attributes:
        name: What distinguishes it from the comments of other gates in the same pull request.
        commit: The commit that was measured; None if unknown.
        run: The address of the job's run, which has the summary and the report; None if unknown.
    """

    name: str
    commit: str | None = None
    run: str | None = None

    @property
    def marker(self) -> str:
        """The first line of the comment, which is not shown. By it the comment is found again."""
        # No name can end the comment of HTML: "-" is quoted too.
        return f"<!-- cascade-gate {quote(self.name, safe='').replace('-', '%2D')} -->"


def comment_markdown(record: SessionRecord, origin: CommentOrigin) -> str:
    """Return a session as the Markdown of a comment in a pull request.

    Args:
        record: A record of kind `report`.
        origin: Where the comment comes from.

    Example:
        >>> from cascade.gate.records import session_record
        >>> print(comment_markdown(session_record([]), CommentOrigin("tiny")))
        <!-- cascade-gate tiny -->
        ## CASCADE: INCONCLUSIVE
        <BLANKLINE>
        nothing was compared with a baseline
        <BLANKLINE>
    """
    head = _head(origin, record.verdict, overview(record))
    sections = map(shortened, _sections(record))
    return _quiet(within(_MOST_BYTES, head, sections, _tail(origin), level=3))


def no_verdict_markdown(origin: CommentOrigin, status: int) -> str:
    """Return the comment about a gate that wrote no report.

    Args:
        origin: Where the comment comes from.
        status: The exit status of the gate.
    """
    text = f"The gate ended with exit status {status} and wrote no report. The job's log says why."
    return _quiet(within(_MOST_BYTES, _head(origin, "NO VERDICT", text), (), _tail(origin)))


def _head(origin: CommentOrigin, verdict: str, text: str) -> str:
    return f"{origin.marker}\n## CASCADE: {verdict}\n\n{plain(text)}\n"


def _tail(origin: CommentOrigin) -> str:
    """Return the last line: what was measured, and where to read on."""
    parts = [f"Commit {plain(printable(origin.commit[:12]))}."] if origin.commit else []
    if origin.run:
        parts.append(f"The [run of the job]({origin.run}) has the summary and the whole report.")
    return f"{' '.join(parts)}\n" if parts else ""


def _quiet(text: str) -> str:
    """Return Markdown that notifies nobody: names in a record can look like mentions of users."""
    parts = re.split(r"(?<!\\)(`[^`]*`)", text)  # code, as of a command to copy, stays as it is
    parts[::2] = [part.replace("@", "@\u200b") for part in parts[::2]]
    return "".join(parts)


# --- Sections --------------------------------------------------------------------------------


def _sections(record: SessionRecord) -> Iterator[Section]:
    """Yield what did not pass: missing baselines, then the worst; then the rest."""
    others = leftovers(record)
    missing = tuple(pair for pair in others if pair[0] == "Missing")
    if missing:
        yield Section("FAIL: missing baselines", (Pairs(missing),))
    parts = worst_first([*record.comparisons, *record.budgets])
    for part in parts:
        if part.verdict != "PASS":
            blocks = _comparison(part) if isinstance(part, NamedComparison) else _budget(part)
            yield Section(f"{part.verdict}: {_subject(part)}", tuple(blocks))
    passed = [(_subject(part), outcome(part)) for part in parts if part.verdict == "PASS"]
    if passed:
        yield Section("PASS", (Pairs(tuple(passed)),))
    rest = tuple(pair for pair in others if pair not in missing)
    if rest:
        yield Section("Other baselines", (Pairs(rest),))


def _subject(part: NamedComparison | BudgetOutcome) -> str:
    return part.name if isinstance(part, NamedComparison) else f"budgets of {part.name}"


def _comparison(record: NamedComparison) -> Iterator[Block]:
    yield Lead(outcome(record))
    wanted = ("Likely cause", "To decide", "No value")
    said = [pair for pair in sentences(record) if pair[0] in wanted]
    yield Pairs((*mismatch_pairs(record), *said, ("Baseline", record.path)))
    cells = worst_cells(record)
    if cells:
        shown = cells[:_WORST]
        yield table_of(
            f"{worst_title(record, cells, len(shown))}.",
            [_COLUMNS.get(name, name) for name in cell_header(record)],
            [cell_row(record, cell) for cell in shown],
            text_columns=1,
        )


def _budget(budget: BudgetOutcome) -> Iterator[Block]:
    yield Lead(outcome(budget))
    rows = overrun_rows(budget)
    if rows:
        shown = rows[:_WORST]
        more = f" The first {len(shown)} of {len(rows):,}." if len(rows) > len(shown) else ""
        yield table_of(f"Exceeded budgets.{more}", OVERRUN_HEADER, shown, text_columns=1)
    yield Pairs((("Budget file", budget.path),))
