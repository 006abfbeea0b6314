"""A planted cause is found, every other one is refused, and a layer without a dip gets none."""

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
from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from cascade.models.sublayers import find_parts, split
from cascade.stats.resampling import draws
from cascade.studies.explanations.ablations import outputs
from cascade.studies.explanations.causes import Measured, Pilot
from cascade.studies.explanations.layer_explanation import _Gap, explain


def causes_of(plant: Callable[[DecoderStack], None], corpus: TokenBlocks) -> dict[str, Any]:
    stack = planted.quiet_stack()
    plant(stack)
    record = explain(stack, corpus, planted.DIP, contrast=planted.DIP - 1)
    assert record["gap"]["asks_for_a_cause"]
    return {row["cause"]: row for row in record["causes"]} | {"record": record}


def carried(found: dict[str, Any]) -> set[str]:
    return set(found["record"]["verdict"]["carried_by"])


def test_a_constant_written_by_attention_into_one_dimension() -> None:
    found = causes_of(lambda stack: planted.constant_of(stack, "attention", 4.0), planted.blocks())
    assert carried(found) >= {"attention", "common", "dimensions"}
    assert not carried(found) & {"mlp", "first_token", "delimiters", "one_class", "stream_size"}
    target = found["record"]["sides"][0]
    assert [row["dimension"] for row in target["dimensions"]] == [7]
    assert target["common_share"] > 0.5
    assert found["attention"]["closed"] > 0.8


def test_the_same_constant_by_the_mlp_is_not_laid_to_attention() -> None:
    found = causes_of(
        lambda stack: planted.constant_of(stack, "mlp", 4.0, spread=True), planted.blocks()
    )
    assert carried(found) >= {"mlp", "common"}
    assert not carried(found) & {"attention", "dimensions", "first_token"}
    assert found["dimensions"]["verdict"] == "not tried", "it is spread over all of them"


def test_a_loud_mlp_is_no_common_part() -> None:
    found = causes_of(lambda stack: planted.loud_mlp(stack, 8.0), planted.blocks())
    assert "mlp" in carried(found)
    assert not carried(found) & {"attention", "common", "first_token", "one_class"}


def test_what_is_read_from_the_first_token_goes_when_it_is_hidden() -> None:
    found = causes_of(lambda stack: planted.read_from_first_token(stack, 60.0), planted.blocks())
    assert carried(found) >= {"attention", "first_token"}
    assert not carried(found) & {"mlp", "delimiters", "one_class"}


def test_one_class_of_tokens_is_named() -> None:
    # Every sequence has digits and others.
    ids = planted.blocks(24, 32).ids.copy()
    ids[:, 1::2] = tiny_tokenizer().convert_tokens_to_ids("5")
    found = causes_of(
        lambda stack: planted.one_class(stack, 3.0), TokenBlocks(ids, "d", "d", records=24)
    )
    assert found["one_class"]["class"] == "digits"
    assert "one_class" in carried(found)
    assert "attention" not in carried(found)


def test_a_layer_like_its_neighbour_asks_for_no_cause() -> None:
    record = explain(planted.quiet_stack(), planted.blocks(), 2, contrast=3)
    assert record["gap"]["degrees"] < 0, "it turns the stream less"
    assert not record["gap"]["asks_for_a_cause"]
    assert record["verdict"]["carried_by"] == []


def test_a_neighbour_that_turns_more_without_something_closes_no_gap() -> None:
    stack = planted.quiet_stack()
    planted.constant_of(stack, "attention", 4.0)
    # The neighbour's MLP undoes its attention: without the MLP it turns far more.
    layer: Any = stack.layers[planted.DIP - 2]
    vector = 6.0 * torch.eye(stack.hidden_size)[9]
    layer.self_attn.o_proj.register_forward_hook(lambda _, __, output: output + vector)
    layer.mlp.down_proj.register_forward_hook(lambda _, __, output: output - vector)
    record = explain(stack, planted.blocks(), planted.DIP, contrast=planted.DIP - 1)
    mlp = next(row for row in record["causes"] if row["cause"] == "mlp")
    assert mlp["contrast_degrees"] > record["sides"][1]["degrees"]
    assert mlp["closed"] < 0.3
    assert "mlp" not in record["verdict"]["carried_by"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "bloom"])
def test_the_record_is_whole_and_the_model_as_it_was(family: str) -> None:
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
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record
    assert [row["layer"] for row in record["layers"]] == ["1", "2", "3", "4"]
    assert [row["entry"] for row in record["entries"]] == [0, 1, 2, 3, 4]
    ablations = {row["ablation"] for row in record["ablations"] if row["layer"] == "2"}
    assert ablations >= {"layer_skipped", "attention_skipped", "mlp_skipped", "update_halved"}


def test_similarities_are_those_of_the_profile() -> None:
    from cascade.saturation.profile import similarities

    stack = planted.quiet_stack()
    corpus = planted.blocks(8)
    record = explain(stack, corpus, 3, contrast=2)
    first = record["settings"]["pilot_sequences"]
    ids = torch.from_numpy(corpus.ids[first:].astype(np.int64))
    expected = similarities(stack, ids).double().mean(dim=(1, 2))
    assert [row["similarity"] for row in record["layers"]] == pytest.approx(
        expected[:6].tolist(), abs=1e-5
    )
    assert record["sides"][0]["similarity"] == pytest.approx(float(expected[2]), abs=1e-5)


