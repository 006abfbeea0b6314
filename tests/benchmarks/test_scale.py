"""The benchmark of Ray counts what it says. No test asserts a speed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cascade.benchmarks import scale as benchmark
from cascade.benchmarks.scale import ScaleBenchmark, ScaleBenchmarkConfig
from cascade.benchmarks.timing import BenchmarkError, Timings
from cascade.core.errors import UsageError
from cascade.core.schema import from_plain, known, to_plain
from cascade.models.loading import load
from cascade.report.benchmarks.scale import scale_benchmark_report
from cascade.report.common.sections import print_sections
from cascade.shards.measuring import measure_shard


def settings(saved: Path, **changes: Any) -> ScaleBenchmarkConfig:
    small = {"tokens": 160, "seq_len": 16, "batch_size": 2, "rounds": 2, "shards": 3}
    return ScaleBenchmarkConfig(model=str(saved), **(small | changes))


def test_overhead_is_what_measuring_does_not_explain(tmp_path: Path) -> None:
    measured = {"noise": 3.0, "pilot": 4.0}
    divided = benchmark._Divided(None, None, 2.0, measured, tmp_path)  # type: ignore[arg-type]
    found = benchmark._overhead(divided, [(11.0, 10.0), (12.5, 10.5), (99.0, 9.0)], 7.0, 0.5)
    assert (found.measuring, found.scheduling, found.planning, found.merging) == (
        10.0,
        2.0,
        2.0,
        0.5,
    )
    assert found.share == pytest.approx(4.5 / 10)
    assert (found.starting, found.noise, found.pilot) == (7.0, 3.0, 4.0)
    (target,) = benchmark._targets(found)
    assert target.met is False
    assert benchmark._targets(replace_share(found, 0.049))[0].met is True


def replace_share(found: benchmark.Overhead, share: float) -> benchmark.Overhead:
    return from_plain(to_plain(found) | {"share": share}, benchmark.Overhead)


def test_efficiency_compares_the_same_number_of_processors() -> None:
    seconds = {"process-1": [8.0], "process-2": [5.0], "ray-1": [9.0], "ray-2": [6.0]}
    found = benchmark._efficiency(Timings({}, [], seconds))
    assert found == {
        "one worker": 9 / 12,
        "one process with one thread": 8 / 12,
        "one process with two threads": 5 / 6,
    }


def test_more_shards_than_batches_are_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match="expected at most 5 shards, one for each batch of 2"):
        benchmark.benchmark_scale(settings(saved, shards=6))
    with pytest.raises(BenchmarkError, match="expected --shards of at least 2"):
        settings(saved, shards=1)


def test_every_token_of_a_timed_run_is_measured_and_planning_counts_nothing_that_is(
    saved: Path, tmp_path: Path
) -> None:
    config = settings(saved)
    stack = load(str(saved))
    divided = benchmark._divided(stack, benchmark._blocks(stack, config), config, tmp_path)
    pilot = known(divided.plan.record.pilot)
    assert pilot is not None
    for plan, taken in ((divided.plan, pilot.sequences), (divided.whole, 0)):
        with divided.fresh(plan) as copy:
            shards = [measure_shard(copy, number, model=stack).record for number in range(3)]
        assert sum(known(shard.piloted) or 0 for shard in shards) == taken
    assert divided.measured.keys() == {"pilot", "noise", "long"}
    assert divided.planning > 0


@pytest.mark.slow
def test_the_record_has_all_variants_and_the_profile_of_one_process(saved: Path) -> None:
    pytest.importorskip("ray", reason="the extra cascade-exit[ray] is not installed")
    record = benchmark.benchmark_scale(settings(saved), command="cascade bench scale")
    assert record.same
    assert record.variants.keys() == benchmark.VARIANTS.keys()
    assert record.engine.startswith("ray ")
    assert record.sequences == 10
    assert from_plain(to_plain(record), ScaleBenchmark) == record
    text = io.StringIO()
    print_sections(scale_benchmark_report(record), Console(file=text, width=120))
    for word in ("Efficiency", "scheduling", "as of one process", "ray-2/process-1"):
        assert word in text.getvalue()
