"""`decode`: lossless decoding as a `custom_generate` of `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.decoding.drafting.proposers import Proposer
from cascade.decoding.early_exit import EarlyExit, verification_of
from cascade.decoding.engine.engine import EngineKind
from cascade.decoding.forward import Chunk
from cascade.decoding.generation import ExitConfig, Verification, generate
from cascade.decoding.generation_settings import DecodingConfig
from cascade.decoding.growing_text import Generation
from cascade.decoding.inputs import make_chunk
from cascade.decoding.processors import Processing
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
    from transformers.generation.stopping_criteria import StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

#: Arguments that `generate` passes on and that are read here or change no tokens. Others change
#: what the model computes.
_KNOWN = {
    "attention_mask",
    "cache_position",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "use_cache",
}


def decode(
    stack: DecoderStack,
    *,
    drafter: Proposer | Sequence[Proposer] | None = None,
    draft_length: int = 8,
    engine: EngineKind = "auto",
    pass_costs: Sequence[float] | None = None,
    streamer: BaseStreamer | None = None,
) -> Decoder:
    """Return a function for the argument `custom_generate` of `generate` of `transformers`.

    The model then generates the same tokens with fewer passes and faster ones; its own generation
    config, logits processors and stopping criteria apply. Random choices follow
    `torch.manual_seed`, but are others than those of `transformers` with the same seed.

    `generate` does not pass on its arguments `streamer`, `tokenizer` and `assistant_model` to other
    functions. Give the streamer to `decode`, and stop strings as a `StopStringCriteria` among the
    stopping criteria.

    Args:
        stack: The model whose `generate` is called.
        drafter: What drafts tokens in addition to lookup and runner-ups.
        draft_length: The maximum number of tokens drafted before the model checks them.
        engine: What computes passes over a few tokens; see `EarlyExit`.
        pass_costs: The milliseconds of a pass over 1, 2, ... tokens (default: measured).
        streamer: Receives the prompt and each token as soon as it is final.

    Raises:
        UsageError: An argument is invalid.

    Example:
        >>> from cascade import decode, load
        >>> stack = load("smollm2-135m")
        >>> ids = stack.tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> fast = decode(stack)
        >>> made = stack.model.generate(ids, custom_generate=fast, max_new_tokens=4)
        >>> made.shape
        torch.Size([1, 9])
        >>> fast.last.passes <= 3
        True
    """
    early = EarlyExit(stack, engine=engine)

    def verification() -> Verification:
        return verification_of(stack, drafter, draft_length, pass_costs)

    verification()  # checks the arguments
    return Decoder(early, verification, streamer)


class Decoder:
    """Generates for `transformers`; see `decode`.

    Attributes:
        last: The last generation, with its counts; None before the first.
    """

    def __init__(
        self,
        early: EarlyExit,
        verification: Callable[[], Verification],
        streamer: BaseStreamer | None,
    ) -> None:
        self._early, self._streamer = early, streamer
        #: Proposers remember the text of each row, so each generation has its own.
        self._verification = verification
        self.last: Generation | None = None

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """Generate; the arguments are those that `generate` of `transformers` passes.

        Raises:
            UsageError: The model is another one, or an argument is not supported.
        """
        stack = self._early.stack
        if model is not stack.model:
            raise UsageError(
                "expected the model that was given to cascade.decode, got another one; call "
                "decode with this model's stack"
            )
        used = sorted(name for name in kwargs.keys() - _KNOWN if kwargs[name] is not None)
        if used:
            raise UsageError(f"cascade.decode does not support {', '.join(used)}; leave it out")
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise UsageError(
                "cascade.decode begins with an empty KV cache, got past_key_values with"
                f" {cache.get_seq_length()} tokens; leave them out"
            )
        # The logits processors that these settings stand for are given.
        seed = int(torch.randint(2**31, ()).item()) if generation_config.do_sample else 0
        ends = generation_config.eos_token_id
        changes = {"seed": seed, "stop_strings": None, "eos_token_id": () if ends is None else ends}
        config = DecodingConfig.of(stack, generation_config, changes)
        prompt = make_chunk(stack, input_ids, kwargs.get("attention_mask"), padding=config.padding)
        _check_positions(kwargs.get("position_ids"), prompt)
        made = generate(
            self._early.layers,
            ExitConfig((), exact=True, seed=0),
            prompt,
            config,
            processing=Processing.given(logits_processor, stopping_criteria),
            verification=self._verification(),
            streamer=self._streamer,
        )
        self.last = made
        if not generation_config.return_dict_in_generate:
            return made.sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=made.sequences)  # type: ignore[arg-type]


def _check_positions(positions: Tensor | None, prompt: Chunk) -> None:
    """Check that a prompt has the positions that its attention mask gives."""
    if positions is None:
        return
    found = positions[..., -prompt.ids.shape[1] :].expand_as(prompt.ids)
    if not torch.equal(found[prompt.valid], prompt.positions[prompt.valid]):
        raise UsageError(
            "cascade.decode counts positions from the first token of each row, got other "
            "position_ids; leave them out"
        )
