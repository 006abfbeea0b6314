"""`cascade explain` and `cascade findings`: explain a layer, and draw the page of findings."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from cascade.cli import completion
from cascade.cli.app import command
from cascade.cli.console import command_line, message, progress_bar
from cascade.cli.inputs import load_model, read_blocks
from cascade.cli.options import (
    BatchSize,
    MaxTokens,
    ModelOptions,
    OutputOptions,
    SampledCorpusOptions,
    Seed,
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
    """The text of an explanation."""

    max_tokens: MaxTokens = EVALUATED_TOKENS


@dataclass(frozen=True)
class ExplanationOptions:
    """Which row of a profile is explained."""

    panel: ClassVar[str] = "Explanation"

    layer: Annotated[
        str,
        typer.Option(
            help="Row to explain: a layer, or 30+norm for the final norm after layer 30.",
            autocompletion=completion.row,
        ),
    ]
    contrast: Annotated[
        int | None,
        typer.Option(
            help="Layer to compare it with (default: nearest stable one).",
            autocompletion=completion.layer,
        ),
    ] = None


@command("explain")
def explain(
    wanted: ExplanationOptions,
    model: ModelOptions,
    corpus: ExplainedCorpus,
    output: OutputOptions,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
) -> None:
    """Explain why a layer changes the hidden state as much as it does.

    Splits the layer's update into attention and MLP, removes each
    possible cause from it and from a neighbour, and names the causes
    without which the two layers no longer differ. Also measures the
    perplexity of the model without the layer. With --output, writes the
    record, an HTML page and figures.
    """
    from cascade.report.studies import explanation, final_norm

    of_norm = wanted.layer.endswith(_NORM)
    number = _number(wanted.layer)
    if of_norm and wanted.contrast is not None:
        raise UsageError("--contrast compares two layers; leave it out for a norm")
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
            record = _explain_layer(stack, blocks, number, wanted.contrast, **about)
            report = finish(folder, stem, record, explanation.explanation_report)
    show(norm_record if of_norm else record, report, output.output, f"{stem}.html")


def _number(layer: str) -> int:
    try:
        return int(layer.removesuffix(_NORM))
    except ValueError:
        raise UsageError(
            f"expected a row of a profile such as 25 or 30{_NORM} (the final norm), got {layer!r}"
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
            f"expected {stack.num_layers}{_NORM}, got {layer}{_NORM}; the final norm follows layer "
            f"{stack.num_layers}"
        )
    with progress_bar("Explaining", blocks.tokens) as advance:
        return explain_norm(stack, blocks, progress=advance, **about)


_MEASURING = "Measuring"


@command("findings")
def findings(
    page: Annotated[
        Path, typer.Argument(help="Page to write; records and figures are in a folder next to it.")
    ] = Path("docs/findings.md"),
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure every record first.", rich_help_panel=_MEASURING),
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            help="Short name, hub id, folder or .gguf file.",
            rich_help_panel=_MEASURING,
            autocompletion=completion.models,
        ),
    ] = "smollm2-135m",
    layer: Annotated[
        int,
        typer.Option(
            min=1,
            help="Layer to explain.",
            rich_help_panel=_MEASURING,
            autocompletion=completion.layer,
        ),
    ] = 25,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Corpus to compare with the embedded one; repeatable.",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(
            help="File of `cascade fit-heads` for the exit search.", rich_help_panel=_MEASURING
        ),
    ] = None,
) -> None:
    """Write the page of findings from stored records, or measure them first.

    Reads the records in docs/findings/. With --measure, runs the five
    commands that write them: explain (twice), compare-corpora,
    compare-models and search-exit.
    """
    folder = page.with_suffix("")
    if folder == page:
        raise UsageError(f"expected a page such as docs/findings.md, got {page}")
    if measure:
        _measure_findings(folder, model, layer, corpus or [], heads)
    elif corpus or heads is not None:
        raise UsageError("--corpus and --heads need --measure; add it, or leave them out")
    _draw_findings(page, folder)
    message(f"Wrote {page} and its pictures in {folder}")


#: Copies of the model that it is compared with.
_COPIES = ("bf16", "int8", "int4", "noise:0.01")
#: Other sizes of the reference model.
_OTHER_SIZES = ("smollm2-360m", "smollm2-1.7b")


def _measure_findings(
    folder: Path, model: str, layer: int, corpora: list[str], heads: Path | None
) -> None:
    """Run the commands that write the records."""
    from cascade.core.records import read_typed
    from cascade.studies.explanations.records import LayerExplanation

    if not corpora:
        raise UsageError(
            "expected at least one --corpus to compare with the embedded one, got none"
        )
    of_model = [] if model == "smollm2-135m" else ["--model", model]
    to_folder = ["--output", str(folder), "--overwrite"]
    _run_command(["explain", "--layer", str(layer), *of_model, *to_folder])
    record = read_typed(folder / "explanation.json", LayerExplanation)
    last = record.provenance.model.num_layers
    _run_command(["explain", "--layer", f"{last}+norm", *of_model, *to_folder])
    _run_command(["compare-corpora", "embedded", *corpora, *of_model, *to_folder])
    copies = [word for kind in _COPIES for word in ("--copy", kind)]
    # The sizes of the reference model's family are known even without their weights.
    others = [] if of_model else [word for name in _OTHER_SIZES for word in ("--unmeasured", name)]
    _run_command(["compare-models", model, *copies, *others, *to_folder])
    fitted = [] if heads is None else ["--heads", str(heads), "--propagation", "ridge"]
    _run_command(["search-exit", *of_model, *fitted, *to_folder])


def _run_command(command: list[str]) -> None:
    """Run one command in a process of its own, so that its record has its command line."""
    message(f"cascade {shlex.join(command)}")
    exit_status = status_of([sys.executable, "-m", "cascade", *command])
    if exit_status:
        raise typer.Exit(exit_status)  # the command printed the error


def status_of(command: list[str]) -> int:
    """Run a command and return its exit status; if interrupted, let it clean up first."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            raise


def _draw_findings(page: Path, folder: Path) -> None:
    from cascade.core.run_folder import RunFolder
    from cascade.report.studies.findings import (
        findings_markdown,
        findings_pictures,
        read_findings,
    )

    records = read_findings(folder)
    text = findings_markdown(records, pictures=folder.name)
    pictures = findings_pictures(records)
    names = [page.name, *(f"{folder.name}/{picture.file}" for picture in pictures)]
    with RunFolder(page.parent, names, overwrite=True, wait=60) as written:
        written.write(page.name, text)
        for name, picture in zip(names[1:], pictures, strict=True):
            written.write(name, picture.svg)
