"""The inputs of commands: models, corpora, heads, layers and operating points."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from cascade.cli.console import message, status
from cascade.core.errors import UsageError
from cascade.core.names import hidden_hub_id

if TYPE_CHECKING:
    from cascade.cli.options import CorpusOptions, ModelOptions
    from cascade.corpora.blocks import TokenBlocks
    from cascade.drafters.proposer import TrainedDrafter
    from cascade.exits.fitted_heads import FittedHeads
    from cascade.models.loading import DeviceMap
    from cascade.models.stack import DecoderStack


def load_model(options: ModelOptions, *, exits: bool = False) -> DecoderStack:
    """Return the model, loaded with a spinner.

    Args:
        options: Which model.
        exits: Check that its tokens can exit early, before anything else is read.
    """
    from cascade.models import loading

    device_map = cast("DeviceMap | None", device_map_of_options(options))
    say_which(options.model, "model")
    with status(f"Loading {options.model} (a first time can take half a minute)"):
        stack = loading.load(
            options.model,
            revision=options.revision,
            dtype=options.dtype,
            device=options.device,
            device_map=device_map,
        )
        if exits:
            from cascade.decoding.exit_support import check_exits

            check_exits(stack)
        return stack


def device_map_of_options(options: ModelOptions) -> str | dict[str, str | int] | None:
    """Return the device map of the options, checked before anything is read; None without one.

    Raises:
        UsageError: There is no such strategy or file, or --device is given too.
    """
    from cascade.cli.options import PlacedModelOptions

    if not isinstance(options, PlacedModelOptions):
        return None
    return device_map_named(options.device_map, options.device)


def device_map_named(name: str | None, device: str) -> str | dict[str, str | int] | None:
    """Return the device map of the option --device-map; None without one.

    Args:
        name: The value of the option.
        device: The value of --device.

    Raises:
        UsageError: There is no such strategy or file, or --device is given too.
    """
    from cascade.models.dispatch import device_map_of

    if name is None:
        return None
    found = device_map_of(name)
    if device != "cpu":
        raise UsageError(
            f"expected --device or --device-map, got {device} and {name}; leave one out"
        )
    return found


def say_which(source: str, kind: str) -> None:
    """Print on stderr that a path was taken, where a hub id of that name is known too.

    Args:
        source: The model or corpus.
        kind: "model" or "dataset".
    """
    note = hidden_hub_id(source, kind)
    if note is not None:
        message(note)


def check_cascade_alone(others: list[str]) -> None:
    """Check that no option is given together with `--cascade` that it does not take.

    Args:
        others: Those that are, as the command line spells them.

    Raises:
        UsageError: There are some.
    """
    if others:
        raise UsageError(
            f"--cascade sets base, stages and thresholds; leave out {', '.join(others)}"
        )


def read_blocks(
    stack: DecoderStack,
    options: CorpusOptions,
    *,
    embedded_split: str | None = None,
    num_samples: int | None = None,
) -> TokenBlocks:
    """Return the corpus cut into sequences, read with a spinner.

    Args:
        stack: The model whose tokenizer is used.
        options: Which text to read, and how many tokens.
        embedded_split: The split of the embedded corpus if the options name none.
        num_samples: How many records; None for all.
    """
    from cascade.corpora import blocks as corpora

    say_which(options.corpus, "dataset")
    usual = embedded_split if options.corpus == "embedded" else None
    with status(f"Reading {options.corpus}"):
        return corpora.load_blocks(
            options.corpus,
            stack.tokenizer,
            seq_len=options.seq_len,
            num_samples=num_samples,
            max_tokens=options.max_tokens,
            split=options.split or usual,
            text_column=options.text_column,
            bos=options.bos,
        )


def read_heads(path: Path | None, stack: DecoderStack) -> FittedHeads | None:
    """Return fitted heads; None, the logit lens, without a file."""
    from cascade.exits.fitted_heads import load_heads

    return None if path is None else load_heads(path, stack)


def read_drafter(path: Path | None, stack: DecoderStack) -> TrainedDrafter | None:
    """Return a trained drafter; None without a folder."""
    from cascade.drafters.proposer import load_drafter

    return None if path is None else load_drafter(path, stack)


def usual_layer(stack: DecoderStack, heads: FittedHeads | None) -> int:
    """Return the second to last layer, or the nearest one below it that the heads have."""
    usual = max(1, stack.num_layers - 1)
    if heads is None:
        return usual
    return max((layer for layer in heads.layers if layer <= usual), default=heads.layers[-1])


def read_layers(text: str) -> tuple[int, ...]:
    """Return the exit layers of an option such as "20,24,28".

    Raises:
        UsageError: The option has another form.
    """
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise UsageError(f"expected layers such as 24 or 20,24,28, got {text!r}") from None


def evaluated_layers(
    text: str | None, stack: DecoderStack, heads: FittedHeads | None, only_points: bool
) -> tuple[int, ...]:
    """Return the exit layers of the option, else those of the heads, or the second to last."""
    if text is not None:
        return read_layers(text)
    if only_points:
        return ()
    return tuple(heads.layers) if heads is not None else (max(1, stack.num_layers - 1),)


def parse_point(text: str) -> tuple[int, str, float]:
    """Return exit layer, rule and threshold of `LAYER:RULE:THRESHOLD`.

    Raises:
        UsageError: The text has another form.
    """
    try:
        layer, rule, threshold = text.split(":")
        return int(layer), rule, float(threshold)
    except ValueError:
        raise UsageError(
            f"expected an operating point LAYER:RULE:THRESHOLD such as 29:cosine:0.9517, got "
            f"{text!r}"
        ) from None
