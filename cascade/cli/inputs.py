"""What commands read: corpora, heads, layers and operating points."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cascade.cli.console import read_layers, status
from cascade.core.errors import UsageError

if TYPE_CHECKING:
    from cascade.corpora.blocks import TokenBlocks
    from cascade.exits.fitted_heads import FittedHeads
    from cascade.models.stack import DecoderStack


def check_cascade_alone(others: list[str]) -> None:
    """Refuse options that have no meaning together with `--cascade`."""
    if others:
        raise UsageError(
            f"--cascade says base, stages and thresholds itself; leave out {', '.join(others)}"
        )


def read_blocks(
    stack: DecoderStack,
    corpus: str,
    split: str | None,
    text_column: str | None,
    seq_len: int,
    max_tokens: int | None,
) -> TokenBlocks:
    """Read all of a corpus, or as much as `max_tokens`, with a spinner."""
    from cascade.corpora import blocks as corpora

    with status(f"Reading {corpus}"):
        return corpora.load_blocks(
            corpus,
            stack.tokenizer,
            seq_len=seq_len,
            num_samples=None,
            max_tokens=max_tokens,
            split=split,
            text_column=text_column,
        )


def read_heads(path: Path | None, stack: DecoderStack) -> FittedHeads | None:
    """Read fitted heads; None, the logit lens, where no file is named."""
    from cascade.exits.fitted_heads import load_heads

    return None if path is None else load_heads(path, stack)


def usual_layer(stack: DecoderStack, heads: FittedHeads | None) -> int:
    """Return the last layer but one, or the last below it that heads were fitted for."""
    usual = max(1, stack.num_layers - 1)
    if heads is None:
        return usual
    return max((layer for layer in heads.layers if layer <= usual), default=heads.layers[-1])


def embedded(corpus: str, split: str) -> str | None:
    """Return the split that a command takes of the embedded corpus."""
    return split if corpus == "embedded" else None


def evaluated_layers(
    text: str | None, stack: DecoderStack, heads: FittedHeads | None, only_points: bool
) -> tuple[int, ...]:
    """Return the exit layers that an option names; else those of the heads, or the last but one."""
    if text is not None:
        return read_layers(text)
    if only_points:
        return ()
    return tuple(heads.layers) if heads is not None else (max(1, stack.num_layers - 1),)


def parse_point(text: str) -> tuple[int, str, float]:
    """Return exit layer, rule and threshold of `LAYER:RULE:THRESHOLD`."""
    parts = text.split(":")
    try:
        layer, rule, threshold = parts
        return int(layer), rule, float(threshold)
    except ValueError:
        raise UsageError(
            f"expected a point LAYER:RULE:THRESHOLD such as 29:cosine:0.9517, got {text!r}"
        ) from None
