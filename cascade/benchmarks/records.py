"""What every benchmark's record has: times of variants, their ratios, targets, the machine."""

from __future__ import annotations

from msgspec import field

from cascade.core.provenance import MachineProvenance, Provenance
from cascade.core.schema import UNSET, Count, Finite, Interval, Part, UnsetType


class BenchmarkMachine(MachineProvenance, frozen=True, kw_only=True):
    """The machine, with the details that matter to a time.

    Attributes:
        cores: How many it has; None where the system does not say.
        load_average_before: How many processes wanted a core in the minute before the start.
    """

    cores: Count | None
    load_average_before: Finite | None


class BenchmarkProvenance(Provenance, frozen=True, kw_only=True):
    """Where a benchmark's record comes from."""

    machine: BenchmarkMachine


class VariantTimes(Part, frozen=True, kw_only=True):
    """The times of one variant.

    Attributes:
        what: What the variant does.
        tokens_per_second: Tokens over the median of the seconds.
        seconds: One per round.
    """

    what: str
    tokens_per_second: Finite
    seconds: list[Finite]


class Ratio(Part, frozen=True, kw_only=True):
    """The seconds of a variant over those of a reference.

    Attributes:
        name: `variant/reference`.
        median: Over rounds.
        interval: Of the median, 95 %.
        rounds: The ratio within each round.
    """

    name: str
    median: Finite
    interval: Interval
    rounds: list[Finite]


class Target(Part, frozen=True, kw_only=True):
    """A promised limit, and what was measured.

    Attributes:
        name: What was measured, with its unit if it has one.
        sense: The side of the limit: "at most", "at least" or "below".
        limit: The promised limit.
        measured: The number; None where nothing was measured.
        interval: Its 95 % interval, where it has one.
        met: Whether the number is on the right side; None where nothing was measured.
    """

    name: str
    sense: str
    limit: Finite
    measured: Finite | None
    interval: Interval | None
    met: bool | None


class PeakMemory(Part, frozen=True, kw_only=True):
    """The peak memory of one pass in a process of its own.

    Attributes:
        variant: Which variant ran.
        factor: How many times the tokens were taken.
        tokens: Tokens of the measured pass.
        loaded_mb: The peak up to the end of loading.
        peak_mb: The peak of the measured pass.
        isolated: Whether the peak before the pass was forgotten.
    """

    variant: str = field(name="way")
    factor: Count
    tokens: Count
    loaded_mb: Finite
    peak_mb: Finite
    isolated: bool | UnsetType = UNSET


class MemoryUsage(Part, frozen=True, kw_only=True):
    """Peak memory of a benchmark's variants.

    Attributes:
        what: How it is measured.
        reason: Why nothing was measured; None where it was.
        growth_mb: The long pass's peak above the short one's.
        peaks: One per pass.
    """

    what: str
    reason: str | None
    growth_mb: Finite | None
    peaks: list[PeakMemory]
