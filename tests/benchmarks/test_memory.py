"""Test the peak memory of processes."""

from __future__ import annotations

import mmap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cascade.benchmarks import memory
from cascade.benchmarks.collection import CollectionBenchmark, CollectionBenchmarkConfig
from cascade.benchmarks.timing import BenchmarkError

KIND = CollectionBenchmark.KIND


def settings(saved: Path) -> dict[str, Any]:
    config = CollectionBenchmarkConfig(
        model=str(saved), tokens=256, seq_len=16, batch_size=4, rounds=2
    )
    return asdict(config)


def test_the_peak_includes_allocated_memory():
    pytest.importorskip("resource", reason="the system reports no peak of a process")
    if not memory.reset_peak_memory():
        pytest.skip("the system does not let a process reset its peak")
    before = memory.peak_memory()
    # Pages from the system: an array may take memory that the allocator of a long run kept.
    with mmap.mmap(-1, 64_000_000) as held:
        held.write(b"1" * len(held))
        assert memory.peak_memory() - before >= 60_000_000


def test_memory_is_measured_at_one_and_eight_times_the_tokens_in_fresh_processes(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("resource", reason="the system reports no peak of a process")
    measured: list[tuple[str, int]] = []

    def peak(_kind: str, _config: dict[str, Any], variant: str, factor: int) -> memory.PassPeak:
        measured.append((variant, factor))
        return memory.PassPeak(tokens=256 * factor, loaded_mb=50.0, peak_mb=100.0 + factor)

    monkeypatch.setattr(memory, "peak_in_fresh_process", peak)
    usage = memory.measure_usage(KIND, settings(saved), "analyze_fp32", others=["seed_fp32"])
    assert measured == [("analyze_fp32", 1), ("analyze_fp32", 8), ("seed_fp32", 1)]
    assert usage.growth_mb == 7.0


def test_a_fresh_process_reports_its_peak_or_a_one_line_error(saved: Path):
    pytest.importorskip("resource", reason="the system reports no peak of a process")
    peak = memory.peak_in_fresh_process(KIND, settings(saved), "analyze_fp32", 2)
    assert peak.tokens == 512
    assert peak.peak_mb > 0
    absent = asdict(CollectionBenchmarkConfig(model="/nowhere/model.gguf"))
    with pytest.raises(BenchmarkError, match=r"ModelError.*--no-memory") as caught:
        memory.peak_in_fresh_process(KIND, absent, "analyze_fp32", 1)
    assert "\n" not in str(caught.value)
