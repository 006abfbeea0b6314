"""Lossless decoding: the full model checks several drafted tokens in one pass.

The text is the full model's own, token for token, whatever is drafted. Drafts only decide how many
passes it takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.decoding.drafting.proposers import Draft, Drafting
from cascade.decoding.growing_text import Generation, GrowingText, Token
from cascade.decoding.sampling import TokenChooser
from cascade.models.flops import Counts


@dataclass(frozen=True)
class Branch:
    """Tokens of one row that are computed together.

    Attributes:
        row: The row.
        column: The column of its first token.
        tokens: Its tokens: the last confirmed one, then the draft.
        parents: The parent of each token, as a place in `tokens`; -1 for the first one.
    """

    row: int
    column: int
    tokens: Sequence[int]
    parents: Sequence[int]


class Passes(Protocol):
    """Computes passes of the full model over rows of different lengths.

    Columns count the tokens of a row, without padding.

    Attributes:
        trees: Whether a token may have several children.
        joins: Whether prompts of one length may be computed together.
        most: The maximum number of tokens of a pass.
        milliseconds: What a pass over 1, 2, ... tokens takes.
        counts: Receives the work that is computed.
        description: What computes the layers.
    """

    trees: bool
    joins: bool
    most: int
    milliseconds: Sequence[float]
    counts: Counts
    description: str

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Compute the prompts of consecutive rows.

        Args:
            first: The first row.
            prompts: The prompts, T tokens each; one without `joins`.

        Returns:
            The logits behind the last tokens, `[n, V]` in fp32, and features, `[n, T, F+1, D]`.

        Raises:
            ModelError: Logits are not finite.
        """
        ...

    def run(self, branches: Sequence[Branch]) -> tuple[Tensor, Tensor | None]:
        """Compute branches.

        Args:
            branches: Their R tokens are computed together.

        Returns:
            The logits behind each token, `[R, V]` in fp32, and features, `[R, F+1, D]`.

        Raises:
            ModelError: Logits are not finite.
        """
        ...

    def move(self, row: int, columns: Mapping[int, int]) -> None:
        """Move keys and values of a row: from a column to an earlier one."""
        ...


