"""Lossless decoding and exits on the same prompts: which saves more at the wanted quality."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec.structs import replace

from cascade.core.errors import CorpusError
from cascade.core.schema import known
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import EarlyExit, make_exit
from cascade.evaluation.lossless.decoding import LosslessConfig, continue_prompts, prompts_of
from cascade.evaluation.lossless.records import (
    LOSSLESS,
    DecodingRow,
    LosslessFigures,
    LosslessVerdict,
)
from cascade.evaluation.records import EvaluationRecord, OperatingPointRow
from cascade.evaluation.verdict import of_quality
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.rules import find_rule
from cascade.models.identity import check_same_model
from cascade.models.stack import DecoderStack
from cascade.stats.ratios import student_ratio_interval

_NEITHER = "Neither is significantly faster than the full model"


def compare_with_lossless(
    record: EvaluationRecord,
    stack: DecoderStack,
    blocks: TokenBlocks,
    *,
    heads: FittedHeads | None = None,
    config: LosslessConfig | None = None,
) -> EvaluationRecord:
    """Return an evaluation with the time of lossless decoding on the same machine.

    A few sequences of the evaluation are begun as prompts and continued greedily: by the full
    model's own modules, by the engine, with drafts, and with the fastest operating point of the
    wanted quality, if there is one.

    Args:
        record: The evaluation.
        stack: The model of the evaluation.
        blocks: The corpus on which the figures were measured.
        heads: The fitted heads of the evaluation; None for the logit lens.
        config: How prompts are continued.

    Raises:
        UsageError: The config is invalid.
        CorpusError: The corpus is not that of the evaluation, or is too short.
        ModelError: The evaluation, the heads or the drafter belong to another model.

    Example:
        >>> from cascade import evaluate, load, load_blocks
        >>> from cascade.evaluation.exit_evaluation import EvaluationConfig, split
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, seq_len=32, max_tokens=256)
        >>> fit, confirm = split(blocks)
        >>> points = EvaluationConfig(layers=(29,), rules=("cosine",), hard_ratios=(0.5,))
        >>> record = evaluate(stack, fit, confirm, points)
        >>> few = LosslessConfig(prompts=2, new_tokens=4)
        >>> record = compare_with_lossless(record, stack, confirm, config=few)
        >>> [row.equal for row in record.lossless.rows if row.method == "drafts"]
        [2]
    """
    config = config or LosslessConfig()
    found, expected = blocks.provenance().fingerprint, record.provenance.corpus.fingerprint
    if found != expected:
        raise CorpusError(
            f"expected the corpus that the evaluation was measured on, {expected}, got {found}"
        )
    if known(record.provenance.model.weights_hash) is not None:  # no model made in memory
        check_same_model(record.provenance.model, stack, what="the figures of this evaluation")
    prompts = prompts_of(blocks, config, stack.max_positions)
    point = _fastest_point(record)
    exits = None if point is None else exits_of(record, point, stack, heads)
    figures = continue_prompts(stack, prompts, config, exits=exits)
    figures = replace(figures, point=point)
    verdict = replace(record.verdict, lossless=judge_lossless(figures, record.points))
    return replace(record, lossless=figures, verdict=verdict)


def _fastest_point(record: EvaluationRecord) -> int | None:
    """Return the fastest operating point of the wanted quality that can generate."""
    for number in of_quality(record.points, record.verdict.wanted):
        row = record.points[number]
        # Without an earlier exit, such a rule can score but not generate.
        if not find_rule(row.rule).needs_earlier or _earlier(record, row):
            return number
    return None


def _earlier(record: EvaluationRecord, row: OperatingPointRow) -> list[int]:
    """Return the layers of the earlier exits that the rule of an operating point needs."""
    if not find_rule(row.rule).needs_earlier:
        return []
    return [layer for layer in record.settings.layers if layer < row.exit_layer]


def exits_of(
    record: EvaluationRecord, point: int, stack: DecoderStack, heads: FittedHeads | None
) -> EarlyExit:
    """Return what generates as an operating point of an evaluation scores.

    Args:
        record: The evaluation.
        point: The number of the operating point.
        stack: The model.
        heads: The fitted heads of the evaluation; None for the logit lens.
    """
    row, settings = record.points[point], record.settings
    exits = [
        make_exit(
            stack,
            layer,
            row.rule,
            threshold,
            heads=heads,
            propagation=settings.propagation,  # type: ignore[arg-type]  # checked by EarlyExit
        )
        for layer, threshold in [
            *((layer, math.inf) for layer in _earlier(record, row)),
            (row.exit_layer, row.threshold),
        ]
    ]
    return EarlyExit(
        stack,
        exits=exits,
        propagation=settings.propagation,  # type: ignore[arg-type]  # checked by EarlyExit
        seed=settings.seed,
    )


def judge_lossless(
    figures: LosslessFigures, points: Sequence[OperatingPointRow]
) -> LosslessVerdict:
    """Return which saves more at the wanted quality: lossless decoding or exits.

    The fastest way whose texts are all the full model's is compared with the operating point, on
    the same prompts. One of them saves more if the 95 % interval of the ratio of their times
    excludes 1, and if its own interval is below the full model's time.

    Args:
        figures: The continued prompts.
        points: The operating points of the evaluation.
    """
    lossless = [row for row in figures.rows if row.method in LOSSLESS]
    equal = [row for row in lossless if row.equal == figures.prompts]
    exits = None if figures.point is None else figures.row("exits")
    if not equal:
        least = min(lossless, key=lambda row: row.equal)
        return _verdict(
            "undecided",
            f"Lossless decoding is not compared: {figures.prompts - least.equal} of "
            f"{figures.prompts} texts differ from the full model's.",
            point=figures.point,
        )
    best = min(equal, key=lambda row: row.seconds_ratio)
    saves = best.seconds_ratio_interval[1] < 1
    takes = f"generation by {_computed_by(best)} takes {_time(best)} at no loss"
    if exits is None or figures.point is None:
        answer = "Lossless decoding saves more" if saves else _NEITHER
        return _verdict(
            "lossless" if saves else "neither",
            f"{answer}: {takes}, and no operating point has the wanted quality.",
            best,
        )
    interval = student_ratio_interval(best.per_token, exits.per_token)
    assert interval is not None  # of two prompts or more
    exits_save = exits.seconds_ratio_interval[1] < 1
    headline = f"{takes}, and {exits.seconds_ratio:.2f} x with {_point(points[figures.point])}."
    if interval[1] < 1 and saves:
        outcome, answer = "lossless", "Lossless decoding saves more"
    elif interval[0] > 1 and exits_save:
        outcome, answer = "exits", "Exits save more"
    elif saves or exits_save:
        outcome, answer = "undecided", "This run does not decide which saves more"
    else:
        outcome, answer = "neither", _NEITHER
    return _verdict(
        outcome,
        f"{answer}: {headline}",
        best,
        point=figures.point,
        ratio=sum(best.per_token) / sum(exits.per_token),
        interval=interval,
    )


def _verdict(
    saves_more: str,
    headline: str,
    row: DecodingRow | None = None,
    *,
    point: int | None = None,
    ratio: float | None = None,
    interval: list[float] | None = None,
) -> LosslessVerdict:
    return LosslessVerdict(
        saves_more=saves_more,  # type: ignore[arg-type]  # one of its outcomes
        method=None if row is None else row.method,
        point=point,
        seconds_ratio=ratio,
        seconds_ratio_interval=interval,
        headline=headline,
    )


def _time(row: DecodingRow) -> str:
    low, high = row.seconds_ratio_interval
    return f"{row.seconds_ratio:.2f} x the full model's time ({low:.2f} to {high:.2f})"


def _computed_by(row: DecodingRow) -> str:
    # Without an engine, it is "model (REASON)".
    is_own = row.engine is None or row.engine.startswith("model")
    return "the model's own modules" if is_own else f"{row.engine} layers"


def _point(row: OperatingPointRow) -> str:
    return (
        f"the best operating point of the wanted quality (layer {row.exit_layer}, {row.rule} >= "
        f"{row.threshold:.4g})"
    )
