"""The text of comparisons and sessions, for terminal, Markdown and HTML page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cascade.core.provenance import Provenance
from cascade.core.schema import UNSET, known, to_plain
from cascade.gate.records import (
    VERDICTS,
    Attribution,
    BudgetOutcome,
    CellRow,
    ComparisonRecord,
    DecodingKind,
    NamedComparison,
    SessionRecord,
)

#: The causes of an attribution, in words.
_CAUSES = {
    "rows": "missing rows",
    "capture": "how the states are read",
    "counting": "how tokens are counted",
    "layer": "one layer",
    "numerics": "rounding",
    "model": "the whole model or its input",
    "long context": "long contexts",
    "decoding": "decoding",
}

#: Statistics compared per sequence, in addition to the table, on the same sequences.
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

#: Entries of a provenance that cannot cause drift.
_IRRELEVANT = ("command", "created", "source")
#: The maximum number of named layers without a value.
_MOST_HOLES = 5
#: The maximum number of shown differences between two provenances.
_MOST_DIFFERENCES = 5
#: The number of digits shown of a hash; enough to distinguish two hashes.
_DIGEST = 12


# --- A session -------------------------------------------------------------------------------


def overview(record: SessionRecord) -> str:
    """Return one line with the number of comparisons, budget files and their verdicts."""
    rest = (
        (record.missing, "baseline missing", "baselines missing"),
        (record.regenerated, "baseline regenerated", "baselines regenerated"),
        (record.unused, "baseline unused", "baselines unused"),
    )
    parts = [
        _counted([part.verdict for part in record.comparisons], "comparison", "comparisons"),
        _counted([part.verdict for part in record.budgets], "budget file", "budget files"),
        *(
            f"{len(found):,} {one if len(found) == 1 else many}"
            for found, one, many in rest
            if found
        ),
    ]
    return "; ".join(part for part in parts if part) or "nothing was compared with a baseline"


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
    """Return the outcome of a comparison or a budget file, in one sentence."""
    if isinstance(part, NamedComparison):
        return part.headline
    if part.reason:
        return part.reason
    if part.overruns:
        count = len(part.overruns)
        return f"{count:,} early-exit budget{'s' * (count > 1)} exceeded"
    return f"{part.points:,} operating point{'s' * (part.points != 1)} within budget"


def remote_pairs(part: NamedComparison | BudgetOutcome) -> list[tuple[str, str]]:
    """Return where the baseline was read from and which version of it, as (label, text)."""
    origin = known(part.remote)
    if origin is None:
        return []
    pairs = [("Baselines", origin.in_words())]
    return pairs if origin.reason is None else [*pairs, ("Not checked", origin.reason)]


#: The columns of `overrun_rows`.
OVERRUN_HEADER = ("figure", "budget", "measured", "operating point")


def overrun_rows(budget: BudgetOutcome) -> list[list[str]]:
    """Return one row of text per budget that was exceeded."""
    return [
        [overrun.figure, overrun.limit, overrun.measured, overrun.point]
        for overrun in budget.overruns
    ]


def overrun_commands(budget: BudgetOutcome) -> list[str]:
    """Return the distinct commands that measure exceeded budgets again."""
    return list(dict.fromkeys(overrun.command for overrun in budget.overruns))


def leftovers(record: SessionRecord) -> list[tuple[str, str]]:
    """Return missing, regenerated and unused baselines, as (label, text)."""
    return [
        *(
            ("Missing", f"{missing.path}; create it with `{missing.command}`")
            for missing in record.missing
        ),
        *(("Regenerated", f"{path}; review and commit it") for path in record.regenerated),
        *(("Unused", f"{path}; no test of this session used it") for path in record.unused),
    ]


# --- A comparison ----------------------------------------------------------------------------


def sentences(record: ComparisonRecord) -> Iterator[tuple[str, str]]:
    """Yield the sentences that follow the verdict, as (label, text)."""
    found = record.attribution
    if found is not None:
        yield "Likely cause", f"{_CAUSES.get(found.cause, found.cause)}: {found.text}"
        yield from _tried(found)
    if missing_values(record):
        yield "No value", f"on one side: {missing_values(record)}"
    if record.verdict == "INCONCLUSIVE":
        yield "To decide", _needed_sequences(record)
    yield from _last_step(record)
    yield from _long_context(record)
    yield from _decoding(record)
    for note in record.notes:
        yield "Note", note


def _long_context(record: ComparisonRecord) -> Iterator[tuple[str, str]]:
    """Yield which long sequences agree, or why none were compared; nothing if they differ."""
    found = known(record.long_context)
    if found is None or found.verdict == "FAIL":
        return
    if found.verdict == "NOT CHECKED":
        yield "Not checked", f"long contexts: {found.reason}"
        return
    largest = max(each.difference for each in found.ranges)
    texts = f"{found.sequences:,} sequence{'s' * (found.sequences != 1)}"
    yield (
        "Long contexts",
        f"{texts} of {found.length:,} tokens in {len(found.ranges)} ranges of positions agree "
        f"(largest difference {largest:.0e}, tolerance {found.tolerance:.0e}; {found.seconds:.1f} "
        "s)",
    )


#: The columns of `long_context_rows`; the last one holds text.
LONG_CONTEXT_HEADER = ("positions", "largest difference", "first layer")


def long_context_rows(record: ComparisonRecord) -> list[list[str]]:
    """Return one row of text per range of positions, if long sequences differ."""
    found = known(record.long_context)
    if found is None or found.verdict != "FAIL":
        return []
    return [
        [f"{each.first:,} to {each.last:,}", f"{each.difference:.1e}", each.layer or "none"]
        for each in found.ranges
    ]


def _tried(found: Attribution) -> Iterator[tuple[str, str]]:
    """Yield what the causes that were tried leave unexplained; nothing if evidence is direct."""
    tried = known(found.tried) or []
    left = [
        f"{one.name!r} explains all but {_tolerances(one.left)}" for one in tried[:2] if one.left
    ]
    is_direct = known(found.named) is not None and found.named != (tried and tried[0].name)
    if not left or is_direct:
        return
    count = f"{len(tried)} cause{'s' * (len(tried) > 1)}"
    none = "" if known(found.named) else "; none explains the numbers"
    yield "Tried", f"{count}: {', '.join(left)}{none}"


def _tolerances(left: float) -> str:
    return f"{left:,.0f} tolerances" if left >= 10 else f"{left:.2g} tolerances"


def _decoding(record: ComparisonRecord) -> Iterator[tuple[str, str]]:
    """Yield what was decoded, and why not more; nothing if the prefill has drifted."""
    found = known(record.decoding)
    if found is None or found.verdict == "FAIL":
        return
    if found.verdict == "PASS":
        cached = found.tokens - found.passes[0].tokens
        largest = max(made.difference or 0.0 for made in found.passes)
        texts = f"{found.sequences:,} sequence{'s' * (found.sequences != 1)}"
        yield (
            "Decoding",
            f"{cached:,} tokens of {texts} in {len(found.passes) - 1:,} cached steps agree with "
            f"the prefill (largest difference {largest:.0e})",
        )
    if found.reason is not None:
        yield (
            ("Not checked" if found.verdict == "NOT CHECKED" else "Note"),
            (f"decoding: {found.reason}"),
        )


#: The columns of `decoding_rows`; the last one holds text.
DECODING_HEADER = ("step", "tokens", "largest difference", "first layer", "what ran")

_KINDS: dict[DecodingKind, str] = {
    "prefix": "the tokens that fill the KV cache",
    "token": "one token",
    "draft": "a draft at once",
    "after draft": "one token after the draft",
}


def decoding_rows(record: ComparisonRecord) -> list[list[str]]:
    """Return one row of text per pass through the KV cache, if decoding failed."""
    found = known(record.decoding)
    if found is None or found.verdict != "FAIL":
        return []
    rows = []
    for number, made in enumerate(found.passes):
        first, last = made.start + 1, made.start + made.tokens
        rows.append(
            [
                str(number),
                f"{first:,}" if first == last else f"{first:,} to {last:,}",
                "NaN" if made.difference is None else f"{made.difference:.1e}",
                made.layer or "none",
                _KINDS[made.kind] + (f", {made.rejected} more rejected" if made.rejected else ""),
            ]
        )
    if found.error is not None:
        rows.append([str(len(found.passes)), "", "error", found.error_layer or "", ""])
    return rows


def _last_step(record: ComparisonRecord) -> Iterator[tuple[str, str]]:
    if record.gate is not UNSET and record.gate.steps:
        tokens, most = record.gate.steps[-1].tokens, record.gate.budget_tokens
        label = "Undecided" if record.verdict == "INCONCLUSIVE" else "Decided"
        yield label, f"after {tokens:,} of at most {most:,} tokens"


def _needed_sequences(record: ComparisonRecord) -> str:
    """Return how many new sequences would decide, or that no number would."""
    needed = [cell.needed for cell in record.cells if cell.verdict == "INCONCLUSIVE"]
    counts = [count for count in needed if count is not None]
    some = f"{max(counts, default=0):,} new sequences (now: {record.sequences.new:,})"
    if len(counts) == len(needed):
        return f"measure {some}"
    few = f"because the baseline's {record.sequences.baseline:,} sequences are too few"
    if not counts:
        return f"no number of new sequences would suffice, {few}"
    return (
        f"{len(counts):,} of the {len(needed):,} undecided cells need {some}; for the others, no "
        f"number would suffice, {few}"
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
    """Return a value as text, with hashes cut to their first digits."""
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
    """Return the provenance of the new profile and the baseline's differences, as (label, text)."""
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
    """Return how a baseline's provenance differs, without differences that are already shown."""
    mine, theirs = dict(_leaves(to_plain(new))), dict(_leaves(to_plain(old)))
    differing = [
        f"{_place_name(place)} {_short(theirs.get(place))}"
        for place in dict.fromkeys([*theirs, *mine])
        if theirs.get(place) != mine.get(place) and place not in shown
    ]
    if not differing:
        return "otherwise the same" if shown else "the same model, corpus, machine and versions"
    more = len(differing) - _MOST_DIFFERENCES
    rest = ", ".join(differing[:_MOST_DIFFERENCES])
    return f"the same except {rest}{f' and {more:,} more' if more > 0 else ''}"


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
    """Return the cells that did not pass, failures first, each group the farthest first.

    Cells without a value come after the failures, because `missing_values` names them.
    """
    order = {"FAIL": 0, "INCONCLUSIVE": 2}

    def badness(cell: CellRow) -> tuple[int, float]:
        found = distance(cell)
        return (1, 0.0) if found is None else (order[cell.verdict], -abs(found))

    return sorted((cell for cell in record.cells if cell.verdict in order), key=badness)


