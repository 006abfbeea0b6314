"""Passes of the full model for lossless decoding: by the engine, or by the model's own modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cascade.decoding.engine.engine import DecodingEngine
from cascade.decoding.engine.rows import MAX_ROWS, Rows
from cascade.decoding.forward import finite_logits
from cascade.decoding.graphed_forward import GraphedForward
from cascade.decoding.kv_cache import KeyValueCache
from cascade.decoding.lossless import Branch
from cascade.decoding.own_forward import OwnForward
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack


class EnginePasses:
    """Passes by the engine; prompts are computed by the model's own modules.

    Args:
        engine: The engine, which must be ready.
        batch: The number of rows.
        capacity: The maximum number of tokens of a row.
        milliseconds: What a pass over 1, 2, ... tokens takes.
        feature_layers: The layers whose inputs are returned as features, 1..N in ascending order.
    """

    most = MAX_ROWS

    def __init__(
        self,
        engine: DecodingEngine,
        batch: int,
        capacity: int,
        milliseconds: Sequence[float],
        feature_layers: Sequence[int] = (),
    ) -> None:
        self.engine, self.feature_layers = engine, tuple(feature_layers)
        self.milliseconds = milliseconds
        self.trees = engine.supports_trees
        # In half precision, several rows are rounded in another way than one.
        self.joins = not engine.exact
        self.description = engine.description
        stack = engine.stack
        self.counts = Counts.of(stack.num_layers)
        # A tree needs a column for each guess, also beside the longest text.
        self.cache = KeyValueCache(stack.num_layers, batch, capacity + MAX_ROWS)
        first = torch.zeros(1, dtype=torch.long, device=stack.device)
        self.cache.allocate(*engine.cache_shape, engine.embed(first))

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Compute prompts; see `Passes`."""
        stack, cache = self.engine.stack, self.cache.of_sequences(first, len(prompts))
        hidden, features = _by_modules(stack, prompts, 0, cache, self.feature_layers)
        count, length = len(prompts), len(prompts[0])
        self.counts.add_pass(count * length, count * length**2)
        return self._logits(hidden[:, -1]), features

    def run(self, branches: Sequence[Branch]) -> tuple[Tensor, Tensor | None]:
        """Compute branches; see `Passes`."""
        engine = self.engine
        ids = torch.tensor(
            [token for branch in branches for token in branch.tokens], device=engine.stack.device
        )
        numbers = [branch.row for branch in branches]
        starts = [branch.column for branch in branches]
        if all(list(at.parents) == list(range(-1, len(at.parents) - 1)) for at in branches):
            rows = Rows.chains(numbers, starts, [len(branch.tokens) for branch in branches])
        else:
            rows = Rows.trees(numbers, starts, [branch.parents for branch in branches])
        hidden, tables = engine.embed(ids), engine.tables(rows)
        kept, below = [], 0
        for layer in self.feature_layers:
            if layer - 1 > below:
                hidden = engine.run(
                    hidden, rows, self.cache, below=below, last=layer - 1, tables=tables
                )
                below = layer - 1
            kept.append(hidden)
        hidden = engine.run(hidden, rows, self.cache, below=below, tables=tables)
        pairs = sum(at.column + len(at.tokens) for at in branches for _ in at.tokens)
        self.counts.add_pass(len(ids), pairs)
        features = _features(engine.stack, self.feature_layers, kept, hidden)
        return self._logits(hidden), features

    def _logits(self, hidden: Tensor) -> Tensor:
        self.counts.lm_head_rows += len(hidden)
        logits = self.engine.logits(hidden).float()
        return finite_logits(logits, self.engine.stack.num_layers)

    def move(self, row: int, columns: Mapping[int, int]) -> None:
        """Move keys and values; see `Passes`."""
        for layer in range(self.engine.stack.num_layers):
            for buffer in self.cache.buffers(layer):
                for column, target in columns.items():
                    buffer[row, :, target] = buffer[row, :, column]


