"""Shapes find the first place where a stored thing is not what it should be."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.core.shapes import (
    COUNT,
    FLAG,
    INTERVAL,
    NUMBER,
    POSITIVE,
    SHARE,
    TEXT,
    WHOLE,
    Kind,
    Maybe,
    flaw,
    one_of,
)

POINTS = {"points": [{"layer": COUNT, "share": SHARE, "interval": Maybe(INTERVAL)}]}


def a_record(**changes: Any) -> dict[str, Any]:
    return {"points": [{"layer": 3, "share": 0.5, "interval": [0, 1]} | changes]}


@pytest.mark.parametrize(
    "record", [a_record(), a_record(interval=None), a_record(more="than that"), {"points": []}]
)
def test_a_whole_record_has_no_flaw(record: Any) -> None:
    assert flaw(record, POINTS) is None


def test_what_may_be_null_may_be_missing() -> None:
    assert flaw({"points": [{"layer": 3, "share": 0.5}]}, POINTS) is None


def test_what_may_be_null_can_have_to_be_there() -> None:
    shape = {"certificate": Maybe({"threshold": NUMBER}, present=True)}
    assert flaw({"certificate": None}, shape) is None
    assert flaw({"certificate": {"threshold": 1}}, shape) is None
    assert flaw({}, shape) == "expected an object or null at certificate, got nothing"
    assert flaw({"certificate": {}}, shape) is not None


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "expected an object, got null"),
        ([], "expected an object, got []"),
        ({}, "expected a list at points, got nothing"),
        ({"points": None}, "expected a list at points, got null"),
        ({"points": [None]}, "expected an object at points[0], got null"),
        ({"points": [{}]}, "expected a whole number from 1 on at points[0].layer, got nothing"),
        (a_record(layer=True), "expected a whole number from 1 on at points[0].layer, got true"),
        (a_record(share="0.5"), 'expected a share in 0..1 at points[0].share, got "0.5"'),
        (a_record(share=math.nan), "expected a share in 0..1 at points[0].share, got NaN"),
        (a_record(interval=[1]), "expected two finite numbers at points[0].interval, got [1]"),
        (a_record(share="x" * 100), f'at points[0].share, got "{"x" * 36}...'),
    ],
)
def test_the_first_flaw_is_named_with_its_place(record: Any, words: str) -> None:
    found = flaw(record, POINTS)
    assert found is not None
    assert words in found


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (NUMBER, [0, -1.5], [True, None, "1", math.inf, math.nan, 10**400, [], {}]),
        (POSITIVE, [1, 1e-9], [0, -1, math.inf, "1", False]),
        (SHARE, [0, 1, 0.5], [-0.1, 1.1, True, None]),
        (COUNT, [1, 30], [0, -1, 1.0, True, "1"]),
        (WHOLE, [0, 7], [-1, 0.5, False, "0", None]),
        (INTERVAL, [[0, 1]], [[], [1], [1, 2, 3], [1, math.nan], "12", None]),
        (TEXT, ["a"], ["", None, 1, ["a"]]),
        (FLAG, [True, False], [0, 1, None, "true"]),
        (one_of("frozen", "ridge"), ["ridge"], ["thawed", None, [], ["ridge"], {}]),
    ],
)
def test_every_kind_knows_its_own(kind: Kind, right: list[Any], wrong: list[Any]) -> None:
    assert [flaw(value, kind) for value in right] == [None] * len(right)
    assert all(flaw(value, kind) for value in wrong)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["points", "layer", "share", "interval"]), inner)
    ),
)


@given(values)
def test_anything_at_all_is_answered_in_one_line(value: Any) -> None:
    found = flaw(value, POINTS)
    assert found is None or (found.startswith("expected ") and "\n" not in found)
