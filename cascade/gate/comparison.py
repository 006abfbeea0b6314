"""Comparisons: statistics of layers against their baseline, and how far they may differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cascade.core.provenance import Provenance
from cascade.core.schema import UNSET, known
from cascade.gate.records import (
    Attribution,
    CellRow,
    CellVerdict,
    ComparisonRecord,
    MeanRow,
    Method,
    Mismatch,
    SequenceCounts,
    Verdict,
)
from cascade.saturation.records import NoiseFloor, ProfileRecord
from cascade.stats.resampling import Place, placed

#: The verdict of an interval, by its place relative to the margin.
_VERDICTS: dict[Place, CellVerdict] = {
    "within": "PASS",
    "straddles": "INCONCLUSIVE",
    "beyond": "FAIL",
}


#: No tolerance is narrower. Batch sizes, threads, attention kernels and float64 move a sequence's
#: mean by up to 1.1e-7 (SmolLM2-135M, fp32), another processor (Xeon with AMX, EPYC) by as much.
LEAST_TOLERANCE = 2e-6


#: How many times the measured noise floor is still noise.
NOISE_FACTOR = 3.0


#: Two runs over every sequence also compare the tables. Quantiles come from bins of 1e-4 and more,
#: minimum and maximum are single tokens, whose noise is some hundred times a mean's.
TABLE_TOLERANCE = 1e-4


EXTREME_TOLERANCE = 2e-3


#: Two results are comparable only where all of these agree; and what to do where they do not.
IDENTITY = {
    ("model", "weights_hash"): "another checkpoint: review it, then accept a baseline of its own",
    ("model", "revision"): "another revision: pin --revision, or accept a baseline of its own",
    ("model", "quantization"): "another quantization: accept a baseline of its own",
    ("model", "dtype"): "other arithmetic: run with the baseline's --dtype",
    ("tokenizer_hash",): "another tokenizer: restore it, or accept a baseline of its own",
}


#: Arithmetic depends on these: where one of them differs, a baseline was made elsewhere.
_MACHINE = (
    ("machine", "processor"),
    ("machine", "accelerator"),
    ("machine", "capability"),
    ("machine", "blas"),
    ("model", "device"),
    ("versions", "torch"),
)


@dataclass(frozen=True)
class Cell:
    """One statistic of one layer, against its baseline; NaN where a side lacks it.

    Attributes:
        layer: Its label.
        statistic: A statistic of sequences, or a column of the table.
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
    def verdict(self) -> CellVerdict:
        """PASS, FAIL, or INCONCLUSIVE where an interval straddles the margin."""
        if self.interval is None:
            # A comparison with NaN is false: a number that is missing or NaN never passes.
            return "PASS" if abs(self.difference) <= self.limit else "FAIL"
        return _VERDICTS[placed(self.interval, self.limit)]

    def row(self) -> CellRow:
        """Return the cell as a record holds it; None for what is no finite number."""
        return CellRow(
            layer=self.layer,
            statistic=self.statistic,
            expected=_finite(self.expected),
            obtained=_finite(self.obtained),
            difference=_finite(self.difference),
            limit=self.limit,
            standardized=_finite(self.standardized),
            interval=None if self.interval is None else list(self.interval),
            sequence=self.sequence,
            needed=self.needed,
            verdict=self.verdict,
        )


