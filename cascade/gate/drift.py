"""Drift: whether a profile has moved away from its baseline, decided in one of two ways.

Where both saw the same sequences nothing is random between them: they are compared sequence by
sequence, within a few times what arithmetic alone can move. Where they saw other sequences of the
same kind, means are compared with intervals that resample whole sequences, and "no drift" has to
be shown, not assumed (equivalence with a margin).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import RecordError, UsageError
from cascade.core.records import Record, at
from cascade.core.schema import to_plain
from cascade.gate.attribution import attribute
from cascade.saturation.records import ProfileRecord
from cascade.stats.resampling import Place, placed, resampled_means, simultaneous_half_widths
from cascade.stats.similarity_statistics import QUANTILES

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "NOT COMPARABLE"]


#: What is compared sequence by sequence: the mean and mean square of a layer's similarities, and
#: the shares of tokens at or below the baseline's p10, p50 and p90.
SHARES = tuple(f"share_p{round(100 * q)}" for q in QUANTILES)


STATISTICS = ("mean", "mean_square", *SHARES)


#: No tolerance is narrower. Batch sizes, threads, attention kernels and float64 move a sequence's
#: mean by up to 1.1e-7 (SmolLM2-135M, fp32), another processor (Xeon with AMX, EPYC) by as much.
LEAST_TOLERANCE = 2e-6


#: How many times the measured noise floor is still noise.
NOISE_FACTOR = 3.0


#: The share of a profile's sequences that have to be the baseline's for it to be the same text: by
#: chance another tokenization of a corpus has a block or two in common with it.
LEAST_SHARED = 0.5


#: Two runs over every sequence also compare the tables. Quantiles come from bins of 1e-4 and more,
#: minimum and maximum are single tokens, whose noise is some hundred times a mean's.
TABLE_TOLERANCE = 1e-4


EXTREME_TOLERANCE = 2e-3


#: How far a layer may lie from the baseline on other sequences: so many standard deviations of the
#: sequences' own values in the baseline, and never less than the floor.
MARGIN = 1.0


MARGIN_FLOOR = {"mean": 0.002, "mean_square": 0.004} | dict.fromkeys(SHARES, 0.02)


#: The probability that all intervals of a comparison hold at once.
CONFIDENCE = 0.99


#: What an interval's place says of a margin.
_VERDICTS: dict[Place, Verdict] = {"within": "PASS", "straddles": "INCONCLUSIVE", "beyond": "FAIL"}


#: Two results are comparable only where all of these agree; and what to do where they do not.
IDENTITY = {
    ("model", "weights_hash"): "another checkpoint: review it, then accept a baseline of its own",
    ("model", "revision"): "another revision: pin --revision, or accept a baseline of its own",
    ("model", "quantization"): "another quantization: accept a baseline of its own",
    ("model", "dtype"): "other arithmetic: run with the baseline's --dtype",
    ("tokenizer_hash",): "another tokenizer: restore it, or accept a baseline of its own",
}


#: What arithmetic depends on: where one of these differs, a baseline was made elsewhere.
_MACHINE = (
    ("machine", "processor"),
    ("machine", "accelerator"),
    ("machine", "capability"),
    ("machine", "blas"),
    ("model", "device"),
    ("versions", "torch"),
)


class Profile(Protocol):
    """What is compared: a `SaturationProfile`, or a stored one."""

    def record(self) -> ProfileRecord | Record:
        """Return the record: provenance and tables."""
        ...

    def arrays(self) -> Mapping[str, Array]:
        """Return the statistics' whole state."""
        ...


