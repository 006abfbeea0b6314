"""Tests of the explanation of a final norm."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support import planted_causes as planted
from support.tiny_models import FAMILIES, random_ids, tiny_model, tiny_tokenizer
from torch import nn

from cascade.core.errors import CorpusError, UnsupportedModelError
from cascade.core.schema import from_plain, to_plain
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import similarities
from cascade.stats.cosine import cosine
from cascade.studies.explanations.final_norm import explain_norm, norm_weights
from cascade.studies.explanations.records import FinalNormExplanation


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_of_a_stack_equals_the_norm_of_the_model(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    kept: dict[int, torch.Tensor] = {}
    normed = stack.visit(random_ids(), lambda entry, hidden: kept.update({entry: hidden}))
    assert normed is not None
    assert torch.equal(stack.norm(kept[stack.num_layers]), normed)


@pytest.mark.parametrize("family", FAMILIES)
def test_probed_weights_bias_and_centring_equal_those_of_the_module(family: str) -> None:
    model = tiny_model(family)
    stack = DecoderStack(model)
    weights, bias, centred = norm_weights(stack)
    names = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm")
    inner = model.base_model
    inner = getattr(inner, "decoder", inner)
    norm: Any = next(getattr(inner, name) for name in names if hasattr(inner, name))
    expected = norm.weight.double() + (1.0 if family.startswith("gemma") else 0.0)
    torch.testing.assert_close(weights, expected.detach(), rtol=0, atol=1e-5)
    its_bias = getattr(norm, "bias", None)
    expected = torch.zeros_like(weights) if its_bias is None else its_bias.detach().double()
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-4)
    assert centred == (isinstance(norm, nn.LayerNorm) or family == "cohere")


def a_stack(*, dimension: int = 5, weight: float = -1.0) -> DecoderStack:
    """Return a model whose stream has most of its energy in one dimension."""
    stack = planted.quiet_stack(4)
    model: Any = stack.model
    with torch.no_grad():
        model.model.norm.weight.fill_(1.5)
        model.model.norm.weight[dimension] = weight
        model.model.embed_tokens.weight[:, dimension] = 40.0
    return stack


def test_the_weight_with_the_largest_effect_comes_first() -> None:
    record = explain_norm(a_stack(), planted.blocks())
    means = {row.between: row.mean for row in record.similarities}
    assert means["residual"] > 0.8
    assert means["behind"] < 0
    assert means["equal_weights"] == pytest.approx(means["residual"])
    assert record.dimensions[0].dimension == 5
    assert record.dimensions[0].weight == pytest.approx(-1.0, abs=1e-4)
    assert record.levelled[0].explained == pytest.approx(1.0, abs=1e-3)
    assert record.levelled[0].similarity == pytest.approx(means["residual"], abs=1e-3)
    assert record.weights.negative == 1
    plain = to_plain(record)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert from_plain(plain, FinalNormExplanation) == record


def test_similarities_equal_the_profiles() -> None:
    stack, corpus = a_stack(), planted.blocks(8)
    record = explain_norm(stack, corpus, batch_size=3)
    ids = torch.from_numpy(corpus.ids[record.settings.pilot_sequences :]).long()
    expected = similarities(stack, ids).double().mean(dim=(1, 2))
    means = {row.between: row.mean for row in record.similarities}
    assert means["residual"] == pytest.approx(float(expected[-2]), abs=1e-6)
    assert means["behind"] == pytest.approx(float(expected[-1]), abs=1e-6)
    kept: dict[int, torch.Tensor] = {}
    normed = stack.visit(ids, lambda entry, hidden: kept.update({entry: hidden}))
    assert normed is not None
    both = cosine(stack.norm(kept[stack.num_layers - 1]), normed).mean()
    assert means["both_behind"] == pytest.approx(float(both), abs=1e-5)
    assert means["both_behind"] != pytest.approx(means["behind"], abs=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
def test_levelling_nearly_all_weights_approaches_equal_weights(family: str) -> None:
    model = tiny_model(family)
    stack = DecoderStack(model, tokenizer=tiny_tokenizer())
    done: list[int] = []
    record = explain_norm(stack, planted.blocks(8), progress=done.append)
    assert sum(done) == planted.blocks(8).tokens
    means = {row.between: row.mean for row in record.similarities}
    # If nearly all weights are levelled, the result is close to levelling all of them.
    last = record.levelled[-1]
    assert last.weights < stack.hidden_size
    assert abs(last.similarity - means["equal_weights"]) < 0.2
    if not record.norm.has_bias:
        assert means["without_bias"] == pytest.approx(means["behind"], abs=1e-5)


def test_invalid_corpora_and_norms_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"at least 4 sequences .* got 3"):
        explain_norm(a_stack(), planted.blocks(3))
    stack = a_stack()
    model: Any = stack.model
    before = model.model.norm
    model.model.norm = nn.Sequential(before, nn.Tanh())
    with pytest.raises(UnsupportedModelError, match="more than scale and shift"):
        norm_weights(DecoderStack(model))
    model.model.norm = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no final norm"):
        norm_weights(DecoderStack(model))
