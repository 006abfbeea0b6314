"""`cascade explain` and `cascade findings`."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.app import command
from cascade.cli.console import command_line, progress_bar
from cascade.cli.inputs import load_model, read_blocks
from cascade.cli.options import (
    BatchSize,
    MaxTokens,
    ModelOptions,
    OutputOptions,
    SampledCorpusOptions,
)
from cascade.cli.output import finish, report_folder, show
from cascade.core.defaults import EVALUATED_TOKENS
from cascade.core.errors import UsageError

if TYPE_CHECKING:
    from cascade.corpora.blocks import TokenBlocks
    from cascade.models.stack import DecoderStack
    from cascade.studies.explanations.records import FinalNormExplanation, LayerExplanation

_NORM = "+norm"


@dataclass(frozen=True)
class ExplainedCorpus(SampledCorpusOptions):
    """Which text an explanation measures."""

    max_tokens: MaxTokens = EVALUATED_TOKENS


@command("explain")
def explain(
    layer: Annotated[
        str, typer.Option(help="The row to explain: 25, or 30+norm for the final norm.")
    ],
    model: ModelOptions,
    corpus: ExplainedCorpus,
    output: OutputOptions,
    contrast: Annotated[
        int | None,
        typer.Option(help="The layer to compare with; the nearest stable one without."),
    ] = None,
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the intervals.")] = 0,
) -> None:
    """Say why a layer turns the stream as it does, and what that is worth.

    Splits its update into attention and MLP, takes every possible cause
    away, from it and from a neighbour, and names those with which the
    difference goes. With --output, writes the record, a page and pictures.
    """
    from cascade.report.studies import explanation, final_norm

    of_norm = layer.endswith(_NORM)
    number = _number(layer)
    if of_norm and contrast is not None:
        raise UsageError("--contrast is a layer to compare a layer with; leave it out for a norm")
    report_module, stem = (final_norm, "final-norm") if of_norm else (explanation, "explanation")
    with report_folder(output, stem, report_module.PICTURES) as folder:
        stack = load_model(model)
        blocks = read_blocks(stack, corpus, num_samples=corpus.num_samples or None)
        about: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
        about["command"] = command_line()
        if of_norm:
            norm_record = _explain_norm(stack, blocks, number, **about)
            report = finish(folder, stem, norm_record, final_norm.final_norm_report)
        else:
            record = _explain_layer(stack, blocks, number, contrast, **about)
            report = finish(folder, stem, record, explanation.explanation_report)
    show(report, output.output, f"{stem}.html")


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


@command("findings", order=())
def findings(
    page: Annotated[
        Path, typer.Argument(help="The page; its records and pictures lie in a folder beside it.")
    ] = Path("docs/findings.md"),
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure every record anew, by its command.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="Model to measure: smollm2-135m, a hub id, a folder, a .gguf file.")
    ] = "smollm2-135m",
    layer: Annotated[int, typer.Option(min=1, help="The layer to explain.")] = 25,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Corpora beside the embedded one; repeatable."),
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help="Heads of `cascade fit-heads` for the exit search.")
    ] = None,
) -> None:
    """Draw the page of findings from its records; with --measure, measure them first.

    Without options the page is drawn anew from docs/findings/*.json. With
    --measure, five commands are run, each of which writes its record and
    its pictures: explain (twice), compare-corpora, compare-models,
    search-exit.
    """
    folder = page.with_suffix("")
    if folder == page:
        raise UsageError(f"expected a page such as docs/findings.md, got {page}")
    if measure:
        _measure_findings(folder, model, layer, corpus or [], heads)
    elif corpus or heads is not None:
        raise UsageError("--corpus and --heads are for measuring; give --measure as well")
    _draw_findings(page, folder)
    typer.echo(f"Wrote {page} and its pictures in {folder}", err=True)


#: Copies of the model that it is compared with.
_COPIES = ("bf16", "int8", "int4", "noise:0.01")
#: Other sizes of the reference model.
_KIN = ("smollm2-360m", "smollm2-1.7b")


def _measure_findings(
    folder: Path, model: str, layer: int, corpora: list[str], heads: Path | None
) -> None:
    """Run the commands that write the records."""
    from cascade.core.records import read_typed
    from cascade.studies.explanations.records import LayerExplanation

    if not corpora:
        raise UsageError("expected at least one corpus beside the embedded one; name it: --corpus")
    of_model = [] if model == "smollm2-135m" else ["--model", model]
    to_folder = ["--output", str(folder), "--overwrite"]
    _run_command(["explain", "--layer", str(layer), *of_model, *to_folder])
    record = read_typed(folder / "explanation.json", LayerExplanation)
    last = record.provenance.model.num_layers
    _run_command(["explain", "--layer", f"{last}+norm", *of_model, *to_folder])
    _run_command(["compare-corpora", "embedded", *corpora, *of_model, *to_folder])
    copies = [part for how in _COPIES for part in ("--copy", how)]
    # Of the reference model's kin the sizes are known, whether or not their weights are at hand.
    kin = [] if of_model else [part for name in _KIN for part in ("--unmeasured", name)]
    _run_command(["compare-models", model, *copies, *kin, *to_folder])
    fitted = [] if heads is None else ["--heads", str(heads), "--propagation", "ridge"]
    _run_command(["search-exit", *of_model, *fitted, *to_folder])


def _run_command(command: list[str]) -> None:
    """Run one command as a user would: its line stands in its record."""
    typer.echo(f"cascade {shlex.join(command)}", err=True)
    exit_status = status_of([sys.executable, "-m", "cascade", *command])
    if exit_status:
        raise typer.Exit(exit_status)  # it has said why


def status_of(command: list[str]) -> int:
    """Run a command and return its exit status; interrupted, let it clean up after itself first."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            raise


def _draw_findings(page: Path, folder: Path) -> None:
    from cascade.core.files import write_text
    from cascade.report.studies.findings import (
        findings_markdown,
        findings_pictures,
        read_findings,
    )

    records = read_findings(folder)
    text = findings_markdown(records, pictures=folder.name)
    for picture in findings_pictures(records):
        write_text(folder / picture.file, picture.svg)
    write_text(page, text)
