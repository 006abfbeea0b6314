"""The choice of an exit layer: the cheapest tried point that keeps a target agreement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascade.core.arguments import check_seed
from cascade.core.errors import UsageError
from cascade.core.formatting import percent
from cascade.core.schema import to_plain
from cascade.evaluation.records import ExitProvenance, FullModelFigures
from cascade.evaluation.search.records import (
    KEPT,
    LOST,
    SIGNIFICANT,
    ExitVariant,
    NoThreshold,
    Outcome,
    SearchCertificate,
    SearchedPoint,
    SearchRecord,
    SearchSettings,
    SearchSource,
    SearchVerdict,
    TriedPoint,
    VariantResult,
)
from cascade.evaluation.verdict import is_faster
from cascade.stats.certificates import (
    MIN_RISK,
    certify_means,
    check_certifiable,
    risk_bound,
    sequences_needed,
)

if TYPE_CHECKING:
    from cascade.decoding.early_exit import Propagation


@dataclass(frozen=True)
class SearchConfig:
    """The options of a search.

    A search of stored evaluations takes layers, rules, propagation, batch size and seed from their
    settings.

    Attributes:
        agreement: The minimum share of all tokens whose prediction is the full model's.
        risk: The largest mean share of tokens that may be predicted differently, to be certified
            (default: 1 - agreement).
        confidence: The probability with which all certificates hold together.
        layers: Exit layers.
        rules: Names of the rules.
        propagation: How upper layers get keys and values of exited tokens: "frozen", "ridge" or
            "exact".
        batch_size: Sequences per forward pass.
        seed: Seed of the intervals.

    Example:
        >>> SearchConfig(agreement=0.95).bound
        0.05
    """

    agreement: float = 0.95
    risk: float | None = None
    confidence: float = 0.95
    layers: tuple[int, ...] = ()
    rules: tuple[str, ...] = ("cosine", "top2_gap")
    propagation: Propagation = "frozen"
    batch_size: int = 8
    seed: int = 0

    def check(self) -> None:
        """Check that the options are valid.

        Raises:
            UsageError: A share or the seed is out of range.
        """
        if not 0 <= self.agreement <= 1:
            raise UsageError(f"expected a share of agreement in 0..1, got {self.agreement:g}")
        check_certifiable(self.risk, self.confidence)
        check_seed(self.seed)

    @property
    def bound(self) -> float | None:
        """The risk to certify, or None if 1 - agreement is not a valid risk."""
        if self.risk is not None:
            return self.risk
        # Rounded, since 1 - 0.95 is slightly more than 0.05 in floats.
        risk = round(1 - self.agreement, 12)
        return risk if MIN_RISK <= risk < 1 else None


@dataclass(frozen=True)
class Choice:
    """The result of `choose`; numbers are indices of `points`. See `SearchRecord`."""

    points: list[SearchedPoint]
    pairs: list[VariantResult]
    best: int | None
    best_beyond_doubt: int | None
    best_on_table: int | None
    nearest: int | None
    certificate: SearchCertificate
    verdict: SearchVerdict


@dataclass(frozen=True)
class SearchOrigin:
    """The fields of a search record that do not depend on the choice."""

    provenance: ExitProvenance
    settings: SearchSettings
    sources: list[SearchSource]
    full: FullModelFigures


def search_record(
    origin: SearchOrigin,
    points: Iterable[TriedPoint],
    nothing: Iterable[NoThreshold],
    config: SearchConfig,
) -> SearchRecord:
    """Return the record of a search.

    Args:
        origin: The origin of the points.
        points: The points that were tried.
        nothing: Layers and rules without a threshold that keeps the agreement.
        config: The options of the search.
    """
    rows = sorted(
        points, key=lambda point: (point.exit_layer, point.rule, point.source, point.threshold)
    )
    without_threshold = list(nothing)
    found = choose(rows, without_threshold, config, sequences=origin.full.sequences)
    return SearchRecord(
        provenance=origin.provenance,
        settings=origin.settings,
        sources=origin.sources,
        full=origin.full,
        points=found.points,
        nothing=without_threshold,
        pairs=found.pairs,
        best=found.best,
        best_beyond_doubt=found.best_beyond_doubt,
        best_on_table=found.best_on_table,
        nearest=found.nearest,
        certificate=found.certificate,
        verdict=found.verdict,
    )


def choose(
    tried: Sequence[TriedPoint],
    nothing: Sequence[NoThreshold],
    config: SearchConfig,
    *,
    sequences: int,
) -> Choice:
    """Return the cheapest points that keep an agreement, and the certified points.

    A **candidate** is a threshold at which the sequences to fit on keep the agreement. It was
    chosen without the sequences to confirm on. The best candidate is the cheapest in operations
    among those whose point estimate on the sequences to confirm on keeps the agreement; candidates
    that are significantly faster than the full model come first. A second choice requires that the
    whole 95 % interval keeps the agreement.

    All M candidates are tested on the same sequences, each at level (1 - confidence) / M. The
    family-wise error is then at most 1 - confidence, and the best may be chosen after testing
    (Bonferroni; Learn then Test, Angelopoulos et al. 2021, arXiv:2110.01052, section 2).

    Args:
        tried: The points that were tried.
        nothing: Layers and rules without a threshold that keeps the agreement.
        config: The options of the search.
        sequences: The number of sequences to confirm on.
    """
    tests = _RiskTests.of(tried, config, sequences)
    points = [_judged(point, config, tests) for point in tried]
    candidates = [number for number, point in enumerate(points) if point.candidate]
    run = [number for number in candidates if not points[number].only_on_table]
    on_table = [number for number in candidates if points[number].only_on_table]

    def cheapest(numbers: Sequence[int], *outcomes: Outcome) -> int | None:
        kept = [number for number in numbers if points[number].outcome in outcomes]
        return min(kept, key=lambda number: _price(points[number]), default=None)

    best = cheapest(run, KEPT, SIGNIFICANT)
    best_significant = cheapest(run, SIGNIFICANT)
    best_on_table = cheapest(on_table, KEPT, SIGNIFICANT)
    nearest = max(
        candidates,
        key=lambda number: (points[number].agreement, -_operations(points[number])),
        default=None,
    )
    texts = _Texts(points, config.agreement)
    return Choice(
        points=points,
        pairs=_variant_results(points, nothing),
        best=best,
        best_beyond_doubt=best_significant,
        best_on_table=best_on_table,
        nearest=nearest,
        certificate=_certificate(points, tests),
        verdict=SearchVerdict(
            exit=best is not None and _is_faster(points[best]),
            headline=texts.headline(best, nearest),
            also=[
                *texts.interval(best, best_significant),
                *texts.cheaper_by_table(best, best_on_table),
            ],
        ),
    )


def _is_faster(point: TriedPoint) -> bool:
    return is_faster(point.seconds_ratio_interval, point.flops_ratio)


def _outcome(point: TriedPoint, agreement: float) -> Outcome:
    if point.agreement_interval[0] >= agreement and point.agreement >= agreement:
        return SIGNIFICANT
    return KEPT if point.agreement >= agreement else LOST


def _operations(point: TriedPoint) -> float:
    return math.inf if point.flops_ratio is None else point.flops_ratio


def _price(point: TriedPoint) -> tuple[bool, float]:
    return not _is_faster(point), _operations(point)


def _variant_results(
    points: Sequence[SearchedPoint], nothing: Sequence[NoThreshold]
) -> list[VariantResult]:
    """Return, for every layer and rule, the lowest candidate and the lowest confirmed ones."""
    candidates: dict[ExitVariant, list[int]] = {}
    for number, point in enumerate(points):
        if point.candidate:
            candidates.setdefault(point.variant, []).append(number)
    found = []
    for variant, numbers in candidates.items():
        numbers.sort(key=lambda number: points[number].threshold)
        found.append(
            VariantResult(
                **to_plain(variant),
                fitted=numbers[0],
                kept=_first(points, numbers, KEPT, SIGNIFICANT),
                beyond_doubt=_first(points, numbers, SIGNIFICANT),
            )
        )
    for row in nothing:
        shared = {name: getattr(row, name) for name in ExitVariant.__struct_fields__}
        found.append(VariantResult(**shared, fitted=None, kept=None, beyond_doubt=None))
    return sorted(found, key=lambda row: (row.exit_layer, row.rule, row.source))


def _first(
    points: Sequence[SearchedPoint], numbers: Sequence[int], *outcomes: Outcome
) -> int | None:
    return next((number for number in numbers if points[number].outcome in outcomes), None)


# --- Certificates ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _RiskTests:
    """The risk tests of all candidates.

    Attributes:
        tested: The number of candidates that are tested.
        confidence_each: The confidence of each test, at which all hold together.
        sequences: The number of sequences that they are tested on.
        risk: The risk to certify, or None.
    """

    tested: int
    confidence_each: float
    sequences: int
    risk: float | None

    @classmethod
    def of(cls, points: Sequence[TriedPoint], config: SearchConfig, sequences: int) -> _RiskTests:
        tested = sum(map(_is_tested, points))
        each = 1 - (1 - config.confidence) / max(1, tested)
        return cls(tested, each, sequences, config.bound)

    def bound(self, loss: float) -> float:
        """Return the lowest risk that a mean loss certifies."""
        return risk_bound(loss, sequences=self.sequences, confidence=self.confidence_each)

    def certifies(self, threshold: float, loss: float) -> bool | None:
        """Return whether a mean loss certifies the risk, or None without a risk to certify."""
        if self.risk is None:
            return None
        return bool(
            certify_means(
                np.array([threshold]),
                np.array([loss]),
                sequences=self.sequences,
                risk=self.risk,
                confidence=self.confidence_each,
            ).certified
        )


def _is_tested(point: TriedPoint) -> bool:
    # A table does not measure the loss of continuing tokens.
    return point.candidate and not point.only_on_table


def _judged(point: TriedPoint, config: SearchConfig, tests: _RiskTests) -> SearchedPoint:
    """Return a point with its outcome and, if it is tested, its risk."""
    tested, loss = _is_tested(point), 1 - point.agreement
    return SearchedPoint(
        **{name: getattr(point, name) for name in TriedPoint.__struct_fields__},
        outcome=_outcome(point, config.agreement),
        risk_bound=tests.bound(loss) if tested else None,
        certified=tests.certifies(point.threshold, loss) if tested else None,
    )


def _certificate(points: Sequence[SearchedPoint], tests: _RiskTests) -> SearchCertificate:
    certified = [number for number, point in enumerate(points) if point.certified]
    needed = None if tests.risk is None else sequences_needed(tests.risk, tests.confidence_each)
    return SearchCertificate(
        tested=tests.tested,
        confidence_each=tests.confidence_each,
        sequences=tests.sequences,
        sequences_needed=needed,
        certified=certified,
        best=min(certified, key=lambda number: _price(points[number]), default=None),
    )


# --- Texts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    """Sentences about the points of a search for a target agreement."""

    points: Sequence[SearchedPoint]
    agreement: float

    def headline(self, best: int | None, nearest: int | None) -> str:
        """Return which point to exit at, or why no point is worth it."""
        wanted = percent(self.agreement)
        if best is not None:
            return self._best(self.points[best])
        if nearest is None:
            return (
                f"No early exit keeps {wanted} agreement. No layer and rule has a threshold at "
                "which a token exits and the agreement is kept."
            )
        point = self.points[nearest]
        by = "estimated from the table" if point.only_on_table else "measured"
        return (
            f"No measured point keeps {wanted} agreement. The nearest one is {_exit(point)} "
            f"(agreement {percent(point.agreement)}, {by}), at {_cost(point)}."
        )

    def _best(self, point: SearchedPoint) -> str:
        wanted = percent(self.agreement)
        if _is_faster(point):
            return (
                f"Exit at {_exit(point)}. It predicts {percent(point.agreement)} of all tokens as "
                f"the full model does (target: {wanted}), at {_cost(point)}."
            )
        saves = (
            "is significantly faster than the full model"
            if _operations(point) < 1
            else "takes fewer operations than the full model"
        )
        return (
            f"No early exit that keeps {wanted} agreement {saves}. The cheapest one is "
            f"{_exit(point)} (agreement {percent(point.agreement)}), at {_cost(point)}."
        )

    def interval(self, best: int | None, significant: int | None) -> list[str]:
        """Return which point is chosen if the whole interval has to keep the agreement."""
        if best is None or best == significant:
            return []
        text = (
            f"The 95 % interval of its agreement, {_ends(self.points[best])}, starts below the "
            f"target of {percent(self.agreement)}. "
        )
        if significant is None:
            return [f"{text}No point's whole interval keeps it. Use more sequences to decide."]
        point = self.points[significant]
        return [
            f"{text}The cheapest one whose whole interval keeps it is {_exit(point)} "
            f"({_ends(point)}), at {_cost(point)}."
        ]

    def cheaper_by_table(self, best: int | None, on_table: int | None) -> list[str]:
        """Return a note on a point that was not run and is cheaper if the table is right."""
        if on_table is None:
            return []
        point = self.points[on_table]
        if best is not None and _price(self.points[best]) <= _price(point):
            return []
        return [
            f"By the table, {_exit(point)} keeps {percent(point.agreement)} at {_cost(point)} "
            "(estimated). The table counts every token that continues as agreeing with the full "
            "model, so the point must be run to confirm it. --measure runs it."
        ]


def _ends(point: TriedPoint) -> str:
    low, high = point.agreement_interval
    return f"{percent(low)} to {percent(high)}"


def _exit(point: TriedPoint) -> str:
    head = "logit lens" if point.head == "logit_lens" else f"{point.head} head"
    return f"layer {point.exit_layer}, {point.rule} >= {point.threshold:.4g} with the {head}"


def _cost(point: TriedPoint) -> str:
    if point.flops_ratio is None:
        return "an unknown cost"
    # Three decimals: small savings would round to 1.00.
    text = f"{point.flops_ratio:.3f} x the full model's operations"
    if point.seconds_ratio is None:
        return text
    interval = point.seconds_ratio_interval
    between = "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
    return f"{text} and {point.seconds_ratio:.2f} x its time{between}"
