"""`cascade analyze`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.app import app
from cascade.cli.console import command_line, load_model, print_record, progress_bar, status
from cascade.cli.options import (
    BatchSize,
    Column,
    Corpus,
    Device,
    Dtype,
    MaxTokens,
    Model,
    NumSamples,
    Overwrite,
    Revision,
    SeqLen,
    Split,
)
from cascade.core.errors import OutputError

if TYPE_CHECKING:
    from cascade.core.files import RunFolder
    from cascade.saturation.profile import SaturationProfile

#: The files of one run of `cascade analyze --output`.
RUN_FILES = ("profile.json", "profile.npz", "layer-profile.svg", "density.svg", "report.html")


@app.command()
def analyze(
    model: Model = "smollm2-135m",
    revision: Revision = None,
    corpus: Corpus = "embedded",
    split: Split = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    text_column: Column = None,
    num_samples: NumSamples = 500,
    seq_len: SeqLen = 128,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Annotated[
        int | None, typer.Option(help="Draw the records at random; in corpus order without.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.html, SVGs and profile.json.")
    ] = None,
    npz: Annotated[
        Path | None, typer.Option(help="File for one similarity per token and layer.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure the saturation of every decoder layer over a corpus.

    Prints statistics, outliers, special layers and suggested exit
    thresholds. With --output, writes the same as a self-contained
    HTML page, SVG and JSON.
    """
    from cascade.core.files import RunFolder
    from cascade.core.schema import to_plain
    from cascade.report.saturation.terminal import print_profile
    from cascade.saturation.token_archive import SimilarityArchive, check_free

    with contextlib.ExitStack() as cleanup:
        # What cannot be written is said now, not after the pass.
        folder = None
        if output is not None:
            folder = cleanup.enter_context(RunFolder(output, RUN_FILES, overwrite=overwrite))
        if npz is not None:
            check_free(npz, overwrite=overwrite)
            if output is not None and npz.resolve() in [(output / f).resolve() for f in RUN_FILES]:
                raise OutputError(f"--output writes {npz} itself; choose another --npz")
        from cascade.corpora import blocks as corpora
        from cascade.saturation import profile as saturation

        stack = load_model(model, revision, dtype, device)
        with status(f"Reading {corpus}"):
            blocks = corpora.load_blocks(
                corpus,
                stack.tokenizer,
                seq_len=seq_len,
                num_samples=num_samples or None,
                max_tokens=max_tokens,
                split=split,
                config=config,
                text_column=text_column,
                seed=seed,
            )
        archive = None
        if npz is not None:
            archive = cleanup.enter_context(
                SimilarityArchive(npz, stack.layer_labels, overwrite=overwrite)
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
        record = to_plain(profile.record())
        if archive is not None:
            archive.save(record["provenance"])
    print_record(print_profile, record)
    written = [str(output / "report.html")] if output else []
    written += [str(npz)] if npz else []
    if written:
        typer.echo(f"Wrote {', '.join(written)}", err=True)


def _write_run(folder: RunFolder, profile: SaturationProfile) -> None:
    from cascade.core.records import packed, to_json
    from cascade.core.schema import to_plain
    from cascade.gate.baselines import seal
    from cascade.report.saturation.figures import density_svg, layer_profile_svg
    from cascade.report.saturation.page import profile_page

    arrays = profile.arrays()
    record = to_plain(seal(profile.record(), arrays))
    pictures = layer_profile_svg(record), density_svg(record, arrays)
    contents: tuple[str | bytes, ...] = (
        to_json(record) + "\n",
        packed(arrays),
        *pictures,
        profile_page(record, arrays, pictures=pictures),
    )
    for name, content in zip(RUN_FILES, contents, strict=True):
        folder.write(name, content)
