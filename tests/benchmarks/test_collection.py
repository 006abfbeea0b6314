"""Test the benchmark of collecting: variants do equal work. No test asserts a speed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from rich.console import Console

from cascade.benchmarks import collection as benchmark
from cascade.benchmarks.collection import (
    Agreement,
    CollectionBenchmark,
    CollectionBenchmarkConfig,
    LargestDifference,
    collection_targets,
)
from cascade.benchmarks.records import Ratio, Target
from cascade.benchmarks.timing import BenchmarkError
from cascade.cli import main
from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.models.stack import DecoderStack
from cascade.report.benchmarks.collection import collection_benchmark_report
from cascade.report.common.sections import print_sections

ROUNDS = 3


def settings(saved: Path, **changes: Any) -> CollectionBenchmarkConfig:
    small = {"tokens": 256, "seq_len": 16, "batch_size": 4, "rounds": ROUNDS}
    return CollectionBenchmarkConfig(model=str(saved), **(small | changes))


@pytest.fixture(scope="module")
def record(saved: Path) -> CollectionBenchmark:
    # Set the number here, because function-scoped fixtures run later. The record stores it.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = benchmark.benchmark_collection(settings(saved), memory=False)
    torch.set_num_threads(before)
    return made


# --- The record ------------------------------------------------------------------------------


def test_threads_are_pinned_while_variants_run_and_restored_after_a_failure(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    before = torch.get_num_threads()
    seen: list[int] = []

    def fail(*_: Any, **__: Any) -> None:
        seen.append(torch.get_num_threads())
        raise RuntimeError("a variant broke")

    monkeypatch.setattr(benchmark, "bare_forward", fail)
    with pytest.raises(RuntimeError, match="a variant broke"):
        benchmark.benchmark_collection(settings(saved, threads=before + 1), memory=False)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_the_record_has_every_variant_with_one_time_per_round(record: CollectionBenchmark):
    assert (record.schema, record.kind) == (1, "bench.collect")
    assert {"seed_fp32", "bare_fp32", "analyze_fp32", "bare_bf16", "analyze_bf16"} < set(
        record.variants
    )
    for times in record.variants.values():
        assert len(times.seconds) == ROUNDS
        assert all(seconds > 0 for seconds in times.seconds)
        assert times.tokens_per_second == pytest.approx(256 / np.median(times.seconds))
    assert [sorted(order) for order in record.order] == [sorted(record.variants)] * ROUNDS
    assert all(len(row.rounds) == ROUNDS for row in record.ratios)


def test_the_record_names_model_machine_and_versions(record: CollectionBenchmark, saved: Path):
    assert record.settings.tokens == 256
    assert record.settings.threads == 1
    provenance = record.provenance
    assert provenance.model.num_layers == 4
    assert provenance.model.dtype == "float32"
    assert provenance.machine.threads == torch.get_num_threads()
    assert provenance.versions["torch"] == torch.__version__
    assert record.peer.rebuilt is True


def test_the_record_has_the_largest_differences_between_variants(record: CollectionBenchmark):
    # The tokens are equal. The original study's pass differs by fp32 rounding, bf16 has about 3
    # significant digits.
    assert abs(record.agreement.seed.difference) < 1e-5
    assert 0 < abs(record.agreement.bf16.difference) < 0.1
    assert record.agreement.bf16.layer in {"1", "2", "3", "4", "4+norm"}


def test_bf16_variants_run_in_bf16(saved: Path, monkeypatch: pytest.MonkeyPatch):
    dtypes: dict[str, set[torch.dtype]] = {"bare": set(), "analyze": set()}
    for name, function in (("bare", "bare_forward"), ("analyze", "analyze")):
        real = getattr(benchmark, function)

        def spy(stack: DecoderStack, *args: Any, _n: str = name, _r: Any = real, **kw: Any) -> Any:
            dtypes[_n].add(stack.dtype)
            return _r(stack, *args, **kw)

        monkeypatch.setattr(benchmark, function, spy)
    benchmark.benchmark_collection(settings(saved, rounds=2), memory=False)
    both = {torch.float32, torch.bfloat16}
    assert dtypes == {"bare": both, "analyze": both}


def found(**medians: float) -> list[Ratio]:
    names = ("analyze_fp32/bare_fp32", "seed_fp32/analyze_fp32", "seed_fp32/analyze_bf16")
    return [
        Ratio(name=name, median=median, interval=[median, median], rounds=[])
        for name, median in zip(names, medians.values(), strict=True)
    ]


@pytest.mark.parametrize(
    ("ratios", "shift", "growth", "met"),
    [
        ((1.05, 1.3, 2.4), -2e-3, 9.99, [True, True, True, True, True]),
        ((1.051, 1.29, 2.39), -2.1e-3, 10.0, [False, False, False, False, False]),
        ((1.0, 2.0, 3.0), 0.0, None, [True, True, True, True, None]),
    ],
)
def test_targets_are_met_up_to_their_limit_and_undecided_without_a_measurement(
    ratios: tuple[float, ...], shift: float, growth: float | None, met: list[bool | None]
):
    difference = LargestDifference(layer="1", difference=shift)
    rows = collection_targets(
        found(a=ratios[0], b=ratios[1], c=ratios[2]),
        Agreement(bf16=difference, seed=difference),
        growth,
    )
    assert [row.met for row in rows] == met


def test_the_table_shows_met_not_met_and_not_measured(record: CollectionBenchmark):
    def target(met: bool | None, interval: list[float] | None) -> Target:
        measured = None if met is None else 1.0
        return Target(
            name="n", sense="at most", limit=1.05, measured=measured, interval=interval, met=met
        )

    targets = [target(True, [0.9, 1.0]), target(False, [1.0, 1.2]), target(None, None)]
    text = printed(replace(record, targets=targets))
    lines = [line for line in text.splitlines() if line.split()[:1] == ["n"]]
    assert [line.split("  ")[-1].strip() for line in lines] == [
        "met",
        "not met, within noise",
        "not measured",
    ]
    for name in record.variants:
        assert name in text
    assert "Not measured: disabled by --no-memory." in text


def printed(record: CollectionBenchmark, width: int = 100) -> str:
    stream = io.StringIO()
    print_sections(collection_benchmark_report(record), Console(file=stream, width=width))
    return stream.getvalue()


def test_the_targets_fit_into_80_columns(record: CollectionBenchmark):
    targets = [
        replace(row, measured=0.00086, met=False, interval=[0.0, 99.0]) for row in record.targets
    ]
    text = printed(replace(record, targets=targets), width=80)
    assert text.count("not met, within noise") == len(targets) == 5
    assert "…" not in text


def test_a_record_of_another_kind_is_refused(record: CollectionBenchmark):
    with pytest.raises(SchemaError, match='at kind, got "saturation"'):
        from_plain(to_plain(record) | {"kind": "saturation"}, CollectionBenchmark)


# --- The command -----------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["cascade", "bench", "collect", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_bench_json_holds_the_printed_values(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    common = ["--model", str(saved), "--tokens", "64", "--seq-len", "16", "--no-memory"]
    output = tmp_path / "run"
    arguments = [*common, "--rounds", "2", "--output", str(output)]
    assert run(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    stored = json.loads((output / "bench.json").read_text(encoding="utf-8"))
    assert stored["kind"] == "bench.collect"
    assert stored["provenance"]["command"].startswith("cascade bench collect --model")
    for name, times in stored["ways"].items():
        assert len(times["seconds"]) == 2
        assert f"{times['tokens_per_second']:,.0f}" in out
        assert name in out
    assert [path.name for path in output.iterdir()] == ["bench.json"]
    assert run(monkeypatch, *arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--overwrite") == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--tokens", "127"),
        ("--seq-len", "1"),
        ("--batch-size", "0"),
        ("--rounds", "1"),
        ("--threads", "0"),
        ("--seed", "-1"),
    ],
)
def test_an_invalid_option_gives_a_one_line_error_and_status_2(
    option: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert run(monkeypatch, option, value) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"cascade: expected {option} of at least ")
    assert error.rstrip().endswith(f"got {value}")


def test_more_tokens_than_the_corpus_has_are_refused(saved: Path):
    with pytest.raises(BenchmarkError, match="use a smaller --tokens"):
        benchmark.benchmark_collection(settings(saved, tokens=10**7), memory=False)
