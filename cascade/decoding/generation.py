"""Text generation with early exits, and verification of drafts by the full model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.core.float32_products import product_precision
from cascade.decoding.drafting.proposers import Drafting, Proposer
from cascade.decoding.engine.costs import pass_costs
from cascade.decoding.engine.passes import EnginePasses, GraphPasses, OwnPasses
from cascade.decoding.exit_support import exit_support
from cascade.decoding.forward import (
    Chunk,
    Exit,
    ForwardPass,
    OnLogits,
    PassConfig,
    decode_tokens,
    is_by_engine,
)
from cascade.decoding.generation_settings import DecodingConfig
from cascade.decoding.graph_pool import GraphPool, graphs_of
from cascade.decoding.graphed_forward import MOST_TOKENS, GraphedForward
from cascade.decoding.growing_text import Generation, GrowingText, Token
from cascade.decoding.kv_cache import Selection
from cascade.decoding.lossless import Passes, generate_lossless
from cascade.decoding.own_forward import OwnForward, generate_by_model
from cascade.decoding.processors import BatchProcessors, CustomProcessing, Processing
from cascade.decoding.sampling import TokenChooser
from cascade.decoding.selective_layers import LayerTask, SkippingLayers
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack, Plan

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


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


@dataclass(frozen=True)
class Verification:
    """How drafts are made and checked.

    Attributes:
        proposers: Guess tokens.
        draft_length: The maximum number of tokens drafted before the full model checks them.
        milliseconds: What a pass over 1, 2, ... tokens takes (default: measured on this machine).
    """

    proposers: Sequence[Proposer]
    draft_length: int
    milliseconds: Sequence[float] | None = None


def generate(
    layers: SkippingLayers,
    exits: ExitConfig,
    prompt: Chunk,
    config: DecodingConfig,
    *,
    verification: Verification | None,
    streamer: BaseStreamer | None,
    custom: CustomProcessing | None = None,
    processing: Processing | None = None,
) -> Generation:
    """Generate from checked arguments; see `EarlyExit.generate`.

    Args:
        layers: Computes the layers.
        exits: How tokens exit.
        prompt: The prompts, padded on the left.
        config: How to generate.
        verification: How drafts are made and checked; None without verification.
        streamer: Receives each confirmed token; needs a single row.
        custom: Logits processors and stopping criteria that the caller adds.
        processing: All of them, if they exist already.

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
    if processing is None:
        processing = Processing.of(stack, prompt, config, new, custom or CustomProcessing())
    processors = BatchProcessors(processing, repeats=verification is not None)
    capacity = prompt.ids.shape[1] + new
    text = GrowingText(stack, prompt, config, capacity, processing.criteria, streamer)
    choose = TokenChooser(config, processors)
    graphs = None if exits.exits else graphs_of(stack, layers.engine_kind)
    if graphs is None:
        return _generate(layers, exits, text, choose, verification)
    forward = _take_graphs(graphs, verification, text)
    if isinstance(forward, str):
        made = _generate(layers, exits, text, choose, verification)
        return replace(made, engine=f"{made.engine or 'model'} (no graphs: {forward})")
    try:
        return _generate_by_graphs(forward, text, choose, verification)
    finally:
        graphs.give_back(forward)


def _take_graphs(
    graphs: GraphPool, verification: Verification | None, text: GrowingText
) -> GraphedForward | str:
    """Return a forward for a text, or why there is none."""
    proposers = verification.proposers if verification is not None else ()
    if any(at.feature_layers for at in proposers):
        return "the drafter reads states"
    batch = len(text.ids)
    most = MOST_TOKENS if proposers and batch == 1 else 1
    return graphs.take(batch, text.capacity, most)


def _generate_by_graphs(
    forward: GraphedForward,
    text: GrowingText,
    choose: TokenChooser,
    verification: Verification | None,
) -> Generation:
    """Generate by passes of fixed size: a single row with drafts, several column by column."""
    stack = forward.stack
    if len(text.ids) > 1:
        forward.counts = Counts.of(stack.num_layers)
        return replace(generate_by_model(forward, text, choose), engine=forward.description)
    milliseconds: Sequence[float] = [1.0]
    if verification is not None and forward.shape.most > 1:
        milliseconds = verification.milliseconds or pass_costs(
            stack, forward.name, lambda _: GraphPasses(forward, [1.0])
        )
        milliseconds = milliseconds[: 1 + verification.draft_length]
    forward.counts = Counts.of(stack.num_layers)  # without the passes that were timed or compared
    passes = GraphPasses(forward, milliseconds)
    proposers = verification.proposers if verification is not None else ()
    drafting = Drafting(proposers, passes.milliseconds, trees=False)
    return generate_lossless(passes, drafting, text, choose)


def _generate(
    layers: SkippingLayers,
    exits: ExitConfig,
    text: GrowingText,
    choose: TokenChooser,
    verification: Verification | None,
) -> Generation:
    """Generate without graphs."""
    if not exits.exits:
        passes = _full_passes(layers, verification, text, choose)
        if passes is not None:
            # Processors read the tokens of a draft in their columns, so it has to be a chain.
            drafting = Drafting(
                verification.proposers if verification is not None else (),
                passes.milliseconds,
                trees=passes.trees and not choose.processors,
            )
            return generate_lossless(passes, drafting, text, choose)
        if OwnForward.supports(layers.stack):
            made = generate_by_model(OwnForward(layers.stack), text, choose)
            if verification is None:
                return made
            return replace(made, engine=f"model ({_why_no_engine(layers)})")
    if not exits.exact:
        return _generate_skipping(layers, exits, text, choose)
    segments = _DeferredSegments(layers, exits, text)
    if verification is None or not exits.exits:
        return _generate_exact(segments, text, choose)
    return _generate_verified(segments, text, choose, verification.draft_length)


