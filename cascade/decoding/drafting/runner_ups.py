"""Drafts from the model's own earlier predictions: what it found likely after the same token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cascade.decoding.drafting.proposers import Candidate, Proposer

#: The assumed probability that the most likely token after a token is right again, the second most
#: likely one, and so on.
_PRIORS = (0.25, 0.1, 0.06, 0.04)

#: Candidates for one place of the first token, of the second one, and so on.
_WIDTHS = (4, 2, 1)


class RunnerUps(Proposer):
    """Remembers the most likely tokens after each token, and proposes them when it comes again.

    Every pass gives the logits of all drafted tokens, including rejected ones. Token recycling (Luo
    et al. 2024) keeps the most likely tokens of each as candidates for later.

    Example:
        >>> recycled = RunnerUps()
        >>> recycled.begin(0, 5)
        >>> recycled.learn([5], [[6, 7, 8, 9]])
        >>> [candidate.token for candidate in recycled.propose(0, 1)]
        [6, 7, 8, 9]
    """

    name = "runner-ups"
    runner_ups = len(_PRIORS)

    def __init__(self) -> None:
        self._following: dict[int, Sequence[int]] = {}
        self._last: dict[int, int] = {}

    def begin(self, row: int, token: int) -> None:
        """Begin a new text in a row with its first token."""
        self._last[row] = token

    def observe(self, row: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """Append confirmed tokens to a row's text."""
        if tokens:
            self._last[row] = tokens[-1]

    def learn(self, tokens: Sequence[int], following: Sequence[Sequence[int]]) -> None:
        """Remember the model's most likely tokens after each of some tokens."""
        self._following.update(zip(tokens, following, strict=True))

    def propose(self, row: int, limit: int) -> list[Candidate]:
        """Return a tree of the most likely tokens behind a row's text."""
        found: list[Candidate] = []
        level = [(-1, self._last[row])]
        for depth, width in enumerate(_WIDTHS[:limit]):
            following: list[tuple[int, int]] = []
            for parent, token in level:
                for rank, guess in enumerate(self._following.get(token, ())[:width]):
                    following.append((len(found), guess))
                    key = (self.name, rank, depth)
                    found.append(Candidate(guess, parent, key, _PRIORS[rank]))
            level = following
        return found
