"""Budgets: limits on the cost of early exit at stored operating points, and their check."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from cascade.core.errors import BrokenRecordError, RecordError, first_line
from cascade.core.files import write_text
from cascade.core.formatting import ratio_words
from cascade.core.locks import locked
from cascade.core.records import read_plain, to_file
from cascade.core.schema import UNSET, SchemaError, from_plain, known, to_plain
from cascade.evaluation.records import EvaluationRecord, OperatingPointRow
from cascade.gate.baselines import ACCEPT_WAITS, baseline_paths
from cascade.gate.records import (
    BudgetedPoint,
    BudgetGroup,
    BudgetSource,
    BudgetsRecord,
    Limit,
    LosslessBudget,
    Overrun,
    PointBudget,
)

#: How much worse a figure may be than in the accepted run. On one machine, a repeated run gives
#: the same figures. On another, rounding moves single tokens across a threshold: each is about
#: 2e-4 of 4,096 tokens.
SLACK = {
    "perplexity_ratio": 0.005,
    "agreement": 0.003,
    "exit_share": 0.003,
    "layers_per_token": 0.02,
    # Relative to the measured ratio, because seconds vary with the machine and its load.
    "seconds_ratio": 0.15,
}

#: All budgets of one file agree in these fields.
_FILE_IDENTITY = (
    ("provenance", "model", "weights_hash"),
    ("provenance", "model", "revision"),
    ("provenance", "model", "dtype"),
    ("provenance", "tokenizer_hash"),
    ("provenance", "corpus", "fingerprint"),
)

#: Two evaluations are comparable only if all of these fields agree.
_IDENTITY = (
    *_FILE_IDENTITY,
    ("provenance", "heads_fingerprint"),
    ("settings", "propagation"),
)


#: An evaluation, or the fields of it that budgets need.
Evaluated = EvaluationRecord | BudgetSource | Mapping[str, Any]


@dataclass(frozen=True)
class Accepted:
    """The outcome of accepting an evaluation.

    Attributes:
        path: The budget file.
        overruns: The previous budgets that the evaluation exceeds.
        replaced_heads: The fingerprint of the heads whose budgets were replaced, if the evaluation
            used different heads; None if the heads are the same or no budgets were stored.
        unreadable: Why the stored budgets could not be read, if they were replaced for that reason.
        lossless: The budget of lossless decoding, if the evaluation measured it.
    """

    path: Path
    overruns: list[Overrun]
    replaced_heads: str | None
    unreadable: str | None = None
    lossless: LosslessBudget | None = None


def budget_source(evaluation: Evaluated) -> BudgetSource:
    """Return the fields of an evaluation that budgets need.

    Args:
        evaluation: A record of kind `evaluation`, typed or as dictionaries and lists.

    Raises:
        RecordError: A field is missing or has another type.
    """
    if isinstance(evaluation, BudgetSource):
        return evaluation
    try:
        source = from_plain(to_plain(evaluation), BudgetSource)
        if known(source.provenance.model.weights_hash) is None:
            raise SchemaError("expected text at provenance.model.weights_hash, got nothing")
    except SchemaError as error:
        raise BrokenRecordError(
            f"the evaluation is torn or edited ({error}); evaluate again"
        ) from error
    return source


def budget_of(row: OperatingPointRow) -> PointBudget:
    """Return the budget of a measured operating point: its figures with their slack.

    Args:
        row: An operating point of an evaluation.

    Raises:
        RecordError: No number holds the perplexity ratio.
    """
    if row.perplexity_ratio is None:
        raise RecordError(
            f"expected a perplexity ratio within e^700 for a budget, got "
            f"{ratio_words(None, known(row.nats_difference))} at layer {row.exit_layer}, "
            f"{row.rule} >= {row.threshold:g}; leave out this --point"
        )
    seconds = row.seconds_ratio_interval or [row.seconds_ratio] * 2
    return PointBudget(
        perplexity_ratio=Limit(most=round(row.perplexity_ratio + SLACK["perplexity_ratio"], 4)),
        agreement=Limit(least=round(row.agreement - SLACK["agreement"], 4)),
        exit_share=Limit(
            least=round(row.exit_share - SLACK["exit_share"], 4),
            most=round(row.exit_share + SLACK["exit_share"], 4),
        ),
        layers_per_token=Limit(most=round(row.layers_per_token + SLACK["layers_per_token"], 3)),
        seconds_ratio=Limit(most=round(seconds[1] * (1 + SLACK["seconds_ratio"]), 2)),
    )


def accept_budgets(
    folder: Path, evaluation: Evaluated, *, path: Path | None = None, replace: bool = False
) -> Accepted:
    """Store the given operating points of an evaluation with their budgets.

    Stored budgets for another kind of head or another propagation stay in the file. Budgets of
    refitted heads replace those of the previous heads. The budget of lossless decoding is one for
    the whole file. It is replaced if the evaluation measured lossless decoding.

    Args:
        folder: The folder of all baselines.
        evaluation: A record of kind `evaluation`.
        path: The budget file (default: by the names in the evaluation).
        replace: Replace budgets of another model, tokenizer, dtype or corpus.

    Raises:
        RecordError: The evaluation is torn or has no given operating point, lossless decoding gave
            other texts than the full model, or the stored budgets are of a newer release or belong
            to another model, tokenizer, dtype or corpus.
    """
    # Imports torch. `cascade check` reads budgets in a fraction of the time that this takes.
    from cascade.gate.lossless_budgets import lossless_budget_of

    source = budget_source(evaluation)
    rows = [row for row in source.points if row.threshold_from == "given"]
    if not rows:
        raise RecordError(
            "the evaluation has no operating point to budget; add some with `cascade evaluate "
            "--point LAYER:RULE:THRESHOLD`"
        )
    about = source.provenance
    names = {"model": known(about.model.name), "corpus": about.corpus.name}
    path = path or baseline_paths(folder, BudgetsRecord.KIND, **names)[0]
    group = BudgetGroup(
        provenance=about,
        settings=source.settings,
        points=[BudgetedPoint(**asdict(row), budget=budget_of(row)) for row in rows],
    )
    unreadable, lossless = None, lossless_budget_of(source)
    # No other process adds its budgets between reading and writing.
    with locked(path.parent, wait=ACCEPT_WAITS):
        try:
            before = _stored_budgets(path, source, replace=replace)
        except BrokenRecordError as error:
            before, unreadable = BudgetsRecord(groups=[]), str(error)
        stored = before.groups
        kept = [old for old in stored if _key(old) != _key(group)]
        budgets = BudgetsRecord(
            groups=sorted([*kept, group], key=_key),
            lossless=before.lossless if lossless is None else lossless,
        )
        _write_budgets(path, budgets)
    overruns = [
        overrun
        for old in stored
        if _mismatch(old, source) is None
        for overrun in _overruns(old, source)
    ]
    heads = group.provenance.heads_fingerprint
    replaced = {old.provenance.heads_fingerprint for old in stored if _key(old) == _key(group)} - {
        heads
    }
    return Accepted(path, overruns, next(iter(replaced), None), unreadable, lossless)


def _write_budgets(path: Path, budgets: BudgetsRecord) -> None:
    try:
        text = to_file(budgets)
    except ValueError as error:  # a NaN in a field that is not a figure
        raise BrokenRecordError(
            f"the evaluation is torn or edited ({first_line(error)}); evaluate again"
        ) from error
    write_text(path, text)


def _stored_budgets(path: Path, evaluation: BudgetSource, *, replace: bool) -> BudgetsRecord:
    """Return the budgets of a file, checked to be of the evaluation's model and corpus.

    With `replace`, return none if they are not.
    """
    if not path.exists():
        return BudgetsRecord(groups=[])
    budgets = read_budgets(path)
    for group in budgets.groups:
        mismatch = _mismatch(group, evaluation, _FILE_IDENTITY)
        if mismatch is not None and replace:
            return BudgetsRecord(groups=[])
        if mismatch is not None:
            raise RecordError(
                f"cannot add the evaluation to {path}: {mismatch}; keep both with another --name, "
                "or start over with --replace"
            )
    return budgets


def read_budgets(path: Path) -> BudgetsRecord:
    """Read a budget file.

    Args:
        path: The `.budgets.json` file.

    Raises:
        BrokenRecordError: The file is torn, edited or incomplete.
        RecordError: It is missing or has a newer schema.
    """
    record = read_plain(path, BudgetsRecord)
    try:
        budgets = from_plain(record, BudgetsRecord)
        _check_limits(budgets)
    except SchemaError as error:
        raise BrokenRecordError(
            f"{path} is torn or edited ({error}); restore it, or remove it to start over"
        ) from error
    return budgets


def _check_limits(budgets: BudgetsRecord) -> None:
    for group in budgets.groups:
        for point in group.points:
            for figure, limit in asdict(point.budget).items():
                if limit.least is UNSET and limit.most is UNSET:
                    raise SchemaError(
                        f"expected numbers for least, most or both in the budget of {figure}"
                    )
    lossless = known(budgets.lossless)
    if lossless is not None and lossless.budget.least is UNSET:
        raise SchemaError("expected a number for least in the budget of lossless decoding")
    if lossless is not None and not lossless.pass_costs:
        raise SchemaError("expected costs of passes in the budget of lossless decoding")


def _key(group: BudgetGroup) -> tuple[str, str]:
    """Return what identifies a group within its file: the kind of head and the propagation."""
    heads = "logit_lens" if group.provenance.heads_fingerprint is None else "ridge"
    return heads, group.settings.propagation


def check_budgets(evaluation: Evaluated, groups: Sequence[BudgetGroup]) -> list[Overrun]:
    """Return the budgets that an evaluation exceeds.

    Only budgets of the evaluation's heads and propagation are checked. Quality and layers are hard
    limits, because they are the same in every run. Seconds fail only if even the favourable end of
    their interval exceeds the budget.

    Args:
        evaluation: A record of kind `evaluation`.
        groups: The stored budgets (see `read_budgets`).

    Raises:
        RecordError: The evaluation is torn, or has another model, corpus, heads or propagation
            than every stored group.
    """
    source = budget_source(evaluation)
    reasons = []
    for group in groups:
        mismatch = _mismatch(group, source)
        if mismatch is None:
            return _overruns(group, source)
        reasons.append(mismatch)
    raise RecordError(
        f"not comparable with any stored budget ({'; '.join(reasons) or 'none is stored'}); "
        "evaluate the budgeted operating points, or accept new budgets"
    )


def _mismatch(
    group: BudgetGroup,
    evaluation: BudgetSource,
    identity: Sequence[Sequence[str]] = _IDENTITY,
) -> str | None:
    for path in identity:
        expected, got = _value(group, path), _value(evaluation, path)
        if expected != got:
            begun = [known(side.provenance.corpus.bos) == "yes" for side in (group, evaluation)]
            if path[-1] == "fingerprint" and begun[0] != begun[1]:
                was, now = (f"{'with' if bos else 'without'} BOS" for bos in begun)
                return f"expected text read {was}, got text read {now}"
            return f"expected {'.'.join(path[-2:])} {expected}, got {got}"
    return None


def _value(value: object, path: Sequence[str]) -> object:
    """Return the field at a path of names; None where it is absent."""
    for name in path:
        value = getattr(value, name)
    return None if value is UNSET else value


def _overruns(group: BudgetGroup, evaluation: BudgetSource) -> list[Overrun]:
    rows = {_point_key(row): row for row in evaluation.points}
    found = []
    for point in group.points:
        name, command = _named(point), _command(group)
        row = rows.get(_point_key(point))
        if row is None:
            found.append(point_overrun(group, point, "point", "not measured"))
            continue
        for figure, limit in asdict(point.budget).items():
            if not all(_is_within(figure, row, limit)):
                found.append(
                    Overrun(
                        point=name,
                        figure=figure,
                        limit=_in_words(limit),
                        measured=_measured(figure, row),
                        command=command,
                    )
                )
    return found


def point_overrun(
    group: BudgetGroup, point: OperatingPointRow, figure: str, measured: str
) -> Overrun:
    """Return what is wrong with an operating point and has no budget.

    Args:
        group: The budgets.
        point: The operating point.
        figure: What is wrong, in one word.
        measured: What was found, in words.
    """
    return Overrun(
        point=_named(point), figure=figure, limit="", measured=measured, command=_command(group)
    )


def _in_words(limit: Limit) -> str:
    ends = [("least", limit.least), ("most", limit.most)]
    return " and ".join(f"at {side} {value:g}" for side, value in ends if value is not UNSET)


def _is_within(figure: str, row: OperatingPointRow, limit: Limit) -> Iterator[bool]:
    # A comparison with NaN is false, so NaN is within no budget.
    low = high = row.compared_ratio if figure == "perplexity_ratio" else getattr(row, figure)
    if figure == "seconds_ratio" and row.seconds_ratio_interval is not None:
        low = row.seconds_ratio_interval[0]
    if limit.most is not UNSET:
        yield low <= limit.most
    if limit.least is not UNSET:
        yield high >= limit.least


def _measured(figure: str, row: OperatingPointRow) -> str:
    value: float | None = getattr(row, figure)
    return ratio_words(None, known(row.nats_difference)) if value is None else f"{value:.4f}"


def _point_key(row: OperatingPointRow) -> tuple[int, str, float]:
    return row.exit_layer, row.rule, round(row.threshold, 6)


def _named(point: OperatingPointRow) -> str:
    return f"layer {point.exit_layer}, {point.rule} >= {point.threshold:g}, {point.head}"


def _command(group: BudgetGroup) -> str:
    if group.provenance.command:
        return group.provenance.command
    points = [
        argument
        for point in group.points
        for argument in ("--point", f"{point.exit_layer}:{point.rule}:{point.threshold:g}")
    ]
    return shlex.join(["cascade", "evaluate", *points])
