"""Typed records survive a round trip, and errors name the place of a wrong value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.core.errors import RecordError
from cascade.core.records import to_json, typed
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Interval,
    Part,
    Positive,
    SchemaError,
    Share,
    StoredRecord,
    Text,
    UnsetType,
    from_plain,
    known,
    to_plain,
)
from cascade.record_kinds import KINDS, json_schema, record_type


class Point(Part, frozen=True, kw_only=True):
    layer: Count
    share: Share
    interval: Interval | None = None
    threshold: Finite | UnsetType = UNSET
    rule: Literal["cosine", "top2_gap"] = "cosine"


class Points(StoredRecord, frozen=True, kw_only=True):
    KIND: ClassVar[str] = "points"
    COMMAND: ClassVar[str] = "measure"

    schema: int = 1
    kind: Literal["points"] = "points"
    points: list[Point]
    seconds: dict[str, float | str] = msgspec.field(default_factory=dict)
    certificate: Point | None


def a_record(**changes: Any) -> dict[str, Any]:
    point = {"layer": 3, "share": 0.5, "interval": [0, 1]} | changes
    return {"points": [point], "certificate": None}


def error_of(value: Any, kind: Any) -> str | None:
    try:
        from_plain(value, kind)
    except SchemaError as error:
        return str(error)
    return None


def message(value: Any, kind: Any) -> str:
    found = error_of(value, kind)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "record",
    [
        a_record(),
        a_record(interval=None),
        a_record(more="than that"),
        {"points": [], "certificate": None},
        {"points": [{"layer": 3, "share": 0.5}], "certificate": None},
    ],
)
def test_valid_record_is_read_and_unknown_keys_are_ignored(record: dict[str, Any]) -> None:
    found = from_plain(record, Points)
    assert [point.layer for point in found.points] == [3] * len(record["points"])
    assert "more" not in to_json(to_plain(found))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "expected an object, got null"),
        ([], "expected an object, got []"),
        ({}, "expected a list at points, got nothing"),
        ({"points": None}, "expected a list at points, got null"),
        ({"points": [None]}, "expected an object at points[0], got null"),
        ({"points": []}, "expected an object or null at certificate, got nothing"),
        ({"points": [{}]}, "expected a whole number from 1 on at points[0].layer, got nothing"),
        (a_record(layer=True), "expected a whole number from 1 on at points[0].layer, got true"),
        (a_record(layer=0), "expected a whole number from 1 on at points[0].layer, got 0"),
        (a_record(share="0.5"), 'expected a share in 0..1 at points[0].share, got "0.5"'),
        (a_record(share=math.nan), "expected a share in 0..1 at points[0].share, got NaN"),
        (
            a_record(threshold=None),
            "expected a finite number at points[0].threshold, got null",
        ),
        (
            a_record(threshold=math.inf),
            "expected a finite number at points[0].threshold, got Infinity",
        ),
        (
            a_record(threshold=10**400),
            f"expected a finite number at points[0].threshold, got {'1':0<37}...",
        ),
        (
            a_record(interval=[1]),
            "expected two finite numbers or null at points[0].interval, got [1]",
        ),
        (
            a_record(interval=[1, math.nan]),
            "expected a finite number at points[0].interval[1], got NaN",
        ),
        (a_record(rule="x"), 'expected one of cosine, top2_gap at points[0].rule, got "x"'),
        (a_record(share="x" * 100), f'at points[0].share, got "{"x" * 36}...'),
        (a_record() | {"kind": "other"}, 'expected "points" at kind, got "other"'),
        (
            a_record() | {"seconds": {"whole": 1.5, "head": [2]}},
            "expected a number or text at seconds.head, got [2]",
        ),
    ],
)
def test_error_names_the_first_wrong_value_and_its_place(record: Any, words: str) -> None:
    assert words in message(record, Points)


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (Finite, [0, -1.5], [True, None, "1", math.inf, -math.inf, math.nan, 10**400, [], {}]),
        (Positive, [1, 1e-9], [0, -1, math.inf, "1", False]),
        (Share, [0, 1, 0.5], [-0.1, 1.1, True, None, math.nan]),
        (Count, [1, 30], [0, -1, 1.0, True, "1"]),
        (Index, [0, 7], [-1, 0.5, False, "0", None]),
        (Interval, [[0, 1]], [[], [1], [1, 2, 3], [1, math.nan], "12", None]),
        (Text, ["a"], ["", None, 1, ["a"]]),
        (bool, [True, False], [0, 1, None, "true"]),
        (Literal["frozen", "ridge"], ["ridge"], ["thawed", None, [], ["ridge"], {}]),
    ],
)
def test_each_type_accepts_only_its_values(kind: Any, right: list[Any], wrong: list[Any]) -> None:
    assert [from_plain(value, kind) for value in right] == right
    for value in wrong:
        assert message(value, kind).startswith("expected ")


finite = st.floats(allow_nan=False, allow_infinity=False)
points = st.builds(
    Point,
    layer=st.integers(1, 10**6),
    share=st.floats(0, 1),
    interval=st.none() | st.lists(finite, min_size=2, max_size=2),
    threshold=st.just(UNSET) | finite,
    rule=st.sampled_from(["cosine", "top2_gap"]),
)
records = st.builds(
    Points,
    points=st.lists(points, max_size=3),
    seconds=st.dictionaries(st.text(max_size=4), finite | st.text(max_size=4), max_size=3),
    certificate=st.none() | points,
)


@given(records)
def test_records_survive_a_round_trip(record: Points) -> None:
    plain = to_plain(record)
    assert from_plain(plain, Points) == record
    assert to_plain(from_plain(plain, Points)) == plain
    assert list(plain)[:2] == ["schema", "kind"]


@given(points)
def test_unset_fields_are_omitted_and_none_is_written(point: Point) -> None:
    plain = to_plain(point)
    assert ("threshold" in plain) == (point.threshold is not UNSET)
    assert "interval" in plain


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["points", "layer", "share", "interval", "seconds", "kind"]), inner
        )
    ),
)


@given(values)
def test_any_value_is_accepted_or_gives_a_one_line_error(value: Any) -> None:
    found = error_of(value, Points)
    assert found is None or (found.startswith("expected ") and "\n" not in found)


def test_numpy_numbers_are_stored_as_plain_numbers() -> None:
    plain = to_plain({"layer": np.int64(3), "share": np.float64(0.5)})
    assert to_json(plain) == '{"layer": 3, "share": 0.5}'


def test_unsupported_value_is_rejected_by_type() -> None:
    with pytest.raises(NotImplementedError, match="a complex cannot be stored in a record"):
        to_plain({"value": 1j})


def test_known_returns_none_for_an_unset_field() -> None:
    assert known(UNSET) is None
    assert known(None) is None
    assert known(0) == 0


# --- Values of earlier releases --------------------------------------------------------------


class Judged(Part, frozen=True, kw_only=True):
    outcome: Literal["significant", "kept"]


class Judgement(StoredRecord, frozen=True, kw_only=True):
    KIND: ClassVar[str] = "judgement"
    COMMAND: ClassVar[str] = "judge"
    RENAMED: ClassVar[dict[tuple[str, str], dict[str, str]]] = {
        ("points", "outcome"): {"beyond doubt": "significant"}
    }

    points: list[Judged]


def test_values_of_earlier_releases_are_read_as_todays() -> None:
    stored = {"points": [{"outcome": "beyond doubt"}, {"outcome": "kept"}]}
    record = typed(stored, Judgement, Path("record.json"))
    assert [point.outcome for point in record.points] == ["significant", "kept"]
    assert stored["points"][0] == {"outcome": "beyond doubt"}, "the plain record is unchanged"


@pytest.mark.parametrize(
    "points", [None, "points", ["beyond doubt"], [{"outcome": None}], [{"outcome": "lost"}], [{}]]
)
def test_renaming_values_hides_no_wrong_type(points: Any) -> None:
    with pytest.raises(RecordError, match="is torn or edited"):
        typed({"points": points}, Judgement, Path("record.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_renamed_values_are_values_that_the_type_allows(kind: str) -> None:
    own = record_type(kind)
    definitions = json_schema(kind)["$defs"]
    fields = definitions[own.__name__]["properties"]
    for (rows, column), names in own.RENAMED.items():
        row = definitions[fields[rows]["items"]["$ref"].rpartition("/")[2]]
        allowed = row["properties"][column]["enum"]
        assert set(names.values()) <= set(allowed)
        assert not set(names) & set(allowed)
