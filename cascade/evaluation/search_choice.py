"""The choice of an exit layer: of points that were tried, the cheapest that keeps an agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cascade.core.errors import UsageError
from cascade.stats.certificates import (
    LEAST_RISK,
    certify_means,
    check_certifiable,
    risk_bound,
    sequences_needed,
)

Row = dict[str, Any]

KIND = "exit-search"

#: How a point's agreement was confirmed: by running it, or on the table of what every token would
#: do, which with exact propagation says the same.
RUNNING, TABLE, EXACT_TABLE = "running", "table", "exact table"

#: What became of an agreement that the sequences to fit on promise.
BEYOND_DOUBT, KEPT, LOST = "beyond doubt", "kept", "lost"

#: What of an evaluation's row a point keeps.
_FIGURES = (
    "exit_layer",
    "rule",
    "head",
    "threshold",
    "threshold_from",
    "exit_share",
    "agreement",
    "agreement_interval",
    "perplexity_ratio",
    "layers_per_token",
    "flops_ratio",
    "seconds_ratio",
    "seconds_ratio_interval",
)

#: What a threshold is sought for; points from several records may differ in the last three.
_PAIR = ("exit_layer", "rule", "head", "propagation", "source")


@dataclass(frozen=True)
class Wish:
    """What a search is for.

    Attributes:
        agreement: The least share of all tokens whose prediction is the full model's.
        risk: The largest mean share of tokens that may differ, to be certified; what the
            agreement leaves where None.
        confidence: How sure all certificates together have to be.
    """

    agreement: float = 0.95
    risk: float | None = None
    confidence: float = 0.95

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: A share is outside its range.
        """
        if not 0 <= self.agreement <= 1:
            raise UsageError(f"expected a share of agreement in 0..1, got {self.agreement:g}")
        check_certifiable(self.risk, self.confidence)

    @property
    def bound(self) -> float | None:
        """The risk to certify; None where the agreement leaves none, or everything."""
        if self.risk is not None:
            return self.risk
        # 1 - 0.95 is a little more than a twentieth.
        left = round(1 - self.agreement, 12)
        return left if LEAST_RISK <= left < 1 else None


def point_row(
    row: Mapping[str, Any],
    *,
    propagation: str,
    source: int,
    fit: tuple[float | None, float | None, str],
    candidate: bool,
    confirmed_by: str = RUNNING,
) -> Row:
    """Return a point as a search holds it.

    Args:
        row: Its figures on the sequences to confirm on, as an evaluation has them.
        propagation: What upper layers see of tokens that left.
        source: Which of the sources it is from.
        fit: Exit share and agreement on the sequences to fit on, and where these come from.
        candidate: Whether the sequences to fit on keep the wanted agreement there.
        confirmed_by: `RUNNING`, `TABLE` or `EXACT_TABLE`.
    """
    share, agreement, by = fit
    return {name: row[name] for name in _FIGURES} | {
        "propagation": propagation,
        "source": source,
        "fit_exit_share": share,
        "fit_agreement": agreement,
        "fit_by": by,
        "candidate": candidate,
        "confirmed_by": confirmed_by,
    }


def search_record(
    parts: Row,
    points: Sequence[Row],
    nothing: Sequence[Row],
    wish: Wish,
) -> Row:
    """Return a record of kind `exit-search`.

    Args:
        parts: Its `provenance`, `settings`, `sources` and `full`.
        points: What was tried (see `point_row`).
        nothing: Layers and rules at which nothing may leave, each with a `why`.
        wish: What was searched for.
    """
    rows = sorted(
        points, key=lambda row: (row["exit_layer"], row["rule"], row["source"], row["threshold"])
    )
    settings = {"agreement": wish.agreement, "risk": wish.bound, "confidence": wish.confidence}
    chosen = choose(rows, nothing, wish, sequences=parts["full"]["sequences"])
    return (
        {"schema": 1, "kind": KIND}
        | parts
        | {"settings": settings | parts["settings"], "points": rows, "nothing": list(nothing)}
        | chosen
    )


