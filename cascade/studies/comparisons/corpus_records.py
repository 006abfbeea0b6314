"""Record of a comparison of corpora."""

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
    strangers,
)
from cascade.saturation.records import LayerRoles

#: Position of the interval of a layer's difference: within the margin, beyond it, or across it.
LayerVerdict = Literal["stays", "moves", "cannot tell"]
#: Position of the interval of an actual hard ratio: within the tolerance, beyond it, or across it.
TransferVerdict = Literal["transfers", "does not", "cannot tell"]


class CorporaProvenance(Part, frozen=True, kw_only=True):
    """Origin of a comparison of corpora.

    Attributes:
        corpora: Provenance of each corpus, by label.
    """

    tokenizer_hash: str | None = None
    model: ModelProvenance
    machine: MachineProvenance | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    command: str | None = None
    corpora: dict[str, CorpusProvenance]


class CorpusComparisonSettings(Part, frozen=True, kw_only=True):
    """Settings of a comparison of corpora.

    Attributes:
        layer: Exit layer.
        hard_ratios: Shares of hard tokens that thresholds were fitted to.
        margin: Smallest relevant difference of a layer's mean similarity.
        tolerance: Largest difference between the actual and the requested hard ratio.
        seed: Seed of the resamples.
        layer_suggested: Whether the first corpus suggested the exit layer.
        confidence: Confidence of all intervals.
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
        layer: Label of the layer.
        role: Role in the corpus; null if the layer is special only in resamples.
        share_of_resamples: Share of resamples in which the layer is special, in any role.
    """

    layer: str
    role: str | None
    share_of_resamples: Share


class ComparedCorpus(Part, frozen=True, kw_only=True):
    """One of the corpora: its size and the structure of the model's profile on it."""

    label: str
    name: str
    tokens: Count
    sequences: Count
    seq_len: Count
    spread: str | None = None
    bos: Literal["yes", "no"] | UnsetType = UNSET
    structure: LayerRoles
    suggested_exit_layer: Count
    special: list[SpecialLayer]


class SharedSequences(Part, frozen=True, kw_only=True):
    """Two corpora that share sequences and are therefore not independent."""

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
    """Difference of a layer's mean similarity between two corpora.

    Attributes:
        layer: Label of the layer.
        difference: Difference of the means.
        interval: Interval of the difference. The intervals of all layers hold simultaneously.
        verdict: Position of the interval relative to the margin.
        tokens_needed: Tokens per corpus that would allow a verdict; null if there is a verdict, or
            if no number of tokens would allow one.
    """

    layer: str
    difference: Finite
    interval: Interval
    verdict: LayerVerdict
    tokens_needed: Count | None


class CorpusDifferences(Part, frozen=True, kw_only=True):
    """Differences per layer between a corpus and the first corpus.

    Attributes:
        corpus: Label of the corpus.
        against: Label of the first corpus.
        rows: One row per layer.
        layers: Layers by verdict, the largest difference first.
    """

    corpus: str
    against: str
    rows: list[LayerDifference]
    layers: dict[LayerVerdict, list[str]]


class SpecialDifference(Part, frozen=True, kw_only=True):
    """A layer that is special in some corpora and not in others.

    Attributes:
        layer: Label of the layer.
        special_in: Labels of the corpora in which the layer is special.
        shares: Share of resamples in which the layer is special, by corpus.
        sure: Whether the resamples of every corpus confirm the difference.
    """

    layer: str
    special_in: list[str]
    shares: dict[str, Share]
    sure: bool


class SpecialLayers(Part, frozen=True, kw_only=True):
    """Whether the same layers are special in every corpus, and the layers that differ."""

    same: bool
    differ: list[SpecialDifference]


class CorpusThreshold(Part, frozen=True, kw_only=True):
    """A threshold fitted on a corpus (see `cascade.stats.thresholds.FittedThreshold`).

    The intervals are tuples, which `to_json` writes on one line.
    """

    corpus: str
    hard_ratio: Share
    threshold: Finite
    reached: Share
    threshold_interval: tuple[Finite, Finite]
    reached_interval: tuple[Finite, Finite]
    ties: Index


class ThresholdTransfer(Part, frozen=True, kw_only=True):
    """A threshold that was fitted on one corpus and applied to another.

    Attributes:
        fitted_on: Label of the corpus that the threshold was fitted on.
        applied_to: Label of the other corpus.
        hard_ratio: Requested share of hard tokens.
        threshold: The threshold.
        realized: Actual share of hard tokens on the other corpus.
        interval: Interval of the actual share.
        off: Actual share minus requested share.
        off_interval: Interval of that difference.
        verdict: Position of that interval relative to the tolerance.
        tokens_needed: Tokens of the other corpus that would allow a verdict; null if there is a
            verdict, or if no number of tokens would allow one.
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
    """All fitted thresholds, their hard ratios on the other corpora, and counts of verdicts."""

    fitted: list[CorpusThreshold]
    rows: list[ThresholdTransfer]
    counts: dict[TransferVerdict, Index]


class CorpusComparison(Displayed, StoredRecord, frozen=True, kw_only=True):
    """A comparison of one model on several corpora.

    Attributes:
        corpora: Compared corpora. The first one is the reference.
        shared: Pairs of corpora that share sequences.
        layers: Mean similarity of each layer.
        differences: Differences of every other corpus to the first.
        special: Whether the same layers are special in all corpora.
        thresholds: Whether thresholds transfer between corpora.
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

    def inconsistency(self) -> str | None:
        """Describe the first corpus or layer that the record does not have."""
        labels = [corpus.label for corpus in self.corpora]
        if len(set(labels)) < len(labels):
            return "expected every label of a corpus once"
        layers = [row.layer for row in self.layers]
        if any(len(row.means) != len(labels) for row in self.layers):
            return f"expected {len(labels)} means for every layer, one for each corpus"
        corpora: dict[str, list[str]] = {
            "shared": [label for row in self.shared for label in row.corpora],
            "differences": [
                label for row in self.differences for label in (row.corpus, row.against)
            ],
            "special.differ": [label for row in self.special.differ for label in row.special_in],
            "thresholds.fitted": [row.corpus for row in self.thresholds.fitted],
            "thresholds.rows": [
                label for row in self.thresholds.rows for label in (row.fitted_on, row.applied_to)
            ],
        }
        named: dict[str, list[str]] = {
            "corpora": [row.layer for corpus in self.corpora for row in corpus.special],
            "special.differ": [row.layer for row in self.special.differ],
        }
        for number, pair in enumerate(self.differences):
            place = f"differences[{number}]"
            rows = [row.layer for row in pair.rows]
            if sorted(rows) != sorted(layers):
                return f"expected a row for every layer at {place}.rows, each once"
            named[f"{place}.layers"] = [layer for each in pair.layers.values() for layer in each]
        return strangers(corpora, labels, "a corpus") or strangers(named, layers, "a layer")

    def _in_one_line(self) -> str:
        names = ", ".join(f"{corpus.label} {corpus.name}" for corpus in self.corpora)
        moved = {layer for found in self.differences for layer in found.layers.get("moves", [])}
        return f"{names}; {len(moved)} of {len(self.layers)} layers move"
