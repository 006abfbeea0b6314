"""The law of early exit, checked on a user's model: generating equals scoring.

Given tokens are generated one by one, through the KV cache of `EarlyExit`: at each step, the token
that follows in the text is forced. Exits and logits must be those of scoring the whole text in one
pass, within the noise of rounding, which is measured in the same run.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig

from cascade.core.errors import UsageError
from cascade.decoding.early_exit import EarlyExit, Score
from cascade.decoding.forward import Exit
from cascade.decoding.growing_text import Generation
from cascade.gate.rounding import other_rounding
from cascade.models.architecture import run_decoder
from cascade.models.stack import DecoderStack

#: The number of tokens of each sequence that are generated.
GENERATED_TOKENS = 8

#: Logits may differ by this many times the largest noise of the full model's logits.
_NOISE_FACTOR = 4.0

#: They may always differ by this share of the largest logit. In fp32, tiny models of 15 families
#: differ by up to 1e-5 of it.
_LEAST_SHARE = 5e-5

#: An exit may differ if the confidence is this close to its threshold, in parts of the threshold,
#: or of 1: rounding decides. In half precision, a few units in the last place.
_LEAST_TIE, _TIE_UNITS = 1e-5, 4.0


@torch.no_grad()
def check_generation(early: EarlyExit, ids: npt.NDArray[Any]) -> str | None:
    """Return how generating differs from scoring, in one sentence; None if it does not.

    Args:
        early: The early exit, e.g. `Cascade.early_exit()`.
        ids: `[B, T]` token ids of a few sequences, T at least 2.

    Raises:
        UsageError: A rule needs the full model's prediction, so nothing can be generated.

    Example:
        >>> from cascade import EarlyExit, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> ids = load_blocks("embedded", stack.tokenizer).ids[:1, :32]
        >>> print(check_generation(EarlyExit(stack, layer=29, threshold=0.95), ids))
        None
    """
    if any(at.rule.needs_full for at in early.exits):
        raise UsageError(
            "expected rules that can generate, got one that needs the full model's prediction"
        )
    tokens = torch.from_numpy(ids.astype("int64")).to(early.stack.device)
    prompt = max(1, tokens.shape[1] - GENERATED_TOKENS)
    mask = torch.ones_like(tokens)
    score = early.score(tokens, mask, keep_logits=True)
    layers, logits = _generated(early, tokens, prompt)
    return _Difference(early, tokens, prompt, score).first(layers, logits)


def _generated(early: EarlyExit, tokens: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Return the exit layers `[B, n]` and logits `[B, n, V]` of generating the text itself."""
    seen: list[Tensor] = []

    def follow_text(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(logits.float().clone())
        following = tokens[:, ids.shape[1], None]
        return torch.full_like(logits, -torch.inf).scatter(1, following, 0.0)

    # The text goes on behind an end-of-sequence token: what ends it is a token that it lacks.
    within = set(tokens.flatten().tolist())
    absent = next(token for token in range(len(within) + 1) if token not in within)
    settings = GenerationConfig(
        max_new_tokens=tokens.shape[1] - prompt,
        do_sample=False,
        eos_token_id=absent,
        pad_token_id=absent,
    )
    made = early.generate(
        tokens[:, :prompt],
        torch.ones_like(tokens[:, :prompt]),
        generation_config=settings,
        logits_processor=[follow_text],  # type: ignore[list-item]  # any callable will do
        return_dict_in_generate=True,
    )
    assert isinstance(made, Generation)
    return made.exit_layers, torch.stack(seen, dim=1)


class _Difference:
    """The comparison of generating with scoring the same tokens.

    Args:
        early: The early exit.
        tokens: `[B, T]`.
        prompt: The number of tokens before the first generated one.
        score: The score of all tokens.
    """

    def __init__(self, early: EarlyExit, tokens: Tensor, prompt: int, score: Score) -> None:
        assert score.logits is not None
        self.early, self.tokens, self.prompt = early, tokens, prompt
        self.exit_layers = score.exit_layers[:, prompt - 1 : -1]
        self.logits = score.logits[:, prompt - 1 : -1]

    def first(self, layers: Tensor, logits: Tensor) -> str | None:
        """Return the first difference of each kind that rounding does not explain, in words."""
        moved = (logits - self.logits).abs().amax(dim=2)
        limit = self._limit()
        wrong = (layers != self.exit_layers) | ~(moved <= limit)
        if not wrong.any():
            return None
        near = self._near_threshold(layers)
        for step in range(layers.shape[1]):
            for row in range(layers.shape[0]):
                # Behind an exit that rounding decided, the rest of the row may differ.
                if not wrong[row, step] or near[row, : step + 1].any():
                    continue
                where = f"token {self.prompt + step + 1:,} of sequence {row + 1:,}"
                got, expected = int(layers[row, step]), int(self.exit_layers[row, step])
                if got != expected:
                    return f"{where} exits at layer {got} when generated, {expected} when scored"
                size = float(moved[row, step])
                return (
                    f"the logits of {where} (layer {got}) differ by {size:.1e} between generating "
                    f"and scoring, tolerance {limit:.1e}"
                )
        return None

    def _limit(self) -> float:
        """Return the largest difference of logits that rounding explains."""
        plain, moved = (_logits(self.early.stack, self.tokens, change=at) for at in (False, True))
        noise = (moved - plain)[:, self.prompt - 1 : -1].abs().max()
        largest = self.logits.abs().max().clamp_min(1.0)
        return float(torch.maximum(_NOISE_FACTOR * noise, _LEAST_SHARE * largest))

    def _near_threshold(self, layers: Tensor) -> Tensor:
        """Return where generated tokens exit elsewhere only because of rounding, `[B, n]`."""
        differs = layers != self.exit_layers
        if not differs.any():
            return differs
        size = max(_LEAST_TIE, _TIE_UNITS * torch.finfo(self.early.stack.dtype).eps)
        found = torch.zeros_like(differs)
        for sign in (-1, 1):
            exits = [_moved(at, sign * size) for at in self.early.exits]
            other = EarlyExit(
                self.early.stack,
                exits=exits,
                propagation=self.early.propagation,
                seed=self.early.seed,
            )
            score = other.score(self.tokens, torch.ones_like(self.tokens))
            found |= differs & (score.exit_layers[:, self.prompt - 1 : -1] == layers)
        return found


def _moved(at: Exit, by: float) -> Exit:
    """Return an exit with its threshold moved, in parts of it or of 1."""
    threshold = at.threshold + by * max(1.0, abs(at.threshold))  # inf stays inf
    try:
        at.rule.check(threshold)
    except UsageError:  # beyond the rule's range
        threshold = math.copysign(math.inf, by)
    return dataclasses.replace(at, threshold=threshold)


def _logits(stack: DecoderStack, tokens: Tensor, *, change: bool) -> Tensor:
    """Return the full model's logits, `[B, T, V]` in fp32, with other rounding on request."""
    last: list[Tensor] = []
    with stack.visiting(
        lambda entry, hidden: last.__setitem__(slice(None), [hidden]),
        change=other_rounding(stack) if change else None,
    ) as decoder:
        run_decoder(decoder, tokens)
    return stack.decode(last[0]).float()
