"""`cascade analyze`: measure the saturation of a model."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.app import command
from cascade.cli.console import command_line, message, progress_bar, show_record, status
from cascade.cli.engines import EngineOptions
from cascade.cli.inputs import load_model, say_which
from cascade.cli.options import (
    BatchSize,
    OutputOptions,
    PlacedModelOptions,
    SampledCorpusOptions,
)
from cascade.cli.output import run_folder
from cascade.core.errors import OutputError

if TYPE_CHECKING:
    from cascade.core.run_folder import RunFolder
    from cascade.corpora.blocks import TokenBlocks
    from cascade.corpora.streaming import StreamingOptions
    from cascade.models.stack import DecoderStack
    from cascade.saturation.long_context import LongChoice
    from cascade.saturation.profile import SaturationProfile
    from cascade.shards.plan import Plan

#: The files of one run of `cascade analyze --output`.
RUN_FILES = (
    "profile.json",
    "profile.npz",
    "profile.parquet",
    "layer-profile.svg",
    "density.svg",
    "report.html",
)


@dataclass(frozen=True)
class AnalyzedCorpus(SampledCorpusOptions):
    """Which text is analyzed."""

    config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None
    seed: Annotated[
        int | None,
        typer.Option(
            help="Sample records at random with this seed (default: take the first).",
            rich_help_panel="Corpus",
        ),
    ] = None
    long_context: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens of a long sequence, 0 for none (default: positions, at most 2048).",
            rich_help_panel="Corpus",
        ),
    ] = None

    def reading(self) -> StreamingOptions:
        """Return how the corpus is read: the options of `load_blocks`."""
        return {
            "seq_len": self.seq_len,
            "num_samples": self.num_samples or None,
            "max_tokens": self.max_tokens,
            "split": self.split,
            "config": self.config,
            "text_column": self.text_column,
            "seed": self.seed,
            "bos": self.bos,
        }


@dataclass(frozen=True)
class AnalysisOutput(OutputOptions):
    """Where the results of an analysis are written."""

    output: Annotated[
        Path | None, typer.Option(help="Folder for report.html, profile.json and SVG figures.")
    ] = None
    npz: Annotated[
        Path | None, typer.Option(help="File for the similarity of every token at every layer.")
    ] = None


@command("analyze")
def analyze(
    model: PlacedModelOptions,
    corpus: AnalyzedCorpus,
    files: AnalysisOutput,
    engine: EngineOptions,
    batch_size: BatchSize = 32,
) -> None:
    """Measure the saturation of every decoder layer over a corpus.

    Prints statistics, outliers, special layers and suggested exit
    thresholds. With --output, also measures a few long sequences for
    the gate, and writes an HTML page, SVG figures and the record as JSON.
    With --engine ray, many processes measure, on this machine or on a
    cluster, and the profile is the same, bit for bit.
    """
    config = engine.config()
    if config is not None:
        from cascade.cli.engine_runs import analyze_on_ray

        analyze_on_ray(model, corpus, files, engine, batch_size)
        return
    from cascade.report.saturation.terminal import print_profile
    from cascade.saturation.token_archive import SimilarityArchive, check_free

    output, npz = files.output, files.npz
    with contextlib.ExitStack() as cleanup:
        # Fail before the pass if the files cannot be written.
        folder = cleanup.enter_context(run_folder(output, RUN_FILES, overwrite=files.overwrite))
        if npz is not None:
            check_free(npz, overwrite=files.overwrite)
            if output is not None and os.path.realpath(npz) in [
                os.path.realpath(output / name) for name in RUN_FILES
            ]:
                raise OutputError(f"--output already writes {npz}; choose another --npz")
        from cascade.saturation import profile as saturation
        from cascade.saturation.long_context import choose_long

        stack = load_model(model)
        blocks = read_corpus(stack, corpus)
        # Before the pass, because it can find that the corpus is too short.
        chosen = choose_long(stack, blocks, corpus.long_context)
        archive = None
        if npz is not None:
            archive = cleanup.enter_context(
                SimilarityArchive(npz, stack.layer_labels, overwrite=files.overwrite)
            )
        with progress_bar("Analyzing", blocks.tokens) as advance:
            profile = saturation.analyze(
                stack,
                blocks,
                batch_size=batch_size,
                command=command_line(),
                progress=advance,
                sink=archive.add if archive else None,
            )
        if folder is not None:
            from cascade.gate.remeasuring import with_noise

            profile = _with_long(profile, stack, chosen)
            with status("Measuring the noise of the arithmetic"):
                profile = with_noise(profile, stack, blocks, chosen.sequences)
            write_run(folder, profile)
        record = profile.record()
        if archive is not None:
            archive.save(record.provenance)
    show_record(record, print_profile)
    written = [str(output / "report.html")] if output else []
    written += [str(npz)] if npz else []
    if written:
        message(f"Wrote {', '.join(written)}")


def _with_long(
    profile: SaturationProfile, stack: DecoderStack, chosen: LongChoice
) -> SaturationProfile:
    """Return a profile with its long sequences, and say how long they took."""
    from cascade.gate.remeasuring import with_long

    if chosen.sequences is None:
        if chosen.is_short:
            _say_no_long(chosen.reason)
        return with_long(profile, stack, chosen)
    count, length = chosen.sequences.ids.shape
    start = time.perf_counter()
    with status(f"Measuring {count} sequences of {length:,} tokens"):
        profile = with_long(profile, stack, chosen)
    seconds = time.perf_counter() - start
    texts = f"{count} long sequence{'s' * (count != 1)}"
    message(f"Measured {texts} of {length:,} tokens in {seconds:.1f} s")
    return profile


def say_planned(plan: Plan) -> None:
    """Say what a new plan lacks, where more text would help.

    Args:
        plan: The plan.
    """
    if plan.planning is not None and plan.planning.too_short is not None:
        _say_no_long(plan.planning.too_short)


def _say_no_long(reason: str | None) -> None:
    message(f"No long sequences: {reason}")


def read_corpus(stack: DecoderStack, corpus: AnalyzedCorpus) -> TokenBlocks:
    """Return the corpus cut into sequences, read with a spinner.

    Args:
        stack: The model whose tokenizer is used.
        corpus: Which text to read.
    """
    from cascade.corpora import blocks as corpora

    say_which(corpus.corpus, "dataset")
    with status(f"Reading {corpus.corpus}"):
        return corpora.load_blocks(corpus.corpus, stack.tokenizer, **corpus.reading())


def write_run(folder: RunFolder, profile: SaturationProfile) -> None:
    """Stage the files of a run: the profile, its page and its figures.

    Args:
        folder: The folder of the run, with the files of `RUN_FILES`.
        profile: The profile.
    """
    from cascade.gate.baselines import stage_profile
    from cascade.report.saturation.figures import density_svg, layer_profile_svg
    from cascade.report.saturation.page import profile_page

    record, arrays = stage_profile(folder, profile), profile.arrays()
    layers, density = layer_profile_svg(record), density_svg(record, arrays)
    folder.write("layer-profile.svg", layers)
    folder.write("density.svg", density)
    folder.write("report.html", profile_page(record, arrays, pictures=(layers, density)))
