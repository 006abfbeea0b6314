"""The interface of proposers, and the choice of drafts from what several of them propose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from cascade.models.stack import DecoderStack

#: What an estimate is kept for, e.g. ("n-gram", 4, 1).
Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Candidate:
    """A token that may follow.

    Attributes:
        token: The token.
        parent: The candidate before it, as a place in the same list; -1 for the end of the text.
        key: What kind of guess it is; guesses of a kind are accepted equally often.
        prior: The assumed probability that it is right if its parent is, before any experience.

    Example:
        >>> from cascade import Candidate
        >>> first = Candidate(token=7, parent=-1, key=("mine", 0), prior=0.5)
        >>> second = Candidate(token=8, parent=0, key=("mine", 1), prior=0.4)
        >>> [first, second][second.parent].token
        7
    """

    token: int
    parent: int
    key: Key
    prior: float


class Proposer:
    """Proposes tokens that may follow a text. Subclasses override what they need.

    One proposer serves all rows of a batch. Each call names the row.

    Attributes:
        name: Its name in counts and reports.
        feature_layers: The layers whose inputs it reads (1..N), followed by the last normed state.
            Empty: it reads no states.
        runner_ups: How many of the model's most likely tokens `learn` receives.
        companions: Proposers that come with it, and are asked before it.
        needed_below: A row is left out where the proposers before have a guess for the next token
            that is at least this probable. For proposers whose guesses take time.

    Example:
        >>> from cascade import Candidate, EarlyExit, Proposer, load
        >>> class Repeater(Proposer):
        ...     "Proposes the last token again."
        ...     name = "repeater"
        ...     def begin(self, row, token):
        ...         self.last = {row: token}
        ...     def observe(self, row, tokens, features):
        ...         self.last[row] = tokens[-1]
        ...     def propose(self, row, limit):
        ...         return [Candidate(self.last[row], -1, (self.name,), prior=0.2)]
        >>> stack = load("smollm2-135m")
        >>> ids = stack.tokenizer("Ten zeros: 0 0 0 0", return_tensors="pt").input_ids
        >>> early = EarlyExit(stack)
        >>> same = early.generate(ids, max_new_tokens=4, verify=True, drafter=Repeater())
        >>> same.equal(early.generate(ids, max_new_tokens=4))
        True
    """

    name: str = "drafter"
    feature_layers: tuple[int, ...] = ()
    runner_ups: int = 0
    companions: Sequence[Proposer] = ()
    needed_below: float = math.inf

    def check(self, stack: DecoderStack) -> None:
        """Check that tokens can be proposed for a model. Called before each generation.

        Args:
            stack: The model.

        Raises:
            CascadeError: They cannot; the message says why.
        """

    def begin(self, row: int, token: int) -> None:
        """Begin a new text in a row with its first token."""

    def observe(self, row: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """Append confirmed tokens to a row's text.

        Args:
            row: The row.
            tokens: The tokens, `[n]`.
            features: The states from which they were predicted, `[n, F + 1, D]`; None without
                `feature_layers`.
        """

    def learn(self, tokens: Sequence[int], following: Sequence[Sequence[int]]) -> None:
        """Receive the model's most likely tokens after each of some tokens, in any row.

        Args:
            tokens: The tokens.
            following: For each of them the most likely next tokens, in descending order.
        """

    def propose(self, row: int, limit: int) -> list[Candidate]:
        """Return candidates for the tokens behind a row's text, each behind its parent.

        Args:
            row: The row.
            limit: The maximum number of tokens that can follow.
        """
        raise NotImplementedError

    def propose_all(self, limits: Mapping[int, int]) -> dict[int, list[Candidate]]:
        """Return the candidates of several rows.

        Args:
            limits: The maximum number of tokens that can follow in each row.
        """
        return {row: self.propose(row, limit) for row, limit in limits.items()}


class Estimates:
    """How often guesses of a kind were right, learned while decoding.

    Args:
        weight: The number of tries that the prior counts for.
    """

    def __init__(self, weight: float = 4.0) -> None:
        self.weight = weight
        self._counts: dict[Key, list[float]] = {}

    def of(self, candidate: Candidate) -> float:
        """Return the probability that a candidate is right if its parent is."""
        right, tries = self._counts.get(candidate.key, (0.0, 0.0))
        # A guess is never likelier than its parent, which has to come first.
        prior = max(0.0, min(1.0, candidate.prior))
        return (right + self.weight * prior) / (tries + self.weight)

    def add(self, key: Key, right: bool) -> None:
        """Count a guess whose parent was right."""
        counts = self._counts.setdefault(key, [0.0, 0.0])
        counts[0] += right
        counts[1] += 1
        if counts[1] > 64:  # the text at hand counts most
            counts[0], counts[1] = counts[0] / 2, counts[1] / 2


@dataclass(frozen=True)
class Draft:
    """A tree of guesses behind a row's text.

    Attributes:
        tokens: The guesses, each behind its parent.
        parents: The parent of each guess, as a place in `tokens`; -1 for the end of the text.
        keys: The kind of each guess.
        sources: The proposer of each guess.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    keys: tuple[Key, ...] = ()
    sources: tuple[str, ...] = ()


