"""The ways to collect similarities, timed and compared: a record of kind `bench.collect`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cascade.benchmarks.memory import LONG, measure_peak, measure_usage, not_measured
from cascade.benchmarks.timing import (
    INTERVAL,
    BenchmarkError,
    Record,
    Way,
    check_least,
    load_average,
    machine_provenance,
    pinned_threads,
    ratio_rows,
    synchronize,
    target_row,
    time_ways,
    way_rows,
)
from cascade.core.arrays import Array
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.exits.history import HiddenHistory
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import SaturationProfile, analyze

#: The kind of the record.
KIND = "bench.collect"

#: What each way does, in the record's words.
WAYS = {
    "seed_fp32": "whole model, output_hidden_states=True, normalized product per layer",
    "bare_fp32": "decoder forward alone, without LM head, cache and statistics",
    "analyze_fp32": "cascade analyze",
    "bare_bf16": "decoder forward alone, in bfloat16",
    "analyze_bf16": "cascade analyze, in bfloat16",
    "angular_fp32": "peer's method: whole model, angular distance per layer, last token only",
}

#: Ratios of seconds, way over reference.
RATIOS = (
    ("analyze_fp32", "bare_fp32"),
    ("seed_fp32", "analyze_fp32"),
    ("seed_fp32", "analyze_bf16"),
    # What no analysis of every layer can get beyond on the same machine.
    ("seed_fp32", "bare_fp32"),
    ("bare_bf16", "analyze_bf16"),
    ("angular_fp32", "analyze_fp32"),
)

_PEER = {
    "way": "angular_fp32",
    "rebuilt": True,
    "reason": (
        "short-transformers 1.0.0 does not run on transformers 5: it takes a decoder layer's "
        "output for a tuple, and since transformers 5 that is a tensor (RuntimeError in its first "
        "forward pass); it also takes no batch larger than one. The method is rebuilt here, in "
        "batches, so the ratio says nothing of that package's own speed"
    ),
    "source": (
        "Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers; "
        "block influence: Men et al. 2024, ShortGPT"
    ),
}


@dataclass(frozen=True)
class Setup:
    """What is measured; the same for every way.

    Attributes:
        model: Anything that `models.load` takes.
        tokens: Tokens per pass, rounded down to whole sequences.
        seq_len: Tokens per sequence.
        batch_size: Sequences per forward pass.
        rounds: Timed passes per way.
        threads: Threads that torch computes with; None leaves the number as it is.
        seed: Draws the order of the ways and the bootstrap's resamples.
        device: "cpu", "cuda", "mps" or "auto".

    Raises:
        BenchmarkError: A number is too small.
    """

    model: str = "smollm2-135m"
    tokens: int = 4096
    seq_len: int = 128
    batch_size: int = 32
    rounds: int = 7
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"seq_len": 2, "batch_size": 1, "rounds": 2, "threads": 1, "seed": 0}
        reasons = {
            "tokens": "one sequence of --seq-len",
            "rounds": "one round has no interval",
        }
        check_least(self, least | {"tokens": self.seq_len}, reasons)


def collect(
    setup: Setup,
    *,
    memory: bool = True,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Record:
    """Time every way to collect similarities over the embedded corpus, and compare them.

    Args:
        setup: What to measure.
        memory: Measure peak memory as well, in processes of their own.
        command: What the user ran, for the provenance.
        progress: Told what is being done.

    Returns:
        A record of kind `bench.collect`; no missed target raises.

    Raises:
        BenchmarkError: The corpus has fewer tokens, or a process measuring memory failed.
        ModelError: The model cannot be loaded.
        DeviceError: The device is absent or lacks bfloat16.
    """
    tell = progress or (lambda _: None)
    load_before = load_average()
    setup = replace(setup, threads=setup.threads or torch.get_num_threads())
    with pinned_threads(setup.threads):
        tokens, first, order, seconds = _time(setup, command, tell)
    usage = _memory(setup, tell) if memory else not_measured("not asked for (--no-memory)")
    ratios = ratio_rows(seconds, RATIOS, seed=setup.seed)
    agreement = _agreement(first)
    profile: SaturationProfile = first["analyze_fp32"]
    record: Record = {
        "schema": 1,
        "kind": KIND,
        "provenance": machine_provenance(to_plain(profile.provenance), load_before),
        "settings": asdict(setup) | {"tokens": tokens},
        "ways": way_rows(seconds, WAYS, tokens=tokens),
        "order": order,
        "ratios": ratios,
        "interval": INTERVAL,
        "agreement": agreement,
        "peer": _PEER,
        "memory": usage,
    }
    record["targets"] = target_rows(ratios, agreement, usage)
    return record


def _time(
    setup: Setup, command: str | None, tell: Callable[[str], None]
) -> tuple[int, dict[str, Any], list[list[str]], dict[str, list[float]]]:
    """Return the tokens of one pass and what `time_ways` returns; the models are freed again."""
    tell(f"Loading {setup.model} in fp32 and bf16")
    stack = load(setup.model, device=setup.device)
    narrow = load(setup.model, dtype="bfloat16", device=setup.device)
    blocks = _read_blocks(setup, stack)
    timed = time_ways(
        collecting_ways(stack, narrow, blocks, setup.batch_size, command=command),
        rounds=setup.rounds,
        seed=setup.seed,
        synchronize=lambda: synchronize(stack.device),
        progress=tell,
    )
    return blocks.tokens, *timed


def _read_blocks(setup: Setup, stack: DecoderStack) -> TokenBlocks:
    blocks = load_blocks(
        EMBEDDED,
        stack.tokenizer,
        seq_len=setup.seq_len,
        num_samples=None,
        max_tokens=setup.tokens,
    )
    wanted = setup.tokens // setup.seq_len * setup.seq_len
    if blocks.tokens < wanted:
        raise BenchmarkError(
            f"the embedded corpus gives {blocks.tokens} tokens in sequences of {setup.seq_len}, "
            f"expected {wanted}; use a smaller --tokens"
        )
    return blocks


# --- The ways --------------------------------------------------------------------------------


def collecting_ways(
    stack: DecoderStack,
    narrow: DecoderStack,
    blocks: TokenBlocks,
    batch_size: int,
    *,
    command: str | None = None,
) -> dict[str, Way]:
    """Return every way of `WAYS`, each going over the same blocks in the same batches.

    Args:
        stack: The model in fp32.
        narrow: The same model in bfloat16.
        blocks: The token blocks.
        batch_size: Sequences per forward pass.
        command: What the user ran, for the profile's provenance.
    """
    return {
        "seed_fp32": lambda: seed_means(stack, blocks, batch_size),
        "bare_fp32": lambda: bare_forward(stack, blocks, batch_size),
        "analyze_fp32": lambda: analyze(stack, blocks, batch_size=batch_size, command=command),
        "bare_bf16": lambda: bare_forward(narrow, blocks, batch_size),
        "analyze_bf16": lambda: analyze(narrow, blocks, batch_size=batch_size),
        "angular_fp32": lambda: angular_distances(stack, blocks, batch_size),
    }


def _batches(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> Iterator[Tensor]:
    for ids, _ in blocks.batches(batch_size):
        yield torch.from_numpy(ids.astype(np.int64)).to(stack.device)


def _pairs(stack: DecoderStack, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Run the whole model as a user of `transformers` would: LM head and KV cache included.

    Returns:
        What rows 1..N-1 and N+norm compare, `[B, T, D]` twice.
    """
    output = stack.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
    )
    history = HiddenHistory.from_transformers(output.hidden_states)
    last = history.num_layers
    return [history.pair(layer) for layer in (*range(1, last), f"{last}+norm")]


