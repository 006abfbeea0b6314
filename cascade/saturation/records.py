"""The record of a saturation profile."""

from __future__ import annotations

from typing import ClassVar, Literal

from cascade.core.display import Displayed, origin_of
from cascade.core.provenance import Provenance
from cascade.core.schema import UNSET, Count, Finite, Index, Part, Share, StoredRecord, UnsetType


class NoiseFloor(Part, frozen=True, kw_only=True):
    """How far arithmetic alone moves a sequence's mean similarity, in any layer.

    Attributes:
        repeat: The largest change by another batch size, number of threads or attention kernel.
        exact: The largest change by float64; None where it could not be measured.
        ways: The largest change of each variant, or the reason why it could not be measured.
        sequences: How many sequences were run.
    """

    repeat: Finite
    exact: Finite | None
    ways: dict[str, float | str]
    sequences: Count


class LayerRow(Part, frozen=True, kw_only=True):
    """The similarities of one layer's input and output, over all tokens.

    Attributes:
        layer: The layer's number from 1 on, or "N+norm" for the state behind the final norm.
        count: How many tokens.
        frac_negative: The share of tokens below 0.
        frac_below_half: The share of tokens below 0.5.
    """

    layer: str
    count: Index
    mean: Finite
    std: Finite
    min: Finite
    p10: Finite
    p50: Finite
    p90: Finite
    max: Finite
    frac_negative: Share
    frac_below_half: Share


class LayerRoles(Part, frozen=True, kw_only=True):
    """Which layers are active and which are stable.

    Attributes:
        rule: How the two are told apart.
        source: Where the rule comes from.
        cutoff: A layer with a mean similarity below this is active; None for too few layers.
        input_transform: The active layers from the first on.
        dips: The active layers between the stable ones.
        output_transform: The active layers up to the last.
        stable_bands: First and last layer of each run of stable layers.
    """

    rule: str
    source: str
    cutoff: Finite | None
    input_transform: list[str]
    dips: list[str]
    output_transform: list[str]
    stable_bands: list[list[str]]


class HardRatioThreshold(Part, frozen=True, kw_only=True):
    """The threshold below which this share of the tokens lies."""

    hard_ratio: Share
    threshold: Finite


class SuggestedThresholds(Part, frozen=True, kw_only=True):
    """Thresholds for early exit at the suggested layer."""

    exit_layer: str
    by_hard_ratio: list[HardRatioThreshold]


class ProfileRecord(Displayed, StoredRecord, frozen=True, kw_only=True):
    """A saturation profile: kind `saturation`.

    Attributes:
        provenance: Model, corpus, machine, versions and command.
        noise: The noise floor; None where it was not measured, absent from schema 1.
        layers: One row per layer.
        structure: Active and stable layers.
        thresholds: Thresholds for early exit.
        arrays_hash: The hash of the arrays next to the record, once it is sealed.
        hash: The hash of the record itself, once it is sealed.
    """

    KIND: ClassVar[str] = "saturation"
    SCHEMA: ClassVar[int] = 2
    COMMAND: ClassVar[str] = "analyze --output"

    schema: int = 2
    kind: Literal["saturation"] = "saturation"
    provenance: Provenance
    noise: NoiseFloor | UnsetType | None = UNSET
    layers: list[LayerRow]
    structure: LayerRoles
    thresholds: SuggestedThresholds
    arrays_hash: str | UnsetType = UNSET
    hash: str | UnsetType = UNSET

    def _in_one_line(self) -> str:
        exit_layer = self.thresholds.exit_layer
        decoder = [row for row in self.layers if row.layer.isdigit()]
        if not decoder:
            return f"{origin_of(self.provenance)}, no layers"
        lowest = min(decoder, key=lambda row: row.mean)
        return (
            f"{origin_of(self.provenance)}, {len(decoder)} layers; lowest mean similarity "
            f"{lowest.mean:.4f} (layer {lowest.layer}), suggested exit layer {exit_layer}"
        )
