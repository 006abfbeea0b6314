"""Datasets of hard tokens for the terminal: where they come from, and how many of them are hard."""

from __future__ import annotations

from rich.console import Console

from cascade.report.common.exit_wording import corpus_words, share, show_threshold
from cascade.report.common.records import Record, check_record
from cascade.report.common.terminal import print_pairs, print_table

_SECTIONS = ("provenance", "layer", "threshold", "asked", "states", "parts", "notes")


def print_hard_tokens(record: Record, console: Console) -> None:
    """Print what a dataset of hard tokens holds.

    Args:
        record: A saved record of kind `hard-tokens`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema.
    """
    check_record(record, "hard-tokens", _SECTIONS)
    print_pairs(_headline(record), console)
    console.print()
    print_table(
        ("sequences", "tokens", "hard", "response tokens", "hard", "part"),
        [_row(part, row) for part, row in record["parts"].items()],
        console,
        gap=2,
        text_columns=1,
    )


def _headline(record: Record) -> list[tuple[str, str]]:
    layer, states, asked = record["layer"], record["states"], record["asked"]
    model, corpora = record["provenance"]["model"], record["provenance"]["corpora"]
    name = model.get("name") or model["family"]
    source = "given"
    if asked["threshold"] is None:
        source = f"fitted to a hard ratio of {asked['hard_ratio']:g} on the training part"
    return [
        ("Model", f"{name}, {model['dtype']} on {model['device']}"),
        *((f"Corpus, {part}", corpus_words(corpora[part])) for part in record["parts"]),
        (
            "Hard",
            f"similarity at layer {layer} (history[{layer - 1}] against history[{layer}]) below "
            f"{show_threshold(record['threshold'])}, {source}",
        ),
        (
            "States",
            f"what leaves layer {states['entry']}, before the final norm: "
            f"{states['seq_len']:,} x {states['hidden_size']:,} per sequence in {states['dtype']}",
        ),
        *(("Beware", note) for note in record["notes"]),
    ]


def _row(part: str, row: Record) -> list[str]:
    return [
        f"{row['sequences']:,}",
        f"{row['tokens']:,}",
        share(row["hard_ratio"]),
        f"{row['response']:,}",
        share(row["hard_response"] / row["response"] if row["response"] else None),
        part,
    ]
