"""`cascade accept`: store a reviewed run as a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.app import command
from cascade.cli.baselines import local_baselines
from cascade.cli.console import echo, message, show_record
from cascade.cli.options import check_folder


@command("accept")
def accept(
    run: Annotated[
        Path, typer.Argument(help="Folder that `cascade analyze` or `evaluate --output` wrote.")
    ],
    baselines: Annotated[
        str,
        typer.Option(
            metavar="<path>", callback=check_folder, help="Local folder of all baselines."
        ),
    ] = "baselines",
    name: Annotated[
        str | None, typer.Option(help="MODEL/CORPUS, the baseline's name (default: of the run).")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the baseline of another model or corpus.")
    ] = False,
) -> None:
    """Store a reviewed run as a baseline: a profile, or the budgets of an evaluation.

    Of an evaluation, the operating points given with --point become
    budgets, and so does lossless decoding. Review and commit what this
    command writes.
    """
    from cascade.gate.accepting import accept as store
    from cascade.gate.baselines import ARRAYS, ROWS, read_profile

    folder = local_baselines(baselines)
    if (run / "evaluation.json").exists():
        _accept_budgets(run, folder, name=name, replace=replace)
        return
    path, before = store(folder, run, name=name, replace=replace)
    if before is not None:
        from cascade.gate.drift import compare
        from cascade.report.gate.terminal import print_comparison

        echo("Compared with the baseline that it replaces:")
        show_record(compare(read_profile(run), before, anyway=True).record(), print_comparison)
    beside = [path.with_suffix(ending) for ending in (ARRAYS, ROWS)]
    names = " and ".join(file.name for file in beside if file.exists())
    echo(f"Wrote {path}, {names}; review and commit all of them")


def _accept_budgets(run: Path, baselines: Path, *, name: str | None, replace: bool) -> None:
    from cascade.core.records import read_plain
    from cascade.evaluation.records import EvaluationRecord
    from cascade.gate.accepting import named_path
    from cascade.gate.budgets import accept_budgets
    from cascade.gate.records import BudgetsRecord

    path = named_path(baselines, BudgetsRecord.KIND, name) if name else None
    evaluation = read_plain(run / "evaluation.json", EvaluationRecord)
    accepted = accept_budgets(baselines, evaluation, path=path, replace=replace)
    if accepted.unreadable is not None:
        message(f"Replaces all budgets of a file that cannot be read: {accepted.unreadable}")
    for overrun in accepted.overruns:
        echo(f"Compared with the budgets that it replaces: {overrun}")
    if accepted.replaced_heads is not None:
        echo(f"Replaces the budgets of other heads, {accepted.replaced_heads}")
    if accepted.lossless is not None:
        lossless = accepted.lossless
        echo(
            f"Lossless decoding: at least {lossless.budget.least:g} tokens per pass on "
            f"{lossless.prompts} prompts, and the full model's texts"
        )
    echo(f"Wrote {accepted.path}; review and commit it")