@dataclass(frozen=True)
class Cell:
    """One statistic of one layer, against its baseline; NaN where a side lacks it.

    Attributes:
        layer: Its label.
        statistic: One of `STATISTICS`, or of the table's columns.
        expected: The baseline's value: of the sequence that moved most, or of the whole.
        obtained: The new one.
        limit: How far it may move: a tolerance, or a margin.
        interval: On other sequences, of the difference; None where nothing is random.
        sequence: Number of the sequence that moved most, in the baseline; None for the whole.
        needed: Sequences that would decide, where this many could not; None where no number would.
    """

    layer: str
    statistic: str
    expected: float
    obtained: float
    limit: float
    interval: tuple[float, float] | None = None
    sequence: int | None = None
    needed: int | None = None

    @property
    def difference(self) -> float:
        """Obtained minus expected."""
        return self.obtained - self.expected

    @property
    def standardized(self) -> float:
        """The difference in units of its limit; NaN where a side lacks it."""
        if self.limit:
            return self.difference / self.limit
        return math.copysign(math.inf, self.difference) if self.difference else self.difference

    @property
    def verdict(self) -> Verdict:
        """PASS, FAIL, or INCONCLUSIVE where an interval straddles the margin."""
        if self.interval is None:
            # A comparison with NaN is false: what is missing or NaN never passes.
            return "PASS" if abs(self.difference) <= self.limit else "FAIL"
        return _VERDICTS[placed(self.interval, self.limit)]

    def row(self) -> Record:
        """Return the cell as a record holds it; None for what is no number."""
        return {
            "layer": self.layer,
            "statistic": self.statistic,
            "expected": _finite(self.expected),
            "obtained": _finite(self.obtained),
            "difference": _finite(self.difference),
            "limit": self.limit,
            "standardized": _finite(self.standardized),
            "interval": None if self.interval is None else list(self.interval),
            "sequence": self.sequence,
            "needed": self.needed,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """A profile against its baseline.

    Attributes:
        way: "same sequences", "other sequences", or None where they cannot be compared.
        mismatches: What makes the two not comparable: name, expected, obtained, what to do.
        cells: Every statistic of every layer of either side.
        sequences: How many sequences were compared: of the baseline, and new ones.
        tokens: How many new tokens.
        profile: Per layer its label, the baseline's mean similarity and the new one, over what was
            compared.
        attribution: Where the evidence points, where something failed: cause, layer and a sentence.
        notes: What a reader has to know besides.
        provenance: Of the new profile.
        baseline: Provenance of the baseline.
    """

    way: Literal["same sequences", "other sequences"] | None
    mismatches: tuple[tuple[str, Any, Any, str], ...] = ()
    cells: tuple[Cell, ...] = ()
    sequences: tuple[int, int] = (0, 0)
    tokens: int = 0
    profile: tuple[tuple[str, float, float], ...] = ()
    attribution: Record | None = None
    notes: tuple[str, ...] = ()
    provenance: Record | None = None
    baseline: Record | None = None

    @property
    def verdict(self) -> Verdict:
        """FAIL beats INCONCLUSIVE beats PASS; nothing compared is no pass."""
        if self.way is None:
            return "NOT COMPARABLE"
        found = {cell.verdict for cell in self.cells}
        if not found or "FAIL" in found:
            return "FAIL"
        return "INCONCLUSIVE" if "INCONCLUSIVE" in found else "PASS"

    def exit_status(self, *, strict: bool = False) -> int:
        """Return 0 for a pass, 1 for drift, 2 where nothing could be compared.

        Args:
            strict: Whether what is inconclusive counts as drift.
        """
        return {
            "PASS": 0,
            "INCONCLUSIVE": int(strict),
            "FAIL": 1,
            "NOT COMPARABLE": 2,
        }[self.verdict]

    def worst(self) -> list[Cell]:
        """Return the cells, those that failed first, the farthest beyond its limit first."""
        order = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS": 2}

        def badness(cell: Cell) -> tuple[int, float]:
            size = abs(cell.standardized)
            return order[cell.verdict], -(math.inf if math.isnan(size) else size)

        return sorted(self.cells, key=badness)

    def headline(self) -> str:
        """Say the verdict and how it came about, in one sentence."""
        if self.way is None:
            return f"other {' and '.join(name for name, *_ in self.mismatches)} than the baseline's"
        counts = dict.fromkeys(("FAIL", "INCONCLUSIVE", "PASS"), 0)
        for cell in self.cells:
            counts[cell.verdict] += 1
        count = self.sequences[1]
        which = "of the baseline's sequences"
        if self.way == "other sequences":
            which = f"other sequence{'s' * (count != 1)}"
        seen = f"{self.tokens:,} tokens, {count:,} {which}"
        if self.verdict == "PASS":
            limit = "tolerance" if self.way == "same sequences" else "margin"
            return f"no drift: all {counts['PASS']:,} cells within their {limit} ({seen})"
        if self.verdict == "INCONCLUSIVE":
            return f"undecided: {counts['INCONCLUSIVE']:,} of {len(self.cells):,} cells ({seen})"
        return f"drift: {counts['FAIL']:,} of {len(self.cells):,} cells ({seen})"

    def record(self) -> Record:
        """Return the comparison as a record of kind `comparison`."""
        return {
            "schema": 1,
            "kind": "comparison",
            "verdict": self.verdict,
            "headline": self.headline(),
            "way": self.way,
            "mismatches": [
                {"name": name, "expected": expected, "obtained": obtained, "remedy": remedy}
                for name, expected, obtained, remedy in self.mismatches
            ],
            "attribution": self.attribution,
            "sequences": {"baseline": self.sequences[0], "new": self.sequences[1]},
            "tokens": self.tokens,
            "notes": list(self.notes),
            "profile": [
                {"layer": label, "expected": _finite(old), "obtained": _finite(new)}
                for label, old, new in self.profile
            ],
            "cells": [cell.row() for cell in self.cells],
            "provenance": self.provenance,
            "baseline": self.baseline,
        }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# --- Comparing -------------------------------------------------------------------------------


def compare(
    profile: Profile,
    baseline: Profile,
    *,
    noise: Record | None = None,
    independent: bool = False,
    margin: float = MARGIN,
    confidence: float = CONFIDENCE,
    anyway: bool = False,
    seed: int = 0,
) -> Comparison:
    """Decide whether a profile has drifted from its baseline.

    Layers and statistics are the union of both sides: what one side lacks is a failure, and so is
    NaN. Sequences are known by their fingerprints; where most of the new ones are the baseline's,
    they are compared one by one, and otherwise their means are.

    Args:
        profile: The new one, of the baseline's sequences or a few of them.
        baseline: The stored one.
        noise: The noise floor measured where the new profile was (see `cascade.gate.noise`), needed
            where the baseline was made on another machine.
        independent: Compare means even where sequences are shared.
        margin: On other sequences, in standard deviations between the baseline's sequences.
        confidence: On other sequences, that all intervals hold at once.
        anyway: Compare in spite of what differs, and note it.
        seed: Of the resampling.

    Returns:
        The comparison; `verdict` and `record()` say what came of it.

    Raises:
        UsageError: A margin or confidence out of range.
        RecordError: A side has no rows per sequence.
    """
    if not margin > 0 or not 0 < confidence < 1:
        raise UsageError(
            f"expected a margin above 0 and a confidence between 0 and 1, got {margin:g} and "
            f"{confidence:g}"
        )
    new, old = to_plain(profile.record()), to_plain(baseline.record())
    mismatches = mismatches_of(new.get("provenance"), old.get("provenance"))
    notes = [
        f"{name} differs: expected {expected}, got {obtained}"
        for name, expected, obtained, _ in mismatches
    ]
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
                    f"only {int(shared.sum()):,} of {len(shared):,} sequences are the baseline's: "
                    "taken for other text"
                )
            found = _resampled(*sides, margin, confidence, seed, notes)
    return replace(found, provenance=new.get("provenance"), baseline=old.get("provenance"))


