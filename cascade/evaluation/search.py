"""The best exit layer: layer x rule x threshold, fitted on one split, confirmed on another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cascade.core.arguments import check_seed
from cascade.core.errors import RecordError, UsageError
from cascade.core.provenance import provenance_of
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import Propagation
from cascade.evaluation.exit_curves import exits_and_wrong, lowest_threshold, threshold_of_share
from cascade.evaluation.exit_evaluation import SECONDS, check_split, full_record
from cascade.evaluation.exit_table import ExitTable
from cascade.evaluation.operating_points import INTERVAL, Evaluator, OperatingPoint
from cascade.evaluation.search_choice import TABLE, Wish, point_row, search_record
from cascade.evaluation.stored_evaluations import Found
from cascade.evaluation.verdict import CONTROLS
from cascade.exits.fitted_heads import FittedHeads, heads_provenance
from cascade.exits.rules import check_layers, find_rule
from cascade.models.stack import DecoderStack

Row = dict[str, Any]
Progress = Callable[[int], None] | None

#: Parts of the boldest exit share that are tried as well: a more cautious threshold may be
#: confirmed where the boldest is not, and together they draw a curve.
_PARTS = (1.0, 2 / 3, 1 / 3)

#: Why nothing may leave by a layer and rule.
_NOT_ON_THE_TABLE = "no threshold that lets a token leave keeps it on the sequences to fit on"
_NOT_BY_RUNNING = "none of the thresholds that keep it on the table kept it when they were run"


def search_exits(
    stack: DecoderStack,
    fit: TokenBlocks,
    confirm: TokenBlocks,
    wish: Wish,
    *,
    layers: Sequence[int],
    rules: Sequence[str] = ("cosine", "top2_gap"),
    heads: FittedHeads | None = None,
    propagation: Propagation = "frozen",
    batch_size: int = 8,
    seed: int = 0,
    command: str | None = None,
    progress: Progress = None,
) -> Row:
    """Search the exit layer, rule and threshold that save most and keep an agreement.

    One table on the sequences to fit on gives, for every layer and rule, the lowest threshold
    that keeps the agreement if every token that stays is predicted as by the full model. With
    exact propagation it is. With any other, that threshold and two more cautious ones are run on
    the same sequences, and the table is corrected by how many tokens more they predicted
    otherwise, in proportion between them: the lowest threshold that then keeps the agreement is
    tried as well. All are run on the sequences to confirm on.

    Args:
        stack: The model.
        fit: Thresholds are fitted here.
        confirm: Every figure is measured here.
        wish: The wanted agreement, and the risk to certify.
        layers: Exit layers.
        rules: Names of the rules.
        heads: Fitted heads; the logit lens where not given.
        propagation: What upper layers see of tokens that left.
        batch_size: Sequences per forward pass.
        seed: Of the intervals.
        command: What the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call.

    Returns:
        A record of kind `exit-search`.

    Raises:
        UsageError: Something that cannot be asked for.
        CorpusError: Too few sequences for an interval, or too long ones.
        ModelError: The heads belong to another model, or a state is not finite.
    """
    wish.check()
    check_seed(seed)
    check_split(fit, confirm)
    pairs = _pairs(stack, layers, rules)
    by_layer: dict[int, list[str]] = {}
    for layer, rule in pairs:
        by_layer.setdefault(layer, []).append(rule)
    evaluator = Evaluator(stack, by_layer, heads=heads, propagation=propagation, seed=seed)
    fits, nothing = _fit(evaluator, fit, pairs, wish.agreement, batch_size, progress)
    rows, table = evaluator.run(
        confirm, [one.point for one in fits], batch_size=batch_size, progress=progress
    )
    points = [
        point_row(
            to_plain(row),
            propagation=propagation,
            source=0,
            fit=(one.exit_share, one.agreement, one.by),
            candidate=one.agreement >= wish.agreement,
        )
        for row, one in zip(rows, fits, strict=True)
    ]
    parts = {
        "provenance": to_plain(provenance_of(stack, confirm, command))
        | {"fitted_on": to_plain(fit.provenance())}
        | heads_provenance(heads, fit, confirm),
        "settings": {
            "layers": sorted({layer for layer, _ in pairs}),
            "rules": list(dict.fromkeys(rule for _, rule in pairs)),
            "batch_size": batch_size,
            "seed": seed,
            "computes_every_token_because": evaluator.layers.reason,
            "interval": INTERVAL,
            "seconds": SECONDS,
        },
        "sources": [],
        "full": to_plain(full_record(stack, table)),
    }
    left_out = [
        {
            "exit_layer": layer,
            "rule": rule,
            "head": evaluator.exits[layer].head.name,
            "propagation": propagation,
            "source": 0,
            "why": why,
        }
        for (layer, rule), why in nothing.items()
    ]
    return search_record(parts, points, left_out, wish)


def tokens_to_read(fit: TokenBlocks, confirm: TokenBlocks, propagation: str) -> int:
    """Return how many tokens `search_exits` goes through, which `progress` adds up to.

    Args:
        fit: The sequences to fit on.
        confirm: Those to confirm on.
        propagation: What upper layers see of tokens that left.
    """
    return confirm.tokens + fit.tokens * (1 if propagation == "exact" else 2)


def _pairs(
    stack: DecoderStack, layers: Sequence[int], rules: Sequence[str]
) -> list[tuple[int, str]]:
    """Return every layer with every rule, once; refuse what cannot be searched."""
    if not layers or not rules:
        raise UsageError("expected at least one exit layer and one rule to search; name some")
    for name in rules:
        if name in CONTROLS:
            raise UsageError(
                f"the rule {name} is a control, which nobody runs to save work; search another rule"
            )
        find_rule(name)
    pairs = list(dict.fromkeys(itertools.product(layers, rules)))
    for layer, name in pairs:
        check_layers({layer: find_rule(name)}, stack.num_layers)
    return pairs


def measure_lacking(
    stack: DecoderStack,
    record: Row,
    found: Found,
    fit: TokenBlocks,
    confirm: TokenBlocks,
    wish: Wish,
    *,
    heads: FittedHeads | None = None,
    source: int = 0,
    progress: Progress = None,
) -> Found:
    """Measure what a stored evaluation lacks, as its own settings say, and nothing else.

    Args:
        stack: The model.
        record: Of kind `evaluation`.
        found: What it says of the wanted agreement.
        fit: The sequences that it fitted on.
        confirm: Those that it measured on.
        wish: What is searched for.
        heads: Those that it was made with.
        source: Its number among the records.
        progress: Called with the number of tokens done since the last call.

    Raises:
        RecordError: The model, the text or the heads are not those of the record.
        ModelError: A state is not finite.
    """
    check_same(stack, record, fit, confirm, heads)
    settings = record["settings"]
    if found.lacks is not None:
        made = search_exits(
            stack,
            fit,
            confirm,
            wish,
            layers=settings["layers"],
            rules=[name for name in settings["rules"] if name not in CONTROLS],
            heads=heads,
            propagation=settings["propagation"],
            batch_size=settings["batch_size"],
            seed=settings["seed"],
            progress=progress,
        )
        points, nothing = made["points"], made["nothing"]
        return Found([row | {"source": source} for row in points], _of(source, nothing))
    evaluator = Evaluator(
        stack,
        dict.fromkeys(settings["layers"], settings["rules"]),
        heads=heads,
        propagation=settings["propagation"],
        seed=settings["seed"],
    )
    table = found.on_table
    points = [OperatingPoint(*(row[name] for name in _POINT)) for row in table]
    rows, _ = evaluator.run(confirm, points, batch_size=settings["batch_size"], progress=progress)
    run = [
        point_row(
            to_plain(row),
            propagation=settings["propagation"],
            source=source,
            fit=(old["fit_exit_share"], old["fit_agreement"], old["fit_by"]),
            candidate=True,
        )
        for row, old in zip(rows, table, strict=True)
    ]
    rest = [row for row in found.points if row["confirmed_by"] != TABLE]
    return Found([*rest, *run], found.nothing)


_POINT = ("exit_layer", "rule", "threshold", "threshold_from")


def _of(source: int, rows: Sequence[Row]) -> list[Row]:
    return [row | {"source": source} for row in rows]


def check_same(
    stack: DecoderStack,
    record: Row,
    fit: TokenBlocks,
    confirm: TokenBlocks,
    heads: FittedHeads | None,
) -> None:
    """Refuse to complete an evaluation with another model, text or heads than it was made with.

    Args:
        stack: The model.
        record: Of kind `evaluation`.
        fit: The sequences that it fitted on.
        confirm: Those that it measured on.
        heads: Those that it was made with.

    Raises:
        RecordError: Something differs; names what.
    """
    provenance = record["provenance"]
    expected = provenance["model"]
    own = to_plain(stack.provenance)
    fingerprint = None if heads is None else heads.fingerprint()
    for what, was, now in (
        *((name, expected.get(name), own.get(name)) for name in _MODEL),
        ("text to fit on", provenance["fitted_on"]["fingerprint"], fit.fingerprint()),
        ("text to confirm on", provenance["corpus"]["fingerprint"], confirm.fingerprint()),
        ("heads", provenance.get("heads_fingerprint"), fingerprint),
    ):
        if was != now:
            raise RecordError(
                f"expected the record's own {what}, {was}, to measure what it lacks; got {now}: "
                "name what it was made with, or evaluate anew"
            )


#: What of a model two runs must share.
_MODEL = ("family", "num_layers", "hidden_size", "revision", "dtype", "weights_hash")


@dataclass(frozen=True)
class _Fitted:
    """A threshold, and what the sequences to fit on say of it."""

    point: OperatingPoint
    exit_share: float
    agreement: float
    by: str


def _fit(
    evaluator: Evaluator,
    fit: TokenBlocks,
    pairs: Sequence[tuple[int, str]],
    agreement: float,
    batch_size: int,
    progress: Progress,
) -> tuple[list[_Fitted], dict[tuple[int, str], str]]:
    """Return thresholds to confirm, and why some layers and rules have none."""
    table = evaluator.table(fit, batch_size=batch_size, progress=progress)
    found: list[_Fitted] = []
    nothing: dict[tuple[int, str], str] = {}
    for pair in pairs:
        own = _on_the_table(table, pair, agreement)
        found += own
        if not own:
            nothing[pair] = _NOT_ON_THE_TABLE
    if evaluator.propagation == "exact":
        return found, nothing
    if not found:
        if progress is not None:
            progress(fit.tokens)
        return found, nothing
    rows, _ = evaluator.run(
        fit, [one.point for one in found], batch_size=batch_size, progress=progress
    )
    run: dict[tuple[int, str], list[_Fitted]] = {}
    more: dict[tuple[int, str], list[float]] = {}
    for one, row in zip(found, rows, strict=True):
        pair = one.point.layer, one.point.rule
        run.setdefault(pair, []).append(
            _Fitted(one.point, row["exit_share"], row["agreement"], "running")
        )
        more.setdefault(pair, []).append(one.agreement - row["agreement"])
    for pair, own in run.items():
        corrected = _corrected(table, pair, own, more[pair], agreement)
        if corrected is not None:
            own.append(corrected)
        if not any(one.agreement >= agreement for one in own):
            nothing[pair] = _NOT_BY_RUNNING
    return [one for own in run.values() for one in own], nothing


def _on_the_table(table: ExitTable, pair: tuple[int, str], agreement: float) -> list[_Fitted]:
    """Return the lowest threshold that keeps the agreement, and more cautious ones."""
    layer, rule = pair
    confidence, agrees = table.confidence[pair], table.agrees[layer]
    lowest = lowest_threshold(confidence, agrees, agreement)
    if lowest is None:
        return []
    share = exits_and_wrong(confidence, agrees, lowest)[0] / confidence.size
    thresholds = {threshold_of_share(confidence, part * share) for part in _PARTS}
    found = []
    for threshold in sorted(thresholds):
        exits, wrong = exits_and_wrong(confidence, agrees, threshold)
        source = f"agreement {agreement:g}" if threshold == lowest else "more cautious"
        found.append(
            _Fitted(
                OperatingPoint(layer, rule, threshold, source),
                exits / confidence.size,
                (confidence.size - wrong) / confidence.size,
                "table",
            )
        )
    return found


def _corrected(
    table: ExitTable,
    pair: tuple[int, str],
    run: Sequence[_Fitted],
    more: Sequence[float],
    agreement: float,
) -> _Fitted | None:
    """Return the lowest threshold that keeps the agreement on the table as running corrects it.

    Args:
        table: Of the sequences to fit on.
        pair: Exit layer and rule.
        run: Thresholds that were run.
        more: The share of all tokens that each of them predicted otherwise beside those that the
            table knows of.
        agreement: The wanted one.
    """
    layer, rule = pair
    confidence, agrees = table.confidence[pair], table.agrees[layer]
    size = confidence.size
    order = np.argsort([one.exit_share for one in run])
    shares = [0.0, *(run[place].exit_share for place in order)]
    losses = [0.0, *(more[place] for place in order)]

    def more_wrong(exits: Any) -> Any:
        return size * np.interp(exits / size, shares, losses)

    lowest = lowest_threshold(confidence, agrees, agreement, more_wrong=more_wrong)
    if lowest is None or any(one.point.threshold == lowest for one in run):
        return None
    exits, wrong = exits_and_wrong(confidence, agrees, lowest)
    lost = wrong + float(more_wrong(np.array([exits]))[0])
    return _Fitted(
        OperatingPoint(layer, rule, lowest, f"agreement {agreement:g}, corrected"),
        exits / size,
        (size - lost) / size,
        "table, corrected by running",
    )
