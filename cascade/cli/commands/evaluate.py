"""`cascade evaluate`: measure early exit, or a trained cascade, against the full model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from cascade.cli.app import command
from cascade.cli.cascades import CascadeEvaluationOptions, evaluate_stages
from cascade.cli.console import command_line, progress_bar, show_record, status
from cascade.cli.inputs import (
    check_cascade_alone,
    evaluated_layers,
    load_model,
    parse_point,
    read_blocks,
    read_drafter,
    read_heads,
)
from cascade.cli.options import (
    Agreement,
    EvaluationCorpusOptions,
    ExitLayers,
    HeadOptions,
    ModelOptions,
    OutputOptions,
    PassOptions,
    Rules,
    field_names,
    given_besides,
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

    panel: ClassVar[str] = "Operating points"

    layers: ExitLayers = None
    rule: Rules = None
    hard_ratio: Annotated[
        list[float] | None,
        typer.Option(help="Hard ratio; repeatable (default: 0.3, 0.5, 0.7)."),
    ] = None
    point: Annotated[
        list[str] | None,
        typer.Option(help="Also measure LAYER:RULE:THRESHOLD; repeatable."),
    ] = None
    only_points: Annotated[
        bool, typer.Option("--only-points", help="Measure only the --point options, for budgets.")
    ] = False
    agreement: Agreement = 0.95
    perplexity_ratio: Annotated[
        float,
        typer.Option(help="Largest acceptable perplexity, as a multiple of the full model's."),
    ] = 1.05
    cascade: Annotated[
        Path | None,
        typer.Option(
            help="Folder of `cascade train`: measure this cascade stage by stage instead.",
            rich_help_panel="Cascade",
        ),
    ] = None
    lossless: Annotated[
        bool,
        typer.Option(
            help="Also time lossless decoding, and exits in generation: "
            "4 prompts x 32 tokens, under a minute for SmolLM2-135M.",
            rich_help_panel="Lossless decoding",
        ),
    ] = True
    drafter: Annotated[
        Path | None,
        typer.Option(
            help="Folder of `cascade train-drafter`: also time drafts by this drafter.",
            rich_help_panel="Lossless decoding",
        ),
    ] = None

    def check(self) -> None:
        """Check that a drafter has something to draft for.

        Raises:
            UsageError: A drafter was given, and lossless decoding is not timed.
        """
        from cascade.core.errors import UsageError

        if self.drafter is not None and not self.lossless:
            raise UsageError(
                "--drafter drafts for lossless decoding, which --no-lossless does not time; leave "
                "out one of them"
            )


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
    """Measure early exit against the full model: does it pay?

    Half of the sequences fit the thresholds; every figure comes from the
    other half. The embedded corpus is read from its held-out split. A few
    prompts are also continued by lossless decoding, which loses nothing.
    With --cascade, measures a trained cascade stage by stage, against
    the controls trained with it.
    """
    if evaluation.cascade is None:
        _evaluate_exits(evaluation, model, heads, corpus, passes, output)
        return
    check_cascade_alone(given_besides(context, field_names(CascadeEvaluationOptions)))
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

        wanted.check()
        stack = load_model(model, exits=True)
        fitted = read_heads(heads.heads, stack)
        drafter = read_drafter(wanted.drafter, stack)
        config = evaluation.EvaluationConfig(
            layers=evaluated_layers(wanted.layers, stack, fitted, wanted.only_points),
            rules=() if wanted.only_points else tuple(wanted.rule or ("cosine", "top2_gap")),
            hard_ratios=tuple(wanted.hard_ratio or HARD_RATIOS),
            thresholds=tuple(OperatingPoint(*values, "given") for values in points),
            agreement=wanted.agreement,
            perplexity_ratio=wanted.perplexity_ratio,
            only_given=wanted.only_points,
        )
        config.check()
        blocks = read_blocks(stack, corpus, embedded_split="held-out")
        fit, confirm = evaluation.split(blocks)
        tokens = confirm.tokens + (0 if wanted.only_points else fit.tokens)
        with progress_bar("Evaluating", tokens) as advance:
            record = evaluation.evaluate(
                stack,
                fit,
                confirm,
                config,
                heads=fitted,
                propagation=heads.propagation,  # type: ignore[arg-type]  # checked by the evaluator
                batch_size=passes.batch_size,
                seed=passes.seed,
                command=command_line(),
                progress=advance,
            )
        if wanted.lossless:
            from cascade.evaluation.lossless.comparison import compare_with_lossless
            from cascade.evaluation.lossless.decoding import LosslessConfig

            with status("Continuing a few prompts"):
                record = compare_with_lossless(
                    record, stack, confirm, heads=fitted, config=LosslessConfig(drafter=drafter)
                )
        report = evaluation_report(record)
        write_json(folder, "evaluation.json", record)
        if folder is not None:
            folder.write(PARETO, report.pictures()[0].svg)
            folder.write("evaluation.html", html_page(report))
    show(record, report, output.output, "evaluation.html")


def _evaluate_cascade(cascade: Path, options: CascadeEvaluationOptions) -> None:
    from cascade.report.exits.cascades import print_cascade_evaluation

    name = CASCADE_EVALUATION_FILE
    with run_folder(options.output, [name], overwrite=options.overwrite) as folder:
        record = evaluate_stages(cascade, options)
        write_json(folder, name, record)
    show_record(record, print_cascade_evaluation)
    say_wrote(options.output, name)