@dataclass
class _Progress:
    """What happened so far."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    computed: int = 0
    sources: list[tuple[int, int, str]] = field(default_factory=list)
    proposed: Counter[str] = field(default_factory=Counter)
    positions: list[tuple[int, int]] = field(default_factory=list)

    def count(self, draft: Draft, accepted: int) -> None:
        """Count a draft by proposer and by position.

        Args:
            draft: The draft.
            accepted: How many of its tokens were confirmed, one behind the other.
        """
        self.drafted += len(draft.tokens)
        self.accepted += accepted
        self.proposed.update(draft.sources)
        depths: list[int] = []
        for parent in draft.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        for place in range(max(depths, default=0)):
            if place == len(self.positions):
                self.positions.append((0, 0))
            reached, right = self.positions[place]
            self.positions[place] = (reached + 1, right + (place < accepted))


def generate_lossless(
    passes: Passes, drafting: Drafting, text: GrowingText, choose: TokenChooser
) -> Generation:
    """Generate the full model's text; see `EarlyExit.generate` with `verify=True`.

    Args:
        passes: Computes the full model.
        drafting: Guesses tokens.
        text: The prompts, padded on the left.
        choose: Chooses tokens.

    Raises:
        UsageError: A drafted token is outside the vocabulary.
        ModelError: Logits are not finite.
    """
    return _Loop(passes, drafting, text, choose).run()


class _Loop:
    def __init__(
        self, passes: Passes, drafting: Drafting, text: GrowingText, choose: TokenChooser
    ) -> None:
        self.passes, self.drafting, self.text, self.choose = passes, drafting, text, choose
        self.last = len(passes.counts.layer_rows)
        self.first = [int(column) for column in text.first]
        self.done = _Progress()
        self.runner_ups = max((at.runner_ups for at in drafting.proposers), default=0)

    def run(self) -> Generation:
        """Generate until all rows have ended."""
        for rows in self._rows_of_one_length():
            self._prefill(rows)
        while self.text.open_rows:
            drafts = self.drafting.propose(
                {
                    row: self.text.capacity - self.text.confirmed[row] - 1
                    for row in self.text.open_rows
                }
            )
            # A pass has a limited number of rows; further rows take another one.
            rows = list(drafts)
            while rows:
                some, size = [], 0
                while rows and size + 1 + len(drafts[rows[0]].tokens) <= self.passes.most:
                    size += 1 + len(drafts[rows[0]].tokens)
                    some.append(rows.pop(0))
                self._check({row: drafts[row] for row in some})
        return self._result()

    def _rows_of_one_length(self) -> list[list[int]]:
        """Return the rows in consecutive groups whose prompts are computed together."""
        groups: list[list[int]] = []
        for row in self.text.open_rows:
            if self.passes.joins and groups and self.first[groups[-1][0]] == self.first[row]:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    def _prefill(self, rows: Sequence[int]) -> None:
        text, begin = self.text, self.first[rows[0]]
        prompts = text.ids[rows[0] : rows[-1] + 1, begin : text.prompt].tolist()
        logits, features = self.passes.prefill(rows[0], prompts)
        self.done.computed += sum(map(len, prompts))
        tokens = self.choose(text.ids, logits, rows, [text.prompt] * len(rows)).tolist()
        for place, (row, prompt, token) in enumerate(zip(rows, prompts, tokens, strict=True)):
            for proposer in self.drafting.proposers:
                proposer.begin(row, prompt[0])
            states = None if features is None else features[place]
            self._observe(row, [*prompt[1:], token], states)
        added = {row: Token(token, self.last) for row, token in zip(rows, tokens, strict=True)}
        text.add(text.prompt, added)

    def _check(self, drafts: Mapping[int, Draft]) -> None:
        """Compute the last confirmed token and the draft of some rows; confirm what is right."""
        text = self.text
        branches = []
        for row, draft in drafts.items():
            self._check_tokens(draft)
            column = text.confirmed[row] - 1
            tokens = [int(text.ids[row, column]), *draft.tokens]
            parents = [-1, *(parent + 1 for parent in draft.parents)]
            branches.append(Branch(row, column - self.first[row], tokens, parents))
        logits, features = self.passes.run(branches)
        self.done.passes += 1
        self.done.computed += len(logits)
        self._learn(branches, logits)
        chosen = self._choices(branches, logits)
        if len(chosen) == len(branches):
            self._confirm_one_each(branches, chosen, features)
            return
        offset = 0
        for branch in branches:
            end = offset + len(branch.tokens)
            before = len(self.done.sources)
            path = self._confirm(branch, drafts[branch.row], chosen[offset:end])
            self.done.count(drafts[branch.row], len(self.done.sources) - before)
            states = None if features is None else features[offset:end][path]
            tokens = [chosen[offset + place] for place in path]
            self._observe(branch.row, tokens, states)
            moved = {
                branch.column + place: branch.column + depth
                for depth, place in enumerate(path)
                if place != depth
            }
            if moved:
                self.passes.move(branch.row, moved)
            offset = end

    def _confirm_one_each(
        self, branches: Sequence[Branch], chosen: Sequence[int], features: Tensor | None
    ) -> None:
        """Confirm the token behind each row's last one, where nothing was drafted."""
        text, columns = self.text, dict[int, dict[int, Token]]()
        for place, (branch, token) in enumerate(zip(branches, chosen, strict=True)):
            column = text.confirmed[branch.row]
            columns.setdefault(column, {})[branch.row] = Token(token, self.last)
            self._observe(branch.row, [token], None if features is None else features[[place]])
        for column, tokens in columns.items():
            text.add(column, tokens)
        for row in (branch.row for branch in branches):
            self.choose.processors.confirm(text.confirmed[row])

    def _check_tokens(self, draft: Draft) -> None:
        size = self.text.stack.vocab_size
        for token, source in zip(draft.tokens, draft.sources, strict=True):
            if not 0 <= token < size:
                raise UsageError(
                    f"expected drafted tokens in 0..{size - 1}, got {token} from the drafter "
                    f"{source}; use a drafter of this model's vocabulary"
                )

    def _choices(self, branches: Sequence[Branch], logits: Tensor) -> list[int]:
        """Return the full model's token behind each token of the branches."""
        text, rows, columns = self.text, [], []
        for branch in branches:
            depths: list[int] = []
            for token, parent in zip(branch.tokens, branch.parents, strict=True):
                depths.append(0 if parent < 0 else depths[parent] + 1)
                column = self.first[branch.row] + branch.column + depths[-1]
                rows.append(branch.row)
                columns.append(column + 1)
                if self.choose.processors:  # they read the draft, which is a chain
                    text.ids[branch.row, column] = token
        return self.choose(text.ids, logits, rows, columns).tolist()

    def _confirm(self, branch: Branch, draft: Draft, chosen: Sequence[int]) -> list[int]:
        """Confirm tokens of a row; return the places in the branch that they were chosen behind."""
        text, row = self.text, branch.row
        children: dict[tuple[int, int], int] = {
            (parent, token): place
            for place, (token, parent) in enumerate(zip(branch.tokens, branch.parents, strict=True))
        }
        path, place, source = [], 0, None
        while True:
            column, token = text.confirmed[row], chosen[place]
            path.append(place)
            following = children.get((place, token))
            for other, parent in enumerate(branch.parents):
                if parent == place:
                    self.drafting.estimates.add(
                        draft.keys[other - 1], branch.tokens[other] == token
                    )
            if following is not None:
                source = draft.sources[following - 1]
                self.done.sources.append((row, column, source))
            text.add(column, {row: Token(token, self.last)})
            if following is None or text.ended[row]:
                break
            place = following
        self.choose.processors.confirm(text.confirmed[row])
        return path

    def _learn(self, branches: Sequence[Branch], logits: Tensor) -> None:
        if self.runner_ups:
            tokens = [token for branch in branches for token in branch.tokens]
            following = logits.topk(min(self.runner_ups, logits.shape[-1])).indices.tolist()
            for proposer in self.drafting.proposers:
                if proposer.runner_ups:
                    proposer.learn(tokens, [row[: proposer.runner_ups] for row in following])

    def _observe(self, row: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """Tell all proposers what was confirmed, with features for those that read them."""
        for proposer in self.drafting.proposers:
            proposer.observe(row, tokens, features if proposer.feature_layers else None)

    def _result(self) -> Generation:
        text, done = self.text, self.done
        names = tuple(at.name for at in self.drafting.proposers)
        result = text.result(self.passes.counts, done.computed, done.drafted, done.accepted)
        sources = torch.zeros_like(result.exit_layers)
        for row, column, name in done.sources:
            sources[row, column - text.prompt] = names.index(name) + 1
        proposed = {name: done.proposed[name] for name in names}
        result = result.with_drafts(
            done.passes, sources, proposed, done.positions, self.passes.description
        )
        if not names:  # nothing could be drafted
            return result
        costs = tuple(self.passes.milliseconds)
        return replace(result, pass_costs=costs, trees=self.drafting.trees)
