"""What a drafter's chains are worth on held-out texts, measured as they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cascade.drafters.network.drafter_network import DrafterNetwork, DraftHead
from cascade.drafters.network.layers import Tables
from cascade.drafters.records import BINS, METHODS, DraftEvaluation, Method, MethodFigures
from cascade.drafters.texts.batches import GeneratedText

#: Most drafts of a chain. The figures of longer chains say little: few of them are accepted.
CHAIN = 4

#: A chain ends where the probability that all of it is accepted falls below this.
LEAST = 0.3

#: Suffixes that are looked up, longest first, and most tokens that are proposed.
_SUFFIXES, _PROPOSED = range(8, 3, -1), 7


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

    def lengths(self, calibration: Sequence[Sequence[float]] | None) -> Tensor:
        """Return the number of drafts of each chain, `[places]`.

        Args:
            calibration: As for `walk`.
        """
        if calibration is None:
            return torch.full((len(self.hits),), CHAIN)
        shares = torch.tensor(
            [
                [calibrated(bins)(share) for bins, share in zip(calibration, row, strict=True)]
                for row in self.probabilities.tolist()
            ]
        ).reshape(-1, CHAIN)
        return (shares.cumprod(dim=1) >= LEAST).long().cumprod(dim=1).sum(dim=1)


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


# --- Tokens per pass -------------------------------------------------------------------------


@dataclass
class _Walk:
    """Counts of a text that is decoded with drafts."""

    passes: int = 0
    tokens: int = 0
    steps: int = 0


def walk(
    texts: Sequence[GeneratedText],
    chains: Sequence[Chains],
    method: Method,
    calibration: Sequence[Sequence[float]] | None = None,
) -> tuple[float, float]:
    """Return tokens per pass and drafter steps per pass, if texts are decoded with drafts.

    Args:
        texts: The texts.
        chains: Their chains.
        method: The way to draft.
        calibration: As from `calibration_of`; it ends chains (see `LEAST`). None: no chain ends
            before it has all drafts.
    """
    counts = _Walk()
    for text, own in zip(texts, chains, strict=True):
        ids, accepted = text.ids.tolist(), own.accepted.tolist()
        lengths = own.lengths(calibration).tolist()
        lookup, place = _Lookup(ids), text.prompt
        while place < len(ids) - 1:
            left = len(ids) - 1 - place  # tokens that the text still has
            found = lookup.accepted(place) if method.startswith("n-gram") else None
            if found is None and method.endswith("drafter"):
                length = lengths[place - text.prompt]
                # The step whose draft has too low a probability is computed as well.
                counts.steps += min(length + 1, CHAIN)
                found = min(length, accepted[place - text.prompt])
            new = min(left, 1 + (found or 0))
            counts.passes, counts.tokens, place = (
                counts.passes + 1,
                counts.tokens + new,
                place + new,
            )
    passes = max(1, counts.passes)
    return max(1, counts.tokens) / passes, counts.steps / passes


class _Lookup:
    """Looks up the longest suffix of a text in what precedes it."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0

    def accepted(self, place: int) -> int | None:
        """Return how many tokens of the continuation are right; None if there is none.

        Args:
            place: The last token that is known.
        """
        ids = self._ids
        for end in range(self._known, place):
            for size in _SUFFIXES:
                if end + 1 >= size:
                    self._after[tuple(ids[end + 1 - size : end + 1])] = end + 1
        self._known = max(self._known, place)
        for size in _SUFFIXES:
            start = self._after.get(tuple(ids[max(0, place + 1 - size) : place + 1]))
            if start is None or place + 1 < size:
                continue
            # Where the continuation reaches the end of what is known, it repeats itself.
            period = place + 1 - start
            proposed = [ids[start + at % period] for at in range(_PROPOSED)]
            pairs = zip(proposed, ids[place + 1 :], strict=False)
            return next((at for at, (one, two) in enumerate(pairs) if one != two), len(proposed))
        return None


def evaluation_of(
    step: int, texts: Sequence[GeneratedText], chains: Sequence[Chains]
) -> DraftEvaluation:
    """Return the acceptance of a drafter at a training step."""
    tokens, _ = walk(texts, chains, "drafter")
    return DraftEvaluation(step=step, accepted=accepted_by_position(chains), tokens_per_pass=tokens)


def compare_methods(
    texts: Sequence[GeneratedText],
    chains: Sequence[Chains],
    step_products: float,
    calibration: Sequence[Sequence[float]],
) -> tuple[list[MethodFigures], Method]:
    """Compare all ways to draft; return their figures, and the way with the largest gain.

    Args:
        texts: The texts.
        chains: Their chains.
        step_products: Multiplications of a drafter's step, in passes of the model over one token.
        calibration: As for `walk`, from other texts.
    """
    rows = []
    for method in METHODS:
        tokens, steps = walk(texts, chains, method, calibration)
        products = 1 + steps * step_products
        rows.append(
            MethodFigures(
                method=method,
                tokens_per_pass=tokens,
                drafter_steps=steps,
                products=products,
                gain=tokens / products,
            )
        )
    return rows, max(rows, key=lambda row: row.gain).method


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
