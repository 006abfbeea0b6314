"""Commands that hold a model or a record to its baseline."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.app import app
from cascade.cli.console import command_line, load_model, print_record, progress_bar, status
from cascade.cli.options import (
    BatchSize,
    Column,
    Device,
    Dtype,
    Model,
    NumSamples,
    Revision,
    SeqLen,
    Split,
)
from cascade.core.errors import RecordError

if TYPE_CHECKING:
    from cascade.core.files import RunFolder
    from cascade.gate.records import ComparisonRecord

#: The files of `cascade compare --output` and `cascade gate --output`.
REPORT_FILES = ("report.json", "report.md", "report.html")

Strict = Annotated[bool, typer.Option("--strict", help="What is inconclusive fails too.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder for report.json, report.md and report.html.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the files of an earlier report.")
]


@app.command()
def compare(
    new: Annotated[
        Path, typer.Argument(help="A run's folder, or a profile's .json with its .npz beside it.")
    ],
    baseline: Annotated[Path, typer.Argument(help="The same, of what it is held to.")],
    independent: Annotated[
        bool, typer.Option("--independent", help="Compare means even where sequences are shared.")
    ] = False,
    margin: Annotated[
        float,
        typer.Option(help="On other sequences: in standard deviations between the baseline's."),
    ] = 1.0,
    confidence: Annotated[
        float, typer.Option(help="On other sequences: that all intervals hold at once.")
    ] = 0.99,
    anyway: Annotated[
        bool,
        typer.Option("--anyway", help="Compare in spite of another model, dtype or tokenizer."),
    ] = False,
    strict: Strict = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 0,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare two stored profiles: has the first drifted from the second?

    Exit status 0: no drift, 1: drift, 2: not comparable. The same
    sequences are compared one by one; of other ones the means are, with
    intervals.
    """
    with _report_folder(output, overwrite) as folder:
        from cascade.gate import drift
        from cascade.gate.baselines import read_profile

        comparison = drift.compare(
            read_profile(new),
            read_profile(baseline),
            independent=independent,
            margin=margin,
            confidence=confidence,
            anyway=anyway,
            seed=seed,
        )
        _write(folder, comparison.record(), baseline)
    _finish(comparison.record(), comparison.exit_status(strict=strict), output)


@app.command()
def gate(
    model: Model = "smollm2-135m",
    revision: Revision = None,
    corpus: Annotated[
        str, typer.Option(help="The baseline's: embedded, a file, or a hub dataset.")
    ] = "embedded",
    split: Split = None,
    text_column: Column = None,
    num_samples: NumSamples = 500,
    seq_len: SeqLen = 128,
    baselines: Annotated[Path, typer.Option(help="The folder of all baselines.")] = Path(
        "baselines"
    ),
    baseline: Annotated[
        Path | None, typer.Option(help="One baseline's .json; found by its names without.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The budget of the quick gate.")] = 512,
    full: Annotated[
        bool, typer.Option("--full", help="Measure the whole corpus, its table included.")
    ] = False,
    batch_size: BatchSize = 32,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    strict: Strict = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Hold a model to its baseline, on a few of the baseline's sequences.

    Stops as soon as it is decided. Exit status 0: no drift, 1: drift, 2:
    not comparable.
    """
    with _report_folder(output, overwrite) as folder:
        from cascade.corpora import blocks as corpora
        from cascade.gate.baselines import read_profile
        from cascade.gate.quick_gate import run_gate

        stack = load_model(model, revision, dtype, device)
        with status(f"Reading {corpus}"):
            blocks = corpora.load_blocks(
                corpus,
                stack.tokenizer,
                seq_len=seq_len,
                num_samples=num_samples or None,
                split=split,
                text_column=text_column,
            )
        path = baseline or _baseline_path(stack.provenance["name"], blocks.name, baselines)
        stored = read_profile(path)
        with progress_bar("Comparing", blocks.tokens if full else tokens) as advance:
            result = run_gate(
                stack,
                blocks,
                stored,
                tokens=tokens,
                full=full,
                batch_size=batch_size,
                command=command_line(),
                progress=advance,
            )
        _write(folder, result.record(), path)
    _finish(result.record(), result.comparison.exit_status(strict=strict), output)


def _baseline_path(model: str, corpus: str, baselines: Path) -> Path:
    from cascade.gate.baselines import baseline_paths

    path, _ = baseline_paths(baselines, "saturation", model=model, corpus=corpus)
    if not path.exists():
        raise RecordError(
            f"no baseline {path}; make one with `cascade analyze --output RUN` and `cascade accept "
            f"RUN --baselines {baselines}`, or name one with --baseline"
        )
    return path


@contextlib.contextmanager
def _report_folder(output: Path | None, overwrite: bool) -> Any:
    from cascade.core.files import RunFolder

    if output is None:
        yield None
        return
    with RunFolder(output, REPORT_FILES, overwrite=overwrite) as folder:
        yield folder


def _write(folder: RunFolder | None, record: ComparisonRecord, path: Path) -> None:
    if folder is None:
        return
    from cascade.core.records import to_json
    from cascade.core.schema import to_plain
    from cascade.gate.records import NamedComparison, session_record
    from cascade.report.gate.markdown import report_markdown
    from cascade.report.gate.page import report_page

    about = record.baseline
    name = f"{about.model.name}/{about.corpus.name}" if about else str(path)
    report = session_record([NamedComparison.of(record, name=name, path=str(path))])
    contents = (to_json(to_plain(report)) + "\n", report_markdown(report), report_page(report))
    for file, content in zip(REPORT_FILES, contents, strict=True):
        folder.write(file, content)


def _finish(record: ComparisonRecord, exit_status: int, output: Path | None) -> None:
    from cascade.report.gate.terminal import print_comparison

    print_record(print_comparison, record)
    if output is not None:
        typer.echo(f"Wrote {output / 'report.html'}", err=True)
    if exit_status:
        raise typer.Exit(exit_status)
