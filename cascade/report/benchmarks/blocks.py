"""Blocks shared by the reports of all benchmarks: headline, speed, ratios, targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cascade.core.schema import to_plain
from cascade.report.common.sections import Block, Pairs, Report, Section, Table, table_of

if TYPE_CHECKING:
    from cascade.benchmarks.records import BenchmarkProvenance, Ratio, Target, VariantTimes

_ABOUT = (
    "One process, rounds interleaved in random order. A missed target does not fail the command."
)


class CorpusSettings(Protocol):
    """The settings of a benchmark over a corpus."""

    @property
    def tokens(self) -> int:
        """Tokens per pass."""

    @property
    def seq_len(self) -> int:
        """Tokens per sequence."""

    @property
    def batch_size(self) -> int:
        """Sequences per forward pass."""

    @property
    def rounds(self) -> int:
        """Timed rounds."""

    @property
    def threads(self) -> int | None:
        """Threads that torch computes with."""


def benchmark_report(
    title: str, provenance: BenchmarkProvenance, sections: Sequence[Section]
) -> Report:
    """Return the report of a benchmark.

    Args:
        title: The subject of the benchmark.
        provenance: The provenance of the record.
        sections: The sections in order.
    """
    return Report("CASCADE benchmark", title, _ABOUT, tuple(sections), to_plain(provenance))


def headline(
    provenance: BenchmarkProvenance, settings: CorpusSettings, *more: tuple[str, str]
) -> Section:
    """Return the model, the pass and the machine of a benchmark over a corpus.

    Args:
        provenance: The provenance of the record.
        settings: The settings of the record.
        more: Further labels and texts.
    """
    model = provenance.model
    one_pass = (
        f"{settings.tokens:,} tokens in sequences of {settings.seq_len:,}, "
        f"{settings.batch_size} per batch; {settings.rounds} rounds"
    )
    pairs = (
        ("Model", f"{model.name} on {model.device}"),
        ("Pass", one_pass),
        ("Machine", machine_text(provenance, settings.threads)),
        *more,
    )
    return Section("", (Pairs(pairs),))


def machine_text(provenance: BenchmarkProvenance, threads: int | None) -> str:
    """Return processor, cores, threads and the load of the machine."""
    machine = provenance.machine
    load = machine.load_average_before
    busy = "" if load is None else f", load average before the start {load:.2f}"
    return f"{machine.processor}, {machine.cores} cores, {threads} threads{busy}"


def speed_section(variants: Mapping[str, VariantTimes]) -> Section:
    """Return the speed of every variant."""
    return Section("Speed", (speed_table(variants),))


def speed_table(variants: Mapping[str, VariantTimes]) -> Table:
    """Return the speed of every variant."""
    return table_of(
        "Tokens per second, and the seconds of one round",
        ("tokens/s", "median seconds", "fastest", "slowest", "variant"),
        [
            [_speed(times.tokens_per_second), *seconds_cells(times.seconds), name]
            for name, times in variants.items()
        ],
        text_columns=1,
    )


def seconds_cells(seconds: Sequence[float]) -> list[str]:
    """Return median, minimum and maximum of some seconds as text."""
    values = (float(np.median(seconds)), min(seconds), max(seconds))
    return [f"{value:.3f}" for value in values]


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 100 else 1}f}"


def ratios_section(ratios: Sequence[Ratio]) -> Section:
    """Return the ratios of pairs of variants."""
    return Section("Ratios of seconds", (ratios_table(ratios),))


def ratios_table(ratios: Sequence[Ratio]) -> Table:
    """Return the ratios of pairs of variants."""
    return table_of(
        "Median and 95 % interval over rounds",
        ("median", "interval", "variant/reference"),
        [
            [f"{row.median:.3f}", "{:.3f} to {:.3f}".format(*row.interval), row.name]
            for row in ratios
        ],
        text_columns=1,
    )


def targets_section(targets: Sequence[Target], set_for: str) -> Section:
    """Return the targets, met or missed.

    Args:
        targets: The targets of the record.
        set_for: The machine that they are set for, e.g. "2 cores".
    """
    table = table_of(
        f"Set for {set_for}",
        ("target", "limit", "measured", "verdict"),
        [
            [
                row.name,
                f"{row.sense} {row.limit:g}",
                "-" if row.measured is None else f"{row.measured:.4g}",
                _verdict(row),
            ]
            for row in targets
        ],
        text_columns=1,
    )
    return Section("Targets", (table,))


def _verdict(row: Target) -> str:
    if row.met is None:
        return "not measured"
    verdict = "met" if row.met else "not met"
    # If the interval contains the limit, another run could give the opposite verdict.
    undecided = row.interval is not None and row.interval[0] <= row.limit <= row.interval[1]
    return f"{verdict}, within noise" if undecided else verdict


def notes_section(*notes: tuple[str, str]) -> Section:
    """Return labels and texts that explain the numbers."""
    return Section("Notes", (Pairs(notes),))


def not_measured(reason: str) -> Block:
    """Return the sentence that replaces a missing measurement."""
    return f"Not measured: {reason}."
