"""`cascade history`: how baselines moved over their commits, or reports over their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.app import command
from cascade.cli.commands.gate import ComparisonOptions
from cascade.cli.console import command_line, show_record, status
from cascade.cli.options import OutputOptions
from cascade.cli.output import run_folder, say_wrote

#: The files of `cascade history --output`.
FILES = ("history.json", "history.html")


@command("history")
def history(
    path: Annotated[
        Path,
        typer.Argument(
            help="Baseline, folder of baselines in a git work tree, or folder of reports."
        ),
    ],
    comparison: ComparisonOptions,
    output: OutputOptions,
    last: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Read the newest versions only, this many (default: all).",
            rich_help_panel="Comparison",
        ),
    ] = None,
) -> None:
    """Show how a baseline moved: every version against the one before and the first.

    Reads every committed version of a baseline from git, and the
    uncommitted one if it differs. The work tree is not changed. In a
    folder of reports, reads those of `cascade analyze` and `cascade
    gate`. Many small steps in one direction show as slow drift. Exit
    status: 0 the history is shown, whatever it shows; 2 there is no git,
    no work tree, no baseline, or no version that can be read. A single
    version that cannot be read is marked, with its commit. With --output,
    writes history.json and history.html.
    """
    with run_folder(output.output, FILES, overwrite=output.overwrite) as folder:
        from cascade.gate.history.comparing import HistoryConfig
        from cascade.gate.history.history import read_history
        from cascade.report.history.sections import history_page, print_history

        config = HistoryConfig(
            independent=comparison.independent,
            margin=comparison.margin,
            confidence=comparison.confidence,
            anyway=comparison.anyway,
            seed=comparison.seed,
            last=last,
        )
        with status(f"Reading the versions of {path}"):
            record = read_history(path, config, command=command_line())
        if folder is not None:
            from cascade.core.records import to_file

            for name, content in zip(FILES, (to_file(record), history_page(record)), strict=True):
                folder.write(name, content)
    show_record(record, print_history)
    say_wrote(output.output, FILES[1])
