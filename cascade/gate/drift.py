"""Drift: decide whether a profile has moved away from its baseline, by one of two methods.

If both were measured on the same sequences, nothing between them is random: each sequence is
compared within a few times the noise floor. If they were measured on different sequences of the
same kind, means are compared with intervals from resampled sequences, and "no drift" must be shown,
not assumed (equivalence with a margin).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import RecordError, UsageError
from cascade.core.schema import to_plain
from cascade.gate.attribution import attribute, evidence_of
from cascade.gate.comparison import Cell, Comparison, mismatches_of, table_cells, tolerance_of
from cascade.gate.long_context_comparison import compare_long
from cascade.gate.older_baselines import profile_note
from cascade.saturation.long_statistics import LongStatistics
from cascade.saturation.records import LayerRow, NoiseFloor, ProfileRecord
from cascade.stats.resampling import resampled_means, simultaneous_half_widths
from cascade.stats.sequence_rows import QUANTILES, Rows

#: The statistics that are compared per sequence: the mean and mean square of a layer's
#: similarities, and the shares of tokens at or below the baseline's p10, p50 and p90.
SHARES = tuple(f"share_p{round(100 * q)}" for q in QUANTILES)


STATISTICS = ("mean", "mean_square", *SHARES)


#: The least share of a profile's sequences that must be the baseline's for both to count as the
#: same text. Another tokenization of a corpus can have a block or two in common by chance.
LEAST_SHARED = 0.5


#: The margin on different sequences, in standard deviations between the baseline's sequences, but
#: never below the floor.
MARGIN = 1.0


MARGIN_FLOOR = {"mean": 0.002, "mean_square": 0.004} | dict.fromkeys(SHARES, 0.02)


#: The most sequences of a side that are resampled. Their means are known 250 times better than one
#: sequence, which is far below every margin, and their rows take a third of a GB.
MOST_RESAMPLED = 1 << 16


#: The probability that all intervals of a comparison hold simultaneously.
CONFIDENCE = 0.99


class Profile(Protocol):
    """A profile to compare: a `SaturationProfile` or a stored one."""

    def record(self) -> ProfileRecord:
        """Return the record: provenance and tables."""
        ...

    def arrays(self) -> Mapping[str, Array]:
        """Return the state of the statistics of all tokens."""
        ...

    @property
    def rows(self) -> Rows:
        """One row per sequence and layer."""
        ...


# --- Comparing -------------------------------------------------------------------------------


def compare(
    profile: Profile,
    baseline: Profile,
    *,
    noise: NoiseFloor | None = None,
    independent: bool = False,
    margin: float = MARGIN,
    confidence: float = CONFIDENCE,
    anyway: bool = False,
    long_context: bool = True,
    seed: int = 0,
) -> Comparison:
    """Decide whether a profile has drifted from its baseline.

    All layers and statistics of both sides are compared. A layer or statistic that one side lacks
    is a failure, and so is NaN. Sequences are identified by their fingerprints. If most of the new
    sequences are the baseline's, each is compared with its counterpart; otherwise means are
    compared.

    Args:
        profile: The new profile, of the baseline's sequences or a few of them.
        baseline: The stored profile.
        noise: The noise floor of the new profile's environment (see `cascade.gate.noise`); needed
            if the baseline was made in another one.
        independent: Compare means even if sequences are shared.
        margin: The margin on different sequences, in standard deviations between the baseline's
            sequences.
        confidence: The probability that all intervals hold simultaneously, on different sequences.
        anyway: Compare profiles of different models too, and note the differences.
        long_context: Compare the long sequences of both sides too, if their other sequences are the
            same and have not drifted.
        seed: The seed of the resampling.

    Raises:
        UsageError: The margin or confidence is out of range.
        RecordError: A side has no rows per sequence.

    Example:
        >>> from cascade import analyze, load
        >>> stack, texts = load("smollm2-135m"), ["The cat sat on the mat."] * 20
        >>> baseline = analyze(stack, texts, seq_len=32)
        >>> compare(analyze(stack, texts, seq_len=32, batch_size=2), baseline).verdict
        'PASS'
    """
    if not margin > 0 or not 0 < confidence < 1:
        raise UsageError(
            f"expected a margin above 0 and a confidence between 0 and 1, got {margin:g} and "
            f"{confidence:g}"
        )
    new, old = profile.record(), baseline.record()
    mismatches = mismatches_of(new.provenance, old.provenance)
    notes = [
        f"{differs.name} differs: expected {differs.expected}, got {differs.obtained}"
        for differs in mismatches
    ]
    older = profile_note(old)
    notes += [] if older is None else [older]
    if mismatches and not anyway:
        found = Comparison(None, tuple(mismatches))
    else:
        sides = _Side.of(profile), _Side.of(baseline)
        shared = np.isin(sides[0].fingerprints, sides[1].fingerprints)
        if not independent and shared.mean() >= LEAST_SHARED:
            found = _paired(*sides, new, old, noise, notes)
        else:
            if shared.any() and not independent:
                notes.append(
                    f"only {int(shared.sum()):,} of {len(shared):,} sequences are in the baseline; "
                    "the text counts as different"
                )
            found = _resampled(*sides, margin, confidence, seed, notes)
        if long_context and found.method == "same sequences" and found.verdict == "PASS":
            found = _with_long(found, profile, baseline, noise)
    return replace(found, provenance=new.provenance, baseline=old.provenance)


def _with_long(
    comparison: Comparison, profile: Profile, baseline: Profile, noise: NoiseFloor | None
) -> Comparison:
    """Add the comparison of long sequences, if a side has any."""
    new, old = (LongStatistics.from_arrays(side.arrays()) for side in (profile, baseline))
    if new is None and old is None:
        return comparison
    tolerance, _ = tolerance_of(profile.record(), baseline.record(), noise, long=True)
    return comparison.with_long_context(compare_long(new, old, tolerance))


@dataclass(frozen=True)
class _Side:
    """One side of a comparison. Its rows are read where they are needed."""

    layers: tuple[str, ...]
    edges: Array
    histogram: Array
    fingerprints: Array
    numbers: Array
    rows: Rows

    @classmethod
    def of(cls, profile: Profile) -> _Side:
        arrays, rows = profile.arrays(), profile.rows
        numbers = np.asarray(rows.numbers)
        try:
            # There is one fingerprint per sequence of the corpus, but rows can be of a few of them.
            prints = np.asarray(arrays["sequence_fingerprint"])[numbers]
            layers = tuple(str(label) for label in arrays["layers"])
            edges, histogram = np.asarray(arrays["edges"]), np.asarray(arrays["histogram"])
        except (KeyError, IndexError, ValueError) as error:
            raise RecordError(
                "a profile has no rows per sequence (they are in the .parquet next to its .json); "
                "run `cascade analyze --output` again"
            ) from error
        return cls(layers, edges, histogram, prints, numbers, rows)

    def same_edges(self, other: _Side) -> bool:
        """Return whether the shares of both sides refer to the same quantiles."""
        return self.edges.shape == other.edges.shape and np.array_equal(self.edges, other.edges)

    def columns(self, layers: Sequence[str], places: Array) -> Array:
        """Return some rows of some layers, `[S, L, statistics]`, NaN for missing layers."""
        own = self.rows.read(places).statistics()
        rows = np.full((len(own), len(layers), len(STATISTICS)), np.nan)
        for place, label in enumerate(layers):
            if label in self.layers:
                rows[:, place] = own[:, self.layers.index(label)]
        return rows

    def spread(self) -> Array:
        """Return the places of all rows; of very many rows, of some that are evenly spread."""
        count = len(self.rows)
        if count <= MOST_RESAMPLED:
            return np.arange(count)
        return (np.arange(MOST_RESAMPLED) * 2 + 1) * count // (2 * MOST_RESAMPLED)


def _union(new: _Side, old: _Side) -> list[str]:
    return list(dict.fromkeys([*old.layers, *new.layers]))


def _overlay(
    layers: Sequence[str], obtained: Array, expected: Array
) -> tuple[tuple[str, float, float], ...]:
    means = (side[..., 0].mean(axis=0).tolist() for side in (expected, obtained))
    return tuple(zip(layers, *means, strict=True))


# --- The same sequences ----------------------------------------------------------------------


def _paired(
    new: _Side,
    old: _Side,
    record: ProfileRecord,
    baseline: ProfileRecord,
    noise: NoiseFloor | None,
    notes: list[str],
) -> Comparison:
    tolerance, words = tolerance_of(record, baseline, noise)
    notes = [*notes, *words]
    layers = _union(new, old)
    mine, theirs = _pairs(new.fingerprints, old.fingerprints)
    left_out = len(new.rows) - len(mine)
    if left_out:
        notes.append(
            f"skipped {left_out:,} of {len(new.rows):,} sequences that are not in the baseline"
        )
    obtained, expected = new.columns(layers, mine), old.columns(layers, theirs)
    length = int(new.histogram[0].sum()) // max(1, len(new.rows))
    cells = list(_sequence_cells(layers, obtained, expected, old.numbers[theirs], tolerance))
    if new.same_edges(old):
        cells += _share_cells(layers, obtained, expected, old, tolerance, length)
    else:
        notes.append(
            "shares were not compared, because they refer to other quantiles than the baseline's "
            "(measure with `cascade gate`, or analyze with the baseline's edges)"
        )
    if len(mine) == len(new.rows) == len(old.rows):
        cells += table_cells(_table(record.layers), _table(baseline.layers), tolerance)
    comparison = Comparison(
        "same sequences",
        cells=tuple(cells),
        sequences=(len(mine), len(mine)),
        tokens=length * len(mine),
        profile=_overlay(layers, obtained, expected),
        notes=tuple(notes),
    )
    if comparison.verdict == "PASS":
        return comparison
    found = attribute(layers, obtained[..., :2], expected[..., :2], tolerance)
    return replace(
        comparison,
        attribution=found,
        evidence=evidence_of(layers, obtained[..., :2], expected[..., :2], tolerance),
        fingerprints=tuple(new.fingerprints[mine].tolist()),
    )


def _pairs(new: Array, old: Array) -> tuple[Array, Array]:
    """Return the places of the new sequences that the old ones include, and their places there."""
    values, first = np.unique(old, return_index=True)
    found = np.searchsorted(values, new)
    mine = np.flatnonzero(values[np.minimum(found, len(values) - 1)] == new)
    return mine, first[found[mine]]


def _sequence_cells(
    layers: Sequence[str], obtained: Array, expected: Array, numbers: Array, tolerance: float
) -> Iterator[Cell]:
    """Yield for each layer the sequence whose mean moved most, then the same for mean squares."""
    # A square moves twice as far as a similarity near 1.
    for index, statistic, limit in ((0, "mean", tolerance), (1, "mean_square", 2 * tolerance)):
        moved = np.abs(obtained[..., index] - expected[..., index])
        moved = np.where(np.isnan(moved), np.inf, moved)
        for place, label in enumerate(layers):
            row = int(np.argmax(moved[:, place]))
            yield Cell(
                label,
                statistic,
                float(expected[row, place, index]),
                float(obtained[row, place, index]),
                limit,
                sequence=int(numbers[row]),
            )


def _share_cells(
    layers: Sequence[str],
    obtained: Array,
    expected: Array,
    old: _Side,
    tolerance: float,
    length: int,
) -> Iterator[Cell]:
    """Yield the shares of tokens at or below the baseline's quantiles, over all sequences.

    A token can change sides if it lies within the tolerance of the quantile. The baseline's
    histogram gives the number of tokens that do so by chance.
    """
    tokens = max(1, length * len(obtained))
    for place, label in enumerate(layers):
        row = old.layers.index(label) if label in old.layers else None
        for index, statistic in enumerate(SHARES, start=2):
            near = 0.0 if row is None else _density(old, row, index - 2) * 2 * tolerance * tokens
            flips = 2 + near + 4 * math.sqrt(near)
            yield Cell(
                label,
                statistic,
                float(expected[:, place, index].mean()),
                float(obtained[:, place, index].mean()),
                flips / tokens,
            )


def _density(old: _Side, row: int, quantile: int) -> float:
    """Return the share of tokens per unit of similarity around a layer's quantile edge."""
    bins = old.histogram.shape[1]
    edge = int(old.edges[row, quantile])
    low, high = max(0, edge - 8), min(bins, edge + 8)
    count = old.histogram[row, low:high].sum()
    width = abs(math.cos(low * math.pi / bins) - math.cos(high * math.pi / bins))
    return float(count / max(1, old.histogram[row].sum()) / max(width, 1e-12))


