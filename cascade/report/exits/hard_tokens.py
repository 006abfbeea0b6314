"""Reports of hard-token datasets: provenance, and the share of hard tokens."""

from __future__ import annotations

from rich.console import Console

from cascade.core.schema import to_plain
from cascade.report.common.exit_wording import corpus_words, share, show_threshold
from cascade.report.common.sections import Pairs, Report, Section, print_sections, table_of
from cascade.stages.hard_tokens.records import HardTokensRecord, SplitCounts


def print_hard_tokens(record: HardTokensRecord, console: Console) -> None:
    """Print the report of a hard-token dataset.

    Args:
        record: The dataset's record.
        console: Where to print; its width and encoding are respected.
    """
    print_sections(hard_tokens_report(record), console)


def hard_tokens_report(record: HardTokensRecord) -> Report:
    """Return the report of a hard-token dataset.

    Args:
        record: The dataset's record.
    """
    model = record.provenance.model
    name, trained_on = _model_name(record), record.splits["train"]
    return Report(
        kicker="CASCADE hard tokens",
        title=f"Hard tokens of {name}: {share(trained_on.hard_ratio)} of the training split",
        about=f"Model: {name}, {model.dtype} on {model.device}",
        sections=(
            Section("", (Pairs(_pairs(record)),)),
            Section(
                "Splits",
                (
                    table_of(
                        "Hard tokens among all tokens and among response tokens",
                        ("sequences", "tokens", "hard", "response tokens", "hard", "split"),
                        [_row(split, counts) for split, counts in record.splits.items()],
                        text_columns=1,
                    ),
                ),
            ),
        ),
        provenance=to_plain(record.provenance),
    )


def _model_name(record: HardTokensRecord) -> str:
    model = record.provenance.model
    return str(model.name or model.family)


def _pairs(record: HardTokensRecord) -> tuple[tuple[str, str], ...]:
    layer, states, requested = record.layer, record.states, record.requested
    source = "given"
    if requested.threshold is None and requested.hard_ratio is not None:
        source = f"fitted to a hard ratio of {requested.hard_ratio:g} on the training split"
    corpora = record.provenance.corpora
    return (
        *((f"Corpus, {split}", corpus_words(corpora[split])) for split in record.splits),
        (
            "Hard",
            f"similarity at layer {layer} (history[{layer - 1}] against history[{layer}]) below "
            f"{show_threshold(record.threshold)}, {source}",
        ),
        (
            "States",
            f"output of layer {states.entry}, before the final norm: "
            f"{states.seq_len:,} x {states.hidden_size:,} per sequence in {states.dtype}",
        ),
        *(("Warning", note) for note in record.notes),
    )


def _row(split: str, counts: SplitCounts) -> list[str]:
    return [
        f"{counts.sequences:,}",
        f"{counts.tokens:,}",
        share(counts.hard_ratio),
        f"{counts.response:,}",
        share(counts.hard_response / counts.response if counts.response else None),
        split,
    ]
