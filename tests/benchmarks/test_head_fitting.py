"""Test the benchmark of fitting heads. No test asserts a speed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.commands import Run

from cascade.benchmarks import head_fitting as benchmark
from cascade.benchmarks.head_fitting import HeadFittingBenchmark, HeadFittingBenchmarkConfig
from cascade.benchmarks.timing import BenchmarkError
from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.report.benchmarks.collection import head_fitting_benchmark_report
from cascade.report.common.sections import print_sections


def settings(saved: Path, **changes: Any) -> HeadFittingBenchmarkConfig:
    small = {"layers": (1, 3), "tokens": 160, "seq_len": 16, "batch_size": 4, "rounds": 2}
    return HeadFittingBenchmarkConfig(model=str(saved), **(small | changes))


@pytest.fixture(scope="module")
def record(saved: Path) -> HeadFittingBenchmark:
    return benchmark.benchmark_head_fitting(settings(saved), command="cascade bench fit")


def test_both_variants_process_the_same_batches(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {"bare": [], "fit": []}
    monkeypatch.setattr(
        benchmark, "bare_forward", lambda _, blocks, size: seen["bare"].append((blocks.ids, size))
    )
    monkeypatch.setattr(
        benchmark,
        "fit_heads",
        lambda _, blocks, layers, batch_size: seen["fit"].append((blocks.ids, batch_size, layers)),
    )
    benchmark.benchmark_head_fitting(settings(saved))
    assert len(seen["bare"]) == len(seen["fit"]) == 3  # two rounds and a warm-up round
    for (ids, size), (fitted, fitted_size, layers) in zip(*seen.values(), strict=True):
        assert (ids == fitted).all()
        assert ids.shape == (10, 16)
        assert size == fitted_size == 4
        assert layers == (1, 3)


def test_the_corpus_is_repeated_for_more_tokens_than_it_has(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "bare_forward", lambda *_: None)
    monkeypatch.setattr(benchmark, "fit_heads", lambda *_, **__: None)
    record = benchmark.benchmark_head_fitting(
        settings(saved, tokens=200_000, seq_len=64, layers=(3,))
    )
    corpus = record.provenance.corpus
    assert record.settings.tokens == corpus.tokens == 200_000


def test_the_record_has_the_ratio_and_its_target(record: HeadFittingBenchmark) -> None:
    (ratio,) = record.ratios
    by_hand = [
        fit / bare
        for fit, bare in zip(
            record.variants["fit"].seconds, record.variants["bare"].seconds, strict=True
        )
    ]
    assert ratio.name == "fit/bare"
    assert ratio.rounds == pytest.approx(by_hand)
    (target,) = record.targets
    assert (target.name, target.sense, target.limit) == ("fit/bare", "at most", 1.1)
    assert target.measured == ratio.median
    assert from_plain(json.loads(json.dumps(to_plain(record))), HeadFittingBenchmark) == record


def test_the_report_names_the_layers_and_refuses_another_kind(record: HeadFittingBenchmark) -> None:
    text = io.StringIO()
    print_sections(head_fitting_benchmark_report(record), Console(file=text, width=80))
    assert "layers 1, 3, in one pass" in text.getvalue()
    assert "fit/bare" in text.getvalue()
    with pytest.raises(SchemaError, match=r'at kind, got "bench\.decode"'):
        from_plain(to_plain(record) | {"kind": "bench.decode"}, HeadFittingBenchmark)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 15}, r"--tokens of at least 16 \(one sequence of --seq-len\), got 15"),
        ({"rounds": 1}, r"--rounds of at least 2 \(one round gives no interval\), got 1"),
        ({"batch_size": 0}, "--batch-size of at least 1, got 0"),
    ],
)
def test_a_number_that_is_too_small_is_refused(
    saved: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        settings(saved, **changes)


def test_the_command_writes_its_record_and_refuses_invalid_layers(
    run: Run, saved: Path, here: Path
) -> None:
    small = ("--tokens", 160, "--seq-len", 16, "--rounds", 2, "--model", saved)
    command = ("bench", "fit", *small, "--output", "out", "--layers")
    done = run(*command, "two")
    assert done.status == 2
    assert "expected layers such as" in done.err
    assert not Path("out").exists()
    done = run(*command, "1,3")
    assert done.status == 0, done.err
    assert json.loads(Path("out/bench.json").read_text())["kind"] == "bench.fit"
    assert "fit/bare" in done.out
