"""The hidden history: an exit layer compares its own input and output."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.reference_early_exit import (
    LAYERS,
    a_stack,
    difference,
    one_line,
    random_blocks,
    state_of,
    visited,
)
from support.rule_probes import a_point
from support.tiny_models import random_ids
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.decoding.early_exit import EarlyExit
from cascade.evaluation.calibration import confidences
from cascade.exits import history
from cascade.exits.history import HiddenHistory, exit_entries
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import similarities

THREE_FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])


# --- Which entries an exit layer compares -----------------------------------------------------


#: Returns the two entries of an exit layer: `(layer, num_layers, from_end=...)`.
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
    history = list(range(num_layers + 1))  # each entry is its own number
    from_end = entries_of(layer, num_layers, from_end=True)
    assert all(-len(history) <= entry < 0 for entry in from_end), "not counted from the end"
    assert [history[entry] for entry in from_end] == [layer - 1, layer], "wrong layer's entries"


@given(exit_layers())
@example((30, 29))
@example((1, 1))
def test_every_layer_compares_its_own_input_and_output(
    stack_and_layer: tuple[int, int],
) -> None:
    check_indexing(exit_entries, *stack_and_layer)


def test_layer_29_of_30_compares_third_and_second_to_last_entry() -> None:
    assert exit_entries(29, 30) == (28, 29)
    assert exit_entries(29, 30, from_end=True) == (-3, -2)
    assert exit_entries(30, 30, from_end=True) == (-2, -1)


def seed_indexing(layer: int, num_layers: int, *, from_end: bool = False) -> tuple[int, int]:
    """Index as the seed study did: the last two entries, regardless of the layer."""
    return (-2, -1) if from_end else (num_layers - 1, num_layers)


@given(exit_layers().filter(lambda drawn: drawn[1] < drawn[0]))
@example((30, 29))
def test_check_indexing_detects_last_two_entries_of_seed_study(
    stack_and_layer: tuple[int, int],
) -> None:
    with pytest.raises(AssertionError, match="not the layer's own entries"):
        check_indexing(seed_indexing, *stack_and_layer)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda layer, n, from_end=False: (layer, layer + 1), "not the layer's own entries"),
        (lambda layer, n, from_end=False: (layer - 1, layer), "not counted from the end"),
        (
            lambda layer, n, from_end=False: (
                (layer - 1 - n, layer - n) if from_end else (layer - 1, layer)
            ),
            "not counted from the end|wrong layer's entries",
        ),
    ],
    ids=["one_up", "never_from_the_end", "end_off_by_one"],
)
def test_check_indexing_detects_other_off_by_one_errors(wrong: Indexing, message: str) -> None:
    for layer in (1, 28, 29):
        with pytest.raises(AssertionError, match=message):
            check_indexing(wrong, 30, layer)


NO_LAYERS: list[Any] = [0, -1, True, False, "29", 2.5, 29.0, None, 10**9, np.True_, np.int64(0)]


@given(depths, st.one_of(st.integers(max_value=0), st.integers(1, 10**6)))
def test_layer_out_of_range_error_names_range(num_layers: int, beyond: int) -> None:
    layer = beyond if beyond <= 0 else num_layers + beyond
    for from_end in (False, True):
        with pytest.raises(UsageError) as error:
            exit_entries(layer, num_layers, from_end=from_end)
        assert one_line(error) == f"expected an exit layer in 1..{num_layers}, got {layer}"


@pytest.mark.parametrize("layer", [*NO_LAYERS, 31])
def test_invalid_layer_error_names_range(layer: Any) -> None:
    with pytest.raises(UsageError) as error:
        exit_entries(layer, 30)
    assert one_line(error) == f"expected an exit layer in 1..30, got {layer!r}"


def test_layer_may_be_numpy_integer() -> None:
    entries = exit_entries(np.int64(29), 30)  # type: ignore[arg-type]
    assert entries == (28, 29)
    assert {type(entry) for entry in entries} == {int}


# --- The history of a real model --------------------------------------------------------------


#: Returns the two states that an exit layer compares, from the result of `output_hidden_states`.
PairReader = Callable[[Sequence[Tensor], int], tuple[Tensor, Tensor]]


@torch.no_grad()
def hooked_run(stack: DecoderStack, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Any]:
    """Run the model; return every layer's input and output, read by hooks, and its result."""
    stack = copy.deepcopy(stack)  # `output_hidden_states` does not remove its own hooks
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


def test_hooked_run_does_not_change_shared_stack() -> None:
    before = state_of(a_stack("llama"))
    _, _, own = hooked_run(a_stack("llama"), random_ids())
    assert len(own.hidden_states) == LAYERS + 1
    assert state_of(a_stack("llama")) == before


def check_pairs(read: PairReader, stack: DecoderStack, layers: Sequence[int]) -> None:
    """Raise AssertionError unless the states of exit layers are their own input and output."""
    inputs, outputs, own = hooked_run(stack, random_ids())
    for layer in layers:
        before, after = read(own.hidden_states, layer)
        assert difference(before, inputs[layer - 1]) == 0.0, f"not the input of layer {layer}"
        assert difference(after, outputs[layer - 1]) == 0.0, f"not the output of layer {layer}"


