"""A model's own forward over the next tokens of a text, and generation by nothing else."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade.core.errors import UnsupportedModelError
from cascade.decoding.forward import finite_logits
from cascade.decoding.growing_text import Generation, GrowingText, Token
from cascade.decoding.kv_cache import KeyValueCache
from cascade.decoding.sampling import TokenChooser
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack
from cascade.models.text_decoders import has_text_decoder

if TYPE_CHECKING:
    from transformers import Cache


class OwnForward:
    """A model's own forward, as `generate` of `transformers` calls it, through a KV cache.

    Args:
        stack: The model. Models with a text decoder next to other parts are not supported.
        cache: Another cache than the one that the model makes, as in `generate`. A `KeyValueCache`
            can go back to earlier columns.

    Attributes:
        cache: The cache; None before the first pass, if the model makes it.
        counts: The work that was computed.
        takes_positions: Whether the forward takes position_ids.
    """

    def __init__(self, stack: DecoderStack, cache: Cache | None = None) -> None:
        if not self.supports(stack):
            raise UnsupportedModelError(
                f"the forward of {stack.model.config.model_type} may take more than text; expected"
                " a model of text alone"
            )
        self.stack = stack
        self.counts = Counts.of(stack.num_layers)
        self.cache: Any = cache
        parameters = inspect.signature(stack.model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters

    @staticmethod
    def supports(stack: DecoderStack) -> bool:
        """Return whether a model's own forward takes text alone."""
        return not has_text_decoder(stack.model)

    @torch.no_grad()
    def run(
        self,
        ids: Tensor,
        start: int,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """Return the logits of the next tokens, in fp32.

        Args:
            ids: The tokens, `[B, T]`.
            start: The column of the first of them.
            attention_mask: `[B, start + T]`, 1 for tokens and 0 for padding; None without padding.
            position_ids: `[B, T]`, needed with a mask.
            last: Return the logits of the last column only, `[B, 1, V]`, else `[B, T, V]`.

        Raises:
            ModelError: Logits are not finite.
        """
        stack, (batch, count) = self.stack, ids.shape
        if isinstance(self.cache, KeyValueCache):
            self.cache.window(start, start + count)
        kwargs: dict[str, Any] = {}
        if self.takes_positions and position_ids is not None:
            kwargs["position_ids"] = position_ids
        if self._keeps_logits and last:
            kwargs["logits_to_keep"] = 1
        output = stack.model(
            input_ids=ids,
            attention_mask=attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **kwargs,
        )
        self.cache, logits = output.past_key_values, output.logits
        self.counts.lm_head_rows += batch * logits.shape[1]
        self.counts.add_pass(batch * count, batch * count * (start + count))
        return finite_logits((logits[:, -1:] if last else logits).float(), stack.num_layers)


def generate_by_model(forward: OwnForward, text: GrowingText, choose: TokenChooser) -> Generation:
    """Generate column by column, without exits and drafts.

    Args:
        forward: The model's forward.
        text: The prompts, padded on the left.
        choose: Chooses tokens.

    Raises:
        ModelError: Logits are not finite.
    """
    start, stop, passed = 0, text.prompt, 0
    last = forward.stack.num_layers
    while rows := text.open_rows:
        if text.mask is None:
            ids, attention = text.ids[:, start:stop], {}
            passed += len(rows) * (stop - start)
        else:
            chunk = text.chunk(start, stop)
            ids = chunk.ids
            attention = {"attention_mask": chunk.attention_mask, "position_ids": chunk.positions}
            passed += int(chunk.valid.sum())
        logits = forward.run(ids, start, last=True, **attention)[:, 0]
        if len(rows) < len(logits):
            logits = logits[rows]
        tokens = choose(text.ids, logits, rows, [stop] * len(rows)).tolist()
        text.add(stop, {row: Token(token, last) for row, token in zip(rows, tokens, strict=True)})
        start, stop = stop, stop + 1
    return text.result(forward.counts, passed, 0, 0)
