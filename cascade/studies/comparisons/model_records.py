"""Record of a comparison of models."""

from __future__ import annotations

from collections.abc import Mapping
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
    strangers,
)
from cascade.saturation.records import HardRatioThreshold, LayerRoles, LayerRow


class ModelsProvenance(Part, frozen=True, kw_only=True):
    """Provenance that all models share. `ComparedModel.provenance` names model and corpus."""

    machine: MachineProvenance | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    command: str | None = None


class ComparisonRules(Part, frozen=True, kw_only=True):
    """Definitions of depths, dips, exit layers and differences, as sentences."""

    depth: str
    dips: str
    exit: str
    spared: str
    paired: str
    apart: str


class ModelSizes(Part, frozen=True, kw_only=True):
    """Sizes computed from a model's configuration.

    Attributes:
        family: Model family, for example "llama".
        num_layers: Number of decoder layers.
        hidden_size: Width of the residual stream.
        vocab_size: Number of outputs of the LM head.
        parameters: Number of parameters.
        layer_parameters: Number of parameters of all decoder layers.
        seq_len: Tokens per sequence for which operations were counted.
        operations_per_token: Operations of the whole model per token.
        layer_share: Mean share of the operations per decoder layer.
        lm_head_share: The LM head's share of the operations.
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
    """Origin of one model's profile."""

    model: ModelProvenance
    tokenizer_hash: str | None = None
    corpus: CorpusProvenance
    machine: MachineProvenance | UnsetType = UNSET


class LayerAtDepth(LayerRow, frozen=True, kw_only=True):
    """A layer's statistics and relative depth; the depth of row `N+norm` is null."""

    depth: Finite | None


class SuggestedExit(Part, frozen=True, kw_only=True):
    """The exit layer that a profile suggests.

    Attributes:
        layer: Number of the layer.
        depth: Relative depth of the layer.
        spared: Share of the operations in the layers above it.
        by_hard_ratio: Thresholds by hard ratio.
    """

    layer: str
    depth: Finite
    spared: Finite
    by_hard_ratio: list[HardRatioThreshold]


class ComparedModel(Part, frozen=True, kw_only=True):
    """One of the models. Measured fields are null for an unmeasured model (see `measurement`)."""

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
        """The measured fields; None if only the configuration is known."""
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
    """A measured model. The fields are those of `ComparedModel`."""

    label: str
    name: str
    sizes: ModelSizes
    provenance: ComparedModelProvenance
    layers: list[LayerAtDepth]
    structure: LayerRoles
    exit: SuggestedExit


class DipMatch(Part, frozen=True, kw_only=True):
    """Two matching dips: the first model's, then the other's."""

    layers: list[str]
    depths: list[Finite]
    means: list[Finite]


class MatchedDips(Part, frozen=True, kw_only=True):
    """The dips of two models.

    Attributes:
        judged: Whether both models have enough layers to find dips.
        tolerance: Largest difference of the relative depths of a match.
        matched: Matching dips.
        unmatched: Dips without a match, of the first model and of the other.
    """

    judged: bool
    tolerance: Finite
    matched: list[DipMatch]
    unmatched: list[list[str]]


class ProfileDistance(Part, frozen=True, kw_only=True):
    """Distance of two profiles in degrees, and the depth of the largest difference."""

    degrees: Finite
    most_degrees: Finite
    most_depth: Finite


class LayerChange(Part, frozen=True, kw_only=True):
    """Changes of the mean similarity of sequences in a layer.

    Attributes:
        layer: Label of the layer.
        mean: Mean change over sequences.
        interval: Interval of the mean; null for a single sequence.
        mean_size: Mean absolute change.
        largest: Largest change.
        sequence: Number of the sequence that changed most, from 1.
    """

    layer: str
    mean: Finite
    interval: Interval | None
    mean_size: Finite
    largest: Finite
    sequence: Count


class PairedChanges(Part, frozen=True, kw_only=True):
    """Changes between two models over the same tokens.

    Attributes:
        sequences: Number of compared sequences.
        layers: One row per layer.
        largest_mover: Decoder layer that changed most.
    """

    sequences: Count
    layers: list[LayerChange]
    largest_mover: str


