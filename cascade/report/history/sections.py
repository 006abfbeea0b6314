"""A history as a report in sections, for terminal and HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rich.console import Console

from cascade.core.schema import to_plain
from cascade.gate.history.records import HistoryRecord, Outcome, VersionSeries
from cascade.report.common.sections import (
    Block,
    Heading,
    Lead,
    Pairs,
    Picture,
    Provenances,
    Report,
    Section,
    Table,
    html_page,
    print_sections,
)
from cascade.report.common.words import counted
from cascade.report.history.wording import (
    DRIFT_HEADER,
    about_series,
    drift_row,
    outcome_words,
    series_notes,
    start_name,
    text_columns,
    unit_words,
    version_header,
    version_name,
    version_row,
    worst_first,
)

#: The marks of outcomes, which only set colours; the outcome is always written out too.
_MARKS: dict[Outcome, str] = {
    "slow drift": "fail",
    "drift": "fail",
    "unreadable": "fail",
    "not comparable": "open",
    "undecided": "open",
    "no drift": "pass",
    "one version": "open",
}

#: The maps of a series: what changes are from, the heading, and the words of the caption.
_MAPS: tuple[tuple[Literal["first", "before"], str, str], ...] = (
    ("first", "Since the first version", "the first version that is comparable"),
    ("before", "Step by step", "the version before"),
)

#: The number of layers that the terminal lists; the page lists all.
_WORST = 10


def history_report(record: HistoryRecord, *, drawn: bool = True) -> Report:
    """Return a history as a report: each series with its versions and the layers that moved.

    Args:
        record: A record of kind `history`.
        drawn: Whether to draw the pictures, which take a second.
    """
    sections = [
        Section(series.name, tuple(_series(series, place, drawn=drawn)))
        for place, series in enumerate(record.series, start=1)
    ]
    if record.unread:
        pairs = Pairs(tuple(("Not read", text) for text in record.unread))
        sections.append(Section("Files that cannot be read", (pairs,)))
    versions = sum(len(series.versions) for series in record.series)
    return Report(
        kicker="CASCADE history",
        title=record.path,
        about=f"{counted(versions, 'version')} of {counted(len(record.series), 'baseline')}"
        if all(series.source == "baseline" for series in record.series)
        else f"{counted(versions, 'report')}",
        sections=tuple(sections),
        provenance=None,
    )


def history_page(record: HistoryRecord) -> str:
    """Return a history as one self-contained HTML page, which loads nothing and runs no script.

    Args:
        record: A record of kind `history`.
    """
    return html_page(history_report(record))


def print_history(record: HistoryRecord, console: Console) -> None:
    """Print a history.

    Args:
        record: A record of kind `history`.
        console: Where to print; its width and encoding are respected.
    """
    print_sections(history_report(record, drawn=False), console)


def _series(series: VersionSeries, place: int, *, drawn: bool) -> Iterator[Block]:
    yield Lead(outcome_words(series), _MARKS[series.outcome], series.outcome.upper())
    yield Pairs((("Read", about_series(series)), *series_notes(series)))
    if drawn:
        yield from _pictures(series, place)
    yield from _versions(series)
    yield from _layers(series)
    if drawn:
        yield from _provenances(series)


def _pictures(series: VersionSeries, place: int) -> Iterator[Block]:
    # Imported here, because matplotlib is slow to import and the terminal needs no picture.
    from cascade.report.history.figures import cumulative_svg, history_map_svg

    chart = cumulative_svg(series, f"history-{place}")
    if chart is not None:
        yield Heading("The layers that moved most")
        yield Picture(
            f"history-{place}.svg",
            chart,
            f"Change of the mean similarity since {start_name(series)}. The band is what the gate "
            "accepts in one comparison.",
        )
    slow = " An arrow marks slow drift." if any(drift.slow for drift in series.drifts) else ""
    for against, heading, caption in _MAPS:
        drawing = history_map_svg(series, against, f"map-{place}-{against}")
        if drawing is not None:
            yield Heading(heading)
            yield Picture(
                f"map-{place}-{against}.svg",
                drawing,
                f"Rows are layers, columns are versions, the oldest first. Colours show the "
                f"change of the mean from {caption}. A cell beyond its limit has a frame and a "
                f"sign. Hatched versions are not compared.{slow}",
            )


def _versions(series: VersionSeries) -> Iterator[Block]:
    caption = (
        "step: the layer that moved most since the version before; in all: since the first "
        "comparable version, in which layer."
    )
    for medium in ("terminal", "page"):
        yield Table(
            caption,
            version_header(series),
            tuple(
                version_row(series, number, short=medium == "terminal")
                for number in range(len(series.versions))
            ),
            text_columns(series),
            medium=medium,
        )


def _layers(series: VersionSeries) -> Iterator[Block]:
    if series.last is None or not series.drifts:
        return
    last = series.versions[series.last]
    worst = worst_first(series.drifts)
    slow = tuple(drift.layer for drift in series.drifts if drift.slow)
    span = f"from {start_name(series)} to {version_name(last)}"
    if last.first is not None:
        yield unit_words(last.first)
    if worst:
        shown = worst[:_WORST]
        few = f"; showing the worst {len(shown):,}" if len(shown) < len(worst) else ""
        yield Table(
            f"{counted(len(worst), 'layer')} beyond the limit {span}{few}.",
            DRIFT_HEADER,
            tuple(map(drift_row, shown)),
            1,
            active=slow,
            medium="terminal",
        )
    yield Table(
        f"Every layer, {span}.",
        DRIFT_HEADER,
        tuple(map(drift_row, series.drifts)),
        1,
        active=slow,
        medium="page",
    )


def _provenances(series: VersionSeries) -> Iterator[Block]:
    """Yield the provenance of the last version next to that of the first comparable one."""
    if series.last is None:
        return
    new = series.versions[series.last].provenance
    old = series.versions[series.last].baseline
    if series.first is not None:
        old = series.versions[series.first].provenance
    if new is not None and old is not None:
        yield Provenances(to_plain(new), to_plain(old))
