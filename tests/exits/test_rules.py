"""An exit layer compares its own input and output; rules keep their range, and their word."""

from __future__ import annotations

import ast
import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chi2
from support.reference_early_exit import (
    LAYERS,
    a_stack,
    difference,
    one_line,
    random_blocks,
    state_of,
    visited,
)
from support.tiny_models import random_ids
from torch import Tensor

import cascade
from cascade.core import arguments
from cascade.core.errors import UsageError
from cascade.decoding.early_exit import EarlyExit
from cascade.evaluation.calibration import confidences
from cascade.exits import history
from cascade.exits.history import HiddenHistory, exit_entries
from cascade.exits.rules import RULES, ExitPoint, ExitRule, check_layers, exit_rule, find_rule
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import similarities

FAMILIES_OF_TWO_KINDS = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
EVERY_RULE = pytest.mark.parametrize("name", RULES)

# --- Which entries an exit layer compares ----------------------------------------------------

#: Gives an exit layer's two entries: `(layer, num_layers, from_end=...)`.
Indexing = Callable[..., tuple[int, int]]

depths = st.integers(1, 200)


@st.composite
def exit_layers(draw: st.DrawFn) -> tuple[int, int]:
    """Return N and one of its layers."""
    num_layers = draw(depths)
    return num_layers, draw(st.integers(1, num_layers))


def check_indexing(entries_of: Indexing, num_layers: int, layer: int) -> None:
    """Raise AssertionError unless an exit layer compares its own input and output."""
    assert entries_of(layer, num_layers) == (layer - 1, layer), "not the layer's own entries"
    history = list(range(num_layers + 1))  # an entry's number in its place
    from_end = entries_of(layer, num_layers, from_end=True)
    assert all(-len(history) <= entry < 0 for entry in from_end), "not counted from the end"
    assert [history[entry] for entry in from_end] == [layer - 1, layer], "another layer's entries"


@given(exit_layers())
@example((30, 29))
@example((1, 1))
def test_every_layer_of_every_stack_compares_its_own_input_and_output(
    stack_and_layer: tuple[int, int],
) -> None:
    check_indexing(exit_entries, *stack_and_layer)


def test_layer_29_of_30_is_the_third_and_second_last_entry() -> None:
    assert exit_entries(29, 30) == (28, 29)
    assert exit_entries(29, 30, from_end=True) == (-3, -2)
    assert exit_entries(30, 30, from_end=True) == (-2, -1)


def seed_indexing(layer: int, num_layers: int, *, from_end: bool = False) -> tuple[int, int]:
    """Index as the study did: the last two entries, whatever the exit layer is called."""
    return (-2, -1) if from_end else (num_layers - 1, num_layers)


@given(exit_layers().filter(lambda drawn: drawn[1] < drawn[0]))
@example((30, 29))
def test_the_studys_last_two_entries_are_caught_at_every_layer_but_the_last(
    stack_and_layer: tuple[int, int],
) -> None:
    with pytest.raises(AssertionError, match="not the layer's own entries"):
        check_indexing(seed_indexing, *stack_and_layer)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda layer, n, from_end=False: (layer, layer + 1), "not the layer's own entries"),
        (lambda layer, n, from_end=False: (layer - 1, layer), "not counted from the end"),
        (
            lambda layer, n, from_end=False: (
                (layer - 1 - n, layer - n) if from_end else (layer - 1, layer)
            ),
            "not counted from the end|another layer's entries",
        ),
    ],
    ids=["one_up", "never_from_the_end", "end_off_by_one"],
)
def test_other_ways_to_be_off_by_one_are_caught(wrong: Indexing, said: str) -> None:
    for layer in (1, 28, 29):
        with pytest.raises(AssertionError, match=said):
            check_indexing(wrong, 30, layer)


NO_LAYERS: list[Any] = [0, -1, True, False, "29", 2.5, 29.0, None, 10**9, np.True_, np.int64(0)]


@given(depths, st.one_of(st.integers(max_value=0), st.integers(1, 10**6)))
def test_a_layer_outside_the_stack_is_refused_with_the_range(num_layers: int, beyond: int) -> None:
    layer = beyond if beyond <= 0 else num_layers + beyond
    for from_end in (False, True):
        with pytest.raises(UsageError) as error:
            exit_entries(layer, num_layers, from_end=from_end)
        assert one_line(error) == f"expected an exit layer in 1..{num_layers}, got {layer}"


