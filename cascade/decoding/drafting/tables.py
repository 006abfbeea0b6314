"""Drafts from a table of n-grams: what followed the last few tokens in a corpus."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cascade.decoding.drafting.proposers import Candidate, Proposer

#: The most candidates, and the probability below which nothing follows a candidate.
_MOST, _LEAST = 12, 0.05

#: Each context counts this many more tokens than were seen, none of which is a candidate.
_UNSEEN = 2

#: A context that is not known.
_PADDING = -1


class NgramTable(Proposer):
    """Proposes the tokens that most often followed the last few tokens in a corpus.

    The table takes little memory and no time to speak of. Text that the model generated itself is
    the best corpus; `cascade train-drafter` stores such a table with each drafter.

    Args:
        following: For each context, the tokens that followed it and how often, most frequent first,
            and how often the context came.

    Attributes:
        longest: The number of tokens of the longest contexts.

    Example:
        >>> table = NgramTable.of([[1, 2, 3, 4], [9, 2, 3, 4]])
        >>> table.begin(0, 7)
        >>> table.observe(0, [2, 3], None)
        >>> [candidate.token for candidate in table.propose(0, 4)]
        [4]
    """

    name = "table"

    def __init__(self, following: Mapping[tuple[int, ...], tuple[Counter[int], int]]) -> None:
        self._following = dict(following)
        self.longest = max(map(len, self._following), default=1)
        self._ends: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._following)

    @classmethod
    def of(
        cls, texts: Iterable[Sequence[int]], *, longest: int = 3, least: int = 2, most: int = 4
    ) -> NgramTable:
        """Return the table of some texts.

        Args:
            texts: Token ids.
            longest: The number of tokens of the longest contexts.
            least: Contexts that come less often are left out.
            most: The number of tokens that are kept for each context.
        """
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            for place in range(1, len(text)):
                for length in range(1, min(longest, place) + 1):
                    counts[tuple(text[place - length : place])][text[place]] += 1
        found = {}
        for context, tokens in counts.items():
            total = tokens.total()
            if total >= least:
                found[context] = (Counter(dict(tokens.most_common(most))), total)
        return cls(found)

    def begin(self, row: int, token: int) -> None:
        """Begin a new text in a row with its first token."""
        self._ends[row] = (token,)

    def observe(self, row: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """Append confirmed tokens to a row's text."""
        self._ends[row] = (*self._ends[row], *tokens)[-self.longest :]

    def propose(self, row: int, limit: int) -> list[Candidate]:
        """Return the most probable candidates, and what follows each of them."""
        candidates: list[Candidate] = []
        # Places where tokens may follow: their probability, depth and context.
        open_places = [(-1.0, 0, -1, self._ends[row])]
        while open_places and len(candidates) < _MOST:
            path, depth, parent, context = heapq.heappop(open_places)
            if depth == limit:
                continue
            for rank, (token, prior, key) in enumerate(self._after(context)):
                number = len(candidates)
                candidates.append(Candidate(token, parent, (self.name, *key, rank), prior))
                if -path * prior >= _LEAST:
                    longer = (*context, token)[-self.longest :]
                    heapq.heappush(open_places, (path * prior, depth + 1, number, longer))
        return candidates

    def _after(self, context: tuple[int, ...]) -> list[tuple[int, float, tuple[int, int]]]:
        """Return the tokens after the longest known suffix, their probabilities, and its kind."""
        for length in range(len(context), 0, -1):
            found = self._following.get(context[-length:])
            if found is not None:
                tokens, total = found
                key = length, min(total, 16).bit_length()
                return [(token, n / (total + _UNSEEN), key) for token, n in tokens.items()]
        return []

    def tensors(self) -> dict[str, Tensor]:
        """Return the table as tensors, for storing: one row for each of C contexts.

        Returns:
            `contexts` `[C, longest]` and `following` `[C, K]`, padded with -1; `counts` `[C, K]`;
            `totals` `[C]`. All are int32.
        """
        most = max((len(tokens) for tokens, _ in self._following.values()), default=1)
        contexts, following, counts, totals = [], [], [], []
        for context, (tokens, total) in sorted(self._following.items()):
            gap = most - len(tokens)
            contexts.append([_PADDING] * (self.longest - len(context)) + list(context))
            following.append([*tokens, *[_PADDING] * gap])
            counts.append([*tokens.values(), *[0] * gap])
            totals.append(total)
        rows = len(totals)
        return {
            "contexts": torch.tensor(contexts, dtype=torch.int32).reshape(rows, self.longest),
            "following": torch.tensor(following, dtype=torch.int32).reshape(rows, most),
            "counts": torch.tensor(counts, dtype=torch.int32).reshape(rows, most),
            "totals": torch.tensor(totals, dtype=torch.int32),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> NgramTable:
        """Return the table that `tensors` gave.

        Args:
            tensors: The tensors by name.

        Raises:
            KeyError: A tensor is missing.
            ValueError: The tensors have other shapes or values than those of a table.
        """
        names = ("contexts", "following", "counts", "totals")
        columns = [tensors[name] for name in names]
        shapes = [tuple(column.shape) for column in columns]
        rows = len(columns[-1])
        whole = [len(shape) for shape in shapes] == [2, 2, 2, 1] and shapes[1] == shapes[2]
        if not whole or any(shape[0] != rows for shape in shapes):
            raise ValueError(f"expected tensors of one length, got {shapes}")
        if any(column.dtype != torch.int32 for column in columns):
            raise ValueError("expected tensors of int32, got others")
        found: dict[tuple[int, ...], tuple[Counter[int], int]] = {}
        for context, tokens, counts, total in zip(
            *(each.tolist() for each in columns), strict=True
        ):
            pairs = zip(tokens, counts, strict=True)
            known = {token: count for token, count in pairs if token != _PADDING}
            key = tuple(token for token in context if token != _PADDING)
            if not key or min(known.values(), default=0) < 1 or sum(known.values()) > total:
                raise ValueError(f"expected counts of each context, got {counts} of {total}")
            found[key] = (Counter(known), total)
        return cls(found)

    def tokens(self) -> set[int]:
        """Return all tokens of contexts and of what follows them."""
        found: set[int] = set()
        for context, (following, _) in self._following.items():
            found.update(context, following)
        return found
