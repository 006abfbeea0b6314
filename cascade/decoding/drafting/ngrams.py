"""Drafts copied from earlier in the text: what followed the last few tokens before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cascade.decoding.drafting.proposers import Candidate, Proposer

#: The assumed probability that a copied token is right, by the length of the suffix that was found;
#: longer suffixes count like the longest one here.
_PRIORS = {1: 0.15, 2: 0.35, 3: 0.5, 4: 0.65, 5: 0.75, 6: 0.8, 7: 0.85, 8: 0.9}


class NgramLookup(Proposer):
    """Finds the longest suffix of a text earlier in the same text, and copies what followed it.

    Prompt lookup decoding (Saxena 2023) does the same with the prompt only. Here, the text includes
    everything that was generated.

    Args:
        longest: The longest suffix that is looked up.
        shortest: The shortest one.
        most: The maximum number of tokens that are copied.

    Example:
        >>> lookup = NgramLookup()
        >>> lookup.begin(0, 5)
        >>> lookup.observe(0, [6, 7, 8, 5, 6], None)
        >>> [candidate.token for candidate in lookup.propose(0, 3)]
        [7, 8, 5]
    """

    name = "n-gram"

    def __init__(self, longest: int = 8, shortest: int = 2, most: int = 12) -> None:
        self.longest, self.shortest, self.most = longest, shortest, most
        self._texts: dict[int, list[int]] = {}
        #: For each row and each n-gram the place behind its last occurrence.
        self._places: dict[int, dict[tuple[int, ...], int]] = {}

    def begin(self, row: int, token: int) -> None:
        """Begin a new text in a row with its first token."""
        self._texts[row], self._places[row] = [token], {}

    def observe(self, row: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """Append confirmed tokens to a row's text."""
        text, places = self._texts[row], self._places[row]
        for token in tokens:
            # The n-grams that end before this token are found from now on.
            end = len(text)
            for length in range(self.shortest, min(self.longest, end) + 1):
                places[tuple(text[end - length : end])] = end
            text.append(token)

    def propose(self, row: int, limit: int) -> list[Candidate]:
        """Return a chain of tokens that followed the longest known suffix."""
        text, places = self._texts[row], self._places[row]
        for length in range(min(self.longest, len(text)), self.shortest - 1, -1):
            begin = places.get(tuple(text[len(text) - length :]))
            if begin is None:
                continue
            copied = text[begin : begin + min(limit, self.most)]
            period = len(text) - begin
            prior = _PRIORS[min(length, max(_PRIORS))]
            while len(copied) < min(limit, self.most):  # a text that repeats itself goes on
                copied.append(copied[len(copied) - period])
            return [
                Candidate(
                    token,
                    place - 1,
                    (self.name, length, min(place, 4)),
                    prior if place == 0 else max(0.7, prior),
                )
                for place, token in enumerate(copied)
            ]
        return []
