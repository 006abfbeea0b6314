"""What a comparison and a session say, as rows and words: for terminal, Markdown and page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cascade.gate.session import ORDER
from cascade.report.common.records import Record, check_record

_COMPARISON = (
    "verdict",
    "headline",
    "way",
    "mismatches",
    "attribution",
    "sequences",
    "tokens",
    "notes",
    "profile",
    "cells",
    "provenance",
    "baseline",
)
_REPORT = ("verdict", "comparisons", "budgets", "missing", "regenerated", "unused")
_BUDGET = ("name", "path", "verdict", "points", "overruns", "reason")

#: What the cause of an attribution means.
_CAUSES = {
    "rows": "rows are missing",
    "capture": "the right numbers in the wrong place",
    "counting": "the way tokens are counted",
    "layer": "one layer",
    "numerics": "arithmetic",
    "model": "the whole model, or its input",
}

#: On the same sequences these are compared sequence by sequence, besides the table's.
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

#: What of a provenance is no reason for a drift by itself.
_UNTOLD = ("command", "created", "source")
#: How many layers without a number are named.
_MOST_HOLES = 5
#: How many differences between two provenances are told.
_MOST_DIFFERENCES = 5
#: How much of a hash is shown where there is little room; two that differ are told apart by it.
_DIGEST = 12


def check_comparison(record: Record) -> None:
    """Refuse what is not a comparison, before anything is shown."""
    check_record(record, "comparison", _COMPARISON)


def check_report(record: Record) -> None:
    """Refuse what is not a session, or has a part that is not whole, before anything is shown."""
    check_record(record, "report", _REPORT)
    for comparison in record["comparisons"]:
        check_record(comparison, "comparison", ("name", "path", *_COMPARISON))
    for budget in record["budgets"]:
        missing = [key for key in _BUDGET if key not in budget]
        if missing:
            raise ValueError(f"expected budgets with {', '.join(_BUDGET)}, got none of {missing}")


# --- A session -------------------------------------------------------------------------------


def overview(record: Record) -> str:
    """Say in one line of what a session consists, and how many parts have which verdict."""
    parts = [
        _counted(record["comparisons"], "compared", "compared"),
        _counted(record["budgets"], "budget file", "budget files"),
        *(
            f"{len(record[key]):,} {one if len(record[key]) == 1 else many}"
            for key, one, many in (
                ("missing", "baseline missing", "baselines missing"),
                ("regenerated", "baseline made anew", "baselines made anew"),
                ("unused", "baseline not used", "baselines not used"),
            )
            if record[key]
        ),
    ]
    return "; ".join(part for part in parts if part) or "nothing was held to a baseline"


def _counted(parts: Sequence[Record], one: str, many: str) -> str:
    if not parts:
        return ""
    if len(parts) == 1:
        return f"1 {one}"
    counts = Counter(part["verdict"] for part in parts)
    if len(counts) == 1:
        return f"{len(parts):,} {many}, all {parts[0]['verdict']}"
    told = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in ORDER if counts[verdict])
    return f"{len(parts):,} {many} ({told})"


def worst_first(parts: Iterable[Record]) -> list[Record]:
    """Return comparisons or budgets, the worst verdict first."""
    return sorted(parts, key=lambda part: ORDER.index(part["verdict"]))


def budget_line(budget: Record) -> str:
    """Say in one sentence what came of a file of budgets."""
    if budget["reason"]:
        return str(budget["reason"])
    if budget["overruns"]:
        count = len(budget["overruns"])
        return f"{count:,} budget{'s' * (count > 1)} of early exit not kept"
    return f"all budgets of {budget['points']:,} points of early exit kept"


#: The columns of `overrun_rows`.
OVERRUN_HEADER = ("figure", "budget", "measured", "point")


def overrun_rows(budget: Record) -> list[list[str]]:
    """Return one row of text per budget that was not kept."""
    return [
        [str(overrun[key]) for key in ("figure", "limit", "measured", "point")]
        for overrun in budget["overruns"]
    ]


def overrun_commands(budget: Record) -> list[str]:
    """Return the commands that look closer at what was not kept, each once."""
    return list(dict.fromkeys(str(overrun["command"]) for overrun in budget["overruns"]))


def leftovers(record: Record) -> list[tuple[str, str]]:
    """Return what is missing, what was made anew, and what nobody used, as (label, text)."""
    return [
        *(
            ("Missing", f"{missing['path']}: make it with `{missing['command']}`")
            for missing in record["missing"]
        ),
        *(("Regenerated", f"{path}: review and commit it") for path in record["regenerated"]),
        *(
            ("Not used", f"{path}: no test of this session compared with it")
            for path in record["unused"]
        ),
    ]


# --- A comparison ----------------------------------------------------------------------------


def sentences(record: Record) -> Iterator[tuple[str, str]]:
    """Yield what a reader has to know besides the verdict and the numbers, as (label, text)."""
    found = record["attribution"]
    if found is not None:
        yield "Points to", f"{_CAUSES.get(found['cause'], found['cause'])}: {found['text']}"
    if holes(record):
        yield "No number", f"on one side: {holes(record)}"
    if record["verdict"] == "INCONCLUSIVE":
        yield "To decide", _what_decides(record)
    yield from _looks(record)
    for note in record["notes"]:
        yield "Note", str(note)


def _looks(record: Record) -> Iterator[tuple[str, str]]:
    looks = record.get("gate", {}).get("looks")
    if looks:
        tokens, most = looks[-1]["tokens"], record["gate"]["budget_tokens"]
        label = "Undecided" if record["verdict"] == "INCONCLUSIVE" else "Decided"
        yield label, f"after {tokens:,} of at most {most:,} tokens"


def _what_decides(record: Record) -> str:
    """Say how many new sequences would decide, or that no number of them would."""
    needed = [cell["needed"] for cell in record["cells"] if cell["verdict"] == "INCONCLUSIVE"]
    known = [count for count in needed if count is not None]
    some = f"{max(known, default=0):,} new sequences (now: {record['sequences']['new']:,})"
    if len(known) == len(needed):
        return f"take {some}"
    few = f"the baseline's {record['sequences']['baseline']:,} sequences are too few"
    if not known:
        return f"no number of new sequences would do: {few}"
    return (
        f"{len(known):,} of the {len(needed):,} undecided cells take {some}; for the rest no "
        f"number of new ones would do: {few}"
    )


def mismatch_rows(record: Record) -> list[list[str]]:
    """Return what makes two profiles not comparable: name, expected, obtained, what to do."""
    return [
        [
            mismatch["name"],
            *(_short(mismatch[side]) for side in ("expected", "obtained")),
            mismatch["remedy"],
        ]
        for mismatch in record["mismatches"]
    ]


def mismatch_pairs(record: Record) -> list[tuple[str, str]]:
    """Return what makes two profiles not comparable, as (name, text)."""
    return [
        (name, f"expected {expected}, got {obtained}; {remedy}")
        for name, expected, obtained, remedy in mismatch_rows(record)
    ]


def _short(value: Any) -> str:
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


def provenance_pairs(record: Record) -> list[tuple[str, str]]:
    """Return what was measured, and in what the baseline's run was another, as (label, text)."""
    new, old = record["provenance"], record["baseline"]
    pairs = [("Measured", _source(new))] if new else []
    if old:
        told = {mismatch["name"] for mismatch in record["mismatches"]}
        pairs.append(("Baseline", _unlike(old, new, told) if new else _source(old)))
    return pairs


