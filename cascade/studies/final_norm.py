"""The final norm: what it does to the last layer's similarity, and which of its weights do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.errors import UnsupportedModelError
from cascade.core.provenance import provenance_of
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.models.stack import DecoderStack
from cascade.stats.cosine import cosine, norm
from cascade.stats.resampling import mean_interval

KIND = "final-norm"


#: Of how many weights, the first in order of what they take away, the effect is measured.
_COUNTS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


_NAMED = 10


#: A probe of this size makes the norm's epsilon vanish: 1e-5 in 1e6.
_PROBE_SIZE = 1000.0


def norm_weights(stack: DecoderStack) -> tuple[Tensor, Tensor, bool]:
    """Return a final norm's weights, its bias, and whether it subtracts the mean.

    They are read off what the norm does to a vector of ones and minus ones, so that no family's
    names have to be known: some store a weight less one, some none at all.

    Args:
        stack: The model.

    Returns:
        `[D]` and `[D]` in float64, and true where a constant added to a state changes nothing.

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
    # Twice the probe, in another order: a norm that only scales and shifts gives the same weights.
    rolled = torch.linspace(-1, 1, width, dtype=torch.float64)
    rolled = (rolled - rolled.mean()) / rolled.std(correction=0)
    limit = 50 * torch.finfo(stack.dtype).eps * plus.abs().max()
    if (of(rolled) - (rolled * weights + bias)).abs().max() > limit:
        raise UnsupportedModelError(
            f"the final norm of {stack.model.config.model_type} does more than scale and shift a "
            "normed state, which is all that can be told apart by weights"
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
) -> dict[str, Any]:
    """Say what the final norm does to the similarity of the last layer, and by which weights.

    Weights are put in the order of what they take away from the similarity on the first quarter
    of the sequences; on the others, those of the first few are then set to the median weight, and
    the similarity is measured again.

    Args:
        stack: The model.
        blocks: The corpus, at least 4 sequences.
        batch_size: Sequences per forward pass.
        seed: Of the intervals.
        command: What the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call.

    Returns:
        A record of kind `final-norm`: `similarities` (on the residual stream, behind the norm on
        one side, on both sides, with equal weights), `weights` (their spread), `dimensions` (those
        that take most away) and `levelled` (what is explained by how many of them).

    Raises:
        CorpusError: Too few or too long sequences.
        ModelError: Tokens beyond the model's vocabulary.
        UnsupportedModelError: The model has no final norm, or one of another kind.
    """
    check_blocks(stack, blocks, batch_size)
    pilot, rest = blocks.pilot()
    weights, bias, centred = norm_weights(stack)
    run = _Run(stack, weights, centred, batch_size, progress or (lambda _: None))
    with torch.no_grad():
        run.learn(pilot)
        run.measure(rest)
    return {
        "schema": 1,
        "kind": KIND,
        "provenance": to_plain(provenance_of(stack, blocks, command)),
        "settings": {
            "layer": str(stack.num_layers),
            "batch_size": batch_size,
            "seed": seed,
            "pilot_sequences": len(pilot.ids),
            "sequences": len(rest.ids),
            "interval": "95 % percentile bootstrap over whole sequences, 999 resamples",
        },
        "norm": {"subtracts_mean": centred, "has_bias": bool((bias.abs() > run.limit).any())},
        "weights": run.spread(),
        "similarities": run.similarities(seed),
        "dimensions": run.dimensions(),
        "levelled": run.levelled(seed),
    }


