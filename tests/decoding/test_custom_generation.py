"""`generate` of transformers with cascade.decode gives the same as without it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.engines import BEST
from support.tiny_models import random_ids, tiny_model, tiny_tokenizer
from tokenizers import decoders
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

import cascade
from cascade.core.errors import UsageError
from cascade.decoding.custom_generation import Decoder
from cascade.models.stack import DecoderStack

FREE = [1.0] * 16

GREEDY = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0, "eos_token_id": None}


def stack_of(family: str = "llama", **changes: Any) -> DecoderStack:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # a character per token, no spaces
    return DecoderStack(tiny_model(family, **changes), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return stack_of()


@pytest.fixture
def fast(stack: DecoderStack) -> Decoder:
    return cascade.decode(stack, pass_costs=FREE)


def plain(stack: DecoderStack, ids: Tensor | None, **settings: Any) -> Any:
    model: Any = stack.model
    settings = GREEDY | settings
    if ids is not None and "attention_mask" not in settings:
        settings["attention_mask"] = torch.ones_like(ids)
    return model.generate(ids, **settings)


def repeating(length: int = 12) -> Tensor:
    """Return a prompt that repeats itself, so that lookup drafts."""
    return random_ids(1, 4).repeat(1, length // 4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2", "gemma2"])
def test_greedy_text_is_that_of_generate(family: str) -> None:
    stack = stack_of(family)
    fast = cascade.decode(stack, pass_costs=FREE)
    for ids in (repeating(), random_ids(1, 7), random_ids(1, 1)):
        expected = plain(stack, ids)
        assert torch.equal(plain(stack, ids, custom_generate=fast), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 9]]},
        {"min_new_tokens": 6, "eos_token_id": 11},
        {"suppress_tokens": [3, 4, 5]},
        {"forced_eos_token_id": 8},
        {"max_new_tokens": 1},
        {"max_new_tokens": None, "max_length": 17},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 11},
        {"renormalize_logits": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_are_followed(
    settings: dict[str, Any], stack: DecoderStack, fast: Decoder
) -> None:
    ids = repeating()
    expected = plain(stack, ids, **settings)
    assert torch.equal(plain(stack, ids, custom_generate=fast, **settings), expected)


@pytest.mark.parametrize("batch", [1, 4])
def test_text_ends_at_an_end_token(batch: int, stack: DecoderStack, fast: Decoder) -> None:
    ids = random_ids(batch, 9, seed=2)
    end = int(plain(stack, ids)[0, 9 + 4])
    assert end not in plain(stack, ids)[0, 9 : 9 + 4]
    for ends in (end, [end, 3]):
        expected = plain(stack, ids, eos_token_id=ends)
        assert torch.equal(plain(stack, ids, custom_generate=fast, eos_token_id=ends), expected)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_text_ends_at_a_stop_string(length: int, stack: DecoderStack, fast: Decoder) -> None:
    ids = repeating()
    tokenizer: Any = stack.tokenizer
    text = plain(stack, ids)[0].tolist()
    stop = tokenizer.decode(text[16 : 16 + length])
    expected = plain(stack, ids, stop_strings=[stop], tokenizer=tokenizer)
    # transformers does not pass on the tokenizer.
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    assert expected.shape[1] < len(text)
    made = plain(stack, ids, custom_generate=fast, stopping_criteria=criteria)
    assert torch.equal(made, expected)


class Pieces(BaseStreamer):
    """Keeps what it receives."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.received.append(value.flatten().tolist())

    def end(self) -> None:
        self.received.append("end")


def test_streamer_receives_the_same_pieces(stack: DecoderStack) -> None:
    ids, expected, received = repeating(), Pieces(), Pieces()
    plain(stack, ids, streamer=expected)
    fast = cascade.decode(stack, pass_costs=FREE, streamer=received)
    plain(stack, ids, custom_generate=fast)
    assert fast.last is not None
    assert fast.last.accepted > 0
    assert received.received == expected.received


def test_streamer_receives_the_end_token(stack: DecoderStack) -> None:
    ids, expected, received = random_ids(1, 9, seed=2), Pieces(), Pieces()
    end = int(plain(stack, ids)[0, 9 + 4])
    plain(stack, ids, streamer=expected, eos_token_id=end)
    assert len(expected.received) == 1 + 5 + 1  # prompt, tokens and end
    fast = cascade.decode(stack, pass_costs=FREE, streamer=received)
    plain(stack, ids, eos_token_id=end, custom_generate=fast)
    assert received.received == expected.received


