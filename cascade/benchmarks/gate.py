"""The quick gate, timed against one bare forward over the same tokens: a record `bench.gate`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cascade.benchmarks.collect import bare_forward
from cascade.benchmarks.timing import (
    INTERVAL,
    BenchmarkError,
    Record,
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
from cascade.core.provenance import provenance_of, typed_provenance
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.gate.baselines import StoredProfile, baseline_paths, read_profile
from cascade.gate.comparison import made_elsewhere
from cascade.gate.noise import measure_noise
from cascade.gate.quick_gate import QUICK_TOKENS, quick_blocks, quick_ids, run_gate
from cascade.models.loading import load
from cascade.models.stack import DecoderStack

#: The kind of the record.
KIND = "bench.gate"

#: What each way does, in the record's words.
WAYS = {
    "bare": "one decoder forward over the same sequences in one batch, without LM head and cache",
    "gate": "cascade gate, its look after each batch included; the noise floor from the cache",
    "noise": "the noise floor of arithmetic, measured: once per machine, where the baseline is not "
    "of it",
}

#: What is timed by itself, in the record's words.
ALONE = {
    "compare": "the command `cascade compare` of two whole records, its start included",
    "load": "the model from the cache, with torch and transformers imported",
    "plugin": "import of the plugin in a process that has pytest imported",
}

_PLUGIN = (
    "import time, pytest, _pytest.config; start = time.perf_counter(); import cascade.plugin; "
    "print(time.perf_counter() - start)"
)


@dataclass(frozen=True)
class GateSetup:
    """What is measured.

    Attributes:
        model: Anything that `models.load` takes.
        baselines: The folder of all baselines; the model's own on the embedded corpus is taken.
        tokens: The gate's budget, all of which a clean model takes.
        rounds: Timed passes per way, and repetitions of what is timed by itself.
        threads: Threads that torch computes with; None leaves the number as it is.
        seed: Draws the order of the ways and the bootstrap's resamples.
        device: "cpu", "cuda", "mps" or "auto".

    Raises:
        BenchmarkError: A number is too small.
    """

    model: str = "smollm2-135m"
    baselines: str = "baselines"
    tokens: int = QUICK_TOKENS
    rounds: int = 7
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_least(self, {"tokens": 1, "rounds": 2, "threads": 1, "seed": 0})


def gate(
    setup: GateSetup,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Record:
    """Time the quick gate and one bare forward over the same tokens, and what surrounds it.

    Args:
        setup: What to measure.
        command: What the user ran, for the provenance.
        progress: Told what is being done.

    Returns:
        A record of kind `bench.gate`; a missed target does not raise.

    Raises:
        BenchmarkError: The gate did not pass, so that it stopped early, or a process failed.
        RecordError: The baseline is missing, torn or edited.
        ModelError: The model cannot be loaded.
        DeviceError: The device is absent.
    """
    tell = progress or (lambda _: None)
    load_before = load_average()
    setup = replace(setup, threads=setup.threads or torch.get_num_threads())
    with pinned_threads(setup.threads):
        tell(f"Loading {setup.model}")
        stack = load(setup.model, device=setup.device)
        path = _baseline_path(stack, setup)
        baseline = read_profile(path)
        blocks = _blocks(stack, baseline)
        few = quick_blocks(blocks, baseline, setup.tokens)
        first, order, seconds = time_ways(
            {
                "bare": lambda: bare_forward(stack, few, len(few.ids)),
                "gate": lambda: run_gate(stack, blocks, baseline, tokens=setup.tokens),
                "noise": lambda: measure_noise(stack, quick_ids(few)),
            },
            rounds=setup.rounds,
            seed=setup.seed,
            synchronize=lambda: synchronize(stack.device),
            progress=tell,
        )
        _check_passed(first["gate"].comparison.verdict, setup)
        alone = _alone(setup, path, tell)
    about = provenance_of(stack, few, command)
    ratios = ratio_rows(seconds, [("gate", "bare"), ("noise", "bare")], seed=setup.seed)
    medians = {name: float(np.median(row["seconds"])) for name, row in alone.items()}
    return {
        "schema": 1,
        "kind": KIND,
        "provenance": machine_provenance(about, load_before),
        "settings": asdict(setup)
        | {"tokens": few.tokens, "seq_len": few.ids.shape[1], "batch_size": len(few.ids)},
        "ways": way_rows(seconds, WAYS, tokens=few.tokens),
        "order": order,
        "ratios": ratios,
        "interval": INTERVAL,
        "looks": [step.tokens for step in first["gate"].steps],
        "elsewhere": made_elsewhere(typed_provenance(about), baseline.record().provenance),
        "alone": alone,
        "targets": [
            target_row("gate/bare", "at most", 2.0, ratios[0]["median"], ratios[0]["interval"]),
            target_row("compare, seconds", "below", 1.0, medians["compare"]),
            target_row("load, seconds", "below", 2.0, medians["load"]),
            target_row("plugin, seconds", "below", 0.05, medians["plugin"]),
        ],
    }


def _baseline_path(stack: DecoderStack, setup: GateSetup) -> Path:
    model = stack.provenance.get("name")
    return baseline_paths(Path(setup.baselines), "saturation", model=model, corpus=EMBEDDED)[0]


def _blocks(stack: DecoderStack, baseline: StoredProfile) -> TokenBlocks:
    corpus = baseline.record().provenance.corpus
    return load_blocks(
        EMBEDDED, stack.tokenizer, seq_len=corpus.seq_len, num_samples=corpus.records
    )


def _check_passed(verdict: str, setup: GateSetup) -> None:
    if verdict != "PASS":
        raise BenchmarkError(
            f"the gate of {setup.model} says {verdict}, and stopped before its budget: its time "
            "says nothing; see why with `cascade gate`"
        )


def _alone(setup: GateSetup, path: Path, tell: Callable[[str], None]) -> Record:
    """Return what is timed by itself: seconds of every repetition."""
    given = ("-m", "cascade", "compare", str(path), str(path))
    ways: dict[str, Callable[[], float]] = {
        "compare": lambda: _timed(lambda: _python(*given)),
        "load": lambda: _timed(lambda: load(setup.model, device=setup.device)),
        "plugin": lambda: float(_python("-c", _PLUGIN)),
    }
    rows = {}
    for name, way in ways.items():
        tell(f"Timing {name}")
        way()  # warms the system's caches up
        rows[name] = {"what": ALONE[name], "seconds": [way() for _ in range(setup.rounds)]}
    return rows


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BenchmarkError(f"a timed process failed: {reason}")
    return done.stdout
