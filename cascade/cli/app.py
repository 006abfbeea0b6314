"""The command line itself: its groups, its version, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import typer

from cascade.errors import CascadeError, UsageError

app = typer.Typer(
    name="cascade",
    help="Measure how a language model's layers saturate, and hold it to stored baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    help="Measure speed and memory, in one process, interleaved.", no_args_is_help=True
)
app.add_typer(bench, name="bench")


def _show_version(value: bool) -> None:
    if value:
        from cascade import __version__

        typer.echo(f"cascade {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse options that a script left empty: as a path, nothing would mean the current folder."""
    for before, argument in pairwise(["", *arguments]):
        flag = before if argument == "" else argument.removesuffix("=")
        if argument == "" or (argument.startswith("--") and argument != flag):
            raise UsageError(f"expected a value for {flag or 'the command'}, got an empty one")


def main() -> None:
    """Run the command line; what a user can put right is one line on stderr and exit status 2."""
    # Our own bars and messages say what concerns the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        _refuse_empty(sys.argv[1:])
        app()
    except CascadeError as error:
        # A path or a column can hold a line break of its own.
        typer.echo(f"cascade: {' '.join(str(error).splitlines())}", err=True)
        sys.exit(error.exit_status)
