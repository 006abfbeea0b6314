"""The report of the benchmark of merging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.core.schema import to_plain
from cascade.report.benchmarks.blocks import targets_section
from cascade.report.common.sections import Pairs, Report, Section, table_of

if TYPE_CHECKING:
    from cascade.benchmarks.merging import MergedSize, MergingBenchmark

_ABOUT = (
    "Rows are simulated, and no model runs. Merging and reading run in fresh processes. A missed "
    "target does not fail the command."
)


def merging_benchmark_report(record: MergingBenchmark) -> Report:
    """Return the report of the benchmark of merging.

    Args:
        record: The record of the benchmark.
    """
    settings, machine = record.settings, record.machine
    about = Pairs(
        (
            ("Rows", f"one for each sequence and layer, {settings.layers} layers"),
            ("Shards", f"{settings.shards:,}"),
            ("Machine", f"{machine.processor}, {machine.threads} threads"),
            ("pyarrow", record.versions.get("pyarrow", "unknown")),
        )
    )
    merging = table_of(
        "Merging all shards, with all checks",
        ("rows", "sequences", "seconds", "CPU s", "CPU us/row", "peak MB", "result"),
        [_merged(size) for size in record.sizes],
        text_columns=1,
    )
    disk = table_of(
        "Bytes on disk, and the quick gate's reading and comparing",
        ("rows", "shards MB", "profile MB", "bytes/row", "gate s", "gate peak MB"),
        [_stored(size) for size in record.sizes],
    )
    sections = (
        Section("", (about,)),
        Section("Merging", (merging, disk)),
        targets_section(record.targets, "the largest number of rows"),
    )
    provenance = {"machine": to_plain(machine), "versions": record.versions}
    return Report("CASCADE benchmark", "Merging shards", _ABOUT, sections, provenance)


def _merged(size: MergedSize) -> list[str]:
    used = size.merging
    return [
        f"{size.rows:,}",
        f"{size.sequences:,}",
        f"{used.seconds:,.1f}",
        f"{used.cpu_seconds:,.1f}",
        f"{used.cpu_seconds / size.rows * 1e6:.2f}",
        f"{used.peak_mb:,.0f}",
        "as known" if size.equal else "WRONG",
    ]


def _stored(size: MergedSize) -> list[str]:
    return [
        f"{size.rows:,}",
        f"{size.shard_bytes / 1e6:,.1f}",
        f"{size.merged_bytes / 1e6:,.1f}",
        f"{size.merged_bytes / size.rows:.1f}",
        f"{size.gate.seconds:.1f}",
        f"{size.gate.peak_mb:,.0f}",
    ]
