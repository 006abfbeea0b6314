"""Running a model again, over a few tokens, with one change undone or applied."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cascade.core.arrays import Array
from cascade.models.architecture import run_decoder
from cascade.models.stack import DecoderStack

#: The most forward passes that one attribution may take. With one sequence of 128 tokens, SmolLM2
#: needs 0.21 s for each on one core. Faults of the suite needed up to 17.
MOST_PASSES = 24


#: The most sequences that are run again: those that moved most.
MOST_SEQUENCES = 2


Change = Callable[[], AbstractContextManager[Any]]


class _Enough(Exception):  # noqa: N818  # ends a pass early, and is no error
    """Ends a pass after the last layer that is needed."""


class Bench:
    """Runs a model over a few sequences, and counts the passes.

    The hidden states are read here, and not by `cascade.saturation.profile`, so that a fault in
    reading them is told from a fault in the model.

    Args:
        stack: The model. Every change is undone to the last bit.
        ids: `[S, T]` token ids.
        edges: Where ranges of positions begin, and the end of the last one. Each range of a
            sequence then has rows of its own (default: one range).
    """

    def __init__(self, stack: DecoderStack, ids: Array, edges: Sequence[int] = ()) -> None:
        self.stack = stack
        self.edges = list(edges) or [0, ids.shape[1]]
        self.ids = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(stack.device)
        self.passes = 0

    @property
    def is_spent(self) -> bool:
        """Whether no further pass may be made."""
        return self.passes >= MOST_PASSES

    def rows(
        self, change: Change = nullcontext, *, shift: int = 0, ids: Tensor | None = None
    ) -> Array | None:
        """Return means and mean squares of each range of each sequence, `[S x R, L, 2]`.

        Args:
            change: Changes the model during the pass.
            shift: Added to all positions; needs a decoder that takes `position_ids`.
            ids: Other token ids, `[S, T]`.

        Returns:
            None if the model does not run with the change, or the passes are spent.
        """
        states = self.states(change, shift=shift, ids=ids)
        if states is None:
            return None
        similarity = similarities_of(*states)
        ranges = [
            statistics_of(similarity[..., start:end])
            for start, end in itertools.pairwise(self.edges)
        ]
        return np.stack(ranges, axis=1).reshape(-1, similarity.shape[1], 2)

    @torch.no_grad()
    def states(
        self,
        change: Change = nullcontext,
        *,
        shift: int = 0,
        ids: Tensor | None = None,
        until: int | None = None,
    ) -> tuple[list[Tensor], Tensor | None] | None:
        """Return the hidden history and the state after the final norm, as `rows` runs it.

        Args:
            change: Changes the model during the pass.
            shift: Added to all positions.
            ids: Other token ids, `[S, T]`.
            until: The last entry that is needed; None for all.
        """
        if self.is_spent:
            return None
        self.passes += 1
        states: list[Tensor] = []

        def visit(entry: int, hidden: Tensor) -> None:
            states.append(hidden)
            if entry == until:
                raise _Enough

        tokens = self.ids if ids is None else ids
        places: dict[str, Tensor] = {}
        if shift:
            length = tokens.shape[1]
            places["position_ids"] = (torch.arange(length, device=tokens.device) + shift)[None]
        try:
            with change(), self.stack.visiting(visit) as decoder:
                final = run_decoder(decoder, tokens, **places)
        except _Enough:
            return states, None
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a change that the model does not run with is no cause
            return None
        return states, final if self.stack.has_final_norm else None


def rows_of(
    states: list[Tensor], normed: Tensor | None, dtype: torch.dtype = torch.float32
) -> Array:
    """Return means and mean squares of the similarities of states, `[S, L, 2]`.

    Args:
        states: The hidden history, `[S, T, D]` each.
        normed: The state after the final norm, if there is one.
        dtype: The dtype that similarities are computed in.
    """
    return statistics_of(similarities_of(states, normed, dtype))


def similarities_of(
    states: list[Tensor], normed: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the similarities of states in float64, `[S, L, T]`; arguments as for `rows_of`."""
    pairs = [*itertools.pairwise(states), *([(states[-2], normed)] if normed is not None else [])]
    values = [
        torch.cosine_similarity(one.to(other.device, dtype), other.to(dtype), dim=-1).clamp(-1, 1)
        for one, other in pairs
    ]
    return torch.stack([value.cpu() for value in values]).double().permute(1, 0, 2)


def statistics_of(similarity: Tensor) -> Array:
    """Return means and mean squares over tokens, `[S, L, 2]`, of similarities `[S, L, T]`."""
    both = [similarity.mean(dim=2), similarity.square().mean(dim=2)]
    found: Array = torch.stack(both, dim=2).numpy()
    return found


# --- Changes ---------------------------------------------------------------------------------


def values_set(*changes: tuple[Any, str, object]) -> Change:
    """Return a change that gives attributes other values.

    Args:
        changes: Owner, attribute and value; attributes of the owner or of its class, no weights.
    """

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        with contextlib.ExitStack() as restore:
            for owner, name, value in changes:
                if name in vars(owner):
                    restore.callback(setattr, owner, name, getattr(owner, name))
                else:  # of its class, such as `forward`
                    restore.callback(delattr, owner, name)
                setattr(owner, name, value)
            yield

    return change


def tensors_set(*changes: tuple[Tensor, Callable[[], Tensor]]) -> Change:
    """Return a change that gives weights or buffers other values.

    Args:
        changes: A tensor, and a function that returns its values.
    """

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        before = [(tensor, tensor.detach().clone()) for tensor, _ in changes]
        values = [make().detach().clone() for _, make in changes]
        try:
            for (tensor, _), value in zip(changes, values, strict=True):
                tensor.data.copy_(value)
            yield
        finally:
            for tensor, value in before:
                tensor.data.copy_(value)

    return change


def outputs_scaled(module: nn.Module, by: float) -> Change:
    """Return a change that multiplies what a module returns."""

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        handle = module.register_forward_hook(lambda _, __, output: output * by)
        try:
            yield
        finally:
            handle.remove()

    return change


def with_attention(stack: DecoderStack, kernel: str) -> Change:
    """Return a change to another attention kernel."""

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        model: Any = stack.model
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation(kernel)
            yield
        finally:
            model.set_attn_implementation(before)

    return change
