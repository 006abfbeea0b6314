"""Explain the final norm: its effect on the last layer's similarity, weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.errors import UnsupportedModelError
from cascade.core.provenance import provenance_of
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.models.stack import DecoderStack
from cascade.stats.cosine import cosine, norm
from cascade.stats.resampling import mean_interval
from cascade.studies.explanations.records import (
    INTERVAL,
    FinalNormExplanation,
    FinalNormSettings,
    LevelledWeights,
    NormDimension,
    NormedPair,
    NormSimilarity,
    NormTraits,
    NormWeights,
)

#: Numbers of leading weights, in the order of their effect, for which the effect is measured.
_COUNTS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


#: Number of dimensions that the record lists.
_NAMED = 10


#: Size of the probe. It makes the norm's epsilon negligible: 1e-5 in 1e6.
_PROBE_SIZE = 1000.0


def norm_weights(stack: DecoderStack) -> tuple[Tensor, Tensor, bool]:
    """Return the weights and the bias of a final norm, and whether it subtracts the mean.

    All are computed from the norm's output for a vector of ones and minus ones. This works for all
    families, also for those that store weight minus one or no weight at all.

    Args:
        stack: The model.

    Returns:
        Weights and bias, `[D]` float64 each, and whether the norm subtracts the mean.

    Raises:
        UnsupportedModelError: There is no final norm, or it does more than scale and shift.
    """
    width = stack.hidden_size
    signs = torch.ones(width, dtype=torch.float64)
    signs[1::2] = -1.0
    probe = signs - signs.mean()
    probe = probe / probe.pow(2).mean().sqrt()

    def of(values: Tensor) -> Tensor:
        states = (_PROBE_SIZE * values).to(stack.device, stack.dtype)
        return stack.norm(states[None, None])[0, 0].double().cpu()

    plus, minus, moved = of(probe), of(-probe), of(probe + 1)
    weights, bias = (plus - minus) / 2 / probe, (plus + minus) / 2
    # A second probe checks that the norm only scales and shifts.
    rolled = torch.linspace(-1, 1, width, dtype=torch.float64)
    rolled = (rolled - rolled.mean()) / rolled.std(correction=0)
    limit = 50 * torch.finfo(stack.dtype).eps * plus.abs().max()
    if (of(rolled) - (rolled * weights + bias)).abs().max() > limit:
        raise UnsupportedModelError(
            f"the final norm of {stack.model.config.model_type} does more than scale and shift a "
            "normed state, so weights cannot explain its effect; use a model with LayerNorm or "
            "RMSNorm"
        )
    centred = bool((moved - plus).abs().max() <= limit)
    return weights, bias, centred


def explain_norm(
    stack: DecoderStack,
    blocks: TokenBlocks,
    *,
    batch_size: int = 32,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> FinalNormExplanation:
    """Explain the effect of the final norm on the similarity of the last layer, by weight.

    The first quarter of the sequences ranks the weights by how much they reduce the similarity. On
    the other sequences, the leading weights of this ranking are set to the median weight, and the
    similarity is measured again.

    Args:
        stack: The model.
        blocks: Corpus of at least 4 sequences.
        batch_size: Sequences per forward pass.
        seed: Seed of the intervals.
        command: Command that the user ran, for the provenance.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        CorpusError: The sequences are too few or too long.
        ModelError: A token is outside the model's vocabulary.
        UnsupportedModelError: The model has no final norm, or the norm does more than scale and
            shift.

    Example:
        >>> from cascade import explain_norm, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> record = explain_norm(stack, load_blocks("embedded", stack.tokenizer, max_tokens=1024))
        >>> record.norm.subtracts_mean
        False
    """
    check_blocks(stack, blocks, batch_size)
    pilot, rest = blocks.pilot()
    weights, bias, centred = norm_weights(stack)
    final = _FinalNorm(stack, weights.to(stack.device), centred)
    states = _LastStates(stack, batch_size, progress or (lambda _: None))
    with torch.no_grad():
        order = _order_dimensions(final, states, pilot)
        means = _measure(final, states, rest, order.dimensions)
    limit = 50 * torch.finfo(stack.dtype).eps * float(weights.abs().max())
    return FinalNormExplanation(
        provenance=provenance_of(stack, blocks, command),
        settings=FinalNormSettings(
            layer=str(stack.num_layers),
            batch_size=batch_size,
            seed=seed,
            pilot_sequences=len(pilot.ids),
            sequences=len(rest.ids),
            interval=INTERVAL,
        ),
        norm=NormTraits(subtracts_mean=centred, has_bias=bool((bias.abs() > limit).any())),
        weights=_spread(final),
        similarities=_similarity_rows(means, seed),
        dimensions=_dimension_rows(final, order),
        levelled=_levelled_rows(means, final.counts, seed),
    )


@dataclass(frozen=True)
class _FinalNorm:
    """A final norm.

    Attributes:
        stack: The model.
        weights: Weights of the norm, `[D]` float64.
        centred: Whether the norm subtracts the mean.
    """

    stack: DecoderStack
    weights: Tensor
    centred: bool

    @property
    def median(self) -> float:
        return float(self.weights.median())

    @property
    def counts(self) -> list[int]:
        """Numbers of leading weights for which the effect is measured."""
        return [count for count in _COUNTS if count < self.stack.hidden_size]


@dataclass(frozen=True)
class _LastStates:
    """Yield the states around the last layer, batch by batch."""

    stack: DecoderStack
    batch_size: int
    progress: Callable[[int], None]

    def of(self, blocks: TokenBlocks) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield input and output of the last layer, and the normed output, `[B, T, D]` each."""
        last = self.stack.num_layers
        for ids, _ in blocks.batches(self.batch_size):
            kept: dict[int, Tensor] = {}

            def keep(entry: int, hidden: Tensor, kept: dict[int, Tensor] = kept) -> None:
                if entry >= last - 1:
                    kept[entry] = hidden

            normed = self.stack.visit(
                torch.from_numpy(ids.astype(np.int64)).to(self.stack.device), keep
            )
            if normed is None:  # `norm_weights` refuses a model without a final norm
                raise UnsupportedModelError("the model has no final norm to explain")
            yield kept[last - 1].double(), kept[last].double(), normed.double()
            self.progress(ids.size)


