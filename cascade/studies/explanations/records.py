"""Records of explanations of a layer and of the final norm."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from msgspec import field

from cascade.core.display import Displayed, origin_of
from cascade.core.provenance import Provenance
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Interval,
    Part,
    StoredRecord,
    Text,
    UnsetType,
    known,
)

#: How intervals of similarities, of shares of the gap and of perplexity ratios are computed.
INTERVAL = "95 % percentile bootstrap over whole sequences, 999 resamples"

#: Whether a cause is supported by its ablation, which then closes more than half of the gap.
CauseVerdict = Literal["supported", "not supported", "undecided", "not tried"]


class ExplanationSettings(Part, frozen=True, kw_only=True):
    """Settings of the explanation of a layer.

    Attributes:
        layer: The explained layer.
        contrast: Its neighbour.
        batch_size: Sequences per forward pass.
        seed: Seed of the intervals.
        supported_share: A cause is supported if its removal closes more than this share of the gap.
        least_gap: Gaps below this many degrees are not explained.
        most_dimensions: An update lies in few dimensions if at most this many hold half of its
            energy.
        pilot_sequences: Number of sequences for learning the traits of both layers.
        sequences: Number of measured sequences.
        interval: Method of the intervals.
    """

    layer: str
    contrast: str
    batch_size: int
    seed: int
    supported_share: Finite = field(name="carries")
    least_gap: Finite
    most_dimensions: int
    pilot_sequences: int
    sequences: int
    interval: str


class LayerRow(Part, frozen=True, kw_only=True):
    """The effect of one layer on the residual stream, with angles in degrees.

    `attention_share` and `mlp_share` are shares of the angle. If the layer returns no attention
    weights, their fields are absent and `heads` is null.
    """

    layer: str
    update_ratio: Finite
    update_angle: Finite
    attention_ratio: Finite
    attention_angle: Finite
    mlp_ratio: Finite
    mlp_angle: Finite
    angle: Finite
    similarity: Finite
    first_token_attention: Finite | UnsetType | None = UNSET
    delimiter_attention: Finite | UnsetType | None = UNSET
    attention_share: Finite | None
    mlp_share: Finite | None
    heads: list[Finite] | None = None


class TokenCount(Part, frozen=True, kw_only=True):
    """The text of a token and its count."""

    text: str
    count: int


class MassiveDimension(Part, frozen=True, kw_only=True):
    """The massive activations of one dimension in one entry of the hidden history."""

    dimension: Index
    activations: Count
    at_first_token: Index
    largest: Finite
    tokens: list[TokenCount]


class StreamEntry(Part, frozen=True, kw_only=True):
    """The residual stream in one hidden history entry. `first_norm` is the first token's norm."""

    entry: Index
    norm: Finite
    first_norm: Finite
    median: Finite
    largest: Finite
    massive: list[MassiveDimension]


class DimensionEnergy(Part, frozen=True, kw_only=True):
    """A dimension of the stream and its share of the update's energy."""

    dimension: Index
    energy: Finite


class SideRow(Part, frozen=True, kw_only=True):
    """The explained layer or its neighbour.

    Attributes:
        layer: Number of the layer.
        degrees: Mean angle by which the layer turns the stream.
        similarity: Mean similarity of the layer's input and output.
        common_share: Share of the update's energy that is the same for every token.
        dimensions: Dimensions that hold half of the energy; empty if they are many.
        dimensions_for_half: Number of dimensions that hold half of the energy.
        massive: Dimensions with massive activations in the layer's input or output.
        update_size: Median norm of the update, relative to the stream's.
        stream_size: Median norm of the stream.
        update_cosine: Mean cosine of the update and the stream.
    """

    layer: str
    degrees: Finite
    similarity: Finite
    common_share: Finite
    dimensions: list[DimensionEnergy]
    dimensions_for_half: Count
    massive: list[Index]
    update_size: Finite
    stream_size: Finite
    update_cosine: Finite


class GapRow(Part, frozen=True, kw_only=True):
    """The angle by which the layer turns the stream more than its neighbour, in degrees."""

    degrees: Finite
    interval: Interval
    asks_for_a_cause: bool


