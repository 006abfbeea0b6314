"""The command line itself: its groups, its version, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from cascade.cli.options import ORDER, option_groups
from cascade.core.errors import CascadeError, UsageError, os_reason

try:
    from typer import TyperException as Refusal
except ImportError:  # an older typer, which takes click's own
    from click import ClickException as Refusal  # type: ignore[assignment]

#: Where a context keeps what the command line gives, as text: parameter -> its values.
_GIVEN = "cascade.given"


class Command(TyperCommand):
    """A command that refuses options which a script left empty, e.g. `--output "$UNSET"`.

    As a path, an empty text would mean the current folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command's arguments.

        Raises:
            UsageError: The value of an option or of an argument is empty.
        """
        values, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        given = {name: _as_texts(value) for name, value in values.items()}
        for param in self.params:
            if "" in given.get(str(param.name), ()):
                flag = param.opts[0] if param.param_type_name == "option" else ctx.info_name
                raise UsageError(f"expected a value for {flag}, got an empty one")
        ctx.meta[_GIVEN] = given
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """A group of commands that refuses an empty name of one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments name.

        Raises:
            UsageError: The name is empty.
        """
        if args[0] == "":
            name = ctx.info_name if ctx.parent is not None else "the command"
            raise UsageError(f"expected a value for {name}, got an empty one")
        return super().resolve_command(ctx, args)


def _as_texts(value: Any) -> tuple[str, ...]:
    """Return the texts among what was parsed: one, several, or none for a flag."""
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(each for each in values if isinstance(each, str))


app = typer.Typer(
    name="cascade",
    cls=Group,
    help="Measure how a language model's layers saturate, and hold it to stored baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    cls=Group,
    help="Measure speed and memory, in one process, interleaved.",
    no_args_is_help=True,
)
app.add_typer(bench, name="bench")


def command(
    name: str, *, group: typer.Typer = app, order: Sequence[str] = ORDER
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command; its parameters are options, or groups of options.

    Args:
        name: The command's name.
        group: The group of commands that it belongs to.
        order: How help orders the options that several commands take (see `option_groups`).
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        group.command(name, cls=Command)(option_groups(function, order=order))
        return function

    return register


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
            sys.exit(app(prog_name="cascade", standalone_mode=False))
    except CascadeError as error:
        _refuse(str(error), error.exit_status)
    except Refusal as error:
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
    context: Any = getattr(error, "ctx", None)
    param: Any = getattr(error, "param", None)
    command = context.command_path if context is not None else "cascade"
    given: Sequence[str] = ()
    if context is not None and getattr(param, "param_type_name", "") == "option":
        given = context.meta.get(_GIVEN, {}).get(param.name, ())
    got = f", got {', '.join(map(repr, given))}" if given else ""
    text = str(error.format_message()).rstrip(".")
    return f"{text[:1].lower()}{text[1:]}{got}; see `{command} --help`"


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
