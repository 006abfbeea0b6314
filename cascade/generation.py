"""Generation: one token after another, each leaving at an exit or going all the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade.errors import UsageError
from cascade.exits import flag, number, whole
from cascade.models import DecoderStack, Plan
from cascade.passes import Chunk, Exit, Pass, decode_tokens
from cascade.skipping import Counts, Selection, SkippingLayers

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

#: What `transformers` generates where nobody says how much.
_DEFAULT_NEW_TOKENS = 20

#: Settings of a draw; where nobody says anything, they are those of `transformers`.
_OF_A_DRAW = ("temperature", "top_p", "top_k")

#: Settings of a generation config that early exit follows.
_FOLLOWED = {
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "stop_strings",
}
#: Settings that say nothing of the tokens that come out, or only together with refused ones.
_HARMLESS = {
    "transformers_version",
    "use_cache",
    "return_dict_in_generate",
    "cache_implementation",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "length_penalty",
    "renormalize_logits",
}
#: Values, other than None, False, 0 and nothing, at which a setting changes nothing.
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
}


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
        max_new_tokens: The most tokens to add; None: up to `max_length` in all.
        max_length: Prompt and new tokens together; None: see `max_new_tokens`.
        do_sample: Draw tokens instead of taking the most likely one.
        temperature: Divides the logits before drawing.
        top_p: Draw among the most likely tokens that together reach this probability.
        top_k: Draw among so many; 0 for all.
        seed: Of the draws: the same seed draws the same tokens, alone or verified.
        eos_token_id: Tokens that end a row.
        pad_token_id: Fills rows that ended, and is padding in prompts without a mask; None: the
            first of `eos_token_id`, or 0, fills rows, and nothing is taken for padding.
        stop_strings: Texts that end a row; its tokens keep them.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, stack: DecoderStack, config: GenerationConfig | None, changes: Mapping[str, Any]
    ) -> Settings:
        """Read the model's own generation config, then a given one, then single settings.

        What one leaves open, those before it say, and at last `transformers` itself, which draws
        from the likeliest 50. A single setting of None turns off what any of them said.

        Raises:
            UsageError: A setting is unknown, unsupported or out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise UsageError(
                f"expected settings among {', '.join(sorted(known))}, got {', '.join(unknown)}"
            )
        from transformers import GenerationConfig as Config

        if config is not None and not isinstance(config, Config):
            raise UsageError(
                "expected generation_config a GenerationConfig of transformers, got "
                f"{type(config).__name__}; give single settings by name"
            )
        defaults = Config._get_default_generation_params()
        values: dict[str, Any] = {name: defaults[name] for name in _OF_A_DRAW}
        for one in (stack.model.generation_config, config):
            values |= {} if one is None else one.to_diff_dict()
        _check_supported(values)
        merged = {name: values[name] for name in known & values.keys()}
        if changes.get("max_new_tokens") is not None:
            merged.pop("max_length", None)
        merged |= changes
        merged = {name: value for name, value in merged.items() if value is not None}
        settings = cls(**_read(merged, stack.vocab_size - 1))
        if settings.stop_strings and stack.tokenizer is None:
            raise UsageError("stop_strings need the model's tokenizer; load the model with it")
        return settings

    @property
    def filling(self) -> int:
        """The token that fills rows that ended."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @property
    def padding(self) -> int | None:
        """The token that is padding in prompts without a mask; None where nothing is."""
        return padding_token(self.pad_token_id, self.eos_token_id)

    def new_tokens(self, prompt: int, limit: int | None) -> int:
        """Return how many tokens to add to a prompt.

        Args:
            prompt: Its length.
            limit: The model's positions.

        Raises:
            UsageError: They do not fit.
        """
        new = self.max_new_tokens
        if new is None and self.max_length is not None:
            new = self.max_length - prompt
            if new < 1:
                raise UsageError(
                    f"a prompt of {prompt} tokens leaves nothing of max_length {self.max_length}; "
                    "give max_new_tokens"
                )
        if new is None:
            left = _DEFAULT_NEW_TOKENS if limit is None else limit - prompt
            new = max(1, min(left, _DEFAULT_NEW_TOKENS))
        if limit is not None and prompt + new > limit:
            raise UsageError(
                f"a prompt of {prompt} tokens and {new} new ones exceed the model's {limit} "
                "positions; shorten the prompt or take a smaller max_new_tokens"
            )
        return new


def padding_token(pad: int | None, ends: int | Sequence[int] | None) -> int | None:
    """Return the token that `transformers` takes for padding where it is given no mask.

    Args:
        pad: The model's padding token.
        ends: The tokens that end a row: one that pads as well may be text.
    """
    return None if pad in _as_tuple(ends) else pad


def _check_supported(values: Mapping[str, Any]) -> None:
    from transformers import GenerationConfig

    # What transformers does not know itself, it does not follow either.
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    refused = sorted(
        name
        for name in known & values.keys() - _FOLLOWED - _HARMLESS
        if not _is_neutral(name, values[name])
    )
    if refused:
        raise UsageError(
            f"early exit does not follow the generation settings {', '.join(refused)}; "
            "give a generation_config that turns them off"
        )


def _is_neutral(name: str, value: Any) -> bool:
    if name.endswith("_token_id"):
        return False  # 0 is a token like any other
    return not value or value == _NEUTRAL.get(name)


def _read(given: Mapping[str, Any], last: int) -> dict[str, Any]:
    """Return settings as they are used, numbers as Python's own.

    Args:
        given: Settings, none of them None.
        last: The vocabulary's last token.

    Raises:
        UsageError: One of them cannot be.
    """
    # How to read a setting (None: it cannot be read), which values are good, and those in words.
    kinds: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool], str]] = {
        "max_new_tokens": (whole, lambda new: new >= 1, "a whole number from 1"),
        "max_length": (whole, lambda _: True, "a whole number"),
        "do_sample": (flag, lambda _: True, "True or False"),
        "temperature": (
            number,
            lambda value: value > 0,
            "more than 0 (do_sample=False for greedy)",
        ),
        "top_p": (number, lambda share: 0 < share <= 1, "in (0, 1]"),
        "top_k": (whole, lambda count: count >= 0, "a whole number from 0"),
        "seed": (whole, lambda _: True, "a whole number"),
        "eos_token_id": (
            lambda value: tuple(map(whole, _as_tuple(value))),
            lambda ends: all(end is not None and 0 <= end <= last for end in ends),
            f"a token in 0..{last}, or several",
        ),
        "pad_token_id": (whole, lambda pad: 0 <= pad <= last, f"in 0..{last}"),
        "stop_strings": (
            _as_tuple,
            lambda stops: all(isinstance(stop, str) and stop for stop in stops),
            "a text or several, none empty",
        ),
    }
    read = dict(given)
    for name, (reader, is_good, words) in kinds.items():
        if name not in given:
            continue
        read[name] = reader(given[name])
        if read[name] is None or not is_good(read[name]):
            raise UsageError(f"expected {name} {words}, got {given[name]!r}")
    return read


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


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
