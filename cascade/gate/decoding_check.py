"""The check of decoding: passes through a model's KV cache must compute what its prefill computes.

The same tokens run through the model twice. The prefill sees whole sequences at once, without a
cache. Then their beginning runs at once and the rest in cached steps, through the cache that the
model itself makes. Every token must have the same similarity in every layer, within the noise of
rounding, which is measured in the same run. Nothing stored is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from cascade.core.errors import first_line, not_finite
from cascade.gate.records import (
    DecodingKind,
    DecodingPass,
    DecodingRecord,
    DecodingTolerance,
)
from cascade.gate.rounding import similarities_rounded_differently
from cascade.models.own_cache import OwnCache
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import SimilarityVisitor, similarities

#: The number of sequences that are decoded.
DECODED_SEQUENCES = 2

#: The number of tokens of each sequence that run in cached steps.
CACHED_TOKENS = 8

#: The first cached tokens run one at a time, as in plain generation.
_SINGLE_TOKENS = 3
#: Then a draft runs at once, as in speculative decoding. Its last tokens are wrong ones, which are
#: removed from the cache again.
_DRAFTED, _REJECTED = 3, 2

#: The smallest tolerances, of one token and of all cached steps. In fp32, the similarities of a
#: token differ by up to 4e-6 between one pass and cached steps (tiny models of all families that
#: `transformers` knows; SmolLM2-135M: 5e-7). Keys of one layer in fp8 move them by 1e-4.
LEAST_TOKEN_TOLERANCE, LEAST_STEPS_TOLERANCE = 1e-5, 2e-6

#: The difference of one token may be this many times the largest noise of any token. In half
#: precision, clean models reached 2.4 times (tiny models of all families; SmolLM2-135M in bf16:
#: 0.5). Its tail is heavy, because an expert or a key can be chosen differently.
TOKEN_FACTOR = 4.0

#: The root mean square of the differences in all cached steps may be this many times that of the
#: noise of the same tokens. Clean models reached 1.1 times (SmolLM2-135M in bf16: 0.8). This finds
#: what changes every step a little, such as a stale key (there 5.6 times).
STEPS_FACTOR = 2.0

#: Layers with a recurrent state compute a sequence in another order than its tokens one by one.
#: They reached 2.3 and 1.9 times.
_RECURRENT_FACTOR = 3.0


@torch.no_grad()
def check_decoding(stack: DecoderStack, ids: npt.NDArray[Any]) -> DecodingRecord:
    """Compare passes through the model's own KV cache with its prefill of the same tokens.

    Args:
        stack: The model, which is not changed.
        ids: `[B, T]` token ids of a few sequences, T at least 2.

    Returns:
        The passes with their differences. An error that a cached step raises is recorded.

    Raises:
        ModelError: A hidden state of the prefill is NaN or infinite.

    Example:
        >>> from cascade import load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> check_decoding(stack, load_blocks("embedded", stack.tokenizer).ids[:1]).verdict
        'PASS'
    """
    start = time.perf_counter()
    tokens = torch.from_numpy(ids.astype("int64")).to(stack.device)
    prefill = similarities(stack, tokens)
    if not torch.isfinite(prefill).all():
        raise not_finite("the hidden states of the prefill are NaN or infinite")
    run = _Run(stack, tokens, prefill)
    error = reason = None
    try:
        reason = run.decode()
    except torch.OutOfMemoryError:
        raise
    except Exception as raised:  # a broken cache raises any error
        text = first_line(raised)
        if run.passes:
            error = f"{type(raised).__name__}: {text}"
        else:
            # It cannot decode at all, which `generate` says too.
            reason = f"the model does not run with use_cache ({text})"
    noise = _noise(stack, tokens, prefill)
    tolerances = _Tolerances(noise, run.cached, recurrent=run.one_by_one is not None)
    passes = _judged(run.passes, tolerances, stack.layer_labels)
    wrong = error is not None or any(made.layer is not None for made in passes)
    return DecodingRecord(
        verdict="FAIL" if wrong else "PASS" if passes else "NOT CHECKED",
        reason=reason,
        error=error,
        error_layer=run.running if error is not None else None,
        sequences=len(tokens),
        tokens=tokens.shape[1],
        passes=passes,
        tolerances=tolerances.rows(stack.layer_labels),
        seconds=time.perf_counter() - start,
    )


# --- Running ---------------------------------------------------------------------------------


class _Pass(NamedTuple):
    """A pass through the cache, and its differences from the prefill, `[L, B, T]`."""

    kind: DecodingKind
    start: int
    rejected: int
    moved: Tensor


class _Run:
    """The passes over some tokens through one cache.

    Args:
        stack: The model.
        tokens: `[B, T]`.
        prefill: Similarities of the prefill, `[L, B, T]`.
    """

    def __init__(self, stack: DecoderStack, tokens: Tensor, prefill: Tensor) -> None:
        self.stack, self.tokens, self.prefill = stack, tokens, prefill
        #: The number of tokens that run in cached steps; at least one token fills the cache.
        self.cached = min(CACHED_TOKENS, tokens.shape[1] - 1)
        self.passes: list[_Pass] = []
        self._cache = OwnCache(stack)
        self._visitor = SimilarityVisitor()

    def decode(self) -> str | None:
        """Run all passes; return why only single tokens ran in cached steps, if so."""
        length = self.tokens.shape[1]
        self._run("prefix", length - self.cached)
        singly = self.one_by_one
        while self._cache.length < length:
            rest = length - self._cache.length
            steps = len(self.passes) - 1
            if singly is None and steps == _SINGLE_TOKENS and rest > _REJECTED:
                self._run("draft", min(_DRAFTED, rest - _REJECTED), _REJECTED)
            else:
                drafted = any(made.kind == "draft" for made in self.passes)
                self._run("after draft" if drafted else "token", 1)
        return None if singly is None else f"only single tokens ran in cached steps: {singly}"

    @property
    def one_by_one(self) -> str | None:
        """Why only single tokens run in cached steps; None if drafts do, too."""
        return self._cache.one_by_one

    @property
    def running(self) -> str | None:
        """The decoder layer that runs; None if none does."""
        done = len(self._visitor.rows)
        return str(done + 1) if done < self.stack.num_layers else None

    def _run(self, kind: DecodingKind, count: int, rejected: int = 0) -> None:
        start = self._cache.length
        ids = self.tokens[:, start : start + count]
        visitor = self._visitor = SimilarityVisitor()
        if rejected:
            # The first tokens of the text, which do not follow here.
            draft = torch.cat([ids, self.tokens[:, :rejected].flip(dims=(1,))], dim=1)
            final = self._cache.run_draft(draft, rejected, visitor)
        else:
            final = self._cache.run(ids, visitor)
        found = visitor.finish(final)[..., :count]
        moved = (found - self.prefill[..., start : start + count]).abs().cpu()
        self.passes.append(_Pass(kind, start, rejected, moved))


# --- Judging ---------------------------------------------------------------------------------


def _noise(stack: DecoderStack, tokens: Tensor, prefill: Tensor) -> Tensor:
    """Return how far other rounding moves the similarity of each token, `[L, B, T]`.

    The prefill runs again, and every component of every hidden state is moved by up to one unit in
    its last place. Other kernels, which cached steps use, cannot be measured without a cache.
    """
    return (similarities_rounded_differently(stack, tokens) - prefill).abs().cpu()


class _Tolerances:
    """The tolerances of every row, `[L]`: of one token, and of all cached steps together.

    Args:
        noise: `[L, B, T]`.
        cached: The number of last tokens that run in cached steps.
        recurrent: Whether layers keep a recurrent state.
    """

    def __init__(self, noise: Tensor, cached: int, *, recurrent: bool) -> None:
        factor = _RECURRENT_FACTOR if recurrent else 1.0
        noise = noise.double().nan_to_num()  # other rounding can overflow fp16
        self.noise = noise.amax(dim=(1, 2))
        self.mean_noise = _root_mean_square(noise[..., -cached:])
        self.token = factor * (TOKEN_FACTOR * self.noise).clamp_min(LEAST_TOKEN_TOLERANCE)
        self.steps = factor * (STEPS_FACTOR * self.mean_noise).clamp_min(LEAST_STEPS_TOLERANCE)

    def rows(self, labels: Sequence[str]) -> list[DecodingTolerance]:
        """Return the tolerances as stored in a record."""
        columns = (self.noise, self.token, self.mean_noise, self.steps)
        return [
            DecodingTolerance(
                layer=label, noise=noise, tolerance=token, mean_noise=mean, mean_tolerance=steps
            )
            for label, noise, token, mean, steps in zip(
                labels, *(column.tolist() for column in columns), strict=True
            )
        ]


def _root_mean_square(values: Tensor) -> Tensor:
    return values.double().square().mean(dim=(1, 2)).sqrt()


def _judged(
    passes: Sequence[_Pass], tolerances: _Tolerances, labels: Sequence[str]
) -> list[DecodingPass]:
    """Return passes as stored in a record, each with the first row that differs."""
    cached = [made.moved for made in passes if made.kind != "prefix"]
    # NaN is beyond every tolerance.
    together = torch.zeros(len(labels), dtype=torch.bool)
    if cached:
        together = ~(_root_mean_square(torch.cat(cached, dim=2)) <= tolerances.steps)
    found = []
    for made in passes:
        largest = made.moved.amax(dim=(1, 2))
        beyond = ~(largest <= tolerances.token)
        if made.kind != "prefix":
            beyond |= together & ~(_root_mean_square(made.moved) <= tolerances.steps)
        most = float(largest.max())
        found.append(
            DecodingPass(
                kind=made.kind,
                start=made.start,
                tokens=made.moved.shape[2],
                rejected=made.rejected,
                difference=most if math.isfinite(most) else None,
                layer=labels[int(beyond.int().argmax())] if beyond.any() else None,
            )
        )
    return found
