"""Budgets of lossless decoding: texts that equal the full model's, and tokens per pass.

Seconds are no part of them. What is drafted depends on the measured costs of passes, so a budget
stores the costs of the accepted run, and its check drafts from them.
"""

from __future__ import annotations

from cascade.core.errors import RecordError
from cascade.core.schema import known
from cascade.corpora.blocks import TokenBlocks
from cascade.evaluation.exit_evaluation import split
from cascade.evaluation.lossless.decoding import LosslessConfig, continue_prompts, prompts_of
from cascade.evaluation.lossless.records import DecodingRow, LosslessFigures
from cascade.gate.records import BudgetSource, Limit, LosslessBudget, Overrun
from cascade.models.stack import DecoderStack

#: How much lower the tokens per pass may be than in the accepted run, relative to it. On one
#: machine, they are the same in every run. On another, rounding can swap two runner-ups that are
#: almost equally likely: each changes a pass or two of about 80.
SLACK = 0.05

#: What overruns and messages call it.
NAME = "lossless decoding"


def lossless_budget_of(source: BudgetSource) -> LosslessBudget | None:
    """Return the budget of lossless decoding of an evaluation.

    Args:
        source: The fields of the evaluation.

    Returns:
        The budget; None if the evaluation did not measure lossless decoding, or if nothing could
        be drafted.

    Raises:
        RecordError: A text is not the full model's.
    """
    figures = known(source.lossless)
    row = None if figures is None else figures.row("drafts")
    if figures is None or row is None or not figures.pass_costs:
        return None
    if row.equal < figures.prompts:
        raise RecordError(
            f"expected texts of {NAME} that equal the full model's, got {_differing(row)}; "
            "evaluate again with --no-lossless to accept the operating points without it"
        )
    return LosslessBudget(
        prompts=figures.prompts,
        prompt_tokens=figures.prompt_tokens,
        new_tokens=figures.new_tokens,
        fingerprint=figures.fingerprint,
        pass_costs=figures.pass_costs,
        trees=figures.trees,
        engine=row.engine or "model",
        tokens_per_pass=row.tokens_per_pass,
        budget=Limit(least=round(row.tokens_per_pass * (1 - SLACK), 3)),
        command=source.provenance.command,
    )


def decode_again(
    stack: DecoderStack, budget: LosslessBudget, blocks: TokenBlocks
) -> LosslessFigures:
    """Continue the prompts of a budget again, drafting from its costs of passes.

    Args:
        stack: The model.
        budget: The budget.
        blocks: The corpus of the budget, both halves.

    Raises:
        RecordError: The corpus gives other prompts.
    """
    config = LosslessConfig(
        prompts=budget.prompts,
        prompt_tokens=budget.prompt_tokens,
        new_tokens=budget.new_tokens,
        pass_costs=tuple(budget.pass_costs),
    )
    prompts = prompts_of(split(blocks)[1], config, stack.max_positions)
    if prompts.fingerprint != budget.fingerprint:
        raise RecordError(
            f"expected the prompts {budget.fingerprint[:19]}... for the budget of {NAME}, got "
            f"{prompts.fingerprint[:19]}...; accept an evaluation of this corpus again"
        )
    return continue_prompts(stack, prompts, config, methods=["drafts"])


def lossless_overruns(budget: LosslessBudget, figures: LosslessFigures) -> list[Overrun]:
    """Return how lossless decoding falls short of its budget.

    Every text must be the full model's. Tokens per pass are compared only if they are comparable
    (see `incomparable_because`).

    Args:
        budget: The budget.
        figures: The continued prompts.

    Raises:
        RecordError: Lossless decoding was not measured.
    """
    row = figures.row("drafts")
    if row is None:
        raise RecordError(f"expected figures of {NAME} with drafts, got none; evaluate again")
    found = []
    if row.equal < figures.prompts:
        limit = f"all {figures.prompts} equal to the full model's"
        found.append(_overrun(budget, "texts", limit, _differing(row)))
    least = known(budget.budget.least)
    if incomparable_because(budget, figures) is not None or least is None:
        return found
    if not row.tokens_per_pass >= least:
        limit, measured = f"at least {least:g}", f"{row.tokens_per_pass:.4f}{_by(budget, row)}"
        found.append(_overrun(budget, "tokens_per_pass", limit, measured))
    return found


def incomparable_because(budget: LosslessBudget, figures: LosslessFigures) -> str | None:
    """Return why tokens per pass cannot be compared with a budget, or None.

    Args:
        budget: The budget.
        figures: The continued prompts.
    """
    if (figures.fingerprint, figures.new_tokens) != (budget.fingerprint, budget.new_tokens):
        return "other prompts were continued"
    if figures.pass_costs != budget.pass_costs:
        return "drafts were chosen by other costs of passes"
    if figures.trees != budget.trees:
        names = {True: "trees", False: "chains"}
        return f"drafts were {names[figures.trees]} here and {names[budget.trees]} there"
    return None


def _overrun(budget: LosslessBudget, figure: str, limit: str, measured: str) -> Overrun:
    command = budget.command or "cascade evaluate"
    return Overrun(point=NAME, figure=figure, limit=limit, measured=measured, command=command)


def _differing(row: DecodingRow) -> str:
    count = len(row.tokens)
    return f"{count - row.equal} of {count} different"


def _by(budget: LosslessBudget, row: DecodingRow) -> str:
    engine = row.engine or "model"
    if engine == budget.engine:
        return ""
    return f" (computed by {engine}, accepted with {budget.engine})"
