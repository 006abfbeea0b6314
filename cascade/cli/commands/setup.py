"""`cascade env` and `cascade cache`: describe the installation, and list or clear its cache."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.app import Group, app, command
from cascade.cli.console import echo, message
from cascade.cli.options import Quiet
from cascade.core.errors import UsageError

if TYPE_CHECKING:
    from cascade.core.cache import CacheEntry

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

cache = typer.Typer(
    cls=Group,
    help="List or clear what the package stored in its cache folder.",
    invoke_without_command=True,
)
app.add_typer(cache, name="cache", rich_help_panel="Setup")


@command("env")
def env(as_json: AsJson = False) -> None:
    """Print what a bug report needs: versions, processor, threads, folders."""
    from cascade.core.environment import environment
    from cascade.core.schema import to_plain

    found = to_plain(environment())
    if as_json:
        _print_json(found)
        return
    versions = found.pop("versions")
    rows = {name: _shown(value) for name, value in (versions | found).items()}
    width = max(map(len, rows))
    for name, text in rows.items():
        echo(f"{name.replace('_', ' '):<{width}}  {text}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "unknown" if value is None else str(value)


@cache.callback()
def list_cache(context: typer.Context, as_json: AsJson = False) -> None:
    """List what the package stored in its cache folder.

    `cascade cache clear` deletes it. The package makes everything again
    when it needs it.
    """
    if context.invoked_subcommand is not None:
        return
    from cascade.core.cache import KINDS, cache_entries, cache_folder

    entries = cache_entries()
    total = sum(entry.size for entry in entries)
    if as_json:
        rows = [{"name": e.name, "kind": e.kind, "bytes": e.size} for e in entries]
        _print_json({"folder": str(cache_folder()), "bytes": total, "entries": rows})
        return
    echo(f"{cache_folder()}: {_megabytes(total)} in {len(entries)} entries")
    for kind, text in KINDS.items():
        of_kind = [entry for entry in entries if entry.kind == kind]
        echo(f"{kind}: {text}" if of_kind else f"{kind}: {text} (none)")
        for entry in of_kind:
            echo(f"{_megabytes(entry.size):>12}  {entry.name}")


def _names(incomplete: str) -> list[str]:
    from cascade.core.cache import KINDS, cache_entries

    found = [*KINDS, *(entry.name for entry in cache_entries())]
    return [name for name in found if name.startswith(incomplete)]


@command("clear", group=cache)
def clear_cache(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names or kinds to delete (default: everything).", autocompletion=_names
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    quiet: Quiet = False,
) -> None:
    """Delete what the package stored in its cache folder."""
    from cascade.core.cache import KINDS, clear, entries_named

    entries = entries_named(names or KINDS)
    total = _megabytes(sum(entry.size for entry in entries))
    if entries and not yes:
        _confirm(entries, total)
    clear(entries)
    message(f"Deleted {len(entries)} entries ({total})")


def _confirm(entries: list[CacheEntry], total: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError("expected --yes, because no terminal can answer a question; add it")
    for entry in entries:
        echo(f"{_megabytes(entry.size):>12}  {entry.name}", err=True)
    if not typer.confirm(f"Delete {len(entries)} entries ({total})?", err=True):
        raise typer.Exit(UsageError.exit_status)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _print_json(value: Any) -> None:
    from cascade.core.records import to_json

    echo(to_json(value))
