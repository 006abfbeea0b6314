"""Test training: the result is never worse than no stage, and the base is never run or changed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from support.reference_early_exit import (
    one_line,
    own_logits,
)
from support.tiny_models import tiny_model, tiny_tokenizer
from support.tiny_stages import (
    SHORT,
    a_reader,
    held_out,
    some_hard_tokens,
    some_text,
)
from torch import Tensor

from cascade.core.errors import (
    ModelError,
    TrainingError,
)
from cascade.core.records import to_json
from cascade.core.schema import to_plain
from cascade.models.stack import DecoderStack
from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.hard_tokens.plan import CollectingConfig
from cascade.stages.stage import extended, new_stage
from cascade.stages.trainer.stage_module import (
    SCOPES,
    StageModule,
)
from cascade.stages.trainer.stage_trainer import NoProgress
from cascade.stages.training import Training, train_stage


def by_hand(cascade: Cascade, scope: str) -> float:
    """Return a cascade's perplexity over the held-out split, computed from a score."""
    score = cascade.score(held_out())
    blocks = some_text()["held-out"]
    assert blocks.response is not None
    counted = torch.ones_like(score.scored)
    if "response" in scope:
        counted &= torch.from_numpy(blocks.response[:, 1:])
    if "hard" in scope:
        counted &= (cascade.score(held_out()).exit_layers > cascade.base.num_layers)[:, :-1]
    return math.exp(-float(score.log_probabilities[counted].double().mean()))


def test_training_lowers_the_held_out_perplexity(trained: Training, tokens: HardTokens) -> None:
    assert trained.chosen.step > 0
    assert trained.chosen.worst < 0.97
    assert trained.evaluations[0].step == 0
    assert set(trained.evaluations[0].ratios.values()) == {1.0}
    assert trained.chosen == min(trained.evaluations, key=lambda evaluation: evaluation.worst)
    assert trained.steps == 2 * math.ceil(len(tokens.split("train")) / 8)


def test_training_figures_match_those_of_the_whole_cascade(
    trained: Training, tokens: HardTokens
) -> None:
    cascade, alone = (Cascade(a_reader()) for _ in range(2))
    cascade.add_stage(trained.stage, Entry(tokens.layer, tokens.threshold))
    alone.add_stage(new_stage(a_reader(), 2), Entry(tokens.layer, tokens.threshold))
    assert tuple(trained.chosen.ratios) == SCOPES
    for scope in SCOPES:
        with_stage, without = (by_hand(one, scope) for one in (cascade, alone))
        # The dataset stores states in float16.
        assert trained.perplexities[scope] == pytest.approx(without, rel=2e-3)
        assert trained.chosen.ratios[scope] == pytest.approx(with_stage / without, rel=2e-3)


