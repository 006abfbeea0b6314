"""`cascade plan`, `measure-shard` and `merge`: one profile from many tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cascade.cli.app import command
from cascade.cli.commands.analyze import RUN_FILES, AnalyzedCorpus, say_planned, write_run
from cascade.cli.console import command_line, message, progress_bar, show_record, status
from cascade.cli.inputs import device_map_named, load_model, say_which
from cascade.cli.options import (
    BatchSize,
    Device,
    DeviceMapName,
    Overwrite,
    PlacedModelOptions,
    PrintOptions,
)

if TYPE_CHECKING:
    from rich.console import Console

    from cascade.models.loading import DeviceMap
    from cascade.shards.records import PlanRecord, ShardRecord

PlanFolder = Annotated[Path, typer.Argument(help="Folder that `cascade plan` wrote.")]


@dataclass(frozen=True)
class PlannedCorpus(AnalyzedCorpus):
    """Which text is planned."""

    seed: Annotated[
        int | None,
        typer.Option(
            help="Sample records at random with this seed; a hub dataset is then downloaded "
            "(default: take the first, as a stream).",
            rich_help_panel="Corpus",
        ),
    ] = None


@dataclass(frozen=True)
class Shards:
    """How the work is divided."""

    shards: Annotated[
        int, typer.Option("--shards", min=1, help="Number of shards; each holds whole batches.")
    ] = 1
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            help="Baseline or run whose bin edges are used (default: of the first 16 sequences).",
        ),
    ] = None


@dataclass(frozen=True)
class PlanOutput(PrintOptions):
    """Where the plan is written."""

    output: Annotated[Path, typer.Option("--output", help="Folder for the plan.")] = Path("PLAN")
    overwrite: Overwrite = False


@command("plan")
def plan(
    model: PlacedModelOptions,
    corpus: PlannedCorpus,
    shards: Shards,
    files: PlanOutput,
    batch_size: BatchSize = 32,
) -> None:
    """Plan to measure a profile in shards, on one machine or on many.

    Reads the corpus once, without holding it in memory, and writes its
    token ids to the plan. `cascade measure-shard` measures one shard, and
    `cascade merge` makes the profile that `cascade analyze` would make.
    """
    from cascade.gate.baselines import read_profile
    from cascade.shards import planning

    edges = None if shards.baseline is None else read_profile(shards.baseline).arrays()["edges"]
    stack = load_model(model)
    say_which(corpus.corpus, "dataset")
    with progress_bar("Reading", corpus.max_tokens or 0) as advance:
        made = planning.plan(
            stack,
            corpus.corpus,
            files.output,
            shards=shards.shards,
            batch_size=batch_size,
            edges=edges,
            long_context=corpus.long_context,
            overwrite=files.overwrite,
            command=command_line(),
            progress=advance,
            **corpus.reading(),
        )
    folder = files.output

    def show(record: PlanRecord, console: Console) -> None:
        text, count = record.provenance.corpus, len(record.shards)
        console.print(
            f"{count:,} shard{'s' * (count != 1)}, {text.sequences:,} sequences of "
            f"{text.seq_len:,} tokens, {len(record.layers)} layers",
            f"Measure each: cascade measure-shard {folder} --shard 0 (to {count - 1})",
            f"Then merge:   cascade merge {folder} --output report",
            sep="\n",
            markup=False,
            soft_wrap=True,
        )

    say_planned(made)
    show_record(made.record, show)
    message(f"Wrote {folder}")


@command("measure-shard")
def measure_shard(
    plan: PlanFolder,
    shard: Annotated[int, typer.Option("--shard", min=0, help="Number of the shard, from 0.")],
    output: PrintOptions,
    device: Device = "cpu",
    device_map: DeviceMapName = None,
) -> None:
    """Measure one shard of a plan, unless it is complete.

    The shard appears at once when it is complete. A task that dies leaves
    nothing that counts: start it again, on any machine with the same
    versions.
    """
    from cascade.core.schema import known
    from cascade.shards.measuring import measure_shard as measure
    from cascade.shards.plan import Plan

    placed = cast("DeviceMap | None", device_map_named(device_map, device))
    planned = Plan.read(plan)
    text, count = planned.record.provenance.corpus, len(planned.record.shards)
    tokens = len(planned.shard(shard).sequences) * text.seq_len
    with progress_bar(f"Shard {shard}", tokens) as advance:
        done = measure(planned, shard, device=device, device_map=placed, progress=advance)

    def show(record: ShardRecord, console: Console) -> None:
        where = f"shard {shard} of 0 to {count - 1}"
        if done.skipped:
            console.print(f"Complete already: {where}", markup=False)
            return
        taken = (known(record.piloted) or 0) * text.seq_len
        rest = f", {taken:,} more taken from the plan" if taken else ""
        console.print(
            f"Measured {where}: {tokens - taken:,} tokens in {record.seconds:.1f} s{rest}"
        )

    show_record(done.record, show)


@command("merge")
def merge(
    plan: PlanFolder,
    output: Annotated[
        Path, typer.Option("--output", help="Folder for report.html, profile.json and figures.")
    ],
    printed: PrintOptions,
    overwrite: Overwrite = False,
) -> None:
    """Merge the measured shards of a plan into one profile.

    The profile has the bits of a single pass of `cascade analyze`. Every
    shard must be there, whole, and of this plan.
    """
    from cascade.core.run_folder import RunFolder
    from cascade.core.schema import known
    from cascade.report.saturation.terminal import print_profile
    from cascade.shards.merging import machine_notes, merged
    from cascade.shards.plan import Plan

    planned = Plan.read(plan)
    with RunFolder(output, RUN_FILES, overwrite=overwrite) as folder:
        with (
            progress_bar("Merging", planned.record.provenance.corpus.tokens) as advance,
            folder.staged("profile.parquet") as path,
        ):
            profile = merged(planned, path, command=command_line(), progress=advance)
        with status("Drawing the report"):
            write_run(folder, profile)
    record = profile.record()
    show_record(record, print_profile)
    engine = known(record.provenance.engine)
    for note in [] if engine is None else machine_notes(engine):
        message(note)
    message(f"Wrote {output / 'report.html'}")
