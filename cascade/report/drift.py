"""Comparisons in words: verdict first, then where the evidence points and the worst cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from cascade.report.reading import Record, check_record
from cascade.report.terminal import print_heading, print_lines, print_pairs, print_table, printable

_SECTIONS = ("verdict", "headline", "way", "mismatches", "attribution", "notes", "cells")
_REPORT_SECTIONS = ("verdict", "comparisons", "budgets", "missing", "regenerated", "unused")

#: How many of the worst cells are shown.
_WORST = 10
#: What GitHub takes for a job summary is 1 MiB; a person reads less.
_MOST_BYTES = 90_000

_STYLES = {
    "PASS": "green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "yellow",
    "NOT COMPARABLE": "bold red",
}

#: What the cause of an attribution means.
CAUSES = {
    "rows": "rows are missing",
    "capture": "the right numbers in the wrong place",
    "counting": "the way tokens are counted",
    "layer": "one layer",
    "numerics": "rounding",
    "model": "the whole model, or its input",
}

#: What a statistic of a cell is.
STATISTICS = {
    "mean": "mean similarity",
    "mean_square": "mean square of the similarity",
    "share_p10": "share of tokens at or below the baseline's p10",
    "share_p50": "share of tokens at or below the baseline's p50",
    "share_p90": "share of tokens at or below the baseline's p90",
}


# --- What a comparison says ------------------------------------------------------------------


def worst_cells(record: Record) -> list[Record]:
    """Return the cells that did not pass, failures first, the farthest beyond its limit first."""
    order = {"FAIL": 0, "INCONCLUSIVE": 1}

    def badness(cell: Record) -> tuple[int, float]:
        size = cell["standardized"]
        return order[cell["verdict"]], -abs(size) if size is not None else float("-inf")

    return sorted((cell for cell in record["cells"] if cell["verdict"] in order), key=badness)


def cell_rows(cells: Sequence[Record]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return a header and one row of text per cell."""
    limit = "margin" if any(cell["interval"] for cell in cells) else "tolerance"
    header = ("layer", "expected", "obtained", "difference", limit, "statistic", "verdict")
    return header, [
        [
            cell["layer"],
            number(cell["expected"]),
            number(cell["obtained"]),
            _difference(cell),
            small(cell["limit"]),
            cell["statistic"],
            _cell_verdict(cell),
        ]
        for cell in cells
    ]


def number(value: float | None) -> str:
    """Format a statistic; "none" where there is no number."""
    return "none" if value is None else f"{value:.6f}"


def small(value: float) -> str:
    """Format a limit."""
    return "0" if not value else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4f}"


def _difference(cell: Record) -> str:
    if cell["difference"] is None:
        return "none"
    if cell["interval"] is not None:
        return "{:+.4f} to {:+.4f}".format(*cell["interval"])
    size = cell["difference"]
    return f"{size:+.1e}" if abs(size) < 1e-3 else f"{size:+.6f}"


def _cell_verdict(cell: Record) -> str:
    if cell["verdict"] != "INCONCLUSIVE":
        return str(cell["verdict"]).lower()
    return "undecided"


def sentences(record: Record) -> Iterator[tuple[str, str]]:
    """Yield what a reader has to know besides the verdict, as (label, text)."""
    found = record["attribution"]
    if found is not None:
        yield "Points to", f"{CAUSES[found['cause']]}: {found['text']}"
    looks = record.get("gate", {}).get("looks")
    if looks:
        tokens, most = looks[-1]["tokens"], record["gate"]["budget_tokens"]
        yield "Decided", f"after {tokens:,} of at most {most:,} tokens"
    undecided = [cell for cell in record["cells"] if cell["verdict"] == "INCONCLUSIVE"]
    if undecided:
        needed = [cell["needed"] for cell in undecided]
        if None in needed:
            yield "Would decide", "no number of new sequences: the baseline itself has too few"
        else:
            yield "Would decide", f"{max(needed):,} new sequences"
    for note in record["notes"]:
        yield "Note", note
    for label, about in (("Measured", record["provenance"]), ("Baseline", record["baseline"])):
        if about:
            yield label, _source(about)


def _source(about: Mapping[str, object]) -> str:
    model, corpus, machine = (
        part if isinstance(part := about.get(name), Mapping) else {}
        for name in ("model", "corpus", "machine")
    )
    return (
        f"{model.get('name')} ({model.get('dtype')} on {model.get('device')}), corpus "
        f"{corpus.get('name')}, {machine.get('processor')}"
    )


def mismatch_pairs(record: Record) -> list[tuple[str, str]]:
    """Return what makes two profiles not comparable, as (name, text)."""
    return [
        (
            mismatch["name"],
            f"expected {mismatch['expected']}, got {mismatch['obtained']}; {mismatch['remedy']}",
        )
        for mismatch in record["mismatches"]
    ]


# --- The terminal ----------------------------------------------------------------------------


