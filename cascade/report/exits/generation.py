"""Generated text for the terminal: each token by the layer at which it left, and the summary."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.text import Text

from cascade.report.common.exit_wording import head_words, propagation_words, share, show_threshold
from cascade.report.common.records import Record, check_record
from cascade.report.common.terminal import (
    print_heading,
    print_lines,
    print_pairs,
    print_table,
    printable,
)

_SECTIONS = (
    "prompt",
    "chat",
    "num_layers",
    "exits",
    "propagation",
    "tokens",
    "exit_layers",
    "by_layer",
    "layers_per_token",
    "tokens_per_second",
    "counts",
    "verified",
    "drafted",
    "accepted",
    "fallback_reason",
    "full",
)
#: Of the exit layers, from the lowest on; the last layer has one of its own.
_COLOURS = ("green", "cyan", "bright_blue", "magenta", "yellow")
_FULL_COLOUR = "red"


def print_generation(record: Record, console: Console) -> None:
    """Print a generated text, each token by the layer at which it left, and the summary.

    With colours, the tokens have those of the legend; without (a pipe, a file, `NO_COLOR`) the
    layer stands in brackets before the tokens that left there.

    Args:
        record: Of kind `generation`, schema 1, with

            - `prompt`: what it goes on from, as text;
            - `chat`: whether that is a question, and the tokens its answer;
            - `num_layers`: N;
            - `exits`: one `{"layer", "rule", "threshold", "head"}` per exit, in ascending order;
              a threshold of None lets nothing leave;
            - `propagation`: "frozen", "ridge" or "exact";
            - `tokens`: the new tokens' texts, which joined are the generated text;
            - `exit_layers`: where each of them left, N for those that went all the way;
            - `by_layer`: one `{"layer", "tokens", "share"}` per exit layer and for N, in ascending
              order, those without a token included;
            - `layers_per_token`: layers computed per token, the prompt's included;
            - `tokens_per_second`: new tokens per second;
            - `counts`: at least `lm_head_rows`, rows that went through the LM head;
            - `verified`, `drafted`, `accepted`: whether the full model confirmed every token, how
              many an exit proposed, and how many of those it confirmed;
            - `fallback_reason`: why layers were computed for every token, or None;
            - `full`: None, or what the full model did with the same prompt: `text`, `tokens` (how
              many), `same_tokens` (how many first tokens are the same), `tokens_per_second`, and
              `speed_ratio` (this speed relative to the full model's).
        console: Where to print; its width, encoding and colours are respected.

    Raises:
        ValueError: The record is of another kind or schema, lacks a section, holds NaN, or has a
            token that belongs to no layer.
    """
    check_record(record, "generation", _SECTIONS)
    if len(record["tokens"]) != len(record["exit_layers"]):
        raise ValueError(
            f"expected one exit layer per token, got {len(record['exit_layers'])} for "
            f"{len(record['tokens'])} tokens"
        )
    unknown = {*record["exit_layers"]} - {row["layer"] for row in record["by_layer"]}
    if unknown:
        raise ValueError(f"expected exit layers among those of by_layer, got {min(unknown)}")
    coloured = console.color_system is not None and not console.no_color
    print_lines(_text(record, console, coloured=coloured), console, console.width)
    print_heading("Where the tokens left", console)
    _print_legend(record, console, coloured=coloured)
    print_heading("Summary", console)
    print_pairs(_summary(record), console)


def _colours(record: Record) -> dict[int, str]:
    layers = [row["layer"] for row in record["by_layer"] if row["layer"] != record["num_layers"]]
    colours = {layer: _COLOURS[index % len(_COLOURS)] for index, layer in enumerate(layers)}
    return colours | {record["num_layers"]: _FULL_COLOUR}


def _text(record: Record, console: Console, *, coloured: bool) -> Text:
    """Return prompt and tokens, the tokens coloured or, run by run, with their layer in front."""

    def shown(text: str) -> str:
        return printable(text, console, keep="\n\t")

    colours = _colours(record)
    text = Text(shown(record["prompt"]) + "\n\n" * record["chat"])
    pairs = zip(record["exit_layers"], record["tokens"], strict=True)
    for layer, run in groupby(pairs, key=lambda pair: pair[0]):
        joined = "".join(token for _, token in run)
        if coloured:
            text.append(shown(joined), style=colours[layer])
        else:
            # Behind the blanks that tokens begin with: the mark then stands at the word.
            word = joined.lstrip()
            text.append(f"{shown(joined[: len(joined) - len(word)])}[{layer}]{shown(word)}")
    return text


def _print_legend(record: Record, console: Console, *, coloured: bool) -> None:
    rows, styles, colours = [], {}, _colours(record)
    for number, row in enumerate(record["by_layer"]):
        layer = row["layer"]
        if coloured:
            styles[number] = colours[layer]
        went = "left" if layer != record["num_layers"] else "went all the way"
        mark = colours[layer].removeprefix("bright_") if coloured else f"[{layer}]"
        rows.append([str(layer), f"{row['tokens']:,}", share(row["share"]), mark, went])
    if not rows:
        console.print(Text("none"))
        return
    header = ("layer", "tokens", "share", "colour" if coloured else "mark", "")
    print_table(header, rows, console, gap=2, text_columns=2, styles=styles)
    if not coloured:
        console.print()
        mark = "A mark holds for all tokens up to the next one."
        print_lines(Text(mark), console, console.width)


def _summary(record: Record) -> list[tuple[str, str]]:
    rows = [
        *(("Exit", _exit(exit_)) for exit_ in record["exits"]),
        ("Propagation", propagation_words(record["propagation"])),
        (
            "Layers",
            f"{record['layers_per_token']:.2f} of {record['num_layers']} computed per token, the "
            "prompt's tokens included, which the table above does not count",
        ),
        ("Speed", _speed(record)),
        ("LM head", f"{record['counts']['lm_head_rows']:,} rows for {_count(record)}"),
    ]
    if record["verified"]:
        rows.append(
            (
                "Verified",
                f"exits drafted {record['drafted']:,} tokens, the full model confirmed "
                f"{record['accepted']:,} of them and chose the others itself",
            )
        )
    if record["full"] is not None:
        rows += _against_full(record)
    if record["fallback_reason"] is not None:
        rows.append(
            ("No skipping", f"every layer computed every token here: {record['fallback_reason']}")
        )
    return rows


def _exit(exit_: Record) -> str:
    threshold = exit_["threshold"]
    when = "never" if threshold is None else f"{exit_['rule']} >= {show_threshold(threshold)}"
    return f"layer {exit_['layer']}, {when}; {head_words(exit_['head'])}"


def _count(record: Record) -> str:
    count = len(record["tokens"])
    return f"{count:,} new token{'' if count == 1 else 's'}"


def _speed(record: Record) -> str:
    speed = f"{record['tokens_per_second']:.1f} tokens/s"
    full = record["full"]
    if full is None:
        return speed
    return (
        f"{speed}, the full model {full['tokens_per_second']:.1f} tokens/s: "
        f"{full['speed_ratio']:.2f} x its speed (one run each)"
    )


def _against_full(record: Record) -> list[tuple[str, str]]:
    full, count = record["full"], len(record["tokens"])
    if full["same_tokens"] == count == full["tokens"]:
        return [("Agreement", "the text is the full model's, token for token")]
    return [
        (
            "Agreement",
            f"the first {full['same_tokens']:,} of {_count(record)} are the full model's; from "
            "there on the two texts differ",
        ),
        ("Full model", " ".join(full["text"].split())),
    ]
