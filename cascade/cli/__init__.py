"""The command line: one function per command; heavy imports wait until a command needs them."""

from importlib import import_module

from cascade.cli.app import app, main

_MODULES = (
    "analyze",
    "shards",
    "gate",
    "history",
    "accept",
    "check",
    "comment",
    "heads",
    "evaluate",
    "search",
    "generate",
    "collect_hard",
    "train",
    "train_drafter",
    "export_drafter",
    "comparisons",
    "explain",
    "bench",
    "setup",
)
for _name in _MODULES:
    import_module(f"cascade.cli.commands.{_name}")

__all__ = ["app", "main"]
