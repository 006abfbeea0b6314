"""Comparisons: layer statistics compared with their baseline, and the allowed differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cascade.core.arrays import Array
from cascade.core.display import Displayed
from cascade.core.provenance import Provenance
from cascade.core.schema import UNSET, known
from cascade.gate.attribution import decoding_attribution, long_attribution, moved_positions
from cascade.gate.causes.hypotheses import Evidence
from cascade.gate.records import (
    Attribution,
    CellRow,
    CellVerdict,
    ComparisonRecord,
    DecodingRecord,
    LongContextRecord,
    MeanRow,
    Method,
    Mismatch,
    SequenceCounts,
    Verdict,
)
from cascade.saturation.records import NoiseFloor, ProfileRecord
from cascade.stats.resampling import Place, placed

#: The verdict for an interval, by its position relative to the margin.
_VERDICTS: dict[Place, CellVerdict] = {
    "within": "PASS",
    "straddles": "INCONCLUSIVE",
    "beyond": "FAIL",
}


#: The smallest tolerance. Batch size, threads, attention kernel and float64 move a sequence's mean
#: by up to 1.1e-7 (SmolLM2-135M, fp32), another processor by 2.3e-7 (Xeon with AMX, EPYC).
LEAST_TOLERANCE = 2e-6


#: Differences up to this many times the measured noise floor count as noise.
NOISE_FACTOR = 3.0


#: Two runs over every sequence also compare their tables. Quantiles come from bins of at least
#: 1e-4. Minimum and maximum are single tokens, whose noise is about a hundred times a mean's.
TABLE_TOLERANCE = 1e-4


EXTREME_TOLERANCE = 2e-3


#: Two results are comparable only if all of these fields agree. The text says what to do if not.
IDENTITY = {
    ("model", "weights_hash"): "review the new checkpoint, then accept a separate baseline for it",
    ("model", "revision"): "pin --revision, or accept a separate baseline",
    ("model", "quantization"): "accept a separate baseline for this quantization",
    ("model", "dtype"): "run with the baseline's --dtype",
    ("tokenizer_hash",): "restore the tokenizer, or accept a separate baseline",
}


#: The mismatch of a text that begins with BOS and one that does not, and what to do.
BOS = "corpus.bos"
_BOS_REMEDY = "read the text with --bos {}, or accept a new baseline"

#: Rounding depends on these fields: if one differs, the environments are different.
_ENVIRONMENT = (
    ("machine", "processor"),
    ("machine", "accelerator"),
    ("machine", "capability"),
    ("machine", "blas"),
    ("model", "device"),
    ("model", "attention"),
    ("model", "packages"),
    ("versions", "torch"),
)


@dataclass(frozen=True)
class Cell:
    """One statistic of one layer and its baseline; NaN where a side has no value.

    Attributes:
        layer: The layer's label.
        statistic: A per-sequence statistic, or a column of the table.
        expected: The baseline's value, of the sequence that moved most or of the whole corpus.
        obtained: The new value.
        limit: The largest allowed difference: a tolerance or a margin.
        interval: The interval of the difference on different sequences; None on the same ones.
        sequence: The baseline's number of the sequence that moved most; None for the whole corpus.
        needed: The number of new sequences that would decide an inconclusive cell; None if no
            number would, or the cell is decided.
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
        """The difference in units of the limit; NaN where a side has no value."""
        if self.limit:
            return self.difference / self.limit
        return math.copysign(math.inf, self.difference) if self.difference else self.difference

    @property
    def verdict(self) -> CellVerdict:
        """PASS, FAIL, or INCONCLUSIVE if the interval straddles the margin."""
        if self.interval is None:
            # A comparison with NaN is false, so a missing value never passes.
            return "PASS" if abs(self.difference) <= self.limit else "FAIL"
        return _VERDICTS[placed(self.interval, self.limit)]

    def row(self) -> CellRow:
        """Return the cell as stored in a record, with None for values that are not finite."""
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


