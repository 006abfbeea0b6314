"""Searches in stored evaluations, without measuring again what they contain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from msgspec import structs

from cascade.core.errors import RecordError
from cascade.core.provenance import CorpusProvenance
from cascade.core.records import at, read_typed
from cascade.core.schema import UnsetType, to_plain
from cascade.evaluation.exit_curves import lowest_kept
from cascade.evaluation.records import (
    EvaluationRecord,
    ExitCurve,
    ExitCurves,
    OperatingPointRow,
)
from cascade.evaluation.search.choice import SearchConfig, SearchOrigin, search_record
from cascade.evaluation.search.records import (
    EXACT_TABLE,
    TABLE,
    FitFigures,
    NoThreshold,
    SearchRecord,
    SearchSettings,
    SearchSource,
    TriedPoint,
    tried_point,
)
from cascade.evaluation.verdict import CONTROLS

#: Evaluations can be searched together only if these fields are equal.
_IDENTITY = (
    ("provenance", "model", "name"),
    ("provenance", "model", "weights_hash"),
    ("provenance", "model", "revision"),
    ("provenance", "model", "dtype"),
    ("provenance", "corpus", "fingerprint"),
    ("provenance", "fitted_on", "fingerprint"),
)

_BOS = ("provenance", "corpus", "bos")

#: Note for evaluations without exit curves, which can only answer for their own agreement.
_NO_CURVES = "it has no exit curves, so its thresholds are only valid for agreement {:g}"

_NO_THRESHOLD = "no threshold at which a token exits keeps it on the sequences to fit on"


@dataclass(frozen=True)
class StoredEvaluation:
    """One of the evaluations that are searched together.

    Attributes:
        name: Its name in reports (the path).
        source: Its index, from 0.
        record: The evaluation.
        fitted_on: The corpus that it fitted on.
    """

    name: str
    source: int
    record: EvaluationRecord
    fitted_on: CorpusProvenance

    @property
    def curves(self) -> ExitCurves | None:
        """Its exit curves, or None if it has none."""
        curves = self.record.curves
        return None if isinstance(curves, UnsetType) else curves


@dataclass(frozen=True)
class Answer:
    """The answer of a stored evaluation for a target agreement.

    Attributes:
        evaluation: The evaluation.
        points: The points that it ran or that its curves give.
        nothing: Layers and rules without a threshold that keeps the agreement.
        lacks: Why the evaluation cannot answer; None if it can.
    """

    evaluation: StoredEvaluation
    points: list[TriedPoint] = field(default_factory=list)
    nothing: list[NoThreshold] = field(default_factory=list)
    lacks: str | None = None

    @property
    def on_table(self) -> list[TriedPoint]:
        """The points that have not been run and may differ when they are."""
        return [point for point in self.points if point.only_on_table]


# --- Reading ---------------------------------------------------------------------------------


def read_evaluations(paths: Sequence[Path]) -> list[StoredEvaluation]:
    """Return stored evaluations that can be searched together.

    Args:
        paths: Files `evaluation.json`, or the folders that `cascade evaluate --output` wrote.

    Raises:
        RecordError: An evaluation is missing, torn or without fitted thresholds; or two have
            different models or corpora, or measured the same.
    """
    files = [path / "evaluation.json" if path.is_dir() else path for path in paths]
    evaluations = [
        _read(file, str(path), source)
        for source, (file, path) in enumerate(zip(files, paths, strict=True))
    ]
    _check_alike(files, evaluations)
    return evaluations


def _read(file: Path, name: str, source: int) -> StoredEvaluation:
    record = read_typed(file, EvaluationRecord)
    fitted_on = record.provenance.fitted_on
    if isinstance(fitted_on, UnsetType):
        raise RecordError(
            f"{file} contains only given operating points, without fitted thresholds; create a "
            "record with `cascade evaluate --output`, without --only-points"
        )
    return StoredEvaluation(name, source, record, fitted_on)


def _check_alike(files: Sequence[Path], evaluations: Sequence[StoredEvaluation]) -> None:
    plain = [to_plain(evaluation.record) for evaluation in evaluations]
    for path, record in zip(files[1:], plain[1:], strict=True):
        for place in _IDENTITY:
            expected, got = at(plain[0], place), at(record, place)
            if expected != got:
                begun = [at(side, _BOS) == "yes" for side in (plain[0], record)]
                if place[-1] == "fingerprint" and begun[0] != begun[1]:
                    raise RecordError(
                        f"{path} was measured on text {'with' if begun[1] else 'without'} BOS, and "
                        f"{files[0]} {'with' if begun[0] else 'without'}; search evaluations of "
                        "text read with one --bos"
                    )
                raise RecordError(
                    f"{path} and {files[0]} differ in {' '.join(place[1:])} ({got} and {expected});"
                    " search evaluations of one model on one corpus"
                )
    seen: dict[tuple[int, str, str, str | None], Path] = {}
    for path, evaluation in zip(files, evaluations, strict=True):
        settings, provenance = evaluation.record.settings, evaluation.record.provenance
        for layer in settings.layers:
            for rule in settings.rules:
                key = (layer, rule, settings.propagation, provenance.heads_fingerprint)
                if key in seen:
                    raise RecordError(
                        f"{path} and {seen[key]} both measured layer {layer} with {rule} and the "
                        "same heads and propagation; omit one of them"
                    )
                seen[key] = path


# --- Answering -------------------------------------------------------------------------------


def answer(evaluation: StoredEvaluation, config: SearchConfig) -> Answer:
    """Return the answer of a stored evaluation for a target agreement, without a forward pass.

    With exit curves, the candidates of every layer and rule are the lowest threshold of the curve
    that keeps the agreement on the sequences to fit on, and every higher threshold that was run. A
    threshold of a curve that was not run is confirmed only by the table, which is exact with exact
    propagation. An evaluation without curves can only answer for its own agreement.

    Args:
        evaluation: The evaluation (see `read_evaluations`).
        config: The options of the search.
    """
    own = evaluation.record.settings.agreement
    if evaluation.curves is None and own != config.agreement:
        return Answer(evaluation, lacks=_NO_CURVES.format(own))
    points: list[TriedPoint] = []
    nothing: list[NoThreshold] = []
    for pair in _pairs(evaluation, config):
        lowest = pair.lowest
        points += pair.run_points()
        if lowest is None:
            nothing.append(pair.no_threshold())
        elif pair.curve is not None and all(row.threshold != lowest for row in pair.rows):
            points.append(pair.table_point(pair.curve, lowest))
    return Answer(evaluation, points, nothing)


def _pairs(evaluation: StoredEvaluation, config: SearchConfig) -> list[_Pair]:
    """Return every layer and rule of an evaluation, in the order of its points, then its curves."""
    record, curves = evaluation.record, evaluation.curves
    rows: dict[tuple[int, str], list[OperatingPointRow]] = {}
    for row in record.points:
        if row.rule not in CONTROLS:
            rows.setdefault((row.exit_layer, row.rule), []).append(row)
    known = {(row.exit_layer, row.rule): row for row in (curves.rows if curves else ())}
    searched = {
        (row.exit_layer, row.rule): row.threshold
        for row in (record.points[number] for number in record.search.points)
    }
    found = []
    for layer, rule in dict.fromkeys([*rows, *known]):
        curve, lowest = known.get((layer, rule)), searched.get((layer, rule))
        if curve is not None and curves is not None:
            place = lowest_kept(curve, curves.fit_tokens, config.agreement)
            lowest = None if place is None else curve.thresholds[place]
        own = rows.get((layer, rule), [])
        found.append(_Pair(evaluation, config.agreement, layer, rule, own, curve, lowest))
    return found


@dataclass(frozen=True)
class _Pair:
    """A layer and rule of a stored evaluation.

    Attributes:
        evaluation: The evaluation.
        agreement: The target share of agreeing tokens.
        layer: The exit layer.
        rule: The name of the rule.
        rows: Its operating points that were run.
        curve: Its exit curve, or None.
        lowest: The lowest threshold that keeps the agreement on the sequences to fit on, or None.
    """

    evaluation: StoredEvaluation
    agreement: float
    layer: int
    rule: str
    rows: list[OperatingPointRow]
    curve: ExitCurve | None
    lowest: float | None

    def run_points(self) -> list[TriedPoint]:
        """Return the points that were run."""
        fits = self._fits()
        return [
            tried_point(
                row,
                fits.get(row.threshold, FitFigures(None, None, "table")),
                propagation=self.evaluation.record.settings.propagation,
                source=self.evaluation.source,
                # In the table, the agreement never decreases with the threshold. A given threshold
                # may have been chosen with the sequences that would confirm it.
                candidate=self.lowest is not None
                and row.threshold >= self.lowest
                and row.threshold_from != "given",
            )
            for row in self.rows
        ]

    def no_threshold(self) -> NoThreshold:
        """Return the row for a layer and rule without a threshold that keeps the agreement."""
        return NoThreshold(
            exit_layer=self.layer,
            rule=self.rule,
            head=self._head(),
            propagation=self.evaluation.record.settings.propagation,
            source=self.evaluation.source,
            why=_NO_THRESHOLD,
        )

    def table_point(self, curve: ExitCurve, threshold: float) -> TriedPoint:
        """Return a point of the curve that was not run.

        Its costs are interpolated by a straight line through the points that were run.

        Args:
            curve: The exit curve.
            threshold: One of its thresholds.
        """
        curves, place = self.evaluation.curves, curve.thresholds.index(threshold)
        tokens = curves.tokens if curves else 1
        share, fit = curve.exits[place] / tokens, self._fits()[threshold]
        propagation = self.evaluation.record.settings.propagation
        return TriedPoint(
            exit_layer=self.layer,
            rule=self.rule,
            head=self._head(),
            threshold=threshold,
            threshold_from=f"agreement {self.agreement:g}, on the curve",
            exit_share=share,
            agreement=(tokens - curve.wrong[place]) / tokens,
            agreement_interval=[curve.low[place], curve.high[place]],
            perplexity_ratio=None,
            layers_per_token=self._cost_at(share, [row.layers_per_token for row in self.rows]),
            flops_ratio=self._cost_at(share, [row.flops_ratio for row in self.rows]),
            seconds_ratio=self._cost_at(share, [row.seconds_ratio for row in self.rows]),
            seconds_ratio_interval=None,
            propagation=propagation,
            source=self.evaluation.source,
            fit_exit_share=fit.exit_share,
            fit_agreement=fit.agreement,
            fit_by=fit.by,
            candidate=True,
            confirmed_by=EXACT_TABLE if propagation == "exact" else TABLE,
        )

    def _fits(self) -> dict[float, FitFigures]:
        """Return the figures on the sequences to fit on for each threshold of the curve."""
        curve, curves = self.curve, self.evaluation.curves
        if curve is None or curves is None:
            return {}
        tokens = curves.fit_tokens
        return {
            threshold: FitFigures(exits / tokens, (tokens - wrong) / tokens, "table")
            for threshold, exits, wrong in zip(
                curve.thresholds, curve.fit_exits, curve.fit_wrong, strict=True
            )
        }

    def _head(self) -> str:
        rows = (*self.rows, *self.evaluation.record.points)
        return rows[0].head if rows else "logit_lens"

    def _cost_at(self, share: float, costs: Sequence[float]) -> float | None:
        """Return the cost at an exit share, which is linear in the share of continuing tokens.

        Args:
            share: The share of tokens that exit.
            costs: The cost of each row.
        """
        shares = np.array([row.exit_share for row in self.rows])
        if len(np.unique(shares)) < 2:
            return None
        slope, start = np.polyfit(shares, costs, 1)
        return max(0.0, float(start + slope * share))


# --- The record ------------------------------------------------------------------------------


def search_evaluations(
    answers: Sequence[Answer], config: SearchConfig, *, command: str | None = None
) -> SearchRecord:
    """Return the record of a search in stored evaluations.

    Args:
        answers: The answers of evaluations of one model and corpus (see `answer`).
        config: The options of the search.
        command: The command that the user ran, for the provenance.

    Raises:
        RecordError: An evaluation cannot answer for the target agreement.
    """
    for one in answers:
        if one.lacks is not None:
            raise RecordError(
                f"{one.evaluation.name} has no thresholds for agreement {config.agreement:g}: "
                f"{one.lacks}; measure them with --measure, or evaluate again"
            )
    records = [one.evaluation.record for one in answers]
    origin = SearchOrigin(
        provenance=structs.replace(records[0].provenance, command=command),
        settings=_settings(records, config),
        sources=[_source(one) for one in answers],
        full=records[0].full,
    )
    points = [point for one in answers for point in one.points]
    return search_record(origin, points, [row for one in answers for row in one.nothing], config)


def _settings(records: Sequence[EvaluationRecord], config: SearchConfig) -> SearchSettings:
    first = records[0].settings
    return SearchSettings(
        agreement=config.agreement,
        risk=config.bound,
        confidence=config.confidence,
        layers=sorted({layer for record in records for layer in record.settings.layers}),
        rules=list(dict.fromkeys(name for record in records for name in record.settings.rules)),
        batch_size=first.batch_size,
        seed=first.seed,
        computes_every_token_because=first.computes_every_token_because,
        interval=first.interval,
        seconds=first.seconds,
    )


def _source(one: Answer) -> SearchSource:
    name, record = one.evaluation.name, one.evaluation.record
    propagation, on_table = record.settings.propagation, len(one.on_table)
    run = len(one.points) - on_table
    from_curves = f", {on_table} taken from its curves" if on_table else ""
    return SearchSource(
        name=name,
        command=record.provenance.command,
        heads_fingerprint=record.provenance.heads_fingerprint,
        propagation=propagation,
        words=f"{name}: {run} points that were run{from_curves}, {propagation} propagation",
    )
