"""The choice of an exit layer: of points that were tried, the cheapest that keeps an agreement."""

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
    BEYOND_DOUBT,
    KEPT,
    LOST,
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
    LEAST_RISK,
    certify_means,
    check_certifiable,
    risk_bound,
    sequences_needed,
)

if TYPE_CHECKING:
    from cascade.decoding.early_exit import Propagation


@dataclass(frozen=True)
class SearchConfig:
    """What to search for, and what to measure.

    A search of stored evaluations takes all that is measured from their own settings.

    Attributes:
        agreement: The least share of all tokens whose prediction is the full model's.
        risk: The largest mean share of tokens that may be predicted differently, to be certified;
            None: what the agreement leaves.
        confidence: The probability with which all certificates hold together.
        layers: Exit layers.
        rules: Names of the rules.
        propagation: What upper layers see of exited tokens: "frozen", "ridge" or "exact".
        batch_size: Sequences per forward pass.
        seed: Of the intervals.

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
        """Refuse a configuration that cannot be searched for.

        Raises:
            UsageError: A share or the seed is outside its range.
        """
        if not 0 <= self.agreement <= 1:
            raise UsageError(f"expected a share of agreement in 0..1, got {self.agreement:g}")
        check_certifiable(self.risk, self.confidence)
        check_seed(self.seed)

    @property
    def bound(self) -> float | None:
        """The risk to certify; None where the agreement leaves none, or everything."""
        if self.risk is not None:
            return self.risk
        # 1 - 0.95 is a little more than a twentieth.
        left = round(1 - self.agreement, 12)
        return left if LEAST_RISK <= left < 1 else None


@dataclass(frozen=True)
class Choice:
    """What `choose` finds; numbers are indices of `points`. See `SearchRecord`."""

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
    """Where the points of a search come from: what its record says besides the search itself."""

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
        origin: Where the points come from.
        points: What was tried.
        nothing: Layers and rules without a threshold that keeps the agreement.
        config: What was searched for.
    """
    rows = sorted(
        points, key=lambda point: (point.exit_layer, point.rule, point.source, point.threshold)
    )
    left_out = list(nothing)
    found = choose(rows, left_out, config, sequences=origin.full.sequences)
    return SearchRecord(
        provenance=origin.provenance,
        settings=origin.settings,
        sources=origin.sources,
        full=origin.full,
        points=found.points,
        nothing=left_out,
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
    """Find the cheapest points that keep an agreement, and certify what the sequences allow.

    A **candidate** is a threshold at which the sequences to fit on keep the agreement: it was
    chosen without those to confirm on. Of the candidates whose agreement is confirmed by at least
    the point estimate, the best is the cheapest in operations; those that are significantly faster
    than the full model come first. The same is found for those whose whole interval keeps it.

    Every candidate's risk is tested on the same sequences, so with M of them each is tested at
    level (1 - confidence) / M: the family-wise error is then at most 1 - confidence, and the best
    may be picked afterwards (Bonferroni; Learn then Test, Angelopoulos et al. 2021,
    arXiv:2110.01052, section 2).

    Args:
        tried: What was tried.
        nothing: Layers and rules without a threshold that keeps the agreement.
        config: What is searched for.
        sequences: How many sequences confirm.
    """
    tests = _RiskTests.of(tried, config, sequences)
    points = [_judged(point, config, tests) for point in tried]
    candidates = [number for number, point in enumerate(points) if point.candidate]
    run = [number for number in candidates if not points[number].only_on_table]
    on_table = [number for number in candidates if points[number].only_on_table]

    def cheapest(numbers: Sequence[int], *outcomes: Outcome) -> int | None:
        kept = [number for number in numbers if points[number].outcome in outcomes]
        return min(kept, key=lambda number: _price(points[number]), default=None)

    best = cheapest(run, KEPT, BEYOND_DOUBT)
    best_beyond_doubt = cheapest(run, BEYOND_DOUBT)
    best_on_table = cheapest(on_table, KEPT, BEYOND_DOUBT)
    nearest = max(
        candidates,
        key=lambda number: (points[number].agreement, -_operations(points[number])),
        default=None,
    )
    words = _Words(points, config.agreement)
    return Choice(
        points=points,
        pairs=_variant_results(points, nothing),
        best=best,
        best_beyond_doubt=best_beyond_doubt,
        best_on_table=best_on_table,
        nearest=nearest,
        certificate=_certificate(points, tests),
        verdict=SearchVerdict(
            exit=best is not None and _is_faster(points[best]),
            headline=words.headline(best, nearest),
            also=[
                *words.doubt(best, best_beyond_doubt),
                *words.table_alone(best, best_on_table),
            ],
        ),
    )


def _is_faster(point: TriedPoint) -> bool:
    return is_faster(point.seconds_ratio_interval, point.flops_ratio)


def _outcome(point: TriedPoint, agreement: float) -> Outcome:
    if point.agreement_interval[0] >= agreement and point.agreement >= agreement:
        return BEYOND_DOUBT
    return KEPT if point.agreement >= agreement else LOST


def _operations(point: TriedPoint) -> float:
    return math.inf if point.flops_ratio is None else point.flops_ratio


def _price(point: TriedPoint) -> tuple[bool, float]:
    return not _is_faster(point), _operations(point)


def _variant_results(
    points: Sequence[SearchedPoint], nothing: Sequence[NoThreshold]
) -> list[VariantResult]:
    """Return, for every layer and rule, the lowest candidate, and the lowest that keeps it."""
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
                kept=_first(points, numbers, KEPT, BEYOND_DOUBT),
                beyond_doubt=_first(points, numbers, BEYOND_DOUBT),
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
    """The tests of all candidates: how many there are, and what each tests.

    Attributes:
        tested: How many candidates are tested.
        confidence_each: The confidence of each test, with which all hold together.
        sequences: How many sequences they are tested on.
        risk: The risk to certify; None: none.
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
        """Return the least risk that a mean loss certifies."""
        return risk_bound(loss, sequences=self.sequences, confidence=self.confidence_each)

    def certifies(self, threshold: float, loss: float) -> bool | None:
        """Return whether a mean loss certifies the risk; None where there is none to certify."""
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
    # What a table says of continuing tokens is no measured loss.
    return point.candidate and not point.only_on_table


def _judged(point: TriedPoint, config: SearchConfig, tests: _RiskTests) -> SearchedPoint:
    """Return a point with its outcome, and with its risk where it is tested."""
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


# --- In words --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Words:
    """Sentences about the points of a search, for a wanted agreement."""

    points: Sequence[SearchedPoint]
    agreement: float

    def headline(self, best: int | None, nearest: int | None) -> str:
        """Say which point to exit at, or why none is worth it."""
        wanted = percent(self.agreement)
        if best is not None:
            return self._best(self.points[best])
        if nearest is None:
            return (
                f"No early exit keeps {wanted} agreement: no layer and rule lets any token leave "
                "and keeps it."
            )
        point = self.points[nearest]
        by = "on the table alone" if point.only_on_table else "by running"
        return (
            f"Nothing is confirmed to keep {wanted} agreement by running; nearest: "
            f"{_exit(point)}, {percent(point.agreement)} {by}, at {_cost(point)}."
        )

    def _best(self, point: SearchedPoint) -> str:
        wanted = percent(self.agreement)
        if _is_faster(point):
            return (
                f"Exit at {_exit(point)}: {percent(point.agreement)} of all tokens are predicted "
                f"as by the full model (wanted: {wanted}), at {_cost(point)}."
            )
        what = "time beyond doubt" if _operations(point) < 1 else "anything"
        return (
            f"No early exit saves {what} at {wanted} agreement: the cheapest that keeps it, "
            f"{_exit(point)} ({percent(point.agreement)}), takes {_cost(point)}."
        )

    def doubt(self, best: int | None, beyond_doubt: int | None) -> list[str]:
        """Say which point is chosen where the whole interval has to keep the agreement."""
        if best is None or best == beyond_doubt:
            return []
        text = (
            f"The interval of its agreement, {_ends(self.points[best])}, reaches below the "
            f"wanted {percent(self.agreement)}. "
        )
        if beyond_doubt is None:
            return [f"{text}None keeps it beyond doubt; more sequences would tell."]
        point = self.points[beyond_doubt]
        return [f"{text}Beyond doubt is {_exit(point)} ({_ends(point)}), at {_cost(point)}."]

    def table_alone(self, best: int | None, on_table: int | None) -> list[str]:
        """Name a point that was not run and would be cheaper, if the table were right."""
        if on_table is None:
            return []
        point = self.points[on_table]
        if best is not None and _price(self.points[best]) <= _price(point):
            return []
        return [
            f"On the table alone, {_exit(point)} keeps {percent(point.agreement)} at "
            f"{_cost(point)} (estimated): there every token that stays counts as predicted alike, "
            "so running it can only show whether it does. --measure runs it."
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
