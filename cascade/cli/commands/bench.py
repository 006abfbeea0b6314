"""`cascade bench ...`: commands that measure speed and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cascade.cli.app import bench, command
from cascade.cli.console import command_line, print_record
from cascade.cli.inputs import read_layers
from cascade.cli.options import Behind, Device, Model
from cascade.cli.output import run_folder, say_wrote, write_json

if TYPE_CHECKING:
    from rich.console import Console

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
    show: Callable[[R, Console], None],
    output: BenchmarkOutput,
) -> None:
    """Measure, write the record where one is wanted, and print it.

    Args:
        measure: Called with the command line and a callback for progress messages.
        show: Prints the record.
        output: Where the record goes; checked before anything is measured.
    """
    with run_folder(output.output, [_FILE], overwrite=output.overwrite) as folder:
        record = measure(command_line(), lambda text: typer.echo(text, err=True))
        write_json(folder, _FILE, record)
    print_record(show, record)
    say_wrote(output.output, _FILE)


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
    from cascade.report.benchmarks import print_bench

    def measure(line: str, progress: Callable[[str], None]) -> dict[str, Any]:
        from cascade.benchmarks.collect import Setup, collect

        config = Setup(**dataclasses.asdict(options))
        return collect(config, memory=memory, command=line, progress=progress)

    _run(measure, print_bench, output)


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
    from cascade.report.benchmarks import print_decoding

    def measure(line: str, progress: Callable[[str], None]) -> dict[str, Any]:
        from cascade.benchmarks.decode import DecodeSetup, decode

        heads = None if options.heads is None else str(options.heads)
        config = DecodeSetup(**dataclasses.asdict(options) | {"heads": heads})
        return decode(config, command=line, progress=progress)

    _run(measure, print_decoding, output)


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
    from cascade.report.benchmarks import print_fitting

    def measure(line: str, progress: Callable[[str], None]) -> dict[str, Any]:
        from cascade.benchmarks.fit import FitSetup, fit

        layers = read_layers(options.layers)
        config = FitSetup(**dataclasses.asdict(options) | {"layers": layers})
        return fit(config, command=line, progress=progress)

    _run(measure, print_fitting, output)


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
    from cascade.report.benchmarks import print_collecting

    def measure(line: str, progress: Callable[[str], None]) -> dict[str, Any]:
        from cascade.benchmarks.hard_tokens import HardSetup, collect_hard_tokens

        config = HardSetup(**dataclasses.asdict(options))
        return collect_hard_tokens(config, command=line, progress=progress)

    _run(measure, print_collecting, output)


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
    from cascade.report.benchmarks import print_gating

    def measure(line: str, progress: Callable[[str], None]) -> dict[str, Any]:
        from cascade.benchmarks.gate import GateSetup, gate

        baselines = str(options.baselines)
        config = GateSetup(**dataclasses.asdict(options) | {"baselines": baselines})
        return gate(config, command=line, progress=progress)

    _run(measure, print_gating, output)
