"""Comparisons and sessions as reports in sections, for terminal, Markdown and HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cascade.core.schema import to_plain
from cascade.gate.records import (
    BudgetOutcome,
    CellRow,
    ComparisonRecord,
    NamedComparison,
    SessionRecord,
)
from cascade.report.common.sections import (
    Block,
    Heading,
    Lead,
    Pairs,
    Picture,
    Provenances,
    Report,
    Section,
    table_of,
)
from cascade.report.gate.wording import (
    DECODING_HEADER,
    LONG_CONTEXT_HEADER,
    OVERRUN_HEADER,
    cell_header,
    cell_row,
    decoding_rows,
    glossary,
    has_intervals,
    leftovers,
    long_context_rows,
    mismatch_pairs,
    missing_values,
    outcome,
    overrun_commands,
    overrun_rows,
    overview,
    provenance_pairs,
    remote_pairs,
    sentences,
    worst_cells,
    worst_first,
    worst_title,
)

#: The marks of verdicts, which only set colours; the verdict is always written out too.
MARKS = {"PASS": "pass", "FAIL": "fail", "NOT COMPARABLE": "fail", "INCONCLUSIVE": "open"}

#: The number of worst cells shown for one comparison, and for each comparison of a summary.
_WORST, _SUMMARY_WORST = 10, 3


def comparison_report(record: ComparisonRecord) -> Report:
    """Return a comparison as a report: verdict, likely cause, worst cells and provenance.

    Args:
        record: A record of kind `comparison`.
    """
    cells = worst_cells(record)
    about = [*sentences(record), *provenance_pairs(record)]
    blocks = [*_pairs(mismatch_pairs(record)), *_pairs(about), *_passes(record)]
    blocks += _worst(record, cells, _WORST)
    return Report(
        kicker="CASCADE comparison",
        title=record.verdict,
        about=record.headline,
        sections=(Section("", tuple(blocks)),),
        provenance=None,
        mark=MARKS[record.verdict],
    )


def session_summary(record: SessionRecord) -> Report:
    """Return the summary of a session: every comparison, budget file and missing baseline.

    Args:
        record: A record of kind `report`.
    """
    sections = [_short_comparison(comparison) for comparison in record.comparisons]
    sections += [_short_budget(budget) for budget in record.budgets]
    sections.append(Section("", tuple(_pairs(leftovers(record)))))
    return _session(record, sections)


def session_report(record: SessionRecord, *, worst: int, drawn: bool) -> Report:
    """Return the full report of a session, the worst verdict first.

    Args:
        record: A record of kind `report`.
        worst: The number of worst cells to list for each comparison.
        drawn: Whether to draw the map of all cells and the profiles, and to show both provenances.
    """
    parts = worst_first([*record.comparisons, *record.budgets])
    sections = []
    if len(parts) > 1:
        rows = [[part.verdict, _subject(part), outcome(part)] for part in parts]
        header = ("verdict", "baseline", "outcome")
        sections.append(
            Section("", (table_of("Worst verdict first.", header, rows, text_columns=3),))
        )
    sections.append(
        Section("Missing, regenerated and unused baselines", tuple(_pairs(leftovers(record))))
    )
    number = 0
    for part in parts:
        if isinstance(part, NamedComparison):
            number += 1
            blocks = _comparison(part, worst, number if drawn else None)
        else:
            blocks = _budget(part)
        sections.append(Section(f"{part.verdict}: {_subject(part)}", tuple(blocks)))
    return _session(record, sections)


def _subject(part: NamedComparison | BudgetOutcome) -> str:
    """Return the name of a comparison or of a budget file."""
    return part.name if isinstance(part, NamedComparison) else f"budgets of {part.name}"


def _session(record: SessionRecord, sections: Sequence[Section]) -> Report:
    return Report(
        kicker="CASCADE gate",
        title=record.verdict,
        about=overview(record),
        sections=tuple(sections),
        provenance=None,
        mark=MARKS[record.verdict],
    )


# --- Summary ---------------------------------------------------------------------------------


def _short_comparison(record: NamedComparison) -> Section:
    where = [("Baseline", record.path)] if record.verdict != "PASS" else []
    text = f"{record.name}: {record.headline}"
    blocks: list[Block] = [Lead(text, MARKS[record.verdict], record.verdict)]
    blocks += _pairs([*mismatch_pairs(record), *sentences(record), *where])
    cells = worst_cells(record)
    if cells:
        blocks.append(_worst_table(record, cells, _SUMMARY_WORST))
    return Section("", tuple(blocks))


def _short_budget(budget: BudgetOutcome) -> Section:
    text = f"{budget.name}: {outcome(budget)}"
    blocks: list[Block] = [Lead(text, MARKS[budget.verdict], budget.verdict)]
    return Section("", (*blocks, *_overruns(budget), *_pairs(_commands(budget))))


# --- Full report -----------------------------------------------------------------------------


def _comparison(record: NamedComparison, worst: int, number: int | None) -> Iterator[Block]:
    # The heading names the verdict.
    yield Lead(record.headline, MARKS[record.verdict])
    yield from _pairs(
        [
            *mismatch_pairs(record),
            *sentences(record),
            *provenance_pairs(record),
            ("Baseline file", record.path),
            *remote_pairs(record),
        ]
    )
    yield from _passes(record)
    cells = worst_cells(record)
    if number is None:
        yield from _worst(record, cells, worst)
        return
    yield from comparison_pictures(record, str(number))
    if cells:
        yield Heading("Worst cells")
        yield from _worst(record, cells, worst)
    if record.provenance and record.baseline:
        yield Provenances(to_plain(record.provenance), to_plain(record.baseline))


def comparison_pictures(record: ComparisonRecord, number: str) -> Iterator[Block]:
    """Yield the map of all cells and the profiles, each below its heading.

    Args:
        record: A record of kind `comparison`.
        number: What distinguishes the pictures' names from those of other comparisons.
    """
    # Imported here, because matplotlib is slow to import and the terminal needs no picture.
    from cascade.report.gate.figures import drift_map_svg, profiles_svg

    if record.cells:
        yield Heading("Every layer and statistic")
        drawing = drift_map_svg(record, f"map-{number}")
        yield Picture(f"map-{number}.svg", drawing, _map_caption(record))
    if record.profile:
        yield Heading("Profiles")
        drawing = profiles_svg(record, f"profiles-{number}")
        yield Picture(f"profiles-{number}.svg", drawing, _profile_caption(record))


def _budget(budget: BudgetOutcome) -> Iterator[Block]:
    yield Lead(outcome(budget), MARKS[budget.verdict])
    yield from _overruns(budget)
    yield from _pairs([*_commands(budget), ("Budget file", budget.path), *remote_pairs(budget)])


def _overruns(budget: BudgetOutcome) -> Iterator[Block]:
    rows = overrun_rows(budget)
    if rows:
        yield table_of("Exceeded budgets.", OVERRUN_HEADER, rows, text_columns=1)


def _commands(budget: BudgetOutcome) -> list[tuple[str, str]]:
    return [("To inspect", f"`{command}`") for command in overrun_commands(budget)]


def _pairs(pairs: Sequence[tuple[str, str]]) -> Iterator[Block]:
    if pairs:
        yield Pairs(tuple(pairs))


def _passes(record: ComparisonRecord) -> Iterator[Block]:
    """Yield the table of position ranges or of passes through the KV cache that failed."""
    ranges = long_context_rows(record)
    if ranges:
        title = "Long sequences compared with the baseline, by ranges of positions."
        yield table_of(title, LONG_CONTEXT_HEADER, ranges, text_columns=1)
    rows = decoding_rows(record)
    if rows:
        title = "Decoding compared with the prefill."
        yield table_of(title, DECODING_HEADER, rows, text_columns=1)


def _worst(record: ComparisonRecord, cells: Sequence[CellRow], most: int) -> Iterator[Block]:
    if not cells:
        return
    yield _worst_table(record, cells, most)
    meaning = glossary(record, cells[:most])
    if meaning:
        yield f"{meaning}."


def _worst_table(record: ComparisonRecord, cells: Sequence[CellRow], most: int) -> Block:
    shown = cells[:most]
    return table_of(
        f"{worst_title(record, cells, len(shown))}.",
        cell_header(record),
        [cell_row(record, cell) for cell in shown],
        text_columns=1,
        active=_layers(record),
    )


def _layers(record: ComparisonRecord) -> list[str]:
    """Return the layer that is the likely cause, if there is one."""
    found = record.attribution
    return [] if found is None or found.layer is None else [found.layer]


def _map_caption(record: ComparisonRecord) -> str:
    kind = "margin" if has_intervals(record) else "tolerance"
    texts = [
        "Rows are layers, columns are statistics. Orange cells lie above the baseline, blue cells "
        "below it; a deeper colour means a larger difference. The colour deepens abruptly at the "
        f"{kind}, and a cell beyond it has a frame and a sign."
    ]
    if any(cell.verdict == "INCONCLUSIVE" for cell in record.cells):
        texts.append("A dashed frame marks an undecided cell.")
    if missing_values(record):
        texts.append(f"Hatched cells have no value on one side: {missing_values(record)}.")
    texts += [f"The arrow marks layer {layer}, the likely cause." for layer in _layers(record)]
    return " ".join(texts)


def _profile_caption(record: ComparisonRecord) -> str:
    what = (
        "the difference of the means with its interval, and the margin"
        if has_intervals(record)
        else "the largest difference of any sequence, and the tolerance, beyond which the axis is "
        "logarithmic"
    )
    return (
        f"Top: the mean similarity of each layer over the {record.tokens:,} compared tokens, with "
        f"the new profile drawn over the baseline's. Bottom: {what}."
    )
