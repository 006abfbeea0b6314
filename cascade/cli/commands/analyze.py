"""`cascade analyze` and `cascade accept`: profile a model, and store a reviewed run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.app import command
from cascade.cli.console import command_line, print_record, progress_bar, status
from cascade.cli.inputs import load_model
from cascade.cli.options import (
    BatchSize,
    Behind,
    ModelOptions,
    OutputOptions,
    SampledCorpusOptions,
)
from cascade.cli.output import run_folder
from cascade.core.errors import OutputError

if TYPE_CHECKING:
    from cascade.core.files import RunFolder
    from cascade.corpora.blocks import TokenBlocks
    from cascade.models.stack import DecoderStack
    from cascade.saturation.profile import SaturationProfile

#: The files of one run of `cascade analyze --output`.
RUN_FILES = ("profile.json", "profile.npz", "layer-profile.svg", "density.svg", "report.html")


@dataclass(frozen=True)
class AnalyzedCorpus(SampledCorpusOptions):
    """Which text is analyzed."""

    config: Annotated[
        str | None, typer.Option(help="Configuration of a hub dataset."), Behind("split")
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Draw the records at random; in corpus order without.")
    ] = None


@dataclass(frozen=True)
class AnalysisOutput(OutputOptions):
    """Where the results of an analysis go."""

    output: Annotated[
        Path | None, typer.Option(help="Folder for report.html, SVGs and profile.json.")
    ] = None
    npz: Annotated[
        Path | None,
        typer.Option(help="File for one similarity per token and layer."),
        Behind("output"),
    ] = None


@command("analyze")
def analyze(
    model: ModelOptions,
    corpus: AnalyzedCorpus,
    files: AnalysisOutput,
    batch_size: BatchSize = 32,
) -> None:
    """Measure the saturation of every decoder layer over a corpus.

    Prints statistics, outliers, special layers and suggested exit
    thresholds. With --output, writes the same as a self-contained
    HTML page, SVG and JSON.
    """
    from cascade.report.saturation.terminal import print_profile
    from cascade.saturation.token_archive import SimilarityArchive, check_free

    output, npz = files.output, files.npz
    with contextlib.ExitStack() as cleanup:
        # What cannot be written is said now, not after the pass.
        folder = cleanup.enter_context(run_folder(output, RUN_FILES, overwrite=files.overwrite))
        if npz is not None:
            check_free(npz, overwrite=files.overwrite)
            if output is not None and npz.resolve() in [(output / f).resolve() for f in RUN_FILES]:
                raise OutputError(f"--output writes {npz} itself; choose another --npz")
        from cascade.saturation import profile as saturation

        stack = load_model(model)
        blocks = _read(stack, corpus)
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

            with status("Measuring what arithmetic alone moves"):
                profile = with_noise(profile, stack, blocks)
            _write_run(folder, profile)
        record = profile.record()
        if archive is not None:
            archive.save(record.provenance)
    print_record(print_profile, record)
    written = [str(output / "report.html")] if output else []
    written += [str(npz)] if npz else []
    if written:
        typer.echo(f"Wrote {', '.join(written)}", err=True)


def _read(stack: DecoderStack, corpus: AnalyzedCorpus) -> TokenBlocks:
    from cascade.corpora import blocks as corpora

    with status(f"Reading {corpus.corpus}"):
        return corpora.load_blocks(
            corpus.corpus,
            stack.tokenizer,
            seq_len=corpus.seq_len,
            num_samples=corpus.num_samples or None,
            max_tokens=corpus.max_tokens,
            split=corpus.split,
            config=corpus.config,
            text_column=corpus.text_column,
            seed=corpus.seed,
        )


def _write_run(folder: RunFolder, profile: SaturationProfile) -> None:
    from cascade.core.records import packed, to_json
    from cascade.core.schema import to_plain
    from cascade.gate.baselines import seal
    from cascade.report.saturation.figures import density_svg, layer_profile_svg
    from cascade.report.saturation.page import profile_page

    arrays = profile.arrays()
    record = seal(profile.record(), arrays)
    pictures = layer_profile_svg(record), density_svg(record, arrays)
    contents: tuple[str | bytes, ...] = (
        to_json(to_plain(record)) + "\n",
        packed(arrays),
        *pictures,
        profile_page(record, arrays, pictures=pictures),
    )
    for name, content in zip(RUN_FILES, contents, strict=True):
        folder.write(name, content)


@command("accept")
def accept(
    run: Annotated[
        Path, typer.Argument(help="A folder of `cascade analyze` or `cascade evaluate --output`.")
    ],
    baselines: Annotated[Path, typer.Option(help="The folder of all baselines.")] = Path(
        "baselines"
    ),
) -> None:
    """Store a reviewed run: a profile as baseline, an evaluation's given points as budgets."""
    from cascade.gate.baselines import accept as store
    from cascade.gate.baselines import read_profile

    if (run / "evaluation.json").exists():
        _accept_budgets(run, baselines)
        return
    path, before = store(baselines, run)
    if before is not None:
        from cascade.gate.drift import compare
        from cascade.report.gate.terminal import print_comparison

        typer.echo("Against the baseline before:")
        print_record(print_comparison, compare(read_profile(run), before, anyway=True).record())
    typer.echo(f"Wrote {path} and {path.with_suffix('.npz').name}; review and commit both")


def _accept_budgets(run: Path, baselines: Path) -> None:
    from cascade.core.records import read_plain
    from cascade.evaluation.records import EvaluationRecord
    from cascade.gate.budgets import accept_budgets

    evaluation = read_plain(run / "evaluation.json", EvaluationRecord)
    accepted = accept_budgets(baselines, evaluation)
    for overrun in accepted.overruns:
        typer.echo(f"Against the budgets before: {overrun}")
    if accepted.replaced_heads is not None:
        typer.echo(f"Replaces the budgets of other heads, {accepted.replaced_heads}")
    typer.echo(f"Wrote {accepted.path}; review and commit it")
