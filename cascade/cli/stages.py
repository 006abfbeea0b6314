"""Commands of stages: collect the hard tokens that they learn from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.app import app
from cascade.cli.showing import (
    DEVICE_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    command_line,
    print_record,
    progress_bar,
    status,
)

if TYPE_CHECKING:
    from cascade.corpora import TokenBlocks
    from cascade.models import DecoderStack

#: One token in so many is of the held-out part, as is one record.
_HELD_OUT = 5


@app.command("collect-hard")
def collect_hard(
    output: Annotated[Path, typer.Option(help="Folder for the dataset.")],
    threshold: Annotated[
        float | None, typer.Option(help="Tokens whose similarity is below it are hard.")
    ] = None,
    hard_ratio: Annotated[
        float | None,
        typer.Option(help="Share of hard tokens; without --threshold, fits it."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Exit layer; the last but one without.")] = None,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "smollm2-135m",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    corpus: Annotated[
        str, typer.Option(help="embedded, a .jsonl/.json/.parquet/.txt file, or a hub dataset.")
    ] = "embedded",
    text_column: Annotated[
        str | None, typer.Option(help="Column to read, where records are not in Alpaca form.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=0, help="Records to take; 0 for all.")] = 0,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop at this many tokens, a fifth of them held out.")
    ] = None,
    states_dtype: Annotated[
        str, typer.Option(help="How states are stored: float16, or bfloat16 for large ones.")
    ] = "float16",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 32,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    seed: Annotated[
        int | None, typer.Option(help="Draw the records at random; in corpus order without.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier dataset, or another unfinished one."),
    ] = False,
) -> None:
    """Run a model once over a corpus; store its exit states and which tokens are hard.

    Every fifth record is held out (of the embedded corpus, its own
    held-out split). Interrupted, the same command goes on from where it
    was. datasets.load_from_disk reads the result.
    """
    from cascade import hard_tokens
    from cascade.report import print_hard_tokens

    hard_tokens.check_output(output, overwrite=overwrite)
    hard_tokens.check_wish(threshold, hard_ratio, states_dtype)
    from cascade import models

    with status(f"Loading {model} (a first time can take half a minute)"):
        stack = models.load(model, revision=revision, dtype=dtype, device=device)
    with status(f"Reading {corpus}"):
        parts = _parts(
            stack,
            corpus,
            text_column=text_column,
            num_samples=num_samples or None,
            seq_len=seq_len,
            max_tokens=max_tokens,
            seed=seed,
        )
    tokens = sum(part.tokens for part in parts.values())
    size = hard_tokens.expected_bytes(stack, parts)
    typer.echo(
        f"Collecting {tokens:,} tokens into {output}: about {_bytes(size)}, states of "
        f"{stack.hidden_size:,} numbers in {states_dtype}",
        err=True,
    )
    with _told_to_go_on(output), progress_bar("Collecting", tokens) as advance:
        found = hard_tokens.collect_hard(
            stack,
            parts,
            output,
            layer=max(1, stack.num_layers - 1) if layer is None else layer,
            threshold=threshold,
            hard_ratio=hard_ratio,
            dtype=states_dtype,
            batch_size=batch_size,
            provenance={"command": command_line()},
            progress=advance,
            overwrite=overwrite,
        )
    print_record(print_hard_tokens, found.record)
    written = sum(file["bytes"] for file in found.record["files"])
    typer.echo(
        f"Wrote {output} ({_bytes(written)}); read it with "
        f"datasets.load_from_disk({str(output)!r})",
        err=True,
    )


@contextlib.contextmanager
def _told_to_go_on(output: Path) -> Iterator[None]:
    """Say after an interruption that what is done is not lost."""
    from cascade.hard_tokens import is_unfinished

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if is_unfinished(output):
            typer.echo(f"Stopped; {output} is kept: run the same command again to go on", err=True)
        raise


def _parts(
    stack: DecoderStack,
    corpus: str,
    *,
    text_column: str | None,
    num_samples: int | None,
    seq_len: int,
    max_tokens: int | None,
    seed: int | None,
) -> dict[str, TokenBlocks]:
    """Return both parts of a corpus, with the records of their tokens."""
    from cascade import corpora

    most: dict[str, int | None] = dict.fromkeys(corpora.PARTS)
    if max_tokens is not None:
        held_out = max(seq_len, max_tokens // _HELD_OUT)
        most = {"train": max_tokens - held_out, "held-out": held_out}
    return {
        part: corpora.load_blocks(
            corpus,
            stack.tokenizer,
            seq_len=seq_len,
            num_samples=num_samples,
            max_tokens=most[part],
            text_column=text_column,
            seed=seed,
            part=part,
            marks=True,
        )
        for part in corpora.PARTS
    }


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
