"""The command line: one function per command; heavy imports wait until a command needs them."""

from importlib import import_module

from cascade.cli.app import app, main

_MODULES = (
    "analyze",
    "bench",
    "comparisons",
    "evaluate",
    "explain",
    "gate",
    "generate",
    "heads",
    "search",
    "stages",
)
#: The commands in the order in which `cascade --help` lists them.
_COMMANDS = (
    "compare-corpora",
    "fit-heads",
    "calibrate",
    "evaluate",
    "generate",
    "explain",
    "findings",
    "compare",
    "gate",
    "analyze",
    "accept",
    "compare-models",
    "search-exit",
    "collect-hard",
    "train",
)
for _name in _MODULES:
    import_module(f"cascade.cli.commands.{_name}")
app.registered_commands.sort(key=lambda command: _COMMANDS.index(command.name or ""))

__all__ = ["app", "main"]
