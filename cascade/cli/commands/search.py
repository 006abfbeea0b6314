"""Command of the search for an exit layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.app import app
from cascade.cli.console import command_line, load_model, progress_bar
from cascade.cli.options import (
    RULES_HELP,
    BatchSize,
    Column,
    Corpus,
    Device,
    Dtype,
    MaxTokens,
    Model,
    Output,
    Overwrite,
    PropagationOption,
    Revision,
    Seed,
    SeqLen,
    Split,
    given,
)
from cascade.cli.output import finish, report_folder, show
from cascade.core.errors import RecordError, UsageError

if TYPE_CHECKING:
    from cascade.corpora.blocks import TokenBlocks
    from cascade.evaluation.search_choice import SearchConfig
    from cascade.evaluation.search_record import SearchRecord
    from cascade.evaluation.stored_evaluations import Answer
    from cascade.exits.fitted_heads import FittedHeads
    from cascade.models.stack import DecoderStack

_STEM = "exit-search"

#: What records say themselves: not to be given beside them.
_OF_THE_RECORDS = {
    "layers",
    "rule",
    "propagation",
    "seq_len",
    "max_tokens",
    "batch_size",
    "dtype",
    "seed",
}


@app.command("search-exit")
def search_exit(
    context: typer.Context,
    records: Annotated[
        list[Path] | None,
        typer.Argument(help="Evaluations of `cascade evaluate --output`: files or folders."),
    ] = None,
    agreement: Annotated[
        float, typer.Option(help="Wanted share of tokens predicted as by the full model.")
    ] = 0.95,
    layers: Annotated[
        str | None, typer.Option(help="Exit layers, e.g. 20,24,28; the heads' own without.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {RULES_HELP}")] = None,
    risk: Annotated[
        float | None,
        typer.Option(help="Certify: at most this share of tokens differs; 1 - agreement without."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="How sure all certificates must be.")] = 0.95,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Run what records have on the table alone; or nothing, whatever they lack.",
        ),
    ] = None,
    model: Model = "smollm2-135m",
    revision: Revision = None,
    heads: Annotated[
        list[Path] | None,
        typer.Option("--heads", help="Heads of `cascade fit-heads`; the logit lens without."),
    ] = None,
    propagation: PropagationOption = "frozen",
    corpus: Corpus = "embedded",
    split: Split = None,
    text_column: Column = None,
    seq_len: SeqLen = 128,
    max_tokens: MaxTokens = 8192,
    batch_size: BatchSize = 8,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Search the exit layer, rule and threshold that save most at a wanted agreement.

    Half of the sequences fit the thresholds, the other half confirms them.
    From stored evaluations, what they have is not measured again: the model
    is loaded only for what they lack.
    """
    from cascade.evaluation.search_choice import SearchConfig
    from cascade.report.exits.search import FRONTIER, exit_search_report

    config = SearchConfig(agreement, risk, confidence)
    config.check()
    if measure is not None and not records:
        raise UsageError("--measure and --no-measure are for records; name some, or leave it out")
    with report_folder(output, _STEM, (FRONTIER,), overwrite=overwrite) as folder:
        if records:
            own = _Options(model, revision, tuple(heads or ()), corpus, split, text_column, device)
            record = _from_records(context, records, config, measure, own)
        else:
            record = _measured(
                replace(
                    config,
                    rules=tuple(rule or ("cosine", "top2_gap")),
                    propagation=propagation,  # type: ignore[arg-type]  # checked by the evaluator
                    batch_size=batch_size,
                    seed=seed,
                ),
                _Options(model, revision, tuple(heads or ()), corpus, split, text_column, device),
                layers=layers,
                seq_len=seq_len,
                max_tokens=max_tokens,
                dtype=dtype,
            )
        report = finish(folder, _STEM, record, exit_search_report)
    show(report, output, _STEM)


@dataclass(frozen=True)
class _Options:
    """What a pass is made with."""

    model: str
    revision: str | None
    heads: tuple[Path, ...]
    corpus: str
    split: str | None
    text_column: str | None
    device: str

    def blocks(self, stack: DecoderStack, seq_len: int, max_tokens: int | None) -> TokenBlocks:
        from cascade.cli.inputs import embedded, read_blocks

        split = self.split or embedded(self.corpus, "held-out")
        return read_blocks(stack, self.corpus, split, self.text_column, seq_len, max_tokens)


def _measured(
    config: SearchConfig,
    options: _Options,
    *,
    layers: str | None,
    seq_len: int,
    max_tokens: int | None,
    dtype: str,
) -> SearchRecord:
    from cascade.cli.inputs import evaluated_layers, read_heads
    from cascade.evaluation import exit_evaluation as evaluation
    from cascade.evaluation import search as exit_search

    if len(options.heads) > 1:
        raise UsageError("expected one --heads, got several; evaluate each, and search the records")
    stack = load_model(options.model, options.revision, dtype, options.device)
    fitted = read_heads(options.heads[0] if options.heads else None, stack)
    fit, confirm = evaluation.split(options.blocks(stack, seq_len, max_tokens))
    config = replace(config, layers=tuple(evaluated_layers(layers, stack, fitted, False)))
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
    options: _Options,
) -> SearchRecord:
    from cascade.evaluation import stored_evaluations

    beside = given(context, _OF_THE_RECORDS)
    if beside:
        raise UsageError(f"records say themselves what was measured; leave out {', '.join(beside)}")
    answers = [
        stored_evaluations.answer(evaluation, config)
        for evaluation in stored_evaluations.read_evaluations(paths)
    ]
    if measure is not False:
        answers = _completed(answers, config, options, run_table_points=bool(measure))
    return stored_evaluations.search_evaluations(answers, config, command=command_line())


def _completed(
    answers: list[Answer], config: SearchConfig, options: _Options, *, run_table_points: bool
) -> list[Answer]:
    """Measure what some evaluations lack, and say what that is."""
    from cascade.evaluation import exit_evaluation as evaluation
    from cascade.evaluation import search as exit_search

    lacking = [
        one for one in answers if one.lacks is not None or (run_table_points and one.on_table)
    ]
    if not lacking:
        return answers
    for one in lacking:
        lacks = one.lacks or f"{len(one.on_table)} thresholds are known from the table alone"
        typer.echo(f"Measuring for {one.evaluation.name}: {lacks}", err=True)
    first = answers[0].evaluation
    model, confirmed_on = first.record.provenance.model, first.record.provenance.corpus
    stack = load_model(options.model, options.revision, str(model.dtype), options.device)
    fingerprints = _fingerprints(options.heads, stack)
    blocks = options.blocks(
        stack, first.fitted_on.seq_len, first.fitted_on.tokens + confirmed_on.tokens
    )
    fit, confirm = evaluation.split(blocks)
    made = list(answers)
    for one in lacking:
        source, record = one.evaluation.source, one.evaluation.record
        fingerprint = record.provenance.heads_fingerprint
        if fingerprint is not None and fingerprint not in fingerprints:
            raise RecordError(
                f"{one.evaluation.name} was made with the exit heads {fingerprint[:19]}..., which "
                "are not among --heads; name their file"
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
