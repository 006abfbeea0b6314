"""Generation follows logits processors and stopping criteria as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.generating import (
    INF,
    MASK,
    NEW,
    PROMPT,
    check_refusal,
    generated,
    generator,
    own_generate,
    own_text,
    padding_stack,
)
from support.reference_early_exit import (
    ALL_PROPAGATIONS,
    a_stack,
    head_logits,
    own_logits,
    some_heads,
    visited,
)
from support.tiny_models import VOCABULARY, tiny_model
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    SynthIDTextWatermarkLogitsProcessor,
    WatermarkingConfig,
)

from cascade.core.errors import UsageError
from cascade.decoding.early_exit import EarlyExit, Propagation
from cascade.decoding.generation_settings import DecodingConfig, plain_settings
from cascade.decoding.inputs import make_chunk
from cascade.decoding.processors import CustomProcessing, Processing
from cascade.models.stack import DecoderStack

#: Settings that change the greedy text, given the tokens `[3, NEW]` that the model writes freely.
GREEDY: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "repetition_penalty": lambda _: {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": lambda _: {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": lambda _: {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": lambda _: {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": lambda free: {"bad_words_ids": [[int(free[0, 3])], free[1, 2:4].tolist()]},
    "suppress_tokens": lambda free: {"suppress_tokens": free[:, 4].tolist()},
    "begin_suppress_tokens": lambda free: {"begin_suppress_tokens": free[:, 0].tolist()},
    "sequence_bias": lambda free: {"sequence_bias": [[[5], 2.0], [[int(free[0, 0]), 7], 9.0]]},
    "min_length": lambda free: {"min_length": 16, "eos_token_id": [int(free[0, 2]), 0]},
    "min_new_tokens": lambda free: {"min_new_tokens": 6, "eos_token_id": [int(free[0, 2]), 0]},
    "forced_eos_token_id": lambda _: {"forced_eos_token_id": 0},
    "exponential_decay_length_penalty": lambda _: {
        "exponential_decay_length_penalty": (2, 3.0),
        "eos_token_id": 0,
    },
    "remove_invalid_values": lambda _: {"remove_invalid_values": True, "repetition_penalty": 1.5},
    "renormalize_logits": lambda _: {"renormalize_logits": True, "repetition_penalty": 1.5},
    "watermark": lambda _: {"watermarking_config": WatermarkingConfig(bias=3.0, context_width=2)},
    "selfhash": lambda _: {
        "watermarking_config": WatermarkingConfig(bias=3.0, seeding_scheme="selfhash")
    },
    "synthid": lambda _: {
        "watermarking_config": SynthIDTextWatermarkingConfig(
            keys=[6, 4, 1, 9, 7], ngram_len=3, context_history_size=8
        )
    },
}

#: Settings that only sampling follows.
SAMPLED: dict[str, dict[str, Any]] = {
    "min_p": {"min_p": 0.3},
    "typical_p": {"typical_p": 0.3},
    "top_h": {"top_h": 0.4},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.3},
    "Qwen2.5": {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
}


def settings_of(setting: str, stack: DecoderStack) -> dict[str, Any]:
    """Return the settings of GREEDY or SAMPLED for a model."""
    if setting in SAMPLED:
        return SAMPLED[setting]
    return GREEDY[setting](own_text(stack)[:, 9:])


def text(early: EarlyExit, **settings: Any) -> Tensor:
    return generated(early, PROMPT, MASK, pad_token_id=1, **settings).sequences


#: Each setting with one of three families, the first setting with all of them.
WITH_FAMILIES = [
    *(("repetition_penalty", family) for family in ("gemma2", "gpt2")),
    *((setting, ("llama", "gemma2", "gpt2")[place % 3]) for place, setting in enumerate(GREEDY)),
]


@pytest.mark.parametrize(("setting", "family"), WITH_FAMILIES)
def test_full_depth_and_verified_text_match_transformers(setting: str, family: str) -> None:
    early = generator(family, "exact", settled=True)
    given = settings_of(setting, early.stack)
    expected = own_generate(early.stack, PROMPT, attention_mask=MASK, **given)
    assert not torch.equal(expected, own_text(early.stack))
    assert torch.equal(text(EarlyExit(early.stack), **given), expected)
    assert torch.equal(text(early, verify=True, draft_length=3, **given), expected)


def attributes(processor: object) -> dict[str, Any]:
    """Return what a processor was created with, as text that can be compared."""
    kept = {name: value for name, value in vars(processor).items() if name != "rng"}
    return {name: str(value) for name, value in kept.items()}


@pytest.mark.parametrize("setting", [*GREEDY, *SAMPLED])
def test_processors_are_those_of_transformers(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, found = a_stack("llama"), []
    settings = settings_of(setting, stack) | {"do_sample": True}
    loop = GenerationMixin._sample

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(kwargs["logits_processor"])
        return loop(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_sample", spy)
    own_generate(stack, PROMPT, attention_mask=MASK, **settings)
    config = DecodingConfig.of(stack, None, {"eos_token_id": None} | settings)
    prompt = make_chunk(stack, PROMPT, MASK)
    ours = Processing.of(stack, prompt, config, NEW, CustomProcessing())
    (theirs,) = found
    assert [type(one) for one in ours.processors] == [type(one) for one in theirs]
    fresh = [at for at in theirs if not isinstance(at, SynthIDTextWatermarkLogitsProcessor)]
    for one, other in zip(ours.processors, fresh, strict=False):
        if not isinstance(one, NoBadWordsLogitsProcessor | SequenceBiasLogitsProcessor):
            assert attributes(one) == attributes(other)
    assert len(theirs) > 1


def test_greedy_decoding_without_settings_prepares_no_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.model.generation_config = GenerationConfig(min_p=0.1, temperature=0.7, top_k=3)
    expected = own_text(a_stack("llama"))
    monkeypatch.setattr(GenerationMixin, "generate", None)
    assert torch.equal(text(EarlyExit(stack)), expected)


def test_min_p_samples_among_tokens_that_transformers_keeps() -> None:
    early = EarlyExit(a_stack("llama"))
    rows = PROMPT[:1].expand(256, -1)
    logits = own_logits(early.stack, PROMPT[:1])[:, -1]
    kept = MinPLogitsWarper(0.5)(rows, logits)[0].isfinite()
    assert 1 < int(kept.sum()) < 20
    settings = {"do_sample": True, "top_k": 0, "min_p": 0.5, "max_new_tokens": 1}
    tokens = generated(early, rows, **settings).sequences[:, -1]
    assert set(tokens.tolist()) == set(kept.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("setting", ["min_p", "Qwen2.5", "eta_cutoff"])
def test_verified_samples_match_full_model(setting: str) -> None:
    early = generator("llama", "exact", settled=True)
    settings = {"do_sample": True, "seed": 5, "top_k": 0} | SAMPLED[setting]
    expected = text(EarlyExit(early.stack), **settings)
    result = generated(early, PROMPT, MASK, pad_token_id=1, verify=True, **settings)
    assert torch.equal(result.sequences, expected)
    assert result.accepted > 0


# --- The laws ---------------------------------------------------------------------------------

#: Two processors by hand: one of the history of tokens, one of the length.
BY_HAND: dict[str, Any] = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}


def chosen_by_hand(sequences: Tensor, column: int, logits: Tensor) -> Tensor:
    """Return the tokens that BY_HAND and the logits `[B, V]` give for a column."""
    ids = sequences[:, :column]
    scores = NoRepeatNGramLogitsProcessor(2)(
        ids, RepetitionPenaltyLogitsProcessor(1.8)(ids, logits)
    )
    return scores.argmax(dim=-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("propagation", ["frozen", "exact"])
def test_low_threshold_gives_the_exit_head_with_processors(
    family: str, propagation: Propagation
) -> None:
    stack, heads = a_stack(family), some_heads(family)
    early = EarlyExit(stack, layer=2, threshold=-INF, heads=heads, propagation=propagation)
    sequences = generated(early, PROMPT, **BY_HAND).sequences
    assert not torch.equal(sequences, generated(early, PROMPT).sequences)
    # All layers below the exit are computed, so the states there are those of the full text.
    logits = head_logits(stack, early.exits[0], visited(stack, sequences)[2])
    for column in range(9, 9 + NEW):
        expected = chosen_by_hand(sequences, column, logits[:, column - 1])
        assert torch.equal(sequences[:, column], expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@ALL_PROPAGATIONS
def test_generating_matches_scoring_with_processors(family: str, propagation: Propagation) -> None:
    early = generator(family, propagation)
    result = generated(early, PROMPT, **BY_HAND)
    score = early.score(result.sequences, keep_logits=True)
    assert score.logits is not None
    assert torch.equal(score.exit_layers[:, 8:-1], result.exit_layers)
    for column in range(9, 9 + NEW):
        expected = chosen_by_hand(result.sequences, column, score.logits[:, column - 1])
        assert torch.equal(result.sequences[:, column], expected)
    assert len(result.exit_layers.unique()) > 1


@pytest.mark.parametrize("setting", ["repetition_penalty", "no_repeat_ngram_size"])
def test_single_prompts_match_transformers_as_the_batch_does(setting: str) -> None:
    # Whether padding counts as history is up to the release of transformers.
    stack = a_stack("llama")
    given = settings_of(setting, stack)
    # The padding holds tokens that the model would write next.
    padded = PROMPT.clone()
    padded[0, :3] = own_text(stack)[0, 9:12]
    for ids, mask in ((padded, MASK), (PROMPT[:1, 3:], MASK[:1, 3:])):
        expected = own_generate(stack, ids, attention_mask=mask, **given)
        got = generated(EarlyExit(stack), ids, mask, pad_token_id=1, **given).sequences
        assert torch.equal(got, expected)


# --- A caller's own processors and criteria ---------------------------------------------------


class Momentum(LogitsProcessor):
    """Subtracts what each token's logits were so far, and bans a token per call."""

    def __init__(self) -> None:
        self.calls = 0
        self.total: Any = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        changed = scores - 0.3 * self.total
        changed[:, 3 * self.calls] = -INF
        self.total, self.calls = self.total + scores, self.calls + 1
        return changed


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stateful_processors_match_transformers_with_drafts(family: str) -> None:
    early = generator(family, "exact", settled=True)
    expected = own_generate(
        early.stack, PROMPT, attention_mask=MASK, logits_processor=LogitsProcessorList([Momentum()])
    )
    kept = Momentum()
    assert torch.equal(text(EarlyExit(early.stack), logits_processor=[kept]), expected)
    assert kept.calls == NEW
    for draft_length in (1, 4):
        result = generated(
            early,
            PROMPT,
            MASK,
            logits_processor=[Momentum()],
            verify=True,
            draft_length=draft_length,
        )
        assert torch.equal(result.sequences, expected)
        assert result.drafted > result.accepted


