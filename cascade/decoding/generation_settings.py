"""DecodingConfig: how to generate, with the defaults of `transformers`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from cascade.core.arguments import as_bool, as_float, as_int
from cascade.core.errors import UsageError, first_line
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from transformers import GenerationConfig

#: The number of tokens that `transformers` generates by default.
_DEFAULT_NEW_TOKENS = 20


#: Sampling settings whose defaults are those of `transformers`.
_SAMPLING = ("temperature", "top_p", "top_k")


#: Settings that `transformers` follows only if it samples.
_ONLY_SAMPLING = {
    *_SAMPLING,
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
}


#: Settings that end rows or name tokens; they do not change which token is the likeliest.
_ENDS = {
    "max_new_tokens",
    "max_length",
    "eos_token_id",
    "pad_token_id",
}


#: Settings that become logits processors or stopping criteria of `transformers`.
_PROCESSED = _ONLY_SAMPLING | {
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "exponential_decay_length_penalty",
    "remove_invalid_values",
    "renormalize_logits",
    "watermarking_config",
    "max_time",
}


#: Settings that do not change the tokens, or only together with unsupported settings.
_HARMLESS = {
    "transformers_version",
    "bos_token_id",
    "use_cache",
    "return_dict_in_generate",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "prefill_chunk_size",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "is_assistant",
    "low_memory",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "target_lookbehind",
    "max_matching_ngram_size",
    "speculation_type",
}


#: Values that leave a setting without effect: None for those that 0 and empty values turn on; of
#: other settings, those without effect are None, False, 0 and empty values.
_NEUTRAL: dict[str, float | None] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "top_p": 1.0,
    "temperature": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "top_h": None,
    "max_time": None,
    "watermarking_config": None,
}


@dataclass(frozen=True)
class DecodingConfig:
    """How to generate.

    Attributes:
        max_new_tokens: The maximum number of new tokens; None: `max_length` is the limit.
        max_length: The maximum number of tokens including the prompt; None: see `max_new_tokens`.
        do_sample: Sample tokens instead of taking the most likely one.
        temperature: Divides the logits before sampling.
        top_p: Sample among the most likely tokens that together reach this probability.
        top_k: Sample among this many of the most likely tokens; 0 for all.
        seed: Seed of the sampling. The same seed gives the same tokens, with and without
            verification.
        eos_token_id: Tokens that end a row.
        pad_token_id: Fills rows that ended, and is treated as padding in prompts without a mask.
            None: the first of `eos_token_id`, or 0, fills rows, and no token is padding.
        stop_strings: Texts that end a row; they are kept in the row.
        others: Other settings with an effect, by name: `repetition_penalty`, `bad_words_ids`, ...
            Logits processors and stopping criteria of `transformers` follow them.
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
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, stack: DecoderStack, config: GenerationConfig | None, changes: Mapping[str, Any]
    ) -> DecodingConfig:
        """Return the settings of the model's generation config, overridden by those given.

        `config` overrides the model's generation config, and `changes` override both. Sampling
        defaults are those of `transformers`, which samples from the 50 most likely tokens
        (top_k=50). In `changes`, None turns a setting off.

        Args:
            stack: The model.
            config: A generation config of `transformers`, or None.
            changes: Single settings by name.

        Raises:
            UsageError: A setting is unknown, unsupported or out of range.
        """
        from transformers import GenerationConfig as Config

        names = _names_of_transformers()
        unknown = sorted(set(changes) - names - {"seed"})
        if unknown:
            raise UsageError(
                "expected settings of a GenerationConfig of transformers, or seed, got "
                f"{', '.join(unknown)}; correct the names"
            )
        if config is not None and not isinstance(config, Config):
            raise UsageError(
                "expected a GenerationConfig of transformers as generation_config, got "
                f"{type(config).__name__}; pass single settings by name"
            )
        defaults = Config._get_default_generation_params()
        values: dict[str, Any] = {name: defaults[name] for name in _SAMPLING}
        for given in (stack.model.generation_config, config):
            values |= {} if given is None else _values_of(given)
        if changes.get("max_new_tokens") is not None:
            values.pop("max_length", None)
        values |= changes
        values = {name: value for name, value in values.items() if value is not None}
        check_supported(values)
        own = {entry.name for entry in fields(cls)} & values.keys()
        read = _read({name: values[name] for name in own}, stack.vocab_size - 1)
        made = cls(**read, others=_others(values, do_sample=read.get("do_sample", False)))
        if made.stop_strings and stack.tokenizer is None:
            raise UsageError(
                "stop_strings need a tokenizer, and the model has none; load the model with one"
            )
        return made

    def used_settings(self) -> dict[str, Any]:
        """Return the settings that affect the tokens, by name; for records."""
        shown: dict[str, Any] = {"do_sample": self.do_sample}
        if self.do_sample:
            shown |= {name: getattr(self, name) for name in (*_SAMPLING, "seed")}
        for name in ("eos_token_id", "stop_strings"):
            if getattr(self, name):
                shown[name] = list(getattr(self, name))
        return shown | dict(sorted(self.others.items()))

    def processed_settings(self) -> dict[str, Any]:
        """Return the settings that need logits processors or stopping criteria, by name."""
        sampling = {name: getattr(self, name) for name in _SAMPLING} if self.do_sample else {}
        effective = {
            name: value for name, value in sampling.items() if not _is_neutral(name, value)
        }
        return effective | dict(self.others)

    def transformers_settings(self, new_tokens: int) -> dict[str, Any]:
        """Return arguments with which `generate` of `transformers` prepares the same processing.

        They override every setting of the model's own generation config.

        Args:
            new_tokens: The maximum number of new tokens.
        """
        off = {name: _NEUTRAL.get(name) for name in _names_of_transformers() - _HARMLESS}
        return (
            off
            | self.processed_settings()
            | {
                "do_sample": self.do_sample,
                "max_new_tokens": new_tokens,
                "eos_token_id": list(self.eos_token_id) or None,
                "pad_token_id": self.filling,
                # No cache is prepared.
                "use_cache": False,
                "cache_implementation": None,
                "max_cache_len": None,
            }
        )

    @property
    def filling(self) -> int:
        """The token that fills rows that ended."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @property
    def padding(self) -> int | None:
        """The token that is padding in prompts without a mask, or None if no token is."""
        return padding_token(self.pad_token_id, self.eos_token_id)

    def new_tokens(self, prompt: int, limit: int | None) -> int:
        """Return the number of tokens to generate after a prompt.

        Args:
            prompt: The length of the prompt in tokens.
            limit: The model's positions, or None.

        Raises:
            UsageError: The prompt and the new tokens do not fit.
        """
        new = self.max_new_tokens
        if new is None and self.max_length is not None:
            new = self.max_length - prompt
            if new < 1:
                raise UsageError(
                    f"expected a prompt shorter than max_length {self.max_length}, got {prompt} "
                    "tokens; set max_new_tokens instead"
                )
        if new is None:
            left = _DEFAULT_NEW_TOKENS if limit is None else limit - prompt
            new = max(1, min(left, _DEFAULT_NEW_TOKENS))
        if limit is not None and prompt + new > limit:
            raise UsageError(
                f"a prompt of {prompt} tokens and {new} new tokens exceed the model's {limit} "
                "positions; shorten the prompt or use a smaller max_new_tokens"
            )
        return new


def padding_token(pad: int | None, ends: int | Sequence[int] | None) -> int | None:
    """Return the token that `transformers` treats as padding without a mask, or None.

    Args:
        pad: The padding token, or None.
        ends: The tokens that end a row. A padding token that is one of them may be text.
    """
    return None if pad in _as_tuple(ends) else pad


def check_supported(values: Mapping[str, Any]) -> None:
    """Check that generation settings are supported.

    Args:
        values: Settings by name.

    Raises:
        UsageError: A setting is not supported.
    """
    supported = {entry.name for entry in fields(DecodingConfig)} | _PROCESSED | _HARMLESS
    # Settings that transformers does not know have no effect there either.
    unsupported = sorted(
        name
        for name in _names_of_transformers() & values.keys() - supported
        if not _is_neutral(name, values[name])
    )
    if unsupported:
        off = ", ".join(f"{name}={_NEUTRAL.get(name, 0):g}" for name in unsupported)
        raise UsageError(
            f"early exit does not support the generation settings {', '.join(unsupported)}; turn "
            f"them off with {off} (on the command line, each after --generation-config)"
        )


def plain_settings(config: GenerationConfig) -> dict[str, Any]:
    """Return arguments that turn off what a generation config adds to greedy decoding.

    Args:
        config: The model's generation config.

    Returns:
        Arguments for `generate`, by name; empty if the config adds nothing.
    """
    known = _names_of_transformers() - _HARMLESS - _ENDS
    return {
        name: _NEUTRAL.get(name)
        for name, value in _values_of(config).items()
        if name in known and not _is_neutral(name, value)
    }


@functools.cache
def _names_of_transformers() -> frozenset[str]:
    from transformers import GenerationConfig

    return frozenset(name for name in GenerationConfig().to_dict() if not name.startswith("_"))


def _values_of(config: GenerationConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults, with objects (watermarks) as they are."""
    return {
        name: getattr(config, name, value)
        for name, value in config.to_diff_dict().items()
        if not name.startswith("_")
    }


