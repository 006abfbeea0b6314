"""`cascade gate` and `cascade compare`: check a model or a stored profile against a baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from cascade.cli import completion
from cascade.cli.app import command
from cascade.cli.baselines import BaselinesPlace, baselines_place
from cascade.cli.console import command_line, message, progress_bar, show_record, status
from cascade.cli.inputs import load_model, say_which
from cascade.cli.options import BaselinesFolder, BatchSize, Bos, OutputOptions, PlacedModelOptions
from cascade.cli.output import run_folder, say_wrote

if TYPE_CHECKING:
    from cascade.core.run_folder import RunFolder
    from cascade.gate.baseline_corpus import GivenCorpus
    from cascade.gate.records import ComparisonRecord, SessionRecord

#: The corpus of a gate that names neither a corpus nor a baseline.
EMBEDDED = "embedded"

#: The files of `cascade compare --output` and `cascade gate --output`.
REPORT_FILES = ("report.json", "report.md", "report.html")

_OF_BASELINE = " (default: the baseline's)."
#: Options of the gate under the names of `GivenCorpus`.
_CORPUS_OPTIONS = (
    "seq_len", "num_samples", "max_tokens", "split", "config", "text_column", "seed"
)  # fmt: skip

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
        Path, typer.Argument(help="Folder of a run, or a profile's .json with its other files.")
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
class GateCorpus:
    """The text of the baseline. Its record gives every option that the user does not give."""

    corpus: Annotated[
        str | None,
        typer.Option(
            help="embedded, hub dataset, or file (default: embedded, or of --baseline).",
            autocompletion=completion.corpora,
        ),
    ] = None
    split: Annotated[
        str | None,
        typer.Option(help=f"Split of the corpus{_OF_BASELINE}", autocompletion=completion.splits),
    ] = None
    config: Annotated[
        str | None, typer.Option(help=f"Configuration of a hub dataset{_OF_BASELINE}")
    ] = None
    text_column: Annotated[str | None, typer.Option(help=f"Column to read{_OF_BASELINE}")] = None
    num_samples: Annotated[
        int | None,
        typer.Option(min=0, help="Read this many records; 0 reads all (default: the baseline's)."),
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Stop after this many tokens{_OF_BASELINE}")
    ] = None
    seq_len: Annotated[
        int | None, typer.Option(min=2, help=f"Tokens per sequence{_OF_BASELINE}")
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Seed that records were sampled with{_OF_BASELINE}",
            rich_help_panel="Corpus",
        ),
    ] = None

    bos: Bos = "auto"

    def given(self) -> GivenCorpus:
        """Return the options as the gate takes them."""
        from cascade.gate.baseline_corpus import GivenCorpus

        return GivenCorpus(
            source=self.corpus,
            bos=None if self.bos == "auto" else self.bos,
            **{name: getattr(self, name) for name in _CORPUS_OPTIONS},
        )


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
    prefill_only: Annotated[
        bool, typer.Option("--prefill-only", help="Do not check decoding with the KV cache.")
    ] = False
    no_long_context: Annotated[
        bool, typer.Option("--no-long-context", help="Do not check a long sequence.")
    ] = False


@command("gate")
def gate(
    model: PlacedModelOptions,
    corpus: GateCorpus,
    against: BaselineOptions,
    output: ReportOutput,
    batch_size: BatchSize = 32,
    strict: Annotated[bool, _STRICT] = False,
) -> None:
    """Check a model against its baseline, on a few of the baseline's sequences.

    Stops as soon as the result is certain. Then compares one long
    sequence, and checks on two sequences that decoding with the KV cache
    computes what the prefill computes.
    Exit status: 0 no drift, 1 drift, 2 not comparable.
    """
    with run_folder(output.output, REPORT_FILES, overwrite=output.overwrite) as folder:
        from cascade.gate.baselines import read_profile

        # Before the model is loaded, which takes longer.
        place = baselines_place(against.baselines if against.baseline is None else None)
        path = against.baseline or place.checked(_baseline_path(model, corpus, place.folder))
        stored = read_profile(path)
        about = stored.record().provenance.corpus
        from cascade.gate.baseline_corpus import baseline_blocks
        from cascade.gate.quick_gate import run_gate

        given = corpus.given()
        if against.baseline is None:
            given = replace(given, source=corpus.corpus or EMBEDDED)
        stack = load_model(model)
        say_which(given.source or about.source, "dataset")
        with status(f"Reading {given.source or about.source}"):
            blocks = baseline_blocks(
                about, stack.tokenizer, given, whole=against.full, quick=not against.full
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
                decoding=not against.prefill_only,
                long_context=not against.no_long_context,
                batch_size=batch_size,
                conflicts=tuple(given.conflicts(about)),
                command=command_line(),
                progress=advance,
            )
        report = _report(result.record(), path, place)
        _write(folder, report)
    message(f"Baseline: {place.described(path)}")
    exit_status = result.comparison.exit_status(strict=strict)
    _finish(report, result.record(), exit_status, output.output)


def _baseline_path(model: PlacedModelOptions, corpus: GateCorpus, baselines: Path | None) -> Path:
    from cascade.corpora.blocks import corpus_name
    from cascade.gate.baseline_lookup import Sought, find_baseline
    from cascade.models.checkpoints.weights import model_name

    source = corpus.corpus or EMBEDDED
    return find_baseline(
        baselines,
        "saturation",
        model=model_name(model.model),
        corpus=corpus_name(source, config=corpus.config, split=corpus.split),
        sought=Sought(model.model, source, model.dtype, corpus.given().options()),
    )


def _report(
    record: ComparisonRecord, path: Path, place: BaselinesPlace | None = None
) -> SessionRecord:
    from cascade.gate.records import NamedComparison, session_record

    place = place or BaselinesPlace(None)
    about, where = record.baseline, place.name_of(path)
    name = f"{about.model.name}/{about.corpus.name}" if about else where
    named = NamedComparison.of(record, name=name, path=where, remote=place.origin)
    return session_record([named])


def _write(folder: RunFolder | None, report: SessionRecord) -> None:
    if folder is None:
        return
    from cascade.core.records import to_file
    from cascade.report.gate.markdown import report_markdown
    from cascade.report.gate.page import report_page

    contents = (to_file(report), report_markdown(report), report_page(report))
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
