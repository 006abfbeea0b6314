"""The command that compares models: several sizes, or one and altered copies of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.app import app
from cascade.cli.console import MODEL_HELP, command_line, load_model, progress_bar, status
from cascade.cli.options import (
    BatchSize,
    Column,
    Corpus,
    Device,
    Dtype,
    NumSamples,
    Output,
    Overwrite,
    SeqLen,
    Split,
)
from cascade.cli.output import finish, report_folder, show
from cascade.core.errors import ModelError

if TYPE_CHECKING:
    from cascade.studies.comparisons.compared_models import (
        Candidate,
        MeasuredModel,
        SameText,
        UnmeasuredModel,
    )

#: The pictures that a comparison may have.
MODELS_PICTURES = ("models-profiles.svg", "models-operations.svg")


@app.command("compare-models")
def compare_models(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    copies: Annotated[
        list[str] | None,
        typer.Option("--copy", help="Copy of the first: int8, int4, bf16, noise:0.01; repeatable."),
    ] = None,
    unmeasured: Annotated[
        list[str] | None,
        typer.Option(help="Model to describe by its configuration alone; repeatable."),
    ] = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Measure nothing; no weights are needed.")
    ] = False,
    corpus: Corpus = "embedded",
    split: Split = None,
    text_column: Column = None,
    num_samples: NumSamples = 500,
    seq_len: SeqLen = 128,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Stop at this many tokens per model.")
    ] = 16_384,
    batch_size: BatchSize = 32,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the noise in copies.")] = 0,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare models over relative depth: profiles, dips, exit layers.

    All read the same text, each with its own tokenizer, and one model is in
    memory at a time. A folder with a config.json and no weights is described
    by its configuration. With --output, writes models.html, models.json and
    the pictures.
    """
    with report_folder(output, "models", MODELS_PICTURES, overwrite=overwrite) as folder:
        from cascade.report.studies.models import models_report
        from cascade.studies.comparisons import compared_models, model_comparison
        from cascade.studies.comparisons.altered_models import Alteration

        wanted = compared_models.candidates(
            models,
            copies=[Alteration.parse(text, seed=seed) for text in copies or ()],
            unmeasured=unmeasured or (),
            config_only=config_only,
        )
        # What cannot be read is said before minutes are spent; copies are of the first model.
        for candidate in {each.source: each for each in reversed(wanted)}.values():
            _check(candidate)
        text = compared_models.SameText(
            corpus,
            seq_len=seq_len,
            max_tokens=max_tokens,
            num_samples=num_samples or None,
            split=split,
            text_column=text_column,
        )
        record = model_comparison.compare_models(
            (_seen(each, text, seq_len, batch_size, dtype, device) for each in wanted),
            command=command_line(),
        )
        report = finish(folder, "models", record, models_report)
    show(report, output, "models")


def _check(candidate: Candidate) -> None:
    from cascade.studies.comparisons.configurations import known_names

    with status(f"Looking for {candidate.source}"):
        try:
            candidate.check()
        except ModelError as error:
            if candidate.measured and candidate.source in known_names():
                hint = f"; its sizes alone are known: --unmeasured {candidate.source}"
                raise type(error)(f"{error}{hint}") from error
            raise


def _seen(
    candidate: Candidate,
    text: SameText,
    seq_len: int,
    batch_size: int,
    dtype: str,
    device: str,
) -> MeasuredModel | UnmeasuredModel:
    from cascade.studies.comparisons.altered_models import alter
    from cascade.studies.comparisons.compared_models import describe_model, measure_model

    if not candidate.measured:
        return describe_model(candidate.source, seq_len)
    stack = load_model(candidate.source, None, dtype, device)
    if candidate.alteration is not None:
        with status(f"Altering a copy: {candidate.alteration.name}"):
            alter(stack, candidate.alteration)
    with status("Reading the corpus"):
        blocks = text.blocks(stack)
    with progress_bar(str(stack.provenance["name"]), blocks.tokens) as advance:
        return measure_model(stack, blocks, batch_size=batch_size, progress=advance)
