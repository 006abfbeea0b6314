"""Compare models over relative depth: profiles, matched dips and suggested exit layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import msgspec
import torch

from cascade.core.errors import UsageError
from cascade.core.provenance import MachineProvenance, library_versions, machine_of
from cascade.core.schema import from_plain, to_plain
from cascade.saturation.records import LayerRow
from cascade.studies.comparisons.compared_models import MeasuredModel, UnmeasuredModel
from cascade.studies.comparisons.configurations import layer_at
from cascade.studies.comparisons.model_pairs import compare_with_first, relative_depth
from cascade.studies.comparisons.model_records import (
    ComparedModel,
    ComparedModelProvenance,
    ComparisonRules,
    LayerAtDepth,
    LayersByDepth,
    ModelComparison,
    ModelsProvenance,
    SuggestedExit,
    UnmeasuredLayer,
)

#: Relative depths to report if no model was measured. The last one is layer 29 of 30, as in the
#: original study.
REFERENCE_DEPTHS = (
    Fraction(1, 2),
    Fraction(2, 3),
    Fraction(4, 5),
    Fraction(9, 10),
    Fraction(29, 30),
)

RULES = ComparisonRules(
    depth="the relative depth of a layer is its number divided by the number of decoder layers",
    dips=(
        "dips of two models match one to one, nearest pairs first, if their relative depths "
        "differ by at most 0.05 or one layer of the shallower model, whichever is larger"
    ),
    exit="the last layer of the last stable band, or the second to last layer without a band",
    spared=(
        "the share of the model's operations (matrix products and attention) in the layers above "
        "the exit layer; a token that exits saves at most this share, because it still needs the "
        "LM head, and keys and values in these layers"
    ),
    paired=(
        "both models process the same tokens; the change is each sequence's mean similarity in a "
        "layer minus that of the first model; the size is the mean absolute change over "
        "sequences; intervals are Student's t over sequences, at 95 %"
    ),
    apart=(
        "the root mean square difference of the angles of mean similarities, in degrees, at the "
        "relative depths of the shallower model's layers; the deeper profile is interpolated"
    ),
)


def compare_models(
    models: Iterable[MeasuredModel | UnmeasuredModel], *, command: str | None = None
) -> ModelComparison:
    """Compare models over relative depth, each with the first measured one.

    Args:
        models: Results of `measure_model` and `describe_model`. With an iterator, each model can be
            freed before the next one is loaded.
        command: Command that the user ran, for the provenance.

    Raises:
        UsageError: There are fewer than two models.

    Example:
        >>> from cascade import compare_models, copy_of, load, load_blocks, measure_model
        >>> from cascade.studies.comparisons.altered_models import Alteration
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, max_tokens=256)
        >>> models = [stack, copy_of(stack, Alteration("int8"))]
        >>> record = compare_models(measure_model(model, blocks) for model in models)
        >>> [model.name for model in record.models]
        ['smollm2-135m-instruct-q4_1', 'smollm2-135m-instruct-q4_1+int8']
    """
    found = list(models)
    if len(found) < 2:
        raise UsageError(f"expected at least two models, got {len(found)}; add another one")
    labelled = {chr(ord("A") + number): model for number, model in enumerate(found)}
    measured = {
        label: model for label, model in labelled.items() if isinstance(model, MeasuredModel)
    }
    entries = [_compared_model(label, model) for label, model in labelled.items()]
    return ModelComparison(
        provenance=_provenance(entries, command),
        rules=RULES,
        models=entries,
        pairs=list(compare_with_first(measured)),
        by_depth=_layers_by_depth(entries, labelled),
    )


def _provenance(entries: Sequence[ComparedModel], command: str | None) -> ModelsProvenance:
    """Return the provenance that all models share."""
    machines = (entry.provenance.machine for entry in entries if entry.provenance is not None)
    here = from_plain(to_plain(machine_of(torch.device("cpu"))), MachineProvenance)
    return ModelsProvenance(
        machine=next(machines, here), versions=library_versions(), command=command
    )


def _compared_model(label: str, model: MeasuredModel | UnmeasuredModel) -> ComparedModel:
    if isinstance(model, UnmeasuredModel):
        return ComparedModel(
            label=label,
            name=model.name,
            measured=False,
            sizes=model.sizes.record(),
            configuration=model.configuration.origin,
            provenance=None,
            layers=None,
            structure=None,
            exit=None,
        )
    profile, num_layers = model.record, model.sizes.num_layers
    exit_layer = int(profile.thresholds.exit_layer)
    return ComparedModel(
        label=label,
        name=model.name,
        measured=True,
        sizes=model.sizes.record(),
        configuration="the model's own",
        provenance=ComparedModelProvenance(
            model=profile.provenance.model,
            tokenizer_hash=profile.provenance.tokenizer_hash,
            corpus=profile.provenance.corpus,
            machine=profile.provenance.machine,
        ),
        layers=[_layer_at_depth(row, num_layers) for row in profile.layers],
        structure=profile.structure,
        exit=SuggestedExit(
            layer=str(exit_layer),
            depth=relative_depth(exit_layer, num_layers),
            spared=round(model.sizes.spared(exit_layer), 6),
            by_hard_ratio=profile.thresholds.by_hard_ratio,
        ),
    )


def _layer_at_depth(row: LayerRow, num_layers: int) -> LayerAtDepth:
    depth = relative_depth(int(row.layer), num_layers) if row.layer.isdigit() else None
    return LayerAtDepth(**msgspec.structs.asdict(row), depth=depth)


def _layers_by_depth(
    entries: Sequence[ComparedModel], models: Mapping[str, MeasuredModel | UnmeasuredModel]
) -> list[LayersByDepth]:
    """Return the layers of unmeasured models at the suggested exit depths of measured models.

    If no model was measured, the depths are `REFERENCE_DEPTHS`.
    """
    unmeasured = [entry for entry in entries if not entry.measured]
    if not unmeasured:
        return []
    found: dict[Fraction, list[str]] = {}
    for entry in entries:
        if entry.exit is not None:
            depth = Fraction(int(entry.exit.layer), entry.sizes.num_layers)
            found.setdefault(depth, []).append(entry.label)
    depths = found or {depth: [] for depth in REFERENCE_DEPTHS}
    return [
        LayersByDepth(
            depth=round(float(depth), 6),
            suggested_by=labels,
            layers=[
                UnmeasuredLayer(
                    model=entry.label,
                    layer=layer,
                    spared=round(models[entry.label].sizes.spared(layer), 6),
                )
                for entry in unmeasured
                for layer in [layer_at(depth, entry.sizes.num_layers)]
            ],
        )
        for depth, labels in sorted(depths.items())
    ]
