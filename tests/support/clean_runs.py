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

from cascade.corpora.blocks import TokenBlocks
from cascade.gate.baselines import StoredProfile
from cascade.gate.quick_gate import run_gate
from cascade.models.stack import DecoderStack
from cascade.saturation import profile as saturation
from support.tiny_models import tiny_model


def a_tiny_stack(family: str = "llama") -> DecoderStack:
    about = {"name": "tiny", "weights_hash": "w", "tokenizer_hash": "t"}
    return DecoderStack(tiny_model(family, num_layers=6), provenance=about)


def broken_in_another_process() -> DecoderStack:
    """Return a tiny model that is intact only in the process of the tests."""
    stack = a_tiny_stack()
    if multiprocessing.parent_process() is not None:
        stack.layers[2].mlp.down_proj.weight.data.mul_(1.01)  # type: ignore[operator, union-attr]
    return stack


@dataclass(frozen=True)
class RunVariant:
    """How to run an unchanged model.

    Attributes:
        threads: Threads of torch.
        batch_size: Sequences per forward pass.
        attention: "sdpa" or "eager".
        order: Seed of the order of the sequences.
        left: Tokens of padding before each sequence.
        full: Whether all sequences are measured, including their table.
        elsewhere: Whether the run is in another process.
    """

    threads: int
    batch_size: int
    attention: str
    order: int
    left: int
    full: bool
    elsewhere: bool


def clean_variants(repetitions: int) -> Iterator[RunVariant]:
    """Yield variants whose attributes are drawn or assigned independently of each other."""
    draw = np.random.default_rng(0)
    for number in range(repetitions):
        yield RunVariant(
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
    """Return `similarities` of tokens with `left` tokens of padding before them."""
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


def verdict_of_variant(
    stack: DecoderStack, blocks: TokenBlocks, baseline: StoredProfile, variant: RunVariant
) -> str:
    """Return the gate's verdict on an unchanged model in one variant."""
    order = np.random.default_rng(variant.order).permutation(len(blocks.ids))
    threads, model = torch.get_num_threads(), stack.model
    before = model.config._attn_implementation
    with ExitStack() as restore:
        restore.callback(torch.set_num_threads, threads)
        torch.set_num_threads(variant.threads)
        restore.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(variant.attention)
        patch = restore.enter_context(pytest.MonkeyPatch.context())
        if variant.left:
            patch.setattr(
                saturation, "similarities", lambda s, ids: padded_similarities(s, ids, variant.left)
            )
        gate = run_gate(
            stack,
            replace(blocks, ids=blocks.ids[order]),
            baseline,
            batch_size=variant.batch_size,
            full=variant.full,
        )
    return gate.comparison.verdict


#: What another process keeps between two repetitions: the model that it loaded.
_kept: dict[str, DecoderStack] = {}


def _load(make: Callable[[], DecoderStack]) -> None:
    _kept["stack"] = make()


def _run_elsewhere(blocks: TokenBlocks, baseline: StoredProfile, variant: RunVariant) -> str:
    return verdict_of_variant(_kept["stack"], blocks, baseline, variant)


def repeat(
    make: Callable[[], DecoderStack],
    blocks: TokenBlocks,
    baseline: StoredProfile,
    variants: Sequence[RunVariant],
    *,
    each: int = 10,
) -> list[str]:
    """Run every variant, some of them in other processes, which load the model themselves.

    Args:
        make: Makes the model; importable, because another process calls it too.
        blocks: What is measured.
        baseline: What it is compared with.
        variants: The variants.
        each: Repetitions for each other process.

    Returns:
        The verdicts, in the order of the variants.
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
            pool.submit(_run_elsewhere, blocks, baseline, variant).result()
            if variant.elsewhere
            else verdict_of_variant(stack, blocks, baseline, variant)
            for variant in variants
        ]


#: Rows of the table: what the repetitions have in common.
_GROUPS: dict[str, Callable[[RunVariant], bool]] = {
    "1 thread": lambda variant: variant.threads == 1,
    "2 threads": lambda variant: variant.threads == 2,
    "batches of 1 to 8": lambda variant: variant.batch_size <= 8,
    "batches of 9 to 32": lambda variant: variant.batch_size > 8,
    "SDPA attention": lambda variant: variant.attention == "sdpa",
    "eager attention": lambda variant: variant.attention == "eager",
    "padded": lambda variant: variant.left > 0,
    "another process": lambda variant: variant.elsewhere,
    "quick gate": lambda variant: not variant.full,
    "all sequences": lambda variant: variant.full,
    "together": lambda variant: True,
}


def clean_table(variants: Iterable[RunVariant], verdicts: Iterable[str]) -> str:
    """Return verdicts as CSV, counted by what the repetitions have in common."""
    pairs = list(zip(variants, verdicts, strict=True))
    lines = ["clean repetitions in another order of sequences,count,pass,inconclusive,fail"]
    for name, belongs in _GROUPS.items():
        found = [verdict for variant, verdict in pairs if belongs(variant)]
        counts = [found.count(verdict) for verdict in ("PASS", "INCONCLUSIVE", "FAIL")]
        lines.append(",".join([name, str(len(found)), *map(str, counts)]))
    return "\n".join(lines) + "\n"
