"""`cascade bench ...`: commands that measure speed and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cascade.cli.app import bench, command
from cascade.cli.console import command_line
from cascade.cli.inputs import read_layers
from cascade.cli.options import Behind, Device, Model
from cascade.cli.output import run_folder, show, write_json

if TYPE_CHECKING:
    from cascade.benchmarks.collection import CollectionBenchmark
    from cascade.benchmarks.decoding import DecodingBenchmark
    from cascade.benchmarks.gate import GateBenchmark
    from cascade.benchmarks.hard_tokens import HardTokenBenchmark
    from cascade.benchmarks.head_fitting import HeadFittingBenchmark
    from cascade.report.common.sections import Report

R = TypeVar("R")

_FILE = "bench.json"

Rounds = Annotated[int, typer.Option(help="Timed passes per way.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per sequence.")]
BatchSize = Annotated[int, typer.Option(help="Sequences per forward pass.")]
RepeatedTokens = Annotated[
    int, typer.Option(help="Tokens per pass; the embedded corpus is repeated as needed.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="Threads to compute with; as torch has it without."),
]
Seed = Annotated[int, typer.Option("--seed", help="Draws the order of the ways in every round.")]


@dataclass(frozen=True)
class BenchmarkOutput:
    """Where the record of a benchmark goes."""

    output: Annotated[Path | None, typer.Option("--output", help="Folder for bench.json.")] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of an earlier run.")
    ] = False


def _run(
    measure: Callable[[str, Callable[[str], None]], R],
    draw: Callable[[R], Report],
    output: BenchmarkOutput,
) -> None:
    """Measure, write the record where one is wanted, and print it.

    Args:
        measure: Called with the command line and a callback for progress messages.
        draw: Returns the record's report.
        output: Where the record goes; checked before anything is measured.
    """
    with run_folder(output.output, [_FILE], overwrite=output.overwrite) as folder:
        record = measure(command_line(), lambda text: typer.echo(text, err=True))
        write_json(folder, _FILE, record)
    show(draw(record), output.output, _FILE)


@dataclass(frozen=True)
class CollectionOptions:
    """What the benchmark of collecting measures."""

    model: Model = "smollm2-135m"
    tokens: Annotated[int, typer.Option(help="Tokens per pass over the embedded corpus.")] = 4096
    seq_len: SeqLen = 128
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass, all ways.")] = 32
    rounds: Rounds = 7
    threads: Threads = None
    seed: Seed = 0
    device: Device = "cpu"


@command("collect", group=bench, order=())
def bench_collect(
    options: CollectionOptions,
    output: BenchmarkOutput,
    memory: Annotated[
        bool,
        typer.Option(help="Measure peak memory too, in processes of their own."),
        Behind("device"),
    ] = True,
) -> None:
    """Time the ways to collect similarities: the seed's, the bare decoder's, analyze, a peer's.

    One process, rounds interleaved in random order. A missed target is
    printed and recorded; it does not fail the command.
    """
    from cascade.report.benchmarks.collection import collection_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> CollectionBenchmark:
        from cascade.benchmarks.collection import CollectionBenchmarkConfig, benchmark_collection

        config = CollectionBenchmarkConfig(**dataclasses.asdict(options))
        return benchmark_collection(config, memory=memory, command=line, progress=progress)

    _run(measure, collection_benchmark_report, output)


@dataclass(frozen=True)
class DecodingOptions:
    """What the benchmark of decoding measures."""

    model: Model = "smollm2-135m"
    dtype: Annotated[str, typer.Option(help="Arithmetic: float32 or bfloat16.")] = "float32"
    prompts: Annotated[int, typer.Option(help="Prompts that every way continues.")] = 2
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 64
    new_tokens: Annotated[int, typer.Option(help="Tokens added to each.")] = 24
    batch_size: Annotated[int, typer.Option(help="Prompts continued together.")] = 1
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 5
    layer: Annotated[int | None, typer.Option(help="Exit layer; the heads', or 24, without.")] = (
        None
    )
    rule: Annotated[str, typer.Option(help="Exit rule: cosine, top2_gap, ...")] = "cosine"
    threshold: Annotated[
        float | None, typer.Option(help="Tokens at or above it leave; fitted without.")
    ] = None
    hard_ratio: Annotated[
        float, typer.Option(help="Share of hard tokens that a threshold is fitted to.")
    ] = 0.5
    heads: Annotated[
        Path | None, typer.Option(help="Heads of `cascade fit-heads`; fitted without.")
    ] = None
    scoring: Annotated[bool, typer.Option(help="Time the scoring of skipped tokens too.")] = True
    threads: Threads = None
    seed: Seed = 0
    device: Device = "cpu"


@command("decode", group=bench, order=())
def bench_decode(options: DecodingOptions, output: BenchmarkOutput) -> None:
    """Time the ways to decode: transformers' generate, ours in full, and with early exits.

    One process, rounds interleaved in random order, on held-out text. A
    missed target is printed and recorded; it does not fail the command.
    """
    from cascade.report.benchmarks.decoding import decoding_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> DecodingBenchmark:
        from cascade.benchmarks.decoding import DecodingBenchmarkConfig, benchmark_decoding

        heads = None if options.heads is None else str(options.heads)
        config = DecodingBenchmarkConfig(**dataclasses.asdict(options) | {"heads": heads})
        return benchmark_decoding(config, command=line, progress=progress)

    _run(measure, decoding_benchmark_report, output)


@dataclass(frozen=True)
class HeadFittingOptions:
    """What the benchmark of fitting heads measures."""

    model: Model = "smollm2-135m"
    layers: Annotated[str, typer.Option(help="Exit layers, e.g. 20,24,28.")] = "20,24,26,28,29"
    tokens: RepeatedTokens = 16384
    seq_len: SeqLen = 128
    batch_size: BatchSize = 32
    rounds: Rounds = 3
    threads: Threads = None
    seed: Seed = 0
    device: Device = "cpu"


@command("fit", group=bench, order=())
def bench_fit(options: HeadFittingOptions, output: BenchmarkOutput) -> None:
    """Time fitting exit heads against the bare forward pass over the same tokens.

    One process, rounds interleaved in random order. A missed target is
    printed and recorded; it does not fail the command.
    """
    from cascade.report.benchmarks.collection import head_fitting_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> HeadFittingBenchmark:
        from cascade.benchmarks.head_fitting import (
            HeadFittingBenchmarkConfig,
            benchmark_head_fitting,
        )

        layers = read_layers(options.layers)
        config = HeadFittingBenchmarkConfig(**dataclasses.asdict(options) | {"layers": layers})
        return benchmark_head_fitting(config, command=line, progress=progress)

    _run(measure, head_fitting_benchmark_report, output)


@dataclass(frozen=True)
class HardTokenOptions:
    """What the benchmark of collecting hard tokens measures."""

    model: Model = "smollm2-135m"
    layer: Annotated[int | None, typer.Option(help="Exit layer; the last but one without.")] = None
    tokens: RepeatedTokens = 20480
    seq_len: SeqLen = 128
    batch_size: BatchSize = 32
    rounds: Rounds = 5
    threads: Threads = None
    seed: Seed = 0
    device: Device = "cpu"


@command("collect-hard", group=bench, order=())
def bench_collect_hard(options: HardTokenOptions, output: BenchmarkOutput) -> None:
    """Time collecting hard tokens against the bare forward pass over the same batches.

    One process, rounds interleaved in random order. A missed target is
    printed and recorded; it does not fail the command.
    """
    from cascade.report.benchmarks.collection import hard_token_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> HardTokenBenchmark:
        from cascade.benchmarks.hard_tokens import HardTokenBenchmarkConfig, benchmark_hard_tokens

        config = HardTokenBenchmarkConfig(**dataclasses.asdict(options))
        return benchmark_hard_tokens(config, command=line, progress=progress)

    _run(measure, hard_token_benchmark_report, output)


@dataclass(frozen=True)
class GateOptions:
    """What the benchmark of the gate measures."""

    model: Model = "smollm2-135m"
    baselines: Annotated[Path, typer.Option(help="The folder of all baselines.")] = Path(
        "baselines"
    )
    tokens: Annotated[int, typer.Option(help="The budget of the quick gate.")] = 512
    rounds: Rounds = 7
    threads: Threads = None
    seed: Seed = 0
    device: Device = "cpu"


@command("gate", group=bench, order=())
def bench_gate(options: GateOptions, output: BenchmarkOutput) -> None:
    """Time the quick gate against one bare forward over the same tokens.

    One process, rounds interleaved in random order; comparing records,
    loading the model and importing the plugin are timed by themselves. A
    missed target is printed and recorded; it does not fail the command.
    """
    from cascade.report.benchmarks.gate import gate_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> GateBenchmark:
        from cascade.benchmarks.gate import GateBenchmarkConfig, benchmark_gate

        baselines = str(options.baselines)
        config = GateBenchmarkConfig(**dataclasses.asdict(options) | {"baselines": baselines})
        return benchmark_gate(config, command=line, progress=progress)

    _run(measure, gate_benchmark_report, output)
