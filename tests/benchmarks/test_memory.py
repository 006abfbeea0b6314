"""Peak memory: of the process that measures, without what another one held before."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade.benchmarks import memory
from cascade.benchmarks.collect import KIND, Setup
from cascade.benchmarks.timing import BenchmarkError


def settings(saved: Path) -> dict[str, Any]:
    return asdict(Setup(model=str(saved), tokens=256, seq_len=16, batch_size=4, rounds=2))


def test_the_peak_of_a_pass_is_measured_in_this_process_and_sees_what_is_held():
    pytest.importorskip("resource", reason="the system reports no peak of a process")
    before = memory._peak()
    held = np.ones(max(before, 64_000_000) // 8 + 4_000_000)
    # All of it resident at once: the peak must have moved by at least the 32 MB beyond it.
    assert memory._peak() > 32_000_000
    assert memory._peak() >= before
    assert memory._peak() >= held.nbytes


def test_memory_is_measured_at_one_and_eight_times_the_tokens_in_processes_of_their_own(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("resource", reason="the system reports no peak of a process")
    asked: list[tuple[str, int]] = []

    def answer(_kind: str, _setup: dict[str, Any], way: str, factor: int) -> dict[str, Any]:
        asked.append((way, factor))
        return {"tokens": 256 * factor, "peak_mb": 100.0 + factor}

    monkeypatch.setattr(memory, "_in_fresh_process", answer)
    usage = memory.measure_usage(KIND, settings(saved), "analyze_fp32", beside=["seed_fp32"])
    assert asked == [("analyze_fp32", 1), ("analyze_fp32", 8), ("seed_fp32", 1)]
    assert usage["growth_mb"] == 7.0


def test_a_fresh_process_reports_its_own_peak_and_its_failure_is_one_line(saved: Path):
    pytest.importorskip("resource", reason="the system reports no peak of a process")
    row = memory._in_fresh_process(KIND, settings(saved), "analyze_fp32", 2)
    assert row["tokens"] == 512
    assert row["peak_mb"] > 0
    absent = asdict(Setup(model="/nowhere/model.gguf"))
    with pytest.raises(BenchmarkError, match=r"ModelError.*--no-memory") as caught:
        memory._in_fresh_process(KIND, absent, "analyze_fp32", 1)
    assert "\n" not in str(caught.value)
