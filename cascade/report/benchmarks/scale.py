"""The report of the benchmark of Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.report.benchmarks.blocks import (
    benchmark_report,
    headline,
    notes_section,
    ratios_section,
    speed_section,
    targets_section,
)
from cascade.report.common.sections import Report, Section, table_of

if TYPE_CHECKING:
    from cascade.benchmarks.scale import ScaleBenchmark


def scale_benchmark_report(record: ScaleBenchmark) -> Report:
    """Return the report of the benchmark of Ray.

    Args:
        record: The record of the benchmark.
    """
    efficiency = table_of(
        "Two workers, per processor, over what they are compared with",
        ("efficiency", "compared with"),
        [[f"{value:.2f}", name] for name, value in record.efficiency.items()],
        text_columns=1,
    )
    costs = record.overhead
    overhead = table_of(
        costs.what,
        ("seconds", "of measuring", "step"),
        [
            [f"{seconds:.2f}", f"{100 * seconds / costs.measuring:.1f} %", name]
            for name, seconds in (
                ("planning", costs.planning),
                ("scheduling", costs.scheduling),
                ("merging", costs.merging),
                ("measuring", costs.measuring),
                ("pilot of the plan, not counted", costs.pilot),
                ("noise floor of the plan, not counted", costs.noise),
                ("starting the cluster and its models, not counted", costs.starting),
            )
        ],
        text_columns=1,
    )
    settings = record.settings
    return benchmark_report(
        "Workers on Ray",
        record.provenance,
        (
            headline(record.provenance, settings, ("Shards", f"{settings.shards:,}")),
            speed_section(record.variants),
            ratios_section(record.ratios),
            Section("Efficiency", (efficiency,)),
            Section("Overhead", (overhead,)),
            targets_section(record.targets, "2 cores and 32,768 tokens"),
            notes_section(*_notes(record)),
        ),
    )


def _notes(record: ScaleBenchmark) -> list[tuple[str, str]]:
    return [
        ("Engine", record.engine),
        ("Result", "as of one process" if record.same else "NOT that of one process"),
        ("Interval", record.interval),
    ]
