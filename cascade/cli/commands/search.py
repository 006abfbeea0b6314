"""`cascade search-exit`: search the exit layer, rule and threshold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from cascade.cli.app import command
from cascade.cli.console import command_line, message, progress_bar
from cascade.cli.inputs import evaluated_layers, load_model, read_blocks, read_heads
from cascade.cli.options import (
    Agreement,
    EvaluationCorpusOptions,
    ExitLayers,
    MaxTokens,
    ModelOptions,
    OutputOptions,
    PassOptions,
    Propagation,
    Rules,
    field_names,
    given,
    picked,
)
from cascade.cli.output import finish, report_folder, show
from cascade.core.errors import RecordError, UsageError

if TYPE_CHECKING:
    from cascade.corpora.blocks import TokenBlocks
    from cascade.evaluation.search.choice import SearchConfig
    from cascade.evaluation.search.records import SearchRecord
    from cascade.evaluation.search.stored_evaluations import Answer
    from cascade.exits.fitted_heads import FittedHeads
    from cascade.models.stack import DecoderStack

_STEM = "exit-search"


@dataclass(frozen=True)
class SearchOptions:
    """What is searched for, and in which records."""

    panel: ClassVar[str] = "Search"

    records: Annotated[
        list[Path] | None,
        typer.Argument(help="Evaluations of `cascade evaluate --output`: files or folders."),
    ] = None
    agreement: Agreement = 0.95
    layers: ExitLayers = None
    rule: Rules = None
    risk: Annotated[
        float | None,
        typer.Option(
            help="Certify that at most this share of predictions differs (default: 1 - agreement)."
        ),
    ] = None
    confidence: Annotated[float, typer.Option(help="Confidence of all certificates.")] = 0.95
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Also run the operating points that the records only estimate, or run none "
            "(default: run what the records lack).",
            rich_help_panel="Records",
        ),
    ] = None


@dataclass(frozen=True)
class SearchHeads:
    """Exit heads, one file per record that has some, and the propagation."""

    heads: Annotated[
        list[Path] | None,
        typer.Option("--heads", help="File of `cascade fit-heads` (default: logit lens)."),
    ] = None
    propagation: Propagation = "frozen"


@dataclass(frozen=True)
class SearchSource:
    """The model, the heads and the text of a pass."""

    model: ModelOptions
    heads: tuple[Path, ...]
    corpus: EvaluationCorpusOptions

    def blocks(self, stack: DecoderStack, seq_len: int, max_tokens: int | None) -> TokenBlocks:
        """Read the text, in sequences of `seq_len` tokens, at most `max_tokens` of them."""
        sized = dataclasses.replace(self.corpus, seq_len=seq_len, max_tokens=max_tokens)
        return read_blocks(stack, sized, embedded_split="held-out")


@dataclass(frozen=True)
class _MeasuredOptions:
    """The options of a new measurement; stored records already have them."""

    layers: str | None
    rule: list[str] | None
    propagation: str
    seq_len: int
    max_tokens: MaxTokens
    batch_size: int
    dtype: str
    seed: int


@command("search-exit")
def search_exit(
    context: typer.Context,
    search: SearchOptions,
    model: ModelOptions,
    heads: SearchHeads,
    corpus: EvaluationCorpusOptions,
    passes: PassOptions,
    output: OutputOptions,
) -> None:
    """Search the exit layer, rule and threshold that save most at a target agreement.

    Half of the sequences fit the thresholds, the other half confirms
    them. With stored evaluations, the model is loaded only to measure
    what they lack.
    """
    from cascade.evaluation.search.choice import SearchConfig
    from cascade.report.exits.search import FRONTIER, exit_search_report

    config = SearchConfig(search.agreement, search.risk, search.confidence)
    config.check()
    if search.measure is not None and not search.records:
        raise UsageError("--measure and --no-measure need records; name some, or leave it out")
    source = SearchSource(model, tuple(heads.heads or ()), corpus)
    with report_folder(output, _STEM, (FRONTIER,)) as folder:
        if search.records:
            record = _from_records(context, search.records, config, search.measure, source)
        else:
            options = picked(_MeasuredOptions, search, model, heads, corpus, passes)
            record = _measured(config, source, options)
        report = finish(folder, _STEM, record, exit_search_report)
    show(record, report, output.output, f"{_STEM}.html")


def _measured(
    config: SearchConfig, source: SearchSource, options: _MeasuredOptions
) -> SearchRecord:
    from cascade.evaluation import exit_evaluation as evaluation
    from cascade.evaluation.search import exit_search

    if len(source.heads) > 1:
        raise UsageError("expected one --heads, got several; evaluate each and search the records")
    stack = load_model(source.model, exits=True)
    fitted = read_heads(source.heads[0] if source.heads else None, stack)
    fit, confirm = evaluation.split(source.blocks(stack, options.seq_len, options.max_tokens))
    config = dataclasses.replace(
        config,
        layers=tuple(evaluated_layers(options.layers, stack, fitted, False)),
        rules=tuple(options.rule or ("cosine", "top2_gap")),
        propagation=options.propagation,  # type: ignore[arg-type]  # checked by the evaluator
        batch_size=options.batch_size,
        seed=options.seed,
    )
    total = exit_search.tokens_to_read(fit, confirm, config.propagation)
    with progress_bar("Searching", total) as advance:
        return exit_search.search_exits(
            stack,
            fit,
            confirm,
            config,
            heads=fitted,
            command=command_line(),
            progress=advance,
        )


def _from_records(
    context: typer.Context,
    paths: list[Path],
    config: SearchConfig,
    measure: bool | None,
    source: SearchSource,
) -> SearchRecord:
    from cascade.evaluation.search import stored_evaluations

    extra = given(context, field_names(_MeasuredOptions))
    if extra:
        raise UsageError(f"records already say what was measured; leave out {', '.join(extra)}")
    answers = [
        stored_evaluations.answer(evaluation, config)
        for evaluation in stored_evaluations.read_evaluations(paths)
    ]
    if measure is not False:
        answers = _completed(answers, config, source, run_table_points=bool(measure))
    return stored_evaluations.search_evaluations(answers, config, command=command_line())


def _completed(
    answers: list[Answer],
    config: SearchConfig,
    pass_source: SearchSource,
    *,
    run_table_points: bool,
) -> list[Answer]:
    """Measure what some evaluations lack, after printing what that is."""
    lacking = [
        one for one in answers if one.lacks is not None or (run_table_points and one.on_table)
    ]
    if not lacking:
        return answers
    # torch is loaded only where something is measured.
    from cascade.corpora.bos import recorded_choice
    from cascade.evaluation import exit_evaluation as evaluation
    from cascade.evaluation.search import exit_search

    for one in lacking:
        lacks = one.lacks or f"{len(one.on_table)} thresholds are known from the table alone"
        message(f"Measuring for {one.evaluation.name}: {lacks}")
    first = answers[0].evaluation
    model, confirmed_on = first.record.provenance.model, first.record.provenance.corpus
    stack = load_model(dataclasses.replace(pass_source.model, dtype=str(model.dtype)), exits=True)
    fingerprints = _fingerprints(pass_source.heads, stack)
    if pass_source.corpus.bos == "auto":
        choice = recorded_choice(confirmed_on)
        corpus = dataclasses.replace(pass_source.corpus, bos=choice)
        pass_source = dataclasses.replace(pass_source, corpus=corpus)
    blocks = pass_source.blocks(
        stack, first.fitted_on.seq_len, first.fitted_on.tokens + confirmed_on.tokens
    )
    fit, confirm = evaluation.split(blocks)
    made = list(answers)
    for one in lacking:
        source, record = one.evaluation.source, one.evaluation.record
        fingerprint = record.provenance.heads_fingerprint
        if fingerprint is not None and fingerprint not in fingerprints:
            raise RecordError(
                f"{one.evaluation.name} was measured with the exit heads {fingerprint[:19]}..., "
                "which are not among --heads; add their file"
            )
        passes = exit_search.tokens_to_read(fit, confirm, record.settings.propagation)
        total = confirm.tokens if one.lacks is None else passes
        with progress_bar("Measuring", total) as advance:
            made[source] = exit_search.measure_missing(
                stack,
                one,
                fit,
                confirm,
                config,
                heads=fingerprints.get(fingerprint) if fingerprint else None,
                progress=advance,
            )
    return made


def _fingerprints(paths: tuple[Path, ...], stack: DecoderStack) -> dict[str, FittedHeads]:
    from cascade.exits.fitted_heads import load_heads

    heads = [load_heads(path, stack) for path in paths]
    return {one.fingerprint(): one for one in heads}
