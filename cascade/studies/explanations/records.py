"""The records of an explained layer and of an explained final norm."""

from __future__ import annotations

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
)

#: Whether the ablation of a cause closes more than half of the gap.
CauseVerdict = Literal["carries", "does not carry", "cannot tell", "not tried"]


class ExplanationSettings(Part, frozen=True, kw_only=True):
    """How a layer was explained.

    Attributes:
        layer: The layer that is explained.
        contrast: The neighbour it is compared with.
        batch_size: Sequences per forward pass.
        seed: Seed of the intervals.
        carries: A cause is supported where its ablation closes more than this share of the gap.
        least_gap: Gaps below this many degrees are not explained.
        most_dimensions: An update lies in few dimensions if so many hold half of its energy.
        pilot_sequences: Sequences that dimensions and common parts were learned on.
        sequences: Sequences that were measured.
        interval: How intervals were computed.
    """

    layer: str
    contrast: str
    batch_size: int
    seed: int
    carries: Finite
    least_gap: Finite
    most_dimensions: int
    pilot_sequences: int
    sequences: int
    interval: str


class LayerRow(Part, frozen=True, kw_only=True):
    """What one layer does to the residual stream; angles are in degrees.

    `attention_share` and `mlp_share` are the shares of the angle. The attention weights are absent
    (`heads`: null) where the layer does not return them.
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
    """A token's text, and how often it was counted."""

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
    """The residual stream in one entry of the hidden history; `first_norm` is the first token's."""

    entry: Index
    norm: Finite
    first_norm: Finite
    median: Finite
    largest: Finite
    massive: list[MassiveDimension]


class DimensionEnergy(Part, frozen=True, kw_only=True):
    """A dimension of the stream, and its share of the update's energy."""

    dimension: Index
    energy: Finite


class SideRow(Part, frozen=True, kw_only=True):
    """The layer or its neighbour.

    Attributes:
        layer: Its number.
        degrees: Mean angle by which it turns the stream.
        similarity: Mean similarity of its input and output.
        common_share: Share of the update's energy that is the same for every token.
        dimensions: The dimensions with half of the energy; empty where they are many.
        dimensions_for_half: How many they are.
        massive: Dimensions in which its input or output is massive.
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
    """What is left of both layers' angles without a cause, and what that closes of the gap.

    Attributes:
        degrees: Mean angle of the layer.
        similarity: Mean similarity of the layer.
        contrast_degrees: Mean angle of the neighbour.
        contrast_similarity: Mean similarity of the neighbour.
        closed: Share of the gap that is gone; None where there is no gap to close.
        interval: Of that share.
    """

    degrees: Finite
    similarity: Finite
    contrast_degrees: Finite
    contrast_similarity: Finite
    closed: Finite | None
    interval: Interval | None


class CauseRow(Part, frozen=True, kw_only=True):
    """A possible cause, and whether its ablation supports it.

    All numbers are absent where the cause was not tried; `reason` says why not. See `CauseEffect`.

    Attributes:
        cause: Its name.
        verdict: Whether its ablation closes more than half of the gap.
        reason: Why it was not tried.
        token_class: Of the cause "one_class".
        positions: Of the cause "first_positions".
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
        """Its numbers; None where it was not tried."""
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
    """A layer's mean similarity over some tokens; no interval where they are too few."""

    similarity: Finite
    interval: Interval | None


class TokenGroup(Part, frozen=True, kw_only=True):
    """The similarity of both layers over the tokens of one class, or of some positions."""

    name: str
    tokens: Count
    layer: GroupSimilarity
    contrast: GroupSimilarity


class AblationRow(Part, frozen=True, kw_only=True):
    """The model's perplexity without a layer or a part of it; the interval is the ratio's."""

    layer: str
    ablation: str
    perplexity: Finite
    full_perplexity: Finite
    perplexity_ratio: Finite
    interval: Interval


class ExplanationVerdict(Part, frozen=True, kw_only=True):
    """Whether there is a gap to explain, and the causes that their ablations support."""

    asks_for_a_cause: bool
    carried_by: list[str]


class LayerExplanation(Displayed, StoredRecord, frozen=True, kw_only=True):
    """Why a layer turns the stream more than a neighbour does, and what that is worth.

    Attributes:
        missing: What could not be measured, and why.
        layers: The layers over depth.
        entries: The stream over depth.
        sides: The layer, then its neighbour.
        gap: The difference of their angles.
        causes: What closes it.
        classes: Similarity by token class.
        positions: Similarity by position in the sequence.
        ablations: Perplexity without a part of either layer.
        verdict: The causes that are supported.
    """

    KIND: ClassVar[str] = "explanation"
    COMMAND: ClassVar[str] = "explain --output"

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
    """How a final norm was explained; fields as in `ExplanationSettings`."""

    layer: str
    batch_size: int
    seed: int
    pilot_sequences: int
    sequences: int
    interval: str


class NormTraits(Part, frozen=True, kw_only=True):
    """What kind of norm it is."""

    subtracts_mean: bool
    has_bias: bool


class NormWeights(Part, frozen=True, kw_only=True):
    """The spread of the norm's weights, and how many are negative."""

    smallest: Finite
    median: Finite
    largest: Finite
    negative: Index
    dimensions: Count


#: The two states between which a similarity is taken.
NormedPair = Literal["residual", "behind", "both_behind", "equal_weights", "without_bias"]


class NormSimilarity(Part, frozen=True, kw_only=True):
    """A mean similarity of the last layer's input and output, by where the two are taken."""

    between: NormedPair
    mean: Finite
    interval: Interval


class NormDimension(Part, frozen=True, kw_only=True):
    """A dimension of the norm.

    Attributes:
        dimension: Its number.
        weight: The norm's weight.
        energy: Its share of the output's energy, first tokens left out.
        before: What it adds to the similarity before the norm.
        behind: What it adds to the similarity behind the norm.
    """

    dimension: Index
    weight: Finite
    energy: Finite
    before: Finite
    behind: Finite


class LevelledWeights(Part, frozen=True, kw_only=True):
    """The similarity with the first few weights set to the median, or with all others.

    Attributes:
        weights: How many they are.
        similarity: With these weights set to the median.
        interval: Of that similarity.
        explained: Share of the difference that they explain; None where there is no difference.
        alone: Similarity with all others set to the median.
        explained_alone: Share of the difference that they explain alone.
    """

    weights: Count
    similarity: Finite
    interval: Interval
    explained: Finite | None
    alone: Finite
    explained_alone: Finite | None


class FinalNormExplanation(Displayed, StoredRecord, frozen=True, kw_only=True):
    """What the final norm does to the similarity of the last layer, and by which weights.

    Attributes:
        norm: What kind of norm it is.
        weights: The spread of its weights.
        similarities: Of the last layer, by where its input and output are taken.
        dimensions: Those that take most away from the similarity, in order.
        levelled: What the first few of them explain.
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
            for name, words in (("residual", "before the norm"), ("behind", "behind it"))
            if name in means
        )
        layer = self.settings.layer
        return f"final norm after layer {layer}, {origin_of(self.provenance)}; similarity {found}"
