"""Results of the benchmark of early exit: generated tokens, skipped work and targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from msgspec import field
from torch import Tensor

from cascade.benchmarks.records import Ratio, Target, VariantTimes
from cascade.benchmarks.timing import ratio_target, target
from cascade.core.schema import UNSET, Count, Finite, Index, Part, UnsetType
from cascade.decoding.early_exit import Score
from cascade.decoding.growing_text import Generation
from cascade.models.counts import CountsRecord
from cascade.models.flops import flops
from cascade.models.stack import DecoderStack


class GeneratedRow(Part, frozen=True, kw_only=True):
    """The tokens that one variant generated. For `generate`, only the agreement is known.

    Attributes:
        agreement: Share of new tokens that equal those of `generate` at the same position.
        exit_share: Share of tokens that exited early.
        layers_per_token: Mean number of layers per token.
        drafted: Number of drafted tokens.
        accepted: Number of drafted tokens that the full model verified.
        counts: Computed rows.
    """

    agreement: Finite
    exit_share: Finite | UnsetType = UNSET
    layers_per_token: Finite | UnsetType = UNSET
    drafted: Index | UnsetType = UNSET
    accepted: Index | UnsetType = UNSET
    counts: CountsRecord | UnsetType = UNSET


class Skipping(Part, frozen=True, kw_only=True):
    """The time of an early exit, compared with its counted operations.

    Attributes:
        name: Name of the variant.
        exit_share: Share of tokens that exited early.
        seconds_ratio: Seconds divided by those of the full model.
        flops_ratio: Operations divided by those of the full model.
        excess: Ratio of seconds divided by ratio of operations.
        interval: 95 % interval of the excess.
    """

    name: str
    exit_share: Finite
    seconds_ratio: Finite
    flops_ratio: float
    excess: float
    interval: list[float]


class TimedExit(Part, frozen=True, kw_only=True):
    """The timed early exit.

    Attributes:
        layer: Exit layer.
        rule: Exit rule.
        heads: File of the heads, or how they were fitted.
        head: Kind of exit head.
        threshold: How the threshold was determined.
        fallback: Reason why no work is skipped; null if it is.
    """

    layer: Count
    rule: str
    heads: str
    head: str
    threshold: str
    fallback: str | None


class AssistantTimes(Part, frozen=True, kw_only=True):
    """The times of `assistant_early_exit`. They are absent if it does not run.

    Attributes:
        layer: Exit layer.
        new_tokens: New tokens per prompt.
        reason: Reason why it was not measured; null if it was.
        agreement: Share of new tokens that equal those of `generate` at the same position.
    """

    layer: Count
    new_tokens: Count
    reason: str | None
    variants: dict[str, VariantTimes] | UnsetType = field(name="ways", default=UNSET)
    order: list[list[str]] | UnsetType = UNSET
    ratios: list[Ratio] | UnsetType = UNSET
    agreement: Finite | UnsetType = UNSET


class ScoringTimes(Part, frozen=True, kw_only=True):
    """The times of scoring with skipped tokens. They are absent if it was not measured.

    Attributes:
        reason: Reason why it was not measured; null if it was.
        tokens: Number of scored tokens.
        seq_len: Tokens per sequence.
        hard_ratio: Share of hard tokens.
        what: Description of the scoring.
        skipping: Time of each early exit, compared with its counted operations.
    """

    reason: str | None
    tokens: Count | UnsetType = UNSET
    seq_len: Count | UnsetType = UNSET
    hard_ratio: Finite | UnsetType = UNSET
    what: str | UnsetType = UNSET
    variants: dict[str, VariantTimes] | UnsetType = field(name="ways", default=UNSET)
    order: list[list[str]] | UnsetType = UNSET
    ratios: list[Ratio] | UnsetType = UNSET
    skipping: list[Skipping] | UnsetType = UNSET


def _sequences(made: Any) -> Tensor:
    return made.sequences if isinstance(made, Generation) else made


def share_equal(one: Tensor, other: Tensor, prompt: int) -> float:
    """Return the share of new tokens that are equal at the same position.

    Args:
        one: Token ids, `[B, T]`.
        other: Token ids, `[B, T]`.
        prompt: Tokens per prompt.
    """
    return float((one[:, prompt:] == other[:, prompt:]).double().mean())


def generated_rows(
    results: Mapping[str, Sequence[Any]], prompt: int, num_layers: int
) -> dict[str, GeneratedRow]:
    """Return exits, layers, counted rows and agreement of each variant, by name.

    Args:
        results: Generations of each variant, one per batch. For "generate", only token ids.
        prompt: Tokens per prompt.
        num_layers: Number of decoder layers, N.
    """
    expected = torch.cat([_sequences(made) for made in results["generate"]])
    rows = {}
    for name, made in results.items():
        sequences = torch.cat([_sequences(batch) for batch in made])
        agreement = share_equal(sequences, expected, prompt)
        rows[name] = (
            GeneratedRow(agreement=agreement)
            if name == "generate"
            else _generated_row(made, agreement, num_layers)
        )
    return rows


def _generated_row(made: Sequence[Generation], agreement: float, num_layers: int) -> GeneratedRow:
    exit_layers = torch.cat([batch.exit_layers for batch in made])
    counts = made[0].counts
    for batch in made[1:]:
        counts = counts + batch.counts
    return GeneratedRow(
        agreement=agreement,
        exit_share=float((exit_layers < num_layers).double().mean()),
        layers_per_token=sum(counts.layer_rows) / sum(batch.passed for batch in made),
        drafted=sum(batch.drafted for batch in made),
        accepted=sum(batch.accepted for batch in made),
        counts=counts.record(),
    )


def skipping_rows(
    stack: DecoderStack, results: Mapping[str, Score], ratios: Sequence[Ratio]
) -> list[Skipping]:
    """Compare the time of skipping with the counted operations.

    Args:
        stack: The model.
        results: Scores of each variant, including "full".
        ratios: Ratios of seconds to those of "full".

    Returns:
        One row per early exit.
    """
    whole = flops(stack, results["full"].counts)
    rows = []
    for ratio in ratios:
        name = ratio.name.partition("/")[0]
        score = results[name]
        operations = flops(stack, score.counts) / whole
        rows.append(
            Skipping(
                name=name,
                exit_share=float((score.exit_layers < stack.num_layers).double().mean()),
                seconds_ratio=ratio.median,
                flops_ratio=operations,
                excess=ratio.median / operations,
                interval=[end / operations for end in ratio.interval],
            )
        )
    return rows


def decoding_targets(
    full: Ratio, equal: float | None, skipping: Sequence[Skipping]
) -> list[Target]:
    """Compare the results with the targets.

    Args:
        full: Ratio of the seconds of full-depth decoding to those of `generate`.
        equal: Share of verified tokens that equal the full model's; None for dtypes other than
            fp32, where this is not guaranteed.
        skipping: Times of skipping; empty if not measured.

    Returns:
        One row per target. `met` is None if nothing was measured.
    """
    rows = [
        ratio_target(full, "at most", 1.0),
        target("verified tokens equal, fp32", "at least", 1.0, equal),
    ]
    if not skipping:
        rows.append(target("true_skipping", "at most", 1.15, None))
    for row in skipping:
        measured = row.excess if math.isfinite(row.excess) else None
        name = f"true_skipping, {row.name}"
        rows.append(target(name, "at most", 1.15, measured, row.interval))
    return rows