def test_processors_are_called_once_per_column_when_rows_exit_at_several_layers() -> None:
    early, kept = generator("llama"), Momentum()
    result = generated(early, PROMPT, logits_processor=[kept])
    assert len(result.exit_layers.unique()) > 1
    assert kept.calls == NEW


def test_processors_that_cannot_be_copied_need_no_verification() -> None:
    class Locked(Momentum):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError

    early = generator("llama", "exact", settled=True)
    assert text(early, logits_processor=[Locked()]).shape == (3, 9 + NEW)
    message = (
        "verify=True copies logits processors to undo rejected drafts, but one of Locked cannot be "
        "copied; set verify=False"
    )
    check_refusal(early, PROMPT, message, logits_processor=[Locked()], verify=True)


def test_given_processors_replace_those_of_settings_as_in_transformers() -> None:
    stack = a_stack("llama")
    given: Any = {"repetition_penalty": 1.1}
    own = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])
    expected = own_generate(stack, PROMPT, attention_mask=MASK, logits_processor=own, **given)
    assert torch.equal(text(EarlyExit(stack), logits_processor=list(own), **given), expected)


def test_allowed_tokens_depend_on_row_and_text_as_in_transformers() -> None:
    early = generator("llama", "exact", settled=True)

    def allowed(row: int, ids: Tensor) -> list[int]:
        return [token for token in range(VOCABULARY) if token % 3 == row or token in ids[-2:]]

    given: Any = {"prefix_allowed_tokens_fn": allowed}
    expected = own_generate(early.stack, PROMPT, attention_mask=MASK, **given)
    assert torch.equal(text(EarlyExit(early.stack), **given), expected)
    assert torch.equal(text(early, verify=True, **given), expected)


