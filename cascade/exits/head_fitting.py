"""Fitting exit heads and propagation maps in closed form."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from cascade.core.errors import ModelError, UnsupportedModelError, UsageError, not_finite
from cascade.core.provenance import Provenance
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.exits.fitted_heads import HELD_OUT, FittedHeads
from cascade.exits.heads import root_mean_square
from cascade.exits.history import exit_entries
from cascade.exits.records import HeadsProvenance
from cascade.models.stack import DecoderStack
from cascade.stats.ridge import NormalEquations, fit, rms_normalized


def fit_heads(
    stack: DecoderStack,
    blocks: TokenBlocks,
    layers: Sequence[int],
    *,
    batch_size: int = 32,
    provenance: Provenance | None = None,
    progress: Callable[[int], None] | None = None,
) -> FittedHeads:
    """Return a ridge head and a propagation map for every exit layer, fitted in one pass.

    The fit is in closed form, from normal equations that are accumulated over the corpus. Memory
    grows with the square of the model's width, not with the size of the corpus.

    Args:
        stack: The model.
        blocks: The corpus.
        layers: Exit layers, 1..N.
        batch_size: Sequences per forward pass.
        provenance: Provenance of the fit (default: model and corpus only).
        progress: Called with the number of tokens processed since the last call.

    Raises:
        UsageError: A layer is outside 1..N or is given twice, or no layer is given.
        CorpusError: Sequences are longer than the model's positions, or the batch size is below 1.
        ModelError: A layer's output is NaN or infinite, or a token id exceeds the vocabulary.
        UnsupportedModelError: The LM head does not read states of the layers' width.

    Example:
        >>> from cascade import fit_heads, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, seq_len=32, max_tokens=640)
        >>> fit_heads(stack, blocks, [24, 29]).layers
        [24, 29]
    """
    # Converts NumPy integers to int.
    layers = [exit_entries(layer, stack.num_layers)[1] for layer in layers]
    if len(set(layers)) != len(layers) or not layers:
        raise UsageError(f"expected distinct exit layers, got {layers}")
    check_blocks(stack, blocks, batch_size)
    read = getattr(stack.lm_head, "in_features", stack.hidden_size)
    if read != stack.hidden_size:
        raise UnsupportedModelError(
            f"no heads can be fitted for {stack.model.config.model_type}: its LM head reads {read}"
            f" numbers per token, its states have {stack.hidden_size}; use the logit lens"
        )
    fitter = _Fitter(stack, sorted(layers))
    for ids, numbers in blocks.batches(batch_size):
        fitter.add(torch.from_numpy(ids).long().to(stack.device), numbers)
        if progress is not None:
            progress(ids.size)
    heads = fitter.fit()
    heads.provenance = _with_origin(heads.provenance, stack, blocks, provenance)
    return heads


def _with_origin(
    fitted: HeadsProvenance,
    stack: DecoderStack,
    blocks: TokenBlocks,
    provenance: Provenance | None,
) -> HeadsProvenance:
    """Return the provenance of a fit, with the model, the corpus and the given provenance."""
    if provenance is None:
        return replace(
            fitted,
            model=replace(stack.provenance, weights_hash=stack.weights_hash()),
            corpus=blocks.provenance(),
        )
    return replace(
        fitted,
        model=replace(provenance.model, weights_hash=stack.weights_hash()),
        corpus=provenance.corpus,
        tokenizer_hash=provenance.tokenizer_hash,
        machine=provenance.machine,
        versions=provenance.versions,
        command=provenance.command,
    )


def rows_of(
    stack: DecoderStack, ids: npt.NDArray[np.int32], layers: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the exit states by layer and the final normed states, `[B * T, D]` each.

    The decoder runs once. Models without a final norm return entry N as the final states.

    Args:
        stack: The model.
        ids: Token ids, `[B, T]`.
        layers: Exit layers.
    """
    states: dict[int, Tensor] = {}

    def keep(entry: int, hidden: Tensor) -> None:
        if entry in layers or entry == stack.num_layers:
            states[entry] = hidden.flatten(0, 1)

    normed = stack.visit(torch.from_numpy(ids).long().to(stack.device), keep)
    final = states[stack.num_layers] if normed is None else normed.flatten(0, 1)
    return states, final