def print_comparison(record: Record, console: Console) -> None:
    """Print a comparison: verdict, where the evidence points, the worst cells, notes.

    Args:
        record: A saved record of kind `comparison`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema, lacks a section, or holds NaN.
    """
    check_record(record, "comparison", _SECTIONS)
    _print_verdict(record["verdict"], record["headline"], console)
    _print_rest(record, console)


def print_report(record: Record, console: Console) -> None:
    """Print a session: every comparison and budget, what is missing, and what nobody used.

    Args:
        record: A saved record of kind `report`.
        console: Where to print.

    Raises:
        ValueError: The record is of another kind or schema, lacks a section, or holds NaN.
    """
    check_record(record, "report", _REPORT_SECTIONS)
    for comparison in record["comparisons"]:
        _print_verdict(
            comparison["verdict"], f"{comparison['name']}: {comparison['headline']}", console
        )
        if comparison["verdict"] != "PASS":
            _print_rest(comparison, console)
            console.print()
    for budget in record["budgets"]:
        _print_verdict(budget["verdict"], _budget_line(budget), console)
        print_pairs([(" ", text) for text in _overruns(budget)], console)
    print_pairs(list(_leftovers(record)), console)


def _print_verdict(verdict: str, text: str, console: Console) -> None:
    line = Text.assemble((verdict, _STYLES[verdict]), f": {printable(text, console)}")
    print_lines(line, console, console.width)


def _print_rest(record: Record, console: Console) -> None:
    cells = worst_cells(record)
    pairs = [*mismatch_pairs(record), *sentences(record)]
    if pairs:
        console.print()
        print_pairs(pairs, console)
    if cells:
        print_heading(_worst_title(cells), console)
        header, rows = cell_rows(cells[:_WORST])
        print_table(header, rows, console, gap=1, text_columns=2)


def _worst_title(cells: Sequence[Record]) -> str:
    if len(cells) <= _WORST:
        return f"Cells beyond their limits: {len(cells):,}"
    return f"The worst {_WORST} of {len(cells):,} cells beyond their limits"


def _budget_line(budget: Record) -> str:
    if budget["reason"]:
        return f"{budget['name']}: {budget['reason']}"
    if budget["overruns"]:
        count = len(budget["overruns"])
        return f"{budget['name']}: {count:,} budget{'s' * (count > 1)} of early exit not kept"
    return f"{budget['name']}: all budgets of {budget['points']:,} points of early exit kept"


def _overruns(budget: Record) -> list[str]:
    return [
        f"{o['point']}: {o['figure']} budget {o['limit']}, measured {o['measured']}; look closer "
        f"with `{o['command']}`"
        for o in budget["overruns"]
    ]


def _leftovers(record: Record) -> Iterator[tuple[str, str]]:
    for missing in record["missing"]:
        yield "Missing", f"{missing['path']}; make it with `{missing['command']}`"
    for path in record["regenerated"]:
        yield "Regenerated", f"{path}; review and commit it"
    for path in record["unused"]:
        yield "Not used", f"{path}: no test of this session compared with it"


# --- Markdown --------------------------------------------------------------------------------


def report_markdown(record: Record) -> str:
    """Return a session as Markdown for a job summary: verdict first, below 100 kB.

    Args:
        record: A saved record of kind `report`.

    Raises:
        ValueError: The record is of another kind or schema, lacks a section, or holds NaN.
    """
    check_record(record, "report", _REPORT_SECTIONS)
    blocks = [f"# CASCADE: {record['verdict']}\n"]
    blocks += [_comparison_block(comparison) for comparison in record["comparisons"]]
    blocks += [
        "\n".join([f"## {b['verdict']}: {_escaped(_budget_line(b))}", "", *_items(_overruns(b))])
        for b in record["budgets"]
    ]
    blocks.append("\n".join(_items(f"{name}: {text}" for name, text in _leftovers(record))))
    return _within(blocks)


def _within(blocks: Sequence[str]) -> str:
    """Join blocks while they fit; say how many did not."""
    kept, size = [], 0
    for index, block in enumerate(blocks):
        size += len(block.encode()) + 2
        if size > _MOST_BYTES:
            kept.append(f"... and {len(blocks) - index} more sections, see report.html")
            break
        kept.append(block)
    return "\n\n".join(block for block in kept if block) + "\n"


def _comparison_block(record: Record) -> str:
    lines = [
        f"## {record['verdict']}: {_escaped(record['name'])}",
        "",
        _escaped(record["headline"]),
    ]
    pairs = [*mismatch_pairs(record), *sentences(record)]
    lines += ["", *_items(f"**{name}**: {text[:2000]}" for name, text in pairs)]
    cells = worst_cells(record)
    if cells:
        header, rows = cell_rows(cells[:_WORST])
        lines += ["", f"{_worst_title(cells)}:", "", _row(header), _row(["---"] * len(header))]
        lines += [_row(row) for row in rows]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _items(texts: Iterator[str] | Sequence[str]) -> list[str]:
    return [f"- {_escaped(text)}" for text in texts]


def _escaped(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
