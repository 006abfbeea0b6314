"""Tests of layer explanations: planted causes are found, and only those."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import planted_causes as planted
from support.tiny_models import random_ids, tiny_model, tiny_tokenizer

from cascade.core.errors import CorpusError, UnsupportedModelError, UsageError
from cascade.core.schema import from_plain, to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import similarities
from cascade.studies.explanations.layer_explanation import explain
from cascade.studies.explanations.records import CauseRow, LayerExplanation


def explained(plant: Callable[[DecoderStack], None], corpus: TokenBlocks) -> LayerExplanation:
    """Explain the planted layer, which turns the stream more than its neighbour."""
    stack = planted.quiet_stack()
    plant(stack)
    record = explain(stack, corpus, planted.DIP, contrast=planted.DIP - 1)
    assert record.gap.asks_for_a_cause
    return record


def cause(record: LayerExplanation, name: str) -> CauseRow:
    return next(row for row in record.causes if row.cause == name)


def supported(record: LayerExplanation) -> set[str]:
    return set(record.verdict.carried_by)


def test_a_constant_that_attention_writes_into_one_dimension_is_found() -> None:
    record = explained(lambda stack: planted.constant_of(stack, "attention", 4.0), planted.blocks())
    assert supported(record) >= {"attention", "common", "dimensions"}
    assert not supported(record) & {"mlp", "first_token", "delimiters", "one_class", "stream_size"}
    target = record.sides[0]
    assert [row.dimension for row in target.dimensions] == [7]
    assert target.common_share > 0.5
    assert cause(record, "attention").closed > 0.8


def test_a_constant_that_the_mlp_writes_is_not_attributed_to_attention() -> None:
    record = explained(
        lambda stack: planted.constant_of(stack, "mlp", 4.0, spread=True), planted.blocks()
    )
    assert supported(record) >= {"mlp", "common"}
    assert not supported(record) & {"attention", "dimensions", "first_token"}
    assert cause(record, "dimensions").verdict == "not tried", (
        "the constant is spread over all dimensions"
    )


def test_a_large_mlp_update_has_no_common_vector() -> None:
    record = explained(lambda stack: planted.loud_mlp(stack, 8.0), planted.blocks())
    assert "mlp" in supported(record)
    assert not supported(record) & {"attention", "common", "first_token", "one_class"}


def test_a_value_read_from_the_first_token_is_found() -> None:
    record = explained(lambda stack: planted.read_from_first_token(stack, 60.0), planted.blocks())
    assert supported(record) >= {"attention", "first_token"}
    assert not supported(record) & {"mlp", "delimiters", "one_class"}


def test_a_token_class_as_cause_is_found() -> None:
    # Every sequence has digits and other tokens.
    ids = planted.blocks(24, 32).ids.copy()
    ids[:, 1::2] = tiny_tokenizer().convert_tokens_to_ids("5")
    record = explained(
        lambda stack: planted.one_class(stack, 3.0), TokenBlocks(ids, "d", "d", records=24)
    )
    assert cause(record, "one_class").token_class == "digits"
    assert "one_class" in supported(record)
    assert "attention" not in supported(record)


def test_a_layer_similar_to_its_neighbour_needs_no_explanation() -> None:
    record = explain(planted.quiet_stack(), planted.blocks(), 2, contrast=3)
    assert record.gap.degrees < 0, "it turns the stream less"
    assert not record.gap.asks_for_a_cause
    assert record.verdict.carried_by == []


def test_a_neighbour_that_turns_more_without_a_cause_closes_no_gap() -> None:
    stack = planted.quiet_stack()
    planted.constant_of(stack, "attention", 4.0)
    # The neighbour's MLP cancels its attention, so it turns far more without the MLP.
    layer: Any = stack.layers[planted.DIP - 2]
    vector = 6.0 * torch.eye(stack.hidden_size)[9]
    layer.self_attn.o_proj.register_forward_hook(lambda _, __, output: output + vector)
    layer.mlp.down_proj.register_forward_hook(lambda _, __, output: output - vector)
    record = explain(stack, planted.blocks(), planted.DIP, contrast=planted.DIP - 1)
    mlp = cause(record, "mlp")
    assert mlp.contrast_degrees > record.sides[1].degrees
    assert mlp.closed < 0.3
    assert "mlp" not in record.verdict.carried_by


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "bloom"])
def test_the_record_is_complete_and_the_model_does_not_change(family: str) -> None:
    model = tiny_model(family)
    stack = DecoderStack(model, tokenizer=tiny_tokenizer())
    ids = random_ids()
    before = model(ids).logits
    attention = model.config._attn_implementation
    corpus = planted.blocks(8, 12)
    done: list[int] = []
    record = explain(stack, corpus, 2, batch_size=3, progress=done.append)
    assert sum(done) == corpus.tokens == 96
    assert model.config._attn_implementation == attention
    assert torch.equal(model(ids).logits, before)
    plain = to_plain(record)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert from_plain(plain, LayerExplanation) == record
    assert [row.layer for row in record.layers] == ["1", "2", "3", "4"]
    assert [row.entry for row in record.entries] == [0, 1, 2, 3, 4]
    ablations = {row.ablation for row in record.ablations if row.layer == "2"}
    assert ablations >= {"layer_skipped", "attention_skipped", "mlp_skipped", "update_halved"}


def test_similarities_equal_the_profiles() -> None:
    stack = planted.quiet_stack()
    corpus = planted.blocks(8)
    record = explain(stack, corpus, 3, contrast=2)
    first = record.settings.pilot_sequences
    ids = torch.from_numpy(corpus.ids[first:].astype(np.int64))
    expected = similarities(stack, ids).double().mean(dim=(1, 2))
    assert [row.similarity for row in record.layers] == pytest.approx(
        expected[:6].tolist(), abs=1e-5
    )
    assert record.sides[0].similarity == pytest.approx(float(expected[2]), abs=1e-5)


def test_empty_token_classes_are_listed_as_missing() -> None:
    record = explain(planted.quiet_stack(), planted.blocks(8), 3, contrast=2)
    names = [row.name for row in record.classes]
    assert "special" not in names
    assert any("special" in text for text in record.missing)
    assert all(row.tokens > 0 for row in record.classes)
    assert sum(row.tokens for row in record.classes) == sum(row.tokens for row in record.positions)


def test_delimiters_are_hidden_in_batches_that_contain_them() -> None:
    ids = planted.blocks(8).ids.copy()
    tokens = tiny_tokenizer().convert_tokens_to_ids
    ids[np.isin(ids, tokens(list(".,;:!?")))] = tokens("x")
    without = TokenBlocks(ids, "d", "d", records=8)
    stack = planted.quiet_stack()
    record = explain(stack, without, 3, contrast=2, batch_size=2)
    assert cause(record, "delimiters").verdict == "not tried"
    assert "delimiters_hidden" not in {row.ablation for row in record.ablations}
    some = ids.copy()
    some[-1, 1::2] = tokens(".")
    record = explain(stack, TokenBlocks(some, "d", "d", records=8), 3, contrast=2, batch_size=2)
    row = next(row for row in record.ablations if row.ablation == "delimiters_hidden")
    assert row.perplexity != row.full_perplexity


def test_the_default_neighbour_is_the_nearest_stable_layer() -> None:
    stack = planted.quiet_stack(8)
    planted.constant_of(stack, "attention", 40.0)
    assert explain(stack, planted.blocks(), planted.DIP).settings.contrast == "3"
    assert explain(stack, planted.blocks(), 5).settings.contrast != str(planted.DIP)


def test_invalid_layers_and_corpora_are_refused() -> None:
    stack, corpus = planted.quiet_stack(), planted.blocks(8)
    with pytest.raises(UsageError, match=r"expected --layer in 1..6, got 7"):
        explain(stack, corpus, 7)
    with pytest.raises(UsageError, match=r"expected --contrast in 1..6, got 0"):
        explain(stack, corpus, 2, contrast=0)
    with pytest.raises(UsageError, match="--contrast to differ from layer 2"):
        explain(stack, corpus, 2, contrast=2)
    with pytest.raises(CorpusError, match=r"at least 4 sequences .* got 3"):
        explain(stack, planted.blocks(3), 2)
    with pytest.raises(UsageError, match="a single layer"):
        explain(
            DecoderStack(tiny_model("llama", num_layers=1), tokenizer=tiny_tokenizer()), corpus, 1
        )
    with pytest.raises(CorpusError, match="no tokenizer"):
        explain(DecoderStack(tiny_model("llama")), corpus, 1)
    post_norm = DecoderStack(
        tiny_model("opt", do_layer_norm_before=False), tokenizer=tiny_tokenizer()
    )
    with pytest.raises(UnsupportedModelError, match="cannot be split"):
        explain(post_norm, corpus, 1)
    assert post_norm.model.config._attn_implementation != "eager", "restored after a failure"
