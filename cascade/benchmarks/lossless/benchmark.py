"""The benchmark of lossless decoding: every dtype, kind of prompts, batch size and variant."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from msgspec.structs import replace as changed

from cascade.benchmarks.lossless.config import LosslessBenchmarkConfig
from cascade.benchmarks.lossless.peers import PeerTask, PeerTimes, find_peers, time_peer
from cascade.benchmarks.lossless.prompts import PromptSets, read_prompts
from cascade.benchmarks.lossless.records import (
    DecodingMemory,
    LosslessBenchmark,
    LosslessCell,
    LosslessVariant,
    Peer,
    TimedBatch,
)
from cascade.benchmarks.lossless.results import INTERVAL, fastest_first, timed_row, variant_rows
from cascade.benchmarks.lossless.rounds import time_rounds
from cascade.benchmarks.lossless.variants import (
    REFERENCE,
    DecodingVariant,
    PromptBatch,
    end_tokens,
    find_reasons,
    greedy_settings,
    quiet_transformers,
    variants_of,
)
from cascade.benchmarks.memory import peak_memory, reset_peak_memory
from cascade.benchmarks.timing import (
    BenchmarkError,
    benchmark_provenance,
    load_average,
    no_progress,
    pinned_threads,
    synchronize,
)
from cascade.core.provenance import Provenance, provenance_of
from cascade.core.schema import UNSET
from cascade.decoding.engine.engine import engine_of
from cascade.drafters.proposer import load_drafter
from cascade.models.loading import load
from cascade.models.stack import DecoderStack

_MEGABYTE = 1e6


def benchmark_lossless(
    config: LosslessBenchmarkConfig,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> LosslessBenchmark:
    """Time lossless decoding against `generate` of `transformers` and against other libraries.

    Args:
        config: Options of the benchmark.
        command: Command that the user ran, for the provenance.
        progress: Called with a message for each step.

    Returns:
        The record. A slower or unequal variant does not raise an error.

    Raises:
        BenchmarkError: There are too few prompts that fit, or too many threads.
        CorpusError: The corpus cannot be read.
        ModelError: The model cannot be loaded, or the drafter belongs to another one.
        DeviceError: The device is missing or does not support a dtype.
    """
    before = load_average()
    config = replace(config, threads=config.threads or torch.get_num_threads())
    with pinned_threads(config.threads), quiet_transformers():
        run = _Benchmark(config, command, progress or no_progress)
        run.check()
        for dtype in config.dtypes:
            run.measure(dtype)
    return LosslessBenchmark(
        provenance=benchmark_provenance(run.provenance, before),
        settings=config,
        cells=run.cells,
        memory=run.memory,
        peers=run.peers,
        interval=INTERVAL,
    )


class _Benchmark:
    """One run of the benchmark.

    Attributes:
        cells: The cells that were measured.
        memory: The memory of each dtype.
        peers: Other libraries.
        provenance: The origin of the record, known after the first dtype.
    """

    def __init__(
        self, config: LosslessBenchmarkConfig, command: str | None, progress: Callable[[str], None]
    ) -> None:
        self.config, self.command, self.progress = config, command, progress
        self.cells: list[LosslessCell] = []
        self.memory: list[DecodingMemory] = []
        self.provenance: Provenance
        self.prompts: PromptSets
        self.peers: list[Peer] = []
        self._peer_times: dict[tuple[str, str], PeerTimes] = {}

    def check(self) -> None:
        """Load what is needed in each dtype, so that errors come before hours of timing."""
        ends: list[int] = []
        for number, dtype in enumerate(self.config.dtypes):
            if number and self.config.drafter is None and self.config.device == "cpu":
                break
            stack = self._load(dtype)
            path = self.config.drafter
            drafter = None if path is None else load_drafter(path, stack)
            self._chosen(variants_of(stack, drafter, compiled=self.config.compile))
            if not number:
                self.prompts = read_prompts(self.config, stack.tokenizer, stack.max_positions)
                self.provenance = self._provenance(stack)
                ends = sorted(end_tokens(stack))
            del stack
            gc.collect()
        self._time_peers(ends)

    def _load(self, dtype: str) -> DecoderStack:
        self.progress(f"Loading {self.config.model} in {dtype}")
        return load(self.config.model, dtype=dtype, device=self.config.device)

    def _provenance(self, stack: DecoderStack) -> Provenance:
        found = provenance_of(stack, self.prompts, self.command)
        if len(self.config.dtypes) > 1:  # each cell has its own
            found = changed(found, model=changed(found.model, dtype=UNSET))
        return found

    # --- Peers ------------------------------------------------------------------------------

    def _time_peers(self, ends: Sequence[int]) -> None:
        """Time other libraries on the prompts of each kind."""
        config = self.config
        self.peers, file = find_peers(config.model, wanted=config.peers, device=config.device)
        for number, peer in enumerate(self.peers):
            if peer.reason is None and file is not None:
                reason = self._time_peer(peer, file, ends)
                if reason is not None:
                    self.peers[number] = changed(peer, precision=None, reason=reason)

    def _time_peer(self, peer: Peer, file: Path, ends: Sequence[int]) -> str | None:
        for kind, prompts in self.prompts.kinds.items():
            self.progress(f"Timing {peer.name}, {kind}")
            threads = self.config.threads or 1
            task = PeerTask(file, prompts, self.config.new_tokens, ends, threads)
            found = time_peer(peer.name, task)
            if isinstance(found, str):
                return found
            self._peer_times[peer.name, kind] = found
        return None

    def _peer_rows(self, kind: str, reference: LosslessVariant) -> list[LosslessVariant]:
        """Return the times of other libraries on the prompts of a kind."""
        each = [
            seconds / max(1, count)
            for seconds, count in zip(reference.seconds, reference.new_tokens, strict=True)
        ]
        rows = []
        for peer in self.peers:
            times = self._peer_times.get((peer.name, kind))
            if times is not None and peer.reason is None:
                rows.append(
                    timed_row(
                        peer.name,
                        f"{peer.package} {peer.version}, {peer.precision}, in its own process",
                        list(zip(times.seconds, times.cpu_seconds, strict=True)),
                        times.new_tokens,
                        each,
                        self.config.seed,
                    )
                )
        return rows

    # --- Cells ------------------------------------------------------------------------------

    def measure(self, dtype: str) -> None:
        """Time all kinds of prompts and batch sizes in one dtype."""
        isolated = reset_peak_memory()
        stack = self._load(dtype)
        path = self.config.drafter
        drafter = None if path is None else load_drafter(path, stack, network=True)
        variants = self._chosen(variants_of(stack, drafter, compiled=self.config.compile))
        for kind in self.prompts.kinds:
            for size in self.config.batch_sizes:
                self.cells.append(self._cell(stack, variants, kind, size))
                self.progress(_in_short(self.cells[-1]))
        self.memory.append(_memory(stack, dtype, isolated=isolated))
        del variants, drafter, stack
        gc.collect()

    def _chosen(self, variants: Mapping[str, DecodingVariant]) -> dict[str, DecodingVariant]:
        """Return the variants that the configuration names.

        Raises:
            BenchmarkError: There is no variant of a name.
        """
        names = self.config.variants
        unknown = sorted(set(names or ()) - set(variants))
        if unknown:
            raise BenchmarkError(
                f"expected --variants among {', '.join(variants)}, got {', '.join(unknown)}"
            )
        return {
            name: variant
            for name, variant in variants.items()
            if names is None or name in (REFERENCE, *names)
        }

    def _cell(
        self,
        stack: DecoderStack,
        variants: Mapping[str, DecodingVariant],
        kind: str,
        size: int,
    ) -> LosslessCell:
        """Time all variants on the prompts of a kind, in batches of a size."""
        seed, prompts = self.config.seed, self.prompts.kinds[kind]
        dtype = str(stack.dtype).removeprefix("torch.")
        name = f"{dtype}, {kind}, batch {size}"
        self.progress(f"Warming up: {name}")
        batches = self._batches(stack, prompts, size)
        reasons = find_reasons(variants, replace(batches[0], new_tokens=2))
        rounds, failed = time_rounds(
            {name: each for name, each in variants.items() if reasons[name] is None},
            batches,
            seed=seed,
            threads=self.config.threads or 1,
            synchronize=lambda: synchronize(stack.device),
            progress=lambda text: self.progress(f"{text}: {name}"),
        )
        reasons |= failed
        rows = variant_rows(variants, reasons, rounds, batches, end_tokens(stack), seed)
        if size == 1:
            rows += self._peer_rows(kind, rows[list(variants).index(REFERENCE)])
        return LosslessCell(
            dtype=dtype,
            prompts=kind,
            batch_size=size,
            prompt_tokens=statistics.median(map(len, prompts)),
            variants=fastest_first(rows),
            batches=[
                TimedBatch(
                    order=found.order,
                    load_average=found.load,
                    repeated=found.repeated,
                    disturbed=found.disturbed,
                )
                for found in rounds
            ],
        )

    def _batches(
        self, stack: DecoderStack, prompts: Sequence[Sequence[int]], size: int
    ) -> list[PromptBatch]:
        """Return whole batches of prompts, padded on the left."""
        filling = greedy_settings(stack)["pad_token_id"]
        new, capacity = self.config.new_tokens, max(map(len, prompts)) + self.config.new_tokens
        found = []
        for some in _whole(prompts, size):
            longest = max(map(len, some))
            ids = [[filling] * (longest - len(row)) + list(row) for row in some]
            mask = [[0] * (longest - len(row)) + [1] * len(row) for row in some]
            device = stack.device
            found.append(
                PromptBatch(
                    torch.tensor(ids, device=device),
                    torch.tensor(mask, device=device),
                    new,
                    capacity,
                )
            )
        return found


def _in_short(cell: LosslessCell) -> str:
    """Return the speeds of a cell in one line, since the report comes hours later."""
    speeds = [f"{row.name} {row.speedup:.2f}" for row in cell.variants if row.speedup is not None]
    return f"{cell.dtype}, {cell.prompts}, batch {cell.batch_size}: {', '.join(speeds)}"


def _whole(prompts: Sequence[Sequence[int]], size: int) -> Iterator[Sequence[Sequence[int]]]:
    for start in range(0, len(prompts) - size + 1, size):
        yield prompts[start : start + size]


def _memory(stack: DecoderStack, dtype: str, *, isolated: bool) -> DecodingMemory:
    """Return the memory of weights, copies and process."""
    engine = engine_of(stack)
    weights = sum(weight.nbytes for weight in stack.model.parameters())
    peak = None
    with contextlib.suppress(ImportError):  # Windows reports no peak
        peak = peak_memory() / _MEGABYTE
    return DecodingMemory(
        dtype=dtype,
        engine=engine.description,
        obstacle=engine.obstacle,
        weights_mb=weights / _MEGABYTE,
        copied_mb=engine.copied_bytes / _MEGABYTE,
        peak_mb=peak,
        isolated=isolated,
    )
