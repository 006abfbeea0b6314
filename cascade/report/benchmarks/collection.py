"""Reports of benchmarks over a corpus: collecting similarities, fitting heads, hard tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.report.benchmarks.blocks import (
    benchmark_report,
    headline,
    not_measured,
    notes_section,
    ratios_section,
    speed_section,
    targets_section,
)
from cascade.report.common.sections import Report, Section, table_of

if TYPE_CHECKING:
    from cascade.benchmarks.collection import CollectionBenchmark
    from cascade.benchmarks.hard_tokens import HardTokenBenchmark
    from cascade.benchmarks.head_fitting import HeadFittingBenchmark
    from cascade.benchmarks.records import MemoryUsage


def collection_benchmark_report(record: CollectionBenchmark) -> Report:
    """Return the report of the benchmark of collecting similarities.

    Args:
        record: The record of the benchmark.
    """
    return benchmark_report(
        "Collecting similarities",
        record.provenance,
        (
            headline(record.provenance, record.settings),
            speed_section(record.variants),
            ratios_section(record.ratios),
            _memory_section(record.memory),
            targets_section(record.targets, "2 cores and 4,096 tokens"),
            notes_section(*_collection_notes(record)),
        ),
    )


def _memory_section(memory: MemoryUsage) -> Section:
    heading = "Peak memory"
    if memory.reason is not None:
        return Section(heading, (not_measured(memory.reason),))
    table = table_of(
        "Each pass in a separate process",
        ("peak MB", "after loading", "tokens", "variant"),
        [
            [f"{row.peak_mb:,.1f}", f"{row.loaded_mb:,.1f}", f"{row.tokens:,}", row.variant]
            for row in memory.peaks
        ],
        text_columns=1,
    )
    return Section(heading, (table,))


def _collection_notes(record: CollectionBenchmark) -> list[tuple[str, str]]:
    bf16, seed = record.agreement.bf16, record.agreement.seed
    notes = [
        ("Interval", record.interval),
        (
            "bf16",
            "largest shift of a layer's mean from fp32: "
            f"{bf16.difference:+.2e} in layer {bf16.layer}",
        ),
        (
            "Same work",
            "largest difference of a layer's mean between the seed's method and analyze: "
            f"{seed.difference:+.2e} in layer {seed.layer}",
        ),
        ("Peer", f"{record.peer.reason} ({record.peer.source})"),
    ]
    if record.memory.reason is None:
        notes.append(("Memory", record.memory.what))
    return notes


def head_fitting_benchmark_report(record: HeadFittingBenchmark) -> Report:
    """Return the report of the benchmark of fitting heads.

    Args:
        record: The record of the benchmark.
    """
    layers = ", ".join(map(str, record.settings.layers))
    heads = ("Heads", f"layers {layers}, in one pass")
    return _single_ratio_report("Fitting exit heads", record, heads, "2 cores and 100,000 tokens")


def hard_token_benchmark_report(record: HardTokenBenchmark) -> Report:
    """Return the report of the benchmark of collecting hard tokens.

    Args:
        record: The record of the benchmark.
    """
    exit_layer = ("Exit", f"layer {record.settings.layer}")
    return _single_ratio_report("Collecting hard tokens", record, exit_layer, "2 cores")


def _single_ratio_report(
    title: str,
    record: HeadFittingBenchmark | HardTokenBenchmark,
    subject: tuple[str, str],
    target_of: str,
) -> Report:
    return benchmark_report(
        title,
        record.provenance,
        (
            headline(record.provenance, record.settings, subject),
            speed_section(record.variants),
            ratios_section(record.ratios),
            targets_section(record.targets, target_of),
            notes_section(("Interval", record.interval)),
        ),
    )
