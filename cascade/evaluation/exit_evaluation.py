"""Evaluation: quality and cost of early exit over layers, rules and thresholds, and a verdict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cascade.core.arguments import check_seed
from cascade.core.arrays import Array
from cascade.core.errors import CorpusError, UsageError
from cascade.core.provenance import provenance_of
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import Propagation
from cascade.evaluation.exit_curves import curve, lowest_threshold
from cascade.evaluation.exit_table import ExitTable
from cascade.evaluation.operating_points import INTERVAL, Evaluator, Point
from cascade.evaluation.verdict import CONTROLS, judge
from cascade.exits.fitted_heads import FittedHeads, heads_provenance
from cascade.exits.rules import check_layers, find_rule
from cascade.models.flops import full_flops
from cascade.models.stack import DecoderStack
from cascade.stats.thresholds import fit_threshold


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        layers: Exit layers.
        rules: Names of the rules; the controls are added.
        hard_ratios: A threshold is fitted for each.
        thresholds: Further points, as they are.
        agreement: What the exit-layer search wants, and the verdict.
        perplexity_ratio: The largest that the verdict accepts.
        only_given: Measure `thresholds` alone: nothing is fitted, searched or controlled for.
    """

    layers: tuple[int, ...]
    rules: tuple[str, ...] = ("cosine", "top2_gap")
    hard_ratios: tuple[float, ...] = (0.3, 0.5, 0.7)
    thresholds: tuple[Point, ...] = ()
    agreement: float = 0.95
    perplexity_ratio: float = 1.05
    only_given: bool = False

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: A ratio or a threshold is outside its range, or there is no exit layer, or
                no rule but controls.
        """
        if self.only_given and not self.thresholds:
            raise UsageError("expected at least one point to measure; name some with --point")
        if not self.layers and not self.thresholds:
            raise UsageError("expected at least one exit layer, got none; name some")
        for name, values in (
            ("hard ratio", self.hard_ratios),
            ("share of agreement", (self.agreement,)),
        ):
            for value in values:
                if not 0 <= value <= 1:
                    raise UsageError(f"expected a {name} in 0..1, got {value:g}")
        if not 1 <= self.perplexity_ratio < math.inf:
            raise UsageError(
                f"expected a finite perplexity ratio of at least 1, got {self.perplexity_ratio:g}"
            )
        for name in self.rules:
            find_rule(name)
        for point in self.thresholds:
            rule = find_rule(point.rule)
            if math.isinf(point.threshold):
                raise UsageError(
                    f"expected a finite threshold, got {point.threshold:g}; the full model is "
                    "always measured, and that every token leaves is the rule fixed"
                )
            rule.check(point.threshold, infinite=False)
        self._check_judged()

    def _check_judged(self) -> None:
        """Refuse to judge where there is nothing but what points are judged against."""
        names = dict.fromkeys([*self.rules, *(point.rule for point in self.thresholds)])
        if self.only_given or any(name not in CONTROLS for name in names):
            return
        if not names:
            raise UsageError("expected a rule to judge, got none; name one")
        raise UsageError(
            f"the rules {', '.join(names)} are controls, measured beside every rule; name a rule "
            "to judge"
        )


_MORE_SEQUENCES = "take a larger corpus, a larger --max-tokens or a smaller --seq-len"


def split(blocks: TokenBlocks) -> tuple[TokenBlocks, TokenBlocks]:
    """Deal the sequences out to two corpora in turn: one to fit on, one to confirm on.

    Raises:
        CorpusError: Fewer than four sequences.
    """
    if len(blocks.ids) < 4:
        raise CorpusError(
            f"{len(blocks.ids)} sequences cannot be split, expected at least 4; {_MORE_SEQUENCES}"
        )
    return (
        replace(blocks, ids=blocks.ids[0::2], name=f"{blocks.name}-fit"),
        replace(blocks, ids=blocks.ids[1::2], name=f"{blocks.name}-confirm"),
    )


def check_split(fit: TokenBlocks, confirm: TokenBlocks) -> None:
    """Refuse corpora too small for an interval.

    Raises:
        CorpusError: One of them has fewer than two sequences.
    """
    for blocks in (fit, confirm):
        if len(blocks.ids) < 2:
            raise CorpusError(
                f"expected at least 2 sequences to fit on and 2 to confirm on, got "
                f"{len(blocks.ids)} in {blocks.name}; {_MORE_SEQUENCES}"
            )


def evaluate(
    stack: DecoderStack,
    fit: TokenBlocks,
    confirm: TokenBlocks,
    request: Request,
    *,
    heads: FittedHeads | None = None,
    propagation: Propagation = "frozen",
    batch_size: int = 8,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure early exit over layers, rules and thresholds, and judge it.

    Args:
        stack: The model.
        fit: Thresholds are fitted here.
        confirm: Every figure is measured here.
        request: What to evaluate.
        heads: Fitted heads; the logit lens where not given.
        propagation: What upper layers see of tokens that left.
        batch_size: Sequences per forward pass.
        seed: Of the random control and of the intervals.
        command: What the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call, both corpora.

    Returns:
        A record of kind `evaluation`.

    Raises:
        UsageError: Something that cannot be asked for, a rule that looks further down than a layer
            lies among it.
        CorpusError: Too few sequences for an interval, or too long ones.
        ModelError: The heads belong to another model, or a state is not finite.
    """
    request.check()
    check_seed(seed)
    check_split(fit, confirm)
    asked = [*itertools.product(request.layers, request.rules)]
    for layer, name in [*asked, *((point.layer, point.rule) for point in request.thresholds)]:
        check_layers({layer: find_rule(name)}, stack.num_layers)
    names = tuple(dict.fromkeys([*request.rules, *(p.rule for p in request.thresholds)]))
    layers = sorted({*request.layers, *(point.layer for point in request.thresholds)})
    controls = () if request.only_given else CONTROLS
    rules = {layer: [*names, *(c for c in controls if c not in names)] for layer in layers}
    _drop_too_wide(rules)
    # What is given is fitted on nothing.
    fitted_on = {} if request.only_given else {"fitted_on": to_plain(fit.provenance())}
    corpora = (confirm,) if request.only_given else (fit, confirm)
    evaluator = Evaluator(stack, rules, heads=heads, propagation=propagation, seed=seed)
    points, searched, fitted = [*request.thresholds], [], None
    if not request.only_given:
        fitted = evaluator.table(fit, batch_size=batch_size, progress=progress)
        searched = search(fitted, layers, names, request.agreement)
        points += [*_points(fitted, rules, request), *searched]
        points += _matched(fitted, points)
    points = list({(p.layer, p.rule, p.threshold): p for p in reversed(points)}.values())
    points.sort(key=lambda point: (point.layer, point.rule, point.threshold))
    rows, table = evaluator.run(confirm, points, batch_size=batch_size, progress=progress)
    return {
        "schema": 1,
        "kind": "evaluation",
        "provenance": to_plain(provenance_of(stack, confirm, command))
        | fitted_on
        | heads_provenance(heads, *corpora),
        "settings": {
            "propagation": propagation,
            "layers": layers,
            "rules": list(names),
            "hard_ratios": list(request.hard_ratios),
            "agreement": request.agreement,
            "perplexity_ratio": request.perplexity_ratio,
            "batch_size": batch_size,
            "seed": seed,
            "computes_every_token_because": evaluator.layers.reason,
            "interval": INTERVAL,
            "seconds": SECONDS,
        },
        "full": full_record(stack, table),
        "points": rows,
        "auroc": _auroc_rows(table, rules),
        "curves": None if fitted is None else _curves(fitted, table, points, seed),
        "search": _search_record(rows, searched, request.agreement),
        "verdict": _verdict(rows, request),
    }


