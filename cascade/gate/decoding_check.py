"""The check of decoding: passes through a model's KV cache must compute what its prefill computes.

The same tokens run through the model twice. The prefill sees whole sequences at once, without a
cache. Then their beginning runs at once and the rest in cached steps, through the cache that the
model itself makes. Every token must have the same similarity in every layer, within the noise of
rounding, which is measured in the same run. Nothing stored is needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from cascade.core.errors import first_line
from cascade.gate.records import (
    DecodingKind,
    DecodingPass,
    DecodingRecord,
    DecodingTolerance,
)
from cascade.models.architecture import run_decoder
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

#: The smallest tolerance. In fp32, the similarities of a token differ by up to 5e-7 between one
#: pass and cached steps (SmolLM2-135M; tiny models of all families that `transformers` knows).
LEAST_DECODING_TOLERANCE = 2e-6

#: Differences up to this many times the measured noise count as noise. Clean models reached 0.5 of
#: the noise in bf16 (SmolLM2-135M) and 1.1 in fp16 (tiny models).
DECODING_NOISE_FACTOR = 2.0


@torch.no_grad()
def check_decoding(stack: DecoderStack, ids: npt.NDArray[Any]) -> DecodingRecord:
    """Compare passes through the model's own KV cache with its prefill of the same tokens.

    Args:
        stack: The model, which is not changed.
        ids: `[B, T]` token ids of a few sequences, T at least 2.

    Returns:
        The passes with their differences. An error that a pass raises is recorded.

    Example:
        >>> from cascade import load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> check_decoding(stack, load_blocks("embedded", stack.tokenizer).ids[:1]).verdict
        'PASS'
    """
    start = time.perf_counter()
    tokens = torch.from_numpy(ids.astype("int64")).to(stack.device)
    prefill = similarities(stack, tokens)
    noise = _noise(stack, tokens, prefill)
    limits = (DECODING_NOISE_FACTOR * noise).clamp_min(LEAST_DECODING_TOLERANCE)
    check = _Check(stack, tokens, prefill, limits)
    error = reason = None
    try:
        reason = check.run()
    except torch.OutOfMemoryError:
        raise
    except Exception as raised:  # a broken cache raises any error
        text = first_line(raised)
        if check.passes:
            error = f"{type(raised).__name__}: {text}"
        else:
            # It cannot decode at all, which `generate` says too.
            reason = f"the model does not run with use_cache ({text})"
    wrong = error is not None or any(made.layer is not None for made in check.passes)
    return DecodingRecord(
        verdict="FAIL" if wrong else "PASS" if check.passes else "NOT CHECKED",
        reason=reason,
        error=error,
        error_layer=check.running if error is not None else None,
        sequences=len(tokens),
        tokens=tokens.shape[1],
        passes=check.passes,
        tolerances=[
            DecodingTolerance(layer=label, noise=float(moved), tolerance=float(limit))
            for label, moved, limit in zip(stack.layer_labels, noise, limits, strict=True)
        ],
        seconds=time.perf_counter() - start,
    )


def _noise(stack: DecoderStack, tokens: Tensor, prefill: Tensor) -> Tensor:
    """Return how far other rounding moves the similarity of a token, per row `[L]`.

    The prefill runs again, and every component of every hidden state is moved by up to one unit in
    its last place. Other kernels, which cached steps use, cannot be measured without a cache.
    """
    generator = torch.Generator(device=stack.device).manual_seed(0)

    def rounded(hidden: Tensor) -> Tensor:
        # Parts of a model in half precision can have their residual stream in fp32.
        unit = max(torch.finfo(dtype).eps for dtype in (hidden.dtype, stack.dtype))
        shape, wide = hidden.shape, torch.promote_types(hidden.dtype, torch.float32)
        draw = torch.rand(shape, generator=generator, device=stack.device, dtype=wide)
        moved = hidden.to(wide) * (1 + unit * (2 * draw - 1).to(hidden.device))
        return moved.to(hidden.dtype)

    visitor = SimilarityVisitor()
    with stack.visiting(visitor, change=rounded) as decoder:
        final = run_decoder(decoder, tokens)
    moved = visitor.finish(final if stack.has_final_norm else None)
    return (moved - prefill).abs().amax(dim=(1, 2)).cpu()


@dataclass
class _Check:
    """The passes over some tokens through one cache.

    Attributes:
        prefill: Similarities of the prefill, `[L, B, T]`.
        limits: The tolerance of each row, `[L]`.
    """

    stack: DecoderStack
    tokens: Tensor
    prefill: Tensor
    limits: Tensor

    def __post_init__(self) -> None:
        self.passes: list[DecodingPass] = []
        self._visitor = SimilarityVisitor()
        self._cache = OwnCache(self.stack)

    def run(self) -> str | None:
        """Run all passes; return why only single tokens ran in cached steps, if so."""
        length = self.tokens.shape[1]
        at = max(1, length - CACHED_TOKENS)
        self._pass("prefix", at)
        singly = self._cache.one_by_one
        while at < length:
            rest = length - at
            if singly is None and self._cached == _SINGLE_TOKENS and rest > _REJECTED:
                count = min(_DRAFTED, rest - _REJECTED)
                self._pass("draft", count, _REJECTED)
            else:
                count = 1
                after = any(made.kind == "draft" for made in self.passes)
                self._pass("after draft" if after else "token", count)
            at += count
        return None if singly is None else f"only single tokens ran in cached steps: {singly}"

    @property
    def _cached(self) -> int:
        return len(self.passes) - 1

    @property
    def running(self) -> str | None:
        """The layer that runs; None if none does."""
        done = len(self._visitor.rows)
        return str(done + 1) if done < self.stack.num_layers else None

    def _pass(self, kind: DecodingKind, count: int, rejected: int = 0) -> None:
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
        moved = (found - self.prefill[..., start : start + count]).abs().amax(dim=(1, 2)).cpu()
        beyond = ~(moved <= self.limits)  # NaN is beyond
        labels = self.stack.layer_labels
        largest = float(moved.max())
        self.passes.append(
            DecodingPass(
                kind=kind,
                start=start,
                tokens=count,
                rejected=rejected,
                difference=largest if largest == largest else None,
                layer=labels[int(beyond.int().argmax())] if beyond.any() else None,
            )
        )
