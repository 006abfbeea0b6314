"""Generated text for the terminal: each token with the layer at which it exited, and a summary."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.text import Text

from cascade.core.schema import known
from cascade.decoding.transcript import ExitEntry, FullGeneration, GenerationRecord
from cascade.report.common.exit_wording import head_words, propagation_words, share, show_threshold
from cascade.report.common.terminal import (
    print_heading,
    print_lines,
    print_pairs,
    print_table,
    printable,
)

#: The colours of exit layers, lowest first; the last layer has a separate colour.
_COLOURS = ("green", "cyan", "bright_blue", "magenta", "yellow")
_FULL_COLOUR = "red"


def print_generation(record: GenerationRecord, console: Console) -> None:
    """Print a generated text, each token with the layer at which it exited, and a summary.

    On a terminal with colours, each token has the colour of its exit layer. Otherwise (a pipe, a
    file, `NO_COLOR`), the layer is printed in brackets before the tokens that exited there.

    Args:
        record: The record.
        console: Where to print; its width, encoding and colours are respected.

    Raises:
        ValueError: The record has another schema, or a token with an unknown exit layer.
    """
    _check(record)
    coloured = console.color_system is not None and not console.no_color
    print_lines(_text(record, console, coloured=coloured), console, console.width)
    print_heading("Exit layers", console)
    _print_legend(record, console, coloured=coloured)
    print_heading("Summary", console)
    print_pairs(_summary(record), console)


def _check(record: GenerationRecord) -> None:
    if record.schema != GenerationRecord.SCHEMA:
        raise ValueError(f"expected schema {GenerationRecord.SCHEMA}, got {record.schema}")
    if len(record.tokens) != len(record.exit_layers):
        raise ValueError(
            f"expected one exit layer per token, got {len(record.exit_layers)} for "
            f"{len(record.tokens)} tokens"
        )
    unknown = {*record.exit_layers} - {row.layer for row in record.by_layer}
    if unknown:
        raise ValueError(f"expected exit layers among those of by_layer, got {min(unknown)}")


def _colours(record: GenerationRecord) -> dict[int, str]:
    layers = [row.layer for row in record.by_layer if row.layer != record.num_layers]
    colours = {layer: _COLOURS[index % len(_COLOURS)] for index, layer in enumerate(layers)}
    return colours | {record.num_layers: _FULL_COLOUR}


def _text(record: GenerationRecord, console: Console, *, coloured: bool) -> Text:
    """Return prompt and tokens, coloured or with each run of tokens marked by its exit layer."""

    def shown(text: str) -> str:
        return printable(text, console, keep="\n\t")

    colours = _colours(record)
    text = Text(shown(record.prompt) + "\n\n" * record.chat)
    pairs = zip(record.exit_layers, record.tokens, strict=True)
    for layer, run in groupby(pairs, key=lambda pair: pair[0]):
        joined = "".join(token for _, token in run)
        if coloured:
            text.append(shown(joined), style=colours[layer])
        else:
            # After leading blanks, so that the mark is directly before the word.
            word = joined.lstrip()
            text.append(f"{shown(joined[: len(joined) - len(word)])}[{layer}]{shown(word)}")
    return text


def _print_legend(record: GenerationRecord, console: Console, *, coloured: bool) -> None:
    rows, styles, colours = [], {}, _colours(record)
    for number, row in enumerate(record.by_layer):
        layer = row.layer
        if coloured:
            styles[number] = colours[layer]
        went = "exited" if layer != record.num_layers else "all layers"
        mark = colours[layer].removeprefix("bright_") if coloured else f"[{layer}]"
        rows.append([str(layer), f"{row.tokens:,}", share(row.share), mark, went])
    if not rows:
        console.print(Text("none"))
        return
    header = ("layer", "tokens", "share", "colour" if coloured else "mark", "")
    print_table(header, rows, console, gap=2, text_columns=2, styles=styles)
    if not coloured:
        console.print()
        mark = "A mark applies to all tokens up to the next mark."
        print_lines(Text(mark), console, console.width)


def _summary(record: GenerationRecord) -> list[tuple[str, str]]:
    rows = [
        *(("Exit", _exit(exit_)) for exit_ in record.exits),
        ("Propagation", propagation_words(record.propagation)),
        *_settings(record),
        (
            "Layers",
            f"{record.layers_per_token:.2f} of {record.num_layers} computed per token, including "
            "the prompt's tokens, which the table above does not count",
        ),
        ("Speed", _speed(record)),
        ("LM head", f"{record.counts.lm_head_rows:,} rows for {_count(record)}"),
    ]
    bos = known(record.bos)
    if bos is not None:
        rows.insert(0, ("Prompt", "begins with BOS" if bos == "yes" else "without BOS"))
    if record.verified:
        rows.append(
            (
                "Verified",
                f"early exit drafted {record.drafted:,} tokens, of which the full model confirmed "
                f"{record.accepted:,}; the full model chose the others",
            )
        )
    if record.full is not None:
        rows += _compared(record, record.full)
    if record.fallback_reason is not None:
        rows.append(
            ("No skipping", f"every layer computed every token here: {record.fallback_reason}")
        )
    return rows


def _settings(record: GenerationRecord) -> list[tuple[str, str]]:
    """Return how tokens were chosen; nothing for the likeliest of the model's own logits."""
    others = {
        name: value
        for name, value in record.settings.items()
        if name not in ("do_sample", "eos_token_id")
    }
    if not others:
        return []
    start = "tokens are sampled" if record.settings.get("do_sample") else "the likeliest token"
    return [("Choice", f"{start}; {', '.join(f'{name} {others[name]}' for name in others)}")]


def _exit(exit_: ExitEntry) -> str:
    threshold = exit_.threshold
    if threshold is None:
        return f"layer {exit_.layer}, no threshold: no token exits; {head_words(exit_.head)}"
    rule = f"{exit_.rule} >= {show_threshold(threshold)}"
    return f"layer {exit_.layer}, {rule}; {head_words(exit_.head)}"


def _count(record: GenerationRecord) -> str:
    count = len(record.tokens)
    return f"{count:,} new token{'' if count == 1 else 's'}"


def _speed(record: GenerationRecord) -> str:
    speed = f"{record.tokens_per_second:.1f} tokens/s"
    full = record.full
    if full is None:
        return speed
    return (
        f"{speed}, {full.speed_ratio:.2f} x the full model's {full.tokens_per_second:.1f} tokens/s "
        "(one run each)"
    )


def _compared(record: GenerationRecord, full: FullGeneration) -> list[tuple[str, str]]:
    count = len(record.tokens)
    if full.same_tokens == count == full.tokens:
        return [("Agreement", "all tokens are the same as the full model's")]
    return [
        (
            "Agreement",
            f"the first {full.same_tokens:,} of {_count(record)} are the same as the full model's; "
            "after that the texts differ",
        ),
        ("Full model", " ".join(full.text.split())),
    ]