def _verdict(rows: Sequence[dict[str, Any]], request: Request) -> dict[str, Any]:
    wanted = {"agreement": request.agreement, "perplexity_ratio": request.perplexity_ratio}
    if request.only_given:
        # Without controls a point has nothing to be better than.
        text = "Not judged: only the given points were measured, without controls."
        return judge([], **wanted) | {"headline": text}
    return judge(rows, **wanted)


#: How a row's seconds come about.
SECONDS = (
    "one process, every batch through the full model and through every point in turn; a point's "
    "time is that of the layers below its exit, of its rule and head on every token that they "
    "look at, and of the layers and the LM head above for the tokens that stayed (with exact "
    "propagation, of the layers for all tokens)"
)


#: Shares of exits that are one and the same to the random control: they differ by no more than
#: this part of them, and so does what leaving at random costs.
_SAME_SHARE = 0.05


def _drop_too_wide(rules: dict[int, list[str]]) -> None:
    """Leave out rules that look further down than there are layers: nobody asked for them there."""
    for layer, names in rules.items():
        rules[layer] = [name for name in names if find_rule(name).entries <= layer]


def _points(fitted: ExitTable, rules: dict[int, list[str]], request: Request) -> Iterator[Point]:
    for layer, names in rules.items():
        for name in names:
            if name in ("fixed", "oracle"):
                yield Point(layer, name, 0.5, "control")
                continue
            for ratio in request.hard_ratios:
                threshold = ratio
                if name != "random":
                    threshold = threshold_for(fitted.confidence[layer, name], ratio)
                yield Point(layer, name, threshold, f"hard ratio {ratio:g}")


def _matched(fitted: ExitTable, points: Sequence[Point]) -> list[Point]:
    """Return random controls for the points whose share of exits none of the others has."""
    found: list[Point] = []
    for point in points:
        if point.rule in CONTROLS:
            continue
        leaves = fitted.confidence[point.layer, point.rule] >= point.threshold
        # Where none leaves here, some may on the other sequences: one token, then.
        share = max(float(leaves.mean()), 1 / leaves.size)
        near = any(
            other.rule == "random"
            and other.layer == point.layer
            and abs(1 - other.threshold - share) <= _SAME_SHARE * share
            for other in (*points, *found)
        )
        if not near:
            found.append(Point(point.layer, "random", 1 - share, f"the share of {point.rule}"))
    return found