class CauseEffect(Part, frozen=True, kw_only=True):
    """The angles of both layers without a cause, and the closed share of the gap.

    Attributes:
        degrees: Mean angle of the layer.
        similarity: Mean similarity of the layer.
        contrast_degrees: Mean angle of the neighbour.
        contrast_similarity: Mean similarity of the neighbour.
        closed: Closed share of the gap; null if there is no gap.
        interval: Interval of that share.
    """

    degrees: Finite
    similarity: Finite
    contrast_degrees: Finite
    contrast_similarity: Finite
    closed: Finite | None
    interval: Interval | None


class CauseRow(Part, frozen=True, kw_only=True):
    """A possible cause, and whether its removal supports it.

    For a cause that was not tried, all numbers are absent and `reason` says why. See `CauseEffect`.

    Attributes:
        cause: Name of the cause.
        verdict: Whether its removal closes more than half of the gap.
        reason: Reason why the cause was not tried.
        token_class: Excluded token class, for the cause "one_class".
        positions: Number of excluded positions, for the cause "first_positions".
    """

    cause: str
    degrees: Finite | UnsetType = UNSET
    similarity: Finite | UnsetType = UNSET
    contrast_degrees: Finite | UnsetType = UNSET
    contrast_similarity: Finite | UnsetType = UNSET
    closed: Finite | UnsetType | None = UNSET
    interval: Interval | UnsetType | None = UNSET
    verdict: CauseVerdict
    reason: str | UnsetType = UNSET
    token_class: str | UnsetType = field(name="class", default=UNSET)
    positions: int | UnsetType = UNSET

    @property
    def effect(self) -> CauseEffect | None:
        """The numbers of the cause; None if it was not tried."""
        if (
            self.degrees is UNSET
            or self.similarity is UNSET
            or self.contrast_degrees is UNSET
            or self.contrast_similarity is UNSET
        ):
            return None
        return CauseEffect(
            degrees=self.degrees,
            similarity=self.similarity,
            contrast_degrees=self.contrast_degrees,
            contrast_similarity=self.contrast_similarity,
            closed=None if self.closed is UNSET else self.closed,
            interval=None if self.interval is UNSET else self.interval,
        )


class GroupSimilarity(Part, frozen=True, kw_only=True):
    """A layer's mean similarity over some tokens. The interval is null if they are too few."""

    similarity: Finite
    interval: Interval | None


class TokenGroup(Part, frozen=True, kw_only=True):
    """The similarity of both layers over the tokens of one class or range of positions."""

    name: str
    tokens: Count
    layer: GroupSimilarity
    contrast: GroupSimilarity


class AblationRow(Part, frozen=True, kw_only=True):
    """The model's perplexity under one ablation of a layer. The interval is that of the ratio.

    A perplexity above e^700, which no number holds, is null. Nats per token are absent in records
    of earlier releases.
    """

    layer: str
    ablation: str
    perplexity: Finite | None
    full_perplexity: Finite | None
    perplexity_ratio: Finite | None
    interval: Interval | None
    nats_per_token: Finite | UnsetType = UNSET
    full_nats_per_token: Finite | UnsetType = UNSET
    nats_difference: Finite | UnsetType = UNSET
    nats_interval: Interval | UnsetType = UNSET

    @property
    def added_nats(self) -> float:
        """The logarithm of the ratio, also of earlier records."""
        nats = known(self.nats_difference)
        return math.log(self.perplexity_ratio or math.inf) if nats is None else nats


class ExplanationVerdict(Part, frozen=True, kw_only=True):
    """Whether there is a gap to explain, and the causes that are supported."""

    asks_for_a_cause: bool
    carried_by: list[str]


