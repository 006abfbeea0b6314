"""What commands show while they run, and after: spinner, progress bar, printed records."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

R = TypeVar("R")


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Show a spinner on stderr while something takes long; nothing where it is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


@contextlib.contextmanager
def progress_bar(what: str, tokens: int) -> Iterator[Callable[[int], None]]:
    """Show tokens done, tokens/s and the time left on stderr, where it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} tokens/s" if speed else "- tokens/s")

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        Speed(),
        TimeLeft(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=tokens)
        yield lambda done: bar.advance(task, done)


def command_line() -> str:
    """Return what the user ran, as a line that can be run again."""
    return shlex.join(["cascade", *sys.argv[1:]])


def print_record(show: Callable[[R, Console], None], record: R) -> None:
    """Print a record on stdout; what it is drawn from was saved before."""
    from rich.console import Console

    show(record, Console())