class _Run:
    """One explanation of a final norm: order the weights, then level the first few of them."""

    def __init__(
        self,
        stack: DecoderStack,
        weights: Tensor,
        centred: bool,
        batch_size: int,
        progress: Callable[[int], None],
    ) -> None:
        self.stack, self.centred = stack, centred
        self.weights = weights.to(stack.device)
        self.median = float(self.weights.median())
        self.limit = 50 * torch.finfo(stack.dtype).eps * float(weights.abs().max())
        self.batch_size, self.progress = batch_size, progress
        self.counts = [count for count in _COUNTS if count < stack.hidden_size]
        self.order = torch.zeros(0)
        self.parts: dict[str, list[Array]] = {}
        self.before = self.after = self.energy = self.weights

    def _batches(self, blocks: TokenBlocks) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the last layer's input, its output, and that behind the norm, `[B, T, D]` each."""
        last = self.stack.num_layers
        for ids, _ in blocks.batches(self.batch_size):
            kept: dict[int, Tensor] = {}

            def keep(entry: int, hidden: Tensor, kept: dict[int, Tensor] = kept) -> None:
                if entry >= last - 1:
                    kept[entry] = hidden

            normed = self.stack.visit(
                torch.from_numpy(ids.astype(np.int64)).to(self.stack.device), keep
            )
            assert normed is not None  # `norm_weights` has found a final norm
            yield kept[last - 1].double(), kept[last].double(), normed.double()
            self.progress(ids.size)

    def learn(self, pilot: TokenBlocks) -> None:
        """Put the dimensions in the order of what the norm takes away in them."""
        width, tokens = self.stack.hidden_size, 0
        before, after, energy = (
            torch.zeros(width, dtype=torch.float64, device=self.stack.device) for _ in range(3)
        )
        for start, end, normed in self._batches(pilot):
            before += _shares(start, end).sum(dim=(0, 1))
            after += _shares(start, normed).sum(dim=(0, 1))
            # First tokens, some hundred times as long, would be all that is seen.
            squares = end[:, 1:] ** 2
            energy += (squares / squares.sum(dim=-1, keepdim=True)).sum(dim=(0, 1))
            tokens += start.shape[0] * start.shape[1]
        self.before, self.after = before / tokens, after / tokens
        self.energy = energy / max(1, tokens - len(pilot.ids))
        self.order = (before - after).argsort(descending=True)

    def measure(self, rest: TokenBlocks) -> None:
        """Measure every similarity on the other sequences."""
        for start, end, normed in self._batches(rest):
            base = end - end.mean(dim=-1, keepdim=True) if self.centred else end
            found = {
                "residual": cosine(start, end),
                "behind": cosine(start, normed),
                "both_behind": cosine(self.stack.norm(start.to(self.stack.dtype)).double(), normed),
                "equal_weights": cosine(start, base),
                "without_bias": cosine(start, base * self.weights),
            }
            for count in self.counts:
                levelled = self.weights.clone()
                levelled[self.order[:count]] = self.median
                found[f"levelled_{count}"] = cosine(start, base * levelled)
                alone = torch.full_like(levelled, self.median)
                alone[self.order[:count]] = self.weights[self.order[:count]]
                found[f"alone_{count}"] = cosine(start, base * alone)
            for name, values in found.items():
                self.parts.setdefault(name, []).append(values.mean(dim=1).cpu().numpy())

    def _value(self, name: str) -> Array:
        return np.concatenate(self.parts[name])

    def spread(self) -> dict[str, Any]:
        """Return where the weights lie."""
        return {
            "smallest": float(self.weights.min()),
            "median": self.median,
            "largest": float(self.weights.max()),
            "negative": int((self.weights < 0).sum()),
            "dimensions": len(self.weights),
        }

    def similarities(self, seed: int) -> list[dict[str, Any]]:
        """Return the mean similarities, each with its interval."""
        names = ("residual", "behind", "both_behind", "equal_weights", "without_bias")
        return [
            {
                "between": name,
                "mean": float(self._value(name).mean()),
                "interval": mean_interval(self._value(name), seed),
            }
            for name in names
        ]

    def dimensions(self) -> list[dict[str, Any]]:
        """Return the dimensions that take most away: weight, energy, share of the similarity."""
        return [
            {
                "dimension": dim,
                "weight": float(self.weights[dim]),
                "energy": float(self.energy[dim]),
                "before": float(self.before[dim]),
                "behind": float(self.after[dim]),
            }
            for dim in self.order[:_NAMED].tolist()
        ]

    def levelled(self, seed: int) -> list[dict[str, Any]]:
        """Return which share of the difference the first few weights explain."""
        residual, behind = self._value("residual").mean(), self._value("behind").mean()
        whole = residual - behind
        rows = []
        for count in self.counts:
            kept, alone = self._value(f"levelled_{count}"), self._value(f"alone_{count}")
            rows.append(
                {
                    "weights": count,
                    "similarity": float(kept.mean()),
                    "interval": mean_interval(kept, seed),
                    "explained": float((kept.mean() - behind) / whole) if whole else None,
                    "alone": float(alone.mean()),
                    "explained_alone": float((residual - alone.mean()) / whole) if whole else None,
                }
            )
        return rows


def _shares(a: Tensor, b: Tensor) -> Tensor:
    """Return what each dimension adds to the cosine of two states, `[B, T, D]`."""
    return a * b / (norm(a) * norm(b)).clamp_min(1e-30)[..., None]
