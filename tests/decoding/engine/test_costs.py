"""Passes are timed once; the times are stored and checked when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import random_ids, tiny_model
from torch import Tensor

from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.engine.costs import MOST, TIMED, _interpolated, pass_costs
from cascade.decoding.engine.engine import DecodingEngine
from cascade.decoding.engine.passes import EnginePasses, OwnPasses
from cascade.decoding.growing_text import Generation
from cascade.decoding.lossless import Branch, Passes
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine look quiet: times that others may have disturbed are not stored."""
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


class Counted:
    """Passes that compute nothing, and what they were asked for."""

    trees = True
    most = 32
    milliseconds: Sequence[float] = [1.0]
    description = "counted"
    joins = False

    def __init__(self, capacity: int) -> None:
        self.capacity, self.counts = capacity, Counts.of(4)
        self.sizes: list[int] = []
        self.start = 0

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, None]:
        self.start = len(prompts[0])
        return torch.zeros(1, 8), None

    def run(self, branches: Sequence[Branch]) -> tuple[Tensor, None]:
        (branch,) = branches
        assert branch.column == self.start
        assert branch.column + len(branch.tokens) <= self.capacity
        self.sizes.append(len(branch.tokens))
        return torch.zeros(len(branch.tokens), 8), None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def move(self, row: int, columns: Any) -> None:
        pass


@pytest.fixture
def stack() -> DecoderStack:
    return DecoderStack(tiny_model("llama"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Counted]:
    """Return the passes that are made from now on, with an empty cache."""
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    return []


def costs_of(stack: DecoderStack, made: list[Counted], what: str = "counted") -> list[float]:
    def make(capacity: int) -> Passes:
        made.append(Counted(capacity))
        return made[-1]

    return pass_costs(stack, what, make)


@given(times=st.lists(st.floats(1e-3, 1e3), min_size=len(TIMED), max_size=len(TIMED)))
def test_costs_never_fall(times: list[float]) -> None:
    costs = _interpolated(times)
    assert len(costs) == MOST
    assert costs == sorted(costs)
    # Sums of two shares of one.
    assert max(costs) <= max(times) * (1 + 1e-9)


@given(times=st.lists(st.floats(1e-3, 1e3), min_size=len(TIMED), max_size=len(TIMED)).map(sorted))
def test_costs_of_timed_passes_are_their_times(times: list[float]) -> None:
    costs = _interpolated(times)
    for count, time in zip(TIMED, times, strict=True):
        assert costs[count - 1] == pytest.approx(time, rel=1e-9)


def test_costs_in_between_are_interpolated() -> None:
    costs = _interpolated([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0])
    assert costs == pytest.approx(list(range(1, 17)))


def test_passes_are_timed_once(stack: DecoderStack, made: list[Counted]) -> None:
    costs = costs_of(stack, made)
    assert costs_of(stack, made) == costs
    assert len(made) == 1
    assert {*made[0].sizes} == {*TIMED}


def test_what_decides_the_time_is_part_of_the_key(stack: DecoderStack, made: list[Counted]) -> None:
    costs_of(stack, made)
    costs_of(stack, made, "another engine")
    costs_of(DecoderStack(tiny_model("llama", num_layers=3)), made)
    torch.set_num_threads(2)  # the fixture `one_thread` resets it
    costs_of(stack, made)
    assert len(made) == 4


def cut(text: str) -> str:
    return text[: len(text) // 2]


def with_change(**changes: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda _: "",
        with_change(kind="kernels"),
        with_change(milliseconds=[1.0]),
        with_change(milliseconds=[-1.0] * len(TIMED)),
        with_change(milliseconds=["fast"] * len(TIMED)),
    ],
    ids=["cut", "empty", "kind", "short", "negative", "text"],
)
def test_broken_record_is_measured_again(
    damage: Callable[[str], str], stack: DecoderStack, made: list[Counted], tmp_path: Path
) -> None:
    costs_of(stack, made)
    (path,) = (tmp_path / "cache" / "kernels").glob("passes-*.json")
    path.write_text(damage(path.read_text()))
    costs = costs_of(stack, made)
    assert len(made) == 2
    assert costs_of(stack, made) == costs
    assert len(made) == 2


def test_cache_that_cannot_be_written_is_no_error(
    stack: DecoderStack, made: list[Counted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "file" / "cache"))
    costs = costs_of(stack, made)
    assert costs_of(stack, made) == costs
    assert len(made) == 1


def test_a_busy_machine_is_timed_once_in_a_process(
    stack: DecoderStack, made: list[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timing takes dozens of passes, as many as a short generation."""
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    costs = costs_of(stack, made)
    assert costs_of(stack, made) == costs
    assert len(made) == 1
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    for _ in range(2):
        costs_of(stack, made)
    assert len(made) == 2


@pytest.mark.parametrize("positions", [1, 4, 5, 6, 19, 20, 21])
def test_no_pass_exceeds_the_positions_of_a_model(positions: int, made: list[Counted]) -> None:
    stack = DecoderStack(tiny_model("gpt2", n_positions=max(positions, 8)))
    stack.max_positions = positions
    costs = costs_of(stack, made)
    assert len(costs) == MOST
    assert costs == sorted(costs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("positions", [6, 12])
def test_model_with_few_positions_generates(
    family: str, positions: int, made: list[Counted]
) -> None:
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    stack = DecoderStack(tiny_model(family, **{name: positions}))
    ids = random_ids(1, 3)
    expected = stack.model.generate(  # type: ignore[operator]
        ids, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=positions - 3
    )
    generation = EarlyExit(stack).generate(
        ids,
        do_sample=False,
        eos_token_id=(),
        max_new_tokens=positions - 3,
        verify=True,
        return_dict_in_generate=True,
    )
    assert isinstance(generation, Generation)
    assert torch.equal(generation.sequences, expected)


@pytest.mark.parametrize("kind", ["engine", "own"])
def test_real_passes_are_timed(kind: str, stack: DecoderStack, made: list[Counted]) -> None:
    engine = DecodingEngine(stack)

    def make(capacity: int) -> Passes:
        if kind == "engine":
            return EnginePasses(engine, 1, capacity, [1.0])
        return OwnPasses(stack, 1, capacity, [1.0], reason="a test")

    costs = pass_costs(stack, kind, make)
    assert len(costs) == MOST
    assert 0 < costs[0] <= costs[-1]


def test_times_of_a_busy_machine_are_not_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    early = EarlyExit(DecoderStack(tiny_model("llama")))
    early.generate(random_ids(1, 5), max_new_tokens=3, verify=True)
    assert list(tmp_path.glob("kernels/passes-*")) == []
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    early.generate(random_ids(1, 5), max_new_tokens=3, verify=True)
    assert len(list(tmp_path.glob("kernels/passes-*"))) == 1
