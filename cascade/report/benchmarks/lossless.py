"""The report of the benchmark of lossless decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.core.schema import to_plain
from cascade.report.benchmarks.blocks import machine_text, not_measured, notes_section
from cascade.report.common.sections import Block, Pairs, Report, Section, Table, table_of

if TYPE_CHECKING:
    from cascade.benchmarks.lossless.records import (
        DraftCounts,
        LosslessBenchmark,
        LosslessCell,
        LosslessVariant,
    )

_ABOUT = (
    "Whole calls of generate with prefill, greedy, interleaved in one process; generate is 1. "
    "The fastest variant comes first."
)

#: Positions of drafts that have a column of their own.
_POSITIONS = 6


def lossless_benchmark_report(record: LosslessBenchmark) -> Report:
    """Return the report of the benchmark of lossless decoding.

    Args:
        record: The record of the benchmark.
    """
    sections = [Section("", (Pairs(_headline(record)),))]
    sections.append(_fastest_section(record))
    sections += [_cell_section(cell) for cell in record.cells]
    sections += [_memory_section(record), notes_section(*_notes(record))]
    return Report(
        "CASCADE benchmark",
        "Lossless decoding",
        _ABOUT,
        tuple(sections),
        to_plain(record.provenance),
    )


def _headline(record: LosslessBenchmark) -> tuple[tuple[str, str], ...]:
    model, settings = record.provenance.model, record.settings
    return (
        ("Model", f"{model.name} on {model.device}"),
        (
            "Prompts",
            f"{settings.prompts} of each kind, held-out records of {settings.corpus}; up to "
            f"{settings.new_tokens} new tokens",
        ),
        ("Drafter", settings.drafter or "none (train one with `cascade train-drafter`)"),
        ("Machine", machine_text(record.provenance, settings.threads)),
    )


def _fastest_section(record: LosslessBenchmark) -> Section:
    table = table_of(
        "The fastest variant of each cell",
        ("speed", "ms/token", "equal", "variant", "cell"),
        [
            [*(_speed_cells(cell.variants[0])[at] for at in (0, 2, 4, 6)), _cell_name(cell)]
            for cell in record.cells
        ],
        text_columns=2,
    )
    return Section("Fastest", (table,))


def _cell_name(cell: LosslessCell) -> str:
    return f"{cell.dtype}, {cell.prompts}, batch {cell.batch_size}"


def _cell_section(cell: LosslessCell) -> Section:
    blocks: list[Block] = [_speed_table(cell)]
    drafting = [(row.name, row.drafts) for row in cell.variants if row.drafts is not None]
    drafting = [(name, drafts) for name, drafts in drafting if drafts.drafted]
    if drafting:
        blocks += [_positions_table(drafting), _proposers_table(drafting)]
    for row in cell.variants:
        if row.reason is not None:
            blocks.append(not_measured(f"{row.name}: {row.reason}".rstrip(".")))
    blocks += [text for row in cell.variants if (text := _difference(row)) is not None]
    return Section(
        f"{_cell_name(cell)} ({cell.prompt_tokens:g} tokens per prompt)",
        tuple(blocks),
    )


def _speed_table(cell: LosslessCell) -> Table:
    return table_of(
        "Times as fast as generate, with 95 % interval; equal texts",
        ("speed", "interval", "ms/token", "tokens/pass", "equal", "batches", "variant"),
        [_speed_cells(row) for row in cell.variants if row.reason is None],
        text_columns=1,
    )


def _speed_cells(row: LosslessVariant) -> list[str]:
    low, high = row.interval or (0.0, 0.0)
    drafts = row.drafts
    return [
        f"{row.speedup or 0:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{row.milliseconds_per_token or 0:.1f}",
        "-" if drafts is None else f"{drafts.tokens_per_pass:.2f}",
        "-" if row.equal is None else f"{row.equal}/{row.texts}",
        str(len(row.seconds)),
        row.name,
    ]


def _positions_table(drafting: list[tuple[str, DraftCounts]]) -> Table:
    most = min(_POSITIONS, max(len(drafts.positions) for _, drafts in drafting))
    rows = []
    for name, drafts in drafting:
        shares = [f"{at.accepted / at.drafts:.2f}" for at in drafts.positions[:most]]
        rows.append([*shares, *["-"] * (most - len(shares)), name])
    return table_of(
        "Share of drafts that were right up to a position, of those that reach it",
        (*map(str, range(1, most + 1)), "variant"),
        rows,
        text_columns=1,
    )


def _proposers_table(drafting: list[tuple[str, DraftCounts]]) -> Table:
    return table_of(
        "Drafted tokens by proposer",
        ("drafted", "accepted", "share", "proposer", "variant"),
        [
            [
                f"{at.drafted:,}",
                f"{at.accepted:,}",
                f"{at.accepted / at.drafted:.2f}" if at.drafted else "-",
                at.name,
                name,
            ]
            for name, drafts in drafting
            for at in drafts.proposers
        ],
        text_columns=2,
    )


def _difference(row: LosslessVariant) -> str | None:
    at = row.first_difference
    if at is None:
        return None
    return (
        f"{row.name}: {row.texts - (row.equal or 0)} of {row.texts} texts differ from generate's, "
        f"first prompt {at.prompt} at new token {at.token}."
    )


def _memory_section(record: LosslessBenchmark) -> Section:
    table = table_of(
        "MB; the peak is that of the whole process while a dtype was timed",
        ("weights", "copies", "peak", "dtype", "engine"),
        [
            [
                f"{row.weights_mb:,.0f}",
                f"{row.copied_mb:,.0f}",
                "-" if row.peak_mb is None else f"{row.peak_mb:,.0f}",
                row.dtype,
                row.engine if row.obstacle is None else f"{row.engine} ({row.obstacle})",
            ]
            for row in record.memory
        ],
        text_columns=2,
    )
    return Section("Memory", (table,))


def _notes(record: LosslessBenchmark) -> list[tuple[str, str]]:
    what = {row.name: row.what for cell in record.cells for row in cell.variants}
    notes = [*what.items(), ("Interval", record.interval), ("Disturbances", _disturbances(record))]
    for peer in record.peers:
        text = peer.reason or f"{peer.package} {peer.version}, {peer.precision}"
        notes.append((peer.name, f"not measured: {text}" if peer.reason else text))
    # A timed peer has a description already.
    return [(label, text) for label, text in dict(notes).items()]


def _disturbances(record: LosslessBenchmark) -> str:
    batches = [batch for cell in record.cells for batch in cell.batches]
    repeated = [batch for batch in batches if batch.repeated]
    left = [batch for batch in batches if batch.disturbed is not None]
    text = f"{len(repeated)} of {len(batches)} batches were timed again"
    if not left:
        return text
    return f"{text}, {len(left)} were disturbed nevertheless (e.g. {left[0].disturbed})"
