"""`cascade check`: check the files of committed baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.app import command
from cascade.cli.console import echo, message
from cascade.cli.options import Quiet

#: The exit status if something is wrong with a file, as of `cascade gate` if it finds drift.
PROBLEMS_STATUS = 1


@command("check")
def check(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders or files of baselines (default: baselines)."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Check the files of committed baselines, in a second and without a model.

    Each file must be sealed, readable, at most 2 MB large, and found by
    the gate for the model and corpus in its record. Prints one line per
    problem. Exit status: 0 no problem, 1 a problem, 2 no baseline at the
    given paths.
    """
    from cascade.gate.baseline_files import check_files

    checked = check_files(paths or [Path("baselines")])
    for line in checked.problems:
        echo(line)
    if checked.problems:
        raise typer.Exit(PROBLEMS_STATUS)
    count = len(checked.baselines)
    message(f"Checked {count:,} baseline{'s' * (count != 1)}: sealed, readable, used and small")