def _source(about: Mapping[str, Any]) -> str:
    model, corpus, machine, versions = (
        part if isinstance(part := about.get(name), Mapping) else {}
        for name in ("model", "corpus", "machine", "versions")
    )
    places = [machine.get("processor"), machine.get("accelerator")]
    libraries = [
        f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions
    ]
    return (
        f"{model.get('name')} ({model.get('dtype')} on {model.get('device')}) on corpus "
        f"{corpus.get('name')}; {', '.join([str(place) for place in places if place] + libraries)}"
    )


def _unlike(old: Mapping[str, Any], new: Mapping[str, Any], told: Collection[str]) -> str:
    """Say in what a baseline's provenance is another, leaving out what was told already."""
    mine, theirs = dict(_leaves(new)), dict(_leaves(old))
    differing = [
        f"{_place_name(place)} {_short(theirs.get(place))}"
        for place in dict.fromkeys([*theirs, *mine])
        if theirs.get(place) != mine.get(place) and place not in told
    ]
    if not differing:
        return "the same in all else" if told else "the same model, corpus, machine and versions"
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
        elif key not in _UNTOLD:
            yield f"{place}{key}", value


# --- Cells -----------------------------------------------------------------------------------


def worst_cells(record: Record) -> list[Record]:
    """Return the cells that did not pass, failures first, the farthest beyond its limit first.

    Those without a number fail as a whole row, and come last: `holes` names them.
    """
    order = {"FAIL": 0, "INCONCLUSIVE": 2}

    def badness(cell: Record) -> tuple[int, float]:
        found = distance(cell)
        return (1, 0.0) if found is None else (order[cell["verdict"]], -abs(found))

    return sorted((cell for cell in record["cells"] if cell["verdict"] in order), key=badness)


