"""`cascade accept`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.app import app
from cascade.cli.console import print_record


@app.command()
def accept(
    run: Annotated[
        Path, typer.Argument(help="A folder of `cascade analyze` or `cascade evaluate --output`.")
    ],
    baselines: Annotated[Path, typer.Option(help="The folder of all baselines.")] = Path(
        "baselines"
    ),
) -> None:
    """Store a reviewed run: a profile as baseline, an evaluation's given points as budgets."""
    from cascade.gate.baselines import accept as store
    from cascade.gate.baselines import read_profile

    if (run / "evaluation.json").exists():
        _accept_budgets(run, baselines)
        return
    path, before = store(baselines, run)
    if before is not None:
        from cascade.gate.drift import compare
        from cascade.report.gate.terminal import print_comparison

        typer.echo("Against the baseline before:")
        print_record(print_comparison, compare(read_profile(run), before, anyway=True).record())
    typer.echo(f"Wrote {path} and {path.with_suffix('.npz').name}; review and commit both")


def _accept_budgets(run: Path, baselines: Path) -> None:
    from cascade.core.records import read_record
    from cascade.gate.budgets import accept_budgets

    evaluation = read_record(run / "evaluation.json", kind="evaluation")
    accepted = accept_budgets(baselines, evaluation)
    for overrun in accepted.overruns:
        typer.echo(f"Against the budgets before: {overrun}")
    if accepted.replaced_heads is not None:
        typer.echo(f"Replaces the budgets of other heads, {accepted.replaced_heads}")
    typer.echo(f"Wrote {accepted.path}; review and commit it")
