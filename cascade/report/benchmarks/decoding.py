"""The report of the benchmark of early exit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.core.schema import UNSET
from cascade.report.benchmarks.blocks import (
    benchmark_report,
    machine_text,
    not_measured,
    notes_section,
    ratios_section,
    ratios_table,
    speed_section,
    speed_table,
    targets_section,
)
from cascade.report.common.sections import Block, Pairs, Report, Section, table_of

if TYPE_CHECKING:
    from cascade.benchmarks.decoding import DecodingBenchmark
    from cascade.benchmarks.decoding_results import AssistantTimes, GeneratedRow, ScoringTimes


def decoding_benchmark_report(record: DecodingBenchmark) -> Report:
    """Return the report of the benchmark of early exit.

    Args:
        record: The record of the benchmark.
    """
    generated = table_of(
        "Exits, computed rows, and agreement with generate",
        ("exits", "layers/token", "rows of layers", "LM head", "as generate", "variant"),
        [_generated_cells(name, row) for name, row in record.generated.items()],
        text_columns=1,
    )
    return benchmark_report(
        "Early exit",
        record.provenance,
        (
            Section("", (Pairs(_headline(record)),)),
            speed_section(record.variants),
            ratios_section(record.ratios),
            Section("Generated text", (generated,)),
            Section("assistant_early_exit, over fewer tokens", _times(record.assistant)),
            Section("Scoring with 70 % of the tokens exiting early", _times(record.scoring)),
            targets_section(record.targets, "2 cores"),
            notes_section(*_notes(record)),
        ),
    )


def _headline(record: DecodingBenchmark) -> tuple[tuple[str, str], ...]:
    model, settings, out = record.provenance.model, record.settings, record.exit
    return (
        ("Model", f"{model.name} on {model.device}, {settings.dtype}"),
        (
            "Round",
            f"{settings.prompts} prompts of {settings.prompt_tokens} tokens, "
            f"{settings.new_tokens} new ones each, {settings.batch_size} per batch; "
            f"{settings.rounds} rounds",
        ),
        (
            "Exit",
            f"layer {out.layer}, {out.rule} >= {settings.threshold:.4g}, "
            f"{out.head} head ({out.heads})",
        ),
        ("Machine", machine_text(record.provenance, settings.threads)),
    )


def _generated_cells(name: str, row: GeneratedRow) -> list[str]:
    counted = ["-"] * 4
    if row.counts is not UNSET:
        counted = [
            f"{row.exit_share:.3f}",
            f"{row.layers_per_token:.2f}",
            f"{sum(row.counts.layer_rows):,}",
            f"{row.counts.lm_head_rows:,}",
        ]
    return [*counted, f"{row.agreement:.3f}", name]


def _times(section: AssistantTimes | ScoringTimes) -> tuple[Block, ...]:
    if section.reason is not None:
        return (not_measured(section.reason),)
    if section.variants is UNSET or section.ratios is UNSET:
        return ()
    return speed_table(section.variants), ratios_table(section.ratios)


def _notes(record: DecodingBenchmark) -> list[tuple[str, str]]:
    verified = record.generated["verified"]
    notes = [
        ("Interval", record.interval),
        ("Threshold", record.exit.threshold),
        (
            "As generate",
            "share of new tokens that equal those of generate at the same position; after the "
            "first difference, the texts diverge",
        ),
        ("Verified", f"{verified.accepted} of {verified.drafted} drafted tokens confirmed"),
    ]
    if record.exit.fallback is not None:
        notes.append(("Skipping", f"none: {record.exit.fallback}"))
    for row in () if record.scoring.skipping is UNSET else record.scoring.skipping:
        text = (
            f"{row.exit_share:.3f} of the tokens exited, {row.flops_ratio:.3f} of the "
            f"operations, {row.seconds_ratio:.3f} of the time"
        )
        notes.append((row.name, text))
    return notes
