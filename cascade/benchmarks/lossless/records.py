"""The record of the benchmark of lossless decoding."""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec import field

from cascade.benchmarks.lossless.config import LosslessBenchmarkConfig
from cascade.benchmarks.records import BenchmarkProvenance
from cascade.core.schema import Count, Finite, Index, Interval, Part, Positive, StoredRecord, Text


class DraftPosition(Part, frozen=True, kw_only=True):
    """The drafts that reach a position, and how many are right there.

    Attributes:
        drafts: Drafts with a token at this position.
        accepted: Those whose token there was confirmed by the full model.
    """

    drafts: Count
    accepted: Index


class ProposerCounts(Part, frozen=True, kw_only=True):
    """The drafted tokens of one proposer.

    Attributes:
        name: The proposer.
        drafted: Tokens that it drafted.
        accepted: Those that the full model confirmed.
    """

    name: Text
    drafted: Index
    accepted: Index


class DraftCounts(Part, frozen=True, kw_only=True):
    """Passes and drafts of a variant, over all batches.

    Attributes:
        engine: What computed the layers.
        passes: Passes of the full model after the prompt.
        tokens_per_pass: New tokens after the first one, per row and pass. Rows that end before
            the others of their batch lower it.
        drafted: Drafted tokens.
        accepted: Drafted tokens that the full model confirmed.
        positions: Acceptance at the first, second, ... position of a draft.
        proposers: Acceptance of each proposer.
    """

    engine: Text
    passes: Index
    tokens_per_pass: Finite
    drafted: Index
    accepted: Index
    positions: list[DraftPosition]
    proposers: list[ProposerCounts]


class TextDifference(Part, frozen=True, kw_only=True):
    """The first difference between a text and that of `generate`.

    Attributes:
        prompt: Number of the prompt, from 1.
        token: Number of the first new token that differs, from 1.
    """

    prompt: Count
    token: Count


class LosslessVariant(Part, frozen=True, kw_only=True):
    """Times and texts of one variant over the batches of a cell.

    Attributes:
        name: Name of the variant.
        what: Description of the variant.
        reason: Reason why it was not measured; null if it was.
        seconds: Seconds of each batch, prompt included.
        cpu_seconds: CPU seconds of each batch.
        new_tokens: New tokens of each batch.
        milliseconds_per_token: Median milliseconds per new token; null if not measured.
        speedup: Median over batches of the time per new token of `generate`, divided by that of the
            variant.
        interval: 95 % interval of the speedup.
        texts: Number of texts.
        equal: Texts that equal those of `generate`, token for token; null if it is not expected,
            because another library or precision made them.
        first_difference: Where the first unequal text differs; null if there is none.
        drafts: Passes and drafts; null if they are unknown.
    """

    name: Text
    what: Text
    reason: str | None = None
    seconds: list[Positive] = field(default_factory=list)
    cpu_seconds: list[Finite] = field(default_factory=list)
    new_tokens: list[Index] = field(default_factory=list)
    milliseconds_per_token: Positive | None = None
    speedup: Positive | None = None
    interval: Interval | None = None
    texts: Index = 0
    equal: Index | None = None
    first_difference: TextDifference | None = None
    drafts: DraftCounts | None = None


class TimedBatch(Part, frozen=True, kw_only=True):
    """How one batch was timed.

    Attributes:
        order: Order of the variants.
        load_average: One-minute load average before the batch; null if unknown.
        repeated: Whether the batch was disturbed and therefore timed again.
        disturbed: How the kept times were disturbed; null if they were not.
    """

    order: list[str]
    load_average: Finite | None
    repeated: bool
    disturbed: str | None


class LosslessCell(Part, frozen=True, kw_only=True):
    """All variants on one dtype, kind of prompts and batch size.

    Attributes:
        dtype: Dtype of the model.
        prompts: Kind of the prompts.
        batch_size: Prompts per batch.
        prompt_tokens: Median number of tokens of a prompt.
        variants: Times and texts of each variant, the fastest first.
        batches: How each batch was timed.
    """

    dtype: Text
    prompts: Text
    batch_size: Count
    prompt_tokens: Positive
    variants: list[LosslessVariant]
    batches: list[TimedBatch]


class DecodingMemory(Part, frozen=True, kw_only=True):
    """The memory of one dtype.

    Attributes:
        dtype: Dtype of the model.
        engine: What computes the layers.
        obstacle: Why the engine does not support the model; null if it does.
        weights_mb: Weights of the model, in MB.
        copied_mb: Second copies of weights, in MB.
        peak_mb: Peak resident memory of the process while this dtype was timed, in MB; null if
            unknown.
        isolated: Whether the operating system could reset the peak before this dtype was loaded.
    """

    dtype: Text
    engine: Text
    obstacle: str | None
    weights_mb: Finite
    copied_mb: Finite
    peak_mb: Finite | None
    isolated: bool


class Peer(Part, frozen=True, kw_only=True):
    """Another library that was timed, or the reason why it was not.

    Attributes:
        name: Name of its variant.
        package: Package of the library.
        version: Installed version; null if it is not installed.
        precision: Precision of its weights; null if it was not timed.
        reason: Reason why it was not timed; null if it was.
    """

    name: Text
    package: Text
    version: str | None
    precision: str | None
    reason: str | None


class LosslessBenchmark(StoredRecord, frozen=True, kw_only=True):
    """Record of the benchmark of lossless decoding.

    Attributes:
        settings: Options of the benchmark.
        cells: Results of each dtype, kind of prompts and batch size.
        memory: Memory of each dtype.
        peers: Other libraries.
        interval: Description of the speedup and its interval.
    """

    KIND: ClassVar[str] = "bench.lossless"
    COMMAND: ClassVar[str] = "bench decode --output"

    schema: int = 1
    kind: Literal["bench.lossless"] = "bench.lossless"
    provenance: BenchmarkProvenance
    settings: LosslessBenchmarkConfig
    cells: list[LosslessCell]
    memory: list[DecodingMemory]
    peers: list[Peer]
    interval: str

    def inconsistency(self) -> str | None:
        """Describe the first list whose length contradicts the number of batches; None if none."""
        for cell in self.cells:
            for row in cell.variants:
                lengths = {len(row.seconds), len(row.cpu_seconds), len(row.new_tokens)}
                if len(lengths) > 1 or max(lengths) > len(cell.batches):
                    return (
                        f"expected as many seconds, cpu_seconds and new_tokens of {row.name} as "
                        f"batches ({len(cell.batches)}), or the same smaller number"
                    )
        return None
