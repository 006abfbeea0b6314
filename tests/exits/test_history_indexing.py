"""Only `HiddenHistory` computes which entries of a hidden history are compared."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import cascade
from cascade.exits import history

_HISTORY = re.compile(r"histor|hidden_states|^entries$", re.IGNORECASE)


_LOOKUPS = {"get", "pop", "__getitem__"}


#: Functions that pair neighbouring entries of a history, or make a list of them for indexing.
_COUNTING = {"pairwise", "zip", "list", "tuple"}


#: Functions whose result has the entries of a history in their order.
_SAME_ENTRIES = {"list", "tuple", "reversed", "stack", "cat"}


class _Indexing(ast.NodeVisitor):
    """Finds code that indexes a history by anything but the number of an entry.

    A plain name counts as the number of an entry, unless the same function computes it by
    arithmetic. Names to which a history is assigned are histories too. Storing or deleting an
    entry is not a lookup.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._computed: set[str] = set()
        self._aliases: set[str] = set()

    def visit_Module(self, node: ast.Module) -> None:
        scopes = (ast.FunctionDef, ast.ClassDef)
        outside = [statement for statement in node.body if not isinstance(statement, scopes)]
        self._add_aliases(outside, ast.Name)
        self._add_aliases([node], ast.Attribute)  # one method may assign it, another index it
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if node.name != "HiddenHistory":
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = self._computed, self._aliases
        self._computed = self._computed | _computed_names(node)
        self._aliases = self._aliases - {
            child.arg for child in ast.walk(node.args) if isinstance(child, ast.arg)
        }
        self._add_aliases([node], ast.Name)
        self.generic_visit(node)
        self._computed, self._aliases = before

    def visit_Expr(self, node: ast.Expr) -> None:
        call = node.value
        if not (isinstance(call, ast.Call) and self._lookup(call, {"pop"})):
            self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Load) and self._is_history(node.value):
            self._check(node, node.slice)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if self._lookup(node, _LOOKUPS) and node.args:
            self._check(node, node.args[0])
        if _called(node) in _COUNTING and any(map(self._is_history, node.args)):
            self.found.append(ast.unparse(node))
        self.generic_visit(node)

    def _check(self, node: ast.AST, index: ast.expr) -> None:
        plain = isinstance(index, ast.Attribute | ast.Name)
        if not plain or (isinstance(index, ast.Name) and index.id in self._computed):
            self.found.append(ast.unparse(node))

    def _lookup(self, node: ast.Call, methods: set[str]) -> bool:
        method = node.func
        return (
            isinstance(method, ast.Attribute)
            and method.attr in methods
            and self._is_history(method.value)
        )

    def _is_history(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name | ast.Attribute):
            name = _name(node)
            return bool(_HISTORY.search(name)) or name in self._aliases
        if isinstance(node, ast.NamedExpr | ast.Starred):
            return self._is_history(node.value)
        if isinstance(node, ast.ListComp | ast.GeneratorExp):
            return self._is_history(node.generators[0].iter)
        if not isinstance(node, ast.Call):
            return False
        name = _called(node)
        if name in {"values", "items"} and isinstance(node.func, ast.Attribute):
            return self._is_history(node.func.value)
        if name in _SAME_ENTRIES:
            return any(map(self._is_history, node.args))
        return bool(_HISTORY.search(name)) and not name[:1].isupper()  # a call, not the class

    def _add_aliases(self, scopes: Sequence[ast.AST], kind: type[ast.expr]) -> None:
        """Add the names or attributes to which a statement in the scopes assigns a history."""
        assigned = [
            (target, node.value)
            for scope in scopes
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, kind) and node.value is not None
        ]
        for _ in assigned:  # an alias of an alias may be assigned before the alias itself
            self._aliases = self._aliases | {
                _name(target) for target, value in assigned if self._is_history(value)
            }


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _called(node: ast.Call) -> str:
    return _name(node.func)


def _computed_names(function: ast.AST) -> set[str]:
    """Return the names to which a function assigns a computed number."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.For | ast.comprehension):
            targets, value = [node.target], node.iter
        else:
            continue
        if any(isinstance(child, ast.BinOp | ast.UnaryOp) for child in ast.walk(value)):
            names = [child for target in targets for child in ast.walk(target)]
            found |= {child.id for child in names if isinstance(child, ast.Name)}
    return found


def indexing_of_histories(source: str) -> list[str]:
    finder = _Indexing()
    finder.visit(ast.parse(source))
    return finder.found


SOURCES = sorted(Path(cascade.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_only_hidden_history_computes_entries(path: Path) -> None:
    assert indexing_of_histories(path.read_text(encoding="utf-8")) == []


def test_indexing_in_hidden_history_itself_is_detected() -> None:
    source = Path(history.__file__).read_text(encoding="utf-8")
    found = indexing_of_histories(source.replace("class HiddenHistory", "class Renamed"))
    assert "hidden_states[:-1]" in found
    assert "hidden_states[last]" in found


@pytest.mark.parametrize(
    "source",
    [
        "h_in = hidden_history[-2]",
        "h_out = output.hidden_states[29]",
        "cosine(history[layer - 1], history)",
        "cosine(self._history.get(self.layer - 1))",
        "for a in hidden_states[1:]: use(a)",
        "def f(layer, history):\n    before = layer - 1\n    return history[before]",
        "def f(n, entries):\n    return [entries[k] for k in range(n - 2, n)]",
        "def f(history):\n    last = -1\n    return history.entries[last]",
        "x = self._history.pop(layer - 2)",
        "for a, b in itertools.pairwise(out.hidden_states): use(a, b)",
        "for a, b in pairwise(hidden_states_of(model, ids)): use(a, b)",
        "for a, b in zip(history, others): use(a, b)",
        "for row in zip(counts, self._history.values()): use(row)",
        "first, *rest = list(self._history.values())",
        "first = tuple(hidden_states)",
        "states = out.hidden_states\nuse(states[-2], states[layer])",
        "def f(out):\n    again = states\n    states = out.hidden_states\n    return again[-1]",
        "def f(out):\n    states: Any = out.hidden_states\n    return states.pop(0)",
        "if states := out.hidden_states: use(states[layer - 1])",
        "def f(ids):\n    last = torch.stack([s[:, -1] for s in hidden_states(ids)])\n"
        "    return last[:-1]",
        "def f(self, out):\n    self.kept = out.hidden_states\n"
        "def g(self):\n    return self.kept[-2]",
    ],
)
def test_computed_indices_are_detected(source: str) -> None:
    assert len(indexing_of_histories(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "history[layer] = hidden",
        "history[layer - 1] = hidden",
        "head(history.entries[self.layer])",
        "[history[entry] for entry in range(layer, stack.num_layers)]",
        "self._history.pop(layer - 2, None)",
        "layers[layer - 1](hidden)",
        "states = history[layer]\nuse(states[rows, columns])",
        "before, after = history.pair(layer)\nuse(before[:, -1], after[:, -1])",
        "states = HiddenHistory.from_transformers(found)\nuse(states.pair(layer)[0])",
        "for entry, states in sorted(history.items()): use(entry, states[0])",
        "kept = dict(self._history)",
        "def f(out):\n    states = out.hidden_states\ndef g(states):\n    return states[0]",
        "zip(layers, layers[1:])",
    ],
)
def test_storing_deleting_and_plain_entry_numbers_are_allowed(source: str) -> None:
    assert indexing_of_histories(source) == []
