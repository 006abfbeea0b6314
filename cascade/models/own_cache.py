"""Passes through a model's own KV cache, made and read by the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cascade.core.errors import UnsupportedModelError
from cascade.models.layer_states import other_state
from cascade.models.stack import DecoderStack

#: The fields in which models return their cache, and the arguments that take it back.
_CACHES = ("past_key_values", "cache_params")


class OwnCache:
    """A model's own forward over some tokens, after earlier ones that are in its own cache.

    The cache is the one that the model makes when it is called without one, as in the first pass
    of `generate`.

    Args:
        stack: The model, which is not changed.

    Attributes:
        length: The number of tokens in the cache.

    Example:
        >>> import cascade
        >>> stack = cascade.load("smollm2-135m")
        >>> ids = torch.tensor([[1, 504, 3575, 282]])
        >>> cache = OwnCache(stack)
        >>> for tokens in (ids[:, :3], ids[:, 3:]):
        ...     final = cache.run(tokens, lambda entry, hidden: None)
        >>> cache.length, final.shape
        (4, torch.Size([1, 1, 576]))
    """

    def __init__(self, stack: DecoderStack) -> None:
        self.stack = stack
        self.length = 0
        self._name: str | None = None
        self._cache: Any = None
        self._records = False

    @property
    def one_by_one(self) -> str | None:
        """Why only single tokens may follow the first pass; None if several may.

        Layers with a recurrent state do not all continue it over several tokens, nor remove tokens
        from it.
        """
        found = other_state(self.stack.model, self.stack.layers)
        if found is None and not hasattr(self._cache, "activate_past_recording"):
            layers = getattr(self._cache, "layers", [])
            if any(getattr(layer, "is_sliding", False) for layer in layers):
                return "this release of transformers removes no token from a sliding window"
        return found

    def run(self, ids: Tensor, visitor: Callable[[int, Tensor], None]) -> Tensor | None:
        """Run the decoder on the next tokens.

        Args:
            ids: `[B, T]`.
            visitor: Called as by `DecoderStack.visit`.

        Returns:
            The state after the final norm, `[B, T, D]`; None if the model has no final norm.

        Raises:
            UnsupportedModelError: The model returns no cache.
        """
        final = self._run(ids, visitor)
        if self._records:
            self._cache.crop(0)  # removes only states that no later token needs
        return final

    def run_draft(
        self, ids: Tensor, rejected: int, visitor: Callable[[int, Tensor], None]
    ) -> Tensor | None:
        """Run the decoder on the next tokens, and remove the last of them from the cache.

        Args:
            ids: `[B, T]`.
            rejected: How many tokens are removed, at least 1.
            visitor: Called as by `DecoderStack.visit`, with the states of all tokens.

        Returns:
            The state after the final norm, `[B, T, D]`; None if the model has no final norm.
        """
        # Announced, as `generate` does, so that a sliding window keeps what it needs afterwards.
        if hasattr(self._cache, "activate_past_recording"):
            self._cache.activate_past_recording()
            self._records = True
        final = self._run(ids, visitor)
        self._cache.crop(-rejected)
        self.length -= rejected
        return final

    @torch.no_grad()
    def _run(self, ids: Tensor, visitor: Callable[[int, Tensor], None]) -> Tensor | None:
        batch, count = ids.shape
        kwargs: dict[str, Any] = {"use_cache": True}
        if self._name is not None:
            kwargs[self._name] = self._cache
        if self._name != "cache_params":
            # As `generate` does: a mask over the tokens in the cache, too.
            shape = (batch, self.length + count)
            kwargs["attention_mask"] = torch.ones(shape, dtype=torch.long, device=ids.device)
        with self.stack.visiting(visitor) as decoder:
            output = decoder(input_ids=ids, **kwargs)
        self._keep(output)
        self.length += count
        final: Tensor = output.last_hidden_state
        return final if self.stack.has_final_norm else None

    def _keep(self, output: Any) -> None:
        for name in _CACHES:
            cache = getattr(output, name, None)
            if cache is not None:
                self._name, self._cache = name, cache
                return
        family = self.stack.model.config.model_type
        raise UnsupportedModelError(
            f"{family} returns no KV cache in {' or '.join(_CACHES)}; expected one with use_cache"
        )