def threshold_for(confidence: Array, hard_ratio: float) -> float:
    """Return the threshold that sends about this share of the tokens on (see `fit_threshold`)."""
    return fit_threshold(confidence, hard_ratio, resamples=39).threshold


def search(
    table: ExitTable, layers: Sequence[int], rules: Sequence[str], agreement: float
) -> list[Point]:
    """Find, for every layer and rule, the lowest threshold that keeps a wanted agreement.

    On the table a token that stays agrees with the full model: with frozen or ridge propagation
    that is not quite so, and what is found has to be confirmed.

    Args:
        table: Of the corpus to fit on.
        layers: Exit layers.
        rules: Names of rules.
        agreement: The least share of all tokens whose prediction is the full model's.

    Returns:
        One point per layer and rule that lets any token exit.
    """
    points = []
    for layer, rule in itertools.product(layers, rules):
        if (layer, rule) not in table.confidence or rule in CONTROLS:
            continue
        found = lowest_threshold(table.confidence[layer, rule], table.agrees[layer], agreement)
        if found is not None:
            points.append(Point(layer, rule, found, f"agreement {agreement:g}"))
    return points


def full_record(stack: DecoderStack, table: ExitTable) -> dict[str, Any]:
    """Return what a record says of the full model.

    Args:
        stack: The model.
        table: Of the corpus that was measured on.
    """
    scored = table.full_log_probability[:, :-1]
    return {
        "perplexity": math.exp(-scored.mean(dtype=np.float64)),
        "tokens": int(table.full_log_probability.size),
        "scored_tokens": int(scored.size),
        "sequences": len(scored),
        "layers": stack.num_layers,
        "flops_per_token": full_flops(stack, *table.full_log_probability.shape)
        / table.full_log_probability.size,
    }


def _curves(
    fitted: ExitTable, table: ExitTable, points: Sequence[Point], seed: int
) -> dict[str, Any]:
    """Return what a search for another agreement needs: each layer's and rule's exit curve."""
    rows = []
    for layer, name in fitted.confidence:
        if name in CONTROLS:
            continue
        own = [p.threshold for p in points if (p.layer, p.rule) == (layer, name)]
        known = curve(
            (fitted.confidence[layer, name], fitted.agrees[layer]),
            (table.confidence[layer, name], table.agrees[layer]),
            own,
            seed=seed,
        )
        rows.append({"exit_layer": layer, "rule": name} | known)
    return {
        "fit_tokens": int(fitted.full_log_probability.size),
        "tokens": int(table.full_log_probability.size),
        "rows": rows,
    }


def _auroc_rows(table: ExitTable, rules: dict[int, list[str]]) -> list[dict[str, Any]]:
    return [
        {
            "exit_layer": layer,
            "rule": name,
            "head_agreement": float(table.agrees[layer].mean()),
            "auroc": auroc(table.confidence[layer, name], table.agrees[layer]),
        }
        for layer, names in rules.items()
        for name in names
        if name not in ("fixed", "oracle")
    ]


def _search_record(
    rows: Sequence[dict[str, Any]], searched: Sequence[Point], agreement: float
) -> dict[str, Any]:
    """Say which of the searched points saves most and keeps its promise on the other split."""
    keys = {(point.layer, point.rule, float(point.threshold)) for point in searched}
    found = [
        number
        for number, row in enumerate(rows)
        if (row["exit_layer"], row["rule"], row["threshold"]) in keys
    ]
    kept = [number for number in found if rows[number]["agreement"] >= agreement]
    best = min(kept, key=lambda number: rows[number]["flops_ratio"], default=None)
    return {
        "agreement": agreement,
        "points": found,
        "confirmed": kept,
        "best": best,
        "saves": best is not None and rows[best]["flops_ratio"] < 1,
    }


def auroc(confidence: Array, agrees: Array) -> float | None:
    """Return how well a confidence tells agreeing tokens from others: the area under the ROC.

    The probability that a token on which the exit head agrees with the full model has a larger
    confidence than one on which it does not, ties counting half (Mann and Whitney 1947).

    Args:
        confidence: Any shape.
        agrees: The same shape.

    Returns:
        In [0, 1], 0.5 being chance; None where all tokens are of one kind.
    """
    from scipy.stats import mannwhitneyu

    # In double precision: in fp32 the ranks' sum has too few digits for thousands of tokens.
    yes, no = (confidence[kind].ravel().astype(np.float64) for kind in (agrees, ~agrees))
    if not yes.size or not no.size:
        return None
    statistic = mannwhitneyu(yes, no, method="asymptotic").statistic
    return float(statistic / (yes.size * no.size))