def missing_values(record: ComparisonRecord) -> str:
    """Return the cells without a value, layer by layer; empty if there are none."""
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
    """Return a cell's difference in units of its limit; infinite if the limit is 0.

    None if a side has no value.
    """
    if cell.standardized is not None:
        return cell.standardized
    if cell.difference:  # the limit is 0, and JSON has no infinity
        return math.copysign(math.inf, cell.difference)
    return None


def cell_name(record: ComparisonRecord, cell: CellRow) -> str:
    """Return an unambiguous name of a cell's statistic.

    If two runs over the same sequences are compared, the mean appears twice: per sequence and in
    the table.
    """
    twice = record.method == "same sequences" and cell.statistic in _PER_SEQUENCE
    return f"{_WHOLE}{cell.statistic}" if twice and cell.sequence is None else cell.statistic


def meaning(name: str) -> str:
    """Return what a statistic means, given the name from `cell_name`."""
    if name.startswith(_WHOLE):
        return f"{_MEANINGS.get(name.removeprefix(_WHOLE), name)}, over all tokens"
    return _MEANINGS.get(name, name)


def has_intervals(record: ComparisonRecord) -> bool:
    """Return whether means over different sequences were compared, with intervals."""
    return record.method == "other sequences"


def cell_header(record: ComparisonRecord) -> tuple[str, ...]:
    """Return the columns of `cell_row`; the last one holds text."""
    return "layer", "statistic", *_numbers(record), "verdict"


