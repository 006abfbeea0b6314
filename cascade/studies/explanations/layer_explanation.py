"""Explain why a layer turns the residual stream more than its neighbour, and ablate it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cascade.core.errors import CorpusError, UsageError
from cascade.core.provenance import provenance_of
from cascade.core.schema import from_plain, to_plain
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.corpora.token_classes import CLASSES, token_texts
from cascade.models.stack import DecoderStack
from cascade.saturation.layer_roles import find_structure
from cascade.saturation.profile import similarities
from cascade.saturation.records import LayerRoles
from cascade.stats.perplexity import perplexity
from cascade.stats.perplexity_intervals import ratio_interval, resampled_nats
from cascade.stats.resampling import interval
from cascade.studies.explanations.ablations import ABLATIONS
from cascade.studies.explanations.causes import MOST_DIMENSIONS
from cascade.studies.explanations.gap import LEAST_GAP, SUPPORTED, CauseTests, gap_of
from cascade.studies.explanations.layer_measurement import (
    LayerMeasurement,
    MeasuredLayers,
    MeasuredSide,
)
from cascade.studies.explanations.records import (
    INTERVAL,
    AblationRow,
    DimensionEnergy,
    ExplanationSettings,
    ExplanationVerdict,
    LayerExplanation,
    SideRow,
)
from cascade.studies.explanations.token_groups import class_groups, position_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Minimum and maximum number of pilot sequences, on which the traits of a layer are learned.
_LEAST_PILOT, _MOST_PILOT = 2, 64


def explain(
    stack: DecoderStack,
    blocks: TokenBlocks,
    layer: int,
    *,
    contrast: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> LayerExplanation:
    """Explain why a layer turns the residual stream more than a neighbour, and ablate both layers.

    Every possible cause is removed from both layers. A cause is supported only if its removal
    closes more than half of the gap between their angles. Dimensions and common vectors are learned
    on the first quarter of the sequences and tested on the others.

    Args:
        stack: The model.
        blocks: Corpus of at least 4 sequences.
        layer: Layer to explain, 1..N.
        contrast: Neighbour to compare with (default: the nearest layer of a stable band).
        batch_size: Sequences per forward pass.
        seed: Seed of the intervals.
        command: Command that the user ran, for the provenance.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        UsageError: The layer does not exist, or the neighbour is not another layer.
        CorpusError: The sequences are too few or too long, or the model has no tokenizer.
        ModelError: A token is outside the model's vocabulary.
        UnsupportedModelError: A layer's update is not the sum of attention and MLP.

    Example:
        >>> from cascade import explain, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> text = load_blocks("embedded", stack.tokenizer, max_tokens=1024)
        >>> record = explain(stack, text, layer=25, contrast=24)
        >>> record.gap.degrees > 0
        True
    """
    _check_layers(stack, layer, contrast)
    check_blocks(stack, blocks, batch_size)
    pilot, rest = blocks.pilot(least=_LEAST_PILOT, most=_MOST_PILOT)
    tokenizer = stack.tokenizer
    if tokenizer is None:
        raise CorpusError(
            "the model has no tokenizer, which is needed for token classes; load it with one"
        )
    with torch.no_grad(), _eager_attention(stack) as missing:
        if contrast is None:
            contrast = _nearest_stable_layer(stack, pilot, layer, batch_size)
        measurement = LayerMeasurement(
            stack, tokenizer, (layer, contrast), batch_size, progress or (lambda _: None)
        )
        measured = measurement.run(pilot, rest)
    gap = gap_of(measured, seed)
    gap_row, causes = gap.row(), CauseTests(measured, gap).rows()
    supported = [row.cause for row in causes if row.verdict == "supported"]
    return LayerExplanation(
        provenance=provenance_of(stack, blocks, command),
        settings=ExplanationSettings(
            layer=str(layer),
            contrast=str(contrast),
            batch_size=batch_size,
            seed=seed,
            supported_share=SUPPORTED,
            least_gap=LEAST_GAP,
            most_dimensions=MOST_DIMENSIONS,
            pilot_sequences=len(pilot.ids),
            sequences=len(rest.ids),
            interval=INTERVAL,
        ),
        missing=[*missing, *_missing(measured)],
        layers=measured.stream.layer_rows(),
        entries=measured.stream.entry_rows(_texts(rest, tokenizer)),
        sides=[_side_row(side) for side in measured.sides],
        gap=gap_row,
        causes=causes,
        classes=class_groups(measured, seed),
        positions=position_groups(measured, seed),
        ablations=[row for side in measured.sides for row in _ablation_rows(measured, side, seed)],
        verdict=ExplanationVerdict(
            asks_for_a_cause=gap_row.asks_for_a_cause,
            carried_by=supported if gap_row.asks_for_a_cause else [],
        ),
    )


def _check_layers(stack: DecoderStack, layer: int, contrast: int | None) -> None:
    _check_layer(stack, layer, "--layer")
    if contrast is not None:
        _check_layer(stack, contrast, "--contrast")
        if contrast == layer:
            raise UsageError(
                f"expected --contrast to differ from layer {layer}, got the same layer; choose a "
                "neighbour"
            )
    if stack.num_layers < 2:
        raise UsageError(
            "expected a model with at least 2 layers to compare, got a single layer; choose "
            "another model"
        )


def _check_layer(stack: DecoderStack, layer: int, name: str) -> None:
    if not 1 <= layer <= stack.num_layers:
        raise UsageError(
            f"expected {name} in 1..{stack.num_layers}, got {layer}; choose a layer of the model"
        )


@contextlib.contextmanager
def _eager_attention(stack: DecoderStack) -> Iterator[list[str]]:
    """Switch to eager attention, which returns its weights. Yield what is missing without it."""
    model: Any = stack.model
    before = model.config._attn_implementation
    missing: list[str] = []
    try:
        if before != "eager":
            model.set_attn_implementation("eager")
    except (ValueError, NotImplementedError) as error:
        missing.append(f"attention weights: the model does not support eager attention ({error})")
    try:
        yield missing
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def _nearest_stable_layer(
    stack: DecoderStack, pilot: TokenBlocks, layer: int, batch_size: int
) -> int:
    """Return the nearest layer of a stable band, and the lower one of two equally near."""
    ids = torch.from_numpy(pilot.ids[:batch_size].astype(np.int64)).to(stack.device)
    means = similarities(stack, ids).double().mean(dim=(1, 2)).tolist()
    roles = from_plain(to_plain(find_structure(stack.layer_labels, means)), LayerRoles)
    active = {
        int(label)
        for label in (*roles.input_transform, *roles.dips, *roles.output_transform)
        if label.isdigit()
    }
    others = [number for number in range(1, stack.num_layers + 1) if number != layer]
    return min(others, key=lambda number: (number in active, abs(number - layer), number > layer))


def _missing(measured: MeasuredLayers) -> list[str]:
    """Return what could not be measured, with reasons."""
    found = []
    if not measured.stream.has_weights:
        found.append("attention weights: this family's layers do not return them")
    if "first_token" not in measured.target.angles:
        found.append(
            "hiding tokens from attention: this family's layers take no mask that can be changed"
        )
    absent = [name for number, name in enumerate(CLASSES) if not (measured.classes == number).any()]
    if absent:
        found.append(f"token classes without tokens in this corpus: {', '.join(absent)}")
    return found


def _texts(blocks: TokenBlocks, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    texts = token_texts(blocks.ids, tokenizer)
    return dict(zip(np.unique(blocks.ids).tolist(), texts, strict=True))


def _side_row(side: MeasuredSide) -> SideRow:
    traits = side.traits
    return SideRow(
        layer=str(side.layer),
        degrees=float(side.plain[0].mean()),
        similarity=float(side.plain[1].mean()),
        common_share=traits.common_share,
        dimensions=[
            DimensionEnergy(dimension=dim, energy=share)
            for dim, share in zip(traits.dimensions, traits.energy, strict=True)
        ],
        dimensions_for_half=traits.dimensions_for_half,
        massive=list(traits.massive),
        update_size=traits.update_size,
        stream_size=traits.stream_size,
        update_cosine=traits.update_cosine,
    )


def _ablation_rows(
    measured: MeasuredLayers, side: MeasuredSide, seed: int
) -> Iterator[AblationRow]:
    full = np.array(measured.full_losses)
    scored = len(full) * (measured.classes.shape[1] - 1)
    for name in ABLATIONS:
        if name not in side.losses:
            continue
        without = np.array(side.losses[name])
        more = without - full
        resampled = resampled_nats(more, scored, seed)
        nats = [float(losses.sum() / scored) for losses in (without, full, more)]
        yield AblationRow(
            layer=str(side.layer),
            ablation=name,
            perplexity=perplexity(nats[0]),
            full_perplexity=perplexity(nats[1]),
            perplexity_ratio=perplexity(nats[2]),
            interval=ratio_interval(resampled),
            nats_per_token=nats[0],
            full_nats_per_token=nats[1],
            nats_difference=nats[2],
            nats_interval=interval(resampled),
        )
