"""Proposers for tests: one that knows the text, and ones that are wrong on purpose."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch import Tensor

from cascade.decoding.drafting.proposers import Candidate, Proposer

#: Passes of any size take equally long, so that everything that is proposed is drafted.
FREE = [1.0] * 16


class Oracle(Proposer):
    """Proposes the tokens that follow, as far as it is honest.

    Args:
        texts: The whole text of each row, without padding.
        vocabulary: The number of tokens.
        wrong: How often a token is replaced by a random one.
        siblings: How many wrong tokens stand beside each right one.
        length: The maximum number of tokens of a draft.
        seed: Seed of the random choices.
    """

    name = "oracle"

    def __init__(
        self,
        texts: Mapping[int, Sequence[int]],
        vocabulary: int,
        *,
        wrong: float = 0.0,
        siblings: int = 0,
        length: int = 6,
        seed: int = 0,
    ) -> None:
        self.texts, self.vocabulary, self.wrong = texts, vocabulary, wrong
        self.siblings, self.length = siblings, length
        self.random = random.Random(seed)
        self.seen: dict[int, list[int]] = {}

    def begin(self, row: int, token: int) -> None:
        self.seen[row] = [token]

    def observe(self, row: int, tokens: Sequence[int], features: Tensor | None) -> None:
        self.seen[row] += tokens

    def propose(self, row: int, limit: int) -> list[Candidate]:
        begin = len(self.seen[row])
        found: list[Candidate] = []
        parent = -1
        for token in self.texts[row][begin : begin + min(limit, self.length)]:
            guesses = [token if self.random.random() >= self.wrong else self._any()]
            guesses += [self._any() for _ in range(self.siblings)]
            guesses = list(dict.fromkeys(guesses))
            self.random.shuffle(guesses)
            above = parent
            for guess in guesses:
                if guess == token:
                    parent = len(found)
                found.append(Candidate(guess, above, (self.name, len(found)), 0.9))
            if parent == above:  # nothing was right
                parent = len(found) - 1
        return found

    def _any(self) -> int:
        return self.random.randrange(self.vocabulary)


class Stubborn(Proposer):
    """Proposes the same tokens again and again."""

    name = "stubborn"

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def propose(self, row: int, limit: int) -> list[Candidate]:
        return [
            Candidate(token, place - 1, (self.name, place), 0.9)
            for place, token in enumerate(self.tokens[:limit])
        ]
