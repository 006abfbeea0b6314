"""`cascade evaluate`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from cascade.cli.app import app
from cascade.cli.console import command_line, load_model, print_record, progress_bar
from cascade.cli.inputs import (
    check_cascade_alone,
    embedded,
    evaluated_layers,
    parse_point,
    read_blocks,
    read_heads,
)
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
from cascade.cli.output import show

Heads = Annotated[
    Path | None,
    typer.Option("--heads", help="Heads of `cascade fit-heads`; the logit lens without."),
]


#: The files of one run of `cascade evaluate --output`.
EVALUATION_FILES = ("evaluation.json", "pareto.svg", "evaluation.html")


@app.command()
def evaluate(
    context: typer.Context,
    cascade: Annotated[
        Path | None, typer.Option(help="A cascade of `cascade train`, measured stage by stage.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Exit layers, e.g. 24,28; the heads' own without.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {RULES_HELP}")] = None,
    hard_ratio: Annotated[
        list[float] | None, typer.Option(help="Share of hard tokens; repeatable.")
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(help="LAYER:RULE:THRESHOLD, a point to measure as it is; repeatable."),
    ] = None,
    only_points: Annotated[
        bool, typer.Option("--only-points", help="Measure the --point alone, as budgets do.")
    ] = False,
    agreement: Annotated[
        float, typer.Option(help="Wanted share of tokens predicted as by the full model.")
    ] = 0.95,
    perplexity_ratio: Annotated[
        float, typer.Option(help="Largest acceptable perplexity, relative to the full model's.")
    ] = 1.05,
    model: Model = "smollm2-135m",
    revision: Revision = None,
    heads: Heads = None,
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
    """Measure early exit against the full model, and say whether it pays here.

    Half of the sequences fit the thresholds, every figure comes from the
    other half. Of the embedded corpus the held-out split is taken.
    With --cascade, stage by stage, against the controls trained with it.
    """
    if cascade is not None:
        _evaluate_cascade(
            context,
            cascade,
            output,
            overwrite=overwrite,
            corpus=corpus,
            text_column=text_column,
            seq_len=seq_len,
            max_tokens=max_tokens,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            seed=seed,
        )
        return
    from cascade.core.files import RunFolder
    from cascade.report.common.sections import html_page
    from cascade.report.exits.evaluation import PARETO, evaluation_report

    with contextlib.ExitStack() as cleanup:
        folder = None
        if output is not None:
            folder = cleanup.enter_context(RunFolder(output, EVALUATION_FILES, overwrite=overwrite))
        points = [parse_point(text) for text in point or ()]
        from cascade.core.records import to_json
        from cascade.core.schema import to_plain
        from cascade.evaluation import exit_evaluation as evaluation
        from cascade.evaluation.operating_points import OperatingPoint
        from cascade.saturation.profile import HARD_RATIOS

        stack = load_model(model, revision, dtype, device)
        fitted = read_heads(heads, stack)
        request = evaluation.EvaluationConfig(
            layers=evaluated_layers(layers, stack, fitted, only_points),
            rules=() if only_points else tuple(rule or ("cosine", "top2_gap")),
            hard_ratios=tuple(hard_ratio or HARD_RATIOS),
            thresholds=tuple(OperatingPoint(*values, "given") for values in points),
            agreement=agreement,
            perplexity_ratio=perplexity_ratio,
            only_given=only_points,
        )
        request.check()
        blocks = read_blocks(
            stack, corpus, split or embedded(corpus, "held-out"), text_column, seq_len, max_tokens
        )
        fit, confirm = evaluation.split(blocks)
        with progress_bar(
            "Evaluating", confirm.tokens + (0 if only_points else fit.tokens)
        ) as advance:
            record = evaluation.evaluate(
                stack,
                fit,
                confirm,
                request,
                heads=fitted,
                propagation=propagation,  # type: ignore[arg-type]  # checked by the evaluator
                batch_size=batch_size,
                seed=seed,
                command=command_line(),
                progress=advance,
            )
        report = evaluation_report(record)
        if folder is not None:
            folder.write("evaluation.json", to_json(to_plain(record)) + "\n")
            folder.write(PARETO, report.pictures()[0].svg)
            folder.write("evaluation.html", html_page(report))
    show(report, output, "evaluation")


#: What `cascade evaluate --cascade` listens to.
_OF_A_CASCADE = {
    "cascade",
    "corpus",
    "text_column",
    "seq_len",
    "max_tokens",
    "batch_size",
    "dtype",
    "device",
    "seed",
    "output",
    "overwrite",
}


def _evaluate_cascade(
    context: typer.Context, folder: Path, output: Path | None, *, overwrite: bool, **options: Any
) -> None:
    from cascade.cli.commands.stages import evaluate_stages
    from cascade.core.files import RunFolder
    from cascade.core.records import to_json
    from cascade.report.exits.cascades import print_cascade_evaluation

    others = given(context, context.params.keys() - _OF_A_CASCADE)
    check_cascade_alone(others)
    with contextlib.ExitStack() as cleanup:
        run = None
        if output is not None:
            run = cleanup.enter_context(
                RunFolder(output, ("cascade-evaluation.json",), overwrite=overwrite)
            )
        record = evaluate_stages(folder, **options)
        if run is not None:
            run.write("cascade-evaluation.json", to_json(record) + "\n")
    print_record(print_cascade_evaluation, record)
    if output is not None:
        typer.echo(f"Wrote {output / 'cascade-evaluation.json'}", err=True)
