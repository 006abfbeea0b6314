"""Reports of cascades: the training of a stage, and the benefit of each stage."""

from __future__ import annotations

import math
from typing import Literal

from rich.console import Console

from cascade.core.schema import UNSET, known, to_plain
from cascade.report.common.exit_wording import corpus_words, ratio, ratio_cell, show_threshold
from cascade.report.common.records import percent
from cascade.report.common.sections import (
    Block,
    Pairs,
    Report,
    Section,
    Table,
    print_sections,
    table_of,
)
from cascade.report.common.words import counted
from cascade.stages.records import (
    CascadeEvaluationRecord,
    CascadeRecord,
    HeldOutEvaluation,
    ScopeFigures,
    TrainingProvenance,
    VariantFigures,
)

_SCOPES = {
    "all": "all",
    "easy": "easy",
    "hard": "hard",
    "response": "response",
    "easy_response": "easy response",
    "hard_response": "hard response",
}


# --- How a stage was trained -----------------------------------------------------------------


def print_training(provenance: TrainingProvenance, console: Console) -> None:
    """Print the report of a stage's training: every evaluation, and the chosen one.

    Args:
        provenance: How the stage was trained.
        console: Where to print.
    """
    print_sections(training_report(provenance), console)


def training_report(provenance: TrainingProvenance) -> Report:
    """Return the report of a stage's training.

    Args:
        provenance: How the stage was trained.
    """
    config, tokens = provenance.config, provenance.tokens
    threshold = show_threshold(tokens.threshold)
    return Report(
        kicker="CASCADE training",
        title=f"Stage: {counted(config.additional_layers, 'layer')} ({config.start}), trained on "
        f"{config.routing} tokens",
        about=f"{provenance.steps} steps of {config.batch_size} sequences, learning rate "
        f"{config.learning_rate:g}, seed {config.seed}",
        sections=(
            Section(
                "",
                (
                    Pairs(
                        (
                            ("Entry", f"similarity at layer {tokens.layer} below {threshold}"),
                            ("Held out", corpus_words(tokens.corpora["held-out"])),
                        )
                    ),
                ),
            ),
            Section(
                "Training",
                (
                    table_of(
                        "Held-out perplexity of the whole cascade, relative to the cascade without "
                        "the stage",
                        ("step", "all tokens", "hard", "response", "hard response", ""),
                        [
                            _evaluation(one, provenance.chosen_step)
                            for one in provenance.evaluations
                        ],
                        text_columns=1,
                    ),
                ),
            ),
        ),
        provenance=to_plain(provenance),
    )


def _evaluation(evaluation: HeldOutEvaluation, chosen: int) -> list[str]:
    ratios = evaluation.ratios
    scopes = ("all", "hard", "response", "hard_response")
    cells = [
        evaluation.words(scope).removesuffix(" x") if scope in ratios else "-" for scope in scopes
    ]
    return [f"{evaluation.step}", *cells, "chosen" if evaluation.step == chosen else ""]


# --- Benefit of a cascade --------------------------------------------------------------------


def print_cascade_evaluation(record: CascadeEvaluationRecord, console: Console) -> None:
    """Print the benefit of each stage of a cascade and of its routing.

    Args:
        record: A measured cascade.
        console: Where to print.
    """
    print_sections(cascade_report(record), console)


def cascade_report(record: CascadeEvaluationRecord) -> Report:
    """Return the report of a measured cascade.

    Args:
        record: A measured cascade.
    """
    verdict, model = record.verdict, record.provenance.model
    others = [text for text in (verdict.routing, verdict.training) if text is not None]
    pairs = (
        *_stages(record.cascade),
        ("Corpus", corpus_words(record.provenance.corpus)),
        ("Tokens", _tokens(record.rows[0])),
    )
    blocks: tuple[Block, ...] = (*map(_sentence, others), Pairs(pairs))
    return Report(
        kicker="CASCADE evaluation of a cascade",
        title=_sentence(verdict.stage),
        about=f"Base: {model.name or model.family}, {model.dtype}",
        sections=(
            Section("", blocks),
            Section(
                "Figures",
                (
                    "A control is named by the tokens that it was trained on / that enter it.",
                    _figures(record, "Perplexity relative to the base model", "ratio", 3),
                    _figures(record, "Perplexity", "perplexity", 2),
                    _figures(record, "Accuracy of the next-token prediction", "accuracy", 3),
                ),
            ),
            Section(
                "Cost",
                (
                    table_of(
                        "Layers computed per token, and operations relative to the base model",
                        ("layers per token", "operations", "enter the stage", ""),
                        [_cost(row) for row in record.rows],
                        text_columns=1,
                    ),
                ),
            ),
        ),
        provenance=to_plain(record.provenance),
    )


def _figures(
    record: CascadeEvaluationRecord,
    caption: str,
    name: Literal["ratio", "perplexity", "accuracy"],
    digits: int,
) -> Table:
    """Return a table of one figure for every variant and scope."""
    scopes = [scope for scope in _SCOPES if scope in record.rows[0].scopes]
    return table_of(
        caption,
        (*(_SCOPES[scope] for scope in scopes), ""),
        [
            [*(_figure(row.scopes[scope], name, digits) for scope in scopes), _name(row)]
            for row in record.rows
        ],
        text_columns=1,
    )


def _figure(
    figures: ScopeFigures, name: Literal["ratio", "perplexity", "accuracy"], digits: int
) -> str:
    value: float | None = getattr(figures, name)
    if value is not None:
        if name == "ratio" and not 1e-3 <= value < 1e6:
            return ratio_cell(value, UNSET)
        return f"{value:,.{digits}f}" if value < 1e6 else ratio(value)
    if name == "ratio":
        return ratio_cell(None, figures.nats_difference)
    return f"{known(figures.nats_per_token) or math.inf:,.0f} nats"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _stages(cascade: CascadeRecord) -> list[tuple[str, str]]:
    return [
        (
            f"Stage {number}",
            f"{counted(stage.num_layers, 'layer')}, entry if {stage.entry.rule} at layer "
            f"{stage.entry.layer} < {show_threshold(float(stage.entry.threshold))}, "
            f"{cascade.propagation} propagation",
        )
        for number, stage in enumerate(cascade.stages, start=1)
    ]


def _tokens(row: VariantFigures) -> str:
    return ", ".join(f"{row.scopes[name].tokens:,} {_SCOPES[name]}" for name in row.scopes)


def _name(row: VariantFigures) -> str:
    if row.trained_on in (None, "hard"):
        return row.name
    return f"control: {row.trained_on} / {row.entered_by}"


def _cost(row: VariantFigures) -> list[str]:
    share = row.exits[-1].share if row.stages else 0.0
    return [
        f"{row.layers_per_token:.2f}",
        f"{row.operations_ratio:.3f} x",
        percent(share) if row.stages else "-",
        _name(row),
    ]
