"""The words and numbers of a comparison and a session: for terminal, Markdown and page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cascade.core.provenance import Provenance
from cascade.core.schema import UNSET, known, to_plain
from cascade.gate.records import (
    VERDICTS,
    BudgetOutcome,
    CellRow,
    ComparisonRecord,
    NamedComparison,
    SessionRecord,
)

#: The causes of an attribution, in words.
_CAUSES = {
    "rows": "rows are missing",
    "capture": "the right numbers in the wrong place",
    "counting": "the way tokens are counted",
    "layer": "one layer",
    "numerics": "arithmetic",
    "model": "the whole model, or its input",
}

#: On the same sequences these are compared per sequence, in addition to the table.
_PER_SEQUENCE = ("mean", "mean_square")
_WHOLE, _SHARE = "table ", "share_"
_MEANINGS = {
    "mean": "mean similarity",
    "mean_square": "mean square of the similarity",
    "share_p10": "share of tokens at or below the baseline's p10",
    "share_p50": "share of tokens at or below the baseline's p50",
    "share_p90": "share of tokens at or below the baseline's p90",
    "count": "tokens",
    "std": "standard deviation of the similarity",
    "min": "smallest similarity",
    "p10": "10 % quantile of the similarity",
    "p50": "median similarity",
    "p90": "90 % quantile of the similarity",
    "max": "largest similarity",
    "frac_negative": "share of tokens below 0",
    "frac_below_half": "share of tokens below 0.5",
}

#: Entries of a provenance that cause no drift by themselves.
_IRRELEVANT = ("command", "created", "source")
#: How many layers without a number are named.
_MOST_HOLES = 5
#: How many differences between two provenances are shown.
_MOST_DIFFERENCES = 5
#: How much of a hash is shown where there is little room; two that differ are told apart by it.
_DIGEST = 12


# --- A session -------------------------------------------------------------------------------


def overview(record: SessionRecord) -> str:
    """Return in one line how many parts a session has, and with which verdicts."""
    rest = (
        (record.missing, "baseline missing", "baselines missing"),
        (record.regenerated, "baseline made anew", "baselines made anew"),
        (record.unused, "baseline not used", "baselines not used"),
    )
    parts = [
        _counted([part.verdict for part in record.comparisons], "compared", "compared"),
        _counted([part.verdict for part in record.budgets], "budget file", "budget files"),
        *(
            f"{len(found):,} {one if len(found) == 1 else many}"
            for found, one, many in rest
            if found
        ),
    ]
    return "; ".join(part for part in parts if part) or "nothing was held to a baseline"


def _counted(verdicts: Sequence[str], one: str, many: str) -> str:
    if not verdicts:
        return ""
    if len(verdicts) == 1:
        return f"1 {one}"
    counts = Counter(verdicts)
    if len(counts) == 1:
        return f"{len(verdicts):,} {many}, all {verdicts[0]}"
    listed = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"{len(verdicts):,} {many} ({listed})"


def worst_first(
    parts: Iterable[NamedComparison | BudgetOutcome],
) -> list[NamedComparison | BudgetOutcome]:
    """Return comparisons and budgets, the worst verdict first."""
    return sorted(parts, key=lambda part: VERDICTS.index(part.verdict))


def outcome(part: NamedComparison | BudgetOutcome) -> str:
    """Return the outcome of a comparison or of a file of budgets, in one sentence."""
    if isinstance(part, NamedComparison):
        return part.headline
    if part.reason:
        return part.reason
    if part.overruns:
        count = len(part.overruns)
        return f"{count:,} budget{'s' * (count > 1)} of early exit not kept"
    return f"all budgets of {part.points:,} points of early exit kept"


#: The columns of `overrun_rows`.
OVERRUN_HEADER = ("figure", "budget", "measured", "point")


def overrun_rows(budget: BudgetOutcome) -> list[list[str]]:
    """Return one row of text per budget that was exceeded."""
    return [
        [overrun.figure, overrun.limit, overrun.measured, overrun.point]
        for overrun in budget.overruns
    ]


def overrun_commands(budget: BudgetOutcome) -> list[str]:
    """Return the commands to look closer at exceeded budgets with, each once."""
    return list(dict.fromkeys(overrun.command for overrun in budget.overruns))


def leftovers(record: SessionRecord) -> list[tuple[str, str]]:
    """Return missing, regenerated and unused baselines, as (label, text)."""
    return [
        *(
            ("Missing", f"{missing.path}: make it with `{missing.command}`")
            for missing in record.missing
        ),
        *(("Regenerated", f"{path}: review and commit it") for path in record.regenerated),
        *(
            ("Not used", f"{path}: no test of this session compared with it")
            for path in record.unused
        ),
    ]


# --- A comparison ----------------------------------------------------------------------------


def sentences(record: ComparisonRecord) -> Iterator[tuple[str, str]]:
    """Yield the sentences besides the verdict and the numbers, as (label, text)."""
    found = record.attribution
    if found is not None:
        yield "Points to", f"{_CAUSES.get(found.cause, found.cause)}: {found.text}"
    if holes(record):
        yield "No number", f"on one side: {holes(record)}"
    if record.verdict == "INCONCLUSIVE":
        yield "To decide", _needed_sequences(record)
    yield from _last_step(record)
    for note in record.notes:
        yield "Note", note


def _last_step(record: ComparisonRecord) -> Iterator[tuple[str, str]]:
    if record.gate is not UNSET and record.gate.steps:
        tokens, most = record.gate.steps[-1].tokens, record.gate.budget_tokens
        label = "Undecided" if record.verdict == "INCONCLUSIVE" else "Decided"
        yield label, f"after {tokens:,} of at most {most:,} tokens"


def _needed_sequences(record: ComparisonRecord) -> str:
    """Return how many new sequences would decide, or that no number of them would."""
    needed = [cell.needed for cell in record.cells if cell.verdict == "INCONCLUSIVE"]
    counts = [count for count in needed if count is not None]
    some = f"{max(counts, default=0):,} new sequences (now: {record.sequences.new:,})"
    if len(counts) == len(needed):
        return f"take {some}"
    few = f"the baseline's {record.sequences.baseline:,} sequences are too few"
    if not counts:
        return f"no number of new sequences would do: {few}"
    return (
        f"{len(counts):,} of the {len(needed):,} undecided cells take {some}; for the rest no "
        f"number of new ones would do: {few}"
    )


def mismatch_pairs(record: ComparisonRecord) -> list[tuple[str, str]]:
    """Return what makes two profiles not comparable, as (name, text)."""
    return [
        (
            differs.name,
            f"expected {_short(differs.expected)}, got {_short(differs.obtained)}; "
            f"{differs.remedy}",
        )
        for differs in record.mismatches
    ]


def _short(value: object) -> str:
    """Return a value in words, a hash by its first digits."""
    if value is None:
        return "none"
    text = str(value)
    kind, _, digits = text.rpartition(":")
    is_hash = len(digits) >= 32 and set(digits) <= set("0123456789abcdef")
    if not is_hash or len(digits) <= _DIGEST:
        return text
    return f"{kind}:{digits[:_DIGEST]}..." if kind else f"{digits[:_DIGEST]}..."


# --- Provenance ------------------------------------------------------------------------------


def provenance_pairs(record: ComparisonRecord) -> list[tuple[str, str]]:
    """Return the origin of the new profile, and how the baseline's differs, as (label, text)."""
    new, old = record.provenance, record.baseline
    pairs = [("Measured", _source(new))] if new else []
    if old:
        shown = {mismatch.name for mismatch in record.mismatches}
        pairs.append(("Baseline", _unlike(old, new, shown) if new else _source(old)))
    return pairs