def choose(
    points: Sequence[Row],
    nothing: Sequence[Row],
    wish: Wish,
    *,
    sequences: int,
) -> Row:
    """Find the cheapest points that keep an agreement, and certify what the sequences allow.

    A **candidate** is a threshold at which the sequences to fit on keep the agreement: it was
    chosen without those to confirm on. Of the candidates whose agreement is confirmed by at least
    the point estimate, the best is the cheapest in operations; those that are faster than the full
    model beyond doubt come first. The same is found for those whose whole interval keeps it.

    Every candidate's risk is tested on the same sequences, so with M of them each is tested at
    level (1 - confidence) / M: the family-wise error is then at most 1 - confidence, and the best
    may be picked afterwards (Bonferroni; Learn then Test, Angelopoulos et al. 2021,
    arXiv:2110.01052, section 2).

    Args:
        points: What was tried, each with `fit_agreement`, `confirmed_by`, `candidate` and the
            figures of an evaluation's points. Changed: `outcome`, `risk_bound` and `certified` are
            added.
        nothing: Layers and rules at which nothing may leave.
        wish: What is searched for.
        sequences: How many sequences confirm.

    Returns:
        `pairs`, `best`, `best_beyond_doubt`, `best_on_table`, `nearest` (indices of points),
        `certificate` and `verdict`.
    """
    candidates = [number for number, row in enumerate(points) if row["candidate"]]
    for row in points:
        row["outcome"] = _outcome(row, wish.agreement)
    certificate = _certificate(points, candidates, wish, sequences)
    run = [number for number in candidates if points[number]["confirmed_by"] != TABLE]

    def cheapest(numbers: Sequence[int], *outcomes: str) -> int | None:
        kept = [number for number in numbers if points[number]["outcome"] in outcomes]
        return min(kept, key=lambda number: _price(points[number]), default=None)

    found: Row = {
        "pairs": _pairs(points, nothing),
        "best": cheapest(run, KEPT, BEYOND_DOUBT),
        "best_beyond_doubt": cheapest(run, BEYOND_DOUBT),
        "best_on_table": cheapest(
            [number for number in candidates if number not in run], KEPT, BEYOND_DOUBT
        ),
        "nearest": max(
            candidates,
            key=lambda number: (points[number]["agreement"], -_operations(points[number])),
            default=None,
        ),
        "certificate": certificate,
    }
    return found | {"verdict": _verdict(points, found, wish.agreement)}


def is_faster(row: Row) -> bool:
    """Say whether a point takes fewer operations than the full model, and less time beyond doubt.

    Args:
        row: A point.
    """
    interval = row["seconds_ratio_interval"]
    return interval is not None and interval[1] < 1 and row["flops_ratio"] < 1


def _outcome(row: Row, agreement: float) -> str:
    if row["agreement_interval"][0] >= agreement and row["agreement"] >= agreement:
        return BEYOND_DOUBT
    return KEPT if row["agreement"] >= agreement else LOST


def _operations(row: Row) -> float:
    value = row["flops_ratio"]
    return math.inf if value is None else value


def _price(row: Row) -> tuple[bool, float]:
    return not is_faster(row), _operations(row)


def _pairs(points: Sequence[Row], nothing: Sequence[Row]) -> list[Row]:
    """Return, for every layer and rule, its boldest candidate, and the boldest that keeps it."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for number, row in enumerate(points):
        if row["candidate"]:
            found.setdefault(tuple(row[name] for name in _PAIR), []).append(number)
    rows = []
    for pair, numbers in found.items():
        numbers.sort(key=lambda number: points[number]["threshold"])
        rows.append(
            dict(zip(_PAIR, pair, strict=True))
            | {
                "fitted": numbers[0],
                "kept": _first(points, numbers, KEPT, BEYOND_DOUBT),
                "beyond_doubt": _first(points, numbers, BEYOND_DOUBT),
            }
        )
    none = {"fitted": None, "kept": None, "beyond_doubt": None}
    rows += [{name: row[name] for name in _PAIR} | none for row in nothing]
    return sorted(rows, key=lambda row: (row["exit_layer"], row["rule"], row["source"]))


def _first(points: Sequence[Row], numbers: Sequence[int], *outcomes: str) -> int | None:
    return next((n for n in numbers if points[n]["outcome"] in outcomes), None)


def _certificate(
    points: Sequence[Row], candidates: Sequence[int], wish: Wish, sequences: int
) -> Row:
    """Bound every candidate's risk, all bounds together holding with the wanted confidence."""
    # What a table says of tokens that stay is no measured loss.
    tested = [number for number in candidates if points[number]["confirmed_by"] != TABLE]
    each = 1 - (1 - wish.confidence) / max(1, len(tested))
    certified = []
    for number, row in enumerate(points):
        row["risk_bound"], row["certified"] = None, None
        if number not in tested:
            continue
        loss = 1 - row["agreement"]
        row["risk_bound"] = risk_bound(loss, sequences=sequences, confidence=each)
        if wish.bound is None:
            continue
        threshold, losses = np.array([row["threshold"]]), np.array([loss])
        row["certified"] = bool(
            certify_means(
                threshold, losses, sequences=sequences, risk=wish.bound, confidence=each
            ).certified
        )
        if row["certified"]:
            certified.append(number)
    needed = None if wish.bound is None else sequences_needed(wish.bound, each)
    return {
        "tested": len(tested),
        "confidence_each": each,
        "sequences": sequences,
        "sequences_needed": needed,
        "certified": certified,
        "best": min(certified, key=lambda number: _price(points[number]), default=None),
    }


