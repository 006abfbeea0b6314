"""`cascade fit-heads`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.app import app
from cascade.cli.console import command_line, load_model, progress_bar, read_layers
from cascade.cli.inputs import embedded, read_blocks
from cascade.cli.options import (
    BatchSize,
    Column,
    Corpus,
    Device,
    Dtype,
    MaxTokens,
    Model,
    Overwrite,
    Revision,
    Seed,
    SeqLen,
    Split,
)
from cascade.cli.output import check_free


@app.command("fit-heads")
def fit_heads(
    output: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    layers: Annotated[str, typer.Option(help="Exit layers, e.g. 20,24,28.")],
    model: Model = "smollm2-135m",
    revision: Revision = None,
    corpus: Corpus = "embedded",
    split: Split = None,
    text_column: Column = None,
    seq_len: SeqLen = 128,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 32,
    distill: Annotated[
        int, typer.Option(min=0, help="Then learn from the full model, in so many passes.")
    ] = 0,
    half: Annotated[bool, typer.Option("--half", help="Store in 16 bits: half the size.")] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fit exit heads in closed form, and maps that tell upper layers of exited tokens.

    One pass over the corpus (of the embedded one: its training split).
    --distill goes on from there, and keeps what is better on sequences
    kept aside.
    """
    wanted = read_layers(layers)
    check_free(output, overwrite=overwrite)
    from cascade.core.provenance import provenance_of
    from cascade.exits import distillation, head_fitting

    stack = load_model(model, revision, dtype, device)
    blocks = read_blocks(
        stack, corpus, split or embedded(corpus, "train"), text_column, seq_len, max_tokens
    )
    with progress_bar("Fitting", blocks.tokens) as advance:
        fitted = head_fitting.fit_heads(
            stack,
            blocks,
            wanted,
            batch_size=batch_size,
            provenance=provenance_of(stack, blocks, command_line()),
            progress=advance,
        )
    if distill:
        with progress_bar("Distilling", distill * distillation.trained_tokens(blocks)) as advance:
            fitted = distillation.distill(
                stack,
                fitted,
                blocks,
                epochs=distill,
                batch_size=batch_size,
                seed=seed,
                progress=advance,
            )
    fitted.save(output, half=half)
    # Told after all is safe: what is printed to can be full.
    size = output.stat().st_size / 1e6
    typer.echo(f"Wrote {output} ({size:.1f} MB): heads for the layers {layers}", err=True)
    about = fitted.provenance.get("distillation", {})
    for layer, losses in about.get("kl_on_sequences_kept_aside", {}).items():
        typer.echo(
            f"Layer {layer}: KL to the full model {losses[0]:.4f} nats in closed form, "
            f"{min(losses):.4f} distilled (on sequences kept aside)"
        )
