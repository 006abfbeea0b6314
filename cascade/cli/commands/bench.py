"""`cascade bench ...`: measure speed and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeVar

import typer

from cascade.cli import completion
from cascade.cli.app import bench, command
from cascade.cli.console import command_line, message
from cascade.cli.inputs import read_layers
from cascade.cli.options import BaselinesFolder, Device, ExitLayer, Model, PrintOptions
from cascade.cli.output import run_folder, show, write_json
from cascade.core.errors import UsageError

if TYPE_CHECKING:
    from cascade.benchmarks.collection import CollectionBenchmark
    from cascade.benchmarks.decoding import DecodingBenchmark
    from cascade.benchmarks.gate import GateBenchmark
    from cascade.benchmarks.hard_tokens import HardTokenBenchmark
    from cascade.benchmarks.head_fitting import HeadFittingBenchmark
    from cascade.benchmarks.lossless.records import LosslessBenchmark
    from cascade.benchmarks.merging import MergingBenchmark
    from cascade.benchmarks.scale import ScaleBenchmark
    from cascade.core.schema import StoredRecord
    from cascade.report.common.sections import Report

R = TypeVar("R", bound="StoredRecord")

_FILE = "bench.json"

_WORK, _EXIT = "Work", "Exit"

Rounds = Annotated[int, typer.Option(help="Timed passes per variant.")]
RepeatedTokens = Annotated[
    int, typer.Option(help="Tokens per pass; the embedded corpus is repeated as needed.")
]


@dataclass(frozen=True)
class BenchmarkOutput(PrintOptions):
    """Where the record of a benchmark is written."""

    output: Annotated[Path | None, typer.Option("--output", help="Folder for bench.json.")] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of an earlier run.")
    ] = False


def _run(
    measure: Callable[[str, Callable[[str], None]], R],
    draw: Callable[[R], Report],
    output: BenchmarkOutput,
) -> None:
    """Measure, write the record if there is an output folder, and print it.

    Args:
        measure: Called with the command line and a callback for progress messages.
        draw: Returns the record's report.
        output: Where the record is written; checked before anything is measured.
    """
    with run_folder(output.output, [_FILE], overwrite=output.overwrite) as folder:
        record = measure(command_line(), message)
        write_json(folder, _FILE, record)
    show(record, draw(record), output.output, _FILE)


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options that every benchmark has."""

    panel: ClassVar[str] = _WORK

    model: Model = "smollm2-135m"
    rounds: Rounds = 7
    threads: Annotated[
        int | None, typer.Option("--threads", help="Number of threads (default: torch's).")
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the order of variants in a round.")
    ] = 0
    device: Device = "cpu"


@dataclass(frozen=True)
class CorpusBenchmarkOptions(BenchmarkOptions):
    """Options of a benchmark that runs a model over sequences of the embedded corpus."""

    tokens: RepeatedTokens = 4096
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.", rich_help_panel=_WORK)] = 128
    batch_size: Annotated[
        int, typer.Option(help="Sequences per forward pass.", rich_help_panel=_WORK)
    ] = 32


@dataclass(frozen=True)
class CollectionOptions(CorpusBenchmarkOptions):
    """The variants of collecting similarities that are timed."""

    tokens: Annotated[int, typer.Option(help="Tokens per pass over the embedded corpus.")] = 4096


@command("collect", group=bench)
def bench_collect(
    options: CollectionOptions,
    output: BenchmarkOutput,
    memory: Annotated[
        bool,
        typer.Option(help="Measure peak memory, in separate processes.", rich_help_panel=_WORK),
    ] = True,
) -> None:
    """Time collecting similarities: bare decoder, analyze, the study's code, a peer's code.

    Runs the variants in one process, interleaved in random order. A
    missed target is printed and recorded; the exit status remains 0.
    """
    from cascade.report.benchmarks.collection import collection_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> CollectionBenchmark:
        from cascade.benchmarks.collection import CollectionBenchmarkConfig, benchmark_collection

        config = CollectionBenchmarkConfig(**dataclasses.asdict(options))
        return benchmark_collection(config, memory=memory, command=line, progress=progress)

    _run(measure, collection_benchmark_report, output)


