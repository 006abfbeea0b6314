"""Clean repetitions: an unchanged model, run in ways that differ in arithmetic and order alone."""

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
    """Return a tiny model that is whole in the process of the tests alone."""
    stack = a_tiny_stack()
    if multiprocessing.parent_process() is not None:
        stack.layers[2].mlp.down_proj.weight.data.mul_(1.01)  # type: ignore[operator, union-attr]
    return stack


@dataclass(frozen=True)
class Way:
    """One way to run an unchanged model.

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


def clean_ways(repetitions: int) -> Iterator[Way]:
    """Return so many ways, every attribute drawn or dealt out independently of the others."""
    draw = np.random.default_rng(0)
    for number in range(repetitions):
        yield Way(
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


def cleanly(stack: DecoderStack, blocks: TokenBlocks, baseline: StoredProfile, way: Way) -> str:
    """Run the gate on an unchanged model in one of the ways; return the verdict."""
    order = np.random.default_rng(way.order).permutation(len(blocks.ids))
    threads, model = torch.get_num_threads(), stack.model
    before = model.config._attn_implementation
    with ExitStack() as restore:
        restore.callback(torch.set_num_threads, threads)
        torch.set_num_threads(way.threads)
        restore.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(way.attention)
        patch = restore.enter_context(pytest.MonkeyPatch.context())
        if way.left:
            patch.setattr(
                saturation, "similarities", lambda s, ids: padded_similarities(s, ids, way.left)
            )
        gate = run_gate(
            stack,
            replace(blocks, ids=blocks.ids[order]),
            baseline,
            batch_size=way.batch_size,
            full=way.full,
        )
    return gate.comparison.verdict


#: What another process keeps between two repetitions: the model that it loaded.
_kept: dict[str, DecoderStack] = {}


def _load(make: Callable[[], DecoderStack]) -> None:
    _kept["stack"] = make()


def _elsewhere(blocks: TokenBlocks, baseline: StoredProfile, way: Way) -> str:
    return cleanly(_kept["stack"], blocks, baseline, way)


def repeat(
    make: Callable[[], DecoderStack],
    blocks: TokenBlocks,
    baseline: StoredProfile,
    ways: Sequence[Way],
    *,
    each: int = 10,
) -> list[str]:
    """Run every way, some of them in processes that load the model by themselves.

    Args:
        make: Makes the model; importable, as another process calls it too.
        blocks: What is measured.
        baseline: What it is held to.
        ways: How.
        each: Repetitions that one of the other processes lives for.

    Returns:
        The verdicts, in the order of the ways.
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
            pool.submit(_elsewhere, blocks, baseline, way).result()
            if way.elsewhere
            else cleanly(stack, blocks, baseline, way)
            for way in ways
        ]


#: Rows of the table: what the repetitions have in common.
_GROUPS: dict[str, Callable[[Way], bool]] = {
    "1 thread": lambda way: way.threads == 1,
    "2 threads": lambda way: way.threads == 2,
    "batches of 1 to 8": lambda way: way.batch_size <= 8,
    "batches of 9 to 32": lambda way: way.batch_size > 8,
    "SDPA attention": lambda way: way.attention == "sdpa",
    "eager attention": lambda way: way.attention == "eager",
    "padded": lambda way: way.left > 0,
    "another process": lambda way: way.elsewhere,
    "quick gate": lambda way: not way.full,
    "all sequences": lambda way: way.full,
    "together": lambda way: True,
}


def clean_table(ways: Iterable[Way], verdicts: Iterable[str]) -> str:
    """Return verdicts as CSV, counted by what the repetitions have in common."""
    pairs = list(zip(ways, verdicts, strict=True))
    lines = ["clean repetitions in another order of sequences,count,pass,inconclusive,fail"]
    for name, belongs in _GROUPS.items():
        found = [verdict for way, verdict in pairs if belongs(way)]
        counts = [found.count(verdict) for verdict in ("PASS", "INCONCLUSIVE", "FAIL")]
        lines.append(",".join([name, str(len(found)), *map(str, counts)]))
    return "\n".join(lines) + "\n"
