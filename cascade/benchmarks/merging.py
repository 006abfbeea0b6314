"""Benchmark of merging: simulated shards with known statistics, merged in a fresh process.

No model runs. Rows are drawn at random, by the number of their batch, so that any of them can be
drawn again. Every token has one of a few similarities that its sequence and layer decide, so that
the statistics of all tokens are known without merging.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from msgspec import structs

from cascade.benchmarks.memory import peak_memory
from cascade.benchmarks.records import Target
from cascade.benchmarks.timing import BenchmarkError, no_progress, target
from cascade.core.arrays import Array
from cascade.core.files import files_below
from cascade.core.provenance import (
    CorpusProvenance,
    MachineProvenance,
    ModelProvenance,
    Provenance,
    library_versions,
    machine_of,
)
from cascade.core.records import arrays_hash, packed, to_file
from cascade.core.schema import Count, Finite, Part, StoredRecord, from_plain, to_plain
from cascade.corpora.streaming import ID_BYTES
from cascade.gate.baselines import read_profile
from cascade.gate.drift import compare
from cascade.shards.merging import merge
from cascade.shards.plan import Plan
from cascade.shards.records import PlannedShard, PlanRecord, ShardRecord
from cascade.shards.shard_files import write_shard
from cascade.stats.sequence_rows import QUANTILES, SequenceRows
from cascade.stats.token_statistics import TokenStatistics, bin_index, exact_sums

#: Sequences of a batch, whose rows are drawn together.
_BATCH = 32

#: The similarities of tokens, of which each sequence and layer has one.
_VALUES = np.linspace(-0.2, 0.999, 97)

#: Sequences that the simulated gate compares, as the quick gate does.
_COMPARED = 4


@dataclass(frozen=True)
class MergingBenchmarkConfig:
    """Options of the benchmark of merging.

    Attributes:
        rows: Numbers of rows, one for each sequence and layer, that are merged one after another.
        shards: Number of shards.
        layers: Number of layers.
        seq_len: Tokens per sequence.

    Raises:
        BenchmarkError: A number is too small.
    """

    rows: tuple[int, ...] = (1_000_000,)
    shards: int = 1000
    layers: int = 31
    seq_len: int = 128

    def __post_init__(self) -> None:
        least = self.shards * _BATCH * self.layers
        for rows in self.rows:
            if rows < least:
                raise BenchmarkError(
                    f"expected at least {least:,} rows, a batch of {_BATCH} sequences for each of "
                    f"{self.shards:,} shards, got {rows:,}; use more rows or fewer shards"
                )

    def sequences(self, rows: int) -> int:
        """Return the number of sequences that have so many rows, rounded up."""
        return -(-rows // self.layers)


class ProcessUsage(Part, frozen=True, kw_only=True):
    """What one step took, in a fresh process.

    Attributes:
        seconds: Seconds of the step, without starting Python.
        cpu_seconds: Its seconds of processor time.
        peak_mb: Peak resident memory of the process, in MB.
    """

    seconds: Finite
    cpu_seconds: Finite
    peak_mb: Finite


class MergedSize(Part, frozen=True, kw_only=True):
    """The measurement of one number of rows.

    Attributes:
        rows: Rows: one for each sequence and layer.
        sequences: Sequences.
        tokens: Tokens that they stand for.
        shard_bytes: Bytes of all shards on disk.
        merged_bytes: Bytes of the merged profile on disk.
        merging: Merging all shards, with all checks.
        gate: Reading the merged profile and comparing a few sequences, as the quick gate does.
        writing_seconds: Seconds of drawing and writing the shards.
        equal: Whether statistics and rows are those that were known before.
    """

    rows: Count
    sequences: Count
    tokens: Count
    shard_bytes: Count
    merged_bytes: Count
    merging: ProcessUsage
    gate: ProcessUsage
    writing_seconds: Finite
    equal: bool


class MergingBenchmark(StoredRecord, frozen=True, kw_only=True):
    """Record of the benchmark of merging.

    Attributes:
        settings: Options.
        machine: The machine.
        versions: Versions of Python and libraries.
        command: The command that the user ran.
        sizes: One measurement for each number of rows.
        targets: Targets of the largest one.
    """

    KIND: ClassVar[str] = "bench.merge"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "bench merge --output"

    schema: int = 1
    kind: Literal["bench.merge"] = "bench.merge"
    settings: MergingBenchmarkConfig
    machine: MachineProvenance
    versions: dict[str, str]
    command: str | None
    sizes: list[MergedSize]
    targets: list[Target]


def benchmark_merging(
    config: MergingBenchmarkConfig,
    *,
    folder: Path | None = None,
    command: str | None = None,
    progress: Callable[[str], None] = no_progress,
) -> MergingBenchmark:
    """Merge simulated shards and check that the result is the known one.

    Args:
        config: Options.
        folder: A folder with space for the shards and the merged profile (default: the system's
            folder for temporary files).
        command: The command that the user ran, for the record.
        progress: Called with a message for each step.

    Raises:
        BenchmarkError: A process failed.

    Example:
        >>> config = MergingBenchmarkConfig(rows=(256,), shards=2, layers=4)
        >>> benchmark_merging(config).sizes[0].equal
        True
    """
    sizes = []
    for rows in config.rows:
        with tempfile.TemporaryDirectory(dir=folder, prefix="cascade-merge-") as place:
            sizes.append(_measured(config, rows, Path(place), progress))
    largest = max(sizes, key=lambda size: size.rows)
    return MergingBenchmark(
        settings=config,
        machine=machine_of(torch.device("cpu")),
        versions=library_versions(("pyarrow",)),
        command=command,
        sizes=sizes,
        targets=[
            target("peak MB of merging", "at most", 2000.0, largest.merging.peak_mb),
            target("seconds of the gate", "at most", 10.0, largest.gate.seconds),
        ],
    )


def _measured(
    config: MergingBenchmarkConfig, rows: int, place: Path, progress: Callable[[str], None]
) -> MergedSize:
    progress(f"Writing {config.shards:,} shards of {rows:,} rows")
    start = time.perf_counter()
    plan = simulated_plan(config, rows, place / "plan")
    for shard in plan.record.shards:
        write_simulated(plan, shard)
    writing = time.perf_counter() - start
    shards = _size(plan.folder / "shards")
    progress(f"Merging {rows:,} rows")
    merging = _in_fresh_process("merge", plan.folder, place / "run")
    progress("Checking the result")
    equal = is_known(plan, place / "run")
    gate = _in_fresh_process("gate", place / "run", place / "run")
    sequences = config.sequences(rows)
    return MergedSize(
        rows=sequences * config.layers,
        sequences=sequences,
        tokens=sequences * config.seq_len,
        shard_bytes=shards,
        merged_bytes=_size(place / "run"),
        merging=merging,
        gate=gate,
        writing_seconds=round(writing, 3),
        equal=equal,
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_below(folder))


# --- Simulating ------------------------------------------------------------------------------


def simulated_plan(config: MergingBenchmarkConfig, rows: int, folder: Path) -> Plan:
    """Write a plan without a model, whose token ids take no space on disk, and return it.

    Args:
        config: Options.
        rows: Number of rows.
        folder: A new folder.
    """
    sequences, count = config.sequences(rows), config.shards
    batches = -(-sequences // _BATCH)
    borders = [min(number * batches // count * _BATCH, sequences) for number in range(count + 1)]
    layers = [str(number) for number in range(1, config.layers)] + [f"{config.layers - 1}+norm"]
    edges = np.tile(bin_index(np.array([0.2, 0.6, 0.9])), (config.layers, 1))
    state = {"edges": edges}
    record = PlanRecord(
        provenance=Provenance(
            model=ModelProvenance(family="simulated", name="simulated", dtype="float32"),
            corpus=CorpusProvenance(
                source="simulated",
                name="simulated",
                fingerprint="sha256:0",
                records=sequences,
                tokens=sequences * config.seq_len,
                sequences=sequences,
                seq_len=config.seq_len,
            ),
            machine=machine_of(torch.device("cpu")),
            versions=library_versions(),
        ),
        batch_size=_BATCH,
        weights_hash="simulated",
        layers=layers,
        shards=[
            PlannedShard(
                number=number, first=borders[number], end=borders[number + 1], tokens_hash="none"
            )
            for number in range(count)
        ],
        noise=None,
        arrays_hash=arrays_hash(state),
    )
    folder.mkdir(parents=True)
    with (folder / "tokens.bin").open("wb") as file:
        file.truncate(sequences * config.seq_len * ID_BYTES)
    (folder / "plan.npz").write_bytes(packed(state))
    (folder / "plan.json").write_text(to_file(record), encoding="utf-8")
    return Plan.read(folder)


def write_simulated(plan: Plan, shard: PlannedShard) -> None:
    """Write a simulated shard.

    Args:
        plan: The plan.
        shard: The shard.
    """
    about = plan.record.provenance
    rows = simulated_rows(shard.sequences, len(plan.record.layers))
    record = ShardRecord(
        plan_hash=plan.hash,
        number=shard.number,
        first=shard.first,
        end=shard.end,
        device="cpu",
        attention=None,
        machine=machine_of(torch.device("cpu")),
        versions=to_plain(about.versions),
        seconds=0.0,
        arrays_hash="",
    )
    tokens = known_tokens(plan, shard.sequences)
    write_shard(plan, record, tokens, rows, fingerprints(rows.numbers))


def fingerprints(numbers: Array) -> Array:
    """Return a distinct fingerprint for each sequence number."""
    return numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def simulated_rows(sequences: range, layers: int) -> SequenceRows:
    """Return the rows of some sequences, which their numbers decide.

    Args:
        sequences: The numbers of the sequences.
        layers: The number of layers.
    """
    first, last = sequences.start // _BATCH, (sequences.stop - 1) // _BATCH
    parts = [_batch(number, layers) for number in range(first, last + 1)]
    rows = SequenceRows.joined(parts)
    return rows.read(np.asarray(sequences) - first * _BATCH)


def _batch(number: int, layers: int) -> SequenceRows:
    """Return the rows of a batch: as varied as those of a model, which decides their size."""
    draw = np.random.Generator(np.random.Philox(key=number))
    mean = np.clip(0.95 + 0.02 * draw.standard_normal((_BATCH, layers)), -1, 1)
    square = mean**2 + 1e-4 * draw.random((_BATCH, layers))
    drawn = 3 * draw.standard_normal((_BATCH, layers, len(QUANTILES)))
    share = np.clip(np.rint(128 * np.array(QUANTILES) + drawn), 0, 128) / 128
    return SequenceRows(np.arange(_BATCH) + number * _BATCH, mean, square, share)


def known_tokens(plan: Plan, sequences: range) -> TokenStatistics:
    """Return the statistics of the tokens of some sequences, counted without visiting them.

    All tokens of sequence n have the similarity number (n + row) modulo 97 in a layer's row.

    Args:
        plan: The plan.
        sequences: The numbers of the sequences.
    """
    layers, length = len(plan.record.layers), plan.record.provenance.corpus.seq_len
    found = TokenStatistics(plan.record.layers, plan.edges)
    count = len(_VALUES)
    whole, rest = divmod(len(sequences), count)
    times = np.full((layers, count), whole)
    for row in range(layers):
        times[row, (sequences.start + row + np.arange(rest)) % count] += 1
    times *= length
    seen = times > 0
    found.count = len(sequences) * length
    for name, values in (("total", _VALUES), ("square_total", _VALUES**2)):
        units = [int(unit) for unit in exact_sums(values[:, None])]
        sums = [sum(int(n) * unit for n, unit in zip(row, units, strict=True)) for row in times]
        setattr(found, name, sums)
    found.minimum = np.where(seen, _VALUES, np.inf).min(axis=1)
    found.maximum = np.where(seen, _VALUES, -np.inf).max(axis=1)
    found.negative = times[:, _VALUES < 0].sum(axis=1)
    found.below_half = times[:, _VALUES < 0.5].sum(axis=1)
    for value, place in enumerate(bin_index(_VALUES)):
        found.histogram[:, place] += times[:, value]
    return found


def is_known(plan: Plan, run: Path) -> bool:
    """Return whether a merged profile has the known statistics and the known rows.

    The statistics are compared as a whole, and the rows of every hundredth batch.

    Args:
        plan: The simulated plan.
        run: The folder of the merged profile.
    """
    profile = read_profile(run)
    about = plan.record.provenance.corpus
    known = known_tokens(plan, range(about.sequences)).token_arrays()
    state = profile.arrays()
    same = all(np.array_equal(state[name], values) for name, values in known.items())
    numbers = np.arange(about.sequences)
    same = same and np.array_equal(state["sequence_fingerprint"], fingerprints(numbers))
    for start in range(0, about.sequences, 100 * _BATCH):
        some = range(start, min(start + _BATCH, about.sequences))
        expected = simulated_rows(some, len(plan.record.layers))
        found = profile.rows.read(np.asarray(some))
        same = same and np.array_equal(found.statistics(), expected.statistics())
    return same and len(profile.rows) == about.sequences


# --- Measuring -------------------------------------------------------------------------------


def _in_fresh_process(step: str, source: Path, run: Path) -> ProcessUsage:
    done = subprocess.run(
        [sys.executable, "-m", __name__, step, str(source), str(run)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BenchmarkError(f"the step {step} failed: {reason}; free some memory or disk space")
    return from_plain(json.loads(done.stdout.splitlines()[-1]), ProcessUsage)


def _gate(run: Path) -> None:
    """Compare a few sequences with a baseline, as the quick gate does after measuring them."""
    baseline = read_profile(run)
    state = baseline.arrays()
    places = np.linspace(0, len(baseline.rows) - 1, _COMPARED).round().astype(int)
    rows = replace(baseline.rows.read(places), numbers=np.arange(_COMPARED))
    prints = {"sequence_fingerprint": state["sequence_fingerprint"][places]}
    new = replace(baseline, state=state | prints, rows=rows)
    if compare(new, baseline).verdict != "PASS":
        raise BenchmarkError("expected equal rows to pass; run the tests of the gate")


def _main(step: str, source: str, run: str) -> None:
    """Run one step in this process and print what it took."""
    start, cpu = time.perf_counter(), time.process_time()
    if step == "merge":
        merge(source, run)
    else:
        _gate(Path(run))
    usage = ProcessUsage(
        seconds=round(time.perf_counter() - start, 3),
        cpu_seconds=round(time.process_time() - cpu, 3),
        peak_mb=round(peak_memory() / 1e6, 1),
    )
    print(json.dumps(structs.asdict(usage), allow_nan=False))


if __name__ == "__main__":
    _arguments: Sequence[str] = sys.argv[1:]
    _main(*_arguments)
