"""Commands that measure speed and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.app import bench
from cascade.cli.console import command_line, print_record, read_layers
from cascade.cli.options import Device, Model

if TYPE_CHECKING:
    from rich.console import Console

Threads = Annotated[
    int | None,
    typer.Option("--threads", help="Threads to compute with; as torch has it without."),
]
Seed = Annotated[int, typer.Option("--seed", help="Draws the order of the ways in every round.")]
Output = Annotated[Path | None, typer.Option("--output", help="Folder for bench.json.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file of an earlier run.")]


def _run(
    measure: Callable[..., dict[str, Any]],
    show: Callable[[dict[str, Any], Console], None],
    output: Path | None,
    *,
    overwrite: bool,
) -> None:
    """Measure, write the record where it is wanted, and show it.

    Args:
        measure: Called with the command line and a callback for progress messages.
        show: Prints the record.
        output: A folder for it, which must be free before anything is measured.
        overwrite: Replace the file of an earlier run.
    """
    from cascade.core.files import RunFolder

    with contextlib.ExitStack() as cleanup:
        folder = None
        if output is not None:
            folder = cleanup.enter_context(RunFolder(output, ("bench.json",), overwrite=overwrite))
        from cascade.core.records import to_json

        record = measure(
            command=command_line(),
            progress=lambda text: typer.echo(text, err=True),
        )
        if folder is not None:
            folder.write("bench.json", to_json(record) + "\n")
    print_record(show, record)
    if output is not None:
        typer.echo(f"Wrote {output / 'bench.json'}", err=True)


@bench.command("collect")
def bench_collect(
    model: Model = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Tokens per pass over the embedded corpus.")] = 4096,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass, all ways.")] = 32,
    rounds: Annotated[int, typer.Option(help="Timed passes per way.")] = 7,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "cpu",
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory too, in processes of their own.")
    ] = True,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Time the ways to collect similarities: the seed's, the bare decoder's, analyze, a peer's.

    One process, rounds interleaved in random order. A missed target is
    printed and recorded; it does not fail the command.
    """
    from cascade.report.benchmarks import print_bench

    def measure(**about: Any) -> dict[str, Any]:
        from cascade.benchmarks.collect import Setup, collect

        setup = Setup(
            model=model,
            tokens=tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            rounds=rounds,
            threads=threads,
            seed=seed,
            device=device,
        )
        record: dict[str, Any] = collect(setup, memory=memory, **about)
        return record

    _run(measure, print_bench, output, overwrite=overwrite)