def _source(about: Provenance) -> str:
    model, machine, versions = about.model, known(about.machine), known(about.versions) or {}
    places = [] if machine is None else [machine.processor, known(machine.accelerator)]
    libraries = [
        f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions
    ]
    return (
        f"{known(model.name)} ({known(model.dtype)} on {known(model.device)}) on corpus "
        f"{about.corpus.name}; {', '.join([place for place in places if place] + libraries)}"
    )


def _unlike(old: Provenance, new: Provenance, shown: Collection[str]) -> str:
    """Return how a baseline's provenance differs, without the differences shown already."""
    mine, theirs = dict(_leaves(to_plain(new))), dict(_leaves(to_plain(old)))
    differing = [
        f"{_place_name(place)} {_short(theirs.get(place))}"
        for place in dict.fromkeys([*theirs, *mine])
        if theirs.get(place) != mine.get(place) and place not in shown
    ]
    if not differing:
        return "the same in all else" if shown else "the same model, corpus, machine and versions"
    more = len(differing) - _MOST_DIFFERENCES
    rest = ", ".join(differing[:_MOST_DIFFERENCES])
    return f"the same, but {rest}{f' and {more:,} more' if more > 0 else ''}"


def _place_name(place: str) -> str:
    group, _, key = place.rpartition(".")
    return f"{group} {key}" if group == "corpus" else key


