"""Types that all benchmark records share: times, ratios, targets, memory and the machine."""

from __future__ import annotations

from typing import Any

from msgspec import field

from cascade.core.provenance import MachineProvenance, Provenance
from cascade.core.schema import UNSET, Count, Finite, Interval, Part, StoredRecord, UnsetType


class BenchmarkMachine(MachineProvenance, frozen=True, kw_only=True):
    """The machine, with details that affect times.

    Attributes:
        cores: Number of cores; null if unknown.
        load_average_before: One-minute load average before the start; null if unknown.
    """

    cores: Count | None
    load_average_before: Finite | None


class BenchmarkProvenance(Provenance, frozen=True, kw_only=True):
    """Origin of a benchmark's record."""

    machine: BenchmarkMachine


class VariantTimes(Part, frozen=True, kw_only=True):
    """The times of one variant.

    Attributes:
        what: Description of the variant.
        tokens_per_second: Tokens divided by the median seconds.
        seconds: Seconds of each round.
    """

    what: str
    tokens_per_second: Finite
    seconds: list[Finite]


class Ratio(Part, frozen=True, kw_only=True):
    """The ratio of a variant's seconds to those of a reference.

    Attributes:
        name: `variant/reference`.
        median: Median over rounds.
        interval: 95 % interval of the median.
        rounds: Ratio within each round.
    """

    name: str
    median: Finite
    interval: Interval
    rounds: list[Finite]


class Target(Part, frozen=True, kw_only=True):
    """A target and the measured value.

    Attributes:
        name: Measured quantity, with its unit if it has one.
        sense: Side of the limit: "at most", "at least" or "below".
        limit: Limit of the target.
        measured: Measured value; null if not measured.
        interval: 95 % interval of the value, if it has one.
        met: Whether the value meets the limit; null if not measured.
    """

    name: str
    sense: str
    limit: Finite
    measured: Finite | None
    interval: Interval | None
    met: bool | None


class PassPeak(Part, frozen=True, kw_only=True):
    """The peak memory of one pass in a fresh process.

    Attributes:
        tokens: Tokens of the measured pass.
        loaded_mb: Peak up to the end of loading, in MB.
        peak_mb: Peak of the measured pass in MB, or of the whole process if `isolated` is false.
        isolated: Whether the operating system could reset the peak before the pass.
    """

    tokens: Count
    loaded_mb: Finite
    peak_mb: Finite
    isolated: bool | UnsetType = UNSET


class PeakMemory(PassPeak, frozen=True, kw_only=True):
    """The peak memory of one pass of a variant.

    Attributes:
        variant: Measured variant.
        factor: Number of times that the pass repeated the tokens.
    """

    variant: str = field(name="way")
    factor: Count


class MemoryUsage(Part, frozen=True, kw_only=True):
    """Peak memory of a benchmark's variants.

    Attributes:
        what: Method of the measurement.
        reason: Reason why nothing was measured; null if it was.
        growth_mb: Difference of the peaks of the long and the short pass, in MB.
        peaks: Peaks, one per pass.
    """

    what: str
    reason: str | None
    growth_mb: Finite | None
    peaks: list[PeakMemory]


class BenchmarkRecord(StoredRecord, frozen=True, kw_only=True):
    """The fields that every benchmark's record has.

    Attributes:
        provenance: Model, corpus, machine, versions and command.
        settings: Options of the benchmark.
        variants: Times of each variant, by name.
        order: Order of the variants in every timed round.
        ratios: Ratios of seconds, variant over reference.
        interval: Description of the median and the interval of a ratio.
        targets: Targets and measured values.
    """

    schema: int = 1
    kind: str = ""
    provenance: BenchmarkProvenance
    settings: Any
    variants: dict[str, VariantTimes] = field(name="ways")
    order: list[list[str]]
    ratios: list[Ratio]
    interval: str
    targets: list[Target]