@pytest.mark.parametrize("start", ["copies", "fresh"])
def test_the_identity_is_chosen_if_training_makes_the_stage_worse(
    start: Any, tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = StageModule.forward

    def negated(self: Any, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": -forward(self, **batch)["loss"]}

    monkeypatch.setattr(StageModule, "forward", negated)
    config = structs.replace(SHORT, start=start, epochs=1)
    done = train_stage(a_reader(), tokens, config, tmp_path)
    assert done.steps > 0
    assert min(evaluation.worst for evaluation in done.evaluations[1:]) > 1.1
    assert (done.chosen.step, done.chosen.worst) == (0, 1.0)
    assert done.stage.fingerprint() == new_stage(a_reader(), 2, start=start).fingerprint()
    ids = held_out()[:4]
    assert torch.equal(
        own_logits(extended(a_reader(), done.stage), ids), own_logits(a_reader(), ids)
    )
    assert done.provenance.chosen_step == 0


def test_training_neither_changes_nor_runs_the_base(tokens: HardTokens, tmp_path: Path) -> None:
    stack = DecoderStack(tiny_model("llama"), tokenizer=tiny_tokenizer())
    own: list[Any] = [layer.self_attn for layer in stack.layers]
    runs = []

    def note(module: Any, *_: Any) -> None:
        if any(module is attention for attention in own):  # the stage's copies have this hook too
            runs.append(module)

    for attention in own:
        attention.register_forward_pre_hook(note)
    before = stack.weights_in_memory()
    flags = [value.requires_grad for value in stack.model.parameters()]
    train_stage(stack, tokens, structs.replace(SHORT, epochs=0.3), tmp_path)
    assert not runs
    assert stack.weights_in_memory() == before
    assert [value.requires_grad for value in stack.model.parameters()] == flags
    assert all(value.grad is None for value in stack.model.parameters())


def test_changing_the_weights_of_the_base_is_an_error(tokens: HardTokens, tmp_path: Path) -> None:
    stack = DecoderStack(tiny_model("llama"), tokenizer=tiny_tokenizer())

    class Changing(NoProgress):
        def step_done(self, step: int) -> None:
            with torch.no_grad():
                stack.lm_head.weight[0, 0] += 1e-3  # type: ignore[operator]

    config = structs.replace(SHORT, epochs=0.1)
    with pytest.raises(TrainingError, match="changed the base's weights") as caught:
        train_stage(stack, tokens, config, tmp_path, progress=Changing())
    one_line(caught)


def test_the_provenance_names_base_tokens_options_and_evaluations(
    trained: Training, tokens: HardTokens
) -> None:
    made = trained.provenance
    assert trained.stage.provenance == made
    assert made.base.weights_hash == a_reader().weights_hash()
    assert (made.tokens.layer, made.tokens.threshold) == (3, tokens.threshold)
    assert made.tokens.splits == tokens.record.splits
    splits = [made.tokens.corpora[split].record_split for split in ("train", "held-out")]
    assert splits == ["train", "held-out"]
    assert made.config == SHORT
    assert (made.steps, made.chosen_step) == (trained.steps, trained.chosen.step)
    assert [one.step for one in made.evaluations] == [one.step for one in trained.evaluations]


def test_training_is_reproducible(trained: Training, tokens: HardTokens, tmp_path: Path) -> None:
    again = train_stage(a_reader(), tokens, SHORT, tmp_path)
    assert again.evaluations == trained.evaluations
    assert again.stage.fingerprint() == trained.stage.fingerprint()
    other = train_stage(a_reader(), tokens, structs.replace(SHORT, seed=1), tmp_path / "b")
    assert other.stage.fingerprint() != trained.stage.fingerprint()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom"])
def test_other_families_train(family: str, tmp_path: Path) -> None:
    stack = a_reader(family)
    found = some_hard_tokens(tmp_path / "d", stack)
    done = train_stage(stack, found, structs.replace(SHORT, epochs=1), tmp_path / "c")
    assert done.chosen.worst < 1


def test_a_separate_head_is_trained(tokens: HardTokens, tmp_path: Path) -> None:
    config = structs.replace(SHORT, own_head=True, epochs=1)
    done = train_stage(a_reader(), tokens, config, tmp_path)
    assert done.chosen.step > 0
    assert done.stage.head is not None
    weight: Any = done.stage.head.weight
    assert not torch.equal(weight, a_reader().lm_head.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("routing", ["hard", "all", "random"])
def test_a_stage_starts_at_a_ratio_of_exactly_one(
    routing: Any, tokens: HardTokens, tmp_path: Path
) -> None:
    for size in (3, 8):  # the batch size changes how many rows the LM head computes at once
        config = structs.replace(SHORT, routing=routing, batch_size=size)
        done = train_stage(a_reader(), tokens, config, tmp_path, steps=1)
        assert set(done.evaluations[0].ratios.values()) == {1.0}


@pytest.mark.parametrize("bf16", [False, True])
def test_a_stage_with_a_separate_head_starts_at_a_ratio_of_one(bf16: bool, tmp_path: Path) -> None:
    stack = a_reader(bf16=bf16)
    found = some_hard_tokens(tmp_path / "d", stack, dtype="bfloat16")
    config = structs.replace(SHORT, own_head=True)
    done = train_stage(stack, found, config, tmp_path / "c", steps=1)
    assert list(done.evaluations[0].ratios.values()) == pytest.approx([1.0] * 4, abs=1e-5)


def test_training_works_on_text_without_response_tokens(tmp_path: Path) -> None:
    splits = {
        split: dataclasses.replace(blocks, response=np.zeros_like(blocks.response))
        for split, blocks in some_text().items()
    }
    found = collect_hard(
        a_reader(), splits, tmp_path / "d", CollectingConfig(layer=3, hard_ratio=0.5)
    )
    config = structs.replace(SHORT, epochs=0.5)
    done = train_stage(a_reader(), found, config, tmp_path / "c")
    assert set(done.chosen.ratios) == set(done.perplexities) == {"all", "hard"}
    assert done.chosen.worst == done.chosen.ratios["all"] < 1
    to_json(to_plain(done.provenance))


def test_a_stage_of_a_bf16_base_is_trained_in_fp32(tmp_path: Path) -> None:
    stack = a_reader(bf16=True)
    before = stack.weights_in_memory()
    found = some_hard_tokens(tmp_path / "d", stack, dtype="bfloat16")
    done = train_stage(stack, found, structs.replace(SHORT, epochs=1), tmp_path / "c")
    assert done.chosen.worst < 1
    assert {value.dtype for value in done.stage.parameters()} == {torch.float32}
    assert stack.weights_in_memory() == before
    cascade = Cascade(stack)
    cascade.add_stage(done.stage, Entry(3, found.threshold))
    alone = cascade.score(held_out(), stages=0).perplexity
    assert cascade.score(held_out()).perplexity / alone == pytest.approx(
        done.chosen.ratios["all"], abs=0.02
    )


def test_a_second_stage_is_trained_on_the_hard_tokens_of_the_first(
    trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    cascade = Cascade(a_reader())
    stage = new_stage(a_reader(), 2)
    stage.load({name: value.clone() for name, value in trained.stage.weights().items()})
    cascade.add_stage(stage, Entry(tokens.layer, tokens.threshold))
    routed, top = cascade.routed(), cascade.stack.num_layers
    found = some_hard_tokens(tmp_path / "d", routed, layer=top, hard_ratio=0.25)
    done = train_stage(routed, found, structs.replace(SHORT, epochs=1), tmp_path / "c")
    before = cascade.score(held_out())
    cascade.add_stage(done.stage, Entry(found.layer, found.threshold))
    after = cascade.score(held_out())
    ratio = after.perplexity / before.perplexity
    assert ratio == pytest.approx(done.chosen.ratios["all"], rel=5e-3)
    entered = after.exit_layers == cascade.stack.num_layers
    assert not bool((entered & (before.exit_layers < top)).any()), (
        "an easy token entered the second stage"
    )
    assert 0.1 < float(entered.double().mean()) < 0.4


def test_hard_tokens_of_another_model_are_refused(tokens: HardTokens, tmp_path: Path) -> None:
    other = DecoderStack(tiny_model("llama", seed=1), tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match="the hard tokens in") as caught:
        train_stage(other, tokens, SHORT, tmp_path)
    one_line(caught)
    assert not list(tmp_path.iterdir())