def mismatches_of(new: Any, old: Any) -> list[tuple[str, Any, Any, str]]:
    """Return what makes two provenances not comparable: name, expected, obtained, what to do."""
    found = []
    for path, remedy in IDENTITY.items():
        expected, obtained = at(old, path), at(new, path)
        if expected != obtained:
            found.append((".".join(path), expected, obtained, remedy))
    return found


def made_elsewhere(new: Any, old: Any) -> list[str]:
    """Return what of the two machines differs that arithmetic depends on."""
    return [
        f"{path[-1]} {at(new, path)}, the baseline's {at(old, path)}"
        for path in _MACHINE
        if at(new, path) != at(old, path)
    ]


@dataclass(frozen=True)
class _Side:
    """One side of a comparison: its rows per sequence."""

    layers: tuple[str, ...]
    edges: Array
    histogram: Array
    fingerprints: Array
    numbers: Array
    rows: Array  # [S, L, statistics]

    @classmethod
    def of(cls, profile: Profile) -> _Side:
        arrays = profile.arrays()
        try:
            numbers = np.asarray(arrays["sequence"])
            # One fingerprint per sequence of the corpus; rows can be of some of them only.
            prints = np.asarray(arrays["sequence_fingerprint"])[numbers]
            rows = np.concatenate(
                [
                    np.asarray(arrays["sequence_mean"], dtype=np.float64)[..., None],
                    np.asarray(arrays["sequence_mean_square"], dtype=np.float64)[..., None],
                    np.asarray(arrays["sequence_share"], dtype=np.float64),
                ],
                axis=2,
            )
            layers = tuple(str(label) for label in arrays["layers"])
            return cls(
                layers,
                np.asarray(arrays["edges"]),
                np.asarray(arrays["histogram"]),
                prints,
                numbers,
                rows,
            )
        except (KeyError, IndexError, ValueError) as error:
            raise RecordError(
                "a profile has no rows per sequence (they lie in the .npz beside its .json); run "
                "`cascade analyze --output` again"
            ) from error

    def columns(self, layers: Sequence[str]) -> Array:
        """Return the rows of some layers, `[S, L, statistics]`, NaN for those that lack."""
        rows = np.full((len(self.rows), len(layers), len(STATISTICS)), np.nan)
        for place, label in enumerate(layers):
            if label in self.layers:
                rows[:, place] = self.rows[:, self.layers.index(label)]
        return rows


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
    record: Record,
    baseline: Record,
    noise: Record | None,
    notes: list[str],
) -> Comparison:
    tolerance, words = tolerance_of(record, baseline, noise)
    notes = [*notes, *words]
    layers = _union(new, old)
    places = {int(number): place for place, number in reversed(list(enumerate(old.fingerprints)))}
    pairs = [
        (place, places[int(number)])
        for place, number in enumerate(new.fingerprints)
        if int(number) in places
    ]
    left_out = len(new.rows) - len(pairs)
    if left_out:
        notes.append(
            f"{left_out:,} of {len(new.rows):,} sequences are not the baseline's and were left out"
        )
    mine, theirs = (list(part) for part in zip(*pairs, strict=True))
    obtained, expected = new.columns(layers)[mine], old.columns(layers)[theirs]
    length = int(new.histogram[0].sum()) // max(1, len(new.rows))
    same_edges = new.edges.shape == old.edges.shape and np.array_equal(new.edges, old.edges)
    if not same_edges:
        notes.append(
            "shares were not compared: they were counted against other quantiles than the "
            "baseline's (measure with `cascade gate`, or analyze with its edges)"
        )
    cells = list(_sequence_cells(layers, obtained, expected, old.numbers[theirs], tolerance))
    if same_edges:
        cells += _share_cells(layers, obtained, expected, old, tolerance, length)
    whole = len(pairs) == len(new.rows) == len(old.rows)
    if whole:
        cells += table_cells(record["layers"], baseline["layers"], tolerance)
    comparison = Comparison(
        "same sequences",
        cells=tuple(cells),
        sequences=(len(pairs), len(pairs)),
        tokens=length * len(pairs),
        profile=_overlay(layers, obtained, expected),
        notes=tuple(notes),
    )
    if comparison.verdict == "PASS":
        return comparison
    where = attribute(layers, obtained[..., 0], expected[..., 0], tolerance)
    return replace(comparison, attribution=where)