@dataclass(frozen=True)
class DecodingOptions(BenchmarkOptions):
    """The variants of early exit that are timed."""

    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16.", autocompletion=completion.dtypes)
    ] = "float32"
    prompts: Annotated[int, typer.Option(help="Prompts that each variant continues.")] = 2
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 64
    new_tokens: Annotated[int, typer.Option(help="Tokens generated per prompt.")] = 24
    batch_size: Annotated[
        int, typer.Option(help="Prompts continued together.", rich_help_panel=_WORK)
    ] = 1
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 5
    layer: Annotated[
        int | None,
        typer.Option(
            help="Exit layer (default: of --heads, or 24).",
            rich_help_panel=_EXIT,
            autocompletion=completion.layer,
        ),
    ] = None
    rule: Annotated[
        str,
        typer.Option(
            help="Exit rule, e.g. top2_gap.",
            rich_help_panel=_EXIT,
            autocompletion=completion.rules,
        ),
    ] = "cosine"
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Let tokens with this confidence or more exit (default: fitted).",
            rich_help_panel=_EXIT,
        ),
    ] = None
    hard_ratio: Annotated[
        float,
        typer.Option(
            help="Share of hard tokens that the threshold is fitted to.", rich_help_panel=_EXIT
        ),
    ] = 0.5
    heads: Annotated[
        Path | None,
        typer.Option(
            help="File of `cascade fit-heads` (default: fitted here).", rich_help_panel=_EXIT
        ),
    ] = None
    scoring: Annotated[bool, typer.Option(help="Time scoring with skipped layers as well.")] = True


@command("early-exit", group=bench)
def bench_early_exit(options: DecodingOptions, output: BenchmarkOutput) -> None:
    """Time early exit: transformers' generate, full depth, and tokens that exit.

    Runs the variants on held-out text, in one process, interleaved in
    random order. A missed target is printed and recorded; the exit
    status remains 0.
    """
    from cascade.report.benchmarks.decoding import decoding_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> DecodingBenchmark:
        from cascade.benchmarks.decoding import DecodingBenchmarkConfig, benchmark_decoding

        heads = None if options.heads is None else str(options.heads)
        config = DecodingBenchmarkConfig(**dataclasses.asdict(options) | {"heads": heads})
        return benchmark_decoding(config, command=line, progress=progress)

    _run(measure, decoding_benchmark_report, output)


@dataclass(frozen=True)
class LosslessOptions:
    """The prompts and variants of lossless decoding that are timed."""

    panel: ClassVar[str] = _WORK

    model: Model = "smollm2-135m"
    dtypes: Annotated[
        str, typer.Option(help="Dtypes, e.g. float32,bfloat16.", autocompletion=completion.dtypes)
    ] = "float32,bfloat16"
    kinds: Annotated[str, typer.Option(help="Kinds of prompts.")] = (
        "instructions,rewriting,long-context"
    )
    prompts: Annotated[int, typer.Option(help="Prompts of each kind.")] = 20
    new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens per prompt.")] = 128
    batch: Annotated[str, typer.Option("--batch", help="Prompts continued together, e.g. 1,4.")] = (
        "1"
    )
    long_tokens: Annotated[int, typer.Option(help="Tokens of a prompt with a long context.")] = 1024
    corpus: Annotated[
        str,
        typer.Option(
            help="Corpus of the prompts; its held-out records are used.",
            autocompletion=completion.corpora,
        ),
    ] = "embedded"
    text_column: Annotated[
        str | None,
        typer.Option(help="Column to read (default: by the form of the records)."),
    ] = None
    drafter: Annotated[
        Path | None, typer.Option(help="Folder of a trained drafter (default: none).")
    ] = None
    variants: Annotated[
        str | None,
        typer.Option(help="Variants next to generate, e.g. full,lookup (default: all)."),
    ] = None
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Time `generate` with torch.compile as well; compiling takes minutes.",
        ),
    ] = False
    peers: Annotated[
        bool, typer.Option(help="Time llama-cpp-python and openvino-genai, if installed.")
    ] = True
    threads: Annotated[
        int | None, typer.Option("--threads", help="Number of threads (default: torch's).")
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the first order and of the intervals.")
    ] = 0
    device: Device = "cpu"


@command("decode", group=bench)
def bench_decode(options: LosslessOptions, output: BenchmarkOutput) -> None:
    """Time lossless decoding against transformers' generate and other libraries.

    Every variant continues the same held-out prompts, greedily, in one
    process and in rotating order. Texts are compared with those of
    generate. A slower or unequal variant is printed and recorded; the
    exit status remains 0. The default run takes over an hour on two
    cores; --prompts, --kinds, --dtypes and --variants shorten it.
    """
    from cascade.report.benchmarks.lossless import lossless_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> LosslessBenchmark:
        from cascade.benchmarks.lossless.benchmark import benchmark_lossless
        from cascade.benchmarks.lossless.config import LosslessBenchmarkConfig

        given = dataclasses.asdict(options)
        sizes = given.pop("batch")
        config = LosslessBenchmarkConfig(
            **given
            | {
                "dtypes": _names(options.dtypes),
                "kinds": _names(options.kinds),
                "batch_sizes": _batch_sizes(sizes),
                "drafter": None if options.drafter is None else str(options.drafter),
                "variants": None if options.variants is None else _names(options.variants),
            }
        )
        return benchmark_lossless(config, command=line, progress=progress)

    _run(measure, lossless_benchmark_report, output)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise UsageError(f"expected --batch with whole numbers such as 1,4, got {text}") from None


