"""`cascade compare` and `cascade gate`: a record or a model against its baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.app import command
from cascade.cli.console import command_line, print_record, progress_bar
from cascade.cli.inputs import load_model, read_blocks
from cascade.cli.options import (
    BatchSize,
    Behind,
    CorpusOptions,
    ModelOptions,
    NumSamples,
    OutputOptions,
    Split,
    TextOptions,
    picked,
)
from cascade.cli.output import run_folder, say_wrote
from cascade.core.defaults import NUM_SAMPLES
from cascade.core.errors import RecordError

if TYPE_CHECKING:
    from cascade.core.files import RunFolder
    from cascade.gate.records import ComparisonRecord

#: The files of `cascade compare --output` and `cascade gate --output`.
REPORT_FILES = ("report.json", "report.md", "report.html")

_STRICT = typer.Option("--strict", help="What is inconclusive fails too.")


@dataclass(frozen=True)
class ReportOutput(OutputOptions):
    """Where a gate's report goes."""

    output: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.md and report.html.")
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier report.")
    ] = False


@dataclass(frozen=True)
class ComparisonOptions:
    """How two profiles are compared."""

    independent: Annotated[
        bool, typer.Option("--independent", help="Compare means even where sequences are shared.")
    ] = False
    margin: Annotated[
        float,
        typer.Option(help="On other sequences: in standard deviations between the baseline's."),
    ] = 1.0
    confidence: Annotated[
        float, typer.Option(help="On other sequences: that all intervals hold at once.")
    ] = 0.99
    anyway: Annotated[
        bool,
        typer.Option("--anyway", help="Compare in spite of another model, dtype or tokenizer."),
    ] = False
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 0


@command("compare")
def compare(
    new: Annotated[
        Path, typer.Argument(help="A run's folder, or a profile's .json with its .npz beside it.")
    ],
    baseline: Annotated[Path, typer.Argument(help="The same, of what it is held to.")],
    comparison: ComparisonOptions,
    output: ReportOutput,
    strict: Annotated[bool, _STRICT] = False,
) -> None:
    """Compare two stored profiles: has the first drifted from the second?

    Exit status 0: no drift, 1: drift, 2: not comparable. The same
    sequences are compared one by one; of other ones the means are, with
    intervals.
    """
    with run_folder(output.output, REPORT_FILES, overwrite=output.overwrite) as folder:
        from cascade.gate import drift
        from cascade.gate.baselines import read_profile

        found = drift.compare(
            read_profile(new),
            read_profile(baseline),
            independent=comparison.independent,
            margin=comparison.margin,
            confidence=comparison.confidence,
            anyway=comparison.anyway,
            seed=comparison.seed,
        )
        _write(folder, found.record(), baseline)
    _finish(found.record(), found.exit_status(strict=strict), output.output)


@dataclass(frozen=True)
class GateCorpus(TextOptions):
    """The baseline's text."""

    corpus: Annotated[
        str, typer.Option(help="The baseline's: embedded, a file, or a hub dataset.")
    ] = "embedded"
    split: Split = None
    num_samples: NumSamples = NUM_SAMPLES


@dataclass(frozen=True)
class BaselineOptions:
    """Which baseline, and how much of it is compared."""

    baselines: Annotated[
        Path | None,
        typer.Option(
            help="Folder of all baselines (default: ./baselines, then those shipped with cascade)."
        ),
        Behind("seq_len"),
    ] = None
    baseline: Annotated[
        Path | None,
        typer.Option(help="One baseline's .json; found by its names without."),
        Behind("baselines"),
    ] = None
    tokens: Annotated[
        int, typer.Option(min=1, help="The budget of the quick gate."), Behind("baseline")
    ] = 512
    full: Annotated[
        bool,
        typer.Option("--full", help="Measure the whole corpus, its table included."),
        Behind("tokens"),
    ] = False


@command("gate")
def gate(
    model: ModelOptions,
    corpus: GateCorpus,
    against: BaselineOptions,
    output: ReportOutput,
    batch_size: BatchSize = 32,
    strict: Annotated[bool, _STRICT, Behind("device")] = False,
) -> None:
    """Hold a model to its baseline, on a few of the baseline's sequences.

    Stops as soon as it is decided. Exit status 0: no drift, 1: drift, 2:
    not comparable.
    """
    with run_folder(output.output, REPORT_FILES, overwrite=output.overwrite) as folder:
        from cascade.gate.baselines import read_profile

        # Before the model is loaded, which takes longer.
        path = against.baseline or _baseline_path(model.model, corpus, against.baselines)
        stored = read_profile(path)
        from cascade.gate.quick_gate import run_gate

        stack = load_model(model)
        blocks = read_blocks(
            stack,
            picked(CorpusOptions, corpus, max_tokens=None),
            num_samples=corpus.num_samples or None,
        )
        with progress_bar(
            "Comparing", blocks.tokens if against.full else against.tokens
        ) as advance:
            result = run_gate(
                stack,
                blocks,
                stored,
                tokens=against.tokens,
                full=against.full,
                batch_size=batch_size,
                command=command_line(),
                progress=advance,
            )
        _write(folder, result.record(), path)
    _say_baseline(path)
    _finish(result.record(), result.comparison.exit_status(strict=strict), output.output)


def _say_baseline(path: Path) -> None:
    """Say on stderr which baseline was used."""
    from cascade.gate.baseline_lookup import described

    typer.echo(f"Baseline: {described(path)}", err=True)


def _baseline_path(model: str, corpus: GateCorpus, baselines: Path | None) -> Path:
    from cascade.corpora.blocks import corpus_name
    from cascade.gate.baseline_lookup import LOCAL, find_baseline
    from cascade.models.weights import model_name

    path = find_baseline(
        baselines,
        "saturation",
        model=model_name(model),
        corpus=corpus_name(corpus.corpus, split=corpus.split),
    )
    if not path.exists():
        raise RecordError(
            f"no baseline {path}; make one with `cascade analyze --output RUN` and `cascade accept "
            f"RUN --baselines {baselines or LOCAL}`, or name one with --baseline"
        )
    return path


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
    say_wrote(output, "report.html")
    if exit_status:
        raise typer.Exit(exit_status)