@pytest.mark.parametrize("layer", [*NO_LAYERS, 31])
def test_what_is_no_layer_is_refused_with_the_range(layer: Any) -> None:
    with pytest.raises(UsageError) as error:
        exit_entries(layer, 30)
    assert one_line(error) == f"expected an exit layer in 1..30, got {layer!r}"


def test_a_whole_number_of_numpy_is_a_layer() -> None:
    entries = exit_entries(np.int64(29), 30)  # type: ignore[arg-type]
    assert entries == (28, 29)
    assert {type(entry) for entry in entries} == {int}


# --- The history of a real model -------------------------------------------------------------

#: Reads the two states that an exit layer compares from what `output_hidden_states` gives.
PairReader = Callable[[Sequence[Tensor], int], tuple[Tensor, Tensor]]


@torch.no_grad()
def hooked_run(stack: DecoderStack, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Any]:
    """Run the model; return every layer's input and output by hooks of our own, and its result."""
    stack = copy.deepcopy(stack)  # `output_hidden_states` leaves hooks of its own behind
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in stack.layers]
    result: Any = stack.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs, result


def test_reading_a_models_history_leaves_the_stack_that_tests_share_as_it_was() -> None:
    before = state_of(a_stack("llama"))
    _, _, own = hooked_run(a_stack("llama"), random_ids())
    assert len(own.hidden_states) == LAYERS + 1
    assert state_of(a_stack("llama")) == before


def check_pairs(read: PairReader, stack: DecoderStack, layers: Sequence[int]) -> None:
    """Raise AssertionError unless exit layers' states are their own input and output."""
    inputs, outputs, own = hooked_run(stack, random_ids())
    for layer in layers:
        before, after = read(own.hidden_states, layer)
        assert difference(before, inputs[layer - 1]) == 0.0, f"not what enters layer {layer}"
        assert difference(after, outputs[layer - 1]) == 0.0, f"not what leaves layer {layer}"


