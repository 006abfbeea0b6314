"""`cascade gate` and `cascade compare`: check a model or a stored profile against a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from cascade.cli.app import command
from cascade.cli.console import command_line, message, progress_bar, show_record
from cascade.cli.inputs import load_model, read_blocks
from cascade.cli.options import (
    BaselinesFolder,
    BatchSize,
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
    from cascade.gate.baselines import StoredProfile
    from cascade.gate.records import ComparisonRecord, SessionRecord

#: The files of `cascade compare --output` and `cascade gate --output`.
REPORT_FILES = ("report.json", "report.md", "report.html")

_STRICT = typer.Option(
    "--strict", help="Fail if the result is inconclusive.", rich_help_panel="Comparison"
)


@dataclass(frozen=True)
class ReportOutput(OutputOptions):
    """Where the report of a comparison is written."""

    output: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.md and report.html.")
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier report.")
    ] = False


@dataclass(frozen=True)
class ComparisonOptions:
    """How two profiles are compared."""

    panel: ClassVar[str] = "Comparison"

    independent: Annotated[
        bool, typer.Option("--independent", help="Compare means even if the sequences are shared.")
    ] = False
    margin: Annotated[
        float,
        typer.Option(help="Allowed shift of a mean, in standard deviations between sequences."),
    ] = 1.0
    confidence: Annotated[
        float, typer.Option(help="Confidence that all intervals of means hold at once.")
    ] = 0.99
    anyway: Annotated[
        bool,
        typer.Option("--anyway", help="Compare even if model, dtype or tokenizer differ."),
    ] = False
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0


@command("compare")
def compare(
    new: Annotated[
        Path, typer.Argument(help="Folder of a run, or a profile's .json next to its .npz.")
    ],
    baseline: Annotated[
        Path, typer.Argument(help="Profile to compare with, given in the same form.")
    ],
    comparison: ComparisonOptions,
    output: ReportOutput,
    strict: Annotated[bool, _STRICT] = False,
) -> None:
    """Compare two stored profiles: has the first drifted from the second?

    Exit status: 0 no drift, 1 drift, 2 not comparable. Profiles of the
    same sequences are compared sequence by sequence. Otherwise their
    means are compared, with confidence intervals; --margin and
    --confidence apply to these.
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
        report = _report(found.record(), baseline)
        _write(folder, report)
    _finish(report, found.record(), found.exit_status(strict=strict), output.output)


@dataclass(frozen=True)
class GateCorpus(TextOptions):
    """The text of the baseline."""

    split: Split = None
    num_samples: NumSamples = NUM_SAMPLES


@dataclass(frozen=True)
class BaselineOptions:
    """Which baseline the model is checked against, and on how many tokens."""

    panel: ClassVar[str] = "Comparison"

    baselines: BaselinesFolder = None
    baseline: Annotated[
        Path | None,
        typer.Option(help="One baseline's .json (default: found by model and corpus)."),
    ] = None
    tokens: Annotated[int, typer.Option(min=1, help="Compare at most this many tokens.")] = 512
    full: Annotated[
        bool,
        typer.Option("--full", help="Compare the whole corpus and its table of statistics."),
    ] = False


@command("gate")
def gate(
    model: ModelOptions,
    corpus: GateCorpus,
    against: BaselineOptions,
    output: ReportOutput,
    batch_size: BatchSize = 32,
    strict: Annotated[bool, _STRICT] = False,
) -> None:
    """Check a model against its baseline, on a few of the baseline's sequences.

    Stops as soon as the result is certain. Exit status: 0 no drift,
    1 drift, 2 not comparable.
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
            picked(CorpusOptions, corpus, max_tokens=None, bos=_bos(corpus, stored)),
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
        report = _report(result.record(), path)
        _write(folder, report)
    _say_baseline(path)
    status = result.comparison.exit_status(strict=strict)
    _finish(report, result.record(), status, output.output)


def _bos(corpus: GateCorpus, stored: StoredProfile) -> str:
    """Return the choice of the command line, else the one that the baseline was read with."""
    from cascade.corpora.bos import recorded_choice

    if corpus.bos != "auto":
        return corpus.bos
    return recorded_choice(stored.record().provenance.corpus)


def _say_baseline(path: Path) -> None:
    """Print on stderr which baseline was used."""
    from cascade.gate.baseline_lookup import described

    message(f"Baseline: {described(path)}")


def _baseline_path(model: str, corpus: GateCorpus, baselines: Path | None) -> Path:
    from cascade.corpora.blocks import corpus_name
    from cascade.gate.baseline_lookup import LOCAL, find_baseline
    from cascade.models.checkpoints.weights import model_name

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


def _report(record: ComparisonRecord, path: Path) -> SessionRecord:
    from cascade.gate.records import NamedComparison, session_record

    about = record.baseline
    name = f"{about.model.name}/{about.corpus.name}" if about else str(path)
    return session_record([NamedComparison.of(record, name=name, path=str(path))])


def _write(folder: RunFolder | None, report: SessionRecord) -> None:
    if folder is None:
        return
    from cascade.core.records import to_json
    from cascade.core.schema import to_plain
    from cascade.report.gate.markdown import report_markdown
    from cascade.report.gate.page import report_page

    contents = (to_json(to_plain(report)) + "\n", report_markdown(report), report_page(report))
    for file, content in zip(REPORT_FILES, contents, strict=True):
        folder.write(file, content)


def _finish(
    report: SessionRecord, record: ComparisonRecord, exit_status: int, output: Path | None
) -> None:
    from cascade.report.gate.terminal import print_comparison

    show_record(record, print_comparison, stored=report)
    say_wrote(output, "report.html")
    if exit_status:
        raise typer.Exit(exit_status)
