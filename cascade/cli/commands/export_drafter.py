"""`cascade export-drafter`: write a drafter in a layout that other programs load."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from cascade.cli.app import command
from cascade.cli.console import command_line, echo
from cascade.cli.inputs import load_model
from cascade.cli.options import ModelOptions, Overwrite
from cascade.cli.output import check_utf8


@dataclass(frozen=True)
class ExportOptions:
    """Which drafter is exported, where to, and for which server."""

    panel: ClassVar[str] = "Export"

    drafter: Annotated[
        Path, typer.Argument(help="Folder of `cascade train-drafter --architecture eagle3`.")
    ]
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = dataclasses.field(
        kw_only=True
    )
    verifier: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder from which a server loads the model (default: as --model)."
        ),
    ] = None
    overwrite: Overwrite = False


@command("export-drafter")
def export_drafter(options: ExportOptions, model: ModelOptions) -> None:
    """Export a drafter as an EAGLE-3 checkpoint, which vLLM can serve.

    The checkpoint has the layout of the library speculators: config.json and
    model.safetensors, in bfloat16.
    """
    from cascade.drafters.export.exporting import CONFIG, WEIGHTS, check_can_be_exported
    from cascade.drafters.export.exporting import check_output as check
    from cascade.drafters.export.exporting import export_drafter as exported

    output = options.output
    check_utf8(output)
    check_can_be_exported(options.drafter)
    check(output, overwrite=options.overwrite)
    exported(
        options.drafter,
        load_model(model),
        output,
        verifier=options.verifier,
        overwrite=options.overwrite,
        command=command_line(),
    )
    size = (output / WEIGHTS).stat().st_size
    echo(f"Wrote {output / CONFIG} and {output / WEIGHTS} ({size / 1e6:,.1f} MB)")