def our_pair(hidden_states: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
    return HiddenHistory.from_transformers(hidden_states).pair(layer)


def seed_pair(hidden_history: Sequence[Tensor], _: int) -> tuple[Tensor, Tensor]:
    """Read as the study did, at what it called layer N-1: the bug this project keeps out."""
    h_in = hidden_history[-2]
    h_out = hidden_history[-1]
    return h_in, h_out


@FAMILIES_OF_TWO_KINDS
def test_the_history_of_transformers_gives_every_layer_its_own_states(family: str) -> None:
    check_pairs(our_pair, a_stack(family), range(1, LAYERS))


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
@FAMILIES_OF_TWO_KINDS
def test_the_studys_code_path_is_caught(family: str, layer: int) -> None:
    # At the last layer the first of its states is right; the second is behind the final norm.
    said = f"not what {'leaves' if layer == LAYERS else 'enters'} layer {layer}"
    with pytest.raises(AssertionError, match=said):
        check_pairs(seed_pair, a_stack(family), [layer])


def test_the_same_indices_on_the_residual_stream_are_caught_too() -> None:
    stack = a_stack("llama")
    entries = visited(stack, random_ids())
    with pytest.raises(AssertionError, match="not what enters layer 3"):
        check_pairs(lambda _, layer: seed_pair(entries, layer), stack, [LAYERS - 1])


@FAMILIES_OF_TWO_KINDS
def test_the_last_layer_of_transformers_is_to_be_had_by_its_name_only(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    own = hooked_run(stack, ids)[2]
    history = HiddenHistory.from_transformers(own.hidden_states)
    with pytest.raises(UsageError) as error:
        history.pair(LAYERS)
    assert one_line(error) == (
        "the states of layer 4 are not in this history (it has entries [0, 1, 2, 3] and the normed "
        "state); hidden_states of transformers end behind the final norm, use 4+norm"
    )
    before, after = history.pair("4+norm")
    assert difference(before, visited(stack, ids)[LAYERS - 1]) == 0.0
    assert difference(after, own.hidden_states[-1]) == 0.0


def full_history(num_layers: int) -> HiddenHistory:
    """Return a history whose states hold their entry's number, the normed one -1."""
    entries = {entry: torch.tensor([float(entry)]) for entry in range(num_layers + 1)}
    return HiddenHistory(num_layers, entries, torch.tensor([-1.0]))


@given(depths)
def test_a_normed_state_is_compared_only_where_it_is_asked_for_by_name(num_layers: int) -> None:
    history = full_history(num_layers)
    for layer in range(1, num_layers + 1):
        assert [int(state) for state in history.pair(layer)] == [layer - 1, layer]
    named = [int(state) for state in history.pair(f"{num_layers}+norm")]
    assert named == [num_layers - 1, -1]


@pytest.mark.parametrize("layer", [*NO_LAYERS, 31, "29+norm", "30+Norm", "+norm", "30 +norm", ""])
def test_what_is_no_layer_of_a_history_is_refused_with_the_range(layer: Any) -> None:
    with pytest.raises(UsageError) as error:
        full_history(30).pair(layer)
    said = one_line(error)
    assert re.match(r"^expected an exit layer in 1\.\.30( or 30\+norm)?, got ", said)
    assert said.endswith(f"got {layer!r}")


def test_states_that_were_not_kept_are_refused_with_those_that_were() -> None:
    history = HiddenHistory(30, {29: torch.ones(1), 28: torch.ones(1)})
    assert len(history.pair(29)) == 2
    for layer in (28, 30, "30+norm"):
        with pytest.raises(UsageError) as error:
            history.pair(layer)
        assert one_line(error) == (
            f"the states of layer {layer} are not in this history (it has entries [28, 29])"
        )


# --- What is computed from them --------------------------------------------------------------

#: Gives every token's similarity at a layer, `[B, T]`.
Similarity = Callable[[DecoderStack, Tensor, int], Tensor]


def check_similarity(similarity: Similarity, stack: DecoderStack, layers: Sequence[int]) -> None:
    """Raise AssertionError unless it is the cosine of what enters and what leaves the layer."""
    ids = random_ids(2, 12, seed=4)
    inputs, outputs, _ = hooked_run(stack, ids)
    for layer in layers:
        expected = torch.cosine_similarity(inputs[layer - 1], outputs[layer - 1], dim=-1)
        # 1e-6: the norms of 32 fp32 numbers, divided before or after the product.
        assert difference(similarity(stack, ids, layer), expected) <= 1e-6, f"not of layer {layer}"


def similarity_of_history(stack: DecoderStack, ids: Tensor, layer: int) -> Tensor:
    history = HiddenHistory(stack.num_layers, dict(enumerate(visited(stack, ids))))
    return a_point(layer=layer, history=history, count=1).similarity(layer)


def similarity_of_the_rule(stack: DecoderStack, ids: Tensor, layer: int) -> Tensor:
    blocks = random_blocks(len(ids), ids.shape[1])
    blocks = type(blocks)(ids.numpy().astype(np.int32), "ids", "ids", len(ids))
    return torch.from_numpy(confidences(stack, blocks, layer, "cosine"))


def similarity_of_the_profile(stack: DecoderStack, ids: Tensor, layer: int) -> Tensor:
    return similarities(stack, ids)[layer - 1]


def similarity_of_the_study(stack: DecoderStack, ids: Tensor, layer: int) -> Tensor:
    return torch.cosine_similarity(
        *seed_pair(hooked_run(stack, ids)[2].hidden_states, layer), dim=-1
    )


@pytest.mark.parametrize(
    "similarity", [similarity_of_history, similarity_of_the_rule, similarity_of_the_profile]
)
@FAMILIES_OF_TWO_KINDS
def test_history_rule_and_profile_agree_on_what_a_layers_similarity_is(
    family: str, similarity: Similarity
) -> None:
    check_similarity(similarity, a_stack(family), range(1, LAYERS + 1))


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
@FAMILIES_OF_TWO_KINDS
def test_the_studys_similarity_is_that_of_no_layer(family: str, layer: int) -> None:
    with pytest.raises(AssertionError, match=f"not of layer {layer}"):
        check_similarity(similarity_of_the_study, a_stack(family), [layer])


def test_the_studys_indices_put_into_our_own_code_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(history, "exit_entries", seed_indexing)
    with pytest.raises(AssertionError, match="not what enters layer 2"):
        check_pairs(
            lambda h, n: HiddenHistory(LAYERS, dict(enumerate(h))).pair(n), a_stack("llama"), [2]
        )
    with pytest.raises(AssertionError, match="not of layer 3"):
        check_similarity(similarity_of_history, a_stack("llama"), [3])
    # A running exit has not even computed the entries that the study's indices ask for.
    with pytest.raises(UsageError, match="states of layer 3 are not in this history"):
        check_similarity(similarity_of_the_rule, a_stack("llama"), [3])


# --- Nothing else indexes a history ----------------------------------------------------------

_HISTORY = re.compile(r"histor|hidden_states|^entries$", re.IGNORECASE)
_LOOKUPS = {"get", "pop", "__getitem__"}
#: What counts a history's entries off, so that neighbours meet, or makes a list of them to index.
_COUNTING = {"pairwise", "zip", "list", "tuple"}
#: What gives a history's entries again, in their order.
_AGAIN = {"list", "tuple", "reversed", "stack", "cat"}


class _Indexing(ast.NodeVisitor):
    """Finds the places where a history is indexed by anything but an entry's own number.

    A bare name is an entry's own number, unless it was made by arithmetic in the same function.
    What a history was assigned to is one, too. Storing an entry and dropping one are no lookups.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._computed: set[str] = set()
        self._aliases: set[str] = set()

    def visit_Module(self, node: ast.Module) -> None:
        scopes = (ast.FunctionDef, ast.ClassDef)
        outside = [part for part in node.body if not isinstance(part, scopes)]
        self._add_aliases(outside, ast.Name)
        self._add_aliases([node], ast.Attribute)  # what one method keeps, another indexes
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if node.name != "HiddenHistory":
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = self._computed, self._aliases
        self._computed = self._computed | _computed_names(node)
        self._aliases = self._aliases - {
            part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)
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
        if name in _AGAIN:
            return any(map(self._is_history, node.args))
        return bool(_HISTORY.search(name)) and not name[:1].isupper()  # a call, not the class

    def _add_aliases(self, scopes: Sequence[ast.AST], kind: type[ast.expr]) -> None:
        """Add the names or attributes to which something in the scopes assigns a history."""
        assigned = [
            (target, node.value)
            for scope in scopes
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, kind) and node.value is not None
        ]
        for _ in assigned:  # an alias of an alias may be assigned above it
            self._aliases = self._aliases | {
                _name(target) for target, value in assigned if self._is_history(value)
            }


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _called(node: ast.Call) -> str:
    return _name(node.func)


def _computed_names(function: ast.AST) -> set[str]:
    """Return the names to which a function assigns a number that it wrote or worked out."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.For | ast.comprehension):
            targets, value = [node.target], node.iter
        else:
            continue
        if any(isinstance(part, ast.BinOp | ast.UnaryOp) for part in ast.walk(value)):
            names = [part for target in targets for part in ast.walk(target)]
            found |= {part.id for part in names if isinstance(part, ast.Name)}
    return found


def indexing_of_histories(source: str) -> list[str]:
    finder = _Indexing()
    finder.visit(ast.parse(source))
    return finder.found


SOURCES = sorted(Path(cascade.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_but_the_hidden_history_works_out_which_entries_to_compare(path: Path) -> None:
    assert indexing_of_histories(path.read_text(encoding="utf-8")) == []


def test_the_hidden_history_itself_would_be_found() -> None:
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
def test_indices_worked_out_elsewhere_are_found(source: str) -> None:
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
def test_storing_dropping_and_an_entrys_own_number_are_let_through(source: str) -> None:
    assert indexing_of_histories(source) == []


# --- Rules -----------------------------------------------------------------------------------


def a_point(
    logits: Tensor | None = None,
    *,
    layer: int = 3,
    history: HiddenHistory | None = None,
    count: int | None = None,
    **changes: Any,
) -> ExitPoint:
    """Return an exit point of as many tokens as there are logits, `[n, V]`."""
    count = count or (1 if logits is None else len(logits))
    settings: dict[str, Any] = {
        "token_ids": torch.arange(count),
        "positions": torch.arange(count),
    }

    def compute() -> Tensor:
        assert logits is not None, "the logits must not be computed"
        return logits

    return ExitPoint(layer, history or HiddenHistory(LAYERS), compute, **settings | changes)


def confidence(name: str, at: ExitPoint) -> Tensor:
    values = find_rule(name).confidence(at)
    assert values.shape == at.token_ids.shape
    assert values.dtype == torch.float32
    return values


def a_full_point(
    states: Tensor, logits: Tensor, rows: slice = slice(None), *, seed: int = 0
) -> ExitPoint:
    """Return a point at layer 2 that gives every rule what it needs.

    Args:
        states: `[3, n, D]`, entries 0 to 2.
        logits: `[n, V]`.
        rows: Which of the tokens.
        seed: For rules that draw.
    """
    numbers = torch.arange(logits.shape[0])
    return a_point(
        logits[rows],
        layer=2,
        history=HiddenHistory(2, dict(enumerate(states[:, rows]))),
        token_ids=(7 * numbers)[rows],
        positions=numbers[rows],
        earlier=[(numbers % 3)[rows], (numbers % 2)[rows]],
        full_prediction=(numbers % 2)[rows],
        seed=seed,
    )


LARGE = torch.finfo(torch.float32).max

#: Logits as a head may give them: ordinary, tied, huge, and ruled out.
some_logits = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(2, 9)),
    elements=st.one_of(
        st.floats(-30, 30, width=32),
        st.sampled_from([0.0, -math.inf, 1e30, -1e30, 3e38, -3e38, LARGE]),
    ),
).filter(lambda logits: bool((logits.max(axis=1) > -math.inf).all()))

#: States of any size whose squares fp32 can hold.
some_states = arrays(
    np.float32,
    st.tuples(st.just(3), st.just(4), st.integers(1, 5)),
    elements=st.one_of(
        st.floats(-10, 10, width=32), st.sampled_from([0.0, 1e-30, -1e-15, 1e15, -1e15])
    ),
)


@given(some_states, some_logits, st.integers(-(2**70), 2**70))
@example(np.zeros((3, 4, 2), np.float32), np.zeros((4, 9), np.float32), 0)
@example(np.ones((3, 4, 2), np.float32), np.eye(4, dtype=np.float32) * LARGE, 2**63)
@example(
    np.ones((3, 4, 2), np.float32),
    np.where(np.eye(4, dtype=bool), 0, -math.inf).astype(np.float32),
    -1,
)
def test_every_rule_keeps_its_range(
    states: np.ndarray[Any, Any], logits: np.ndarray[Any, Any], seed: int
) -> None:
    count = len(logits)
    at = a_full_point(torch.from_numpy(states[:, :count]), torch.from_numpy(logits), seed=seed)
    for name, rule in RULES.items():
        values = confidence(name, at)
        assert bool(((values >= rule.low) & (values <= rule.high)).all()), name


def random_point(rows: slice = slice(None)) -> ExitPoint:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn((3, 40, 8), generator=generator)
    return a_full_point(states, 3 * torch.randn((40, 11), generator=generator), rows)


@EVERY_RULE
def test_a_tokens_confidence_does_not_depend_on_the_other_tokens(name: str) -> None:
    together = confidence(name, random_point())
    alone = torch.cat([confidence(name, random_point(slice(i, i + 1))) for i in range(40)])
    # 1e-6: sums over a row may be taken in another order when it stands alone.
    assert difference(alone, together) <= 1e-6
    if name != "fixed":
        assert len(together.unique()) > 1


@EVERY_RULE
def test_a_rule_says_truly_what_it_looks_at(name: str) -> None:
    rule, whole = RULES[name], random_point()
    expected = rule.confidence(whole)
    seen: dict[str, Any] = {
        "history": HiddenHistory(
            2, {k: v for k, v in whole.history.entries.items() if k >= 2 - rule.entries}
        ),
        "earlier": whole.earlier if rule.needs_earlier else (),
        "full_prediction": whole.full_prediction if rule.needs_full else None,
    }
    called: list[int] = []

    def compute() -> Tensor:
        called.append(1)
        return whole.compute_logits()

    at = ExitPoint(2, seen.pop("history"), compute, whole.token_ids, whole.positions, **seen)
    assert torch.equal(rule.confidence(at), expected)
    assert called == [1] * rule.needs_logits
    if rule.entries:
        fewer = HiddenHistory(
            2, {k: v for k, v in at.history.entries.items() if k > 2 - rule.entries}
        )
        with pytest.raises(UsageError, match="are not in this history"):
            rule.confidence(a_point(layer=2, history=fewer, count=40))


def test_only_the_oracle_needs_the_full_models_answer() -> None:
    assert [name for name, rule in RULES.items() if rule.needs_full] == ["oracle"]
    at = random_point()
    at.full_prediction = None
    with pytest.raises(UsageError) as error:
        confidence("oracle", at)
    assert one_line(error) == (
        "the oracle needs the full model's answer: it can score, not generate"
    )


def test_logits_are_made_once_however_often_they_are_looked_at() -> None:
    called: list[int] = []
    at = random_point()
    compute = at.compute_logits
    at.compute_logits = lambda: (called.append(1), compute())[1]  # type: ignore[func-returns-value]
    for name in ("top2_gap", "entropy", "max_probability", "patience", "oracle"):
        confidence(name, at)
    assert called == [1]


@pytest.mark.parametrize("name", ["top2_gap", "max_probability", "entropy"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_stay_visible(name: str, bad: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    assert confidence(name, a_point(logits)).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["cosine", "mean_cosine"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_states_that_are_not_finite_stay_visible(name: str, bad: float) -> None:
    states = torch.ones(3, 4, 2)
    states[1, 2, 0] = bad
    at = a_full_point(states, torch.zeros(4, 5))
    assert confidence(name, at).isnan().tolist() == [False, False, True, False]


# Entries 0..3 of two tokens; their cosines from entry to entry are 0, 0.96, 0.6 and 1, -1, 0.
STATES = {
    0: torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
    1: torch.tensor([[3.0, 4.0], [2.0, 2.0]]),
    2: torch.tensor([[8.0, 6.0], [-1.0, -1.0]]),
    3: torch.tensor([[0.0, 0.5], [-7.0, 7.0]]),
}


def test_cosines_by_hand() -> None:
    history = HiddenHistory(3, STATES)
    by_layer = {1: [0.0, 1.0], 2: [0.96, -1.0], 3: [0.6, 0.0]}
    for layer, expected in by_layer.items():
        at = a_point(layer=layer, history=history, count=2)
        assert confidence("cosine", at).tolist() == pytest.approx(expected, abs=1e-6)
    for layer, mean in {2: [0.48, 0.0], 3: [0.78, -0.5]}.items():
        at = a_point(layer=layer, history=history, count=2)
        assert confidence("mean_cosine", at).tolist() == pytest.approx(mean, abs=1e-6)


def test_half_precision_states_are_compared_in_fp32() -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn((64, 256), generator=generator).half()
    history = HiddenHistory(1, {0: states, 1: states})
    values = confidence("cosine", a_point(layer=1, history=history, count=64))
    assert bool((values <= 1).all())
    assert values.tolist() == pytest.approx([1.0] * 64, abs=1e-6)


def test_confidences_of_a_distribution_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log() + 3.0
    at = a_point(logits)
    # 1e-6: fp32 logarithms and exponentials.
    assert confidence("top2_gap", at).item() == pytest.approx(0.25, abs=1e-6)
    assert confidence("max_probability", at).item() == pytest.approx(0.5, abs=1e-6)
    assert confidence("entropy", at).item() == pytest.approx(1 - 1.75 / 2, abs=1e-6)


@pytest.mark.parametrize("size", [2, 97, 49_152])
def test_a_uniform_distribution_is_the_least_sure_and_a_single_token_the_surest(size: int) -> None:
    one_hot = torch.full((1, size), -math.inf)
    one_hot[0, 1] = 5.0
    uniform = torch.full((1, size), 5.0)
    # 1e-5: the sum of 49,152 fp32 terms.
    assert confidence("entropy", a_point(uniform)).item() == pytest.approx(0.0, abs=1e-5)
    assert confidence("max_probability", a_point(uniform)).item() == pytest.approx(1 / size)
    assert confidence("top2_gap", a_point(uniform)).item() == 0.0
    for name in ("entropy", "max_probability", "top2_gap"):
        assert confidence(name, a_point(one_hot)).item() == 1.0


def test_two_tokens_that_share_all_have_no_gap() -> None:
    logits = torch.tensor([[LARGE, LARGE, -LARGE], [0.0, 0.0, -math.inf]])
    assert confidence("top2_gap", a_point(logits)).tolist() == [0.0, 0.0]
    halves = confidence("max_probability", a_point(logits))
    assert halves.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_patience_counts_the_unbroken_agreement_before_this_layer() -> None:
    logits = torch.zeros(4, 9)
    logits[:, 5] = 1.0
    earlier = [torch.tensor(row) for row in ([5, 5, 1, 5], [5, 1, 5, 5], [5, 5, 5, 1])]
    for known, expected in ((3, [3, 1, 2, 0]), (2, [2, 1, 2, 0]), (1, [1, 1, 1, 0]), (0, [0] * 4)):
        at = a_point(logits, earlier=earlier[3 - known :])
        assert confidence("patience", at).tolist() == expected


def test_a_fixed_layer_is_as_sure_of_every_token() -> None:
    assert confidence("fixed", a_point(count=3)).tolist() == [1.0] * 3


def test_the_oracle_knows() -> None:
    at = a_point(torch.eye(4), full_prediction=torch.tensor([0, 3, 2, 1]))
    assert confidence("oracle", at).tolist() == [1.0, 0.0, 1.0, 0.0]


# --- The random rule -------------------------------------------------------------------------

DRAWS = 100_000


def drawn(*, seed: int = 0, layer: int = 29, **changes: Any) -> np.ndarray[Any, Any]:
    at = a_point(layer=layer, count=DRAWS, seed=seed, **changes)
    return confidence("random", at).double().numpy()


TOKENS = torch.from_numpy(np.random.default_rng(0).zipf(1.3, DRAWS).clip(max=49_151))
SITUATIONS: dict[str, dict[str, Any]] = {
    "one_token_everywhere": {"token_ids": torch.full((DRAWS,), 198)},
    "every_token_at_one_position": {"positions": torch.full((DRAWS,), 17)},
    "text": {"token_ids": TOKENS, "positions": torch.arange(DRAWS) % 1024 + (TOKENS > 9)},
    "far_away": {"positions": 2**40 + torch.arange(DRAWS), "seed": 2**62 + 1},
}


@pytest.mark.parametrize("situation", ["one_token_everywhere", "every_token_at_one_position"])
def test_random_confidences_are_uniform(situation: str) -> None:
    values = drawn(**SITUATIONS[situation])
    # Nothing here is random: four standard errors of a fair draw, and one case in 10,000.
    assert abs(values.mean() - 0.5) < 4 * math.sqrt(1 / 12 / DRAWS)
    assert abs(values.var() - 1 / 12) < 4 * math.sqrt((1 / 80 - 1 / 144) / DRAWS)
    counts = np.histogram(values, bins=256, range=(0, 1))[0]
    expected = DRAWS / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, 255)
    assert 0 <= values.min() < values.max() < 1
    neighbours = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(DRAWS)


def test_random_confidences_need_no_float64_which_some_devices_lack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = a_point(layer=2, count=9)
    monkeypatch.setattr(Tensor, "double", None)
    assert bool((confidence("random", at) < 1).all())


@pytest.mark.parametrize("situation", ["text", "far_away"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_random_threshold_lets_go_the_share_it_says(situation: str, rate: float) -> None:
    # Text repeats a token at a position now and then, and draws the same for both.
    values = drawn(**SITUATIONS[situation])
    share = (values >= 1 - rate).mean()
    assert abs(share - rate) < 6 * math.sqrt(rate * (1 - rate) / len(np.unique(values)))


def test_random_confidences_are_the_same_again_and_others_elsewhere() -> None:
    values = drawn()
    assert np.array_equal(values, drawn())
    others = [
        drawn(seed=1),
        drawn(seed=-1),
        drawn(seed=2**31),
        drawn(layer=28),
        drawn(positions=torch.arange(DRAWS) + 1),
        drawn(token_ids=torch.arange(DRAWS) + 1),
    ]
    for other in others:
        assert abs(np.corrcoef(values, other)[0, 1]) < 4 / math.sqrt(DRAWS)
        assert (values == other).mean() < 1e-3


# --- Thresholds ------------------------------------------------------------------------------


@EVERY_RULE
def test_a_threshold_in_the_rules_range_or_infinite_is_taken(name: str) -> None:
    rule = RULES[name]
    for threshold in (rule.low, min(rule.high, 1e9), (rule.low + 1) / 2, math.inf, -math.inf):
        rule.check(threshold)
    # What a fit gives where even the surest tokens are to stay.
    rule.check(float(np.nextafter(np.float32(min(rule.high, 1e9)), np.float32(math.inf))))


@EVERY_RULE
def test_a_threshold_outside_the_rules_range_is_refused_with_the_range(name: str) -> None:
    rule = RULES[name]
    outside = [rule.low - 1e-6, rule.low - 10, math.nan]
    if rule.high < math.inf:
        outside += [rule.high + 1e-6, 95.0]
    for threshold in outside:
        with pytest.raises(UsageError) as error:
            EarlyExit(a_stack("llama"), layer=2, rule=name, threshold=threshold)
        ends = f"from {rule.low:g}" + (f" to {rule.high:g}" if rule.high < math.inf else "")
        assert one_line(error) == (
            f"the rule {name} gives confidences {ends}; expected a threshold in there (or inf, or "
            f"-inf), got {threshold:g}"
        )


def test_rules_know_their_range() -> None:
    ranges = {name: (rule.low, rule.high) for name, rule in RULES.items()}
    special = {"cosine": (-1.0, 1.0), "mean_cosine": (-1.0, 1.0), "patience": (0.0, math.inf)}
    assert ranges == dict.fromkeys(RULES, (0.0, 1.0)) | special


@EVERY_RULE
def test_every_rule_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    rule = find_rule(name)
    assert rule.name == name
    assert rule.what.endswith(".")
    assert rule.source


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as error:
        find_rule("cosin")
    assert one_line(error) == (
        "expected a rule among cosine, mean_cosine, top2_gap, max_probability, entropy, patience, "
        "fixed, random, oracle, got 'cosin'"
    )


def test_a_rule_that_looks_back_is_refused_where_there_is_nothing_to_look_at() -> None:
    rule = find_rule("mean_cosine")
    check_layers({2: rule, LAYERS: rule}, LAYERS)
    with pytest.raises(UsageError) as error:
        check_layers({1: rule}, LAYERS)
    assert one_line(error) == (
        "the rule mean_cosine looks at 2 layers; expected an exit layer in 2..4, got 1"
    )


@pytest.mark.parametrize("layer", [*NO_LAYERS, LAYERS + 1])
def test_early_exit_refuses_what_is_no_layer(layer: Any) -> None:
    if layer is None:  # no exit at all
        return
    with pytest.raises(UsageError) as error:
        EarlyExit(a_stack("llama"), layer=layer, threshold=0.9)
    assert one_line(error) == f"expected an exit layer in 1..4, got {layer!r}"


# --- A rule of one's own ---------------------------------------------------------------------


@pytest.fixture
def own_rule() -> Iterator[ExitRule]:
    @exit_rule("odd", needs_logits=False)
    def _odd(at: ExitPoint) -> Tensor:
        """Every other position leaves."""
        return (at.positions % 2).float()

    yield RULES["odd"]
    del RULES["odd"]


def test_a_rule_of_three_lines_decides_scores_and_generates(own_rule: ExitRule) -> None:
    assert own_rule.what == "Every other position leaves."
    early = EarlyExit(a_stack("llama"), layer=2, rule="odd", threshold=1.0)
    score = early.score(random_ids(2, 6))
    assert score.exit_layers.tolist() == [[4, 2, 4, 2, 4, 2]] * 2
    made = early.generate(random_ids(1, 3), max_new_tokens=3, return_dict_in_generate=True)
    assert not isinstance(made, Tensor)
    assert made.sequences.shape[1] > 3
    with pytest.raises(UsageError, match="the rule odd gives confidences from 0 to 1"):
        EarlyExit(a_stack("llama"), layer=2, rule="odd", threshold=2.0)


def test_a_rule_taken_out_again_is_gone() -> None:
    with pytest.raises(UsageError, match="expected a rule among"):
        EarlyExit(a_stack("llama"), layer=2, rule="odd", threshold=1.0)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "1", None, True])
def test_a_seed_that_not_every_generator_takes_is_refused(seed: Any) -> None:
    arguments.check_seed(2**63 - 1)
    with pytest.raises(UsageError, match=rf"expected a seed in 0\.\.{2**63 - 1}, got "):
        arguments.check_seed(seed)
