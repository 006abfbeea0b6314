"""The command that explains one row of a profile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.app import app
from cascade.cli.console import command_line, load_model, progress_bar, status
from cascade.cli.options import (
    BatchSize,
    Column,
    Corpus,
    Device,
    Dtype,
    MaxTokens,
    Model,
    NumSamples,
    Output,
    Overwrite,
    Revision,
    SeqLen,
    Split,
)
from cascade.core.errors import UsageError

if TYPE_CHECKING:
    from cascade.corpora.blocks import TokenBlocks
    from cascade.models.stack import DecoderStack
    from cascade.studies.explanations.records import FinalNormExplanation, LayerExplanation

_NORM = "+norm"


@app.command()
def explain(
    layer: Annotated[
        str, typer.Option(help="The row to explain: 25, or 30+norm for the final norm.")
    ],
    contrast: Annotated[
        int | None,
        typer.Option(help="The layer to compare with; the nearest stable one without."),
    ] = None,
    model: Model = "smollm2-135m",
    revision: Revision = None,
    corpus: Corpus = "embedded",
    split: Split = None,
    text_column: Column = None,
    num_samples: NumSamples = 500,
    seq_len: SeqLen = 128,
    max_tokens: MaxTokens = 8192,
    batch_size: BatchSize = 8,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the intervals.")] = 0,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Say why a layer turns the stream as it does, and what that is worth.

    Splits its update into attention and MLP, takes every possible cause
    away, from it and from a neighbour, and names those with which the
    difference goes. With --output, writes the record, a page and pictures.
    """
    from cascade.cli.output import finish, report_folder, show
    from cascade.report.studies import explanation, final_norm

    of_norm = layer.endswith(_NORM)
    number = _number(layer)
    if of_norm and contrast is not None:
        raise UsageError("--contrast is a layer to compare a layer with; leave it out for a norm")
    room, stem = (final_norm, "final-norm") if of_norm else (explanation, "explanation")
    with report_folder(output, stem, room.PICTURES, overwrite=overwrite) as folder:
        from cascade.corpora.blocks import load_blocks

        stack = load_model(model, revision, dtype, device)
        with status(f"Reading {corpus}"):
            blocks = load_blocks(
                corpus,
                stack.tokenizer,
                seq_len=seq_len,
                num_samples=num_samples or None,
                max_tokens=max_tokens,
                split=split,
                text_column=text_column,
            )
        about: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
        about["command"] = command_line()
        if of_norm:
            norm_record = _explain_norm(stack, blocks, number, **about)
            report = finish(folder, stem, norm_record, final_norm.final_norm_report)
        else:
            record = _explain_layer(stack, blocks, number, contrast, **about)
            report = finish(folder, stem, record, explanation.explanation_report)
    show(report, output, stem)


def _number(layer: str) -> int:
    try:
        return int(layer.removesuffix(_NORM))
    except ValueError:
        raise UsageError(
            f"expected a row of a profile, 25 or (for the final norm) 30{_NORM}, got {layer!r}"
        ) from None


def _explain_layer(
    stack: DecoderStack, blocks: TokenBlocks, layer: int, contrast: int | None, **about: Any
) -> LayerExplanation:
    from cascade.studies.explanations.layer_explanation import explain

    with progress_bar("Explaining", blocks.tokens) as advance:
        return explain(stack, blocks, layer, contrast=contrast, progress=advance, **about)


def _explain_norm(
    stack: DecoderStack, blocks: TokenBlocks, layer: int, **about: Any
) -> FinalNormExplanation:
    from cascade.studies.explanations.final_norm import explain_norm

    if layer != stack.num_layers:
        raise UsageError(
            f"the final norm follows layer {stack.num_layers}: expected {stack.num_layers}{_NORM}, "
            f"got {layer}{_NORM}"
        )
    with progress_bar("Explaining", blocks.tokens) as advance:
        return explain_norm(stack, blocks, progress=advance, **about)