@dataclass(frozen=True, repr=False)
class Comparison(Displayed):
    """The comparison of a profile with its baseline.

    Attributes:
        method: How the two were compared; None if they are not comparable.
        mismatches: What makes the two not comparable.
        cells: Every statistic of every layer of either side.
        sequences: The number of compared sequences: the baseline's and the new ones.
        tokens: The number of new tokens.
        profile: For each layer its label, the baseline's mean similarity and the new one, over the
            compared sequences.
        attribution: The likely cause, if something failed.
        notes: Further notes for the reader.
        provenance: The provenance of the new profile.
        baseline: The provenance of the baseline.
        decoding: Whether decoding computes what the prefill computes; None if not checked.
        long_context: Whether long sequences have the baseline's similarities; None if not checked.
        evidence: The rows of the compared sequences, if the same ones have drifted.
        fingerprints: The fingerprints of these sequences.

    Example:
        >>> from cascade import analyze, compare, load
        >>> stack, texts = load("smollm2-135m"), ["The cat sat on the mat."] * 20
        >>> profile = analyze(stack, texts, seq_len=32)
        >>> comparison = compare(profile, profile)
        >>> comparison.verdict, comparison.exit_status(), comparison.worst()[0].difference
        ('PASS', 0, 0.0)
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
    decoding: DecodingRecord | None = None
    long_context: LongContextRecord | None = None
    evidence: Evidence | None = None
    fingerprints: tuple[int, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of cells, long contexts and decoding; FAIL if there are no cells."""
        others = (self.long_context, self.decoding)
        if self.method is not None and any(one and one.verdict == "FAIL" for one in others):
            return "FAIL"
        return self._of_cells

    @property
    def _of_cells(self) -> Verdict:
        if self.method is None:
            return "NOT COMPARABLE"
        found = {cell.verdict for cell in self.cells}
        if not found or "FAIL" in found:
            return "FAIL"
        return "INCONCLUSIVE" if "INCONCLUSIVE" in found else "PASS"

    def with_decoding(self, decoding: DecodingRecord) -> Comparison:
        """Return the comparison with the result of `check_decoding`."""
        cause = self.attribution or decoding_attribution(decoding)
        return replace(self, decoding=decoding, attribution=cause)

    def with_long_context(self, long: LongContextRecord) -> Comparison:
        """Return the comparison with the result of `compare_long`."""
        cause = self.attribution or long_attribution(long)
        return replace(self, long_context=long, attribution=cause)

    def exit_status(self, *, strict: bool = False) -> int:
        """Return 0 for a pass, 1 for drift, 2 if the two are not comparable.

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
        """Return the cells, failures first, each group sorted by distance beyond the limit."""
        order = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS": 2}

        def badness(cell: Cell) -> tuple[int, float]:
            size = abs(cell.standardized)
            return order[cell.verdict], -(math.inf if math.isnan(size) else size)

        return sorted(self.cells, key=badness)

    def headline(self) -> str:
        """Return the verdict and its reason, in one sentence."""
        if self.method is None and [one.name for one in self.mismatches] == [BOS]:
            was, now = self.mismatches[0].expected, self.mismatches[0].obtained
            return f"the baseline's corpus was read {was}, this one {now}"
        if self.method is None:
            names = " and ".join(mismatch.name for mismatch in self.mismatches)
            verb = "differs" if len(self.mismatches) == 1 else "differ"
            return f"{names} {verb} from the baseline"
        if self._of_cells == self.verdict:
            return self._cells_headline()
        if self.long_context is not None and self.long_context.moved:
            where = moved_positions(self.long_context)
            return f"{where} differ from the baseline; short sequences: {self._cells_headline()}"
        if self.decoding is not None:
            return f"{_decoding_headline(self.decoding)}; prefill: {self._cells_headline()}"
        return self._cells_headline()

    def _cells_headline(self) -> str:
        counts = dict.fromkeys(("FAIL", "INCONCLUSIVE", "PASS"), 0)
        for cell in self.cells:
            counts[cell.verdict] += 1
        count = self.sequences[1]
        which = "of the baseline's sequences"
        if self.method == "other sequences":
            which = f"sequence{'s' * (count != 1)} that the baseline does not have"
        seen = f"{self.tokens:,} tokens, {count:,} {which}"
        if self._of_cells == "PASS":
            limit = "tolerance" if self.method == "same sequences" else "margin"
            return f"no drift: all {counts['PASS']:,} cells are within {limit} ({seen})"
        if self._of_cells == "INCONCLUSIVE":
            undecided = f"{counts['INCONCLUSIVE']:,} of {len(self.cells):,} cells"
            return f"{undecided} are undecided ({seen})"
        return f"drift in {counts['FAIL']:,} of {len(self.cells):,} cells ({seen})"

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
            decoding=self.decoding or UNSET,
            long_context=self.long_context or UNSET,
        )

    def _to_show(self) -> tuple[ComparisonRecord, dict[str, Array]]:
        return self.record(), {}

    def _in_one_line(self) -> str:
        return f"{self.verdict}, {self.headline()}"


def _decoding_headline(decoding: DecodingRecord) -> str:
    first = decoding.first
    if first is None or first == len(decoding.passes):
        return "decoding raises an error"
    return f"decoding differs from the prefill from layer {decoding.passes[first].layer} on"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# --- Comparable or not -----------------------------------------------------------------------


def mismatches_of(new: Provenance, old: Provenance) -> list[Mismatch]:
    """Return what makes two provenances not comparable.

    Args:
        new: The provenance of the new profile.
        old: The provenance of the baseline.
    """
    found = []
    for path, remedy in IDENTITY.items():
        expected, obtained = _value(old, path), _value(new, path)
        if expected != obtained:
            found.append(
                Mismatch(name=".".join(path), expected=expected, obtained=obtained, remedy=remedy)
            )
    begun = [known(side.corpus.bos) == "yes" for side in (old, new)]
    if begun[0] != begun[1]:
        was, now = (f"{'with' if bos else 'without'} BOS" for bos in begun)
        remedy = _BOS_REMEDY.format("yes" if begun[0] else "no")
        found.append(Mismatch(name=BOS, expected=was, obtained=now, remedy=remedy))
    return found


def environment_differences(new: Provenance, old: Provenance) -> list[str]:
    """Return the hardware and library differences that can change rounding.

    Args:
        new: The provenance of the new profile.
        old: The provenance of the baseline.
    """
    return [
        f"{path[-1]} {_value(new, path)} instead of {_value(old, path)}"
        for path in _ENVIRONMENT
        if _value(new, path) != _value(old, path)
    ]


def _value(provenance: Provenance, path: tuple[str, ...]) -> str | None:
    """Return the text at a path of field names; None where there is none."""
    value: object = provenance
    for name in path:
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return None if value is None or value is UNSET else str(value)


# --- Tolerances ------------------------------------------------------------------------------


def tolerance_of(
    record: ProfileRecord,
    baseline: ProfileRecord,
    noise: NoiseFloor | None,
    *,
    long: bool = False,
) -> tuple[float, list[str]]:
    """Return how far rounding alone may move a sequence's mean, and notes for the reader.

    Args:
        record: The new profile's record.
        baseline: The baseline's record.
        noise: The noise floor of the new profile's environment; None takes the one of its record.
        long: Whether the tolerance is for ranges of positions of long sequences.
    """
    here = noise or known(record.noise)
    there = known(baseline.noise)
    differences = environment_differences(record.provenance, baseline.provenance)
    if not differences:
        measured = there or here
        if measured is None:
            return LEAST_TOLERANCE, ["no noise floor was measured; the smallest tolerance is used"]
        return max(LEAST_TOLERANCE, NOISE_FACTOR * _floor(measured.repeat, measured, long)), []
    # Each side lies within its own distance of the exact result, so the two differ by at most the
    # sum of both distances.
    floors = [
        _floor(max(floor.repeat, floor.exact or 0.0), floor, long)
        for floor in (here, there)
        if floor
    ]
    # A side without a measurement is assumed to be as noisy as the other.
    floor = sum(floors) * (2 if len(floors) == 1 else 1)
    tolerance = max(LEAST_TOLERANCE, NOISE_FACTOR * floor)
    how = f"noise floor of both sides {floor:.1e}" if floors else "no noise floor was measured"
    return tolerance, [
        f"the baseline was made in another environment ({'; '.join(differences)}); tolerance "
        f"{tolerance:.1e}, {how}"
    ]


def _floor(short: float, measured: NoiseFloor, long: bool) -> float:
    return max(short, known(measured.long) or 0.0) if long else short


def table_cells(
    new: Sequence[Mapping[str, object]],
    old: Sequence[Mapping[str, object]],
    tolerance: float = 0.0,
) -> Iterator[Cell]:
    """Yield a cell for every statistic of every row of two tables, NaN where one has no value.

    Args:
        new: Rows of the new profile's table, by column.
        old: Rows of the baseline's table.
        tolerance: The tolerance of means; no cell but `count` has a smaller one.
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
