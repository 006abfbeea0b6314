"""Text generation with early exits, and verification of drafts by the full model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.decoding.forward import (
    Chunk,
    Exit,
    ForwardPass,
    OnLogits,
    PassConfig,
    decode_tokens,
)
from cascade.decoding.generation_settings import DecodingConfig
from cascade.decoding.kv_cache import Selection
from cascade.decoding.processors import BatchProcessors, CustomProcessing, Processing
from cascade.decoding.sampling import TokenChooser
from cascade.decoding.selective_layers import LayerTask, SkippingLayers
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack, Plan

if TYPE_CHECKING:
    from transformers.generation.stopping_criteria import StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generation:
    """The result of a generation.

    Attributes:
        sequences: Token ids, `[B, T + new]`; rows that ended earlier are padded.
        exit_layers: The layer whose logits each new token was chosen from, `[B, new]`: an exit
            layer or N; 0 after the end of a row.
        counts: The work that was actually computed, including the prompt.
        passed: Tokens of open rows that the first layer computed, including the prompt.
        drafted: Tokens that an exit proposed, with verification.
        accepted: Drafted tokens that the full model confirmed.
    """

    sequences: Tensor
    exit_layers: Tensor
    counts: Counts
    passed: int
    drafted: int = 0
    accepted: int = 0

    @property
    def layers_per_token(self) -> float:
        """Layers actually computed per token, including the prompt."""
        return sum(self.counts.layer_rows) / self.passed


@dataclass(frozen=True)
class ExitConfig:
    """How tokens exit.

    Attributes:
        exits: In ascending order of layers.
        exact: Whether upper layers compute exited tokens once they are needed.
        seed: Seed for rules that draw random numbers.
    """

    exits: Sequence[Exit]
    exact: bool
    seed: int


class _Token(NamedTuple):
    """A chosen token and the layer whose logits it was chosen from."""

    token: int
    layer: int


class _Text:
    """The growing rows: their tokens, how many are confirmed, and which rows have ended.

    Attributes:
        ids: Token ids including drafts, `[B, capacity]`.
        confirmed: The number of final columns of each row.
    """

    def __init__(
        self,
        stack: DecoderStack,
        prompt: Chunk,
        config: DecodingConfig,
        capacity: int,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
    ) -> None:
        self.stack, self.config, self.streamer = stack, config, streamer
        self.capacity, self.criteria = capacity, criteria
        batch, self.prompt = prompt.ids.shape
        self.ids = torch.full((batch, self.capacity), config.filling, device=prompt.ids.device)
        self.ids[:, : self.prompt] = prompt.ids
        self.layers = torch.zeros_like(self.ids)
        self.confirmed = [self.prompt] * batch
        self.ended = [False] * batch
        self.mask = prompt.attention_mask
        self.first = self.prompt - prompt.valid.sum(dim=1)
        if streamer is not None:
            streamer.put(prompt.ids.cpu())

    @property
    def open_rows(self) -> list[int]:
        """The rows that have not ended."""
        return [row for row, ended in enumerate(self.ended) if not ended]

    def add(self, column: int, chosen: Mapping[int, _Token]) -> None:
        """Append confirmed tokens to rows that have not ended, and end rows.

        Args:
            column: The next column of these rows.
            chosen: The token of each row.
        """
        for row, (token, layer) in sorted(chosen.items()):
            self.ids[row, column] = token
            self.layers[row, column] = layer
            self.confirmed[row] = column + 1
            is_full = column + 1 == self.capacity
            is_end = token in self.config.eos_token_id
            self.ended[row] = is_full or is_end or self._has_stop_string(row)
            if self.streamer is not None and len(self.ended) == 1:
                self.streamer.put(torch.tensor([token]))
        if self.criteria and chosen:
            stopped = self.criteria(self.ids[:, : column + 1], None)
            for row in chosen:
                self.ended[row] = self.ended[row] or bool(stopped[row])

    def _has_stop_string(self, row: int) -> bool:
        """Return whether the newest token of a row completes a stop string."""
        if not self.config.stop_strings or self.stack.tokenizer is None:
            return False
        # As in transformers, a stop string may begin in the prompt. A token has at least one byte.
        stops, end = self.config.stop_strings, self.confirmed[row]
        longest = max(len(stop.encode()) for stop in stops)
        start = max(int(self.first[row]), self.prompt - longest)
        decode = self.stack.tokenizer.decode
        before = str(decode(self.ids[row, start : self.prompt].tolist())).rstrip("\ufffd")
        text = str(decode(self.ids[row, start:end].tolist()))
        return any(stop in text[max(0, len(before) - len(stop) + 1) :] for stop in stops)

    def row_mask(self, rows: Sequence[int]) -> Tensor:
        """Return a mask of some rows, `[B, 1]`."""
        mask = torch.zeros((len(self.ended), 1), dtype=torch.bool, device=self.ids.device)
        mask[list(rows)] = True
        return mask

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
        """Return the generation without the columns that no row reached."""
        stop = max(self.confirmed)
        for row, confirmed in enumerate(self.confirmed):
            self.ids[row, confirmed:] = self.config.filling
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
    exits: ExitConfig,
    prompt: Chunk,
    config: DecodingConfig,
    *,
    custom: CustomProcessing,
    draft_length: int | None,
    streamer: BaseStreamer | None,
) -> Generation:
    """Generate from checked arguments; see `EarlyExit.generate`.

    Args:
        layers: Computes the layers.
        exits: How tokens exit.
        prompt: The prompts, padded on the left.
        config: How to generate.
        custom: Logits processors and stopping criteria that the caller adds.
        draft_length: The maximum number of tokens drafted before the full model checks them. None:
            without verification.
        streamer: Receives each confirmed token; needs a single row.

    Raises:
        UsageError: A prompt has padding after a token or is too long, there are several rows to
            stream, or logits processors do not fit.
        ModelError: A confidence or logits are not finite.
    """
    if not bool((prompt.valid[:, 1:] >= prompt.valid[:, :-1]).all()):
        raise UsageError(
            "expected prompts padded only on the left, got padding after a token (given by the "
            "attention_mask or, without one, by the padding token); set padding_side='left'"
        )
    if streamer is not None and len(prompt.ids) > 1:
        raise UsageError(
            f"expected one row with a streamer, got {len(prompt.ids)}; generate each row separately"
        )
    stack = layers.stack
    new = config.new_tokens(prompt.ids.shape[1], stack.max_positions)
    processing = Processing.of(stack, prompt, config, new, custom)
    processors = BatchProcessors(processing, repeats=draft_length is not None)
    capacity = prompt.ids.shape[1] + new
    text = _Text(stack, prompt, config, capacity, processing.criteria, streamer)
    choose = TokenChooser(config, processors)
    if not exits.exact:
        return _generate_skipping(layers, exits, text, choose)
    segments = _DeferredSegments(layers, exits, text)
    if draft_length is None:
        return _generate_exact(segments, text, choose)
    return _generate_verified(segments, text, choose, draft_length)


def _generate_skipping(
    layers: SkippingLayers, exits: ExitConfig, text: _Text, choose: TokenChooser
) -> Generation:
    """Generate with frozen or ridge propagation: upper layers never compute exited tokens."""
    counts = Counts.of(layers.stack.num_layers)
    cache = layers.new_cache(len(text.ids), text.capacity)
    config = PassConfig(seed=exits.seed)
    start, stop, passed = 0, text.prompt, 0
    while text.open_rows:
        cache.window(start, stop)
        chunk = text.chunk(start, stop)
        passed += int(chunk.valid.sum())
        found = _FoundLogits()
        outputs = torch.zeros_like(chunk.valid)
        outputs[:, -1] = chunk.valid[:, -1]
        forward = ForwardPass(layers, exits.exits, chunk, cache, counts, config)
        forward.run(outputs, found.add)
        text.add(stop, found.choose_column(choose, text.ids, stop))
        start, stop = stop, stop + 1
    return text.result(counts, passed, 0, 0)


class _FoundLogits:
    """Logits of the tokens of a chunk, found at several layers, from which tokens are chosen.

    Tokens are chosen once all logits of a column are known, as in `transformers`, because logits
    processors may keep state from column to column.
    """

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self._logits: list[Tensor] = []

    def add(self, layer: int, rows: Tensor, columns: Tensor, logits: Tensor) -> None:
        """Add the logits `[n, V]` of some tokens, given by their rows and columns in the chunk."""
        self.layers += [layer] * len(rows)
        self.rows += rows.tolist()
        self.columns += columns.tolist()
        self._logits.append(logits)

    def choose(self, choose: TokenChooser, ids: Tensor, columns: Sequence[int]) -> list[int]:
        """Return the chosen tokens in the order in which their logits were added.

        Args:
            choose: Chooses tokens.
            ids: Token ids of the batch, `[B, capacity]`.
            columns: The column that each token will have in its row.
        """
        if not self._logits:
            return []
        logits = self._logits[0] if len(self._logits) == 1 else torch.cat(self._logits)
        return choose(ids, logits, self.rows, columns).tolist()

    def choose_column(self, choose: TokenChooser, ids: Tensor, column: int) -> dict[int, _Token]:
        """Return the token of each row, if all of them will have the same column."""
        tokens = self.choose(choose, ids, [column] * len(self.rows))
        found = zip(self.rows, tokens, self.layers, strict=True)
        return {row: _Token(token, layer) for row, token, layer in found}


class _DeferredSegments:
    """The segments of layers between exits, each computed only once a token needs it.

    If a token exits, the segments above its exit are deferred, and its state waits below them. When
    a later token continues, those segments compute all waiting states together with it. Keys and
    values are therefore the full model's.
    """

    def __init__(self, layers: SkippingLayers, exits: ExitConfig, text: _Text) -> None:
        self.layers, self.exits, self.text = layers, exits.exits, text
        self.config = PassConfig(stop_exited=False, seed=exits.seed)
        self.counts = Counts.of(layers.stack.num_layers)
        self.cache = layers.new_cache(len(text.ids), text.capacity)
        last = layers.stack.num_layers
        ends = [at.layer for at in self.exits if at.layer < last] + [last]
        #: Each segment as (layer below its first layer, last layer).
        self.segments = list(zip([0, *ends[:-1]], ends, strict=True))
        #: The number of columns that each segment has computed.
        self.done = [0] * len(ends)
        #: The states `[B, n, D]` waiting below each segment; always empty for the first one.
        self.waiting: list[list[Tensor]] = [[] for _ in ends]
        self.passed = 0

    def probe(self, stop: int) -> ForwardPass:
        """Return a pass over the last column that decides exits but computes no layers."""
        chunk = self.text.chunk(stop - 1, stop)
        nothing = torch.zeros(0, device=chunk.ids.device)
        return ForwardPass(
            self.layers,
            self.exits,
            chunk,
            self.cache,
            self.counts,
            self.config,
            plan=Plan(nothing, ()),
        )

    def run(self, index: int, stop: int, probe: ForwardPass) -> Tensor:
        """Compute a segment up to column stop - 1; return its output for the new columns."""
        start, (below, last) = self.done[index], self.segments[index]
        chunk = self.text.chunk(start, stop)
        self.cache.window(start, stop)
        plan = chunk.plan(self.layers, self.cache)
        if index == 0:
            hidden = plan.embedded
            self.passed += int(chunk.valid.sum())
            probe.set_output(0, hidden[:, -1:])
        else:
            hidden = torch.cat(self.waiting[index], dim=1)
            self.waiting[index] = []
        everything = torch.ones_like(chunk.valid)
        selection = Selection(everything, ~everything)
        for layer in range(below + 1, last + 1):
            call = plan.calls[layer - 1]
            task = LayerTask(layer, hidden, selection, call, self.cache, self.counts)
            hidden = self.layers.run(task)
            probe.set_output(layer, hidden[:, -1:])
        self.done[index] = stop
        if index + 1 < len(self.segments):
            self.waiting[index + 1].append(hidden)
        return hidden

    def crop(self, stop: int) -> None:
        """Discard columns from `stop` on; no state may be waiting."""
        self.done = [min(done, stop) for done in self.done]


def _generate_exact(segments: _DeferredSegments, text: _Text, choose: TokenChooser) -> Generation:
    """Generate with exact propagation: upper layers compute exited tokens once needed."""
    stop = text.prompt
    while text.open_rows:
        found = _FoundLogits()
        _run_until_exited(segments, segments.probe(stop), stop, found.add)
        text.add(stop, found.choose_column(choose, text.ids, stop))
        stop += 1
    return text.result(segments.counts, segments.passed, 0, 0)


def _run_until_exited(
    segments: _DeferredSegments, probe: ForwardPass, stop: int, on_logits: OnLogits
) -> None:
    """Compute segments until the last token of every row has exited, or all segments."""
    outputs = probe.chunk.valid
    for index in range(len(segments.segments)):
        hidden = segments.run(index, stop, probe)
        if index < len(segments.exits):
            probe.decide(segments.exits[index], outputs, on_logits)
        if not bool(probe.undecided.any()):
            return
    last = hidden[:, -1:]
    decode_tokens(segments.layers.stack, last, probe.undecided, segments.counts, on_logits)


def _generate_verified(
    segments: _DeferredSegments, text: _Text, choose: TokenChooser, draft_length: int
) -> Generation:
    """Generate the full model's text: exits draft tokens, and the full model confirms them.

    All rows advance column by column together. A wrong draft in one row therefore moves all rows
    back to its column. Confirmed tokens of the other rows are then computed again, but do not
    change.
    """
    drafts: list[dict[int, _Token]] = [{} for _ in text.ended]  # by row, then by column
    drafted = accepted = 0
    stop = text.prompt
    while text.open_rows:
        found = _FoundLogits()
        probe = segments.probe(stop)
        unconfirmed = [row for row in text.open_rows if text.confirmed[row] <= stop]
        probe.undecided = probe.undecided & text.row_mask(unconfirmed)
        all_exited = _draft(segments, probe, stop, found.add)
        chosen = found.choose_column(choose, text.ids, stop)
        for row, draft in chosen.items():
            drafts[row][stop] = draft
            text.ids[row, stop : stop + 1] = draft.token
        drafted += len(chosen)
        has_end = any(draft.token in text.config.eos_token_id for draft in chosen.values())
        is_full = stop + 1 >= text.capacity
        unchecked = stop - segments.done[-1]
        if all_exited and not has_end and not is_full and unchecked < draft_length:
            stop += 1
            continue
        accepted += _confirm(segments, probe, choose, drafts, stop)
        if text.open_rows:
            stop = min(text.confirmed[row] for row in text.open_rows)
            segments.crop(stop - 1)
            choose.processors.confirm(stop)
            for by_column in drafts:
                for column in [column for column in by_column if column >= stop]:
                    del by_column[column]
    return text.result(segments.counts, segments.passed, drafted, accepted)


def _draft(segments: _DeferredSegments, probe: ForwardPass, stop: int, on_logits: OnLogits) -> bool:
    """Compute segments while tokens can still exit; return whether all tokens exited."""
    outputs = probe.undecided
    for index, at in enumerate(segments.exits[: len(segments.segments) - 1]):
        segments.run(index, stop, probe)
        probe.decide(at, outputs, on_logits)
        if not bool(probe.undecided.any()):
            return True
    return not bool(probe.undecided.any())


def _confirm(
    segments: _DeferredSegments,
    probe: ForwardPass,
    choose: TokenChooser,
    drafts: list[dict[int, _Token]],
    stop: int,
) -> int:
    """Let the full model choose all tokens since its last check; return the number it confirms."""
    text, last = segments.text, segments.layers.stack.num_layers
    choices = _full_choices(segments, probe, choose, stop)
    accepted = 0
    matching = text.open_rows
    for column in range(min(text.confirmed[row] for row in matching), stop + 1):
        confirmed: dict[int, _Token] = {}
        right = []
        for row in matching:
            if text.confirmed[row] > column:
                right.append(row)
                continue
            token, draft = choices[row, column], drafts[row].pop(column, None)
            is_accepted = draft is not None and draft.token == token
            accepted += is_accepted
            # Later tokens of the row were computed after the token that is there now.
            if column == stop or int(text.ids[row, column]) == token:
                right.append(row)
            confirmed[row] = draft if draft is not None and is_accepted else _Token(token, last)
        text.add(column, confirmed)
        matching = [row for row in right if not text.ended[row]]
    return accepted


def _full_choices(
    segments: _DeferredSegments, probe: ForwardPass, choose: TokenChooser, stop: int
) -> dict[tuple[int, int], int]:
    """Return the full model's tokens since its last check, up to column stop."""
    text, start = segments.text, segments.done[-1]
    for index in range(len(segments.segments)):
        if segments.done[index] < stop:
            hidden = segments.run(index, stop, probe)
    columns = torch.arange(start + 1, stop + 1, device=text.ids.device)
    confirmed = torch.tensor(text.confirmed, device=text.ids.device)[:, None]
    # Processors that keep state need the logits of all rows, also of confirmed tokens.
    first = min(text.confirmed[row] for row in text.open_rows)
    wanted = columns >= (first if choose.processors.keeps_state else confirmed)
    outputs = wanted & text.row_mask(text.open_rows)
    found = _FoundLogits()
    decode_tokens(segments.layers.stack, hidden, outputs, segments.counts, found.add)
    absolute = [column + start + 1 for column in found.columns]
    tokens = found.choose(choose, text.ids, absolute)
    return dict(zip(zip(found.rows, absolute, strict=True), tokens, strict=True))
