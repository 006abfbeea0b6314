"""`cascade collect-hard`: collect hard tokens, and the options of their text."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

import typer

from cascade.cli import completion
from cascade.cli.app import command
from cascade.cli.console import command_line, message, progress_bar, show_record, status
from cascade.cli.engines import EngineOptions
from cascade.cli.inputs import load_model
from cascade.cli.options import (
    BatchSize,
    ExitLayer,
    NumSamples,
    PlacedModelOptions,
    PrintOptions,
    TextOptions,
)
from cascade.cli.output import check_utf8
from cascade.core.errors import UsageError

if TYPE_CHECKING:
    from cascade.stages.hard_tokens.records import StatesDtype
    from cascade.stages.hard_tokens.splits import CorpusConfig


@dataclass(frozen=True)
class StageCorpus(TextOptions):
    """The text whose hard tokens are collected."""

    num_samples: NumSamples = 0
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many tokens; a fifth is held out."),
    ] = None


@dataclass(frozen=True)
class CollectionOptions(PrintOptions):
    """Which tokens are hard, and where the dataset is written."""

    panel: ClassVar[str] = "Hard tokens"

    output: Annotated[Path, typer.Option(help="Folder for the dataset.")] = dataclasses.field(
        kw_only=True
    )
    layer: ExitLayer = None
    hard_ratio: Annotated[
        float | None, typer.Option(help="Share of hard tokens to which the threshold is fitted.")
    ] = None
    threshold: Annotated[
        float | None, typer.Option(help="Tokens below this similarity are hard.")
    ] = None
    states_dtype: Annotated[
        str,
        typer.Option(
            help="dtype of the stored states: float16, or bfloat16 for large ones.",
            autocompletion=completion.states_dtypes,
        ),
    ] = "float16"
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier or another unfinished dataset."),
    ] = False


@command("collect-hard")
def collect_hard(
    options: CollectionOptions,
    model: PlacedModelOptions,
    corpus: StageCorpus,
    engine: EngineOptions,
    batch_size: BatchSize = 32,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Sample records at random with this seed (default: take the first).",
            rich_help_panel="Corpus",
        ),
    ] = None,
) -> None:
    """Store a model's exit states over a corpus, and which tokens are hard.

    Runs the model once. Every fifth record is held out (of the embedded
    corpus, its held-out split). Run the same command again to resume
    after an interruption. datasets.load_from_disk reads the result.
    With --engine ray, many processes collect, and the result is the same.
    """
    from cascade.report.exits.hard_tokens import print_hard_tokens
    from cascade.stages.hard_tokens import collecting, splits
    from cascade.stages.hard_tokens.plan import CollectingConfig
    from cascade.stages.hard_tokens.working_folder import check_output

    output, on_ray = options.output, engine.config() is not None
    if engine.shards is not None:
        raise UsageError("--shards is for other commands: a dataset has shards of 16 MB")
    check_utf8(output)
    check_output(output, overwrite=options.overwrite)
    config = CollectingConfig(
        layer=options.layer,
        threshold=options.threshold,
        hard_ratio=options.hard_ratio,
        dtype=cast("StatesDtype", options.states_dtype),  # checked next
        batch_size=batch_size,
        command=command_line(),
    )
    config.check()
    stack = load_model(model, exits=True)
    with status(f"Reading {corpus.corpus}"):
        read = splits.load_splits(corpus_config(corpus, seed), stack.tokenizer)
    tokens = sum(blocks.tokens for blocks in read.values())
    size = splits.expected_bytes(stack, read)
    message(
        f"Collecting {tokens:,} tokens into {output}: about {_bytes(size)}, states of "
        f"{stack.hidden_size:,} numbers in {options.states_dtype}"
    )
    with says_how_to_resume(output):
        if on_ray:
            from cascade.cli.engine_runs import collect_on_ray

            plan = collecting.collection_plan(stack, read, config)
            found = collect_on_ray(plan, model, engine, output, overwrite=options.overwrite)
        else:
            with progress_bar("Collecting", tokens) as advance:
                found = collecting.collect_hard(
                    stack, read, output, config, progress=advance, overwrite=options.overwrite
                )
    show_record(found.record, print_hard_tokens)
    written = sum(file.bytes for file in found.record.files)
    message(
        f"Wrote {output} ({_bytes(written)}); read it with datasets.load_from_disk({str(output)!r})"
    )


@contextlib.contextmanager
def says_how_to_resume(output: Path) -> Iterator[None]:
    """Print after an interruption that the work so far is kept."""
    from cascade.stages.hard_tokens.dataset import is_unfinished

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if is_unfinished(output):
            message(f"Stopped; {output} is kept: run the same command again to resume")
        raise


def corpus_config(corpus: StageCorpus, seed: int | None = None) -> CorpusConfig:
    """Return the options of reading a corpus.

    Args:
        corpus: Options of the command.
        seed: Sample records with this seed; None for their order.
    """
    from cascade.stages.hard_tokens.splits import CorpusConfig

    return CorpusConfig(
        corpus=corpus.corpus,
        text_column=corpus.text_column,
        bos=corpus.bos,
        num_samples=corpus.num_samples or None,
        seq_len=corpus.seq_len,
        max_tokens=corpus.max_tokens,
        seed=seed,
    )


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
