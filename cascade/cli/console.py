"""What commands show while they run, and after: spinner, progress bar, messages and records."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import typer

from cascade.core.printable import printable
from cascade.core.urls import redacted

if TYPE_CHECKING:
    from rich.console import Console

R = TypeVar("R")


@dataclass(frozen=True)
class _Printing:
    as_json: bool = False
    quiet: bool = False


_PRINTING: ContextVar[_Printing | None] = ContextVar("printing", default=None)


@contextlib.contextmanager
def printing(*, as_json: bool, quiet: bool) -> Iterator[None]:
    """Set what commands print until the context ends.

    Args:
        as_json: `show_record` prints the record as JSON instead of the report.
        quiet: No messages, no progress, and no report.
    """
    token = _PRINTING.set(_Printing(as_json, quiet))
    try:
        yield
    finally:
        _PRINTING.reset(token)


def _wanted() -> _Printing:
    return _PRINTING.get() or _Printing()


def echo(text: str = "", *, err: bool = False) -> None:
    """Print a line, in which names from files cannot steer the terminal.

    Args:
        text: The line.
        err: Print it on stderr.
    """
    typer.echo(printable(text, keep="\n\t"), err=err)


def message(text: str) -> None:
    """Print a message on stderr, unless the command is quiet."""
    if not _wanted().quiet:
        echo(text, err=True)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Show a spinner on stderr while something takes long; nothing where it is no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if _wanted().quiet or not console.is_terminal:
        yield
        return
    # Text, not str: a path can hold what rich would take for markup.
    with console.status(Text(printable(text))):
        yield


@contextlib.contextmanager
def progress_bar(
    what: str, tokens: int, *, parts: int | None = None
) -> Iterator[Callable[[int], None]]:
    """Show tokens done, tokens/s and the time left on stderr, where it is a terminal.

    Args:
        what: What is done, e.g. "Analyzing".
        tokens: All tokens.
        parts: The number of shards, if each call is one; their number is shown too.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} tokens/s" if speed else "- tokens/s")

    console = Console(stderr=True)
    shards = (
        () if parts is None else (TextColumn("{task.fields[done]}/{task.fields[parts]} shards"),)
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *shards,
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        Speed(),
        TimeLeft(),
        TextColumn("left"),
    )
    disabled = _wanted().quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=disabled) as bar:
        task = bar.add_task(what, total=tokens, done=0, parts=parts)

        def advance(done: int) -> None:
            bar.update(task, advance=done, done=bar.tasks[0].fields["done"] + 1)

        yield advance


def command_line() -> str:
    """Return the command line of this process, quoted so that a shell can run it again.

    Credentials in addresses are left out, because records and reports have this line.
    """
    return shlex.join(["cascade", *map(redacted, sys.argv[1:])])


def show_record(record: R, show: Callable[[R, Console], None], *, stored: object = None) -> None:
    """Print a record on stdout: as a report, as JSON with `--json`, not at all with `--quiet`.

    A command saves its files first: printing fails if the disk behind stdout is full.

    Args:
        record: The record.
        show: Prints the report of the record.
        stored: What `--json` prints instead of the record, if its file has another form.
    """
    wanted = _wanted()
    if wanted.as_json:
        from cascade.core.records import sealed, to_json
        from cascade.core.schema import StoredRecord, to_plain

        shown = record if stored is None else stored
        echo(to_json(sealed(shown) if isinstance(shown, StoredRecord) else to_plain(shown)))
    elif not wanted.quiet:
        from rich.console import Console

        show(record, Console())