def tolerance_of(record: Record, baseline: Record, noise: Record | None) -> tuple[float, list[str]]:
    """Return how far arithmetic alone may move a sequence's mean, and what to say of it.

    Args:
        record: The new profile's record.
        baseline: The baseline's.
        noise: The floor measured where the new profile was; its own record's where None.
    """
    here = noise or record.get("noise")
    there = baseline.get("noise")
    elsewhere = made_elsewhere(record.get("provenance"), baseline.get("provenance"))
    if not elsewhere:
        floor = (there or here or {}).get("repeat")
        if floor is None:
            return LEAST_TOLERANCE, ["no noise floor was measured: the least tolerance is taken"]
        return max(LEAST_TOLERANCE, NOISE_FACTOR * floor), []
    # Each side lies within its own distance from exact arithmetic, so that the two lie within
    # the sum of both.
    floors = [max(floor["repeat"], floor["exact"] or 0.0) for floor in (here, there) if floor]
    # A side that nobody measured is taken to be as noisy as the other.
    floor = sum(floors) * (2 if len(floors) == 1 else 1)
    tolerance = max(LEAST_TOLERANCE, NOISE_FACTOR * floor)
    how = f"noise floor of both {floor:.1e}" if floors else "no noise floor was measured"
    return tolerance, [
        f"the baseline was made elsewhere ({'; '.join(elsewhere)}): tolerance {tolerance:.1e}, "
        f"{how}"
    ]


