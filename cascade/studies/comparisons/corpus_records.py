"""The record of a comparison of corpora."""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec import field

from cascade.core.display import Displayed
from cascade.core.provenance import CorpusProvenance, MachineProvenance, ModelProvenance
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Interval,
    Part,
    Share,
    StoredRecord,
    UnsetType,
)
from cascade.saturation.records import LayerRoles

#: Where the interval of a layer's difference lies: within the margin, beyond it, or across it.
LayerVerdict = Literal["stays", "moves", "cannot tell"]
#: The same of a realized hard ratio and the tolerance.
TransferVerdict = Literal["transfers", "does not", "cannot tell"]


class CorporaProvenance(Part, frozen=True, kw_only=True):
    """Where a comparison comes from.

    Attributes:
        corpora: Label -> the corpus.
    """

    tokenizer_hash: str | None = None
    model: ModelProvenance
    machine: MachineProvenance | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    command: str | None = None
    corpora: dict[str, CorpusProvenance]


class CorpusComparisonSettings(Part, frozen=True, kw_only=True):
    """How corpora were compared.

    Attributes:
        layer: The exit layer.
        hard_ratios: Shares of hard tokens that thresholds were fitted to.
        margin: The smallest difference of a layer's mean similarity that matters.
        tolerance: How far the realized hard ratio may lie from the wanted one.
        seed: Seed of the resamples.
        layer_suggested: Whether the first corpus suggested the exit layer.
        confidence: Of every interval.
    """

    layer: Count
    hard_ratios: list[Share]
    margin: Finite
    tolerance: Finite
    seed: Index
    layer_suggested: bool
    confidence: Share


class SpecialLayer(Part, frozen=True, kw_only=True):
    """A layer that is special in a corpus, or in some of its resamples.

    Attributes:
        layer: Its label.
        role: Its role in the corpus; None where it is special only in resamples.
        share_of_resamples: In which it is special, in whatever role.
    """

    layer: str
    role: str | None
    share_of_resamples: Share


class ComparedCorpus(Part, frozen=True, kw_only=True):
    """One of the corpora: its size, and the structure of the model's profile on it."""

    label: str
    name: str
    tokens: Count
    sequences: Count
    seq_len: Count
    spread: str | None = None
    structure: LayerRoles
    suggested_exit_layer: Count
    special: list[SpecialLayer]


class SharedSequences(Part, frozen=True, kw_only=True):
    """Two corpora that have sequences in common, so that they are not independent."""

    corpora: list[str]
    sequences: Count


class LayerMean(Part, frozen=True, kw_only=True):
    """A layer's mean similarity in one corpus."""

    mean: Finite
    interval: Interval


class LayerMeans(Part, frozen=True, kw_only=True):
    """A layer's mean similarity in every corpus, in order."""

    layer: str
    means: list[LayerMean]


class LayerDifference(Part, frozen=True, kw_only=True):
    """How far a layer's mean similarity differs between two corpora.

    Attributes:
        layer: Its label.
        difference: Of the means.
        interval: Holds for all layers at once.
        verdict: Where the interval lies.
        tokens_needed: Tokens of each corpus that would decide; None where it is decided, or where
            no number would.
    """

    layer: str
    difference: Finite
    interval: Interval
    verdict: LayerVerdict
    tokens_needed: Count | None


class CorpusDifferences(Part, frozen=True, kw_only=True):
    """How far a corpus's layers lie from the first corpus's.

    Attributes:
        corpus: Its label.
        against: The label of the first corpus.
        rows: One per layer.
        layers: Verdict -> layers, the largest difference first.
    """

    corpus: str
    against: str
    rows: list[LayerDifference]
    layers: dict[LayerVerdict, list[str]]


class SpecialDifference(Part, frozen=True, kw_only=True):
    """A layer that is special in some corpora and not in others.

    Attributes:
        layer: Its label.
        special_in: Labels of the corpora in which it is special.
        shares: Corpus -> share of resamples in which it is special.
        sure: Whether the resamples of every corpus agree.
    """

    layer: str
    special_in: list[str]
    shares: dict[str, Share]
    sure: bool


class SpecialLayers(Part, frozen=True, kw_only=True):
    """Whether the same layers are special in every corpus, and which ones differ."""

    same: bool
    differ: list[SpecialDifference]


class CorpusThreshold(Part, frozen=True, kw_only=True):
    """A threshold fitted on a corpus (see `cascade.stats.thresholds.FittedThreshold`).

    Its intervals are tuples, which `to_json` writes on the row's own line.
    """

    corpus: str
    hard_ratio: Share
    threshold: Finite
    reached: Share
    threshold_interval: tuple[Finite, Finite]
    reached_interval: tuple[Finite, Finite]
    ties: Index


class ThresholdTransfer(Part, frozen=True, kw_only=True):
    """What a threshold that was fitted on one corpus does on another.

    Attributes:
        fitted_on: Label of the corpus that it was fitted on.
        applied_to: Label of the other corpus.
        hard_ratio: The wanted share of hard tokens.
        threshold: The threshold.
        realized: The share of hard tokens on the other corpus.
        interval: Of that share.
        off: The realized share minus the wanted one.
        off_interval: Of that difference.
        verdict: Where that interval lies.
        tokens_needed: Tokens of the other corpus that would decide; None where it is decided, or
            where no number would.
    """

    fitted_on: str = field(name="from")
    applied_to: str = field(name="to")
    hard_ratio: Share
    threshold: Finite
    realized: Share
    interval: Interval
    off: Finite
    off_interval: Interval
    verdict: TransferVerdict
    tokens_needed: Count | None


class ThresholdTransfers(Part, frozen=True, kw_only=True):
    """Every threshold, what it does on every other corpus, and how many transfer."""

    fitted: list[CorpusThreshold]
    rows: list[ThresholdTransfer]
    counts: dict[TransferVerdict, Index]


class CorpusComparison(Displayed, StoredRecord, frozen=True, kw_only=True):
    """What a model does on several corpora.

    Attributes:
        corpora: What was compared; the first is the reference.
        shared: Corpora that have sequences in common.
        layers: The mean similarity of each layer.
        differences: Of every other corpus to the first.
        special: Whether the same layers are special in all of them.
        thresholds: Whether thresholds transfer.
    """

    KIND: ClassVar[str] = "corpus-comparison"
    COMMAND: ClassVar[str] = "compare-corpora --output"

    schema: int = 1
    kind: Literal["corpus-comparison"] = "corpus-comparison"
    provenance: CorporaProvenance
    settings: CorpusComparisonSettings
    corpora: list[ComparedCorpus]
    shared: list[SharedSequences]
    layers: list[LayerMeans]
    differences: list[CorpusDifferences]
    special: SpecialLayers
    thresholds: ThresholdTransfers

    def _in_one_line(self) -> str:
        names = ", ".join(f"{corpus.label} {corpus.name}" for corpus in self.corpora)
        moved = {layer for found in self.differences for layer in found.layers.get("moves", [])}
        return f"{names}; {len(moved)} of {len(self.layers)} layers move"
