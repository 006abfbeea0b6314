"""The record of a saturation profile."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, field

from cascade.core.display import Displayed, origin_of
from cascade.core.provenance import Provenance
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Part,
    Share,
    StoredRecord,
    UnsetType,
    known,
    strangers,
)

#: By how much the similarity of two vectors can change.
Change = Annotated[float, Meta(ge=0, le=2, description="a change of a similarity, in 0..2")]


#: Profiles of this schema have the content of today's in other files.
SAME_CONTENT = 2


class NoiseFloor(Part, frozen=True, kw_only=True):
    """How far arithmetic alone moves a sequence's mean similarity, in any layer.

    Attributes:
        repeat: The largest change with another batch size, number of threads or attention kernel.
        exact: The largest change with float64; None if it could not be measured.
        variants: The largest change of each variant, or the reason why it could not be measured.
        sequences: The number of sequences that were run.
        long: The largest change of a range of positions of a long sequence, if every hidden state
            is rounded differently; absent where it was not measured.
    """

    repeat: Change
    exact: Change | None
    variants: dict[str, float | str] = field(name="ways")
    sequences: Count
    long: Change | UnsetType = UNSET


class LongContext(Part, frozen=True, kw_only=True):
    """Which long sequences were measured next to those of the corpus.

    Attributes:
        length: The number of tokens of each, 0 if none were measured.
        sequences: The number of long sequences.
        ranges: The number of ranges of positions, as equal as they can be.
        reason: Why none were measured; absent if some were.
    """

    length: Index
    sequences: Index
    ranges: Index
    reason: str | UnsetType = UNSET


#: The coarsest format that holds the values of a tensor exactly, as far as a few rows show.
Format = Literal["int8", "bfloat16", "float16", "float32"]


class TensorSummary(Part, frozen=True, kw_only=True):
    """What identifies the values of one tensor of a model.

    Attributes:
        digest: The hash of dtype, shape and values; empty for a buffer, which is computed when the
            model is loaded, so that its last digits depend on the machine.
        rms: The root mean square of the values.
        format: The coarsest format that holds the values exactly, as far as a few rows show.
    """

    digest: str
    rms: Finite
    format: Format


class ModelParts(Part, frozen=True, kw_only=True):
    """The parts of a model, so that a later gate can tell which of them differ.

    Attributes:
        tensors: Weights and buffers, by name.
        settings: The scalar settings of modules and config, by name; one value for all layers, or
            one per layer. `*` stands for the layer's number.
    """

    tensors: dict[str, TensorSummary]
    settings: dict[str, list[str]]


class LayerRow(Part, frozen=True, kw_only=True):
    """The similarities of one layer's input and output, over all tokens.

    Attributes:
        layer: The layer's number from 1, or "N+norm" for the state after the final norm.
        count: The number of tokens.
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
        rule: How active and stable layers are distinguished.
        source: The publication of the rule.
        cutoff: The mean similarity below which a layer is active; None if there are too few
            layers.
        input_transform: The active layers at the beginning.
        dips: The active layers between stable ones.
        output_transform: The active layers at the end.
        stable_bands: The first and last layer of each run of stable layers.
    """

    rule: str
    source: str
    cutoff: Finite | None
    input_transform: list[str]
    dips: list[str]
    output_transform: list[str]
    stable_bands: list[list[str]]


class HardRatioThreshold(Part, frozen=True, kw_only=True):
    """The threshold with this share of tokens below it."""

    hard_ratio: Share
    threshold: Finite


class SuggestedThresholds(Part, frozen=True, kw_only=True):
    """Thresholds for early exit at the suggested exit layer."""

    exit_layer: str
    by_hard_ratio: list[HardRatioThreshold]


class ProfileRecord(Displayed, StoredRecord, frozen=True, kw_only=True):
    """A saturation profile: kind `saturation`.

    Attributes:
        provenance: Model, corpus, machine, versions and command.
        noise: The noise floor; None if it was not measured, absent in schema 1.
        parts: The parts of the model, if noise was measured; absent in earlier releases.
        layers: One row per layer.
        structure: Active and stable layers.
        thresholds: Thresholds for early exit.
        long_context: The long sequences; absent where nobody asked for them, as in records of
            earlier releases.
        arrays_hash: The hash of the arrays next to the record, once it is sealed.
        hash: The hash of the record itself, once it is sealed.
    """

    KIND: ClassVar[str] = "saturation"
    SCHEMA: ClassVar[int] = 3
    COMMAND: ClassVar[str] = "analyze --output"

    schema: int = 3
    kind: Literal["saturation"] = "saturation"
    provenance: Provenance
    noise: NoiseFloor | UnsetType | None = UNSET
    layers: list[LayerRow]
    structure: LayerRoles
    thresholds: SuggestedThresholds
    long_context: LongContext | UnsetType = UNSET
    parts: ModelParts | UnsetType = UNSET
    arrays_hash: str | UnsetType = UNSET
    hash: str | UnsetType = UNSET

    def inconsistency(self) -> str | None:
        """Describe the first layer or threshold that the table of layers does not have."""
        long = known(self.long_context)
        if long is not None and (long.sequences > 0) is not (long.reason is UNSET):
            return f"expected long sequences or a reason for none, got {long.sequences} of them"
        for row in self.thresholds.by_hard_ratio:
            if not -1 <= row.threshold <= 1:
                return f"expected thresholds in -1..1, got {row.threshold}"
        structure = self.structure
        named = {
            "structure.input_transform": structure.input_transform,
            "structure.dips": structure.dips,
            "structure.output_transform": structure.output_transform,
            "structure.stable_bands": [layer for band in structure.stable_bands for layer in band],
            "thresholds.exit_layer": [self.thresholds.exit_layer],
        }
        return strangers(named, [row.layer for row in self.layers], "a layer")

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
