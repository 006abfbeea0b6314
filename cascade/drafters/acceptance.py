"""What a drafter's chains are worth on held-out texts, measured as they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cascade.drafters.network.drafter_network import DrafterNetwork, DraftHead
from cascade.drafters.network.layers import Tables
from cascade.drafters.records import BINS, DraftEvaluation
from cascade.drafters.texts.batches import GeneratedText

#: Most drafts of a chain. The figures of longer chains say little: few of them are accepted.
CHAIN = 4


@dataclass(frozen=True)
class Chains:
    """The chains that begin at each place of a text.

    A place is a confirmed token behind the prompt; its chain drafts the tokens that follow it.

    Attributes:
        hits: Whether each draft is the model's own token, `[places, CHAIN]`; false behind the end
            of the text.
        probabilities: The drafter's probability of each draft, `[places, CHAIN]`.
        within: Whether the text has a token there, `[places, CHAIN]`.
    """

    hits: Tensor
    probabilities: Tensor
    within: Tensor

    @property
    def accepted(self) -> Tensor:
        """Number of drafts that are accepted at each place, `[places]`."""
        return self.hits.long().cumprod(dim=1).sum(dim=1)


@torch.no_grad()
def chains_of(
    network: DrafterNetwork,
    head: DraftHead,
    embedding: Tensor,
    text: GeneratedText,
    tables: Tables,
) -> Chains:
    """Return the chains of all places of a greedy text.

    A chain continues with its own drafts. As long as they are accepted, they are the tokens of the
    text, so all chains can be computed at once from the text itself.

    Args:
        network: The drafter.
        head: The rows of the LM head that it chooses from.
        embedding: Embeddings of all tokens, `[V, D]`.
        text: The text.
        tables: Cosines and sines of as many positions as the text has at least.
    """
    ids = text.ids.long().to(embedding.device)
    rows = len(ids) - 2
    places = range(text.prompt - 1, rows)
    cut = (tables[0][:, :rows], tables[1][:, :rows])
    features = text.features[:rows].to(embedding.device)
    states = network.unroll(embedding[ids[1:-1]][None], features[None], cut, CHAIN)
    head = head.with_tokens(ids[: text.prompt].tolist())
    shape = (len(places), CHAIN)
    hits, within = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    probabilities = torch.zeros(shape)
    for step, state in enumerate(states):
        # A place's draft of this step is made in the row that many positions later.
        made = state[0, places.start + step : rows]
        if not len(made):
            break
        shares = head.logits(network.norm(made)).float().softmax(dim=-1)
        best, index = shares.max(dim=-1)
        hits[: len(made), step] = (head.tokens[index] == ids[places.start + step + 2 :]).cpu()
        probabilities[: len(made), step] = best.cpu()
        within[: len(made), step] = True
    return Chains(hits, probabilities, within)


def accepted_by_position(chains: Sequence[Chains]) -> list[float]:
    """Return the share of drafts that is accepted at each position, if all before it were."""
    hits, within = (
        torch.cat([getattr(each, name) for each in chains]) for name in ("hits", "within")
    )
    alive, shares = torch.ones(len(hits), dtype=torch.bool), []
    for step in range(CHAIN):
        tried = alive & within[:, step]
        alive = tried & hits[:, step]
        shares.append(int(alive.sum()) / max(1, int(tried.sum())))
    return shares


def tokens_per_pass(texts: Sequence[GeneratedText], chains: Sequence[Chains]) -> float:
    """Return the tokens per pass of the model if the drafter alone drafts, `CHAIN` tokens each.

    Args:
        texts: The texts.
        chains: Their chains.
    """
    passes = tokens = 0
    for text, own in zip(texts, chains, strict=True):
        accepted, place, last = own.accepted.tolist(), 0, len(text.ids) - 1 - text.prompt
        while place < last:
            new = min(last - place, 1 + accepted[place])
            passes, tokens, place = passes + 1, tokens + new, place + new
    return max(1, tokens) / max(1, passes)


def evaluation_of(
    step: int, texts: Sequence[GeneratedText], chains: Sequence[Chains]
) -> DraftEvaluation:
    """Return the acceptance of a drafter at a training step."""
    return DraftEvaluation(
        step=step,
        accepted=accepted_by_position(chains),
        tokens_per_pass=tokens_per_pass(texts, chains),
    )


# --- Calibration -----------------------------------------------------------------------------


def calibration_of(chains: Sequence[Chains]) -> list[list[float]]:
    """Return the share of accepted drafts by probability, for each position of a chain.

    The shares are fitted by isotonic regression, so they never decrease with the probability. Each
    bin counts two more drafts that agree with its own probability, so that none is empty.

    Args:
        chains: Chains of held-out texts.
    """
    hits, within, probabilities = (
        torch.cat([getattr(each, name) for each in chains])
        for name in ("hits", "within", "probabilities")
    )
    centres = (np.arange(BINS) + 0.5) / BINS
    alive, found = torch.ones(len(hits), dtype=torch.bool), []
    for step in range(CHAIN):
        tried = alive & within[:, step]
        alive = tried & hits[:, step]
        bins = (probabilities[tried, step] * BINS).long().clamp_(0, BINS - 1).numpy()
        counts = np.bincount(bins, minlength=BINS) + 2.0
        right = np.bincount(bins, weights=hits[tried, step].numpy(), minlength=BINS) + 2.0 * centres
        found.append(_isotonic(right / counts, counts))
    return found


def _isotonic(values: np.ndarray, weights: np.ndarray) -> list[float]:
    """Return the closest values that never decrease: pool adjacent violators."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, some, left), (high, more, right) = blocks[-2:]
            whole = some + more
            blocks[-2:] = [((low * some + high * more) / whole, whole, left + right)]
    return [min(1.0, max(0.0, value)) for value, _, size in blocks for _ in range(size)]


def calibrated(bins: Sequence[float]) -> Callable[[float], float]:
    """Return a function from a drafter's probability to the share that is accepted.

    Args:
        bins: The shares of bins of equal width.
    """
    centres = (np.arange(len(bins)) + 0.5) / len(bins)
    shares = np.array(bins)
    return lambda probability: float(np.interp(probability, centres, shares))