def _numbers(record: ComparisonRecord) -> tuple[str, ...]:
    limits = ("interval", "margin") if has_intervals(record) else ("tolerance",)
    return "expected", "obtained", "moved", *limits


def cell_row(record: ComparisonRecord, cell: CellRow) -> list[str]:
    """Return one table row of text: a cell with its signed difference and its limit."""
    return [
        cell.layer,
        cell_name(record, cell),
        *cell_numbers(record, cell).values(),
        {"INCONCLUSIVE": "undecided"}.get(cell.verdict, cell.verdict.lower()),
    ]


def cell_numbers(record: ComparisonRecord, cell: CellRow) -> dict[str, str]:
    """Return a cell's numbers as text by the names of `cell_header`; "none" for missing ones."""
    fine = not has_intervals(record)
    is_count = cell.statistic == "count"
    # Four digits are enough for means with intervals, and let the table fit 80 columns.
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
    beyond = f"beyond {kind}"
    if failed and undecided:
        text = f"{_cells(failed)} {beyond}, {undecided:,} undecided"
    else:
        text = f"{_cells(failed)} {beyond}" if failed else f"{_cells(undecided)} undecided"
    return f"{text}; showing the worst {shown:,}" if shown < len(cells) else text


def _cells(count: int) -> str:
    return f"{count:,} cell{'s' * (count > 1)}"


def glossary(record: ComparisonRecord, cells: Sequence[CellRow]) -> str:
    """Return an explanation of the statistics in some rows."""
    names = list(dict.fromkeys(cell_name(record, cell) for cell in cells))
    means = [name for name in names if name in _PER_SEQUENCE]
    shares = [name for name in names if name.startswith(_SHARE)]
    texts = ["a cell is one statistic of one layer"] if cells else []
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
            "a cell fails if its interval lies wholly beyond the margin, and is undecided if its "
            "interval straddles the margin"
        )
    return "; ".join(texts)