def _sequence_cells(
    layers: Sequence[str], obtained: Array, expected: Array, numbers: Array, tolerance: float
) -> Iterator[Cell]:
    """Yield, per layer, the sequence whose mean moved most, and the same for the mean square."""
    # The square moves twice as far as a similarity near 1 does.
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

    A token changes sides where it lies within the tolerance of the quantile; how many do so by
    chance follows from the baseline's histogram.
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


def table_cells(new: list[Record], old: list[Record], tolerance: float = 0.0) -> Iterator[Cell]:
    """Yield every statistic of every row of two tables; what one lacks is NaN.

    Args:
        new: Rows of the new profile's table.
        old: Rows of the baseline's.
        tolerance: Of means; no cell has less.
    """
    rows = [{str(row.get("layer")): row for row in side} for side in (new, old)]
    for layer in dict.fromkeys([*rows[1], *rows[0]]):
        obtained, expected = (side.get(layer, {}) for side in rows)
        for statistic in dict.fromkeys([*expected, *obtained]):
            if statistic == "layer":
                continue
            limit = EXTREME_TOLERANCE if statistic in ("min", "max") else TABLE_TOLERANCE
            yield Cell(
                layer,
                statistic,
                _number(expected.get(statistic)),
                _number(obtained.get(statistic)),
                0.0 if statistic == "count" else max(limit, tolerance),
            )


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


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
            f"the two share no sequence, and {min(len(new.rows), len(old.rows))} on one side give "
            "no interval; expected at least 2, take a larger corpus"
        )
    layers = _union(new, old)
    same_edges = new.edges.shape == old.edges.shape and np.array_equal(new.edges, old.edges)
    statistics = STATISTICS if same_edges else STATISTICS[:2]
    if not same_edges:
        notes = [
            *notes,
            "shares were not compared: they were counted against other quantiles than the "
            "baseline's (analyze with its edges: `cascade gate --full`)",
        ]
    sides = [side.columns(layers)[..., : len(statistics)] for side in (new, old)]
    flat = [side.reshape(len(side), -1) for side in sides]
    means = [side.mean(axis=0) for side in flat]
    generator = np.random.default_rng(seed)
    draws = [resampled_means(side, generator) for side in flat]
    difference = means[0] - means[1]
    halves = simultaneous_half_widths(draws[0] - draws[1], difference, confidence)
    floors = np.tile([MARGIN_FLOOR[name] for name in statistics], len(layers))
    margins = np.maximum(margin * flat[1].std(axis=0, ddof=1), floors)
    margins = np.where(np.isfinite(margins), margins, floors)
    cells = []
    for index, (label, statistic) in enumerate((a, b) for a in layers for b in statistics):
        half = float(halves[index])
        interval = float(difference[index]) - half, float(difference[index]) + half
        cells.append(
            Cell(
                label,
                statistic,
                float(means[1][index]),
                float(means[0][index]),
                float(margins[index]),
                interval=None if math.isnan(half) else interval,
                needed=_needed(
                    abs(float(difference[index])), half, float(margins[index]), flat[0], flat[1]
                ),
            )
        )
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


def _needed(difference: float, half: float, margin: float, new: Array, old: Array) -> int | None:
    """Return how many new sequences would decide a cell that straddles its margin.

    The half width of an interval is proportional to sqrt(1/new + 1/old); None where not even an
    endless number of new sequences would do, or the cell is decided.
    """
    room = abs(margin - difference)
    if not half > 0 or difference + half <= margin or difference - half > margin or room == 0:
        return None
    spread = (1 / len(new) + 1 / len(old)) * (room / half) ** 2
    rest = spread - 1 / len(old)
    return math.ceil(1 / rest) if rest > 0 else None