class _Fitter:
    """Accumulates the normal equations of several exit layers over batches."""

    def __init__(self, stack: DecoderStack, layers: list[int]) -> None:
        self.stack, self.layers = stack, layers
        found = [_projections(layer) for layer in stack.layers]
        widths = {projection.out_features for pair in found for projection in pair or ()}
        # A map predicts keys and values of one width, or else the inputs of the layers.
        self.of_states = None in found or len(widths) > 1
        self.projections = [] if self.of_states else found
        self.width = stack.hidden_size if self.of_states else 2 * widths.pop()
        self.equations = {
            layer: [
                NormalEquations(
                    stack.hidden_size,
                    stack.hidden_size + (stack.num_layers - layer) * self.width,
                    device=stack.device if stack.device.type != "mps" else torch.device("cpu"),
                )
                for _ in ("train", "held out")
            ]
            for layer in layers
        }

    def add(self, ids: Tensor, numbers: Any) -> None:
        history: dict[int, Tensor] = {}
        kept = set(self.layers) | {self.stack.num_layers}
        if self.of_states:
            kept |= set(range(min(self.layers), self.stack.num_layers))

        def keep(entry: int, hidden: Tensor) -> None:
            if entry in kept:
                history[entry] = hidden.flatten(0, 1)

        # Held-out sequences are moved to the end, so that both groups are slices without a copy.
        held_out = numbers % 10 == HELD_OUT
        ids = ids[torch.from_numpy(np.argsort(held_out, kind="stable")).to(ids.device)]
        with _captured(self.projections[min(self.layers) :]) as raw:
            normed = self.stack.visit(ids, keep)
        final = history[self.stack.num_layers] if normed is None else normed.flatten(0, 1)
        trained = int((~held_out).sum()) * ids.shape[1]
        for layer in self.layers:
            targets = [final, *self._upper(layer, history, raw)]
            x = rms_normalized(history[layer])
            for equations, rows in zip(
                self.equations[layer], (slice(trained), slice(trained, None)), strict=True
            ):
                if len(x[rows]):
                    self._update(equations, x[rows], [y[rows] for y in targets], layer, history)

    def _update(
        self,
        equations: NormalEquations,
        x: Tensor,
        targets: list[Tensor],
        layer: int,
        history: dict[int, Tensor],
    ) -> None:
        device = equations.xx.device
        try:
            equations.update(x.to(device), *(y.to(device) for y in targets))
        except ValueError as error:
            for entry, states in sorted(history.items()):
                if not torch.isfinite(states).all():
                    raise not_finite(
                        f"layer {entry} gives NaN or infinite hidden states"
                    ) from error
            raise ModelError(f"exit layer {layer}: {error}; use a wider --dtype") from error

    def _upper(self, layer: int, history: dict[int, Tensor], raw: list[Tensor]) -> list[Tensor]:
        """Return the targets of the upper layers, `width` outputs each, the lowest layer first."""
        if self.of_states:
            size = root_mean_square(history[layer])
            return [
                history[entry].float() / size.to(history[entry].device)
                for entry in range(layer, self.stack.num_layers)
            ]
        return [values.flatten(0, 1) for values in raw[2 * (layer - min(self.layers)) :]]

    def fit(self) -> FittedHeads:
        weights, maps, strengths = {}, {}, {}
        hidden = self.stack.hidden_size
        for layer, (train, held_out) in self.equations.items():
            groups = [hidden] + [self.width] * (self.stack.num_layers - layer)
            weight, bias, chosen = fit(train, held_out, groups)
            weights[layer] = (weight[:, :hidden].clone(), bias[:hidden].clone())
            if layer < self.stack.num_layers:
                maps[layer] = (weight[:, hidden:].clone(), bias[hidden:].clone())
            strengths[str(layer)] = chosen
        return FittedHeads(
            weights, maps, self.width, self.of_states, HeadsProvenance(strengths=strengths)
        )


def _projections(layer: nn.Module) -> list[Any] | None:
    """Return a layer's key and value projections, or None if they are not separate modules."""
    attention = getattr(layer, "self_attn", None)
    found = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
    if all(isinstance(projection, nn.Linear) for projection in found):
        return found
    return None


@contextlib.contextmanager
def _captured(projections: Sequence[Sequence[nn.Module] | None]) -> Iterator[list[Tensor]]:
    """Collect the outputs of the layers' key and value projections, `[B, T, width]` each."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        kept.append(output)

    with contextlib.ExitStack() as hooks:
        for pair in projections:
            for projection in pair or ():
                hooks.callback(projection.register_forward_hook(keep).remove)
        yield kept