def _table(rows: Sequence[LayerRow]) -> list[Mapping[str, object]]:
    return [to_plain(row) for row in rows]


# --- Other sequences -------------------------------------------------------------------------


def _resampled(
    new: _Side,
    old: _Side,
    margin: float,
    confidence: float,
    seed: int,
    notes: list[str],
) -> Comparison:
    if min(len(new.rows), len(old.rows)) < 2:
        raise RecordError(
            "expected at least 2 sequences on each side for an interval, got "
            f"{min(len(new.rows), len(old.rows))}, and the two share none; use a larger corpus"
        )
    layers = _union(new, old)
    statistics = STATISTICS
    if not new.same_edges(old):
        statistics = STATISTICS[:2]
        notes = [
            *notes,
            "shares were not compared, because they refer to other quantiles than the baseline's "
            "(`cascade gate --full` analyzes with the baseline's edges)",
        ]
    for name, side in (("profile", new), ("baseline", old)):
        if len(side.rows) > MOST_RESAMPLED:
            notes = [
                *notes,
                f"the means of the {name} are those of {MOST_RESAMPLED:,} of its "
                f"{len(side.rows):,} sequences, evenly spread",
            ]
    sides = [side.columns(layers, side.spread())[..., : len(statistics)] for side in (new, old)]
    flat = [side.reshape(len(side), -1) for side in sides]
    means = [side.mean(axis=0) for side in flat]
    generator = np.random.default_rng(seed)
    draws = [resampled_means(side, generator) for side in flat]
    difference = means[0] - means[1]
    halves = simultaneous_half_widths(draws[0] - draws[1], difference, confidence)
    floors = np.tile([MARGIN_FLOOR[name] for name in statistics], len(layers))
    margins = np.maximum(margin * flat[1].std(axis=0, ddof=1), floors)
    margins = np.where(np.isfinite(margins), margins, floors)
    counts = len(flat[0]), len(flat[1])
    cells = [
        _interval_cell(label, statistic, (old_mean, new_mean), half, limit, counts)
        for (label, statistic), old_mean, new_mean, half, limit in zip(
            ((label, statistic) for label in layers for statistic in statistics),
            *(values.tolist() for values in (means[1], means[0], halves, margins)),
            strict=True,
        )
    ]
    comparison = Comparison(
        "other sequences",
        cells=tuple(cells),
        sequences=(len(old.rows), len(new.rows)),
        tokens=int(new.histogram[0].sum()),
        profile=_overlay(layers, *sides),
        notes=tuple(notes),
    )
    if comparison.verdict != "FAIL":
        return comparison
    mine, theirs = (side[..., 0].mean(axis=0, keepdims=True) for side in sides)
    limits = margins.reshape(len(layers), -1)[:, 0]
    return replace(comparison, attribution=attribute(layers, mine, theirs, limits))