class Sum(StoppingCriteria):
    """Ends rows whose tokens have a large sum."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.sum(dim=1) > 600


def test_criteria_end_rows_as_in_transformers() -> None:
    early = generator("llama", "exact", settled=True)
    given: Any = {"stopping_criteria": [Sum()], "eos_token_id": 0}
    expected = own_generate(early.stack, PROMPT, attention_mask=MASK, **given)
    assert 1 in expected[:, 9:]
    for verify in (False, True):
        assert torch.equal(
            text(early if verify else EarlyExit(early.stack), verify=verify, **given), expected
        )


@pytest.mark.parametrize("seconds", [0, 1e-9])
def test_time_limit_ends_text_as_in_transformers(seconds: float) -> None:
    stack = a_stack("llama")
    expected = own_generate(stack, PROMPT, attention_mask=MASK, max_time=seconds)
    assert expected.shape == (3, 10)
    assert torch.equal(text(EarlyExit(stack), max_time=seconds), expected)


# --- Settings that do not fit -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"repetition_penalty": -1.0},
            "transformers rejects the generation settings repetition_penalty: `penalty` has to be "
            "a strictly positive float, but is -1.0; change them",
        ),
        (
            {"suppress_tokens": list(range(VOCABULARY))},
            "the generation settings suppress_tokens leave no token to choose at column 9; relax "
            "them",
        ),
        ({"max_time": "soon"}, "expected max_time to be a number, got 'soon'"),
        (
            {"watermarking_config": {"strength": 2}},
            "expected watermarking_config to be what WatermarkingConfig of transformers takes, got "
            "{'strength': 2} (WatermarkingConfig.__init__() got an unexpected keyword argument "
            "'strength'); correct it",
        ),
        (
            {"logits_processor": Momentum()},
            "expected logits_processor to be a list, as in transformers, got Momentum; put it into "
            "a list",
        ),
        (
            {"stopping_criteria": ["stop"]},
            "expected stopping_criteria to be a list, as in transformers, got list; put it into a "
            "list",
        ),
    ],
)
def test_invalid_processing_gives_one_line_error(settings: dict[str, Any], message: str) -> None:
    check_refusal(generator("llama"), PROMPT, message, **settings)


@pytest.mark.parametrize("settings", [{"bad_words_ids": [[500]]}, {"bad_words_ids": [5]}])
def test_tokens_that_do_not_exist_give_one_line_error(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="transformers rejects the generation settings bad_words"):
        generated(generator("llama"), PROMPT, **settings)


def test_single_settings_turn_off_those_of_the_model() -> None:
    stack = padding_stack("llama", repetition_penalty=1.8, num_beams=4, bad_words_ids=[[5]])
    off: Any = {"repetition_penalty": None, "num_beams": 1, "bad_words_ids": None}
    expected = own_text(a_stack("llama"))
    assert torch.equal(text(EarlyExit(stack), **off), expected)
    assert torch.equal(
        text(EarlyExit(stack), **plain_settings(stack.model.generation_config)), expected
    )
    # Others stay on.
    some = own_generate(
        a_stack("llama"), PROMPT, attention_mask=MASK, min_new_tokens=2, bad_words_ids=[[5]]
    )
    assert torch.equal(
        text(EarlyExit(stack), **off | {"bad_words_ids": [[5]], "repetition_penalty": 1.0}), some
    )


def test_whole_penalties_are_numbers() -> None:
    early = EarlyExit(a_stack("llama"))
    assert torch.equal(text(early, repetition_penalty=2), text(early, repetition_penalty=2.0))
