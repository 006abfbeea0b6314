"""The report of the benchmark of the quick gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.report.benchmarks.blocks import (
    benchmark_report,
    headline,
    notes_section,
    ratios_section,
    seconds_cells,
    speed_section,
    targets_section,
)
from cascade.report.common.sections import Report, Section, table_of

if TYPE_CHECKING:
    from cascade.benchmarks.gate import GateBenchmark


def gate_benchmark_report(record: GateBenchmark) -> Report:
    """Return the report of the benchmark of the gate.

    Args:
        record: The record of the benchmark.
    """
    alone = table_of(
        "Not interleaved with the variants above",
        ("median seconds", "fastest", "slowest", "step"),
        [[*seconds_cells(row.seconds), name] for name, row in record.alone.items()],
        text_columns=1,
    )
    return benchmark_report(
        "The quick gate",
        record.provenance,
        (
            headline(record.provenance, record.settings),
            speed_section(record.variants),
            ratios_section(record.ratios),
            Section("Timed separately", (alone,)),
            targets_section(record.targets, "2 cores and 512 tokens"),
            notes_section(*_notes(record)),
        ),
    )


def _notes(record: GateBenchmark) -> list[tuple[str, str]]:
    noise = "not needed, because the baseline was made in this environment"
    if record.elsewhere:
        noise = (
            f"the baseline was made in another environment ({'; '.join(record.elsewhere)}); the "
            "first gate also measures the noise, later ones read it from the cache"
        )
    tokens = record.settings.long_tokens
    long = f"{tokens:,} tokens" if tokens else "none, because the baseline has none"
    return [
        ("Steps", f"after {', '.join(f'{tokens:,}' for tokens in record.steps)} tokens"),
        ("Long sequence", long),
        ("Noise", noise),
        ("Interval", record.interval),
        *((name.capitalize(), row.what) for name, row in record.alone.items()),
    ]
