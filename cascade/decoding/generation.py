"""Generating text with early exits, and verifying drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.decoding.forward import Chunk, Exit, Pass, decode_tokens
from cascade.decoding.generation_settings import Settings
from cascade.decoding.kv_cache import Selection
from cascade.decoding.selective_layers import SkippingLayers
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack, Plan

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        sequences: `[B, T + new]`, rows that ended earlier padded.
        exit_layers: `[B, new]`, where each new token's logits were made: an exit layer, or N; 0
            where a row had ended.
        counts: What was really computed, prompt included.
        passed: Tokens that went through the first layer for somebody's sake, prompt included.
        drafted: With verification, tokens that an exit proposed.
        accepted: Those of them that the full model confirmed.
    """

    sequences: Tensor
    exit_layers: Tensor
    counts: Counts
    passed: int
    drafted: int = 0
    accepted: int = 0

    @property
    def layers_per_token(self) -> float:
        """Layers really computed per token, prompt included."""
        return sum(self.counts.layer_rows) / self.passed


class _Chooser:
    """Chooses the next token from logits; draws depend on seed, row and place alone."""

    def __init__(self, settings: Settings) -> None:
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.settings = settings
        self.generator = torch.Generator()
        self.warpers = LogitsProcessorList()
        if settings.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, logits: Tensor, rows: Sequence[int], places: Sequence[int]) -> Tensor:
        """Return `[n]` tokens from `[n, V]` logits of rows and places (columns of the token)."""
        if not self.settings.do_sample:
            return logits.argmax(dim=-1)
        scores = self.warpers(None, logits)  # type: ignore[arg-type]
        # The largest of log-probability plus Gumbel noise is a draw (Gumbel 1954). The noise is
        # fixed by seed, row and place, so that an exit and the full model draw alike where their
        # logits agree, and verification can compare tokens.
        noise = torch.stack(
            [self._noise(scores.shape[1], *key) for key in zip(rows, places, strict=True)]
        )
        return (scores + noise.to(scores.device)).argmax(dim=-1)

    def _noise(self, size: int, row: int, place: int) -> Tensor:
        mixed = (self.settings.seed * 1_000_003 + row) * 1_000_003 + place
        self.generator.manual_seed(mixed % 2**63)
        exponential = torch.empty(size).exponential_(generator=self.generator)
        return -exponential.clamp_min(1e-30).log()


class _Text:
    """The rows as they grow: which tokens are certain, and which rows have ended."""

    def __init__(
        self,
        stack: DecoderStack,
        prompt: Chunk,
        settings: Settings,
        new_tokens: int,
        streamer: BaseStreamer | None,
    ) -> None:
        self.stack, self.settings, self.streamer = stack, settings, streamer
        batch, self.prompt = prompt.ids.shape
        self.capacity = self.prompt + new_tokens
        self.ids = torch.full((batch, self.capacity), settings.filling, device=prompt.ids.device)
        self.ids[:, : self.prompt] = prompt.ids
        self.layers = torch.zeros_like(self.ids)
        self.certain = [self.prompt] * batch
        self.ended = [False] * batch
        self.mask = prompt.attention_mask
        self.first = self.prompt - prompt.valid.sum(dim=1)
        if streamer is not None:
            streamer.put(prompt.ids.cpu())

    @property
    def going(self) -> list[int]:
        """The rows that have not ended."""
        return [row for row, ended in enumerate(self.ended) if not ended]

    def add(self, row: int, token: int, layer: int) -> None:
        """Append a certain token to a row that has not ended."""
        column = self.certain[row]
        self.ids[row, column] = token
        self.layers[row, column] = layer
        self.certain[row] = column + 1
        full = column + 1 == self.capacity
        ends = token in self.settings.eos_token_id
        self.ended[row] = full or ends or self._stopped(row)
        if self.streamer is not None and len(self.ended) == 1:
            self.streamer.put(torch.tensor([token]))

    def _stopped(self, row: int) -> bool:
        if not self.settings.stop_strings or self.stack.tokenizer is None:
            return False
        new = self.ids[row, self.prompt : self.certain[row]].tolist()
        text = self.stack.tokenizer.decode(new)
        return any(stop in text for stop in self.settings.stop_strings)

    def chunk(self, start: int, stop: int) -> Chunk:
        """Return columns start to stop - 1."""
        columns = torch.arange(start, stop, device=self.ids.device)
        positions = (columns - self.first[:, None]).clamp_min(0)
        ended = torch.tensor(self.ended, device=self.ids.device)[:, None]
        mask = self.mask
        if mask is not None:
            new = mask.new_ones((len(mask), max(0, stop - mask.shape[1])))
            mask = torch.cat([mask, new], dim=1)[:, :stop]
        return Chunk(
            self.ids[:, start:stop], (columns >= self.first[:, None]) & ~ended, positions, mask
        )

    def result(self, counts: Counts, passed: int, drafted: int, accepted: int) -> Generation:
        """Return the generation; columns that no row reached are cut off."""
        stop = max(self.certain)
        for row, certain in enumerate(self.certain):
            self.ids[row, certain:] = self.settings.filling
        if self.streamer is not None:
            self.streamer.end()
        return Generation(
            self.ids[:, :stop].clone(),
            self.layers[:, self.prompt : stop].clone(),
            counts,
            passed,
            drafted,
            accepted,
        )


