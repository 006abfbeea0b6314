"""Benchmark of the quick gate, compared with one bare forward pass over the same tokens."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from msgspec import field

from cascade.benchmarks.passes import bare_forward
from cascade.benchmarks.records import BenchmarkRecord, Ratio, Target
from cascade.benchmarks.timing import (
    INTERVAL,
    BenchmarkConfig,
    BenchmarkError,
    check_least,
    ratio_target,
    session,
    target,
)
from cascade.core.provenance import provenance_of
from cascade.core.schema import Count, Finite, Part
from cascade.core.urls import is_url, redacted
from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.long_sequences import LongSequences
from cascade.corpora.readers import EMBEDDED
from cascade.gate.baseline_corpus import GivenCorpus, baseline_blocks
from cascade.gate.baseline_lookup import described, find_baseline
from cascade.gate.baselines import StoredProfile, read_profile
from cascade.gate.comparison import environment_differences
from cascade.gate.long_context_check import LongCheck
from cascade.gate.noise import measure_noise
from cascade.gate.quick_gate import QUICK_TOKENS, quick_blocks, quick_ids, run_gate
from cascade.gate.remote.baselines import RemoteBaselines
from cascade.models.checkpoints.weights import model_name
from cascade.models.loading import load
from cascade.models.stack import DecoderStack

#: Description of each variant, as stored in the record.
VARIANTS = {
    "bare": "one decoder forward pass over the same sequences in one batch, without LM head and "
    "cache",
    "gate": "cascade gate --no-long-context, including its comparison after each step and its "
    "check of decoding; noise floor from the cache",
    "bare_long": "the bare forward pass, and another one over the long sequence",
    "gate_long": "cascade gate, including decoding and one long sequence",
    "noise": "measuring the noise floor of arithmetic; needed once per machine, if the baseline "
    "was made on another one",
}

#: Description of each task that is timed alone, as stored in the record.
ALONE = {
    "compare": "the command `cascade compare` of two complete records, including its start",
    "load": "loading the model from the cache, with torch and transformers already imported",
    "plugin": "importing the plugin in a process that has already imported pytest",
}

_PLUGIN = (
    "import time, pytest, _pytest.config; start = time.perf_counter(); import cascade.plugin; "
    "print(time.perf_counter() - start)"
)


@dataclass(frozen=True)
class GateBenchmarkConfig(BenchmarkConfig):
    """Options of the benchmark of the quick gate.

    Attributes:
        baselines: Folder of all baselines, or its address (default: `baselines` in the current
            folder, then those shipped with the package). The model's baseline on the embedded
            corpus is used.
        tokens: Token budget of the gate. A model without drift uses all of it.

    Raises:
        BenchmarkError: A number is too small.
    """

    baselines: str | None = None
    tokens: int = QUICK_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"tokens": 1})


@dataclass(frozen=True)
class GateBenchmarkSettings(GateBenchmarkConfig):
    """Options of the benchmark, with the values that follow from the baseline.

    Attributes:
        seq_len: Tokens per sequence.
        batch_size: Sequences per forward pass.
        long_tokens: Tokens of the long sequence, 0 if the baseline has none.
    """

    seq_len: int = 0
    batch_size: int = 0
    long_tokens: int = 0


class TimedAlone(Part, frozen=True, kw_only=True):
    """The times of a task that is timed alone, not interleaved with others.

    Attributes:
        what: Description of the task.
        seconds: Seconds of each repetition.
    """

    what: str
    seconds: list[Finite]


class GateBenchmark(BenchmarkRecord, frozen=True, kw_only=True):
    """Record of the benchmark of the quick gate.

    Attributes:
        steps: Numbers of tokens after which the gate compared.
        elsewhere: Differences between the baseline's machine and this one.
        alone: Times of tasks that are timed alone, by name.
    """

    KIND = "bench.gate"
    COMMAND = "bench gate --output"

    kind: Literal["bench.gate"] = "bench.gate"
    settings: GateBenchmarkSettings
    steps: list[Count] = field(name="looks")
    elsewhere: list[str]
    alone: dict[str, TimedAlone]


def benchmark_gate(
    config: GateBenchmarkConfig,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> GateBenchmark:
    """Time the quick gate, one bare forward pass over the same tokens, and related tasks.

    Args:
        config: Options of the benchmark.
        command: Command that the user ran, for the provenance.
        progress: Called with a message for each step.

    Returns:
        The record. A missed target does not raise an error.

    Raises:
        BenchmarkError: The gate did not pass and stopped early, or a process failed.
        RecordError: The baseline is missing, torn or edited.
        ModelError: The model cannot be loaded.
        DeviceError: The device is missing.
    """
    with session(config, progress) as (config, run):
        path = _baseline_path(config, run.progress)
        baseline = read_profile(path)
        run.progress(f"Loading {config.model}")
        stack = load(config.model, device=config.device)
        blocks = _blocks(stack, baseline)
        few = quick_blocks(blocks, baseline, config.tokens)
        _check_shared(few, path, config)
        long = LongCheck.of(stack, blocks, baseline, full=False).sequences
        timings = run.time(
            {
                "bare": lambda: bare_forward(stack, few, len(few.ids)),
                "gate": lambda: run_gate(
                    stack, blocks, baseline, tokens=config.tokens, long_context=False
                ),
                "noise": lambda: measure_noise(stack, quick_ids(few)),
                **_long_variants(stack, blocks, baseline, few, long, config.tokens),
            },
            stack.device,
        )
        gate = timings.results["gate"]
        if long is not None:
            _check_passed(timings.results["gate_long"].comparison.verdict, config)
        _check_passed(gate.comparison.verdict, config)
        alone = time_alone(config, path, run.progress)
    provenance = provenance_of(stack, few, command)
    pairs = [("gate", "bare"), ("noise", "bare")]
    pairs += [] if long is None else [("gate_long", "bare_long")]
    ratios = run.ratios(timings, pairs)
    long_tokens = 0 if long is None else long.ids.size
    settings = asdict(config) | {
        "baselines": None if config.baselines is None else redacted(config.baselines),
        "tokens": few.tokens,
        "seq_len": few.ids.shape[1],
        "batch_size": len(few.ids),
        "long_tokens": long_tokens,
    }
    both = dict.fromkeys(("bare_long", "gate_long"), few.tokens + long_tokens)
    return GateBenchmark(
        provenance=run.provenance(provenance),
        settings=GateBenchmarkSettings(**settings),
        variants=timings.rows(VARIANTS, tokens=few.tokens, others=both),
        order=timings.order,
        ratios=ratios,
        interval=INTERVAL,
        steps=[step.tokens for step in gate.steps],
        elsewhere=environment_differences(provenance, baseline.record().provenance),
        alone=alone,
        targets=gate_targets([ratios[0], *ratios[2:]], alone),
    )


def _long_variants(
    stack: DecoderStack,
    blocks: TokenBlocks,
    baseline: StoredProfile,
    few: TokenBlocks,
    long: LongSequences | None,
    tokens: int,
) -> dict[str, Callable[[], object]]:
    """Return the variants that include the long sequence; none if the baseline has none."""
    if long is None:
        return {}
    whole = replace(few, ids=long.ids)

    def bare() -> None:
        bare_forward(stack, few, len(few.ids))
        bare_forward(stack, whole, 1)

    return {
        "bare_long": bare,
        "gate_long": lambda: run_gate(stack, blocks, baseline, tokens=tokens),
    }


def gate_targets(ratios: Sequence[Ratio], alone: dict[str, TimedAlone]) -> list[Target]:
    """Compare the results with the targets.

    Args:
        ratios: Ratios of a gate's seconds to those of a bare forward pass over the same tokens.
        alone: Times of tasks that are timed alone.
    """
    limits = {"compare": 1.0, "load": 2.0, "plugin": 0.05}
    return [
        *(ratio_target(ratio, "at most", 4.0) for ratio in ratios),
        *(
            target(f"{name}, seconds", "below", limit, float(np.median(alone[name].seconds)))
            for name, limit in limits.items()
        ),
    ]


def _baseline_path(config: GateBenchmarkConfig, progress: Callable[[str], None]) -> Path:
    """Return the path of the baseline, after saying which one it is."""
    place, model = config.baselines, model_name(config.model)
    if place is None or not is_url(place):
        folder = None if place is None else Path(place)
        path = find_baseline(folder, "saturation", model=model, corpus=EMBEDDED)
        progress(f"Baseline: {described(path)}")
        return path
    remote = RemoteBaselines(place)
    remote.read()
    found = find_baseline(remote.folder, "saturation", model=model, corpus=EMBEDDED)
    path = remote.checked(found)
    for note in remote.notes():
        progress(note)
    progress(f"Baseline: {remote.name_of(path)} of {remote.copy.origin.in_words()}")
    return path


def _blocks(stack: DecoderStack, baseline: StoredProfile) -> TokenBlocks:
    about = baseline.record().provenance.corpus
    return baseline_blocks(about, stack.tokenizer, GivenCorpus(source=EMBEDDED))


def _check_shared(few: TokenBlocks, path: Path, config: GateBenchmarkConfig) -> None:
    if not len(few.ids):
        raise BenchmarkError(
            f"expected sequences of {path} in the embedded corpus as {config.model} reads it, "
            "found none; run `cascade gate` to see what differs"
        )


def _check_passed(verdict: str, config: GateBenchmarkConfig) -> None:
    if verdict != "PASS":
        raise BenchmarkError(
            f"expected the gate of {config.model} to pass, got {verdict} before it used its whole "
            "budget, so its time is not comparable; run `cascade gate` to see why"
        )


def time_alone(
    config: GateBenchmarkConfig, path: Path, progress: Callable[[str], None]
) -> dict[str, TimedAlone]:
    """Time tasks around a gate: comparing records, loading the model, importing the plugin.

    Args:
        config: Options of the benchmark.
        path: File of the baseline.
        progress: Called with a message for each task.

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
        seconds()  # warm up the caches of the system
        rows[name] = TimedAlone(what=ALONE[name], seconds=[seconds() for _ in range(config.rounds)])
    return rows


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def run_python(*arguments: str) -> str:
    """Run this Python interpreter with arguments and return its output.

    Raises:
        BenchmarkError: The process failed.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BenchmarkError(
            f"a timed process failed: {reason}; run `python {' '.join(arguments[:3])}` to see why"
        )
    return done.stdout
