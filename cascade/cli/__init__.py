"""The command line: one function per command; heavy imports wait until a command needs them."""

from importlib import import_module

from cascade.cli.app import app, main

#: Modules in the order in which `cascade --help` lists their commands.
_COMMANDS = (
    "corpora",
    "heads",
    "calibrate",
    "evaluate",
    "generate",
    "explain",
    "findings",
    "gate",
    "analyze",
    "accept",
    "models",
    "search",
    "stages",
    "bench",
)
for _name in _COMMANDS:
    import_module(f"cascade.cli.commands.{_name}")

__all__ = ["app", "main"]
