"""Proposing tokens with a trained drafter while texts are decoded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from msgspec.structs import replace
from torch import Tensor

from cascade.core.files import AnyPath
from cascade.decoding.drafting.proposers import Candidate, Proposer
from cascade.drafters.acceptance import calibrated
from cascade.drafters.drafting_layer import Columns, DraftingLayer
from cascade.drafters.network.drafter_network import DraftHead, embeddings_of
from cascade.drafters.stored import Drafter, read_drafter
from cascade.models.identity import check_same_model
from cascade.models.stack import DecoderStack

#: A chain is not continued where the probability that all of it is right falls below this.
LEAST = 0.3

#: Probabilities that are told apart when acceptance is counted while decoding.
_BINS = 8


def load_drafter(
    path: AnyPath, stack: DecoderStack, *, network: bool | None = None
) -> TrainedDrafter:
    """Return the drafter in a folder, after checking that it belongs to the model.

    A drafter can be used with any dtype of the model that it was trained for.

    Args:
        path: The folder that `cascade train-drafter` wrote.
        stack: The model.
        network: As for `TrainedDrafter`.

    Raises:
        RecordError: A file is missing, torn, edited or from a newer release.
        ModelError: The drafter belongs to another model, tokenizer or vocabulary.
        UnsupportedModelError: The model cannot have a drafter.

    Example:
        >>> from cascade import CascadeError, load, load_drafter
        >>> stack = load("smollm2-135m")
        >>> try:
        ...     load_drafter("no-such-folder", stack)
        ... except CascadeError as error:
        ...     print(error)
        no record no-such-folder/record.json; make one with `cascade train-drafter`
    """
    return TrainedDrafter(stack, read_drafter(path, stack), network=network)


@dataclass
class _Text:
    """What a drafter knows of a row.

    Attributes:
        number: The number of its keys and values.
        first: Its first token.
        has_prompt: Whether its prompt is known.
        head: The rows of the LM head for tokens that only its prompt has; None if there are none.
        length: Columns of confirmed positions. Those behind it are of drafts and are overwritten.
        tokens: Confirmed tokens that no column has yet.
        features: The states that belong to them.
        state: The drafter's state of the last column, `[1, D]`, from which a chain begins.
    """

    number: int
    first: int
    has_prompt: bool = False
    head: DraftHead | None = None
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    state: Tensor | None = None


@dataclass
class _Chain:
    """A chain of drafts while it is made.

    Attributes:
        text: Its text.
        limit: The maximum number of tokens.
        state: The state that the next token is drafted from, `[1, D]`.
        path: The probability that everything so far is right.
        depth: The number of tokens.
        last: The place of the last token in the candidates.
        token: The last token; None after the end.
        candidates: The candidates.
    """

    text: _Text
    limit: int
    state: Tensor
    path: float = 1.0
    depth: int = 0
    last: int = -1
    token: int | None = None
    candidates: list[Candidate] = field(default_factory=list)


class TrainedDrafter(Proposer):
    """Proposes chains of tokens, and other tokens beside each of them, with a trained network.

    Its table of n-grams is asked before. Where that has a likely guess, the network is not asked.

    Args:
        stack: The model.
        drafter: The drafter, as it is stored.
        network: Whether the network proposes tokens in addition to the table (default: unless the
            table alone was faster on the machine of the training).
        least: A chain is not continued where the probability that all of it is right falls below
            this.
        runner_ups: The number of other tokens beside each one.

    Attributes:
        record: The drafter's record.
        tokens: The tokens that it can propose, besides those of the prompt, `[V']`.
        has_network: Whether the network proposes tokens.
        steps: The number of the network's steps so far, for statistics.

    Example:
        >>> from tempfile import mkdtemp
        >>> from cascade import DrafterConfig, EarlyExit, load, train_drafter
        >>> config = DrafterConfig(
        ...     tokens=40, max_new_tokens=8, batch_size=4, held_out_texts=2, steps=1, step_tokens=64
        ... )
        >>> stack = load("smollm2-135m")
        >>> drafter = train_drafter(stack, ["embedded"], mkdtemp(), config)
        >>> ids = stack.tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> early = EarlyExit(stack)
        >>> text = early.generate(ids, max_new_tokens=4, verify=True, drafter=drafter)
        >>> text.equal(early.generate(ids, max_new_tokens=4))
        True
    """

    name = "drafter"
    needed_below = 0.6

    def __init__(
        self,
        stack: DecoderStack,
        drafter: Drafter,
        *,
        network: bool | None = None,
        least: float = LEAST,
        runner_ups: int = 4,
    ) -> None:
        self.stack, self.record, self.least = stack, drafter.record, least
        self.tokens = drafter.tokens
        self.companions = (drafter.table,)
        self.steps = 0
        self.has_network = drafter.record.use != "table" if network is None else network
        if not self.has_network:
            return
        self.feature_layers = drafter.network.feature_layers
        self.network = copy.deepcopy(drafter.network).to(stack.device, torch.float32)
        self.network.requires_grad_(False)
        self.layer = DraftingLayer(stack, self.network)
        self._runner_ups = runner_ups
        self._head = DraftHead(stack, drafter.tokens, self.layer.dtype)
        self._ends = frozenset(drafter.record.ends)
        self._embedding = embeddings_of(stack)
        self._calibrations = [calibrated(bins) for bins in drafter.record.calibration]
        self._texts: dict[int, _Text] = {}

    def check(self, stack: DecoderStack) -> None:
        """Check that the drafter belongs to a model; see `Proposer`."""
        own = self.stack
        if stack.model is not own.model:
            model = replace(
                own.provenance,
                weights_hash=own.weights_hash(),
                dtype=stack.provenance.dtype,
                device=stack.provenance.device,
            )
            check_same_model(model, stack, what="the weights of this drafter")

    def begin(self, row: int, token: int) -> None:
        """Begin a text; see `Proposer`."""
        if not self.has_network:
            return
        known = self._texts.get(row)
        number = len(self._texts) if known is None else known.number
        self._texts[row] = _Text(number, token)

    def observe(self, row: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """Take confirmed tokens and their states; see `Proposer`.

        Nothing is computed before the next call of `propose`.
        """
        if not self.has_network:
            return
        if features is None or len(tokens) != len(features):
            count = 0 if features is None else len(features)
            raise ValueError(f"expected as many states as tokens, got {count} and {len(tokens)}")
        text = self._texts[row]
        if not text.has_prompt:  # the first tokens are those of the prompt, and the one behind it
            text.has_prompt = True
            text.head = self._head.of_others([text.first, *tokens[:-1]])
        text.tokens += tokens
        text.features.append(features)

    def propose(self, row: int, limit: int) -> list[Candidate]:
        """Return a chain of drafts and their runner-ups; see `Proposer`."""
        return self.propose_all({row: limit}).get(row, [])

    @torch.no_grad()
    def propose_all(self, limits: Mapping[int, int]) -> dict[int, list[Candidate]]:
        """Return the candidates of some rows, which are computed together; see `Proposer`."""
        if not self.has_network:
            return {}
        self._read([self._texts[row] for row in limits])
        chains: dict[int, _Chain] = {}
        for row, limit in limits.items():
            text = self._texts[row]
            if text.state is not None and limit > 0:
                chains[row] = _Chain(text, limit, text.state)
        going = list(chains.values())
        while going:
            self._draft(going)
            going = [chain for chain in going if chain.token is not None]
            if going:
                self._step(going)
        return {row: chains[row].candidates if row in chains else [] for row in limits}

    def _read(self, texts: Sequence[_Text]) -> None:
        """Compute the columns of what was confirmed since the last call."""
        new = [text for text in texts if text.tokens]
        if not new:
            return
        device = self._embedding.device
        ids = torch.tensor([token for text in new for token in text.tokens], device=device)
        features = torch.cat([each for text in new for each in text.features]).to(device)
        hidden = self._first_input(self._embedding[ids], features)
        chunks, done = [], 0
        for text in new:
            stop = done + len(text.tokens)
            chunks.append(Columns(text.number, text.length, hidden[done:stop]))
            done = stop
        states = self._run(chunks)
        for text, state in zip(new, states.split(1), strict=True):
            text.state, text.length = state, text.length + len(text.tokens)
            text.tokens, text.features = [], []

    def _draft(self, chains: Sequence[_Chain]) -> None:
        """Draft the next token of some chains, and decide which of them go on."""
        normed = self.network.norm(torch.cat([chain.state for chain in chains]))
        common = self._head.logits(normed, self.layer.linear)
        for chain, state, logits in zip(chains, normed.split(1), common, strict=True):
            head, tokens = chain.text.head, self._head.tokens
            if head is not None:
                logits = torch.cat([logits, head.logits(state)[0]])
                tokens = torch.cat([tokens, head.tokens])
            shares, places = (
                logits.float().softmax(dim=-1).topk(min(1 + self._runner_ups, len(logits)))
            )
            calibration = self._calibrations[min(chain.depth, len(self._calibrations) - 1)]
            first, *others = shares.tolist()
            bin_ = min(_BINS - 1, int(first * _BINS))
            likely = [calibration(first), *others]
            parent, chain.last = chain.last, len(chain.candidates)
            found = tokens[places].tolist()
            chain.candidates += [
                Candidate(token, parent, (self.name, chain.depth, place, bin_), share)
                for place, (token, share) in enumerate(zip(found, likely, strict=True))
            ]
            chain.depth += 1
            chain.path *= likely[0]
            ended = found[0] in self._ends or chain.depth == chain.limit
            chain.token = None if ended or chain.path < self.least else found[0]

    def _step(self, chains: Sequence[_Chain]) -> None:
        """Compute the states behind the last tokens of some chains."""
        device = self._embedding.device
        ids = torch.tensor([chain.token for chain in chains], device=device)
        states = torch.cat([chain.state for chain in chains])
        hidden = self._next_input(self._embedding[ids], states)
        chunks = [
            Columns(chain.text.number, chain.text.length + chain.depth - 1, state)
            for chain, state in zip(chains, hidden.split(1), strict=True)
        ]
        for chain, state in zip(chains, self._run(chunks).split(1), strict=True):
            chain.state = state

    def _run(self, chunks: Sequence[Columns]) -> Tensor:
        self.steps += 1
        return self.layer.run(chunks)

    def _first_input(self, embedded: Tensor, features: Tensor) -> Tensor:
        return self.network.first_input(embedded, features, self.layer.linear)

    def _next_input(self, embedded: Tensor, states: Tensor) -> Tensor:
        return self.network.next_input(embedded, states, self.layer.linear)