def _others(values: Mapping[str, Any], *, do_sample: bool) -> dict[str, Any]:
    """Return the settings with an effect that only processors and criteria follow."""
    from transformers import GenerationConfig

    names = _PROCESSED - set(_SAMPLING) - (set() if do_sample else _ONLY_SAMPLING)
    defaults = GenerationConfig._get_default_generation_params()
    found = {}
    for name in names & values.keys():
        value = values[name]
        if _is_neutral(name, value):
            continue
        if name == "watermarking_config":
            value = _watermark(value)
        # transformers refuses the penalty 2 and takes 2.0.
        elif isinstance(defaults.get(name), float) or name in ("min_p", "top_h", "max_time"):
            number = as_float(value)
            if number is None:
                raise UsageError(f"expected {name} to be a number, got {value!r}")
            value = number
        found[name] = value
    return found


def _watermark(value: Any) -> Any:
    """Return the configuration of a watermark; from JSON, it is a dictionary."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig(watermarking_config=value).watermarking_config
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"expected watermarking_config to be what WatermarkingConfig of transformers takes, "
            f"got {value!r} ({first_line(error)}); correct it"
        ) from error


def _is_neutral(name: str, value: Any) -> bool:
    if name.endswith("_token_id"):
        return value is None  # 0 is a valid token
    if name in _NEUTRAL:
        return value is None or value == _NEUTRAL[name]
    return not value


def _read(given: Mapping[str, Any], last: int) -> dict[str, Any]:
    """Return checked settings, with NumPy numbers converted to Python numbers.

    Args:
        given: Settings, none of them None.
        last: The last token of the vocabulary.

    Raises:
        UsageError: A setting is invalid.
    """
    # For each setting: a function that reads it (None if invalid), a check and a description.
    kinds: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool], str]] = {
        "max_new_tokens": (as_int, lambda new: new >= 1, "to be an integer of at least 1"),
        "max_length": (as_int, lambda _: True, "to be an integer"),
        "do_sample": (as_bool, lambda _: True, "to be True or False"),
        "temperature": (
            as_float,
            lambda value: value > 0,
            "to be above 0 (do_sample=False for greedy)",
        ),
        "top_p": (as_float, lambda share: 0 < share <= 1, "to be in (0, 1]"),
        "top_k": (as_int, lambda count: count >= 0, "to be an integer of at least 0"),
        "seed": (as_int, lambda _: True, "to be an integer"),
        "eos_token_id": (
            lambda value: tuple(map(as_int, _as_tuple(value))),
            lambda ends: all(end is not None and 0 <= end <= last for end in ends),
            f"to be one or several tokens in 0..{last}",
        ),
        "pad_token_id": (as_int, lambda pad: 0 <= pad <= last, f"to be in 0..{last}"),
        "stop_strings": (
            _as_tuple,
            lambda stops: all(isinstance(stop, str) and stop for stop in stops),
            "to be one or several non-empty strings",
        ),
    }
    read = dict(given)
    for name, (reader, is_valid, description) in kinds.items():
        if name not in given:
            continue
        read[name] = reader(given[name])
        if read[name] is None or not is_valid(read[name]):
            raise UsageError(f"expected {name} {description}, got {given[name]!r}")
    return read


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)
