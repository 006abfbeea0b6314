"""Kernels are measured once; what was measured is stored and checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade.decoding.engine import choices
from cascade.decoding.engine.choices import choose_kernels
from cascade.decoding.engine.matrices import MOST, PLAIN, PLAIN_EXACT, TIMED, Choice, Shape
from cascade.decoding.engine.records import KernelRecord, PassRecord

SHAPE = Shape(512, 256, "float32", bias=False)
FOUND = Choice(
    ("linear", *["packed"] * (MOST - 1)),
    {"linear": (1.0, 2.0, 3.0, 4.0, 5.0), "packed": (2.0, 1.0, 1.0, 1.0, float("inf"))},
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Shape]:
    """Return the shapes that are measured from now on, with an empty cache."""
    shapes: list[Shape] = []

    def measure(shape: Shape) -> Choice:
        shapes.append(shape)
        return FOUND

    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "measure", measure)
    return shapes


def stored(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "kernels").glob("*.json"))


def test_stored_record_is_used(measured: list[Shape], tmp_path: Path) -> None:
    assert choose_kernels()(SHAPE) == FOUND
    assert choose_kernels()(SHAPE) == FOUND
    assert measured == [SHAPE]
    assert len(stored(tmp_path)) == 1


def test_kernels_are_chosen_once_for_equal_shapes(measured: list[Shape]) -> None:
    choose = choose_kernels()
    assert choose(SHAPE) is choose(Shape(512, 256, "float32", bias=False))


@pytest.mark.parametrize(
    "other",
    [
        Shape(513, 256, "float32", bias=False),
        Shape(512, 257, "float32", bias=False),
        Shape(512, 256, "bfloat16", bias=False),
        Shape(512, 256, "float32", bias=True),
    ],
)
def test_other_shapes_are_measured_themselves(other: Shape, measured: list[Shape]) -> None:
    choose_kernels()(SHAPE)
    choose_kernels()(other)
    assert measured == [SHAPE, other]


def test_other_thread_counts_are_measured_themselves(measured: list[Shape]) -> None:
    choose_kernels()(SHAPE)
    torch.set_num_threads(2)  # the fixture `one_thread` resets it
    choose_kernels()(SHAPE)
    assert len(measured) == 2


def cut(text: str) -> str:
    return text[: len(text) // 2]


def with_change(**changes: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda _: "",
        lambda _: "[]",
        with_change(kind="passes"),
        with_change(by_rows=["linear"]),
        with_change(by_rows=["linear", "transposed", *["packed"] * 14]),
        with_change(by_rows=["fast"] * MOST),
        with_change(milliseconds={"linear": [-1.0] * len(TIMED)}),
        with_change(schema=99),
    ],
    ids=["cut", "empty", "list", "kind", "short", "two copies", "unknown", "negative", "schema"],
)
def test_torn_record_is_measured_again(
    damage: Callable[[str], str], measured: list[Shape], tmp_path: Path
) -> None:
    choose_kernels()(SHAPE)
    (path,) = stored(tmp_path)
    path.write_text(damage(path.read_text()))
    assert choose_kernels()(SHAPE) == FOUND
    assert len(measured) == 2
    assert choose_kernels()(SHAPE) == FOUND  # and stored again
    assert len(measured) == 2


def test_cache_that_cannot_be_written_is_no_error(
    measured: list[Shape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("CASCADE_CACHE", str(blocked / "cache"))
    assert choose_kernels()(SHAPE) == FOUND
    assert choose_kernels()(SHAPE) == FOUND
    assert len(measured) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_measured_for_small_products(dtype: str, measured: list[Shape]) -> None:
    choice = choose_kernels()(Shape(64, 64, dtype, bias=False))
    assert choice == (PLAIN if dtype == "float32" else PLAIN_EXACT)
    assert measured == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_measured_without_onednn(
    dtype: str, measured: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    choice = choose_kernels()(Shape(512, 256, dtype, bias=False))
    assert choice == (PLAIN if dtype == "float32" else PLAIN_EXACT)
    assert measured == []


# --- Records --------------------------------------------------------------------------------

ABOUT = {
    "outputs": 512,
    "inputs": 256,
    "dtype": "float32",
    "bias": False,
    "processor": None,
    "capability": "AVX2",
    "threads": 1,
    "torch": "2.9",
}


def test_record_gives_the_choice_back() -> None:
    record = KernelRecord.of(ABOUT, FOUND)
    assert record.inconsistency() is None
    assert record.choice() == FOUND


@pytest.mark.parametrize(
    ("by_rows", "reason"),
    [
        (("linear",) * 3, "by_rows has 3 kernels, expected 16"),
        (
            ("packed", *["transposed"] * 15),
            "by_rows has two forms of copies, expected at most one",
        ),
    ],
)
def test_contradictory_kernel_record_is_found(by_rows: tuple[str, ...], reason: str) -> None:
    assert KernelRecord.of(ABOUT, Choice(by_rows)).inconsistency() == reason


@pytest.mark.parametrize(
    ("count", "reason"), [(8, None), (7, "milliseconds has 7 times, expected 8")]
)
def test_contradictory_pass_record_is_found(count: int, reason: str | None) -> None:
    record = PassRecord(
        model="abc",
        dtype="float32",
        engine="compiled",
        processor=None,
        threads=1,
        torch="2.9",
        milliseconds=[1.0] * count,
    )
    assert record.inconsistency() == reason
