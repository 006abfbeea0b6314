"""Benchmarks: ways to collect similarities, timed in one process with interleaved rounds."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cascade.corpora import EMBEDDED, TokenBlocks, load_blocks
from cascade.errors import CascadeError
from cascade.models import DecoderStack, load
from cascade.saturation import SaturationProfile, analyze

Array = npt.NDArray[Any]
Record = dict[str, Any]

#: One way to go over the token blocks once. What it returns is not looked at while time runs.
Way = Callable[[], Any]

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

_RESAMPLES = 9999
_INTERVAL = (
    f"median over rounds of the ratio within each round; 95 % percentile bootstrap of the median, "
    f"{_RESAMPLES} resamples of whole rounds"
)

#: The long pass of the memory measurement has this many times the tokens of the short one.
_LONG = 8
_MEGABYTE = 1e6

#: glibc otherwise raises these thresholds while a process runs and keeps freed batches for later:
#: the peak of the same pass then varied by 80 MB from process to process. Set, they stay.
_STEADY_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}

_MEMORY = (
    "peak resident memory of the process, each row in a fresh one: the model is loaded, one pass "
    "over the tokens warms allocator and kernels up, then the peak is read after a measured pass. "
    f"The {_LONG}x pass takes the same blocks {_LONG} times. glibc is told to return freed memory "
    f"at once ({', '.join(f'{name}={value}' for name, value in _STEADY_MALLOC.items())})"
)


class BenchmarkError(CascadeError):
    """What was asked for cannot be measured, or measuring it failed."""


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
        for name, minimum in (least | {"tokens": self.seq_len}).items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                option = name.replace("_", "-")
                reason = {
                    "tokens": " (one sequence of --seq-len)",
                    "rounds": " (one round has no interval)",
                }.get(name, "")
                raise BenchmarkError(
                    f"expected --{option} of at least {minimum}{reason}, got {value}"
                )


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
    load_average = _load_average()
    setup = replace(setup, threads=setup.threads or torch.get_num_threads())
    with pinned_threads(setup.threads):
        tokens, first, order, seconds = _time(setup, command, tell)
    usage = _memory(setup, tell) if memory else _no_memory("not asked for (--no-memory)")
    ratios = ratio_rows(seconds, seed=setup.seed)
    agreement = _agreement(first)
    profile: SaturationProfile = first["analyze_fp32"]
    record: Record = {
        "schema": 1,
        "kind": "bench.collect",
        "provenance": _provenance(profile, load_average),
        "settings": asdict(setup) | {"tokens": tokens},
        "ways": _way_rows(seconds, tokens),
        "order": order,
        "ratios": ratios,
        "interval": _INTERVAL,
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
        synchronize=lambda: _synchronize(stack.device),
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


def _hidden_states(stack: DecoderStack, ids: Tensor) -> Sequence[Tensor]:
    """Run the whole model as a user of `transformers` would: LM head and KV cache included."""
    states: Sequence[Tensor] = stack.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
    ).hidden_states
    return states


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
        states = _hidden_states(stack, ids)
        rows = [
            (functional.normalize(before, dim=-1) * functional.normalize(after, dim=-1)).sum(dim=-1)
            for before, after in itertools.pairwise(states)
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
        The mean distance per pair of hidden states, `[N]`, in [0, 1].
    """
    total = torch.zeros(stack.num_layers, dtype=torch.float64)
    for ids in _batches(stack, blocks, batch_size):
        last = torch.stack([state[:, -1] for state in _hidden_states(stack, ids)])
        cosine = functional.cosine_similarity(last[:-1], last[1:], dim=-1).clamp(-1.0, 1.0)
        total += (torch.arccos(cosine) / math.pi).sum(dim=1).double().cpu()
    distances: Array = (total / len(blocks.ids)).numpy()
    return distances


# --- Time ------------------------------------------------------------------------------------