def _full_passes(
    layers: SkippingLayers,
    verification: Verification | None,
    text: GrowingText,
    choose: TokenChooser,
) -> Passes | None:
    """Return passes over rows of different lengths, or None where rows must stay together."""
    stack, batch, engine = layers.stack, len(text.ids), layers.engine
    # Callers' criteria and processors with a state expect all rows to have the same length.
    if batch > 1 and (text.criteria or choose.processors.has_state):
        return None
    proposers = verification.proposers if verification is not None else ()
    features = sorted({layer for at in proposers for layer in at.feature_layers})
    make: Callable[[int, int, Sequence[float]], Passes]
    if engine is not None and engine.is_ready():
        what = engine.description
        make = functools.partial(EnginePasses, engine, feature_layers=features)
    elif batch == 1 and proposers and _can_check_chunks(stack):
        what, reason = "model", _why_no_engine(layers)
        make = functools.partial(OwnPasses, stack, feature_layers=features, reason=reason)
    else:
        return None
    milliseconds: Sequence[float] = [1.0]
    if verification is not None and proposers:
        milliseconds = verification.milliseconds or pass_costs(
            stack, what, lambda capacity: make(1, capacity, [1.0])
        )
        milliseconds = milliseconds[: batch + verification.draft_length]
    return make(batch, text.capacity, milliseconds)


def _can_check_chunks(stack: DecoderStack) -> bool:
    """Return whether the model's own modules compute a chunk as they compute single tokens."""
    support = exit_support(stack)
    # In half precision, and where products are rounded, a chunk is rounded in another way.
    return (
        stack.dtype == torch.float32
        and product_precision(stack.device) is None
        and support.exact_obstacle is None
    )


def _why_no_engine(layers: SkippingLayers) -> str:
    if layers.engine is None:
        return layers.reason or "it keeps other things than keys and values"
    if not layers.engine.has_same_weights():
        return "its weights were replaced"
    if layers.engine.obstacle is not None:
        return layers.engine.obstacle
    if layers.engine.products is not None:
        return f"its products are rounded to {layers.engine.products}"
    if layers.engine.is_ready():
        return "a criterion or processor of the caller needs rows of equal length"
    return "its layers have hooks"


def _generate_skipping(
    layers: SkippingLayers, exits: ExitConfig, text: GrowingText, choose: TokenChooser
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

    def choose_column(self, choose: TokenChooser, ids: Tensor, column: int) -> dict[int, Token]:
        """Return the token of each row, if all of them will have the same column."""
        tokens = self.choose(choose, ids, [column] * len(self.rows))
        found = zip(self.rows, tokens, self.layers, strict=True)
        return {row: Token(token, layer) for row, token, layer in found}


class _DeferredSegments:
    """The segments of layers between exits, each computed only once a token needs it.

    If a token exits, the segments above its exit are deferred, and its state waits below them. When
    a later token continues, those segments compute all waiting states together with it. Keys and
    values are therefore the full model's.
    """

    def __init__(self, layers: SkippingLayers, exits: ExitConfig, text: GrowingText) -> None:
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
        #: Whether the engine computed the last segment.
        self.by_engine = False

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
        self.by_engine = is_by_engine(plan)
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


def _generate_exact(
    segments: _DeferredSegments, text: GrowingText, choose: TokenChooser
) -> Generation:
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
    decode_tokens(
        segments.layers,
        last,
        probe.undecided,
        segments.counts,
        on_logits,
        by_engine=segments.by_engine,
    )


def _generate_verified(
    segments: _DeferredSegments, text: GrowingText, choose: TokenChooser, draft_length: int
) -> Generation:
    """Generate the full model's text: exits draft tokens, and the full model confirms them.

    All rows advance column by column together. A wrong draft in one row therefore moves all rows
    back to its column. Confirmed tokens of the other rows are then computed again, but do not
    change.
    """
    drafts: list[dict[int, Token]] = [{} for _ in text.ended]  # by row, then by column
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
    drafts: list[dict[int, Token]],
    stop: int,
) -> int:
    """Let the full model choose all tokens since its last check; return the number it confirms."""
    text, last = segments.text, segments.layers.stack.num_layers
    choices = _full_choices(segments, probe, choose, stop)
    accepted = 0
    matching = text.open_rows
    for column in range(min(text.confirmed[row] for row in matching), stop + 1):
        confirmed: dict[int, Token] = {}
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
            confirmed[row] = draft if draft is not None and is_accepted else Token(token, last)
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
    decode_tokens(
        segments.layers,
        hidden,
        outputs,
        segments.counts,
        found.add,
        by_engine=segments.by_engine,
    )
    absolute = [column + start + 1 for column in found.columns]
    tokens = found.choose(choose, text.ids, absolute)
    return dict(zip(zip(found.rows, absolute, strict=True), tokens, strict=True))
