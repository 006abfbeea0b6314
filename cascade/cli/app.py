"""The command line itself: command groups, version, errors and exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from cascade.cli.console import echo, printing
from cascade.cli.options import option_groups
from cascade.core.errors import CascadeError, UsageError, first_line, os_reason
from cascade.core.names import path_flaw
from cascade.core.printable import printable
from cascade.core.urls import is_url, redacted

try:
    from typer import TyperException
except ImportError:  # an older typer, which raises click's own
    from click import ClickException as TyperException  # type: ignore[assignment]

#: Where a context keeps the command line as text: parameter -> its values.
_GIVEN = "cascade.given"


class Command(TyperCommand):
    """A command that prints what `--json` and `--quiet` say, and rejects empty option values.

    A script passes an empty value by mistake, e.g. `--output "$UNSET"`. As a path, it would mean
    the current folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command's arguments.

        Raises:
            UsageError: The value of an option or argument is empty, or no file can have the path.
        """
        if ctx.resilient_parsing:  # a shell completes an unfinished line
            return super().parse_args(ctx, args)
        values, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        given = {name: _as_texts(value) for name, value in values.items()}
        for param in self.params:
            if "" in given.get(str(param.name), ()):
                flag = param.opts[0] if param.param_type_name == "option" else ctx.info_name
                raise UsageError(f"expected a value for {flag}, got an empty one")
            flaws = map(_flaw, given.get(str(param.name), ()))
            flaw = next(filter(None, flaws), None) if _is_path(param) else None
            if flaw is not None:
                flag = param.opts[0] if param.param_type_name == "option" else ctx.info_name
                raise UsageError(f"{flaw} for {flag}; name another file or folder")
        ctx.meta[_GIVEN] = given
        return super().parse_args(ctx, args)

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option `--help`, in the last panel of help."""
        return _described(super().get_help_option(ctx), panel="Output")

    def invoke(self, ctx: Any) -> Any:
        """Run the command, printing what its options `--json` and `--quiet` say."""
        with printing(as_json=bool(ctx.params.get("json")), quiet=bool(ctx.params.get("quiet"))):
            return super().invoke(ctx)


class Group(TyperGroup):
    """A group of commands that rejects an empty command name."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option `--help`."""
        return _described(super().get_help_option(ctx))

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the group's options, which are all flags: help shows no type for them."""
        params = super().get_params(ctx)
        for param in params:
            param.metavar = ""
        return params

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments name.

        Raises:
            UsageError: The name is empty.
        """
        if args[0] == "":
            name = ctx.info_name if ctx.parent is not None else "the command"
            raise UsageError(f"expected a value for {name}, got an empty one")
        return super().resolve_command(ctx, args)


def _described(option: Any, panel: str | None = None) -> Any:
    """Return the option `--help` with our words, if there is one, in a panel of help."""
    if option is not None:
        option.help = "Show this help."
        option.metavar = ""
        option.rich_help_panel = panel
    return option


def _is_path(param: Any) -> bool:
    """Return whether a parameter takes paths. Releases of typer differ in how they say so."""
    kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    older = getattr(getattr(param, "type", None), "name", "")
    return kind is Path or Path in get_args(kind) or older == "path"


def _flaw(text: str) -> str | None:
    """Return what is wrong with a path, in words; None if nothing is."""
    if is_url(text):
        return f"expected a local path, got {redacted(text)}"
    return path_flaw(text)


def _as_texts(value: Any) -> tuple[str, ...]:
    """Return a parsed value as texts: one, several, or none for a flag."""
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(each for each in values if isinstance(each, str))


#: The panels of `cascade --help` with their commands, in the order in which a project uses them.
COMMAND_PANELS = {
    "Measure": ("analyze", "plan", "measure-shard", "merge"),
    "Gate": ("gate", "compare", "accept", "history", "check", "comment"),
    "Early exit": ("fit-heads", "calibrate", "evaluate", "search-exit", "generate"),
    "Stages": ("collect-hard", "train"),
    "Drafters": ("train-drafter", "export-drafter"),
    "Studies": ("explain", "compare-corpora", "compare-models", "findings"),
    "Benchmarks": ("bench",),
    "Setup": ("env", "cache"),
}


class _Root(Group):
    """The group of all commands, listed panel by panel."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order of `COMMAND_PANELS`."""
        listed = [name for names in COMMAND_PANELS.values() for name in names]
        return sorted(self.commands, key=listed.index)


