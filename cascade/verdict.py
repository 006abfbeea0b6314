"""The verdict: whether early exit pays, from measured rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

#: Rules that are yardsticks: nobody runs them to save work.
CONTROLS = ("fixed", "random", "oracle")


def judge(rows: Sequence[Row], *, agreement: float, perplexity_ratio: float) -> Row:
    """Say whether any measured point is worth running instead of the full model.

    A point is worth it when its outputs are good enough, it is faster beyond doubt, and neither
    a random exit at the same share nor one static layer for all tokens does as well.

    Args:
        rows: The points of an evaluation, controls among them.
        agreement: The least share of tokens whose prediction is the full model's.
        perplexity_ratio: The largest perplexity, relative to the full model's.

    Returns:
        `use`, `point` (index of the point to use, or of the one that came nearest), `headline`,
        `reasons` (one sentence per comparison) and `against` (the indices compared with).
    """
    candidates = [number for number, row in enumerate(rows) if row["rule"] not in CONTROLS]
    if not candidates:
        return {
            "use": False,
            "point": None,
            "headline": "Do not use early exit here: no rule was measured.",
            "reasons": [],
            "against": {},
        }
    checks = {number: _checks(number, rows, agreement, perplexity_ratio) for number in candidates}
    # The more checks it passes the nearer; among equals the faster.
    best = max(
        candidates,
        key=lambda number: (
            sum(check["passed"] for check in checks[number]),
            -rows[number]["seconds_ratio"],
        ),
    )
    use = all(check["passed"] for check in checks[best])
    return {
        "use": use,
        "point": best,
        "headline": _headline(rows[best], use),
        "reasons": [check["text"] for check in checks[best]],
        "failed": [check["name"] for check in checks[best] if not check["passed"]],
        "against": {
            "random": _random(rows[best], rows),
            "static": _static(rows[best], rows),
            "oracle": _oracle(rows[best], rows),
        },
        "wanted": {"agreement": agreement, "perplexity_ratio": perplexity_ratio},
    }


def _checks(number: int, rows: Sequence[Row], agreement: float, perplexity: float) -> list[Row]:
    row = rows[number]
    checks = [
        _check(
            "agreement",
            row["agreement"] >= agreement,
            f"{_percent(row['agreement'])} of all tokens are predicted as by the full model "
            f"(wanted: {_percent(agreement)})",
        ),
        _check(
            "perplexity",
            row["perplexity_ratio"] <= perplexity,
            f"perplexity is {row['perplexity_ratio']:.3f} x the full model's "
            f"(wanted: at most {perplexity:.3f})",
        ),
        _check("speed", _is_faster(row), _speed(row)),
    ]
    control = _random(row, rows)
    if control is not None:
        other = rows[control]
        checks.append(
            _check(
                "random",
                row["perplexity_ratio"] < other["perplexity_ratio"]
                and row["agreement"] > other["agreement"],
                f"random exit of {_percent(other['exit_share'])} at the same layer: perplexity "
                f"{other['perplexity_ratio']:.3f} x, agreement {_percent(other['agreement'])}",
            )
        )
    static = _static(row, rows)
    if static is not None:
        other = rows[static]
        checks.append(
            _check(
                "static",
                other["perplexity_ratio"] > row["perplexity_ratio"]
                or other["agreement"] < row["agreement"],
                f"every token leaving at layer {other['exit_layer']} takes "
                f"{other['seconds_ratio']:.2f} x the time: perplexity "
                f"{other['perplexity_ratio']:.3f} x, agreement {_percent(other['agreement'])}",
            )
        )
    return checks


def _check(name: str, passed: bool, text: str) -> Row:
    return {"name": name, "passed": bool(passed), "text": text}


def _is_faster(row: Row) -> bool:
    interval = row["seconds_ratio_interval"]
    return interval is not None and interval[1] < 1 and row["flops_ratio"] < 1


def _speed(row: Row) -> str:
    interval = row["seconds_ratio_interval"]
    between = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else " (no interval)"
    return (
        f"scoring takes {row['seconds_ratio']:.2f} x the full model's time{between}, "
        f"{row['flops_ratio']:.2f} x its operations"
    )


def _random(row: Row, rows: Sequence[Row]) -> int | None:
    """Return the random control of the same layer whose exit share is nearest."""
    found = [
        number
        for number, other in enumerate(rows)
        if other["rule"] == "random" and other["exit_layer"] == row["exit_layer"]
    ]
    if not found:
        return None
    return min(found, key=lambda number: abs(rows[number]["exit_share"] - row["exit_share"]))


def _static(row: Row, rows: Sequence[Row]) -> int | None:
    """Return the deepest static exit that is no slower than the point."""
    found = [
        number
        for number, other in enumerate(rows)
        if other["rule"] == "fixed" and other["seconds_ratio"] <= row["seconds_ratio"]
    ]
    return max(found, key=lambda number: rows[number]["exit_layer"], default=None)


def _oracle(row: Row, rows: Sequence[Row]) -> int | None:
    return next(
        (
            number
            for number, other in enumerate(rows)
            if other["rule"] == "oracle" and other["exit_layer"] == row["exit_layer"]
        ),
        None,
    )


def _headline(row: Row, use: bool) -> str:
    point = (
        f"layer {row['exit_layer']}, {row['rule']} >= {row['threshold']:.4g} with the "
        f"{row['head']} head"
    )
    if use:
        return f"Use early exit here: {point}, {_percent(row['exit_share'])} of the tokens leave."
    return f"Do not use early exit here. Nearest to paying: {point}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