def test_several_rows_cannot_be_streamed(stack: DecoderStack) -> None:
    fast = cascade.decode(stack, pass_costs=FREE, streamer=Pieces())
    with pytest.raises(UsageError, match="expected one row with a streamer, got 2"):
        plain(stack, random_ids(2, 5), custom_generate=fast)


class OddOnly(LogitsProcessor):
    """Bans even tokens in even columns."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] % 2:
            return scores
        scores = scores.clone()
        scores[:, ::2] = -float("inf")
        return scores


class EndsBehind(StoppingCriteria):
    """Ends rows whose last tokens have a sum that is divisible by seven."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ended: Tensor = input_ids[:, -3:].sum(dim=1) % 7 == 0
        return ended


@pytest.mark.parametrize("batch", [1, 3])
def test_custom_processors_and_criteria_apply(
    batch: int, stack: DecoderStack, fast: Decoder
) -> None:
    for seed in range(4):
        ids = random_ids(batch, 8, seed=seed)
        for settings in (
            {"logits_processor": LogitsProcessorList([OddOnly()])},
            {"stopping_criteria": StoppingCriteriaList([EndsBehind()])},
            {
                "logits_processor": LogitsProcessorList([OddOnly()]),
                "stopping_criteria": StoppingCriteriaList([EndsBehind()]),
            },
            {"prefix_allowed_tokens_fn": lambda row, text: [3, 4, 5 + row, len(text)]},
        ):
            # Without an end token, transformers continues rows that a criterion has ended.
            settings = settings | {"eos_token_id": 0}
            expected = plain(stack, ids, **settings)
            assert torch.equal(plain(stack, ids, custom_generate=fast, **settings), expected)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.2}], ids=["plain", "penalty"])
@pytest.mark.parametrize("batch", [2, 5])
def test_batch_with_left_padding(
    batch: int, settings: dict[str, Any], stack: DecoderStack, fast: Decoder
) -> None:
    ids = random_ids(batch, 8).repeat(1, 2)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    settings = settings | {"attention_mask": mask}
    expected = plain(stack, ids, **settings)
    assert torch.equal(plain(stack, ids, custom_generate=fast, **settings), expected)
    assert fast.last is not None
    assert fast.last.accepted > 0  # drafts were used


def test_dictionary_is_returned_on_request(stack: DecoderStack, fast: Decoder) -> None:
    ids = repeating()
    expected = plain(stack, ids, return_dict_in_generate=True)
    made = plain(stack, ids, return_dict_in_generate=True, custom_generate=fast)
    assert type(made) is type(expected)
    assert torch.equal(made.sequences, expected.sequences)


@pytest.mark.parametrize("batch", [1, 3])
def test_sampling_follows_the_seed_of_torch(batch: int, stack: DecoderStack, fast: Decoder) -> None:
    ids = random_ids(batch, 8)

    def sampled(seed: int) -> Tensor:
        torch.manual_seed(seed)
        settings = {"do_sample": True, "temperature": 2.0, "top_k": 0}
        made: Tensor = plain(stack, ids, custom_generate=fast, **settings)
        return made

    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))
    torch.manual_seed(1)
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 0}
    first = plain(stack, ids, custom_generate=fast, **settings)
    second = plain(stack, ids, custom_generate=fast, **settings)
    assert not torch.equal(first, second), "each call draws other numbers"


def test_sampling_settings_apply(stack: DecoderStack, fast: Decoder) -> None:
    ids = repeating()
    greedy = plain(stack, ids)
    torch.manual_seed(0)
    settings = {"do_sample": True, "top_k": 1}
    assert torch.equal(plain(stack, ids, custom_generate=fast, **settings), greedy)


def test_model_config_applies(stack: DecoderStack) -> None:
    own = stack_of()
    config: Any = own.model.generation_config
    config.repetition_penalty, config.max_new_tokens, config.do_sample = 1.5, 11, False
    config.eos_token_id, config.pad_token_id = None, 0
    model: Any = own.model
    ids = repeating()
    expected = model.generate(ids)
    made = model.generate(ids, custom_generate=cascade.decode(own, pass_costs=FREE))
    assert torch.equal(made, expected)
    assert expected.shape[1] == 12 + 11


def test_text_up_to_the_last_position(stack: DecoderStack, fast: Decoder) -> None:
    limit = stack.max_positions
    assert limit is not None
    ids = random_ids(1, limit - 6)
    expected = plain(stack, ids, max_new_tokens=6)
    assert torch.equal(plain(stack, ids, custom_generate=fast, max_new_tokens=6), expected)


