"""The benchmark of the quick gate: timed against one bare forward over the same tokens."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from msgspec import field

from cascade.benchmarks.passes import bare_forward
from cascade.benchmarks.records import BenchmarkProvenance, Ratio, Target, VariantTimes
from cascade.benchmarks.timing import (
    INTERVAL,
    BenchmarkError,
    check_least,
    ratio_target,
    session,
    target,
)
from cascade.core.provenance import provenance_of
from cascade.core.schema import Count, Finite, Part, StoredRecord, known
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.gate.baselines import StoredProfile, baseline_paths, read_profile
from cascade.gate.comparison import environment_differences
from cascade.gate.noise import measure_noise
from cascade.gate.quick_gate import QUICK_TOKENS, quick_blocks, quick_ids, run_gate
from cascade.models.loading import load
from cascade.models.stack import DecoderStack

#: What each variant does, in the record's words.
VARIANTS = {
    "bare": "one decoder forward over the same sequences in one batch, without LM head and cache",
    "gate": "cascade gate, its look after each batch included; the noise floor from the cache",
    "noise": "the noise floor of arithmetic, measured: once per machine, where the baseline is not "
    "of it",
}

#: What is timed alone, in the record's words.
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
class GateBenchmarkConfig:
    """What is measured.

    Attributes:
        model: Anything that `models.load` takes.
        baselines: The folder of all baselines; the model's own on the embedded corpus is taken.
        tokens: The gate's budget, all of which a clean model takes.
        rounds: Timed passes per variant, and repetitions of what is timed alone.
        threads: Threads that torch computes with; None leaves the number as it is.
        seed: Draws the order of the variants and the bootstrap's resamples.
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


@dataclass(frozen=True)
class GateBenchmarkSettings(GateBenchmarkConfig):
    """What was measured.

    Attributes:
        seq_len: Tokens per sequence.
        batch_size: Sequences per forward pass.
    """

    seq_len: int = 0
    batch_size: int = 0


class TimedAlone(Part, frozen=True, kw_only=True):
    """The times of something that is timed alone, not interleaved with others.

    Attributes:
        what: What it is.
        seconds: One per repetition.
    """

    what: str
    seconds: list[Finite]


class GateBenchmark(StoredRecord, frozen=True, kw_only=True):
    """The record of the benchmark of the quick gate.

    Attributes:
        steps: The tokens after which the gate compared.
        elsewhere: How the baseline's machine differs from this one.
        alone: What is timed alone, by name.
    """

    KIND = "bench.gate"
    COMMAND = "bench gate --output"

    schema: int = 1
    kind: Literal["bench.gate"] = "bench.gate"
    provenance: BenchmarkProvenance
    settings: GateBenchmarkSettings
    variants: dict[str, VariantTimes] = field(name="ways")
    order: list[list[str]]
    ratios: list[Ratio]
    interval: str
    steps: list[Count] = field(name="looks")
    elsewhere: list[str]
    alone: dict[str, TimedAlone]
    targets: list[Target]


def benchmark_gate(
    config: GateBenchmarkConfig,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> GateBenchmark:
    """Time the quick gate and one bare forward over the same tokens, and what surrounds it.

    Args:
        config: What to measure.
        command: What the user ran, for the provenance.
        progress: Called with a message for each step.

    Returns:
        The record; a missed target does not raise.

    Raises:
        BenchmarkError: The gate did not pass, so that it stopped early, or a process failed.
        RecordError: The baseline is missing, torn or edited.
        ModelError: The model cannot be loaded.
        DeviceError: The device is absent.
    """
    with session(config, progress) as (config, run):
        run.progress(f"Loading {config.model}")
        stack = load(config.model, device=config.device)
        path = _baseline_path(stack, config)
        baseline = read_profile(path)
        blocks = _blocks(stack, baseline)
        few = quick_blocks(blocks, baseline, config.tokens)
        timings = run.time(
            {
                "bare": lambda: bare_forward(stack, few, len(few.ids)),
                "gate": lambda: run_gate(stack, blocks, baseline, tokens=config.tokens),
                "noise": lambda: measure_noise(stack, quick_ids(few)),
            },
            stack.device,
        )
        gate = timings.results["gate"]
        _check_passed(gate.comparison.verdict, config)
        alone = time_alone(config, path, run.progress)
    provenance = provenance_of(stack, few, command)
    ratios = run.ratios(timings, [("gate", "bare"), ("noise", "bare")])
    settings = asdict(config) | {
        "tokens": few.tokens,
        "seq_len": few.ids.shape[1],
        "batch_size": len(few.ids),
    }
    return GateBenchmark(
        provenance=run.provenance(provenance),
        settings=GateBenchmarkSettings(**settings),
        variants=timings.rows(VARIANTS, tokens=few.tokens),
        order=timings.order,
        ratios=ratios,
        interval=INTERVAL,
        steps=[step.tokens for step in gate.steps],
        elsewhere=environment_differences(provenance, baseline.record().provenance),
        alone=alone,
        targets=gate_targets(ratios[0], alone),
    )


def gate_targets(ratio: Ratio, alone: dict[str, TimedAlone]) -> list[Target]:
    """Compare what was measured with what is promised.

    Args:
        ratio: The gate's seconds over those of the bare forward.
        alone: What is timed alone.
    """
    limits = {"compare": 1.0, "load": 2.0, "plugin": 0.05}
    return [
        ratio_target(ratio, "at most", 2.0),
        *(
            target(f"{name}, seconds", "below", limit, float(np.median(alone[name].seconds)))
            for name, limit in limits.items()
        ),
    ]


def _baseline_path(stack: DecoderStack, config: GateBenchmarkConfig) -> Path:
    model = known(stack.provenance.name)
    return baseline_paths(Path(config.baselines), "saturation", model=model, corpus=EMBEDDED)[0]


def _blocks(stack: DecoderStack, baseline: StoredProfile) -> TokenBlocks:
    corpus = baseline.record().provenance.corpus
    return load_blocks(
        EMBEDDED, stack.tokenizer, seq_len=corpus.seq_len, num_samples=corpus.records
    )


def _check_passed(verdict: str, config: GateBenchmarkConfig) -> None:
    if verdict != "PASS":
        raise BenchmarkError(
            f"the gate of {config.model} says {verdict}, and stopped before its budget: its time "
            "says nothing; see why with `cascade gate`"
        )


def time_alone(
    config: GateBenchmarkConfig, path: Path, progress: Callable[[str], None]
) -> dict[str, TimedAlone]:
    """Time what surrounds a gate: comparing records, loading the model, importing the plugin.

    Args:
        config: What to measure.
        path: The baseline's file.
        progress: Called with a message for each.

    Raises:
        BenchmarkError: A process failed.
    """
    arguments = ("-m", "cascade", "compare", str(path), str(path))
    timed: dict[str, Callable[[], float]] = {
        "compare": lambda: _seconds(lambda: run_python(*arguments)),
        "load": lambda: _seconds(lambda: load(config.model, device=config.device)),
        "plugin": lambda: float(run_python("-c", _PLUGIN)),
    }
    rows = {}
    for name, seconds in timed.items():
        progress(f"Timing {name}")
        seconds()  # warms the system's caches up
        rows[name] = TimedAlone(what=ALONE[name], seconds=[seconds() for _ in range(config.rounds)])
    return rows


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def run_python(*arguments: str) -> str:
    """Run this Python with arguments and return what it prints.

    Raises:
        BenchmarkError: The process failed.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BenchmarkError(f"a timed process failed: {reason}")
    return done.stdout
