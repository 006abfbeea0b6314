"""DecodingConfig: how to generate, with the defaults of `transformers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade.core.arguments import as_bool, as_float, as_int
from cascade.core.errors import UsageError
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from transformers import GenerationConfig

#: How many tokens `transformers` generates by default.
_DEFAULT_NEW_TOKENS = 20


#: Sampling settings whose defaults are those of `transformers`.
_SAMPLING = ("temperature", "top_p", "top_k")


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


#: Settings that do not change the tokens, or only together with refused ones.
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


#: Values at which a setting changes nothing, in addition to None, False, 0 and empty ones.
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
class DecodingConfig:
    """How to generate.

    Attributes:
        max_new_tokens: The most tokens to add; None: up to `max_length` in all.
        max_length: Prompt and new tokens together; None: see `max_new_tokens`.
        do_sample: Sample tokens instead of taking the most likely one.
        temperature: Divides the logits before sampling.
        top_p: Sample among the most likely tokens that together reach this probability.
        top_k: Sample among this many of the most likely tokens; 0 for all.
        seed: For sampling: the same seed gives the same tokens, verified or not.
        eos_token_id: Tokens that end a row.
        pad_token_id: Fills rows that ended, and is padding in prompts without a mask; None: the
            first of `eos_token_id`, or 0, fills rows, and no token is taken for padding.
        stop_strings: Texts that end a row; the row keeps them.
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
    ) -> DecodingConfig:
        """Read the model's own generation config, then a given one, then single settings.

        Later ones override earlier ones. Sampling settings that none of them has are those of
        `transformers`, which samples from the 50 most likely tokens. A single setting of None
        turns a setting off.

        Args:
            stack: The model.
            config: A generation config of `transformers`, or None.
            changes: Single settings by name.

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
        values: dict[str, Any] = {name: defaults[name] for name in _SAMPLING}
        for given in (stack.model.generation_config, config):
            values |= {} if given is None else given.to_diff_dict()
        check_supported(values)
        merged = {name: values[name] for name in known & values.keys()}
        if changes.get("max_new_tokens") is not None:
            merged.pop("max_length", None)
        merged |= changes
        merged = {name: value for name, value in merged.items() if value is not None}
        made = cls(**_read(merged, stack.vocab_size - 1))
        if made.stop_strings and stack.tokenizer is None:
            raise UsageError("stop_strings need the model's tokenizer; load the model with it")
        return made

    @property
    def filling(self) -> int:
        """The token that fills rows that ended."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @property
    def padding(self) -> int | None:
        """The token that is padding in prompts without a mask; None where no token is."""
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
    """Return the token that `transformers` takes for padding without a mask; None: no token.

    Args:
        pad: The model's padding token.
        ends: The tokens that end a row. A padding token among them may be text.
    """
    return None if pad in _as_tuple(ends) else pad


def check_supported(values: Mapping[str, Any]) -> None:
    """Refuse generation settings that are not supported."""
    from transformers import GenerationConfig

    # Settings that transformers does not know have no effect there either.
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
    """Return settings as they are used, with numbers as Python's own.

    Args:
        given: Settings, none of them None.
        last: The vocabulary's last token.

    Raises:
        UsageError: One of them is invalid.
    """
    # How to read a setting (None: it cannot be read), which values are valid, and a description.
    kinds: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool], str]] = {
        "max_new_tokens": (as_int, lambda new: new >= 1, "a whole number from 1"),
        "max_length": (as_int, lambda _: True, "a whole number"),
        "do_sample": (as_bool, lambda _: True, "True or False"),
        "temperature": (
            as_float,
            lambda value: value > 0,
            "more than 0 (do_sample=False for greedy)",
        ),
        "top_p": (as_float, lambda share: 0 < share <= 1, "in (0, 1]"),
        "top_k": (as_int, lambda count: count >= 0, "a whole number from 0"),
        "seed": (as_int, lambda _: True, "a whole number"),
        "eos_token_id": (
            lambda value: tuple(map(as_int, _as_tuple(value))),
            lambda ends: all(end is not None and 0 <= end <= last for end in ends),
            f"a token in 0..{last}, or several",
        ),
        "pad_token_id": (as_int, lambda pad: 0 <= pad <= last, f"in 0..{last}"),
        "stop_strings": (
            _as_tuple,
            lambda stops: all(isinstance(stop, str) and stop for stop in stops),
            "a text or several, none empty",
        ),
    }
    read = dict(given)
    for name, (reader, is_valid, words) in kinds.items():
        if name not in given:
            continue
        read[name] = reader(given[name])
        if read[name] is None or not is_valid(read[name]):
            raise UsageError(f"expected {name} {words}, got {given[name]!r}")
    return read


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)
