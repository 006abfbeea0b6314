"""Logits processors and stopping criteria, built by `generate` of `transformers` itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.decoding.forward import Chunk
from cascade.decoding.generation_settings import DecodingConfig
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
    from transformers.generation.stopping_criteria import StoppingCriteriaList

#: Processors of `transformers` whose result depends only on the tokens and logits of a call. Others
#: (SynthID watermarks, a user's own) may keep state from call to call.
_STATELESS = frozenset(
    {
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "WatermarkLogitsProcessor",
    }
)


@dataclass(frozen=True)
class CustomProcessing:
    """What a caller adds to the processors and criteria of the settings, as in `transformers`.

    Attributes:
        logits_processor: Change the logits `[B, V]` before a token is chosen.
        stopping_criteria: End rows.
        prefix_allowed_tokens_fn: Returns the tokens that may follow, from a row and its tokens.
    """

    logits_processor: Sequence[LogitsProcessor] = ()
    stopping_criteria: Sequence[StoppingCriteria] = ()
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None

    @classmethod
    def of(
        cls,
        logits_processor: Any,
        stopping_criteria: Any,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None,
    ) -> CustomProcessing:
        """Return the arguments of `generate`, checked.

        Raises:
            UsageError: The processors or criteria are not a list of callables.
        """
        return cls(
            _callables("logits_processor", logits_processor),
            _callables("stopping_criteria", stopping_criteria),
            prefix_allowed_tokens_fn,
        )

    @property
    def is_empty(self) -> bool:
        """Whether the caller adds nothing."""
        lists = self.logits_processor or self.stopping_criteria
        return not lists and self.prefix_allowed_tokens_fn is None


def _callables(name: str, given: Any) -> tuple[Any, ...]:
    if given is None:
        return ()
    if not isinstance(given, list | tuple) or not all(callable(entry) for entry in given):
        raise UsageError(
            f"expected {name} to be a list, as in transformers, got {type(given).__name__}; "
            "put it into a list"
        )
    return tuple(given)


@dataclass(frozen=True)
class Processing:
    """The processors and stopping criteria of one generation; both are empty without any.

    Attributes:
        processors: Change the logits `[B, V]` of the whole batch, given its tokens `[B, T]`.
        criteria: Say which rows end, given the tokens of the whole batch. Maximum lengths, end
            tokens and stop strings are checked elsewhere.
        names: The settings that created them, for error messages.
        custom: Whether the caller added any.
    """

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    names: Sequence[str] = field(default_factory=list)
    custom: bool = False

    @classmethod
    def given(cls, processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> Processing:
        """Return processors and criteria that `generate` of `transformers` has prepared."""
        return cls(processors, _checked_elsewhere(criteria, ()), custom=True)

    @classmethod
    def of(
        cls,
        stack: DecoderStack,
        prompt: Chunk,
        config: DecodingConfig,
        new_tokens: int,
        custom: CustomProcessing,
    ) -> Processing:
        """Return the processors and criteria that `generate` of `transformers` would use.

        `transformers` prepares them and passes them to the callable given as `custom_generate`,
        which is its public interface for other decoding loops.

        Args:
            stack: The model.
            prompt: The prompts, padded on the left.
            config: How to generate.
            new_tokens: The maximum number of new tokens.
            custom: What the caller adds.

        Raises:
            UsageError: A setting is invalid.
        """
        from transformers import LogitsProcessorList
        from transformers.generation.stopping_criteria import StoppingCriteriaList

        settings = config.processed_settings()
        if not settings and custom.is_empty:
            return cls(LogitsProcessorList(), StoppingCriteriaList())
        try:
            processors, criteria = _prepared_by_transformers(
                stack, prompt, config.transformers_settings(new_tokens), custom
            )
        except Warning:  # where warnings are errors
            raise
        except Exception as error:
            # The forward pass is not run, so only settings can be wrong.
            raise _rejected(settings, error) from error
        theirs = _checked_elsewhere(criteria, custom.stopping_criteria)
        return cls(processors, theirs, list(settings), custom=not custom.is_empty)


def _prepared_by_transformers(
    stack: DecoderStack, prompt: Chunk, settings: Mapping[str, Any], custom: CustomProcessing
) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
    from transformers import GenerationMixin, LogitsProcessorList
    from transformers.generation.stopping_criteria import StoppingCriteriaList

    def prepared(
        _: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        return logits_processor, stopping_criteria

    model: Any = stack.model
    made: tuple[LogitsProcessorList, StoppingCriteriaList] = GenerationMixin.generate(  # type: ignore[assignment]
        model,
        prompt.ids,
        attention_mask=prompt.valid.long(),
        logits_processor=LogitsProcessorList(custom.logits_processor),
        stopping_criteria=StoppingCriteriaList(custom.stopping_criteria),
        prefix_allowed_tokens_fn=custom.prefix_allowed_tokens_fn,
        custom_generate=prepared,
        **settings,
    )
    return made


def _rejected(settings: Iterable[str], error: Exception) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    named = ", ".join(settings) or "logits_processor, stopping_criteria"
    return UsageError(
        f"transformers rejects the generation settings {named}: {reason.rstrip('.')}; change them"
    )


def _checked_elsewhere(
    criteria: StoppingCriteriaList, custom: Sequence[StoppingCriteria]
) -> StoppingCriteriaList:
    """Return criteria without those for lengths and end tokens, which each row checks itself."""
    from transformers import EosTokenCriteria, MaxLengthCriteria

    own = (EosTokenCriteria, MaxLengthCriteria)
    kept = [at for at in criteria if type(at) not in own or any(at is given for given in custom)]
    return type(criteria)(kept)


class BatchProcessors:
    """Applies processors to the whole batch, as `transformers` does, also when drafts are undone.

    Processors that may keep state are called once per column and in order. With verification, a
    column can be computed several times. Each call then works on a copy with the state before that
    column.

    Args:
        processing: The processors.
        repeats: Whether columns are computed several times.

    Raises:
        UsageError: A processor must be copied and cannot be.
    """

    def __init__(self, processing: Processing, *, repeats: bool) -> None:
        self.processing = processing
        names = [type(processor).__name__ for processor in processing.processors]
        #: Whether calls need all open rows, in the order of columns.
        self.has_state = any(
            name not in _STATELESS or not type(processor).__module__.startswith("transformers.")
            for name, processor in zip(names, processing.processors, strict=True)
        )
        #: Whether states are kept for columns that are computed again.
        self.keeps_state = repeats and self.has_state
        self._before: dict[int, LogitsProcessorList] = {}
        if self.keeps_state:
            self._first = _copied(processing.processors)

    def __bool__(self) -> bool:
        return bool(self.processing.processors)

    def __call__(self, ids: Tensor, logits: Tensor, rows: Sequence[int], column: int) -> Tensor:
        """Return the processed logits of some rows, `[n, V]`.

        Args:
            ids: Token ids of the batch, `[B, capacity]`.
            logits: `[n, V]`.
            rows: The row of each of the logits.
            column: The column that is chosen next.

        Raises:
            UsageError: A setting is invalid, or no token is left to choose.
        """
        # Processors may hold one entry per row, so they need all rows of the batch.
        batch = logits.new_zeros((len(ids), logits.shape[1]))
        batch[list(rows)] = logits
        processors = self._at(column)
        try:
            scores = processors(ids[:, :column], batch)[list(rows)]  # type: ignore[arg-type]
        except Exception as error:
            if self.processing.custom:
                raise
            raise _rejected(self.processing.names, error) from error
        if not (scores.amax(dim=-1) > -torch.inf).all():
            named = [*self.processing.names, *["logits_processor"] * self.processing.custom]
            raise UsageError(
                f"the generation settings {', '.join(named)} leave no token to choose at column "
                f"{column}; relax them"
            )
        return scores

    def _at(self, column: int) -> LogitsProcessorList:
        """Return the processors for a column, in the state after all columns before it."""
        if not self.keeps_state:
            return self.processing.processors
        used = _copied(self._before.get(column, self._first))
        self._before = {at: state for at, state in self._before.items() if at <= column}
        self._before[column + 1] = used
        return used

    def confirm(self, column: int) -> None:
        """Forget the states before `column`, from which on tokens may still change."""
        self._before = {at: state for at, state in self._before.items() if at >= column}


def _copied(processors: LogitsProcessorList) -> LogitsProcessorList:
    try:
        return copy.deepcopy(processors)
    except Exception as error:
        raise UsageError(
            "verify=True copies logits processors to undo rejected drafts, but one of "
            f"{', '.join(type(at).__name__ for at in processors)} cannot be copied; set "
            "verify=False"
        ) from error
