"""Whether tokens of a model can exit early, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cascade.core.errors import UnsupportedModelError, first_line
from cascade.core.float32_products import products_in
from cascade.decoding.kv_cache import KeyValueCache
from cascade.models.architecture import text_config_of
from cascade.models.layer_states import other_state, shared_keys
from cascade.models.probing import close
from cascade.models.stack import DecoderStack


@dataclass(frozen=True)
class ExitSupport:
    """Whether and how tokens of a model can exit early.

    Attributes:
        obstacle: Why no token can exit, in one line; None if tokens can.
        exact_obstacle: Why exact propagation is not possible; None if it is.
    """

    obstacle: str | None = None
    exact_obstacle: str | None = None


_FOUND: WeakKeyDictionary[DecoderStack, ExitSupport] = WeakKeyDictionary()


def exit_support(stack: DecoderStack) -> ExitSupport:
    """Return whether tokens of a model can exit early.

    A token that exits leaves keys and values for the layers above, and nothing else. So every layer
    must keep keys and values per token, or nothing, and must compute the same from them as in a
    whole pass. The second is tested with two short sequences, once per model.

    Args:
        stack: The model.

    Example:
        >>> import cascade
        >>> exit_support(cascade.load("smollm2-135m"))
        ExitSupport(obstacle=None, exact_obstacle=None)
    """
    # Stages have layers of the base's classes, and compute hard tokens alone in a whole pass.
    *_, stack = stack.with_base_models()
    found = _FOUND.get(stack)
    if found is None:
        with products_in(stack.device):
            found = _FOUND[stack] = _find(stack)
    return found


def check_exits(stack: DecoderStack, *, exact: bool = False) -> None:
    """Check that tokens of a model can exit early.

    Args:
        stack: The model.
        exact: Whether with exact propagation.

    Raises:
        UnsupportedModelError: They cannot; the message names the layer.
    """
    family = stack.model.config.model_type
    support = exit_support(stack)
    if support.obstacle is not None:
        raise UnsupportedModelError(
            f"tokens of {family} cannot exit early: {support.obstacle}; use `cascade analyze` and"
            " `cascade gate`, which measure this model"
        )
    if exact and support.exact_obstacle is not None:
        raise UnsupportedModelError(
            f"{family} has no exact propagation: {support.exact_obstacle}; use frozen propagation,"
            " without verify"
        )


@torch.no_grad()
def _find(stack: DecoderStack) -> ExitSupport:
    obstacle = (
        other_state(stack.model, stack.layers) or stack.step_obstacle or stack.readout_obstacle
    )
    if obstacle is not None:
        return ExitSupport(obstacle)
    # RoBERTa counts positions from the padding token, which is in no text.
    padding = getattr(text_config_of(stack.model.config), "pad_token_id", None)
    tokens = [token for token in range(min(13, stack.vocab_size)) if token != padding]
    ids = torch.tensor([tokens[at % len(tokens)] for at in range(12)], device=stack.device)
    ids = ids.reshape(2, 6)
    history: dict[int, Tensor] = {}
    stack.visit(ids, history.__setitem__)
    cache = KeyValueCache(stack.num_layers, *ids.shape)
    try:
        layer = _first_difference(stack, ids, history, cache)
    except Exception as error:  # layers of an unknown family raise any error
        return ExitSupport(f"its layers do not run on keys and values alone ({first_line(error)})")
    if layer is not None:
        return ExitSupport(
            f"decoder layer {layer} computes something else from the keys and values of earlier"
            " tokens than in one pass"
        )
    return ExitSupport(None, shared_keys(stack.model, stack.layers, cache.stored))


def _first_difference(
    stack: DecoderStack, ids: Tensor, history: dict[int, Tensor], cache: KeyValueCache
) -> int | None:
    """Return the first layer that differs from a whole pass when run on two chunks, or None."""
    for start, stop in ((0, 4), (4, ids.shape[1])):
        cache.window(start, stop)
        plan = stack.plan(ids[:, start:stop], cache=cache)
        hidden = plan.embedded
        for layer, call in enumerate(plan.calls, start=1):
            hidden = stack.step(layer, hidden, call)
            if not torch.isfinite(hidden).all():
                return None  # reported by what is computed, with the layer
            if not close(hidden, history[layer][:, start:stop]):
                return layer
    return None