def pair_from_transformers(hidden_states: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
    return HiddenHistory.from_transformers(hidden_states).pair(layer)


def seed_pair(hidden_history: Sequence[Tensor], _: int) -> tuple[Tensor, Tensor]:
    """Read as the seed study did at what it called layer N-1, which is off by one."""
    h_in = hidden_history[-2]
    h_out = hidden_history[-1]
    return h_in, h_out


@THREE_FAMILIES
def test_history_from_transformers_gives_every_layer_its_own_states(family: str) -> None:
    check_pairs(pair_from_transformers, a_stack(family), range(1, LAYERS))


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
@THREE_FAMILIES
def test_check_pairs_detects_off_by_one_of_seed_study(family: str, layer: int) -> None:
    # At the last layer only the second state is wrong: it is after the final norm.
    message = f"not the {'output' if layer == LAYERS else 'input'} of layer {layer}"
    with pytest.raises(AssertionError, match=message):
        check_pairs(seed_pair, a_stack(family), [layer])


def test_check_pairs_detects_off_by_one_on_residual_stream() -> None:
    stack = a_stack("llama")
    entries = visited(stack, random_ids())
    with pytest.raises(AssertionError, match="not the input of layer 3"):
        check_pairs(lambda _, layer: seed_pair(entries, layer), stack, [LAYERS - 1])


@THREE_FAMILIES
def test_last_layer_of_transformers_history_requires_name(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    own = hooked_run(stack, ids)[2]
    history = HiddenHistory.from_transformers(own.hidden_states)
    with pytest.raises(UsageError) as error:
        history.pair(LAYERS)
    assert one_line(error) == (
        "the states of layer 4 are not in this history (it has entries [0, 1, 2, 3] and the normed "
        "state); hidden_states of transformers end after the final norm, use 4+norm"
    )
    before, after = history.pair("4+norm")
    assert difference(before, visited(stack, ids)[LAYERS - 1]) == 0.0
    assert difference(after, own.hidden_states[-1]) == 0.0


def full_history(num_layers: int) -> HiddenHistory:
    """Return a history in which each state is the number of its entry; the normed state is -1."""
    entries = {entry: torch.tensor([float(entry)]) for entry in range(num_layers + 1)}
    return HiddenHistory(num_layers, entries, torch.tensor([-1.0]))


@given(depths)
def test_normed_state_is_compared_only_by_name(num_layers: int) -> None:
    history = full_history(num_layers)
    for layer in range(1, num_layers + 1):
        assert [int(state) for state in history.pair(layer)] == [layer - 1, layer]
    named = [int(state) for state in history.pair(f"{num_layers}+norm")]
    assert named == [num_layers - 1, -1]


@pytest.mark.parametrize("layer", [*NO_LAYERS, 31, "29+norm", "30+Norm", "+norm", "30 +norm", ""])
def test_invalid_layer_of_history_error_names_range(layer: Any) -> None:
    with pytest.raises(UsageError) as error:
        full_history(30).pair(layer)
    message = one_line(error)
    assert re.match(r"^expected an exit layer in 1\.\.30( or 30\+norm)?, got ", message)
    assert message.endswith(f"got {layer!r}")


def test_missing_states_error_lists_entries() -> None:
    history = HiddenHistory(30, {29: torch.ones(1), 28: torch.ones(1)})
    assert len(history.pair(29)) == 2
    for layer in (28, 30, "30+norm"):
        with pytest.raises(UsageError) as error:
            history.pair(layer)
        assert one_line(error) == (
            f"the states of layer {layer} are not in this history (it has entries [28, 29])"
        )


# --- Similarities -----------------------------------------------------------------------------


#: Returns every token's similarity at a layer, `[B, T]`.
Similarity = Callable[[DecoderStack, Tensor, int], Tensor]


def check_similarity(similarity: Similarity, stack: DecoderStack, layers: Sequence[int]) -> None:
    """Raise AssertionError unless it is the cosine of the layer's input and output."""
    ids = random_ids(2, 12, seed=4)
    inputs, outputs, _ = hooked_run(stack, ids)
    for layer in layers:
        expected = torch.cosine_similarity(inputs[layer - 1], outputs[layer - 1], dim=-1)
        # 1e-6: fp32 norms of 32 numbers, applied before or after the product.
        got = similarity(stack, ids, layer)
        assert difference(got, expected) <= 1e-6, f"not the similarity of layer {layer}"


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
@THREE_FAMILIES
def test_history_rule_and_profile_agree_on_similarity(family: str, similarity: Similarity) -> None:
    check_similarity(similarity, a_stack(family), range(1, LAYERS + 1))


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
@THREE_FAMILIES
def test_similarity_of_seed_study_matches_no_layer(family: str, layer: int) -> None:
    with pytest.raises(AssertionError, match=f"not the similarity of layer {layer}"):
        check_similarity(similarity_of_the_study, a_stack(family), [layer])


def test_indices_of_seed_study_in_package_are_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(history, "exit_entries", seed_indexing)
    with pytest.raises(AssertionError, match="not the input of layer 2"):
        check_pairs(
            lambda h, n: HiddenHistory(LAYERS, dict(enumerate(h))).pair(n), a_stack("llama"), [2]
        )
    with pytest.raises(AssertionError, match="not the similarity of layer 3"):
        check_similarity(similarity_of_history, a_stack("llama"), [3])
    # An early exit does not compute the entries that the study's indices select.
    with pytest.raises(UsageError, match="states of layer 3 are not in this history"):
        check_similarity(similarity_of_the_rule, a_stack("llama"), [3])


# --- EarlyExit --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [*NO_LAYERS, LAYERS + 1])
def test_early_exit_rejects_invalid_layer(layer: Any) -> None:
    if layer is None:  # valid: no exit
        return
    with pytest.raises(UsageError) as error:
        EarlyExit(a_stack("llama"), layer=layer, threshold=0.9)
    assert one_line(error) == f"expected an exit layer in 1..4, got {layer!r}"
