"""Generate many texts at once: a row of the batch that has ended is filled with the next prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cascade.core.errors import not_finite
from cascade.decoding.kv_cache import KeyValueCache
from cascade.drafters.network.layers import attend, heads_of, output_of
from cascade.models.stack import DecoderStack


@dataclass(frozen=True)
class Job:
    """A text to generate.

    Attributes:
        ids: Token ids of the prompt.
        temperature: Temperature of the sampling; 0 takes the most likely token.
        seed: Seed of the sampling. The same seed gives the same text in the same batch.
        longest: The most new tokens.
        instruction: Whether the text is an instruction that the model then answers.
    """

    ids: tuple[int, ...]
    temperature: float
    seed: str
    longest: int
    instruction: bool = False


@dataclass(frozen=True)
class GeneratedText:
    """A text that the model generated, with its states.

    Attributes:
        ids: Token ids of the prompt and of what follows, `[L]` int32.
        prompt: The number of tokens of the prompt.
        greedy: Whether each token was the most likely one.
        features: States at positions 0 to L - 2 in bfloat16, `[L - 1, F + 1, D]`: the inputs of
            the feature layers, then the last layer's normed output.
    """

    ids: Tensor
    prompt: int
    greedy: bool
    features: Tensor

    @property
    def new_tokens(self) -> int:
        """The number of tokens after the prompt."""
        return len(self.ids) - self.prompt


@dataclass
class _Row:
    """A row of the batch.

    Attributes:
        job: What it generates; None for a row that is done.
        start: The column of its first token.
        ids: Its token ids so far.
        draws: Random numbers of the sampling.
    """

    job: Job | None = None
    start: int = 0
    ids: list[int] = field(default_factory=list)
    draws: random.Random = field(default_factory=random.Random)


class BatchedGenerator:
    """Generates texts with a model, several at a time.

    The tokens of a row lie in the columns of one cache. A prompt that fills a row is computed by
    itself and put into the columns before the next one, so that all rows always continue in the
    same column. A row's text does not depend on the other rows, except by rounding.

    Args:
        stack: The model. `check_can_draft` must have passed.
        feature_layers: The layers whose inputs are kept, 1..N.
        batch_size: The number of rows.
        longest_prompt: The most tokens of a prompt.
        longest: The most tokens of a text, with its prompt.
        ends: Tokens that end a text.
    """

    def __init__(
        self,
        stack: DecoderStack,
        feature_layers: Sequence[int],
        *,
        batch_size: int,
        longest_prompt: int,
        longest: int,
        ends: Sequence[int],
    ) -> None:
        self.stack, self.ends = stack, frozenset(ends)
        self._slots = {layer: slot for slot, layer in enumerate(feature_layers)}
        self._longest_prompt, self._longest = longest_prompt, longest
        self._rows = [_Row() for _ in range(batch_size)]
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._features = torch.zeros(
            (batch_size, longest, len(feature_layers) + 1, stack.hidden_size),
            dtype=torch.bfloat16,
            device=stack.device,
        )
        self._column = longest_prompt

    @torch.no_grad()
    def run(
        self,
        next_job: Callable[[], Job | None],
        done: Callable[[Job, GeneratedText], None],
        progress: Callable[[int], None],
    ) -> None:
        """Generate texts until there is no job left.

        Args:
            next_job: Returns the next text to generate; None if there is none now. It is asked
                again after a text is done.
            done: Called with each text.
            progress: Called with the number of tokens generated since the last call, without those
                of instructions.

        Raises:
            ModelError: Logits are not finite.
        """
        self._fill(next_job, done)
        while any(row.job is not None for row in self._rows):
            answers = sum(row.job is not None and not row.job.instruction for row in self._rows)
            self._step()
            progress(answers)
            self._finish(done)
            self._fill(next_job, done)

    def _fill(
        self, next_job: Callable[[], Job | None], done: Callable[[Job, GeneratedText], None]
    ) -> None:
        """Give new jobs to rows that are done; drop these rows once there are no jobs."""
        for number, row in enumerate(self._rows):
            while row.job is None:
                job = next_job()
                if job is None:
                    break
                self._begin(number, job)
                self._finish(done, only=row)
        active = [number for number, row in enumerate(self._rows) if row.job is not None]
        if active and len(active) <= 0.75 * len(self._rows):
            kept = torch.tensor(active, device=self.stack.device)
            self._rows = [self._rows[number] for number in active]
            self._keys = [keys[kept] for keys in self._keys]
            self._values = [values[kept] for values in self._values]
            self._features = self._features[kept]

    def _begin(self, number: int, job: Job) -> None:
        """Compute a prompt, put it into a row, and choose its first token."""
        length, row = len(job.ids), self._rows[number]
        row.job, row.start = job, self._column - length
        row.ids, row.draws = list(job.ids), random.Random(job.seed)
        plan = self.stack.plan(torch.tensor([job.ids], device=self.stack.device))
        hidden = plan.embedded
        for layer, call in enumerate(plan.calls, start=1):
            self._keep(layer, hidden[0], number, slice(length))
            module = self.stack.layers[layer - 1]
            heads = heads_of(module, hidden, call.kwargs["position_embeddings"])
            keys, values = self._cache(layer, *heads[1:])
            keys[number, :, row.start : self._column] = heads[1][0]
            values[number, :, row.start : self._column] = heads[2][0]
            mask = call.kwargs.get("attention_mask")
            hidden = output_of(module, hidden, attend(module, *heads, mask))
        normed = self.stack.norm(hidden)
        self._features[number, :length, -1] = normed[0].to(torch.bfloat16)
        self._choose(self.stack.decode_normed(normed[:, -1:])[:, 0], [row])

    def _keep(self, layer: int, states: Tensor, rows: Any, positions: Any) -> None:
        slot = self._slots.get(layer)
        if slot is not None:
            self._features[rows, positions, slot] = states.to(torch.bfloat16)

    def _cache(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values of all rows, `[B, heads, columns, head_dim]`."""
        if len(self._keys) < layer:
            shape = len(self._rows), keys.shape[1], self._longest + self._longest // 2
            self._keys.append(keys.new_zeros((*shape, keys.shape[-1])))
            self._values.append(values.new_zeros((*shape, values.shape[-1])))
        return self._keys[layer - 1], self._values[layer - 1]

    def _step(self) -> None:
        """Compute the newest token of each row, and choose the next one."""
        self._make_room()
        column, device = self._column, self.stack.device
        starts = torch.tensor(
            [column if row.job is None else row.start for row in self._rows], device=device
        )
        ids = torch.tensor([row.ids[-1:] or [0] for row in self._rows], device=device)
        first = int(starts.min())
        seen = torch.arange(first, column + 1, device=device) >= starts[:, None]
        window = KeyValueCache(self.stack.num_layers, len(ids), self._keys[0].shape[2])
        window.window(column - first, column + 1 - first)
        positions = (column - starts)[:, None]
        plan = self.stack.plan(
            ids, attention_mask=seen.long(), position_ids=positions, cache=window
        )
        hidden, masks = plan.embedded, _FloatMasks()
        rows = torch.arange(len(ids), device=device)
        for layer, call in enumerate(plan.calls, start=1):
            self._keep(layer, hidden[:, 0], rows, positions[:, 0])
            module = self.stack.layers[layer - 1]
            queries, new_keys, new_values = heads_of(
                module, hidden, call.kwargs["position_embeddings"]
            )
            keys, values = self._keys[layer - 1], self._values[layer - 1]
            keys[:, :, column], values[:, :, column] = new_keys[:, :, 0], new_values[:, :, 0]
            mask = masks.of(call.kwargs.get("attention_mask"), seen, queries.dtype)
            seen_keys, seen_values = (
                keys[:, :, first : column + 1],
                values[:, :, first : column + 1],
            )
            attended = attend(module, queries, seen_keys, seen_values, mask)
            hidden = output_of(module, hidden, attended)
        normed = self.stack.norm(hidden)
        self._features[rows, positions[:, 0], -1] = normed[:, 0].to(torch.bfloat16)
        self._column += 1
        self._choose(self.stack.decode_normed(normed)[:, 0], self._rows)

    def _make_room(self) -> None:
        """Move the columns to the left where the cache is full."""
        if self._column < self._keys[0].shape[2]:
            return
        oldest = min(row.start for row in self._rows if row.job is not None)
        by = min(oldest, self._column - self._longest_prompt)
        for stored in (*self._keys, *self._values):
            stored[:, :, : self._column - by] = stored[:, :, by : self._column].clone()
        self._column -= by
        for row in self._rows:
            row.start -= by

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> None:
        """Append the next token to each row, from its logits, `[B, V]`."""
        if not torch.isfinite(logits.amax(dim=-1)).all():
            raise not_finite("the logits of generated text are not finite")
        likeliest = logits.argmax(dim=-1).tolist()
        for number, row in enumerate(rows):
            if row.job is None:
                continue
            token = likeliest[number]
            if row.job.temperature > 0:
                shares = (logits[number].float() / row.job.temperature).softmax(dim=-1)
                sums = shares.cumsum(dim=0)
                place = torch.searchsorted(sums, row.draws.random() * sums[-1])
                token = min(int(place), len(sums) - 1)
            row.ids.append(token)

    def _finish(self, done: Callable[[Job, GeneratedText], None], only: _Row | None = None) -> None:
        """Hand over the texts that have ended."""
        for number, row in enumerate(self._rows):
            job = row.job
            if job is None or (only is not None and row is not only):
                continue
            new = len(row.ids) - len(job.ids)
            if row.ids[-1] in self.ends or new >= job.longest or len(row.ids) >= self._longest:
                row.job = None
                features = self._features[number, : len(row.ids) - 1].clone()
                ids = torch.tensor(row.ids, dtype=torch.int32)
                done(job, GeneratedText(ids, len(job.ids), job.temperature == 0, features.cpu()))


class _FloatMasks:
    """Masks of a step as attention kernels take them, converted once and not in each layer."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def of(self, mask: Tensor | None, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores, `[B, 1, 1, L]`.

        Args:
            mask: The mask of a layer's call; None where every row sees every column.
            seen: `[B, L]`, the columns that each row has.
            dtype: The dtype of the scores.
        """
        found = self._made.get(id(mask))
        if found is None:
            made = seen[:, None, None] if mask is None else mask
            if made.dtype == torch.bool:
                made = torch.zeros(made.shape, dtype=dtype, device=made.device).masked_fill_(
                    ~made, float("-inf")
                )
            found = self._made[id(mask)] = made
        return found
