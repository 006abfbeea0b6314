"""Command of the search for an exit layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from cascade.evaluation.search_choice import Wish
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
    from cascade.evaluation.search_choice import Wish
    from cascade.report.exits.search import FRONTIER, exit_search_report

    wish = Wish(agreement, risk, confidence)
    wish.check()
    if measure is not None and not records:
        raise UsageError("--measure and --no-measure are for records; name some, or leave it out")
    with report_folder(output, _STEM, (FRONTIER,), overwrite=overwrite) as folder:
        if records:
            own = _Options(model, revision, tuple(heads or ()), corpus, split, text_column, device)
            record = _from_records(context, records, wish, measure, own)
        else:
            record = _measured(
                wish,
                _Options(model, revision, tuple(heads or ()), corpus, split, text_column, device),
                layers=layers,
                rules=tuple(rule or ("cosine", "top2_gap")),
                propagation=propagation,
                seq_len=seq_len,
                max_tokens=max_tokens,
                batch_size=batch_size,
                dtype=dtype,
                seed=seed,
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
    wish: Wish,
    options: _Options,
    *,
    layers: str | None,
    rules: tuple[str, ...],
    propagation: str,
    seq_len: int,
    max_tokens: int | None,
    batch_size: int,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    from cascade.cli.inputs import evaluated_layers, read_heads
    from cascade.evaluation import exit_evaluation as evaluation
    from cascade.evaluation import search as exit_search

    if len(options.heads) > 1:
        raise UsageError("expected one --heads, got several; evaluate each, and search the records")
    stack = load_model(options.model, options.revision, dtype, options.device)
    fitted = read_heads(options.heads[0] if options.heads else None, stack)
    fit, confirm = evaluation.split(options.blocks(stack, seq_len, max_tokens))
    with progress_bar(
        "Searching", exit_search.tokens_to_read(fit, confirm, propagation)
    ) as advance:
        return exit_search.search_exits(
            stack,
            fit,
            confirm,
            wish,
            layers=evaluated_layers(layers, stack, fitted, False),
            rules=rules,
            heads=fitted,
            propagation=propagation,  # type: ignore[arg-type]  # checked by the evaluator
            batch_size=batch_size,
            seed=seed,
            command=command_line(),
            progress=advance,
        )


def _from_records(
    context: typer.Context,
    paths: list[Path],
    wish: Wish,
    measure: bool | None,
    options: _Options,
) -> dict[str, Any]:
    from cascade.evaluation import stored_evaluations as exit_records

    beside = given(context, _OF_THE_RECORDS)
    if beside:
        raise UsageError(f"records say themselves what was measured; leave out {', '.join(beside)}")
    evaluations = exit_records.read_evaluations(paths)
    names = [str(path) for path in paths]
    found = [
        exit_records.look_up(record, wish, source=number)
        for number, record in enumerate(evaluations)
    ]
    wanted = [
        number
        for number, one in enumerate(found)
        if measure is not False and (one.lacks is not None or (measure and one.on_table))
    ]
    if wanted:
        found = _completed(evaluations, found, wanted, names, wish, options)
    return exit_records.search_evaluations(
        evaluations, found, wish, names=names, command=command_line()
    )


def _completed(
    evaluations: list[dict[str, Any]],
    found: list[Any],
    wanted: list[int],
    names: list[str],
    wish: Wish,
    options: _Options,
) -> list[Any]:
    """Measure what some records lack, and say what that is."""
    from cascade.evaluation import exit_evaluation as evaluation
    from cascade.evaluation import search as exit_search

    for number in wanted:
        lacks = found[number].lacks or (
            f"{len(found[number].on_table)} thresholds are known from the table alone"
        )
        typer.echo(f"Measuring for {names[number]}: {lacks}", err=True)
    provenance = evaluations[0]["provenance"]
    dtype = provenance["model"]["dtype"]
    stack = load_model(options.model, options.revision, dtype, options.device)
    fingerprints = _fingerprints(options.heads, stack)
    corpora = provenance["fitted_on"], provenance["corpus"]
    blocks = options.blocks(
        stack, corpora[0]["seq_len"], sum(corpus["tokens"] for corpus in corpora)
    )
    fit, confirm = evaluation.split(blocks)
    made = list(found)
    for number in wanted:
        record = evaluations[number]
        fingerprint = record["provenance"].get("heads_fingerprint")
        if fingerprint is not None and fingerprint not in fingerprints:
            raise RecordError(
                f"{names[number]} was made with the exit heads {fingerprint[:19]}..., which are not"
                " among --heads; name their file"
            )
        passes = exit_search.tokens_to_read(fit, confirm, record["settings"]["propagation"])
        total = confirm.tokens if found[number].lacks is None else passes
        with progress_bar("Measuring", total) as advance:
            made[number] = exit_search.measure_lacking(
                stack,
                record,
                found[number],
                fit,
                confirm,
                wish,
                heads=fingerprints.get(fingerprint) if fingerprint else None,
                source=number,
                progress=advance,
            )
    return made


def _fingerprints(paths: tuple[Path, ...], stack: DecoderStack) -> dict[str, FittedHeads]:
    from cascade.exits.fitted_heads import load_heads

    heads = [load_heads(path, stack) for path in paths]
    return {one.fingerprint(): one for one in heads}