def _leaves(about: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in about.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{place}{key}.")
        elif key not in _IRRELEVANT:
            yield f"{place}{key}", value


# --- Cells -----------------------------------------------------------------------------------


def worst_cells(record: ComparisonRecord) -> list[CellRow]:
    """Return the cells that did not pass, failures first, the farthest beyond its limit first.

    Those without a number fail as a whole row, and come last: `holes` names them.
    """
    order = {"FAIL": 0, "INCONCLUSIVE": 2}

    def badness(cell: CellRow) -> tuple[int, float]:
        found = distance(cell)
        return (1, 0.0) if found is None else (order[cell.verdict], -abs(found))

    return sorted((cell for cell in record.cells if cell.verdict in order), key=badness)


def holes(record: ComparisonRecord) -> str:
    """Return the cells without a number, layer by layer; empty where there are none."""
    found: dict[str, list[str]] = {}
    for cell in record.cells:
        if distance(cell) is None:
            found.setdefault(cell.layer, []).append(cell_name(record, cell))
    texts = [
        f"layer {layer} ({', '.join(names) if len(names) <= 3 else f'{len(names)} statistics'})"
        for layer, names in found.items()
    ]
    more = len(texts) - _MOST_HOLES
    return f"{', '.join(texts[:_MOST_HOLES])}{f' and {more:,} more layers' if more > 0 else ''}"


def distance(cell: CellRow) -> float | None:
    """Return a cell's difference in units of its limit; infinite where nothing may move at all.

    None where a side has no number.
    """
    if cell.standardized is not None:
        return cell.standardized
    if cell.difference:  # the limit is 0, and infinity is no JSON
        return math.copysign(math.inf, cell.difference)
    return None


def cell_name(record: ComparisonRecord, cell: CellRow) -> str:
    """Return the name of a cell's statistic, different from another one of the same name.

    Where two runs over the same sequences are compared, the mean is there twice: per sequence, and
    as the table has it.
    """
    twice = record.method == "same sequences" and cell.statistic in _PER_SEQUENCE
    return f"{_WHOLE}{cell.statistic}" if twice and cell.sequence is None else cell.statistic


def meaning(name: str) -> str:
    """Return what a statistic is, by the name that `cell_name` gave it."""
    if name.startswith(_WHOLE):
        return f"{_MEANINGS.get(name.removeprefix(_WHOLE), name)}, over all tokens"
    return _MEANINGS.get(name, name)


def has_intervals(record: ComparisonRecord) -> bool:
    """Return whether means of other sequences were compared, with intervals."""
    return record.method == "other sequences"


def cell_header(record: ComparisonRecord) -> tuple[str, ...]:
    """Return the columns of `cell_row`; the last one holds text."""
    return "layer", "statistic", *_numbers(record), "verdict"


def _numbers(record: ComparisonRecord) -> tuple[str, ...]:
    limits = ("interval", "margin") if has_intervals(record) else ("tolerance",)
    return "expected", "obtained", "moved", *limits


def cell_row(record: ComparisonRecord, cell: CellRow) -> list[str]:
    """Return one row of text: a cell with its signed difference and how far it may move."""
    return [
        cell.layer,
        cell_name(record, cell),
        *cell_numbers(record, cell).values(),
        {"INCONCLUSIVE": "undecided"}.get(cell.verdict, cell.verdict.lower()),
    ]


def cell_numbers(record: ComparisonRecord, cell: CellRow) -> dict[str, str]:
    """Return a cell's numbers as text, by the names of `cell_header`; "none" where it has none."""
    fine = not has_intervals(record)
    is_count = cell.statistic == "count"
    # Four digits are enough of what is uncertain, and with them the table fits 80 columns.
    value = ",.0f" if is_count else "z.6f" if fine else "z.4f"
    size = ".1e" if fine and _is_tiny(cell.difference) else value.removeprefix("z")
    most = ".1e" if fine and _is_tiny(cell.limit) else "g" if not cell.limit else ".4f"
    ends = cell.interval
    texts = {
        "expected": _formatted(cell.expected, value),
        "obtained": _formatted(cell.obtained, value),
        "moved": _formatted(cell.difference, f"+{size}"),
        "tolerance": _formatted(cell.limit, most),
        "margin": _formatted(cell.limit, most),
        "interval": "none" if ends is None else f"{ends[0]:+.4f}..{ends[1]:+.4f}",
    }
    return {name: texts[name] for name in _numbers(record)}


def _is_tiny(value: float | None) -> bool:
    return value is not None and 0 < abs(value) < 1e-3


def _formatted(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def worst_title(record: ComparisonRecord, cells: Sequence[CellRow], shown: int) -> str:
    """Return how many cells did not pass, and how many of them are shown."""
    failed = sum(cell.verdict == "FAIL" for cell in cells)
    undecided = len(cells) - failed
    kind = "margin" if has_intervals(record) else "tolerance"
    beyond = f"beyond {'their' if failed > 1 else 'its'} {kind}"
    if failed and undecided:
        text = f"{_cells(failed)} {beyond}, {undecided:,} undecided"
    else:
        text = f"{_cells(failed)} {beyond}" if failed else f"{_cells(undecided)} undecided"
    return f"{text}; the worst {shown:,}" if shown < len(cells) else text


def _cells(count: int) -> str:
    return f"{count:,} cell{'s' * (count > 1)}"


def glossary(record: ComparisonRecord, cells: Sequence[CellRow]) -> str:
    """Return what the numbers of some rows mean."""
    names = list(dict.fromkeys(cell_name(record, cell) for cell in cells))
    means = [name for name in names if name in _PER_SEQUENCE]
    shares = [name for name in names if name.startswith(_SHARE)]
    texts = []
    if means:
        which = "" if has_intervals(record) else ", in the sequence that moved most"
        texts.append(f"{', '.join(means)}: of the similarity{which}")
    if shares:
        quantiles = ", ".join(name.removeprefix(_SHARE) for name in shares)
        texts.append(f"{', '.join(shares)}: of tokens at or below the baseline's {quantiles}")
    texts += [
        f"{name}: {meaning(name)}"
        for name in names
        if name not in (*means, *shares) and meaning(name) != name
    ]
    if has_intervals(record) and cells:
        texts.append(
            "an interval wholly beyond the margin fails, one that straddles it is undecided"
        )
    return "; ".join(texts)
