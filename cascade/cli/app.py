"""The command line itself: its groups, its version, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, NoReturn

import typer

from cascade.core.errors import CascadeError, UsageError, os_reason

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


#: How typer refuses a command line: the ClickException of whichever click it is made of.
_Refusal: type[Exception] = typer.BadParameter.__mro__[2]

#: What writing to an open stream can end with; every file is written with an error of its own.
_STREAM_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


def main() -> None:
    """Run the command line; what a user can put right is one line on stderr and exit status 2."""
    # Our own bars and messages say what concerns the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        with _unwinding():
            _refuse_empty(sys.argv[1:])
            sys.exit(app(prog_name="cascade", standalone_mode=False))
    except CascadeError as error:
        _refuse(str(error), error.exit_status)
    except _Refusal as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # there the help has been shown
            _refuse(_usage_words(error))
        sys.exit(UsageError.exit_status)
    except OSError as error:
        if error.filename is not None or error.errno not in _STREAM_ERRORS:
            raise
        _drop_unprinted()
        _refuse(f"cannot print: {os_reason(error)}; send stdout elsewhere")


def _drop_unprinted() -> None:
    """Send what stdout still holds to nowhere: its flush at the end of Python would fail again."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # stdout need not be a file
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


def _refuse(text: str, status: int = UsageError.exit_status) -> NoReturn:
    # A path or a column can hold a line break of its own.
    typer.echo(f"cascade: {' '.join(text.splitlines())}", err=True)
    sys.exit(status)


def _usage_words(error: Any) -> str:
    """Return what is wrong with a command line, what was given, and where to read on."""
    options = getattr(getattr(error, "param", None), "opts", ())
    given = ", ".join(map(repr, _values(options, sys.argv[1:])))
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "cascade"
    got = f", got {given}" if given else ""
    text = str(error.format_message()).rstrip(".")
    return f"{text[:1].lower()}{text[1:]}{got}; see `{command} --help`"


def _values(options: Sequence[str], arguments: Sequence[str]) -> Iterator[str]:
    """Yield every value that a command line gives to an option."""
    for before, argument in pairwise(["", *arguments]):
        name, equals, value = argument.partition("=")
        if before in options:
            yield argument
        elif equals and name in options:
            yield value


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse options that a script left empty: as a path, nothing would mean the current folder."""
    for before, argument in pairwise(["", *arguments]):
        flag = before if argument == "" else argument.removesuffix("=")
        if argument == "" or (argument != flag and flag in _options(typer.main.get_command(app))):
            raise UsageError(f"expected a value for {flag or 'the command'}, got an empty one")


def _options(command: Any) -> set[str]:
    """Return the names of a command's options and of all commands below it."""
    names = {name for param in command.params for name in param.opts if name.startswith("--")}
    return names.union(*map(_options, getattr(command, "commands", {}).values()))


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does: what is half-written is taken away."""

    def stop(number: int, _: object) -> None:
        for taken in handled:  # a second one must not break off the clearing up
            signal.signal(taken, signal.SIG_IGN)
        sys.exit(128 + number)

    handled = []
    if threading.current_thread() is threading.main_thread():
        # Windows has no SIGHUP; where nohup has set it to be ignored, it stays so.
        numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
        handled = [n for n in numbers if n is not None and signal.getsignal(n) == signal.SIG_DFL]
        for number in handled:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