@dataclass(frozen=True)
class _Order:
    """The dimensions, ranked by how much the norm reduces their part of the similarity.

    Attributes:
        dimensions: Dimensions, the largest reduction first, `[D]`.
        before: Contribution of each dimension to the similarity before the norm, `[D]`.
        behind: Contribution of each dimension behind the norm, `[D]`.
        energy: Share of each dimension in the energy of the output, `[D]`.
    """

    dimensions: Tensor
    before: Tensor
    behind: Tensor
    energy: Tensor


def _order_dimensions(final: _FinalNorm, states: _LastStates, pilot: TokenBlocks) -> _Order:
    stack, tokens = final.stack, 0
    before, behind, energy = (
        torch.zeros(stack.hidden_size, dtype=torch.float64, device=stack.device) for _ in range(3)
    )
    for start, end, normed in states.of(pilot):
        before += _shares(start, end).sum(dim=(0, 1))
        behind += _shares(start, normed).sum(dim=(0, 1))
        # First tokens have norms about a hundred times as large and would dominate the mean.
        squares = end[:, 1:] ** 2
        energy += (squares / squares.sum(dim=-1, keepdim=True)).sum(dim=(0, 1))
        tokens += start.shape[0] * start.shape[1]
    return _Order(
        dimensions=(before - behind).argsort(descending=True),
        before=before / tokens,
        behind=behind / tokens,
        energy=energy / max(1, tokens - len(pilot.ids)),
    )


def _measure(
    final: _FinalNorm, states: _LastStates, rest: TokenBlocks, order: Tensor
) -> dict[str, Array]:
    """Return the mean similarity of each sequence, `[S]`, by the compared pair of states."""
    found: dict[str, list[Array]] = {}
    for start, end, normed in states.of(rest):
        for name, values in _similarities(final, start, end, normed, order):
            found.setdefault(name, []).append(values.mean(dim=1).cpu().numpy())
    return {name: np.concatenate(batches) for name, batches in found.items()}


def _similarities(
    final: _FinalNorm, start: Tensor, end: Tensor, normed: Tensor, order: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the similarities, `[B, T]`, of each pair of states in a batch."""
    stack, weights = final.stack, final.weights
    base = end - end.mean(dim=-1, keepdim=True) if final.centred else end
    yield "residual", cosine(start, end)
    yield "behind", cosine(start, normed)
    yield "both_behind", cosine(stack.norm(start.to(stack.dtype)).double(), normed)
    yield "equal_weights", cosine(start, base)
    yield "without_bias", cosine(start, base * weights)
    for count in final.counts:
        levelled = weights.clone()
        levelled[order[:count]] = final.median
        yield f"levelled_{count}", cosine(start, base * levelled)
        alone = torch.full_like(levelled, final.median)
        alone[order[:count]] = weights[order[:count]]
        yield f"alone_{count}", cosine(start, base * alone)


def _spread(final: _FinalNorm) -> NormWeights:
    weights = final.weights
    return NormWeights(
        smallest=float(weights.min()),
        median=final.median,
        largest=float(weights.max()),
        negative=int((weights < 0).sum()),
        dimensions=len(weights),
    )


def _similarity_rows(means: dict[str, Array], seed: int) -> list[NormSimilarity]:
    names: tuple[NormedPair, ...] = (
        "residual",
        "behind",
        "both_behind",
        "equal_weights",
        "without_bias",
    )
    return [
        NormSimilarity(
            between=name,
            mean=float(means[name].mean()),
            interval=mean_interval(means[name], seed),
        )
        for name in names
    ]


def _dimension_rows(final: _FinalNorm, order: _Order) -> list[NormDimension]:
    return [
        NormDimension(
            dimension=dim,
            weight=float(final.weights[dim]),
            energy=float(order.energy[dim]),
            before=float(order.before[dim]),
            behind=float(order.behind[dim]),
        )
        for dim in order.dimensions[:_NAMED].tolist()
    ]


def _levelled_rows(
    means: dict[str, Array], counts: Sequence[int], seed: int
) -> list[LevelledWeights]:
    """Return the share of the difference that the leading weights explain."""
    residual, behind = means["residual"].mean(), means["behind"].mean()
    whole = residual - behind
    rows = []
    for count in counts:
        levelled, alone = means[f"levelled_{count}"], means[f"alone_{count}"]
        rows.append(
            LevelledWeights(
                weights=count,
                similarity=float(levelled.mean()),
                interval=mean_interval(levelled, seed),
                explained=float((levelled.mean() - behind) / whole) if whole else None,
                alone=float(alone.mean()),
                explained_alone=float((residual - alone.mean()) / whole) if whole else None,
            )
        )
    return rows


def _shares(a: Tensor, b: Tensor) -> Tensor:
    """Return the contribution of each dimension to the cosine of two states, `[B, T, D]`."""
    smallest = torch.finfo(a.dtype).tiny
    return a * b / norm(a).clamp_min(smallest)[..., None] / norm(b).clamp_min(smallest)[..., None]
