"""The verdict on early exit, computed only from measured rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cascade.core.errors import RecordError
from cascade.core.formatting import percent, ratio_interval_words, ratio_words
from cascade.core.schema import UNSET, known
from cascade.evaluation.records import ControlPoints, OperatingPointRow, Verdict, WantedQuality

Rows = Sequence[OperatingPointRow]

#: Rules that other rules are compared with. They are not meant for use.
CONTROLS = ("fixed", "random", "oracle")

#: The figures that a verdict needs.
_FIGURES = ("agreement", "exit_share", "flops_ratio", "seconds_ratio")
_INTERVALS = ("agreement_interval", "perplexity_ratio_interval", "seconds_ratio_interval")

_QUALITY = ("agreement", "perplexity")


@dataclass(frozen=True)
class _Check:
    """One check of an operating point.

    Attributes:
        name: "agreement", "perplexity", "speed", "random" or "static".
        passed: Whether the point passed the check.
        text: The finding in one sentence.
    """

    name: str
    passed: bool
    text: str


def judge(rows: Rows, wanted: WantedQuality) -> Verdict:
    """Return whether any operating point is worth running instead of the full model.

    A point is worth running if its quality is sufficient, if it is significantly faster (95 %
    confidence interval), and if neither a random exit at the same share nor a static exit layer for
    all tokens performs as well. Of several such points, the fastest is chosen. If there is none,
    the verdict names the nearest: the fastest point of sufficient quality or, without one, the
    point with the smallest shortfall.

    Args:
        rows: The operating points of an evaluation, including controls.
        wanted: The required quality.

    Raises:
        RecordError: A figure of a row is missing or not a number.
    """
    for number, row in enumerate(rows):
        _check_row(number, row)
    candidates = [number for number, row in enumerate(rows) if _is_candidate(row)]
    checks = {number: _checks(number, rows, wanted) for number in candidates}
    failed = {number: _failed(checks[number]) for number in candidates}

    def lacks(number: int) -> float:
        return _shortfall(rows[number], wanted)

    def seconds(number: int) -> float:
        return rows[number].seconds_ratio

    good = [number for number in candidates if not {*_QUALITY} & {*failed[number]}]
    fast = [number for number in candidates if "speed" not in failed[number]]
    both = [number for number in good if number in fast]
    fine = [number for number in both if not failed[number]]
    point = min(fine or both or good or candidates, key=seconds if good else lacks, default=None)
    if point is None:
        return _without_point(
            "Do not use early exit here: no token exited at any measured point.", wanted
        )
    good_enough = min(good, key=seconds, default=None)
    faster = min(fast, key=lacks, default=None)
    return Verdict(
        use=bool(fine),
        point=point,
        headline=_headline(rows, point, failed[point], good_enough, faster),
        reasons=[check.text for check in checks[point]],
        failed=failed[point],
        good_enough=good_enough,
        faster=faster,
        against=ControlPoints(
            random=_random(rows[point], rows),
            static=_static(rows[point], rows),
            oracle=_oracle(rows[point], rows),
        ),
        wanted=wanted,
    )


def of_quality(rows: Rows, wanted: WantedQuality) -> list[int]:
    """Return the operating points of sufficient quality, the fastest first.

    Controls and points at which no token exits do not count. Unlike a verdict, this needs no
    controls, so it also judges given operating points.

    Args:
        rows: The operating points of an evaluation.
        wanted: The required quality.
    """
    good = [
        number
        for number, row in enumerate(rows)
        if _is_candidate(row)
        and row.agreement >= wanted.agreement
        and row.compared_ratio <= wanted.perplexity_ratio
    ]
    return sorted(good, key=lambda number: rows[number].seconds_ratio)


def _is_candidate(row: OperatingPointRow) -> bool:
    return row.rule not in CONTROLS and row.exit_share > 0


def no_verdict(wanted: WantedQuality) -> Verdict:
    """Return the empty verdict of given operating points, which have no controls.

    Args:
        wanted: The required quality.
    """
    text = "Not judged: only the given points were measured, without controls."
    return _without_point(text, wanted)


def _without_point(headline: str, wanted: WantedQuality) -> Verdict:
    return Verdict(
        use=False,
        point=None,
        headline=headline,
        reasons=[],
        failed=[],
        good_enough=None,
        faster=None,
        against=ControlPoints(random=None, static=None, oracle=None),
        wanted=wanted,
    )


def is_faster(seconds_ratio_interval: Sequence[float] | None, flops_ratio: float | None) -> bool:
    """Return whether early exit is significantly faster than the full model.

    Args:
        seconds_ratio_interval: The 95 % interval of the seconds divided by the full model's, or
            None.
        flops_ratio: The operations divided by the full model's, or None if they are unknown.
    """
    if seconds_ratio_interval is None or flops_ratio is None:
        return False
    return seconds_ratio_interval[1] < 1 and flops_ratio < 1


def _check_row(number: int, row: OperatingPointRow) -> None:
    figures = [getattr(row, name) for name in _FIGURES]
    for name in _INTERVALS:
        figures += getattr(row, name) or ()
    if row.perplexity_ratio is not None:
        figures.append(row.perplexity_ratio)
    elif row.nats_difference is UNSET:
        figures.append(math.nan)
    if not all(map(math.isfinite, figures)):
        names = ", ".join((*_FIGURES, "perplexity_ratio", *_INTERVALS))
        raise RecordError(
            f"expected finite numbers for {names}, got NaN or infinity at point {number} "
            f"({row.rule} at layer {row.exit_layer}); evaluate again"
        )


def _shortfall(row: OperatingPointRow, wanted: WantedQuality) -> float:
    """Return the shortfall from the required quality: a share of tokens plus nats per token."""
    tokens = max(0.0, wanted.agreement - row.agreement)
    return tokens + max(0.0, row.added_nats - math.log(wanted.perplexity_ratio))


def _checks(number: int, rows: Rows, wanted: WantedQuality) -> list[_Check]:
    row = rows[number]
    checks = [
        _Check(
            "agreement",
            row.agreement >= wanted.agreement,
            f"{percent(row.agreement)} of all tokens have the full model's prediction "
            f"({_between(row.agreement_interval, percent)}; target: {percent(wanted.agreement)})",
        ),
        _Check(
            "perplexity",
            row.compared_ratio <= wanted.perplexity_ratio,
            f"perplexity is {_relative(row)} ({_ratio_interval(row)}; target: at most "
            f"{wanted.perplexity_ratio:.3f})",
        ),
        _Check("speed", is_faster(row.seconds_ratio_interval, row.flops_ratio), _speed(row)),
    ]
    control = _random(row, rows)
    if control is not None:
        other = rows[control]
        beaten = _beaten_in(row, other)
        checks.append(
            _Check(
                "random",
                bool(beaten),
                f"random exit of {percent(other.exit_share)} at the same layer: "
                f"{_quality(other)} (the point is better in {_measures(beaten)})",
            )
        )
    static = _static(row, rows)
    if static is not None:
        other = rows[static]
        checks.append(
            _Check(
                "static",
                not _dominates(other, row),
                f"static exit at layer {other.exit_layer}, {other.seconds_ratio:.2f} x the time: "
                f"{_quality(other)}",
            )
        )
    return checks


def _failed(checks: Sequence[_Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def _beaten_in(row: OperatingPointRow, other: OperatingPointRow) -> list[str]:
    """Return the measures in which a point is significantly better than a control.

    One measure is enough, since separate checks limit the loss in the other.
    """
    better = {
        "agreement": row.agreement_interval[0] > other.agreement,
        "perplexity": row.compared_interval[1] < other.compared_ratio,
    }
    return [name for name, is_better in better.items() if is_better]


def _measures(names: Sequence[str]) -> str:
    return {0: "neither measure", 1: f"{''.join(names)} only"}.get(len(names), " and ".join(names))


def _dominates(other: OperatingPointRow, row: OperatingPointRow) -> bool:
    return bool(other.agreement >= row.agreement and other.added_nats <= row.added_nats)


def _random(row: OperatingPointRow, rows: Rows) -> int | None:
    """Return the random control of the same layer whose exit share is nearest."""
    found = [
        number
        for number, other in enumerate(rows)
        if other.rule == "random" and other.exit_layer == row.exit_layer
    ]
    return min(
        found, key=lambda number: abs(rows[number].exit_share - row.exit_share), default=None
    )


def _static(row: OperatingPointRow, rows: Rows) -> int | None:
    """Return the best static exit that is not slower; one that dominates the point comes first."""
    found = [
        number
        for number, other in enumerate(rows)
        if other.rule == "fixed" and other.seconds_ratio <= row.seconds_ratio
    ]
    return max(
        found,
        key=lambda number: (_dominates(rows[number], row), rows[number].agreement),
        default=None,
    )


def _oracle(row: OperatingPointRow, rows: Rows) -> int | None:
    return next(
        (
            number
            for number, other in enumerate(rows)
            if other.rule == "oracle" and other.exit_layer == row.exit_layer
        ),
        None,
    )


def _headline(
    rows: Rows,
    point: int,
    failed: Sequence[str],
    good_enough: int | None,
    faster: int | None,
) -> str:
    row = rows[point]
    if not failed:
        return (
            f"Use early exit here: {_point(row)} with the {row.head} head, "
            f"{percent(row.exit_share)} of the tokens exit."
        )
    if not {*_QUALITY, "speed"} & {*failed}:
        instead = {"random": "exiting at random", "static": "one static layer for all tokens"}
        return (
            f"Do not use early exit here: {_point(row)} is good enough and faster, but no better "
            f"than {' or '.join(instead[name] for name in failed)}."
        )
    if good_enough is not None:
        slow = f"(best: {_point(rows[good_enough])}, {_time(rows[good_enough])})"
        if faster is None:
            return (
                "Do not use early exit here: some operating points are good enough, but none is "
                f"significantly faster {slow}."
            )
        return (
            "Do not use early exit here: operating points that are good enough are not "
            f"significantly faster {slow}, and faster ones are not good enough (best: "
            f"{_point(rows[faster])}, {_quality(rows[faster])})."
        )
    return (
        "Do not use early exit here: no operating point is good enough (nearest: "
        f"{_point(row)}, {_quality(row)})."
    )


def _point(row: OperatingPointRow) -> str:
    return f"layer {row.exit_layer}, {row.rule} >= {row.threshold:.4g}"


def _quality(row: OperatingPointRow) -> str:
    words = ratio_words(row.perplexity_ratio, known(row.nats_difference))
    return f"perplexity {words}, agreement {percent(row.agreement)}"


def _relative(row: OperatingPointRow) -> str:
    words = ratio_words(row.perplexity_ratio, known(row.nats_difference))
    return f"{words}{' relative to' * (row.perplexity_ratio is None)} the full model's"


def _ratio_interval(row: OperatingPointRow) -> str:
    return ratio_interval_words(row.perplexity_ratio_interval, known(row.nats_difference_interval))


def _time(row: OperatingPointRow) -> str:
    interval = row.seconds_ratio_interval
    between = "no interval: one batch" if interval is None else _between(interval, _hundredths)
    return f"{_hundredths(row.seconds_ratio)} x the full model's time ({between})"


def _speed(row: OperatingPointRow) -> str:
    found = f"scoring takes {_time(row)}, {_hundredths(row.flops_ratio)} x its operations"
    if row.seconds_ratio_interval is None:
        found += "; one batch gives no interval, use a smaller --batch-size or more text"
    return found


def _between(interval: Sequence[float], show: Callable[[float], str]) -> str:
    return f"{show(interval[0])} to {show(interval[1])}"


def _hundredths(value: float) -> str:
    return f"{value:.2f}"