@dataclass(frozen=True)
class HeadFittingOptions(CorpusBenchmarkOptions):
    """The fitting of heads that is timed."""

    layers: Annotated[
        str, typer.Option(help="Exit layers, e.g. 20,24,28.", autocompletion=completion.layers)
    ] = "20,24,26,28,29"
    tokens: RepeatedTokens = 16384
    rounds: Rounds = 3


@command("fit", group=bench)
def bench_fit(options: HeadFittingOptions, output: BenchmarkOutput) -> None:
    """Time fitting exit heads against the bare forward pass over the same tokens.

    Runs the variants in one process, interleaved in random order. A
    missed target is printed and recorded; the exit status remains 0.
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
class HardTokenOptions(CorpusBenchmarkOptions):
    """The collection of hard tokens that is timed."""

    layer: ExitLayer = None
    tokens: RepeatedTokens = 20480
    rounds: Rounds = 5


@command("collect-hard", group=bench)
def bench_collect_hard(options: HardTokenOptions, output: BenchmarkOutput) -> None:
    """Time collecting hard tokens against the bare forward pass over the same batches.

    Runs the variants in one process, interleaved in random order. A
    missed target is printed and recorded; the exit status remains 0.
    """
    from cascade.report.benchmarks.collection import hard_token_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> HardTokenBenchmark:
        from cascade.benchmarks.hard_tokens import HardTokenBenchmarkConfig, benchmark_hard_tokens

        config = HardTokenBenchmarkConfig(**dataclasses.asdict(options))
        return benchmark_hard_tokens(config, command=line, progress=progress)

    _run(measure, hard_token_benchmark_report, output)


@dataclass(frozen=True)
class GateOptions(BenchmarkOptions):
    """The gate that is timed."""

    baselines: BaselinesFolder = None
    tokens: Annotated[int, typer.Option(help="Compare at most this many tokens.")] = 512


@command("gate", group=bench)
def bench_gate(options: GateOptions, output: BenchmarkOutput) -> None:
    """Time the quick gate against one bare forward pass over the same tokens.

    Runs the variants in one process, interleaved in random order.
    Comparing records, loading the model and importing the plugin are
    timed separately. A missed target is printed and recorded; the exit
    status remains 0.
    """
    from cascade.report.benchmarks.gate import gate_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> GateBenchmark:
        from cascade.benchmarks.gate import GateBenchmarkConfig, benchmark_gate

        config = GateBenchmarkConfig(**dataclasses.asdict(options))
        return benchmark_gate(config, command=line, progress=progress)

    _run(measure, gate_benchmark_report, output)


@command("merge", group=bench)
def bench_merge(
    output: BenchmarkOutput,
    rows: Annotated[
        str, typer.Option("--rows", help="Numbers of rows, e.g. 1000000,10000000.")
    ] = "1000000",
    shards: Annotated[int, typer.Option("--shards", min=1, help="Number of shards.")] = 1000,
    layers: Annotated[int, typer.Option("--layers", min=2, help="Rows of each sequence.")] = 31,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Folder with space, 31 bytes a row (default: of the system)."
        ),
    ] = None,
) -> None:
    """Merge simulated shards, and check the result against the known one.

    No model runs. Merging and reading a merged profile are measured in
    fresh processes. A missed target is printed and recorded; the exit
    status remains 0.
    """
    from cascade.report.benchmarks.merging import merging_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> MergingBenchmark:
        from cascade.benchmarks.merging import MergingBenchmarkConfig, benchmark_merging

        config = MergingBenchmarkConfig(rows=_row_counts(rows), shards=shards, layers=layers)
        return benchmark_merging(config, folder=folder, command=line, progress=progress)

    _run(measure, merging_benchmark_report, output)


def _row_counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(count.replace("_", "")) for count in text.split(","))
    except ValueError:
        raise UsageError(
            f"expected --rows with whole numbers such as 1000000,10000000, got {text}"
        ) from None


@dataclass(frozen=True)
class ScaleOptions(CorpusBenchmarkOptions):
    """The work that is divided."""

    tokens: RepeatedTokens = 32768
    rounds: Rounds = 3
    shards: Annotated[int, typer.Option(help="Number of shards.")] = 8


@command("scale", group=bench)
def bench_scale(options: ScaleOptions, output: BenchmarkOutput) -> None:
    """Time one and two workers of Ray against one process with as many threads.

    Also measures what planning, scheduling and merging cost. A missed
    target is printed and recorded; the exit status remains 0.
    """
    from cascade.report.benchmarks.scale import scale_benchmark_report

    def measure(line: str, progress: Callable[[str], None]) -> ScaleBenchmark:
        from cascade.benchmarks.scale import ScaleBenchmarkConfig, benchmark_scale

        config = ScaleBenchmarkConfig(**dataclasses.asdict(options))
        return benchmark_scale(config, command=line, progress=progress)

    _run(measure, scale_benchmark_report, output)
