"""Lossless decoding in the report of an evaluation: the answer, and every way to continue."""

from __future__ import annotations

from cascade.core.schema import known
from cascade.evaluation.lossless.records import DecodingMethod, DecodingRow, LosslessFigures
from cascade.evaluation.records import EvaluationRecord
from cascade.report.common.exit_wording import between, ratio, show_threshold
from cascade.report.common.sections import Block, Pairs, Section, table_of
from cascade.report.common.words import counted

_NAMES: dict[DecodingMethod, str] = {
    "modules": "own modules",
    "engine": "engine",
    "drafts": "drafts",
    "drafter": "drafts and drafter",
    "exits": "exits",
}

_HEADER = ("way", "tokens/pass", "equal", "ms/token", "time", "interval", "computed by")
_CAPTION = (
    "equal: texts that are the full model's, token for token; time: relative to the full model by "
    "its own modules. All ways but exits lose nothing."
)


def lossless_pairs(record: EvaluationRecord) -> list[tuple[str, str]]:
    """Return what an evaluation says of lossless decoding, as (label, text); [] for nothing."""
    verdict = known(record.verdict.lossless)
    return [] if verdict is None else [("lossless", verdict.headline)]


def lossless_sections(record: EvaluationRecord) -> list[Section]:
    """Return the section of the continued prompts; [] where they were not measured."""
    figures = known(record.lossless)
    if figures is None:
        return []
    rows = [_cells(row, figures) for row in figures.rows]
    blocks: list[Block] = [
        table_of(_CAPTION, _HEADER, rows, text_columns=1),
        Pairs(tuple(_notes(record, figures))),
    ]
    return [Section("Generation: lossless decoding and exits", tuple(blocks))]


def missing_notes(record: EvaluationRecord) -> list[tuple[str, str]]:
    """Return how to measure lossless decoding where an evaluation did not, as (label, text)."""
    if known(record.lossless) is not None:
        return []
    words = "not compared; `cascade evaluate` with --lossless, the default, does"
    return [("lossless", words)]


def _cells(row: DecodingRow, figures: LosslessFigures) -> list[str]:
    milliseconds = 1e3 * sum(row.per_token) / figures.prompts
    # The reason behind a missing engine is in the notes.
    by = "own modules" if row.engine is None else row.engine.partition(" (")[0]
    return [
        _NAMES[row.method],
        f"{row.tokens_per_pass:.2f}",
        f"{row.equal}/{figures.prompts}",
        f"{milliseconds:.3g}",
        ratio(row.seconds_ratio, 2),
        between(row.seconds_ratio_interval, lambda value: ratio(value, 2), "-"),
        by,
    ]


def _notes(record: EvaluationRecord, figures: LosslessFigures) -> list[tuple[str, str]]:
    notes = [
        (
            "prompts",
            f"the first {counted(figures.prompt_tokens, 'token')} of "
            f"{counted(figures.prompts, 'sequence')}, each continued alone and greedily by at most "
            f"{counted(figures.new_tokens, 'token')}, in one process, by one way after the other",
        ),
        (
            "time",
            "seconds per new token, prompt included; the interval is Student's t over prompts; a "
            "run of twice its way's median is timed again. The times of the operating points above "
            "are of scoring: whole sequences in batches, "
            "with all tokens given",
        ),
        (
            "drafts",
            "by n-gram lookup in the text so far and from the model's runner-ups"
            + ("; the drafter's in addition" if figures.row("drafter") is not None else ""),
        ),
    ]
    verdict = known(record.verdict.lossless)
    if verdict is not None and verdict.seconds_ratio is not None and verdict.method is not None:
        ends = between(verdict.seconds_ratio_interval, lambda value: ratio(value, 2), " to ")
        notes.append(
            (
                "compared",
                f"{_NAMES[verdict.method]}: {ratio(verdict.seconds_ratio, 2)} x the time of exits "
                f"({ends})",
            )
        )
    if figures.point is not None:
        row = record.points[figures.point]
        notes.append(
            (
                "exits",
                f"layer {row.exit_layer}, {row.rule} >= {show_threshold(row.threshold, 4)}: the "
                "fastest operating point of the wanted quality. It is measured as it generates, "
                "with the engine where there is one",
            )
        )
    engines = {row.engine for row in figures.rows}
    own = next((name for name in engines if name and name.startswith("model")), None)
    if own is not None:
        notes.append(("no engine", f"passes are computed by the {own}"))
    elif engines == {None}:
        words = "nothing was drafted, and the model's own modules compute each token"
        notes.append(("no engine", words))
    return notes