class Drafting:
    """Merges what proposers propose and keeps what pays.

    Args:
        proposers: The proposers. Where several propose the same token, the likeliest guess counts.
        milliseconds: What a pass over 1, 2, ... rows takes.
        trees: Whether several tokens may be guessed for one place; otherwise, drafts are chains.
    """

    def __init__(
        self, proposers: Sequence[Proposer], milliseconds: Sequence[float], *, trees: bool
    ) -> None:
        self.proposers, self.milliseconds, self.trees = tuple(proposers), milliseconds, trees
        self.estimates = Estimates()

    def propose(self, limits: Mapping[int, int]) -> dict[int, Draft]:
        """Return the drafts of some rows.

        Args:
            limits: The maximum number of tokens that can follow in each row.
        """
        if not self._can_pay(len(limits)):
            return {row: Draft() for row in limits}
        found: list[tuple[float, int, _Node]] = []
        for row, nodes in self._nodes(limits).items():
            found += [(-node.path, row, node) for node in nodes]
        found.sort(key=lambda entry: entry[0])  # stable: parents come before their children
        kept = self._worth(len(limits), [-path for path, _, _ in found])
        chosen: dict[int, list[_Node]] = {row: [] for row in limits}
        for _, row, node in found[:kept]:
            chosen[row].append(node)
        return {row: _draft(nodes) for row, nodes in chosen.items()}

    def _can_pay(self, rows: int) -> bool:
        """Return whether drafts that are all right would give more tokens per millisecond."""
        times = self.milliseconds
        return any(
            count * times[rows - 1] > rows * times[count - 1]
            for count in range(rows + 1, len(times) + 1)
        )

    def _worth(self, rows: int, paths: Sequence[float]) -> int:
        """Return how many of the most probable guesses give the most tokens per millisecond."""
        expected, best, kept = float(rows), 0.0, 0
        for count in range(len(paths) + 1):
            if rows + count > len(self.milliseconds):
                break
            if count:
                expected += paths[count - 1]
            speed = expected / self.milliseconds[rows + count - 1]
            if speed > best:
                best, kept = speed, count
        return kept

    def _nodes(self, limits: Mapping[int, int]) -> dict[int, list[_Node]]:
        """Return the merged candidates of each row, each behind its parent."""
        merged = {row: _Merged(limit, self.estimates) for row, limit in limits.items() if limit > 0}
        for proposer in self.proposers:
            wanted = {
                row: nodes.limit
                for row, nodes in merged.items()
                if nodes.likeliest < proposer.needed_below
            }
            if wanted:
                for row, candidates in proposer.propose_all(wanted).items():
                    merged[row].add(candidates, proposer.name)
        found = {row: nodes.paths() for row, nodes in merged.items()}
        if self.trees:
            return found
        return {row: _best_chain(nodes) for row, nodes in found.items()}


class _Merged:
    """The candidates of a row from several proposers, merged; none of them is behind a limit."""

    def __init__(self, limit: int, estimates: Estimates) -> None:
        self.limit, self.likeliest = limit, 0.0
        self.nodes: list[_Node] = []
        self._estimates = estimates
        self._by_place: dict[tuple[int, int], int] = {}

    def add(self, candidates: Sequence[Candidate], source: str) -> None:
        """Add the candidates of a proposer."""
        places: dict[int, int] = {-1: -1}
        for number, candidate in enumerate(candidates):
            parent = places.get(candidate.parent)
            depth = 0 if parent is None or parent < 0 else self.nodes[parent].depth
            if parent is None or depth == self.limit:
                continue
            place = self._by_place.setdefault((parent, candidate.token), len(self.nodes))
            probability = self._estimates.of(candidate)
            node = _Node(place, candidate, parent, depth + 1, probability, source)
            if place == len(self.nodes):
                self.nodes.append(node)
            elif probability > self.nodes[place].probability:
                self.nodes[place] = node
            if parent < 0:
                self.likeliest = max(self.likeliest, probability)
            places[number] = place

    def paths(self) -> list[_Node]:
        """Return the candidates, with the probability that all on the way to each is right."""
        made: list[_Node] = []
        for node in self.nodes:
            before = made[node.parent].path if node.parent >= 0 else 1.0
            made.append(replace(node, path=before * node.probability))
        return made


@dataclass(frozen=True)
class _Node:
    """A candidate in the merged tree of a row."""

    place: int
    candidate: Candidate
    parent: int
    depth: int
    probability: float
    source: str
    path: float = 0.0


def _best_chain(nodes: Sequence[_Node]) -> list[_Node]:
    """Return the most probable guess, the most probable one behind it, and so on."""
    chain: list[_Node] = []
    place = -1
    while True:
        following = [node for node in nodes if node.parent == place]
        if not following:
            return chain
        chain.append(max(following, key=lambda node: node.path))
        place = chain[-1].place


def _draft(nodes: Sequence[_Node]) -> Draft:
    places = {node.place: number for number, node in enumerate(nodes)}
    return Draft(
        tuple(node.candidate.token for node in nodes),
        tuple(places.get(node.parent, -1) for node in nodes),
        tuple(node.candidate.key for node in nodes),
        tuple(node.source for node in nodes),
    )
