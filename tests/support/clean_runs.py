"""Clean repetitions: an unchanged model, run with other arithmetic and in another order."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.long_sequences import sequences_in_one
from cascade.gate.baselines import StoredProfile
from cascade.gate.long_context_check import LongCheck
from cascade.gate.quick_gate import run_gate
from cascade.models.stack import DecoderStack
from cascade.saturation import profile as saturation
from support.tiny_models import tiny_model


def a_tiny_stack(family: str = "llama") -> DecoderStack:
    about = {"name": "tiny", "weights_hash": "w", "tokenizer_hash": "t"}
    return DecoderStack(tiny_model(family, num_layers=6), provenance=about)


def broken_in_another_process() -> DecoderStack:
    """Return a tiny model that is whole in the process of the tests alone."""
    stack = a_tiny_stack()
    if multiprocessing.parent_process() is not None:
        stack.layers[2].mlp.down_proj.weight.data.mul_(1.01)  # type: ignore[operator, union-attr]
    return stack


@dataclass(frozen=True)
class Variation:
    """How an unchanged model is run.

    Attributes:
        threads: That torch computes with.
        batch_size: Sequences per forward pass.
        attention: "sdpa" or "eager".
        order: Seed of the order of the sequences.
        left: Tokens of padding before each sequence.
        full: Whether all sequences are measured, their table included.
        elsewhere: Whether in another process.
    """

    threads: int
    batch_size: int
    attention: str
    order: int
    left: int
    full: bool
    elsewhere: bool


@dataclass(frozen=True)
class Outcome:
    """What the gate made of a repetition.

    Attributes:
        verdict: Its verdict.
        long: Whether a long sequence was compared.
        decoded: Whether passes through the KV cache were compared with the prefill.
    """

    verdict: str
    long: bool
    decoded: bool


def clean_variations(repetitions: int) -> Iterator[Variation]:
    """Yield variations whose attributes are drawn independently of each other."""
    draw = np.random.default_rng(0)
    for number in range(repetitions):
        yield Variation(
            threads=int(draw.integers(1, 3)),
            batch_size=int(draw.integers(1, 33)),
            attention=("sdpa", "eager")[number % 2],
            order=int(draw.integers(1 << 30)),
            left=int(draw.choice([0, 0, 1, 7, 16])),
            full=number % 4 < 1,
            elsewhere=number % 10 < 2,
        )


@torch.no_grad()
def padded_similarities(stack: DecoderStack, ids: Tensor, left: int) -> Tensor:
    """Return `similarities`, the tokens behind so many of padding."""
    padding = ids.new_full((len(ids), left), 1)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    plan = stack.plan(torch.cat([padding, ids], dim=1), attention_mask=mask, position_ids=positions)
    states = [plan.embedded]
    for layer, call in enumerate(plan.calls, start=1):
        states.append(stack.step(layer, states[-1], call))
    pairs = [*itertools.pairwise(states), (states[-2], stack.norm(states[-1]))]
    return torch.stack(
        [torch.cosine_similarity(a, b, dim=-1)[:, left:].clamp(-1, 1) for a, b in pairs]
    )


def cleanly(
    stack: DecoderStack, blocks: TokenBlocks, baseline: StoredProfile, variation: Variation
) -> Outcome:
    """Run the gate on an unchanged model in one of the variations."""
    order = reordered(stack, blocks, baseline, variation.order)
    threads, model = torch.get_num_threads(), stack.model
    before = model.config._attn_implementation
    with ExitStack() as restore:
        restore.callback(torch.set_num_threads, threads)
        torch.set_num_threads(variation.threads)
        restore.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(variation.attention)
        patch = restore.enter_context(pytest.MonkeyPatch.context())
        if variation.left:
            patch.setattr(
                saturation,
                "similarities",
                lambda s, ids: padded_similarities(s, ids, variation.left),
            )
        gate = run_gate(
            stack,
            replace(blocks, ids=blocks.ids[order]),
            baseline,
            batch_size=variation.batch_size,
            full=variation.full,
        )
    long, decoding = gate.comparison.long_context, gate.comparison.decoding
    return Outcome(
        gate.comparison.verdict,
        long=long is not None and long.verdict != "NOT CHECKED",
        decoded=decoding is not None and decoding.verdict != "NOT CHECKED",
    )


def reordered(
    stack: DecoderStack, blocks: TokenBlocks, baseline: StoredProfile, seed: int
) -> Array:
    """Return the sequences in another order, but those of the first long one side by side."""
    draw, numbers = np.random.default_rng(seed), np.arange(len(blocks.ids))
    long = LongCheck.of(stack, blocks, baseline, full=False).sequences
    if long is None:
        return draw.permutation(numbers)
    start = int(long.starts[0])
    run = numbers[start : start + sequences_in_one(blocks, long.ids.shape[1])]
    rest = draw.permutation(np.setdiff1d(numbers, run))
    return np.insert(rest, draw.integers(len(rest) + 1), run)


#: What another process keeps between two repetitions: the model that it loaded.
_kept: dict[str, DecoderStack] = {}


def _load(make: Callable[[], DecoderStack]) -> None:
    _kept["stack"] = make()


def _elsewhere(blocks: TokenBlocks, baseline: StoredProfile, variation: Variation) -> Outcome:
    return cleanly(_kept["stack"], blocks, baseline, variation)


def repeat(
    make: Callable[[], DecoderStack],
    blocks: TokenBlocks,
    baseline: StoredProfile,
    variations: Sequence[Variation],
    *,
    each: int = 10,
) -> list[Outcome]:
    """Run every variation, some of them in processes that load the model by themselves.

    Args:
        make: Makes the model; importable, as another process calls it too.
        blocks: What is measured.
        baseline: What it is held to.
        variations: How.
        each: Repetitions that one of the other processes lives for.

    Returns:
        The outcomes, in the order of the variations.
    """
    stack = make()
    pool = ProcessPoolExecutor(
        1,
        multiprocessing.get_context("spawn"),
        initializer=_load,
        initargs=(make,),
        max_tasks_per_child=each,
    )
    with pool:
        return [
            pool.submit(_elsewhere, blocks, baseline, variation).result()
            if variation.elsewhere
            else cleanly(stack, blocks, baseline, variation)
            for variation in variations
        ]


#: Rows of the table: what the repetitions have in common.
_GROUPS: dict[str, Callable[[Variation, Outcome], bool]] = {
    "1 thread": lambda variation, outcome: variation.threads == 1,
    "2 threads": lambda variation, outcome: variation.threads == 2,
    "batches of 1 to 8": lambda variation, outcome: variation.batch_size <= 8,
    "batches of 9 to 32": lambda variation, outcome: variation.batch_size > 8,
    "SDPA attention": lambda variation, outcome: variation.attention == "sdpa",
    "eager attention": lambda variation, outcome: variation.attention == "eager",
    "padded": lambda variation, outcome: variation.left > 0,
    "another process": lambda variation, outcome: variation.elsewhere,
    "quick gate": lambda variation, outcome: not variation.full,
    "all sequences": lambda variation, outcome: variation.full,
    "with a long sequence": lambda variation, outcome: outcome.long,
    "decoded": lambda variation, outcome: outcome.decoded,
    "together": lambda variation, outcome: True,
}


def clean_table(variations: Iterable[Variation], outcomes: Iterable[Outcome]) -> str:
    """Return verdicts as CSV, counted by what the repetitions have in common."""
    pairs = list(zip(variations, outcomes, strict=True))
    lines = ["clean repetitions in another order of sequences,count,pass,inconclusive,fail"]
    for name, belongs in _GROUPS.items():
        found = [outcome.verdict for variation, outcome in pairs if belongs(variation, outcome)]
        counts = [found.count(verdict) for verdict in ("PASS", "INCONCLUSIVE", "FAIL")]
        lines.append(",".join([name, str(len(found)), *map(str, counts)]))
    return "\n".join(lines) + "\n"
