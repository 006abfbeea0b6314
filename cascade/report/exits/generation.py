"""Generated text for the terminal: where each token comes from, and a summary.

With exits, that is the layer at which a token exited; with drafts, what drafted it.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """Print a generated text, each token with where it comes from, and a summary.

    On a terminal with colours, each token has the colour of its exit layer or of what drafted it.
    Otherwise (a pipe, a file, `NO_COLOR`), that is printed in brackets before the tokens.

    Args:
        record: The record.
        console: Where to print; its width, encoding and colours are respected.

    Raises:
        ValueError: The record has another schema, or a token with an unknown exit layer.
    """
    _check(record)
    coloured = console.color_system is not None and not console.no_color
    print_lines(_text(record, console, coloured=coloured), console, console.width)
    print_heading("Drafts" if known(record.sources) is not None else "Exit layers", console)
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


@dataclass(frozen=True)
class _Origin:
    """Where tokens come from: an exit layer, or a proposer of drafts.

    Attributes:
        name: For the table.
        mark: For text without colours.
        colour: The colour of its tokens.
        tokens: The number of its tokens.
        share: The share of all new tokens.
        about: A few words.
    """

    name: str
    mark: str
    colour: str
    tokens: int
    share: float
    about: str


def _origins(record: GenerationRecord) -> dict[int, _Origin]:
    """Return all origins of tokens, by the number that a token has in the record."""
    sources = known(record.sources)
    if sources is None:
        lower = [row for row in record.by_layer if row.layer != record.num_layers]
        colours = {row.layer: _COLOURS[n % len(_COLOURS)] for n, row in enumerate(lower)}
        return {
            row.layer: _Origin(
                str(row.layer),
                f"[{row.layer}]",
                colours.get(row.layer, _FULL_COLOUR),
                row.tokens,
                row.share,
                "all layers" if row.layer == record.num_layers else "exited",
            )
            for row in record.by_layer
        }
    found = {}
    for number, name in enumerate(["full model", *(known(record.proposers) or ())]):
        count = sources.count(number)
        found[number] = _Origin(
            name,
            f"[{name}]",
            _COLOURS[(number - 1) % len(_COLOURS)] if number else _FULL_COLOUR,
            count,
            count / max(1, len(sources)),
            "drafted" if number else "not drafted",
        )
    return {number: origin for number, origin in found.items() if origin.tokens or not number}


def _numbers(record: GenerationRecord) -> list[int]:
    """Return the origin of each token, as in `_origins`."""
    return known(record.sources) or list(record.exit_layers)


def _text(record: GenerationRecord, console: Console, *, coloured: bool) -> Text:
    """Return prompt and tokens, coloured or with each run of tokens marked by its origin."""

    def shown(text: str) -> str:
        return printable(text, console, keep="\n\t")

    origins = _origins(record)
    text = Text(shown(record.prompt) + "\n\n" * record.chat)
    pairs = zip(_numbers(record), record.tokens, strict=True)
    for number, run in groupby(pairs, key=lambda pair: pair[0]):
        joined = "".join(token for _, token in run)
        if coloured:
            text.append(shown(joined), style=origins[number].colour)
        else:
            # After leading blanks, so that the mark is directly before the word.
            word = joined.lstrip()
            mark = origins[number].mark
            text.append(f"{shown(joined[: len(joined) - len(word)])}{mark}{shown(word)}")
    return text


def _print_legend(record: GenerationRecord, console: Console, *, coloured: bool) -> None:
    rows, styles = [], {}
    for place, origin in enumerate(_origins(record).values()):
        if coloured:
            styles[place] = origin.colour
        mark = origin.colour.removeprefix("bright_") if coloured else origin.mark
        rows.append([origin.name, f"{origin.tokens:,}", share(origin.share), mark, origin.about])
    if not rows:
        console.print(Text("none"))
        return
    first = "layer" if known(record.sources) is None else "by"
    header = (first, "tokens", "share", "colour" if coloured else "mark", "")
    print_table(header, rows, console, gap=2, text_columns=2, styles=styles)
    if not coloured:
        console.print()
        mark = "A mark applies to all tokens up to the next mark."
        print_lines(Text(mark), console, console.width)


def _summary(record: GenerationRecord) -> list[tuple[str, str]]:
    rows = [
        *(("Exit", _exit(exit_)) for exit_ in record.exits),
        *([("Propagation", propagation_words(record.propagation))] if record.exits else []),
        *_settings(record),
        _computed(record),
        ("Speed", _speed(record)),
        ("LM head", f"{record.counts.lm_head_rows:,} rows for {_count(record)}"),
    ]
    bos = known(record.bos)
    if bos is not None:
        rows.insert(0, ("Prompt", "begins with BOS" if bos == "yes" else "without BOS"))
    if record.verified:
        rows.append(("Verified", _verified(record)))
    engine = known(record.engine)
    if engine is not None:
        rows.append(("Engine", engine))
    if record.full is not None:
        rows += _compared(record, record.full)
    if record.fallback_reason is not None:
        rows.append(
            ("No skipping", f"every layer computed every token here: {record.fallback_reason}")
        )
    return rows


def _computed(record: GenerationRecord) -> tuple[str, str]:
    if known(record.sources) is not None:
        rows = record.counts.layer_rows[0]
        return ("Computed", f"{rows:,} tokens with prompt and drafts, for {_count(record)}")
    return (
        "Layers",
        f"{record.layers_per_token:.2f} of {record.num_layers} computed per token, including "
        "the prompt's tokens, which the table above does not count",
    )


def _verified(record: GenerationRecord) -> str:
    passes = known(record.passes)
    if passes is None and not record.exits:
        return "the full model chose every token; this model and dtype are decoded without drafts"
    what = "early exit" if passes is None else "lookup"
    if passes is not None and {*(known(record.proposers) or ())} - {"n-gram", "runner-ups"}:
        what = "lookup and drafter"
    said = (
        f"{what} drafted {record.drafted:,} tokens, of which the full model confirmed"
        f" {record.accepted:,}; the full model chose the others"
    )
    if passes is None:
        return said
    number = f"{passes:,} pass{'' if passes == 1 else 'es'}"
    return f"{said}; {number}, {known(record.tokens_per_pass):.2f} tokens per pass"


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
