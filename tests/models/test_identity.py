"""Hashes of weights and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from support.stacks import ALL_FAMILIES, own_run
from support.tiny_models import random_ids, save_checkpoint, tiny_model
from torch import Tensor, nn

from cascade.core.errors import ModelError
from cascade.core.schema import UNSET
from cascade.models.identity import check_same_model
from cascade.models.loading import load
from cascade.models.stack import DecoderStack


def test_hash_of_loaded_weights_is_not_computed_again(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = load(str(saved))
    monkeypatch.setattr(type(stack.model), "state_dict", None)
    assert stack.weights_hash() == stack.provenance.weights_hash


@ALL_FAMILIES
def test_hash_of_weights_in_memory_depends_on_every_weight(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    before = stack.weights_hash()
    assert before.startswith("in-memory-sha256:")
    assert before == DecoderStack(tiny_model(family)).weights_hash()
    assert before != DecoderStack(tiny_model(family, seed=1)).weights_hash()
    for parameter in stack.model.parameters():
        kept = parameter.data.flatten()[-1].item()
        parameter.data.view(-1)[-1] += 1e-3  # `.data` bypasses torch's version counter
        assert stack.weights_hash() != before
        parameter.data.view(-1)[-1] = kept
    assert stack.weights_hash() == before
    own_run(stack.model, random_ids())
    assert stack.weights_hash() == before
    assert stack.provenance.weights_hash is UNSET


def test_hash_depends_on_every_tensor_of_a_quantized_weight() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def hash_of(scales: float) -> str:
        stack = DecoderStack(tiny_model("llama"))
        weight = stack.lm_head.weight
        assert isinstance(weight, Tensor)
        both = TwoTensor(weight.detach(), torch.full_like(weight, scales))
        stack.lm_head.weight = nn.Parameter(both, requires_grad=False)
        return stack.weights_hash()

    assert hash_of(1.0) == hash_of(1.0)
    assert hash_of(1.0) != hash_of(2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_hash_of_weights_in_memory_depends_on_the_dtype(dtype: torch.dtype) -> None:
    hashes = {
        DecoderStack(tiny_model("llama").to(kind)).weights_hash() for kind in (dtype, torch.float32)
    }
    assert len(hashes) == 2


def test_tokenizer_hash_depends_on_the_vocabulary(folder: Path) -> None:
    before = load(str(folder)).provenance
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    vocabulary = json.loads(text)
    tokens = vocabulary["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    after = load(str(folder)).provenance
    assert after.tokenizer_hash != before.tokenizer_hash
    assert after.weights_hash == before.weights_hash


def test_a_tokenizer_of_far_fewer_tokens_than_the_model_embeds_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", vocab_size=195)
    with pytest.raises(ModelError) as error:
        load(folder)
    assert str(error.value).startswith(
        f"the tokenizer of {folder} knows 97 tokens, but the model embeds 195; expected the"
    )
    save_checkpoint(folder, vocab_size=190)
    assert load(folder).vocab_size == 190


@pytest.mark.parametrize(
    ("made_with", "here", "refused"),
    [("t1", "t2", True), ("t1", "t1", False), (None, "t2", False), ("t1", None, False)],
)
def test_another_tokenizer_is_another_model(
    made_with: str | None, here: str | None, refused: bool
) -> None:
    stack = DecoderStack(tiny_model("llama"))
    made_for = replace(
        stack.provenance, weights_hash=stack.weights_hash(), tokenizer_hash=made_with
    )
    stack.provenance = replace(stack.provenance, tokenizer_hash=here)
    if not refused:
        check_same_model(made_for, stack, what="these heads")
        return
    with pytest.raises(ModelError) as error:
        check_same_model(made_for, stack, what="these heads")
    assert str(error.value) == (
        "these heads belong to llama (tokenizer_hash t1), but the model is llama "
        "(tokenizer_hash t2); make them again for this model"
    )
