"""The table fixture of conftest.py fails where the one that it is built on passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Check = Callable[[list[dict[str, Any]]], None]

ROWS = [{"layer": "1", "mean": 0.5, "std": 0.25}, {"layer": "1+norm", "mean": 0.75, "std": 0.125}]


@pytest.fixture
def check(strict_table: Check, request: pytest.FixtureRequest) -> Check:
    # Every test here looks at one stored table, whatever its own name.
    request.node.name = "stored"
    return strict_table


def test_the_stored_table_passes(check: Check) -> None:
    check(ROWS)


@pytest.mark.parametrize("statistic", ["mean", "std"])
def test_a_missing_column_fails(check: Check, statistic: str) -> None:
    with pytest.raises(AssertionError):
        check([{k: v for k, v in row.items() if k != statistic} for row in ROWS])


def test_an_added_column_fails(check: Check) -> None:
    with pytest.raises(AssertionError):
        check([row | {"p50": 0.5} for row in ROWS])


def test_a_missing_or_renamed_layer_fails(check: Check) -> None:
    with pytest.raises(AssertionError):
        check(ROWS[:1])
    with pytest.raises(AssertionError):
        check([ROWS[0], ROWS[1] | {"layer": "2"}])


def test_nan_fails(check: Check) -> None:
    with pytest.raises(AssertionError, match="NaN"):
        check([ROWS[0], ROWS[1] | {"std": float("nan")}])


def test_a_changed_number_fails(check: Check) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check([ROWS[0] | {"mean": 0.5002}, ROWS[1]])
