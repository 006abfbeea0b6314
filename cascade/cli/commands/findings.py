"""The command that draws the page of findings, and measures what it is drawn from."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.app import app
from cascade.core.errors import UsageError


@app.command()
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
        _measure(folder, model, layer, corpus or [], heads)
    elif corpus or heads is not None:
        raise UsageError("--corpus and --heads are for measuring; give --measure as well")
    _draw(page, folder)
    typer.echo(f"Wrote {page} and its pictures in {folder}", err=True)


#: Copies of the model that it is compared with.
_COPIES = ("bf16", "int8", "int4", "noise:0.01")
#: Other sizes of the reference model.
_KIN = ("smollm2-360m", "smollm2-1.7b")


def _measure(folder: Path, model: str, layer: int, corpora: list[str], heads: Path | None) -> None:
    """Run the commands that write the records."""
    from cascade.core.records import read_typed
    from cascade.studies.explanations.records import LayerExplanation

    if not corpora:
        raise UsageError("expected at least one corpus beside the embedded one; name it: --corpus")
    of_model = [] if model == "smollm2-135m" else ["--model", model]
    to_folder = ["--output", str(folder), "--overwrite"]
    _run(["explain", "--layer", str(layer), *of_model, *to_folder])
    record = read_typed(folder / "explanation.json", LayerExplanation)
    last = record.provenance.model.num_layers
    _run(["explain", "--layer", f"{last}+norm", *of_model, *to_folder])
    _run(["compare-corpora", "embedded", *corpora, *of_model, *to_folder])
    copies = [part for how in _COPIES for part in ("--copy", how)]
    # Of the reference model's kin the sizes are known, whether or not their weights are at hand.
    kin = [] if of_model else [part for name in _KIN for part in ("--unmeasured", name)]
    _run(["compare-models", model, *copies, *kin, *to_folder])
    fitted = [] if heads is None else ["--heads", str(heads), "--propagation", "ridge"]
    _run(["search-exit", *of_model, *fitted, *to_folder])


def _run(command: list[str]) -> None:
    """Run one command as a user would: its line stands in its record."""
    typer.echo(f"cascade {shlex.join(command)}", err=True)
    status = _status_of([sys.executable, "-m", "cascade", *command])
    if status:
        raise typer.Exit(status)  # it has said why


def _status_of(command: list[str]) -> int:
    """Wait for a command; where the wait is broken off, let it clear up after itself first."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            raise


def _draw(page: Path, folder: Path) -> None:
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
