"""`cascade evaluate`: early exit at several layers, or a trained cascade."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.app import command
from cascade.cli.commands.stages import CascadeEvaluationOptions, evaluate_stages
from cascade.cli.console import command_line, print_record, progress_bar
from cascade.cli.inputs import (
    check_cascade_alone,
    evaluated_layers,
    load_model,
    parse_point,
    read_blocks,
    read_heads,
)
from cascade.cli.options import (
    RULES_HELP,
    EvaluationCorpusOptions,
    HeadOptions,
    ModelOptions,
    OutputOptions,
    PassOptions,
    field_names,
    given_beside,
    picked,
)
from cascade.cli.output import run_folder, say_wrote, show, write_json

#: The files of one run of `cascade evaluate --output`.
EVALUATION_FILES = ("evaluation.json", "pareto.svg", "evaluation.html")
#: The file of one run of `cascade evaluate --cascade --output`.
CASCADE_EVALUATION_FILE = "cascade-evaluation.json"


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, and what counts as good enough."""

    cascade: Annotated[
        Path | None, typer.Option(help="A cascade of `cascade train`, measured stage by stage.")
    ] = None
    layers: Annotated[
        str | None, typer.Option(help="Exit layers, e.g. 24,28; the heads' own without.")
    ] = None
    rule: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {RULES_HELP}")] = None
    hard_ratio: Annotated[
        list[float] | None, typer.Option(help="Share of hard tokens; repeatable.")
    ] = None
    point: Annotated[
        list[str] | None,
        typer.Option(help="LAYER:RULE:THRESHOLD, a point to measure as it is; repeatable."),
    ] = None
    only_points: Annotated[
        bool, typer.Option("--only-points", help="Measure the --point alone, as budgets do.")
    ] = False
    agreement: Annotated[
        float, typer.Option(help="Wanted share of tokens predicted as by the full model.")
    ] = 0.95
    perplexity_ratio: Annotated[
        float, typer.Option(help="Largest acceptable perplexity, relative to the full model's.")
    ] = 1.05


@command("evaluate")
def evaluate(
    context: typer.Context,
    evaluation: EvaluationOptions,
    model: ModelOptions,
    heads: HeadOptions,
    corpus: EvaluationCorpusOptions,
    passes: PassOptions,
    output: OutputOptions,
) -> None:
    """Measure early exit against the full model, and say whether it pays here.

    Half of the sequences fit the thresholds, every figure comes from the
    other half. Of the embedded corpus the held-out split is taken.
    With --cascade, stage by stage, against the controls trained with it.
    """
    if evaluation.cascade is None:
        _evaluate_exits(evaluation, model, heads, corpus, passes, output)
        return
    check_cascade_alone(given_beside(context, field_names(CascadeEvaluationOptions)))
    _evaluate_cascade(
        evaluation.cascade,
        picked(CascadeEvaluationOptions, evaluation, model, corpus, passes, output),
    )


def _evaluate_exits(
    wanted: EvaluationOptions,
    model: ModelOptions,
    heads: HeadOptions,
    corpus: EvaluationCorpusOptions,
    passes: PassOptions,
    output: OutputOptions,
) -> None:
    from cascade.report.common.sections import html_page
    from cascade.report.exits.evaluation import PARETO, evaluation_report

    with run_folder(output.output, EVALUATION_FILES, overwrite=output.overwrite) as folder:
        points = [parse_point(text) for text in wanted.point or ()]
        from cascade.core.defaults import HARD_RATIOS
        from cascade.evaluation import exit_evaluation as evaluation
        from cascade.evaluation.operating_points import OperatingPoint

        stack = load_model(model)
        fitted = read_heads(heads.heads, stack)
        request = evaluation.EvaluationConfig(
            layers=evaluated_layers(wanted.layers, stack, fitted, wanted.only_points),
            rules=() if wanted.only_points else tuple(wanted.rule or ("cosine", "top2_gap")),
            hard_ratios=tuple(wanted.hard_ratio or HARD_RATIOS),
            thresholds=tuple(OperatingPoint(*values, "given") for values in points),
            agreement=wanted.agreement,
            perplexity_ratio=wanted.perplexity_ratio,
            only_given=wanted.only_points,
        )
        request.check()
        blocks = read_blocks(stack, corpus, embedded_split="held-out")
        fit, confirm = evaluation.split(blocks)
        tokens = confirm.tokens + (0 if wanted.only_points else fit.tokens)
        with progress_bar("Evaluating", tokens) as advance:
            record = evaluation.evaluate(
                stack,
                fit,
                confirm,
                request,
                heads=fitted,
                propagation=heads.propagation,  # type: ignore[arg-type]  # checked by the evaluator
                batch_size=passes.batch_size,
                seed=passes.seed,
                command=command_line(),
                progress=advance,
            )
        report = evaluation_report(record)
        write_json(folder, "evaluation.json", record)
        if folder is not None:
            folder.write(PARETO, report.pictures()[0].svg)
            folder.write("evaluation.html", html_page(report))
    show(report, output.output, "evaluation")


def _evaluate_cascade(cascade: Path, options: CascadeEvaluationOptions) -> None:
    from cascade.report.exits.cascades import print_cascade_evaluation

    name = CASCADE_EVALUATION_FILE
    with run_folder(options.output, [name], overwrite=options.overwrite) as folder:
        record = evaluate_stages(cascade, options)
        write_json(folder, name, record)
    print_record(print_cascade_evaluation, record)
    say_wrote(options.output, name)