def generate(
    layers: SkippingLayers,
    exits: Sequence[Exit],
    prompt: Chunk,
    settings: Settings,
    *,
    exact: bool,
    draft_length: int | None,
    streamer: BaseStreamer | None,
    seed: int,
) -> Generation:
    """Generate from checked arguments: see `EarlyExit.generate`.

    Args:
        layers: Compute the layers.
        exits: In ascending order of layers.
        prompt: Padded on the left.
        settings: How to generate.
        exact: Whether upper layers catch up on tokens that left.
        draft_length: The most tokens drafted before the full model looks at them; None: it
            never does.
        streamer: Gets each certain token; one row only.
        seed: For rules that draw.

    Raises:
        UsageError: The prompt is padded behind a token, too long, or streamed in several rows.
        ModelError: A confidence or logits are not finite.
    """
    if not bool((prompt.valid[:, 1:] >= prompt.valid[:, :-1]).all()):
        raise UsageError(
            "a prompt has padding behind a token, by its attention_mask or, without one, by the "
            "token that the model pads with; expected prompts padded on the left only, so that "
            "every row's last token is the one to go on from"
        )
    if streamer is not None and len(prompt.ids) > 1:
        raise UsageError(f"a streamer takes one row, got {len(prompt.ids)}; generate row by row")
    stack = layers.stack
    new = settings.new_tokens(prompt.ids.shape[1], stack.max_positions)
    text = _Text(stack, prompt, settings, new, streamer)
    choose = _Chooser(settings)
    if not exact:
        return _leave(layers, exits, text, choose, seed)
    lagging = _Lagging(layers, exits, text, seed)
    if draft_length is None:
        return _wait(lagging, text, choose)
    return _verify(lagging, text, choose, draft_length)


def _leave(
    layers: SkippingLayers, exits: Sequence[Exit], text: _Text, choose: _Chooser, seed: int
) -> Generation:
    """Generate with tokens that leave for good: frozen and ridge propagation."""
    counts = Counts.of(layers.stack.num_layers)
    cache = layers.new_cache(len(text.ids), text.capacity)
    start, stop, passed = 0, text.prompt, 0
    while text.going:
        cache.window(start, stop)
        chunk = text.chunk(start, stop)
        passed += int(chunk.valid.sum())
        found: dict[int, tuple[int, int]] = {}
        wanted = torch.zeros_like(chunk.valid)
        wanted[:, -1] = chunk.valid[:, -1]
        Pass(layers, exits, chunk, cache, counts, seed=seed).run(
            wanted, _collecting(found, choose, stop)
        )
        for row, (token, layer) in sorted(found.items()):
            text.add(row, token, layer)
        start, stop = stop, stop + 1
    return text.result(counts, passed, 0, 0)


