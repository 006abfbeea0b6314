"""The tokens that a drafter can propose: those that the model generates most often."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.models.stack import DecoderStack

#: A token of a prompt counts as this much of a generated one: replies repeat some of them.
_PROMPT_SHARE = 0.3


def ends_of(stack: DecoderStack) -> tuple[int, ...]:
    """Return the tokens that end a text: those of the generation config and of the tokenizer.

    Args:
        stack: The model.
    """
    given = getattr(stack.model.generation_config, "eos_token_id", None)
    found = list(given) if isinstance(given, list | tuple) else [given]
    found.append(getattr(stack.tokenizer, "eos_token_id", None))
    known = {token for token in found if token is not None and 0 <= token < stack.vocab_size}
    return tuple(sorted(known))


def choose_tokens(
    texts: Iterable[tuple[Tensor, int]], size: int, vocab_size: int, ends: Iterable[int]
) -> Tensor:
    """Return the most frequent tokens of texts, ascending, `[V']`.

    Tokens that no text has fill up the rest, the lowest first: tokenizers number tokens about in
    the order of their frequency.

    Args:
        texts: The ids of each text, and how many of them are its prompt.
        size: The number of tokens; all of them if the model has no more.
        vocab_size: The number of tokens that the model has.
        ends: Tokens that end a text. They are always among them.

    Raises:
        UsageError: The size has no room for the tokens that end a text.
    """
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for ids, prompt in texts:
        counts += torch.bincount(ids[prompt:].long(), minlength=vocab_size)
        counts += _PROMPT_SHARE * torch.bincount(ids[:prompt].long(), minlength=vocab_size)
    always = sorted(set(ends))
    if size <= len(always):
        raise UsageError(
            f"expected a --vocabulary above {len(always)}, the number of tokens that end a text, "
            f"got {size}; raise it"
        )
    counts[always] = float("inf")
    order = counts.argsort(descending=True, stable=True)
    return order[: min(size, vocab_size)].sort().values