@bench.command("decode")
def bench_decode(
    model: Model = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="Arithmetic: float32 or bfloat16.")] = "float32",
    prompts: Annotated[int, typer.Option(help="Prompts that every way continues.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens added to each.")] = 24,
    batch_size: Annotated[int, typer.Option(help="Prompts continued together.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    layer: Annotated[
        int | None, typer.Option(help="Exit layer; the heads', or 24, without.")
    ] = None,
    rule: Annotated[str, typer.Option(help="Exit rule: cosine, top2_gap, ...")] = "cosine",
    threshold: Annotated[
        float | None, typer.Option(help="Tokens at or above it leave; fitted without.")
    ] = None,
    hard_ratio: Annotated[
        float, typer.Option(help="Share of hard tokens that a threshold is fitted to.")
    ] = 0.5,
    heads: Annotated[
        Path | None, typer.Option(help="Heads of `cascade fit-heads`; fitted without.")
    ] = None,
    scoring: Annotated[bool, typer.Option(help="Time the scoring of skipped tokens too.")] = True,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "cpu",
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Time the ways to decode: transformers' generate, ours in full, and with early exits.

    One process, rounds interleaved in random order, on held-out text. A
    missed target is printed and recorded; it does not fail the command.
    """
    from cascade.report.benchmarks import print_decoding

    def measure(**about: Any) -> dict[str, Any]:
        from cascade.benchmarks.decode import DecodeSetup, decode

        setup = DecodeSetup(
            model=model,
            dtype=dtype,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            rounds=rounds,
            layer=layer,
            rule=rule,
            threshold=threshold,
            hard_ratio=hard_ratio,
            heads=None if heads is None else str(heads),
            scoring=scoring,
            threads=threads,
            seed=seed,
            device=device,
        )
        record: dict[str, Any] = decode(setup, **about)
        return record

    _run(measure, print_decoding, output, overwrite=overwrite)


@bench.command("fit")
def bench_fit(
    model: Model = "smollm2-135m",
    layers: Annotated[str, typer.Option(help="Exit layers, e.g. 20,24,28.")] = "20,24,26,28,29",
    tokens: Annotated[
        int, typer.Option(help="Tokens per pass; the embedded corpus is repeated as needed.")
    ] = 16384,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 32,
    rounds: Annotated[int, typer.Option(help="Timed passes per way.")] = 3,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "cpu",
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Time fitting exit heads against the bare forward pass over the same tokens.

    One process, rounds interleaved in random order. A missed target is
    printed and recorded; it does not fail the command.
    """
    from cascade.report.benchmarks import print_fitting

    def measure(**about: Any) -> dict[str, Any]:
        from cascade.benchmarks.fit import FitSetup, fit

        setup = FitSetup(
            model=model,
            layers=read_layers(layers),
            tokens=tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            rounds=rounds,
            threads=threads,
            seed=seed,
            device=device,
        )
        record: dict[str, Any] = fit(setup, **about)
        return record

    _run(measure, print_fitting, output, overwrite=overwrite)


@bench.command("collect-hard")
def bench_collect_hard(
    model: Model = "smollm2-135m",
    layer: Annotated[int | None, typer.Option(help="Exit layer; the last but one without.")] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens per pass; the embedded corpus is repeated as needed.")
    ] = 20480,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 32,
    rounds: Annotated[int, typer.Option(help="Timed passes per way.")] = 5,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "cpu",
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Time collecting hard tokens against the bare forward pass over the same batches.

    One process, rounds interleaved in random order. A missed target is
    printed and recorded; it does not fail the command.
    """
    from cascade.report.benchmarks import print_collecting

    def measure(**about: Any) -> dict[str, Any]:
        from cascade.benchmarks.hard_tokens import HardSetup, collect_hard_tokens

        setup = HardSetup(
            model=model,
            layer=layer,
            tokens=tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            rounds=rounds,
            threads=threads,
            seed=seed,
            device=device,
        )
        record: dict[str, Any] = collect_hard_tokens(setup, **about)
        return record

    _run(measure, print_collecting, output, overwrite=overwrite)


@bench.command("gate")
def bench_gate(
    model: Model = "smollm2-135m",
    baselines: Annotated[Path, typer.Option(help="The folder of all baselines.")] = Path(
        "baselines"
    ),
    tokens: Annotated[int, typer.Option(help="The budget of the quick gate.")] = 512,
    rounds: Annotated[int, typer.Option(help="Timed passes per way.")] = 7,
    threads: Threads = None,
    seed: Seed = 0,
    device: Device = "cpu",
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Time the quick gate against one bare forward over the same tokens.

    One process, rounds interleaved in random order; comparing records,
    loading the model and importing the plugin are timed by themselves. A
    missed target is printed and recorded; it does not fail the command.
    """
    from cascade.report.benchmarks import print_gating

    def measure(**about: Any) -> dict[str, Any]:
        from cascade.benchmarks.gate import GateSetup, gate

        setup = GateSetup(
            model=model,
            baselines=str(baselines),
            tokens=tokens,
            rounds=rounds,
            threads=threads,
            seed=seed,
            device=device,
        )
        record: dict[str, Any] = gate(setup, **about)
        return record

    _run(measure, print_gating, output, overwrite=overwrite)
