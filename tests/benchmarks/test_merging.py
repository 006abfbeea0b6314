"""The benchmark of merging: its record, its known result, and a result that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.commands import Run
from support.paths import DOCS

from cascade.benchmarks import merging
from cascade.benchmarks.merging import (
    MergingBenchmark,
    MergingBenchmarkConfig,
    benchmark_merging,
    is_known,
    known_tokens,
    simulated_plan,
    simulated_rows,
    write_simulated,
)
from cascade.benchmarks.timing import BenchmarkError
from cascade.core.records import read_typed
from cascade.report.benchmarks.merging import merging_benchmark_report
from cascade.shards.merging import merge

CONFIG = MergingBenchmarkConfig(rows=(600,), shards=3, layers=4, seq_len=8)


def test_the_record_of_a_run(tmp_path: Path) -> None:
    record = benchmark_merging(CONFIG, folder=tmp_path, command="cascade bench merge")
    (size,) = record.sizes
    assert (size.rows, size.sequences, size.tokens, size.equal) == (600, 150, 1200, True)
    assert 0 < size.merging.peak_mb < 2000
    assert size.merging.cpu_seconds > 0
    assert size.shard_bytes > size.merged_bytes > 0
    assert [target.name for target in record.targets] == [
        "peak MB of merging",
        "seconds of the gate",
    ]
    assert list(tmp_path.iterdir()) == []
    shown = str(merging_benchmark_report(record))
    assert "as known" in shown


def test_rows_do_not_depend_on_how_they_are_drawn() -> None:
    whole = simulated_rows(range(100), 4).statistics()
    assert np.array_equal(simulated_rows(range(40, 71), 4).statistics(), whole[40:71])


def test_known_statistics_are_those_of_the_tokens(tmp_path: Path) -> None:
    plan = simulated_plan(CONFIG, 600, tmp_path / "plan")
    known = known_tokens(plan, range(20, 150))
    counted = type(known)(plan.record.layers, plan.edges)
    row = np.arange(4)[:, None]
    numbers = (np.arange(20, 150)[None, :] + row) % len(merging._VALUES)
    counted.add(np.repeat(merging._VALUES[numbers], 8, axis=1))
    found, expected = known.token_arrays(), counted.token_arrays()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("what", ["tokens", "rows"])
def test_a_wrong_shard_is_seen_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    plan = simulated_plan(CONFIG, 600, tmp_path / "plan")
    for shard in plan.record.shards:
        with monkeypatch.context() as patch:
            if shard.number == 0 and what == "tokens":
                right = known_tokens(plan, shard.sequences)
                right.total[1] += 1
                patch.setattr(merging, "known_tokens", lambda *_, right=right: right)
            if shard.number == 0 and what == "rows":
                rows = simulated_rows(shard.sequences, 4)
                rows.mean[3, 2] += 1e-12
                patch.setattr(merging, "simulated_rows", lambda *_, rows=rows: rows)
            write_simulated(plan, shard)
    merge(plan, tmp_path / "run")
    assert not is_known(plan, tmp_path / "run")


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(BenchmarkError, match="expected at least 992,000 rows"):
        MergingBenchmarkConfig(rows=(1000,))


def test_the_command_writes_its_record(run: Run, here: Path) -> None:
    small = ("--rows", "600", "--shards", 3, "--layers", 4)
    done = run("bench", "merge", *small, "--folder", here, "--output", "out")
    assert done.status == 0, done.err
    assert "Merging all shards" in done.out
    record = read_typed(here / "out/bench.json", merging.MergingBenchmark)
    assert record.sizes[0].equal
    assert json.loads((here / "out/bench.json").read_text())["kind"] == "bench.merge"
    assert "whole numbers" in run("bench", "merge", "--rows", "many").err


def test_the_figures_of_the_docs_are_those_of_the_stored_record() -> None:
    record = read_typed(DOCS / "merging.json", MergingBenchmark)
    page = (DOCS / "how-to/scale.md").read_text(encoding="utf-8")
    assert [size.rows // 1_000_000 for size in record.sizes] == [1, 10, 100]
    assert all(target.met for target in record.targets)
    for size in record.sizes:
        assert size.equal
        used = size.merging
        assert f"| {size.rows:,} | {size.sequences:,} | {used.seconds:.1f} s | " in page
        assert f" | {used.peak_mb:.0f} MB | {size.shard_bytes / 1e6:,.0f} MB | " in page
