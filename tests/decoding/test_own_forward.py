"""Generation by the model's own forward: where nothing is drafted, as fast as `transformers`."""

from __future__ import annotations

import copy

import pytest
import torch
from support.generating import MASK, NEW, PROMPT
from support.stacks import ALL_FAMILIES, a_stack
from support.tiny_models import random_ids, tiny_model
from torch import Tensor, nn

from cascade.core.errors import ModelError, UnsupportedModelError
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.kv_cache import KeyValueCache
from cascade.decoding.own_forward import OwnForward
from cascade.models.stack import DecoderStack

HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
#: A family with sliding windows, a soft-cap, and no engine.
WITHOUT_ENGINE = "gemma3_text"


def own_text(stack: DecoderStack, ids: Tensor, mask: Tensor) -> Tensor:
    return stack.model.generate(  # type: ignore[no-any-return]
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


@HALF
@ALL_FAMILIES
def test_batches_without_an_engine_are_those_of_transformers(
    family: str, dtype: torch.dtype
) -> None:
    stack = DecoderStack(copy.deepcopy(tiny_model(family)).to(dtype))
    early = EarlyExit(stack, engine="model")
    for mask in (torch.ones_like(PROMPT), MASK):
        made = early.generate(
            PROMPT,
            mask,
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            verify=True,
            return_dict_in_generate=True,
        )
        assert made.sequences.equal(own_text(stack, PROMPT, mask))
        assert made.exit_layers.eq(stack.num_layers).all()


@pytest.mark.parametrize("verify", [False, True])
def test_single_rows_in_half_precision_are_those_of_transformers(verify: bool) -> None:
    stack = DecoderStack(copy.deepcopy(tiny_model(WITHOUT_ENGINE)).to(torch.bfloat16))
    ids = random_ids(1, 30)  # longer than the sliding window
    made = EarlyExit(stack).generate(
        ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, verify=verify
    )
    assert made.equal(own_text(stack, ids, torch.ones_like(ids)))


def test_the_work_is_counted() -> None:
    stack = a_stack(WITHOUT_ENGINE)
    made = EarlyExit(stack).generate(
        PROMPT, MASK, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True
    )
    batch, length = PROMPT.shape
    computed = batch * (length + 3)  # the last new token is never an input
    assert made.counts.layer_rows == [computed] * stack.num_layers
    pairs = batch * (length**2 + sum(range(length + 1, length + 4)))
    assert made.counts.pairs == [pairs] * stack.num_layers
    assert made.counts.lm_head_rows == batch * 4
    assert made.passed == int(MASK.sum()) + batch * 3


def test_ended_rows_stay_padded() -> None:
    stack = a_stack(WITHOUT_ENGINE)
    early = EarlyExit(stack)
    free = early.generate(PROMPT, max_new_tokens=NEW, eos_token_id=None)
    end = int(free[0, PROMPT.shape[1] + 2])
    made = early.generate(PROMPT, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0)
    for row, whole in zip(made, free, strict=True):
        new = whole[PROMPT.shape[1] :].tolist()
        kept = new[: new.index(end) + 1] if end in new else new
        got = row[PROMPT.shape[1] :].tolist()
        assert got[: len(kept)] == kept[: len(got)]
        assert set(got[len(kept) :]) <= {0}


def test_a_cache_that_goes_back_gives_the_same_logits() -> None:
    stack, ids = a_stack("llama"), random_ids(1, 12)
    expected = stack.model(ids).logits
    cache = KeyValueCache(stack.num_layers, 1, 20)
    forward = OwnForward(stack, cache)
    forward.run(ids[:, :6], 0)
    forward.run(random_ids(1, 4, seed=9), 6)  # a draft that is rejected
    made = forward.run(ids[:, 6:], 6)
    torch.testing.assert_close(made, expected[:, 6:], rtol=1e-5, atol=1e-5)
    assert forward.run(ids[:, 11:], 11, last=True).shape == (1, 1, stack.vocab_size)


def test_logits_that_are_not_finite_are_refused() -> None:
    stack = DecoderStack(copy.deepcopy(tiny_model("gpt2")))
    head = stack.lm_head
    assert isinstance(head, nn.Linear)
    head.register_forward_hook(lambda _, args, output: output * torch.nan)
    with pytest.raises(ModelError, match="the logits of layer 4 are not finite"):
        OwnForward(stack).run(random_ids(1, 3), 0)


def test_models_of_more_than_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.decoding.own_forward.has_text_decoder", lambda model: True)
    assert not OwnForward.supports(a_stack("llama"))
    with pytest.raises(UnsupportedModelError, match="expected a model of text alone"):
        OwnForward(a_stack("llama"))


@pytest.mark.parametrize("family", ["llama", WITHOUT_ENGINE])
def test_where_products_are_rounded_the_text_is_the_models_own_and_it_is_said(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = DecoderStack(copy.deepcopy(tiny_model(family)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        early = EarlyExit(stack)
        for ids, mask in ((PROMPT[:1], torch.ones_like(PROMPT[:1])), (PROMPT, MASK)):
            made = early.generate(
                ids,
                mask,
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                verify=True,
                return_dict_in_generate=True,
            )
            assert torch.equal(made.sequences, own_text(stack, ids, mask))
            assert made.engine is not None
            assert made.engine.startswith("model (")
            assert made.passes == 0  # nothing was drafted
    if family == "llama":
        assert made.engine == "model (its products are rounded to bfloat16 by autocast)"
        # What was found under autocast holds for this setting alone.
        assert early.layers.engine is not None
        assert early.layers.engine.is_ready()
