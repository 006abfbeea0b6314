"""What the benchmark of decoding finds: generated tokens, skipped work, targets."""

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
from cascade.decoding.generation import Generation
from cascade.models.counts import CountsRecord
from cascade.models.flops import flops
from cascade.models.stack import DecoderStack


class GeneratedRow(Part, frozen=True, kw_only=True):
    """What one variant generated; of `generate` only the agreement is known.

    Attributes:
        agreement: The share of new tokens that are those of `generate` at the same place.
        exit_share: The share of tokens that exited early.
        layers_per_token: Layers that a token went through, on average.
        drafted: Tokens that were drafted.
        accepted: Drafted tokens that the full model confirmed.
        counts: What was computed.
    """

    agreement: Finite
    exit_share: Finite | UnsetType = UNSET
    layers_per_token: Finite | UnsetType = UNSET
    drafted: Index | UnsetType = UNSET
    accepted: Index | UnsetType = UNSET
    counts: CountsRecord | UnsetType = UNSET


class Skipping(Part, frozen=True, kw_only=True):
    """The time of an early exit, and what its counted operations predict.

    Attributes:
        name: The variant.
        exit_share: The share of tokens that exited early.
        seconds_ratio: Its seconds over those of the full model.
        flops_ratio: Its operations over those of the full model.
        excess: The one ratio over the other.
        interval: Of the excess, 95 %.
    """

    name: str
    exit_share: Finite
    seconds_ratio: Finite
    flops_ratio: float
    excess: float
    interval: list[float]


class TimedExit(Part, frozen=True, kw_only=True):
    """The early exit that is timed.

    Attributes:
        layer: The exit layer.
        rule: The exit rule.
        heads: The heads' file, or how they were fitted.
        head: The kind of exit head.
        threshold: How the threshold was found.
        fallback: Why nothing is skipped; None where it is.
    """

    layer: Count
    rule: str
    heads: str
    head: str
    threshold: str
    fallback: str | None


class AssistantTimes(Part, frozen=True, kw_only=True):
    """The times of `assistant_early_exit`; absent where it does not run.

    Attributes:
        layer: The exit layer.
        new_tokens: Tokens added to each prompt.
        reason: Why it was not measured; None where it was.
        agreement: The share of its new tokens that are those of `generate` at the same place.
    """

    layer: Count
    new_tokens: Count
    reason: str | None
    variants: dict[str, VariantTimes] | UnsetType = field(name="ways", default=UNSET)
    order: list[list[str]] | UnsetType = UNSET
    ratios: list[Ratio] | UnsetType = UNSET
    agreement: Finite | UnsetType = UNSET


class ScoringTimes(Part, frozen=True, kw_only=True):
    """The times of scoring with skipped tokens; absent where it was not measured.

    Attributes:
        reason: Why it was not measured; None where it was.
        tokens: Tokens that are scored.
        seq_len: Tokens per sequence.
        hard_ratio: The share of hard tokens.
        what: What is scored, and how.
        skipping: The time of each early exit, and what its operations predict.
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
    """Return the share of new tokens that are equal at the same place.

    Args:
        one: Token ids, `[B, T]`.
        other: Token ids, `[B, T]`.
        prompt: Tokens of every prompt.
    """
    return float((one[:, prompt:] == other[:, prompt:]).double().mean())


def generated_rows(
    results: Mapping[str, Sequence[Any]], prompt: int, num_layers: int
) -> dict[str, GeneratedRow]:
    """Return what each variant generated, by name: exits, layers, counted rows, agreement.

    Args:
        results: Each variant's generations, one per batch; of "generate" the token ids alone.
        prompt: Tokens of every prompt.
        num_layers: N.
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
    """Compare the time of skipping with what the counted operations predict.

    Args:
        stack: The model.
        results: What each variant scored, "full" among them.
        ratios: Their seconds over those of "full".

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
    """Compare what was measured with what is promised.

    Args:
        full: The seconds of decoding at full depth over those of `generate`.
        equal: The share of verified tokens that are the full model's; None where that is not
            promised (in other dtypes than fp32).
        skipping: The time of skipping; empty where it was not measured.

    Returns:
        One row per target; `met` is None where nothing was measured.
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