def holes(record: Record) -> str:
    """Name the cells without a number, layer by layer; empty where there are none."""
    found: dict[str, list[str]] = {}
    for cell in record["cells"]:
        if distance(cell) is None:
            found.setdefault(str(cell["layer"]), []).append(cell_name(record, cell))
    texts = [
        f"layer {layer} ({', '.join(names) if len(names) <= 3 else f'{len(names)} statistics'})"
        for layer, names in found.items()
    ]
    more = len(texts) - _MOST_HOLES
    return f"{', '.join(texts[:_MOST_HOLES])}{f' and {more:,} more layers' if more > 0 else ''}"


def distance(cell: Record) -> float | None:
    """Return a cell's difference in units of its limit; infinite where nothing may move at all.

    None where a side has no number.
    """
    if cell["standardized"] is not None:
        return float(cell["standardized"])
    if cell["difference"]:  # the limit is 0, and infinity is no JSON
        return math.copysign(math.inf, cell["difference"])
    return None


def cell_name(record: Record, cell: Record) -> str:
    """Name the statistic of a cell, apart from another one of the same name.

    Where two runs over the same sequences are compared, the mean is held twice: per sequence, and
    as the table has it.
    """
    twice = record["way"] == "same sequences" and cell["statistic"] in _PER_SEQUENCE
    if twice and cell["sequence"] is None:
        return f"{_WHOLE}{cell['statistic']}"
    return str(cell["statistic"])


def meaning(name: str) -> str:
    """Say what a statistic is, by the name that `cell_name` gave it."""
    if name.startswith(_WHOLE):
        return f"{_MEANINGS.get(name.removeprefix(_WHOLE), name)}, over all tokens"
    return _MEANINGS.get(name, name)


def has_intervals(record: Record) -> bool:
    """Whether means were compared with intervals, other sequences' with the baseline's."""
    return bool(record["way"] == "other sequences")


def cell_header(record: Record) -> tuple[str, ...]:
    """Return the columns of `cell_row`; the last one holds text."""
    return "layer", "statistic", *_numbers(record), "verdict"


def _numbers(record: Record) -> tuple[str, ...]:
    limits = ("interval", "margin") if has_intervals(record) else ("tolerance",)
    return "expected", "obtained", "moved", *limits


def cell_row(record: Record, cell: Record) -> list[str]:
    """Return one row of text: a cell with its signed difference and how far it may move."""
    return [
        str(cell["layer"]),
        cell_name(record, cell),
        *cell_numbers(record, cell).values(),
        {"INCONCLUSIVE": "undecided"}.get(cell["verdict"], str(cell["verdict"]).lower()),
    ]


def cell_numbers(record: Record, cell: Record) -> dict[str, str]:
    """Return a cell's numbers as text, by the names of `cell_header`; "none" where it has none."""
    fine = not has_intervals(record)
    is_count = cell["statistic"] == "count"
    # Four digits are enough of what is uncertain, and with them the table fits 80 columns.
    value = ",.0f" if is_count else "z.6f" if fine else "z.4f"
    size = ".1e" if fine and _is_tiny(cell["difference"]) else value.removeprefix("z")
    most = ".1e" if fine and _is_tiny(cell["limit"]) else "g" if not cell["limit"] else ".4f"
    ends = cell["interval"]
    texts = {
        "expected": _formatted(cell["expected"], value),
        "obtained": _formatted(cell["obtained"], value),
        "moved": _formatted(cell["difference"], f"+{size}"),
        "tolerance": _formatted(cell["limit"], most),
        "margin": _formatted(cell["limit"], most),
        "interval": "none" if ends is None else f"{ends[0]:+.4f}..{ends[1]:+.4f}",
    }
    return {name: texts[name] for name in _numbers(record)}


def _is_tiny(value: float | None) -> bool:
    return value is not None and 0 < abs(value) < 1e-3


def _formatted(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def worst_title(record: Record, cells: Sequence[Record], shown: int) -> str:
    """Say how many cells did not pass, and how many of them are shown."""
    failed = sum(cell["verdict"] == "FAIL" for cell in cells)
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


def glossary(record: Record, cells: Sequence[Record]) -> str:
    """Say what the numbers of some rows are."""
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