class LayerExplanation(Displayed, StoredRecord, frozen=True, kw_only=True):
    """An explanation of why a layer turns the stream more than its neighbour.

    Attributes:
        missing: What could not be measured, with reasons.
        layers: Effect of every layer on the stream.
        entries: Residual stream in every entry of the hidden history.
        sides: The layer, then its neighbour.
        gap: Difference of their angles.
        causes: Possible causes, with the closed share of the gap.
        classes: Similarity by token class.
        positions: Similarity by position in the sequence.
        ablations: Perplexity under ablations of either layer.
        verdict: The supported causes.
    """

    KIND: ClassVar[str] = "explanation"
    COMMAND: ClassVar[str] = "explain --output"
    RENAMED: ClassVar[dict[tuple[str, str], dict[str, str]]] = {
        ("causes", "verdict"): {
            "carries": "supported",
            "does not carry": "not supported",
            "cannot tell": "undecided",
        }
    }

    schema: int = 1
    kind: Literal["explanation"] = "explanation"
    provenance: Provenance
    settings: ExplanationSettings
    missing: list[Text]
    layers: list[LayerRow]
    entries: list[StreamEntry]
    sides: list[SideRow]
    gap: GapRow
    causes: list[CauseRow]
    classes: list[TokenGroup]
    positions: list[TokenGroup]
    ablations: list[AblationRow]
    verdict: ExplanationVerdict

    def _in_one_line(self) -> str:
        settings = self.settings
        causes = ", ".join(self.verdict.carried_by) or "none"
        return (
            f"layer {settings.layer} against layer {settings.contrast}, "
            f"{origin_of(self.provenance)}; gap {self.gap.degrees:.2f} degrees, supported causes: "
            f"{causes}"
        )


class FinalNormSettings(Part, frozen=True, kw_only=True):
    """Settings of the explanation of a final norm. The fields are as in `ExplanationSettings`."""

    layer: str
    batch_size: int
    seed: int
    pilot_sequences: int
    sequences: int
    interval: str


class NormTraits(Part, frozen=True, kw_only=True):
    """The kind of the norm."""

    subtracts_mean: bool
    has_bias: bool


class NormWeights(Part, frozen=True, kw_only=True):
    """The spread of the norm's weights and the number of negative ones."""

    smallest: Finite
    median: Finite
    largest: Finite
    negative: Index
    dimensions: Count


#: The pair of states whose similarity is measured.
NormedPair = Literal["residual", "behind", "both_behind", "equal_weights", "without_bias"]


class NormSimilarity(Part, frozen=True, kw_only=True):
    """The mean similarity of the last layer's input and output, for one pair of states."""

    between: NormedPair
    mean: Finite
    interval: Interval


class NormDimension(Part, frozen=True, kw_only=True):
    """A dimension of the norm.

    Attributes:
        dimension: Number of the dimension.
        weight: Weight of the norm.
        energy: Share of the output's energy, without first tokens.
        before: Contribution to the similarity before the norm.
        behind: Contribution to the similarity after the norm.
    """

    dimension: Index
    weight: Finite
    energy: Finite
    before: Finite
    behind: Finite


class LevelledWeights(Part, frozen=True, kw_only=True):
    """The similarity with the leading weights set to the median, and with all others set to it.

    Attributes:
        weights: Number of leading weights.
        similarity: Similarity with the leading weights set to the median.
        interval: Interval of that similarity.
        explained: Share of the difference that closes then; null if there is no difference.
        alone: Similarity with all other weights set to the median.
        explained_alone: Share of the difference that the leading weights make alone; null if there
            is no difference.
    """

    weights: Count
    similarity: Finite
    interval: Interval
    explained: Finite | None
    alone: Finite
    explained_alone: Finite | None


class FinalNormExplanation(Displayed, StoredRecord, frozen=True, kw_only=True):
    """An explanation of the final norm's effect on the similarity of the last layer.

    Attributes:
        norm: Kind of the norm.
        weights: Spread of the weights.
        similarities: Similarity of the last layer for each pair of states.
        dimensions: Dimensions that reduce the similarity most, in order.
        levelled: Share of the effect that the leading weights explain.
    """

    KIND: ClassVar[str] = "final-norm"
    COMMAND: ClassVar[str] = "explain --output"

    schema: int = 1
    kind: Literal["final-norm"] = "final-norm"
    provenance: Provenance
    settings: FinalNormSettings
    norm: NormTraits
    weights: NormWeights
    similarities: list[NormSimilarity]
    dimensions: list[NormDimension]
    levelled: list[LevelledWeights]

    def _in_one_line(self) -> str:
        means = {row.between: row.mean for row in self.similarities}
        found = ", ".join(
            f"{words} {means[name]:.4f}"
            for name, words in (("residual", "before the norm"), ("behind", "after it"))
            if name in means
        )
        layer = self.settings.layer
        return f"final norm after layer {layer}, {origin_of(self.provenance)}; similarity {found}"