# --- In words --------------------------------------------------------------------------------


def _verdict(points: Sequence[Row], found: Row, agreement: float) -> Row:
    best = found["best"]
    exit_early = best is not None and is_faster(points[best])
    return {
        "exit": exit_early,
        "headline": _headline(points, found, agreement),
        "also": [*_doubt(points, found, agreement), *_table_alone(points, found)],
    }


def _headline(points: Sequence[Row], found: Row, agreement: float) -> str:
    wanted = _percent(agreement)
    best, nearest = found["best"], found["nearest"]
    if best is None and nearest is None:
        return (
            f"No early exit keeps {wanted} agreement: no layer and rule lets any token leave and "
            "keeps it."
        )
    if best is None:
        row = points[nearest]
        by = "on the table alone" if row["confirmed_by"] == TABLE else "by running"
        return (
            f"Nothing is confirmed to keep {wanted} agreement by running; nearest: {_point(row)}, "
            f"{_percent(row['agreement'])} {by}, at {_cost(row)}."
        )
    row = points[best]
    if is_faster(row):
        return (
            f"Exit at {_point(row)}: {_percent(row['agreement'])} of all tokens are predicted as "
            f"by the full model (wanted: {wanted}), at {_cost(row)}."
        )
    what = "time beyond doubt" if row["flops_ratio"] < 1 else "anything"
    return (
        f"No early exit saves {what} at {wanted} agreement: the cheapest that keeps it, "
        f"{_point(row)} ({_percent(row['agreement'])}), takes {_cost(row)}."
    )


def _doubt(points: Sequence[Row], found: Row, agreement: float) -> list[str]:
    """Say what becomes of the choice where the whole interval has to keep the agreement."""
    best, sure = found["best"], found["best_beyond_doubt"]
    if best is None or best == sure:
        return []
    low, high = points[best]["agreement_interval"]
    text = (
        f"The interval of its agreement, {_percent(low)} to {_percent(high)}, reaches below the "
        f"wanted {_percent(agreement)}. "
    )
    if sure is None:
        return [f"{text}None keeps it beyond doubt; more sequences would tell."]
    row = points[sure]
    return [
        f"{text}Beyond doubt is {_point(row)} ({_percent(row['agreement_interval'][0])} to "
        f"{_percent(row['agreement_interval'][1])}), at {_cost(row)}."
    ]


def _table_alone(points: Sequence[Row], found: Row) -> list[str]:
    """Name what would be cheaper still, were the table right about tokens that stay."""
    number, best = found["best_on_table"], found["best"]
    if number is None or (best is not None and _price(points[best]) <= _price(points[number])):
        return []
    row = points[number]
    return [
        f"On the table alone, {_point(row)} keeps {_percent(row['agreement'])} at {_cost(row)} "
        "(estimated): there every token that stays counts as predicted alike, so running it can "
        "only show whether it does. --measure runs it."
    ]


def _point(row: Row) -> str:
    head = "logit lens" if row["head"] == "logit_lens" else f"{row['head']} head"
    return f"layer {row['exit_layer']}, {row['rule']} >= {row['threshold']:.4g} with the {head}"


def _cost(row: Row) -> str:
    if row["flops_ratio"] is None:
        return "an unknown cost"
    # What hardly any token saves would read 1.00.
    text = f"{row['flops_ratio']:.3f} x the full model's operations"
    if row["seconds_ratio"] is None:
        return text
    interval = row["seconds_ratio_interval"]
    between = "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
    return f"{text} and {row['seconds_ratio']:.2f} x its time{between}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
