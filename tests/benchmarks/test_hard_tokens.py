"""Test the benchmark of collecting hard tokens. No test asserts a speed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from cascade.benchmarks import hard_tokens as benchmark
from cascade.benchmarks.hard_tokens import HardTokenBenchmark, HardTokenBenchmarkConfig
from cascade.benchmarks.timing import BenchmarkError
from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.models.stack import DecoderStack
from cascade.report.benchmarks.collection import hard_token_benchmark_report
from cascade.report.common.sections import print_sections


def settings(saved: Path, **changes: Any) -> HardTokenBenchmarkConfig:
    small = {"tokens": 160, "seq_len": 16, "batch_size": 4, "rounds": 2}
    return HardTokenBenchmarkConfig(model=str(saved), **(small | changes))


@pytest.fixture(scope="module")
def record(saved: Path) -> HardTokenBenchmark:
    return benchmark.benchmark_hard_tokens(settings(saved), command="cascade bench collect-hard")


def test_both_variants_compute_the_same_batches_in_every_round(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Any]] = []
    visit = DecoderStack.visit

    def watched(self: DecoderStack, ids: torch.Tensor, visitor: Any) -> Any:
        if seen:  # not the check before the rounds
            seen[-1].append(ids.numpy())
        return visit(self, ids, visitor)

    for name in ("bare_visit", "collect"):
        run = getattr(benchmark, name)
        monkeypatch.setattr(benchmark, name, lambda *given, run=run: (seen.append([]), run(*given)))
    monkeypatch.setattr(DecoderStack, "visit", watched)
    benchmark.benchmark_hard_tokens(settings(saved))
    assert len(seen) == 6  # two variants, two rounds and a warm-up round
    for batches in seen:
        assert [len(ids) for ids in batches] == [4, 4, 2]
        assert all(np.array_equal(a, b) for a, b in zip(batches, seen[0], strict=True))


def test_the_record_has_the_ratio_and_its_target(record: HardTokenBenchmark) -> None:
    (ratio,), (target,) = record.ratios, record.targets
    collect, bare = (record.variants[name].seconds for name in ("collect", "bare"))
    assert ratio.name == "collect/bare"
    assert ratio.rounds == pytest.approx([a / b for a, b in zip(collect, bare, strict=True)])
    assert (target.name, target.sense, target.limit) == ("collect/bare", "at most", 1.15)
    assert target.measured == ratio.median
    assert (record.settings.layer, record.settings.tokens) == (3, 160)
    assert from_plain(json.loads(json.dumps(to_plain(record))), HardTokenBenchmark) == record


def test_the_report_has_the_ratio_and_refuses_another_kind(record: HardTokenBenchmark) -> None:
    text = io.StringIO()
    print_sections(hard_token_benchmark_report(record), Console(file=text, width=80))
    assert "layer 3" in text.getvalue()
    assert "collect/bare" in text.getvalue()
    with pytest.raises(SchemaError, match=r'at kind, got "bench\.fit"'):
        from_plain(to_plain(record) | {"kind": "bench.fit"}, HardTokenBenchmark)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 79}, "--tokens of at least 80, got 79"),
        ({"rounds": 1}, r"--rounds of at least 2 \(one round gives no interval\), got 1"),
        ({"batch_size": 0}, "--batch-size of at least 1, got 0"),
    ],
)
def test_a_number_that_is_too_small_is_refused(
    saved: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        settings(saved, **changes)