def _collecting(
    found: dict[int, tuple[int, int]], choose: _Chooser, place: int
) -> Callable[[int, Tensor, Tensor, Tensor], None]:
    """Return a sink that chooses each row's token for one place."""

    def take(layer: int, rows: Tensor, columns: Tensor, logits: Tensor) -> None:
        numbers = rows.tolist()
        tokens = choose(logits, numbers, [place] * len(numbers)).tolist()
        found.update({row: (token, layer) for row, token in zip(numbers, tokens, strict=True)})

    return take


class _Lagging:
    """Segments of layers between exits, the upper ones behind the lower ones.

    A token that leaves waits, as its state, below the segments it did not need. When a later
    token goes on, everything that waits goes with it, so that keys and values are the full
    model's.
    """

    def __init__(
        self, layers: SkippingLayers, exits: Sequence[Exit], text: _Text, seed: int
    ) -> None:
        self.layers, self.exits, self.text, self.seed = layers, exits, text, seed
        self.counts = Counts.of(layers.stack.num_layers)
        self.cache = layers.new_cache(len(text.ids), text.capacity)
        last = layers.stack.num_layers
        ends = [at.layer for at in exits if at.layer < last] + [last]
        self.segments = list(zip([0, *ends[:-1]], ends, strict=True))
        self.done = [0] * len(ends)
        self.waiting: list[Tensor | None] = [None] * len(ends)
        self.passed = 0

    def probe(self, stop: int) -> Pass:
        """Return a pass over the last column alone, to decide with; it computes nothing."""
        chunk = self.text.chunk(stop - 1, stop)
        nothing = torch.zeros(0, device=chunk.ids.device)
        return Pass(
            self.layers,
            self.exits,
            chunk,
            self.cache,
            self.counts,
            leaving=False,
            seed=self.seed,
            plan=Plan(nothing, ()),
        )

    def run(self, index: int, stop: int, probe: Pass) -> Tensor:
        """Let a segment catch up to column stop - 1; return its output for what it computed."""
        start, (below, last) = self.done[index], self.segments[index]
        chunk = self.text.chunk(start, stop)
        self.cache.window(start, stop)
        plan = chunk.plan(self.layers, self.cache)
        waiting = self.waiting[index]
        hidden = plan.embedded if index == 0 else waiting
        assert hidden is not None  # the segment below ran first
        if index == 0:
            self.passed += int(chunk.valid.sum())
            probe.reach(0, hidden[:, -1:])
        everything = torch.ones_like(chunk.valid)
        selection = Selection(everything, ~everything)
        for layer in range(below + 1, last + 1):
            call = plan.calls[layer - 1]
            hidden = self.layers.run(layer, hidden, selection, call, self.cache, self.counts)
            probe.reach(layer, hidden[:, -1:])
        self.done[index], self.waiting[index] = stop, None
        if index + 1 < len(self.segments):
            above = self.waiting[index + 1]
            self.waiting[index + 1] = hidden if above is None else torch.cat([above, hidden], dim=1)
        return hidden

    def crop(self, stop: int) -> None:
        """Forget columns from `stop` on; nothing may wait."""
        self.done = [min(done, stop) for done in self.done]


def _wait(lagging: _Lagging, text: _Text, choose: _Chooser) -> Generation:
    """Generate with exact keys and values: what left waits until somebody goes on."""
    stop = text.prompt
    while text.going:
        found: dict[int, tuple[int, int]] = {}
        take = _collecting(found, choose, stop)
        probe = lagging.probe(stop)
        _climb(lagging, probe, stop, take)
        for row, (token, layer) in sorted(found.items()):
            text.add(row, token, layer)
        stop += 1
    return text.result(lagging.counts, lagging.passed, 0, 0)


def _climb(
    lagging: _Lagging,
    probe: Pass,
    stop: int,
    take: Callable[[int, Tensor, Tensor, Tensor], None],
) -> None:
    """Go up until every row has left, or to the top; the last column's tokens are taken."""
    wanted = probe.chunk.valid
    for index in range(len(lagging.segments)):
        hidden = lagging.run(index, stop, probe)
        if index < len(lagging.exits):
            probe.decide(lagging.exits[index], wanted, take)
        if not bool(probe.undecided.any()):
            return
    last = hidden[:, -1:]
    decode_tokens(lagging.layers.stack, last, probe.undecided, lagging.counts, take)