@torch.no_grad()
def seed_means(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> Array:
    """Collect as the study that started this did: keep every similarity, then average.

    Args:
        stack: The model.
        blocks: The token blocks.
        batch_size: Sequences per forward pass.

    Returns:
        The mean similarity of rows 1..N-1 and, because the last of the hidden states of
        `transformers` is behind the final norm, N+norm; `[N]`.
    """
    kept: list[Array] = []
    for ids in _batches(stack, blocks, batch_size):
        rows = [
            (functional.normalize(before, dim=-1) * functional.normalize(after, dim=-1)).sum(dim=-1)
            for before, after in _pairs(stack, ids)
        ]
        kept.append(torch.stack(rows).flatten(1).cpu().numpy())
    means: Array = np.concatenate(kept, axis=1).mean(axis=1, dtype=np.float64)
    return means


@torch.no_grad()
def bare_forward(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> None:
    """Run embeddings, decoder layers and final norm, and nothing else: the limit to be close to.

    Args:
        stack: The model.
        blocks: The token blocks.
        batch_size: Sequences per forward pass.
    """
    for ids in _batches(stack, blocks, batch_size):
        stack.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


@torch.no_grad()
def angular_distances(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> Array:
    """Collect what layer pruning is decided by: each layer's angular distance, last token only.

    The distance of a layer is arccos(cosine) / pi between its input and its output at the last
    token of a sequence, averaged over sequences: Gromov et al. 2024, The Unreasonable
    Ineffectiveness of the Deeper Layers, section 3.2, for blocks of one layer. One minus the mean
    cosine is the block influence of Men et al. 2024, ShortGPT, section 2.2.

    Args:
        stack: The model.
        blocks: The token blocks.
        batch_size: Sequences per forward pass.

    Returns:
        The mean distance of rows 1..N-1 and N+norm, `[N]`, in [0, 1].
    """
    total = torch.zeros(stack.num_layers, dtype=torch.float64)
    for ids in _batches(stack, blocks, batch_size):
        rows = [
            functional.cosine_similarity(before[:, -1], after[:, -1], dim=-1)
            for before, after in _pairs(stack, ids)
        ]
        cosine = torch.stack(rows).clamp(-1.0, 1.0)
        total += (torch.arccos(cosine) / math.pi).sum(dim=1).double().cpu()
    distances: Array = (total / len(blocks.ids)).numpy()
    return distances


# --- What was found --------------------------------------------------------------------------


def _agreement(first: Mapping[str, Any]) -> Record:
    """Say how far the layer means of the ways lie apart: a faster way must do the same work."""
    wide: SaturationProfile = first["analyze_fp32"]
    narrow: SaturationProfile = first["analyze_bf16"]
    labels = wide.statistics.layers
    means = wide.statistics.mean()
    normed = len(labels) > wide.provenance["model"]["num_layers"]
    # The seed's way has no row for layer N itself where a final norm follows.
    seen = np.array([not normed or row != len(labels) - 2 for row in range(len(labels))])
    by_seed = [label for label, there in zip(labels, seen, strict=True) if there]
    return {
        "bf16": _farthest(labels, narrow.statistics.mean() - means),
        "seed": _farthest(by_seed, first["seed_fp32"] - means[seen]),
    }


def _farthest(labels: Sequence[str], difference: Array) -> Record:
    row = int(np.argmax(np.abs(difference)))
    return {"layer": labels[row], "difference": float(difference[row])}


def target_rows(ratios: Sequence[Record], agreement: Record, memory: Record) -> list[Record]:
    """Hold what was measured against what is promised for 2 cores and 4,096 tokens.

    Args:
        ratios: As `ratio_rows` returns them.
        agreement: The record's section of that name.
        memory: The record's section of that name.

    Returns:
        One row per target; `met` is None where nothing was measured.
    """
    found = {row["name"]: row for row in ratios}
    rows = []
    for name, sense, limit in (
        ("analyze_fp32/bare_fp32", "at most", 1.05),
        ("seed_fp32/analyze_fp32", "at least", 1.3),
        ("seed_fp32/analyze_bf16", "at least", 2.4),
    ):
        rows.append(target_row(name, sense, limit, found[name]["median"], found[name]["interval"]))
    shift = abs(agreement["bf16"]["difference"])
    rows.append(target_row("layer mean, bf16 from fp32", "at most", 2e-3, shift))
    growth = memory["growth_mb"]
    rows.append(target_row(f"memory growth at {LONG}x, MB", "below", 10.0, growth))
    return rows


# --- Memory ----------------------------------------------------------------------------------


def _memory(setup: Setup, tell: Callable[[str], None]) -> Record:
    return measure_usage(KIND, asdict(setup), "analyze_fp32", beside=("seed_fp32",), progress=tell)


def peak_of_way(setup: Setup, way: str, factor: int) -> Record:
    """Run one way in this process and say how much memory it took.

    Args:
        setup: What to measure.
        way: "analyze_fp32" or "seed_fp32".
        factor: How many times the blocks are taken in the measured pass.

    Returns:
        A row as `memory.measure_peak` returns it.
    """
    size = setup.batch_size
    passes: dict[str, Callable[[DecoderStack, TokenBlocks], object]] = {
        "analyze_fp32": lambda stack, blocks: analyze(stack, blocks, batch_size=size),
        "seed_fp32": lambda stack, blocks: seed_means(stack, blocks, size),
    }
    go = passes[way]
    with pinned_threads(setup.threads):
        stack = load(setup.model, device=setup.device)
        blocks = _read_blocks(setup, stack)

        def run(times: int) -> int:
            many = replace(blocks, ids=np.tile(blocks.ids, (times, 1)))
            go(stack, many)
            return many.tokens

        return measure_peak(run, factor)
