"""Command of the search for an exit layer."""

from __future__ import annotations

from typing import Annotated

import typer

from cascade.cli.app import app
from cascade.cli.exits import RULES_HELP, Heads, PropagationOption, Seed
from cascade.cli.options import (
    BatchSize,
    Column,
    Corpus,
    Device,
    Dtype,
    MaxTokens,
    Model,
    Output,
    Overwrite,
    Revision,
    SeqLen,
    Split,
)
from cascade.cli.reports import finish, report_folder, show
from cascade.cli.showing import command_line, load_model, progress_bar

_STEM = "exit-search"


@app.command("search-exit")
def search_exit(
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
    """Search the exit layer, rule and threshold that save most at a wanted agreement.

    Half of the sequences fit the thresholds, the other half confirms them.
    """
    from cascade.exit_choice import Wish
    from cascade.report.exit_search import FRONTIER, exit_search_report

    wish = Wish(agreement, risk, confidence)
    wish.check()
    with report_folder(output, _STEM, (FRONTIER,), overwrite=overwrite) as folder:
        from cascade import evaluation, exit_search
        from cascade.cli.exits import embedded, evaluated_layers, read_blocks, read_heads

        stack = load_model(model, revision, dtype, device)
        fitted = read_heads(heads, stack)
        blocks = read_blocks(
            stack, corpus, split or embedded(corpus, "held-out"), text_column, seq_len, max_tokens
        )
        fit, confirm = evaluation.split(blocks)
        total = exit_search.tokens_to_read(fit, confirm, propagation)
        with progress_bar("Searching", total) as advance:
            record = exit_search.search_exits(
                stack,
                fit,
                confirm,
                wish,
                layers=evaluated_layers(layers, stack, fitted, False),
                rules=tuple(rule or ("cosine", "top2_gap")),
                heads=fitted,
                propagation=propagation,  # type: ignore[arg-type]  # checked by the evaluator
                batch_size=batch_size,
                seed=seed,
                command=command_line(),
                progress=advance,
            )
        report = finish(folder, _STEM, record, exit_search_report)
    show(report, output, _STEM)