class ReachedHardRatio(Part, frozen=True, kw_only=True):
    """The hard ratio that a threshold of the first model gives in the other model."""

    layer: str
    hard_ratio: Share
    threshold: Finite
    reached: Share


class ModelPair(Part, frozen=True, kw_only=True):
    """A comparison of a measured model with the first one.

    Attributes:
        model: Label of the model.
        against: Label of the first model.
        same_tokenizer: Whether both models have the same tokenizer.
        dips: Matched dips.
        apart: Distance of the profiles.
        unpaired: Reason why sequences cannot be compared; null if they can.
        paired: Changes over the same tokens; null if they cannot be compared.
        thresholds: The first model's thresholds in the other; null if the depths differ.
    """

    model: str
    against: str
    same_tokenizer: bool
    dips: MatchedDips
    apart: ProfileDistance
    unpaired: str | None
    paired: PairedChanges | None
    thresholds: list[ReachedHardRatio] | None


def _wrong_pair(pair: ModelPair, layers: Mapping[str, list[str]]) -> str | None:
    """Describe a layer that neither of two models has; None if they have all."""
    sides = (layers[pair.model], layers[pair.against])
    for match in pair.dips.matched:
        if len(match.layers) != len(sides) or any(
            layer not in side for layer, side in zip(match.layers, sides, strict=True)
        ):
            return f"expected a layer of each model at pairs.dips.matched, got {match.layers}"
    changes = [] if pair.paired is None else [row.layer for row in pair.paired.layers]
    mover = [] if pair.paired is None else [pair.paired.largest_mover]
    return strangers({"pairs.paired.layers": changes}, sides[0], "a layer") or strangers(
        {"pairs.paired.largest_mover": mover}, changes, "a layer"
    )


class UnmeasuredLayer(Part, frozen=True, kw_only=True):
    """A layer of an unmeasured model, with the share of operations in the layers above it."""

    model: str
    layer: Count
    spared: Finite


class LayersByDepth(Part, frozen=True, kw_only=True):
    """The layers of unmeasured models at one relative depth.

    Attributes:
        depth: Relative depth.
        suggested_by: Labels of the models that suggest an exit at this depth; empty for a reference
            depth.
        layers: One layer of each unmeasured model.
    """

    depth: Finite
    suggested_by: list[str] = field(name="from")
    layers: list[UnmeasuredLayer]


class ModelComparison(Displayed, StoredRecord, frozen=True, kw_only=True):
    """A comparison of several models over relative depth.

    Attributes:
        rules: Definitions of the compared quantities, as sentences.
        models: Models, in order.
        pairs: Comparisons of each measured model with the first measured one.
        by_depth: Layers of unmeasured models.
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

    def inconsistency(self) -> str | None:
        """Describe the first model or layer that the record does not have."""
        layers = {model.label: [row.layer for row in model.layers or ()] for model in self.models}
        if len(layers) < len(self.models) or not all(len(label) == 1 for label in layers):
            return "expected every model's label once, one letter each"
        for model in self.models:
            named = {
                "exit.layer": [] if model.exit is None else [model.exit.layer],
                "structure.dips": [] if model.structure is None else model.structure.dips,
            }
            flaw = strangers(named, layers[model.label], "a layer")
            if flaw is not None and model.measured:
                return f"model {model.label}: {flaw}"
        labels = {
            "pairs": [label for pair in self.pairs for label in (pair.model, pair.against)],
            "by_depth": [
                label
                for row in self.by_depth
                for label in (*row.suggested_by, *(each.model for each in row.layers))
            ],
        }
        flaw = strangers(labels, layers, "a model")
        return flaw or next(filter(None, (_wrong_pair(pair, layers) for pair in self.pairs)), None)

    def measured(self) -> list[ModelMeasurement]:
        """Return the measured models, in order."""
        return [found for model in self.models if (found := model.measurement) is not None]

    def _in_one_line(self) -> str:
        names = ", ".join(f"{model.label} {model.name}" for model in self.models)
        return f"{names}; {len(self.measured())} of {len(self.models)} measured"