def _verify(lagging: _Lagging, text: _Text, choose: _Chooser, draft_length: int) -> Generation:
    """Generate what the full model would: exits draft, the full model confirms.

    Rows share their columns, so a row whose draft was wrong takes the others back with it; what is
    certain of theirs is then only passed through again.
    """
    drafts: list[dict[int, tuple[int, int]]] = [{} for _ in text.ended]
    drafted = accepted = 0
    stop = text.prompt
    while text.going:
        found: dict[int, tuple[int, int]] = {}
        probe = lagging.probe(stop)
        open_rows = [row for row in text.going if text.certain[row] <= stop]
        probe.undecided = probe.undecided & _rows(text, open_rows)
        lower = _draft(lagging, probe, stop, _collecting(found, choose, stop))
        for row, draft in found.items():
            drafts[row][stop] = draft
            text.ids[row, stop : stop + 1] = draft[0]
        drafted += len(found)
        ends = any(token in text.settings.eos_token_id for token, _ in found.values())
        full = stop + 1 >= text.capacity
        if lower and not ends and not full and stop - lagging.done[-1] < draft_length:
            stop += 1
            continue
        accepted += _check(lagging, probe, text, choose, drafts, stop)
        if text.going:
            stop = min(text.certain[row] for row in text.going)
            lagging.crop(stop - 1)
            for waiting in drafts:
                for place in [place for place in waiting if place >= stop]:
                    del waiting[place]
    return text.result(lagging.counts, lagging.passed, drafted, accepted)


def _rows(text: _Text, rows: Sequence[int]) -> Tensor:
    mask = torch.zeros((len(text.ended), 1), dtype=torch.bool, device=text.ids.device)
    mask[list(rows)] = True
    return mask


def _draft(
    lagging: _Lagging,
    probe: Pass,
    stop: int,
    take: Callable[[int, Tensor, Tensor, Tensor], None],
) -> bool:
    """Go up while somebody may still leave; return whether everybody did."""
    wanted = probe.undecided
    for index, at in enumerate(lagging.exits[: len(lagging.segments) - 1]):
        lagging.run(index, stop, probe)
        probe.decide(at, wanted, take)
        if not bool(probe.undecided.any()):
            return True
    return not bool(probe.undecided.any())


def _check(
    lagging: _Lagging,
    probe: Pass,
    text: _Text,
    choose: _Chooser,
    drafts: list[dict[int, tuple[int, int]]],
    stop: int,
) -> int:
    """Let the full model choose every token since its last look; return the drafts it confirmed."""
    start = lagging.done[-1]
    for index in range(len(lagging.segments)):
        if lagging.done[index] < stop:
            hidden = lagging.run(index, stop, probe)
    choices: dict[tuple[int, int], int] = {}

    def take(_: int, rows: Tensor, columns: Tensor, logits: Tensor) -> None:
        keys = list(zip(rows.tolist(), (columns + start + 1).tolist(), strict=True))
        tokens = choose(logits, [row for row, _ in keys], [place for _, place in keys])
        choices.update(zip(keys, tokens.tolist(), strict=True))

    columns = torch.arange(start + 1, stop + 1, device=text.ids.device)
    certain = torch.tensor(text.certain, device=text.ids.device)[:, None]
    wanted = (columns >= certain) & _rows(text, text.going)
    decode_tokens(lagging.layers.stack, hidden, wanted, lagging.counts, take)
    accepted = 0
    for row in text.going:
        for place in range(text.certain[row], stop + 1):
            token = choices[row, place]
            draft = drafts[row].pop(place, None)
            confirmed = draft is not None and draft[0] == token
            accepted += confirmed
            layer = draft[1] if draft is not None and confirmed else lagging.layers.stack.num_layers
            before = None if place == stop else int(text.ids[row, place])
            text.add(row, token, layer)
            if text.ended[row] or (before is not None and before != token):
                break
    return accepted