def _interval_cell(
    label: str,
    statistic: str,
    means: tuple[float, float],
    half: float,
    margin: float,
    counts: tuple[int, int],
) -> Cell:
    """Return a cell of two means and the interval of their difference.

    Args:
        label: The layer's label.
        statistic: One of `STATISTICS`.
        means: The baseline's mean and the new one.
        half: Half the width of the difference's interval; NaN where there is none.
        margin: The largest allowed distance of the difference from 0.
        counts: The number of new sequences and of the baseline's.
    """
    expected, obtained = means
    difference = obtained - expected
    return Cell(
        label,
        statistic,
        expected,
        obtained,
        margin,
        interval=None if math.isnan(half) else (difference - half, difference + half),
        needed=_needed(abs(difference), half, margin, *counts),
    )


def _needed(difference: float, half: float, margin: float, new: int, old: int) -> int | None:
    """Return how many new sequences would decide a cell whose interval straddles its margin.

    The half width of an interval is proportional to sqrt(1/new + 1/old). The result is None if no
    number of new sequences would decide, or the cell is decided.
    """
    distance = abs(margin - difference)
    is_decided = difference + half <= margin or difference - half > margin
    if not half > 0 or is_decided or distance == 0:
        return None
    spread = (1 / new + 1 / old) * (distance / half) ** 2
    rest = spread - 1 / old
    return math.ceil(1 / rest) if rest > 0 else None