class OwnPasses:
    """Passes of one row by the model's own modules, for families without an engine.

    Args:
        stack: The model, in fp32: half precision rounds a chunk in another way than single tokens.
        batch: 1.
        capacity: The maximum number of tokens of the row.
        milliseconds: What a pass over 1, 2, ... tokens takes.
        feature_layers: As for `EnginePasses`.
        reason: Why there is no engine.
    """

    trees = joins = False
    most = MAX_ROWS

    def __init__(
        self,
        stack: DecoderStack,
        batch: int,
        capacity: int,
        milliseconds: Sequence[float],
        feature_layers: Sequence[int] = (),
        *,
        reason: str,
    ) -> None:
        self.stack, self.milliseconds = stack, milliseconds
        self.feature_layers = tuple(feature_layers)
        self.description = f"model ({reason})"
        self.cache = KeyValueCache(stack.num_layers, batch, capacity)
        self.forward: OwnForward | None = None
        if not feature_layers and OwnForward.supports(stack):
            self.forward = OwnForward(stack, self.cache)
        self.counts = Counts.of(stack.num_layers) if self.forward is None else self.forward.counts

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Compute a prompt; see `Passes`."""
        (tokens,) = prompts
        logits, features = self._run(tokens, 0, last=True)
        return logits, None if features is None else features[None]

    def run(self, branches: Sequence[Branch]) -> tuple[Tensor, Tensor | None]:
        """Compute branches; see `Passes`."""
        (branch,) = branches
        return self._run(branch.tokens, branch.column, last=False)

    def _run(
        self, tokens: Sequence[int], start: int, *, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self.forward is not None:
            ids = torch.tensor([tokens], device=self.stack.device)
            return self.forward.run(ids, start, last=last)[0], None
        self.counts.add_pass(len(tokens), len(tokens) * (start + len(tokens)))
        every, read = _by_modules(self.stack, [tokens], start, self.cache, self.feature_layers)
        hidden, features = every[0], None if read is None else read[0]
        hidden = hidden[-1:] if last else hidden
        self.counts.lm_head_rows += len(hidden)
        logits = self.stack.decode(hidden[None])[0].float()
        return finite_logits(logits, self.stack.num_layers), features

    def move(self, row: int, columns: Mapping[int, int]) -> None:
        """Do nothing: the columns of a chain are where they belong."""


class GraphPasses:
    """Passes of one row by the model's own forward over a static cache.

    Args:
        forward: The forward.
        milliseconds: What a pass over 1, 2, ... tokens takes.
    """

    trees = joins = False

    def __init__(self, forward: GraphedForward, milliseconds: Sequence[float]) -> None:
        self.forward, self.most = forward, forward.shape.most
        self.milliseconds = milliseconds[: self.most]
        self.description, self.counts = forward.description, forward.counts

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Compute a prompt; see `Passes`."""
        (tokens,) = prompts
        return self._run(tokens, 0, last=True)

    def run(self, branches: Sequence[Branch]) -> tuple[Tensor, Tensor | None]:
        """Compute branches; see `Passes`."""
        (branch,) = branches
        return self._run(branch.tokens, branch.column, last=False)

    def _run(self, tokens: Sequence[int], start: int, *, last: bool) -> tuple[Tensor, None]:
        ids = torch.tensor([tokens], device=self.forward.stack.device)
        return self.forward.run(ids, start, last=last)[0], None

    def move(self, row: int, columns: Mapping[int, int]) -> None:
        """Do nothing: the columns of a chain are where they belong."""


def _by_modules(
    stack: DecoderStack,
    texts: Sequence[Sequence[int]],
    start: int,
    cache: KeyValueCache,
    feature_layers: Sequence[int],
) -> tuple[Tensor, Tensor | None]:
    """Compute tokens of texts by the model's own modules.

    Args:
        stack: The model.
        texts: The tokens of `n` texts, as many of each.
        start: The column of the first ones.
        cache: The texts' KV cache.
        feature_layers: As for `EnginePasses`.

    Returns:
        The states of all tokens, `[n, T, D]`, and their features, `[n, T, F + 1, D]`.
    """
    ids = torch.tensor(texts, device=stack.device)
    cache.window(start, start + ids.shape[1])
    plan = stack.plan(ids, cache=cache)
    hidden, kept = plan.embedded, []
    for layer, call in enumerate(plan.calls, start=1):
        if layer in feature_layers:
            kept.append(hidden)
        hidden = stack.step(layer, hidden, call)
    return hidden, _features(stack, feature_layers, kept, hidden)


def _features(
    stack: DecoderStack, feature_layers: Sequence[int], kept: Sequence[Tensor], last: Tensor
) -> Tensor | None:
    """Return the inputs of some layers and the last normed state, `[..., F + 1, D]`."""
    if not feature_layers:
        return None
    normed = stack.norm(last if last.ndim == 3 else last[None]).view_as(last)
    return torch.stack([*kept, normed], dim=-2)
