"""Commands with `--engine ray`: divide the work, run it on Ray, put it together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.cli.commands.analyze import RUN_FILES, read_corpus, say_planned, write_run
from cascade.cli.console import command_line, message, show_record, status
from cascade.cli.engines import (
    EngineOptions,
    requested,
    shard_bar,
    use_threads,
)
from cascade.cli.inputs import device_map_of_options, load_model
from cascade.core.errors import UsageError
from cascade.core.run_folder import RunFolder

if TYPE_CHECKING:
    from cascade.cli.commands.analyze import AnalysisOutput, AnalyzedCorpus
    from cascade.cli.options import PlacedModelOptions
    from cascade.corpora.blocks import TokenBlocks
    from cascade.engines.config import EngineConfig
    from cascade.engines.working_folder import Request
    from cascade.exits.fitted_heads import FittedHeads
    from cascade.models.source import ModelSource
    from cascade.models.stack import DecoderStack
    from cascade.saturation.profile import SaturationProfile
    from cascade.shards.plan import Plan
    from cascade.stages.hard_tokens.dataset import HardTokens
    from cascade.stages.hard_tokens.plan import CollectionPlan

#: Folder inside the output: the plan and its shards, until the profile is written.
WORK = ".cascade-measuring"


def analyze_on_ray(
    model: PlacedModelOptions,
    corpus: AnalyzedCorpus,
    files: AnalysisOutput,
    engine: EngineOptions,
    batch_size: int,
) -> None:
    """Measure the saturation of every decoder layer with many processes.

    Args:
        model: Which model.
        corpus: Which text.
        files: Where results are written.
        engine: Where tasks run.
        batch_size: Sequences per forward pass.

    Raises:
        UsageError: There is no output folder, which holds the shards, or --npz is given.
    """
    from cascade.engines.cluster import cluster
    from cascade.engines.working_folder import discard
    from cascade.report.saturation.terminal import print_profile

    config, output = engine.config(), files.output
    if config is None or output is None:
        raise UsageError("--engine ray keeps the shards in --output; name a folder")
    if files.npz is not None:
        raise UsageError("--npz cannot be written by --engine ray; leave one of them out")
    with RunFolder(output, RUN_FILES, overwrite=files.overwrite) as folder:
        threads = use_threads(config)
        stack = load_model(model)
        request = requested(
            stack, model, corpus, batch_size=batch_size, shards=engine.shards, threads=threads
        )
        with _working(output / WORK, request, files.overwrite) as work:
            with cluster(config) as found:
                size = Sizes(engine.shards, found.workers, batch_size)
                plan = _planned(work / "plan", stack, corpus, size)
                _measure(plan, config, stack, model, output)
            profile = _merged(plan, folder)
    discard(output / WORK)
    show_record(profile.record(), print_profile)
    message(f"Wrote {output / 'report.html'}")


def _planned(
    folder: Path,
    stack: DecoderStack,
    corpus: AnalyzedCorpus,
    size: Sizes,
) -> Plan:
    """Return the plan of an earlier, interrupted run, or a new one."""
    from cascade.shards.plan import Plan
    from cascade.shards.planning import plan

    if (folder / "plan.json").exists():
        return Plan.read(folder)
    blocks = read_corpus(stack, corpus)
    with status("Measuring bin edges and noise"):
        made = plan(
            stack,
            blocks,
            folder,
            shards=size.shards_of(blocks),
            batch_size=size.batch_size,
            long_context=corpus.long_context,
            overwrite=True,
            command=command_line(),
        )
    say_planned(made)
    return made


@dataclass(frozen=True)
class Sizes:
    """How a corpus is divided.

    Attributes:
        shards: The number of shards; None for the default.
        workers: Tasks at once.
        batch_size: Sequences per forward pass.
    """

    shards: int | None
    workers: int
    batch_size: int

    def shards_of(self, blocks: TokenBlocks) -> int:
        """Return the number of shards of a corpus; the plan refuses more than batches."""
        from cascade.engines.config import SHARDS_PER_WORKER

        batches = -(-len(blocks.ids) // self.batch_size)
        return self.shards or min(SHARDS_PER_WORKER * self.workers, batches)


@contextlib.contextmanager
def _working(folder: Path, request: Request, overwrite: bool) -> Iterator[Path]:
    from cascade.engines.working_folder import working_folder

    doing = f"working on {folder.parent}"
    with working_folder(folder, request, overwrite=overwrite, doing=doing) as work:
        yield work


def _source(stack: DecoderStack, config: EngineConfig, model: PlacedModelOptions) -> ModelSource:
    from cascade.models.source import model_source

    return model_source(stack, gpus=config.gpus_per_worker, device_map=device_map_of_options(model))


def _measure(
    plan: Plan,
    config: EngineConfig,
    stack: DecoderStack,
    model: PlacedModelOptions,
    output: Path,
) -> None:
    from cascade.engines.profiles import measure_on_ray
    from cascade.shards.merging import missing_shards

    length = plan.record.provenance.corpus.seq_len
    missing = missing_shards(plan)
    with shard_bar(
        "Analyzing",
        output,
        shards=len(plan.record.shards),
        missing=len(missing),
        tokens=sum(len(plan.shard(number).sequences) for number in missing) * length,
    ) as done:
        measure_on_ray(plan, config, model=_source(stack, config, model), progress=done)


def _merged(plan: Plan, folder: RunFolder) -> SaturationProfile:
    from cascade.shards.merging import merged

    path = folder.staging / "profile.parquet"
    with status("Merging the shards"):
        profile = merged(plan, path, command=command_line())
    with status("Drawing the report"):
        write_run(folder, profile)
    return profile


# --- Heads -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FittedCorpus:
    """What heads are fitted on.

    Attributes:
        stack: The model.
        blocks: The corpus.
        layers: Exit layers.
        batch_size: Sequences per forward pass.
    """

    stack: DecoderStack
    blocks: TokenBlocks
    layers: tuple[int, ...]
    batch_size: int


def fit_heads_on_ray(
    fitted: FittedCorpus,
    model: PlacedModelOptions,
    engine: EngineOptions,
    output: Path,
    *,
    overwrite: bool,
) -> tuple[FittedHeads, Path]:
    """Fit heads with many processes.

    Args:
        fitted: What they are fitted on.
        model: Which model.
        engine: Where tasks run.
        output: The file of the heads. Sums are kept next to it until it is written.
        overwrite: Replace sums of other arguments.

    Returns:
        The heads, and the folder of the sums.
    """
    from cascade.core.provenance import provenance_of
    from cascade.engines import heads
    from cascade.engines.cluster import cluster

    config = engine.config()
    assert config is not None
    stack, blocks = fitted.stack, fitted.blocks
    request = requested(
        stack,
        model,
        corpus=blocks.fingerprint(),
        layers=sorted(fitted.layers),
        batch_size=fitted.batch_size,
        shards=engine.shards,
        threads=use_threads(config),
    )
    folder = output.parent / f".{output.name}.cascade-fitting"
    with _working(folder, request, overwrite) as work, cluster(config) as found:
        if heads.is_planned(work):
            plan = heads.HeadsPlan.read(work)
        else:
            size = Sizes(engine.shards, found.workers, fitted.batch_size)
            plan = heads.plan_heads(
                stack,
                blocks,
                work,
                fitted.layers,
                batch_size=fitted.batch_size,
                shards=size.shards_of(blocks),
            )
        missing = plan.missing()
        with shard_bar(
            "Fitting",
            output,
            shards=len(plan.tasks()),
            missing=len(missing),
            tokens=sum(task.tokens for task in missing),
        ) as done:
            heads.sum_on_ray(found, config, plan, _source(stack, config, model), done)
        made = provenance_of(stack, blocks, command_line())
        return heads.heads_of_shards(plan, stack, blocks, made), folder


# --- Hard tokens -----------------------------------------------------------------------------


def collect_on_ray(
    plan: CollectionPlan,
    model: PlacedModelOptions,
    engine: EngineOptions,
    output: Path,
    *,
    overwrite: bool,
) -> HardTokens:
    """Collect hard tokens with many processes.

    Args:
        plan: Plan of the collection.
        model: Which model.
        engine: Where tasks run.
        output: Folder of the dataset.
        overwrite: Replace an earlier or another unfinished dataset.
    """
    from cascade.engines.cluster import cluster
    from cascade.engines.hard_tokens import shards_on_ray
    from cascade.stages.hard_tokens.collecting import collect
    from cascade.stages.hard_tokens.exit_states import is_written

    config = engine.config()
    assert config is not None
    use_threads(config)
    source = _source(plan.stack, config, model)

    def write(plan: CollectionPlan, folder: Path) -> None:
        missing = [shard for shard in plan.shards if not is_written(shard, folder)]
        tokens = sum(len(shard.sequences) for shard in missing) * plan.seq_len
        with (
            cluster(config) as found,
            shard_bar(
                "Collecting",
                None,
                shards=len(plan.shards),
                missing=len(missing),
                tokens=tokens,
            ) as done,
        ):
            shards_on_ray(found, config, source, done)(plan, folder)

    return collect(plan, output, write, overwrite=overwrite)