def test_perplexities_are_the_models_own() -> None:
    stack = planted.quiet_stack()
    corpus = planted.blocks(8)
    record = explain(stack, corpus, 3, contrast=2)
    first = record["settings"]["pilot_sequences"]
    ids = torch.from_numpy(corpus.ids[first:].astype(np.int64))

    def perplexity() -> float:
        with torch.no_grad():
            return float(torch.exp(stack.model(ids, labels=ids).loss))

    rows = {row["ablation"]: row for row in record["ablations"] if row["layer"] == "3"}
    assert rows["layer_skipped"]["full_perplexity"] == pytest.approx(perplexity(), rel=1e-4)
    layer: Any = stack.layers[2]
    for name, modules in (
        ("attention_skipped", [layer.self_attn.o_proj]),
        ("mlp_skipped", [layer.mlp.down_proj]),
        ("layer_skipped", [layer.self_attn.o_proj, layer.mlp.down_proj]),
    ):
        handles = [
            module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
            for module in modules
        ]
        expected = perplexity()
        for handle in handles:
            handle.remove()
        assert rows[name]["perplexity"] == pytest.approx(expected, rel=1e-4), name
        assert rows[name]["perplexity_ratio"] == pytest.approx(
            rows[name]["perplexity"] / rows[name]["full_perplexity"]
        )
    halved = layer.register_forward_hook(lambda _, args, output: (args[0] + output) / 2)
    expected = perplexity()
    halved.remove()
    assert rows["update_halved"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_the_common_part_is_left_out_of_every_token_but_the_first() -> None:
    stack = planted.quiet_stack()
    ids = torch.from_numpy(planted.blocks(4).ids.astype(np.int64))
    plan = stack.plan(ids)
    parts = find_parts(stack, 1)
    _, update = split(stack, parts, 1, plan.embedded, plan.calls[0])
    pilot = Pilot.of([update])
    found = dict(outputs(stack, parts, 1, Measured(update, {}), pilot, plan.calls[0]))
    whole = update.hidden + update.whole
    torch.testing.assert_close(found["common_left_out"][:, 1:], whole[:, 1:] - pilot.common)
    torch.testing.assert_close(found["common_left_out"][:, 0], whole[:, 0])
    torch.testing.assert_close(found["layer_skipped"], update.hidden)


@pytest.mark.parametrize(
    ("left", "verdict"), [(2.0, "carries"), (5.0, "cannot tell"), (8.0, "does not carry")]
)
def test_a_cause_carries_only_where_its_whole_interval_does(left: float, verdict: str) -> None:
    generator = np.random.default_rng(0)
    contrast = generator.normal(20.0, 0.1, 16)
    target = contrast + 10.0
    gap = _Gap(draws(16, 0), target, contrast)
    without = contrast + left + generator.normal(0.0, 1.0, 16)
    found = gap.closed(without, contrast)
    assert found["verdict"] == verdict
    low, high = found["interval"]
    assert low < found["closed"] < high
    assert found["closed"] == pytest.approx(1 - left / 10, abs=0.08)
    if verdict == "cannot tell":
        assert low < 0.5 < high


def test_empty_classes_are_named_and_not_counted_as_zeros() -> None:
    record = explain(planted.quiet_stack(), planted.blocks(8), 3, contrast=2)
    names = [row["name"] for row in record["classes"]]
    assert "special" not in names
    assert any("special" in text for text in record["missing"])
    assert all(row["tokens"] > 0 for row in record["classes"])
    assert sum(row["tokens"] for row in record["classes"]) == sum(
        row["tokens"] for row in record["positions"]
    )


def test_delimiters_in_some_batches_alone_are_hidden_there() -> None:
    ids = planted.blocks(8).ids.copy()
    tokens = tiny_tokenizer().convert_tokens_to_ids
    ids[np.isin(ids, tokens(list(".,;:!?")))] = tokens("x")
    without = TokenBlocks(ids, "d", "d", records=8)
    stack = planted.quiet_stack()
    record = explain(stack, without, 3, contrast=2, batch_size=2)
    causes = {row["cause"]: row for row in record["causes"]}
    assert causes["delimiters"]["verdict"] == "not tried"
    assert "delimiters_hidden" not in {row["ablation"] for row in record["ablations"]}
    some = ids.copy()
    some[-1, 1::2] = tokens(".")
    record = explain(stack, TokenBlocks(some, "d", "d", records=8), 3, contrast=2, batch_size=2)
    row = next(row for row in record["ablations"] if row["ablation"] == "delimiters_hidden")
    assert row["perplexity"] != row["full_perplexity"]


def test_the_neighbour_is_the_nearest_layer_of_a_stable_band() -> None:
    stack = planted.quiet_stack(8)
    planted.constant_of(stack, "attention", 40.0)
    assert explain(stack, planted.blocks(), planted.DIP)["settings"]["contrast"] == "3"
    assert explain(stack, planted.blocks(), 5)["settings"]["contrast"] != str(planted.DIP)


def test_what_cannot_be_explained_is_refused_in_one_line() -> None:
    stack, corpus = planted.quiet_stack(), planted.blocks(8)
    with pytest.raises(UsageError, match=r"expected --layer in 1..6, got 7"):
        explain(stack, corpus, 7)
    with pytest.raises(UsageError, match=r"expected --contrast in 1..6, got 0"):
        explain(stack, corpus, 2, contrast=0)
    with pytest.raises(UsageError, match="a neighbour other than layer 2"):
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