def test_counts_of_the_last_generation_are_kept(stack: DecoderStack, fast: Decoder) -> None:
    assert fast.last is None
    made = plain(stack, repeating(), custom_generate=fast)
    last = fast.last
    assert last is not None
    assert torch.equal(last.sequences, made)
    assert last.exit_layers.shape == (1, 16)
    assert 0 < last.passes <= 15
    assert 0 <= last.accepted <= last.drafted
    assert last.passes + last.accepted == 15  # the first token comes with the prompt
    assert last.sources is not None
    assert int((last.sources > 0).sum()) == last.accepted
    assert last.proposers == ("n-gram", "runner-ups")
    assert last.engine.startswith(BEST)


def test_empty_cache_is_accepted(stack: DecoderStack, fast: Decoder) -> None:
    ids = repeating()
    expected = plain(stack, ids)
    cache = DynamicCache(config=stack.model.config)
    assert torch.equal(plain(stack, ids, custom_generate=fast, past_key_values=cache), expected)


def test_assistant_changes_nothing(stack: DecoderStack, fast: Decoder) -> None:
    # transformers does not pass it on.
    ids, assistant = repeating(), tiny_model("llama", num_layers=2)
    made = plain(stack, ids, custom_generate=fast, assistant_model=assistant)
    assert torch.equal(made, plain(stack, ids))


def test_usual_positions_are_accepted(stack: DecoderStack, fast: Decoder) -> None:
    ids = repeating()
    positions = torch.arange(ids.shape[1])[None]
    made = plain(stack, ids, custom_generate=fast, position_ids=positions)
    assert torch.equal(made, plain(stack, ids))


def test_threads_share_a_decoder(stack: DecoderStack, fast: Decoder) -> None:
    prompts = [random_ids(1, 4, seed=seed).repeat(1, 3) for seed in range(4)]
    expected = [plain(stack, ids) for ids in prompts]
    made: dict[int, list[Tensor]] = {}

    def generate(number: int) -> None:
        made[number] = [
            plain(stack, prompts[number], custom_generate=fast, max_new_tokens=16) for _ in range(6)
        ]

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert len(made[number]) == 6
        assert all(torch.equal(text, expected[number]) for text in made[number])


# --- Refusals -------------------------------------------------------------------------------


def filled_cache(stack: DecoderStack) -> DynamicCache:
    model: Any = stack.model
    cache: DynamicCache = model(random_ids(1, 5), use_cache=True).past_key_values
    return cache


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"num_beams": 3, "num_return_sequences": 2}, "num_beams"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"penalty_alpha": 0.5, "top_k": 3}, "penalty_alpha"),
        ({"past_key_values": "filled"}, "empty KV cache, got past_key_values with 5 tokens"),
        ({"inputs_embeds": "embeddings"}, "does not support inputs_embeds"),
        ({"position_ids": torch.arange(1, 8)[None]}, "got other position_ids; leave them out"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_is_not_supported_is_refused_in_one_line(
    settings: dict[str, Any], message: str, stack: DecoderStack, fast: Decoder
) -> None:
    ids: Tensor | None = random_ids(1, 7)
    if settings.get("past_key_values"):
        settings = settings | {"past_key_values": filled_cache(stack)}
    if settings.get("inputs_embeds"):
        model: Any = stack.model
        settings = settings | {"inputs_embeds": model.get_input_embeddings()(ids)}
        ids = None
    with pytest.raises(UsageError, match=message) as error:
        plain(stack, ids, custom_generate=fast, **settings)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value), "the message says what to do"


def test_inputs_that_change_the_model_are_refused() -> None:
    stack = stack_of("gpt2")
    ids, fast = random_ids(1, 7), cascade.decode(stack, pass_costs=FREE)
    kinds = torch.ones_like(ids)
    with pytest.raises(UsageError, match="does not support token_type_ids; leave it out"):
        plain(stack, ids, custom_generate=fast, token_type_ids=kinds)


def test_another_model_is_refused(fast: Decoder) -> None:
    with pytest.raises(UsageError, match="expected the model that was given to"):
        plain(stack_of(seed=1), random_ids(1, 5), custom_generate=fast)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drafter": "fast"}, "expected a drafter with the methods of Proposer, got str"),
        ({"draft_length": 0}, "expected a draft_length of at least 1, got 0"),
        ({"engine": "fast"}, "expected an engine among auto, compiled, fused, graphs, model"),
        ({"pass_costs": [0.0]}, "expected pass_costs above 0"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], message: str, stack: DecoderStack
) -> None:
    with pytest.raises(UsageError, match=message):
        cascade.decode(stack, **arguments)