app = typer.Typer(
    name="cascade",
    cls=_Root,
    help="Measure layer saturation in language models, decode with early exit, and detect drift.",
    epilog="`cascade COMMAND --help` describes a command and its options.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    cls=Group,
    help="Time variants of the same work, interleaved in one process.",
    no_args_is_help=True,
)
app.add_typer(bench, name="bench", rich_help_panel="Benchmarks")


def command(
    name: str, *, group: typer.Typer = app
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command; its parameters are options, or groups of options.

    Args:
        name: The command's name.
        group: The group of commands that it belongs to.
    """
    panels = {name: panel for panel, names in COMMAND_PANELS.items() for name in names}
    panel = panels[name] if group is app else None

    def register(function: Callable[..., None]) -> Callable[..., None]:
        group.command(name, cls=Command, rich_help_panel=panel)(option_groups(function))
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


#: Errors of writing to stdout or stderr. Writing a file raises an `OutputError` instead.
_STREAM_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}

#: Errors of a file or folder that are the system's. Where one is expected, a `CascadeError` says
#: more; any other one may be a bug of the package.
_FILE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ESTALE),
}


def main() -> None:
    """Run the command line; an error that the user can fix is one line on stderr, status 2."""
    # The package shows its own progress bars and messages.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        with _unwinding():
            sys.exit(_run())
    except CascadeError as error:
        _fail(str(error), error.exit_status)
    except TyperException as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # there the help has been shown
            _fail(_usage_message(error))
        sys.exit(UsageError.exit_status)
    except SystemExit as end:
        # The reader of stdout has ended, as in `cascade ... | head`: typer and rich exit with 1.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        _discard_stdout()
        sys.exit(CLOSED_PIPE_STATUS)
    except OSError as error:
        if error.filename is not None and error.errno in _FILE_ERRORS:
            _fail(
                f"cannot use {error.filename}: {os_reason(error)}; mend that, then run the command"
                " again"
            )
        if error.filename is not None or error.errno not in _STREAM_ERRORS:
            _report_bug(error)
        _discard_stdout()
        _fail(f"cannot print: {os_reason(error)}; send stdout elsewhere")
    except Exception as error:
        _report_bug(error)


def _run() -> Any:
    """Run the command that the command line names, and return its exit status."""
    status = app(prog_name="cascade", standalone_mode=False)
    # typer ends with 1, the status of drift, where it knows no completion for the shell.
    completion = any(text.endswith("-completion") for text in sys.argv[1:2])
    return UsageError.exit_status if completion and status else status


#: The exit status of a command whose reader has ended, as a shell reports it (128 + SIGPIPE).
CLOSED_PIPE_STATUS = 141

#: The exit status of an error in the package itself (EX_SOFTWARE of BSD's sysexits). Python's own
#: status, 1, is that of drift.
BUG_STATUS = 70


def _report_bug(error: Exception) -> NoReturn:
    """Save the traceback of an unexpected error and end with one line that names the file."""
    trace = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="cascade-error-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(redacted(f"{shlex.join(sys.argv)}\n\n{trace}"))
        where = f"the traceback is in {path}"
    except OSError:
        sys.stderr.write(redacted(trace))
        where = "the traceback is above"
    _fail(
        f"unexpected {type(error).__name__}: {first_line(error)}; {where}, please report it with"
        " the output of `cascade env`",
        BUG_STATUS,
    )


def _discard_stdout() -> None:
    """Discard what stdout still buffers: flushing it at the exit of Python would fail again."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # stdout need not be a file
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


def _fail(text: str, status: int = UsageError.exit_status) -> NoReturn:
    # A path or a column can contain a line break.
    echo(f"cascade: {printable(' '.join(redacted(text).splitlines()))}", err=True)
    sys.exit(status)


def _usage_message(error: Any) -> str:
    """Return what is wrong with a command line, what it says, and which help to read."""
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
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does: half-written files are removed."""

    def stop(number: int, _: object) -> None:
        for taken in handled:  # a second signal must not interrupt the cleanup
            signal.signal(taken, signal.SIG_IGN)
        sys.exit(128 + number)

    handled = []
    if threading.current_thread() is threading.main_thread():
        # Windows has no SIGHUP. Under nohup it is ignored, and remains so.
        numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
        handled = [n for n in numbers if n is not None and signal.getsignal(n) == signal.SIG_DFL]
        for number in handled:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