@dataclass(frozen=True)
class Comparison:
    """A profile against its baseline.

    Attributes:
        method: How they were compared, or None where they cannot be compared.
        mismatches: What makes the two not comparable.
        cells: Every statistic of every layer of either side.
        sequences: How many sequences were compared: of the baseline, and new ones.
        tokens: How many new tokens.
        profile: Per layer its label, the baseline's mean similarity and the new one, over the
            sequences that were compared.
        attribution: Where the evidence points, where something failed.
        notes: Further sentences for the reader.
        provenance: Of the new profile.
        baseline: Provenance of the baseline.
    """

    method: Method | None
    mismatches: tuple[Mismatch, ...] = ()
    cells: tuple[Cell, ...] = ()
    sequences: tuple[int, int] = (0, 0)
    tokens: int = 0
    profile: tuple[tuple[str, float, float], ...] = ()
    attribution: Attribution | None = None
    notes: tuple[str, ...] = ()
    provenance: Provenance | None = None
    baseline: Provenance | None = None

    @property
    def verdict(self) -> Verdict:
        """FAIL beats INCONCLUSIVE beats PASS; a comparison without cells fails."""
        if self.method is None:
            return "NOT COMPARABLE"
        found = {cell.verdict for cell in self.cells}
        if not found or "FAIL" in found:
            return "FAIL"
        return "INCONCLUSIVE" if "INCONCLUSIVE" in found else "PASS"

    def exit_status(self, *, strict: bool = False) -> int:
        """Return 0 for a pass, 1 for drift, 2 where nothing could be compared.

        Args:
            strict: Whether an inconclusive verdict counts as drift.
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
        """Return the verdict and how it came about, in one sentence."""
        if self.method is None:
            names = " and ".join(mismatch.name for mismatch in self.mismatches)
            return f"other {names} than the baseline's"
        counts = dict.fromkeys(("FAIL", "INCONCLUSIVE", "PASS"), 0)
        for cell in self.cells:
            counts[cell.verdict] += 1
        count = self.sequences[1]
        which = "of the baseline's sequences"
        if self.method == "other sequences":
            which = f"other sequence{'s' * (count != 1)}"
        seen = f"{self.tokens:,} tokens, {count:,} {which}"
        if self.verdict == "PASS":
            limit = "tolerance" if self.method == "same sequences" else "margin"
            return f"no drift: all {counts['PASS']:,} cells within their {limit} ({seen})"
        if self.verdict == "INCONCLUSIVE":
            return f"undecided: {counts['INCONCLUSIVE']:,} of {len(self.cells):,} cells ({seen})"
        return f"drift: {counts['FAIL']:,} of {len(self.cells):,} cells ({seen})"

    def record(self) -> ComparisonRecord:
        """Return the comparison as a record of kind `comparison`."""
        return ComparisonRecord(
            verdict=self.verdict,
            headline=self.headline(),
            method=self.method,
            mismatches=list(self.mismatches),
            attribution=self.attribution,
            sequences=SequenceCounts(baseline=self.sequences[0], new=self.sequences[1]),
            tokens=self.tokens,
            notes=list(self.notes),
            profile=[
                MeanRow(layer=label, expected=_finite(old), obtained=_finite(new))
                for label, old, new in self.profile
            ],
            cells=[cell.row() for cell in self.cells],
            provenance=self.provenance,
            baseline=self.baseline,
        )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# --- Comparable or not -----------------------------------------------------------------------


def mismatches_of(new: Provenance, old: Provenance) -> list[Mismatch]:
    """Return what makes two provenances not comparable.

    Args:
        new: Of the new profile.
        old: Of the baseline.
    """
    found = []
    for path, remedy in IDENTITY.items():
        expected, obtained = _value(old, path), _value(new, path)
        if expected != obtained:
            found.append(
                Mismatch(name=".".join(path), expected=expected, obtained=obtained, remedy=remedy)
            )
    return found


def made_elsewhere(new: Provenance, old: Provenance) -> list[str]:
    """Return the hardware and library differences that can change numerical results.

    Args:
        new: Of the new profile.
        old: Of the baseline.
    """
    return [
        f"{path[-1]} {_value(new, path)}, the baseline's {_value(old, path)}"
        for path in _MACHINE
        if _value(new, path) != _value(old, path)
    ]


def _value(provenance: Provenance, path: tuple[str, ...]) -> str | None:
    """Return the text at a path of names; None where there is none."""
    value: object = provenance
    for name in path:
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return None if value is None or value is UNSET else str(value)


# --- Tolerances ------------------------------------------------------------------------------


def tolerance_of(
    record: ProfileRecord, baseline: ProfileRecord, noise: NoiseFloor | None
) -> tuple[float, list[str]]:
    """Return how far arithmetic alone may move a sequence's mean, and notes on it.

    Args:
        record: The new profile's record.
        baseline: The baseline's.
        noise: The floor measured where the new profile was; its own record's where None.
    """
    here = noise or known(record.noise)
    there = known(baseline.noise)
    elsewhere = made_elsewhere(record.provenance, baseline.provenance)
    if not elsewhere:
        measured = there or here
        if measured is None:
            return LEAST_TOLERANCE, ["no noise floor was measured: the least tolerance is taken"]
        return max(LEAST_TOLERANCE, NOISE_FACTOR * measured.repeat), []
    # Each side lies within its own distance from exact arithmetic, so that the two lie within
    # the sum of both.
    floors = [max(floor.repeat, floor.exact or 0.0) for floor in (here, there) if floor]
    # A side without a measurement is taken to be as noisy as the other.
    floor = sum(floors) * (2 if len(floors) == 1 else 1)
    tolerance = max(LEAST_TOLERANCE, NOISE_FACTOR * floor)
    how = f"noise floor of both {floor:.1e}" if floors else "no noise floor was measured"
    return tolerance, [
        f"the baseline was made elsewhere ({'; '.join(elsewhere)}): tolerance {tolerance:.1e}, "
        f"{how}"
    ]


def table_cells(
    new: Sequence[Mapping[str, object]],
    old: Sequence[Mapping[str, object]],
    tolerance: float = 0.0,
) -> Iterator[Cell]:
    """Yield every statistic of every row of two tables, NaN where one lacks it.

    Args:
        new: Rows of the new profile's table, by column.
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


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]  # checked just before
