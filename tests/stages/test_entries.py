"""Test which tokens enter a stage, and where the others exit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.reference_early_exit import (
    CLOSE,
    LAYERS,
    a_stack,
    apart,
    one_line,
    own_logits,
    random_blocks,
    some_heads,
    visited,
)
from support.tiny_models import random_ids, tiny_model
from support.tiny_stages import (
    TEXT,
    a_cascade,
    a_moved_stage,
    ends,
    logits_of,
    share_of,
)

from cascade.core.errors import (
    ModelError,
    UsageError,
)
from cascade.core.schema import from_plain
from cascade.exits.head_fitting import fit_heads
from cascade.models.stack import DecoderStack
from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.records import (
    StageBase,
    StageProvenance,
)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neo", "bloom"])
def test_the_similarity_of_the_entry_layer_selects_the_hard_tokens(family: str, layer: int) -> None:
    stack = a_stack(family)
    threshold = share_of(stack, TEXT, layer)
    cascade = Cascade(stack)
    cascade.add_stage(a_moved_stage(stack), Entry(layer, threshold))
    history = visited(stack, TEXT)
    similarity = torch.cosine_similarity(history[layer - 1], history[layer], dim=-1)
    hard = similarity.double() < threshold
    # Rounding can move a similarity at the threshold to either side.
    sure = (similarity.double() - threshold).abs() > 1e-6
    got = cascade.score(TEXT).exit_layers == LAYERS + 2
    assert torch.equal(got[sure], hard[sure])
    assert 0 < int(got.sum()) < got.numel()


def test_an_entry_can_use_the_top2_gap_of_the_base() -> None:
    stack = a_stack("llama")
    probabilities = own_logits(stack, TEXT).softmax(dim=-1).topk(2, dim=-1).values
    gap = (probabilities[..., 0] - probabilities[..., 1]).double()
    threshold = gap.quantile(0.5).item()
    cascade = Cascade(stack)
    cascade.add_stage(a_moved_stage(stack), Entry(LAYERS, threshold, "top2_gap"))
    got = cascade.score(TEXT).exit_layers == LAYERS + 2
    assert torch.equal(got, gap < threshold)


def test_an_entry_can_be_random() -> None:
    stack = a_stack("llama")
    cascade = Cascade(stack)
    cascade.add_stage(a_moved_stage(stack), Entry(LAYERS, 0.3, "random"))
    ids = random_ids(20, 20, seed=5)
    entered = (cascade.score(ids).exit_layers > LAYERS).double().mean()
    assert 0.2 < entered < 0.4
    with pytest.raises(UsageError, match="the rule random can only decide at the exit layer, 4"):
        Cascade(stack).add_stage(a_moved_stage(stack), Entry(3, 0.3, "random"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_fitted_heads_easy_tokens_exit_at_the_entry_layer(family: str) -> None:
    stack, heads = a_stack(family), some_heads(family)
    cascade = Cascade(stack)
    entry = Entry(2, share_of(stack, TEXT, 2), heads=heads)
    cascade.add_stage(a_moved_stage(stack), entry)
    score = cascade.score(TEXT, keep_logits=True)
    easy = score.exit_layers == 2
    assert set(score.exit_layers.flatten().tolist()) == {2, LAYERS + 2}
    ridge = heads.head(stack, 2).logits(visited(stack, TEXT)[2][easy])
    assert apart(logits_of(score)[easy], ridge.float()) <= CLOSE
    if cascade.early_exit().fallback_reason is None:
        hard = int((~easy).sum())
        assert score.counts.layer_rows == [60, 60, *[hard] * 4]


def test_the_entry_of_a_second_stage_must_lie_above_the_first() -> None:
    cascade = ends(a_stack("llama"), [0.5])
    heads = fit_heads(cascade.stack, random_blocks(), [2])
    with pytest.raises(UsageError, match=r"above layer 4, .* got layer 2") as caught:
        cascade.add_stage(a_moved_stage(cascade.stack), Entry(2, 0.5, heads=heads))
    one_line(caught)
    assert len(cascade.stages) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry(0, 0.5), "expected an exit layer in 1..4, got 0"),
        (Entry(5, 0.5), "expected an exit layer in 1..4, got 5"),
        (Entry(3, 2.0), "expected a threshold in this range"),
        (Entry(3, math.nan), "expected a threshold in this range"),
        (Entry(3, 0.5, "nearness"), "expected a rule among"),
        (Entry(3, 0.5, "top2_gap"), "expected cosine or mean_cosine to decide at layer 3"),
    ],
)
def test_an_invalid_entry_is_refused(entry: Entry, message: str) -> None:
    cascade = Cascade(a_stack("llama"))
    with pytest.raises(UsageError, match=message) as caught:
        cascade.add_stage(a_moved_stage(a_stack("llama")), entry)
    one_line(caught)
    assert (cascade.stages, cascade.stack) == ([], cascade.base)


def test_with_entries_of_uses_the_entries_of_another_cascade() -> None:
    one, other = a_cascade("llama"), a_cascade("llama", rule="random")
    same = one.with_entries_of(other)
    assert same.stage_entries == other.stage_entries
    assert same.stages == one.stages
    assert torch.equal(same.score(TEXT).exit_layers, other.score(TEXT).exit_layers)
    with pytest.raises(UsageError, match="expected a cascade with 2 stages, got 1"):
        one.with_entries_of(a_cascade("llama", stages=1))


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("tokenizer_hash", "another", "another tokenizer"),
        ("vocab_size", 98, "another vocabulary"),
        ("weights_hash", "another", "another base model"),
    ],
)
def test_a_stage_trained_for_another_base_is_refused(name: str, other: Any, message: str) -> None:
    stack = DecoderStack(tiny_model("llama"), provenance={"tokenizer_hash": "sha256:own"})
    base = {
        "tokenizer_hash": "sha256:own",
        "vocab_size": 97,
        "weights_hash": stack.weights_in_memory(),
    }
    stage = a_moved_stage(stack)
    stage.provenance = StageProvenance(base=from_plain(base, StageBase))
    Cascade(stack).add_stage(stage, Entry(3, 0.5))
    stage.provenance = StageProvenance(base=from_plain(base | {name: other}, StageBase))
    with pytest.raises(ModelError, match=f"{message} \\(expected {other}, got") as caught:
        Cascade(stack).add_stage(stage, Entry(3, 0.5))
    one_line(caught)
