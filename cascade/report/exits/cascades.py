"""Cascades for the terminal: how a stage was trained, and what each stage is worth."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from cascade.report.common.exit_wording import corpus_words, show_threshold
from cascade.report.common.records import Record, check_record, percent
from cascade.report.common.terminal import print_heading, print_pairs, print_table

_SECTIONS = ("provenance", "cascade", "rows", "verdict")
_SCOPES = {
    "all": "all",
    "easy": "easy",
    "hard": "hard",
    "response": "response",
    "easy_response": "easy response",
    "hard_response": "hard response",
}


def print_training(record: Record, console: Console) -> None:
    """Print how a stage was trained: every look at the held-out part, and which was chosen.

    Args:
        record: A stage's provenance, as `cascade train` stores it.
        console: Where to print.
    """
    recipe, tokens = record["recipe"], record["tokens"]
    threshold = show_threshold(tokens["threshold"])
    print_pairs(
        [
            (
                "Stage",
                f"{recipe['additional_layers']} layers ({recipe['start']}), trained on "
                f"{recipe['routing']} tokens: {record['steps']} steps of {recipe['batch_size']} "
                f"sequences, learning rate {recipe['learning_rate']:g}, seed {recipe['seed']}",
            ),
            ("Enter", f"similarity at layer {tokens['layer']} below {threshold}"),
            ("Held out", corpus_words(tokens["corpora"]["held-out"])),
        ],
        console,
    )
    print_heading(
        "Held-out perplexity of the whole cascade, relative to that without the stage", console
    )
    print_table(
        ("step", "all tokens", "hard", "response", "hard response", ""),
        [_look(look, record["chosen_step"]) for look in record["looks"]],
        console,
        gap=2,
        text_columns=1,
    )


def _look(look: dict[str, Any], chosen: int) -> list[str]:
    scopes = ("all", "hard", "response", "hard_response")
    ratios = [f"{look[scope]:.4f}" if scope in look else "-" for scope in scopes]
    return [f"{look['step']}", *ratios, "chosen" if look["step"] == chosen else ""]


def print_cascade_evaluation(record: Record, console: Console) -> None:
    """Print what each stage of a cascade is worth, and what its routing is.

    Args:
        record: Of kind `cascade-evaluation`.
        console: Where to print.

    Raises:
        ValueError: The record is of another kind or schema.
    """
    check_record(record, "cascade-evaluation", _SECTIONS)
    verdict = record["verdict"]
    console.print(_sentence(verdict["stage"]), highlight=False, markup=False)
    for name in ("routing", "training"):
        if verdict[name] is not None:
            console.print(_sentence(verdict[name]), highlight=False, markup=False)
    console.print()
    model, corpus = record["provenance"]["model"], record["provenance"]["corpus"]
    print_pairs(
        [
            ("Base", f"{model.get('name') or model['family']}, {model['dtype']}"),
            *_stages(record["cascade"]),
            ("Corpus", corpus_words(corpus)),
            ("Tokens", _tokens(record["rows"][0])),
        ],
        console,
    )
    scopes = [scope for scope in _SCOPES if scope in record["rows"][0]["scopes"]]
    for title, name, digits in (
        ("Perplexity relative to the base's", "ratio", 3),
        ("Perplexity", "perplexity", 2),
        ("Next tokens predicted rightly", "accuracy", 3),
    ):
        print_heading(title, console)
        print_table(
            (*(_SCOPES[scope] for scope in scopes), ""),
            [
                [*(f"{row['scopes'][scope][name]:,.{digits}f}" for scope in scopes), _name(row)]
                for row in record["rows"]
            ],
            console,
            gap=2,
            text_columns=1,
        )
    print_heading("What it costs", console)
    print_table(
        ("layers per token", "operations", "enter the stage", ""),
        [_cost(row) for row in record["rows"]],
        console,
        gap=2,
        text_columns=1,
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _stages(cascade: Record) -> list[tuple[str, str]]:
    pairs = []
    for number, stage in enumerate(cascade["stages"], start=1):
        entry = stage["entry"]
        threshold = show_threshold(float(entry["threshold"]))
        pairs.append(
            (
                f"Stage {number}",
                f"{stage['num_layers']} layers, entered below {threshold} of {entry['rule']} at "
                f"layer {entry['layer']}, {cascade['propagation']} propagation",
            )
        )
    return pairs


def _tokens(row: Record) -> str:
    scopes = row["scopes"]
    return ", ".join(f"{scopes[name]['tokens']:,} {_SCOPES[name]}" for name in scopes)


def _name(row: Record) -> str:
    if row["trained_on"] in (None, "hard"):
        return str(row["name"])
    return f"control: trained on {row['trained_on']}, entered by {row['entered_by']}"


def _cost(row: Record) -> list[str]:
    share = row["exits"][-1]["share"] if row["stages"] else 0.0
    return [
        f"{row['layers_per_token']:.2f}",
        f"{row['operations_ratio']:.3f} x",
        percent(share) if row["stages"] else "-",
        _name(row),
    ]
