"""The record of a comparison of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from msgspec import field

from cascade.core.display import Displayed
from cascade.core.provenance import CorpusProvenance, MachineProvenance, ModelProvenance
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Interval,
    Part,
    Share,
    StoredRecord,
    UnsetType,
)
from cascade.saturation.records import HardRatioThreshold, LayerRoles, LayerRow


class ModelsProvenance(Part, frozen=True, kw_only=True):
    """What all models share; each has its own model and corpus in `ComparedModel.provenance`."""

    machine: MachineProvenance | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    command: str | None = None


class ComparisonRules(Part, frozen=True, kw_only=True):
    """How depths, dips, exit layers and differences are determined, in words."""

    depth: str
    dips: str
    exit: str
    spared: str
    paired: str
    apart: str


class ModelSizes(Part, frozen=True, kw_only=True):
    """What follows from a model's configuration.

    Attributes:
        family: E.g. "llama".
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        vocab_size: Outputs of the LM head.
        parameters: All of the model's.
        layer_parameters: Of all decoder layers together.
        seq_len: Tokens per sequence that operations were counted for.
        operations_per_token: Of the whole model.
        layer_share: The mean decoder layer's share of them.
        lm_head_share: The LM head's share of them.
    """

    family: str
    num_layers: Count
    hidden_size: Count
    vocab_size: Count
    parameters: Count
    layer_parameters: Count
    seq_len: Count
    operations_per_token: Count
    layer_share: Share
    lm_head_share: Share


class ComparedModelProvenance(Part, frozen=True, kw_only=True):
    """Where one model's profile comes from."""

    model: ModelProvenance
    tokenizer_hash: str | None = None
    corpus: CorpusProvenance
    machine: MachineProvenance | UnsetType = UNSET


class LayerAtDepth(LayerRow, frozen=True, kw_only=True):
    """A layer's statistics, and its relative depth; None for the state behind the final norm."""

    depth: Finite | None


class SuggestedExit(Part, frozen=True, kw_only=True):
    """The exit layer that a profile suggests.

    Attributes:
        layer: Its number.
        depth: Its relative depth.
        spared: Share of the operations in the layers behind it.
        by_hard_ratio: Its thresholds.
    """

    layer: str
    depth: Finite
    spared: Finite
    by_hard_ratio: list[HardRatioThreshold]


class ComparedModel(Part, frozen=True, kw_only=True):
    """One of the models; what has to be measured is null where it was not (see `measurement`)."""

    label: str
    name: str
    measured: bool
    sizes: ModelSizes
    configuration: str
    provenance: ComparedModelProvenance | None
    layers: list[LayerAtDepth] | None
    structure: LayerRoles | None
    exit: SuggestedExit | None

    @property
    def measurement(self) -> ModelMeasurement | None:
        """What was measured; None for a model of which only the configuration is known."""
        if (
            self.provenance is None
            or self.layers is None
            or self.structure is None
            or self.exit is None
        ):
            return None
        return ModelMeasurement(
            self.label,
            self.name,
            self.sizes,
            self.provenance,
            self.layers,
            self.structure,
            self.exit,
        )


@dataclass(frozen=True)
class ModelMeasurement:
    """A model that was measured; fields as in `ComparedModel`."""

    label: str
    name: str
    sizes: ModelSizes
    provenance: ComparedModelProvenance
    layers: list[LayerAtDepth]
    structure: LayerRoles
    exit: SuggestedExit


class DipMatch(Part, frozen=True, kw_only=True):
    """Two dips that match: the first model's, then the other's."""

    layers: list[str]
    depths: list[Finite]
    means: list[Finite]


class MatchedDips(Part, frozen=True, kw_only=True):
    """The dips of two models.

    Attributes:
        judged: Whether both have layers enough to find dips.
        tolerance: How far the relative depths of a match may differ.
        matched: The matches.
        unmatched: The dips without a match, of the first model and of the other.
    """

    judged: bool
    tolerance: Finite
    matched: list[DipMatch]
    unmatched: list[list[str]]


class ProfileDistance(Part, frozen=True, kw_only=True):
    """How far two profiles lie apart, in degrees, and where most."""

    degrees: Finite
    most_degrees: Finite
    most_depth: Finite


class LayerChange(Part, frozen=True, kw_only=True):
    """How far each sequence's mean similarity changed in a layer.

    Attributes:
        layer: Its label.
        mean: Mean change over sequences.
        interval: Of the mean; None for a single sequence.
        mean_size: Mean absolute change.
        largest: The largest change.
        sequence: The sequence that changed most, from 1.
    """

    layer: str
    mean: Finite
    interval: Interval | None
    mean_size: Finite
    largest: Finite
    sequence: Count


class PairedChanges(Part, frozen=True, kw_only=True):
    """What changed between two models over the same tokens.

    Attributes:
        sequences: How many were compared.
        layers: One row per layer.
        largest_mover: The decoder layer that changed most.
    """

    sequences: Count
    layers: list[LayerChange]
    largest_mover: str


class ReachedHardRatio(Part, frozen=True, kw_only=True):
    """The hard ratio that a threshold of the first model reaches in the other."""

    layer: str
    hard_ratio: Share
    threshold: Finite
    reached: Share


class ModelPair(Part, frozen=True, kw_only=True):
    """A measured model and the first one.

    Attributes:
        model: The model's label.
        against: The first model's label.
        same_tokenizer: Whether both have the same tokenizer.
        dips: Their dips, matched.
        apart: How far their profiles lie apart.
        unpaired: Why their sequences cannot be compared; None where they can.
        paired: What changed over the same tokens; None where they cannot be compared.
        thresholds: The first model's thresholds in the other; None where their depths differ.
    """

    model: str
    against: str
    same_tokenizer: bool
    dips: MatchedDips
    apart: ProfileDistance
    unpaired: str | None
    paired: PairedChanges | None
    thresholds: list[ReachedHardRatio] | None


class UnmeasuredLayer(Part, frozen=True, kw_only=True):
    """A layer of an unmeasured model, and the share of operations in the layers behind it."""

    model: str
    layer: Count
    spared: Finite


class LayersByDepth(Part, frozen=True, kw_only=True):
    """The layers of unmeasured models at one relative depth.

    Attributes:
        depth: The relative depth.
        suggested_by: The models that suggest to exit there; empty for a depth for reference.
        layers: One of each unmeasured model.
    """

    depth: Finite
    suggested_by: list[str] = field(name="from")
    layers: list[UnmeasuredLayer]


class ModelComparison(Displayed, StoredRecord, frozen=True, kw_only=True):
    """Several models over relative depth.

    Attributes:
        rules: How they were compared, in words.
        models: The models, in order.
        pairs: Each measured model with the first measured one.
        by_depth: Layers of models that were not measured.
    """

    KIND: ClassVar[str] = "model-comparison"
    COMMAND: ClassVar[str] = "compare-models --output"

    schema: int = 1
    kind: Literal["model-comparison"] = "model-comparison"
    provenance: ModelsProvenance
    rules: ComparisonRules
    models: list[ComparedModel]
    pairs: list[ModelPair]
    by_depth: list[LayersByDepth]

    def measured(self) -> list[ModelMeasurement]:
        """Return the models that were measured, in order."""
        return [found for model in self.models if (found := model.measurement) is not None]

    def _in_one_line(self) -> str:
        names = ", ".join(f"{model.label} {model.name}" for model in self.models)
        return f"{names}; {len(self.measured())} of {len(self.models)} measured"