@contextlib.contextmanager
def pinned_threads(threads: int | None) -> Iterator[None]:
    """Let torch compute with `threads` threads (None: as it is); the number before comes back."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_ways(
    ways: Mapping[str, Way],
    *,
    rounds: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], list[list[str]], dict[str, list[float]]]:
    """Time each way once per round, every round in an order of its own.

    A machine that slows down or is shared then strikes all ways alike, and a ratio within one
    round compares neighbours in time.

    Args:
        ways: Name -> what to time.
        rounds: Timed rounds; one round before them warms up and is not counted.
        seed: Draws the orders.
        clock: Seconds, from any start.
        synchronize: Waits until the device has done all that it was given.
        progress: Told the round.

    Returns:
        What each way returned in the warm-up round, the order of every timed round, and each
        way's seconds, round by round.
    """
    shuffler = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    progress("Warming up")
    first = {name: way() for name, way in ways.items()}
    orders = []
    for number in range(1, rounds + 1):
        progress(f"Round {number} of {rounds}")
        order = list(ways)
        shuffler.shuffle(order)
        orders.append(order)
        for name in order:
            synchronize()
            start = clock()
            ways[name]()
            synchronize()
            seconds[name].append(clock() - start)
    return first, orders, seconds


def _way_rows(seconds: Mapping[str, Sequence[float]], tokens: int) -> Record:
    return {
        name: {
            "what": WAYS[name],
            "tokens_per_second": tokens / float(np.median(values)),
            "seconds": list(values),
        }
        for name, values in seconds.items()
    }


def ratio_rows(seconds: Mapping[str, Sequence[float]], *, seed: int) -> list[Record]:
    """Return the rows of `RATIOS`: median over rounds with a 95 % interval (see `_INTERVAL`).

    Args:
        seconds: Each way's seconds, round by round.
        seed: Draws the resamples.
    """
    rows = []
    for way, reference in RATIOS:
        values = np.array(seconds[way]) / np.array(seconds[reference])
        rows.append(
            {
                "name": f"{way}/{reference}",
                "median": float(np.median(values)),
                "interval": _bootstrap(values, seed),
                "rounds": [float(value) for value in values],
            }
        )
    return rows


def _bootstrap(values: Array, seed: int) -> list[float]:
    generator = np.random.default_rng(seed)
    resampled = generator.choice(values, size=(_RESAMPLES, len(values)))
    return [float(end) for end in np.quantile(np.median(resampled, axis=1), (0.025, 0.975))]


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
        rows.append(_target(name, sense, limit, found[name]["median"], found[name]["interval"]))
    shift = abs(agreement["bf16"]["difference"])
    rows.append(_target("layer mean, bf16 from fp32", "at most", 2e-3, shift))
    growth = memory["growth_mb"]
    rows.append(_target(f"memory growth at {_LONG}x, MB", "below", 10.0, growth))
    return rows


def _target(
    name: str,
    sense: str,
    limit: float,
    measured: float | None,
    interval: Sequence[float] | None = None,
) -> Record:
    met = None
    if measured is not None:
        met = {
            "at most": measured <= limit,
            "at least": measured >= limit,
            "below": measured < limit,
        }[sense]
    return {
        "name": name,
        "sense": sense,
        "limit": limit,
        "measured": measured,
        "interval": None if interval is None else list(interval),
        "met": met,
    }


def _provenance(profile: SaturationProfile, load_average: float | None) -> Record:
    provenance = profile.provenance
    machine = {"cores": os.cpu_count(), "load_average_before": load_average}
    return provenance | {"machine": provenance["machine"] | machine}


def _load_average() -> float | None:
    """Return how many processes wanted a core in the last minute: who else was at work."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# --- Memory ----------------------------------------------------------------------------------


def _memory(setup: Setup, tell: Callable[[str], None]) -> Record:
    try:
        import resource  # noqa: F401
    except ImportError:
        return _no_memory("the operating system reports no peak of a process")
    rows: list[Record] = []
    for way, factor in (("analyze_fp32", 1), ("analyze_fp32", _LONG), ("seed_fp32", 1)):
        tell(f"Measuring the memory of {way} at {factor}x tokens")
        rows.append({"way": way, "factor": factor} | _in_fresh_process(setup, way, factor))
    short, long = rows[0]["peak_mb"], rows[1]["peak_mb"]
    return {"what": _MEMORY, "reason": None, "growth_mb": long - short, "peaks": rows}


def _no_memory(reason: str) -> Record:
    return {"what": _MEMORY, "reason": reason, "growth_mb": None, "peaks": []}


def _in_fresh_process(setup: Setup, way: str, factor: int) -> Record:
    task = json.dumps({"setup": asdict(setup), "way": way, "factor": factor})
    done = subprocess.run(
        [sys.executable, "-m", "cascade.benchmarks", task],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | _STEADY_MALLOC,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BenchmarkError(
            f"measuring the memory of {way} failed: {reason}; leave it out with --no-memory"
        )
    row: Record = json.loads(done.stdout.splitlines()[-1])
    return row


def measure_peak(setup: Setup, way: str, factor: int) -> Record:
    """Run one way in this process and say how much memory it took.

    Args:
        setup: What to measure.
        way: "analyze_fp32" or "seed_fp32".
        factor: How many times the blocks are taken in the measured pass.

    Returns:
        `loaded_mb`, the peak up to the end of loading (what was asked of a fresh process), and
        `peak_mb`, the peak of the measured pass (of the process's whole life where `isolated` is
        false: the system could not set its mark back).
    """
    size = setup.batch_size
    runs: dict[str, Callable[[DecoderStack, TokenBlocks], object]] = {
        "analyze_fp32": lambda stack, blocks: analyze(stack, blocks, batch_size=size),
        "seed_fp32": lambda stack, blocks: seed_means(stack, blocks, size),
    }
    run = runs[way]
    with pinned_threads(setup.threads):
        stack = load(setup.model, device=setup.device)
        blocks = _read_blocks(setup, stack)
        loaded = _peak()
        run(stack, blocks)
        isolated = _forget_peak()
        many = replace(blocks, ids=np.tile(blocks.ids, (factor, 1)))
        run(stack, many)
        return {
            "tokens": many.tokens,
            "loaded_mb": loaded / _MEGABYTE,
            "peak_mb": _peak() / _MEGABYTE,
            "isolated": isolated,
        }


def _peak() -> int:
    """Return this process's peak resident memory, bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        # On Linux ru_maxrss comes down from the parent through fork and exec: a process started
        # by one of 600 MB reported 582 MB, its own peak being 9 MB. VmHWM is this process's own.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak() -> bool:
    """Set the peak back to what is resident now, where the system lets us; say whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    _task = json.loads(sys.argv[1])
    print(json.dumps(measure_peak(Setup(**_task["setup"]), _task["way"], _task["factor"])))
