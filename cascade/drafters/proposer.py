"""Proposing tokens with a trained drafter while a text is decoded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cascade.drafters.acceptance import LEAST, calibrated
from cascade.drafters.network.drafter_network import DraftHead, embeddings_of
from cascade.drafters.network.layers import Tables, attend, heads_of, output_of, rotary_tables
from cascade.drafters.stored import Drafter
from cascade.models.stack import DecoderStack

#: Columns that a row's keys and values have room for at first.
_COLUMNS = 256


class Proposal(NamedTuple):
    """A drafted token.

    Attributes:
        token: The token.
        probability: How likely the model accepts it, if it accepts all drafts before it.
        runner_ups: The next likely tokens in its place, the likeliest first.
    """

    token: int
    probability: float
    runner_ups: tuple[int, ...]


class Proposer(Protocol):
    """Proposes tokens that a model then verifies.

    Attributes:
        feature_layers: Layers whose inputs `observe` wants, 1..N, ascending. The last layer's
            normed output always follows them.
    """

    feature_layers: tuple[int, ...]

    def begin(self, row: int, prompt: Sequence[int]) -> None:
        """Begin a text.

        Args:
            row: The row of the batch. An earlier text of it is forgotten.
            prompt: Its token ids.
        """

    def observe(self, row: int, tokens: Sequence[int], features: Tensor) -> None:
        """Take confirmed tokens, and the states from which the model predicted them.

        The first call covers the whole prompt: its tokens from the second one on, and the first
        token that the model chose. Every token is given once.

        Args:
            row: The row of the batch.
            tokens: The tokens at positions t + 1 to t + n.
            features: The model's states at positions t to t + n - 1, `[n, F + 1, D]`.
        """

    def propose(self, row: int, limit: int) -> list[Proposal]:
        """Return a chain of drafts that follows the last confirmed token; it may be empty.

        Args:
            row: The row of the batch.
            limit: The most tokens.
        """


@dataclass
class _Text:
    """What a drafter knows of a row.

    Attributes:
        head: The rows of the LM head, with those of the prompt's tokens.
        keys: `[1, key heads, columns, head_dim]`; None before the first step.
        values: As `keys`.
        length: Columns of confirmed positions. Those behind it are of drafts and are overwritten.
        tokens: Confirmed tokens that no column has yet.
        features: The states that belong to them.
        state: The drafter's state of the last column, `[1, D]`, from which a chain begins.
    """

    head: DraftHead
    keys: Tensor | None = None
    values: Tensor | None = None
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    state: Tensor | None = None


class TrainedDrafter:
    """Proposes chains of tokens with a trained drafter.

    Args:
        stack: The model.
        drafter: The drafter, from `load_drafter`.
        least: A chain ends where the probability that all of it is accepted falls below this.
        runner_ups: The number of runner-ups of each draft.

    Attributes:
        feature_layers: As in `Proposer`.
        network: The network in the model's dtype.
        steps: The number of the drafter's steps so far, for statistics.
    """

    def __init__(
        self, stack: DecoderStack, drafter: Drafter, *, least: float = LEAST, runner_ups: int = 4
    ) -> None:
        self.stack, self.record, self.least = stack, drafter.record, least
        self.feature_layers = drafter.network.feature_layers
        self.network = copy.deepcopy(drafter.network).to(stack.device, stack.dtype)
        self.network.requires_grad_(False)
        self.steps = 0
        self._runner_ups = runner_ups
        self._head = DraftHead(stack, drafter.tokens, stack.dtype)
        self._ends = frozenset(drafter.record.ends)
        self._embedding = embeddings_of(stack)
        self._calibrations = [calibrated(bins) for bins in drafter.record.calibration]
        self._texts: dict[int, _Text] = {}
        self._tables: Tables = self._tables_for(_COLUMNS)

    def _tables_for(self, length: int) -> Tables:
        cos, sin = rotary_tables(self.stack, length)
        return cos.to(self.stack.dtype), sin.to(self.stack.dtype)

    def begin(self, row: int, prompt: Sequence[int]) -> None:
        """Begin a text; see `Proposer`."""
        self._texts[row] = _Text(self._head.with_tokens(prompt))

    def observe(self, row: int, tokens: Sequence[int], features: Tensor) -> None:
        """Take confirmed tokens and their states; see `Proposer`.

        Nothing is computed before the next call of `propose`.
        """
        if len(tokens) != len(features):
            raise ValueError(
                f"expected as many states as tokens, got {len(features)} and {len(tokens)}"
            )
        text = self._texts[row]
        text.tokens += tokens
        text.features.append(features)

    @torch.no_grad()
    def propose(self, row: int, limit: int) -> list[Proposal]:
        """Return a chain of drafts; see `Proposer`."""
        text = self._texts[row]
        if text.tokens:
            ids = torch.tensor(text.tokens, device=self._embedding.device)
            features = torch.cat(text.features).to(self._embedding.device)
            hidden = self.network.first_input(self._embedding[ids], features)
            text.state = self._run(text, hidden, text.length)
            text.length += len(ids)
            text.tokens, text.features = [], []
        return [] if text.state is None else self._chain(text, text.state, limit)

    def _chain(self, text: _Text, state: Tensor, limit: int) -> list[Proposal]:
        drafts: list[Proposal] = []
        path, columns = 1.0, text.length
        while len(drafts) < limit:
            shares = text.head.logits(self.network.norm(state))[0].float().softmax(dim=-1)
            best, places = shares.topk(min(1 + self._runner_ups, len(shares)))
            calibration = self._calibrations[min(len(drafts), len(self._calibrations) - 1)]
            probability = calibration(float(best[0]))
            path *= probability
            if path < self.least:
                break
            token, *others = text.head.tokens[places].tolist()
            drafts.append(Proposal(token, probability, tuple(others)))
            if len(drafts) == limit or token in self._ends:
                break
            hidden = self.network.next_input(self._embedding[token][None], state)
            state = self._run(text, hidden, columns)
            columns += 1
        return drafts

    def _run(self, text: _Text, hidden: Tensor, start: int) -> Tensor:
        """Keep the keys and values of some columns, and return the state of the last, `[1, D]`.

        The drafter is one layer, so nothing needs the states of the other columns.
        """
        self.steps += 1
        layer, stop = self.network.layer, start + len(hidden)
        queries, keys, values = heads_of(layer, hidden[None], self._tables_at(start, stop))
        known, seen = _room(text, keys, values, start, stop)
        last = queries[:, :, -1:], known[:, :, :stop], seen[:, :, :stop]
        return output_of(layer, hidden[None, -1:], attend(layer, *last, None))[0]

    def _tables_at(self, start: int, stop: int) -> Tables:
        if stop > self._tables[0].shape[1]:
            self._tables = self._tables_for(2 * stop)
        return self._tables[0][:, start:stop], self._tables[1][:, start:stop]


def _room(
    text: _Text, keys: Tensor, values: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Write new keys and values into a row's buffers, and return the buffers."""
    if text.keys is None or text.values is None or text.keys.shape[2] < stop:
        shape = (*keys.shape[:2], max(_COLUMNS, 2 * stop))
        larger = (
            keys.new_zeros((*shape, keys.shape[-1])),
            values.new_zeros((*shape, values.shape[-1])),
        )
        if text.keys is not None and text.values is not None:
            larger[0][:, :, :start] = text.keys[:, :, :start]
            larger[1][:, :, :start] = text.values[:, :, :start]
        text.keys, text.values = larger
    text.keys[:, :, start:stop], text.values[:, :, start:stop] = keys, values
    return text.keys, text.values
