"""Training a stage: never worse than none, it goes on where it stopped, and says what is wrong."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_early_exit import one_line, own_logits
from support.tiny_models import tiny_model, tiny_tokenizer
from support.tiny_stages import a_moved_stage, a_reader, moved, some_hard_tokens, some_text
from torch import Tensor

from cascade.core.errors import ModelError, TrainingError, UsageError
from cascade.core.records import to_json
from cascade.models.stack import DecoderStack
from cascade.stages import training
from cascade.stages.cascades import Cascade, Entry
from cascade.stages.checkpoints import can_resume
from cascade.stages.collecting import collect_hard
from cascade.stages.dataset import HardTokens
from cascade.stages.stage import extended, new_stage
from cascade.stages.training import SCOPES, Look, Training, goes_on, train_stage
from cascade.stages.training_config import Recipe

#: What lowers the held-out perplexity in a second or two.
RECIPE = Recipe(epochs=2, looks=2, learning_rate=3e-3)
Told = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> HardTokens:
    return some_hard_tokens(tmp_path_factory.mktemp("hard") / "d")


@pytest.fixture(scope="module")
def trained(tokens: HardTokens, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A whole training; for tests that leave it as it is."""
    return train_stage(a_reader(), tokens, RECIPE, tmp_path_factory.mktemp("checkpoints"))


def held_out() -> Tensor:
    return torch.from_numpy(some_text()["held-out"].ids).long()


def by_hand(cascade: Cascade, scope: str) -> float:
    """Return a cascade's perplexity over the held-out part by another way than training's."""
    score = cascade.score(held_out())
    blocks = some_text()["held-out"]
    assert blocks.response is not None
    counted = torch.ones_like(score.scored)
    if "response" in scope:
        counted &= torch.from_numpy(blocks.response[:, 1:])
    if "hard" in scope:
        counted &= (cascade.score(held_out()).exit_layers > cascade.base.num_layers)[:, :-1]
    return math.exp(-float(score.log_probabilities[counted].double().mean()))


# --- What comes out ---------------------------------------------------------------------------


def test_training_lowers_the_held_out_perplexity(trained: Training, tokens: HardTokens) -> None:
    assert trained.chosen.step > 0
    assert trained.chosen.worst < 0.97
    assert trained.looks[0].step == 0
    assert set(trained.looks[0].ratios.values()) == {1.0}
    assert trained.chosen == min(trained.looks, key=lambda look: look.worst)
    assert trained.steps == 2 * math.ceil(len(tokens.part("train")) / 8)


def test_its_figures_are_those_of_the_whole_cascade(trained: Training, tokens: HardTokens) -> None:
    cascade, alone = (Cascade(a_reader()) for _ in range(2))
    cascade.add_stage(trained.stage, Entry(tokens.layer, tokens.threshold))
    alone.add_stage(new_stage(a_reader(), 2), Entry(tokens.layer, tokens.threshold))
    assert tuple(trained.chosen.ratios) == SCOPES
    for scope in SCOPES:
        with_stage, without = (by_hand(one, scope) for one in (cascade, alone))
        # The dataset's states went through float16.
        assert trained.perplexities[scope] == pytest.approx(without, rel=2e-3)
        assert trained.chosen.ratios[scope] == pytest.approx(with_stage / without, rel=2e-3)


def test_a_token_counts_by_the_text_that_it_predicts(tokens: HardTokens) -> None:
    (batch,) = tokens.batches("held-out", 1000)
    found = dict(zip(SCOPES, training._scopes(batch, batch["hard"]), strict=True))
    rows, length = batch["input_ids"].shape
    for row in range(rows):
        for place in range(length):
            there = place + 1 < length  # the last token predicts nothing of its sequence
            response = there and bool(batch["response"][row, place + 1])
            hard = bool(batch["hard"][row, place])
            expected = [there, there and hard, response, response and hard]
            assert [bool(found[scope][row, place]) for scope in SCOPES] == expected


@pytest.mark.parametrize("start", ["copies", "fresh"])
def test_where_learning_hurts_the_identity_is_chosen(
    start: Any, tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = training._StageModule.forward

    def the_wrong_way(self: Any, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": -forward(self, **batch)["loss"]}

    monkeypatch.setattr(training._StageModule, "forward", the_wrong_way)
    recipe = dataclasses.replace(RECIPE, start=start, epochs=1)
    done = train_stage(a_reader(), tokens, recipe, tmp_path)
    assert done.steps > 0
    assert min(look.worst for look in done.looks[1:]) > 1.1
    assert (done.chosen.step, done.chosen.worst) == (0, 1.0)
    assert done.stage.fingerprint() == new_stage(a_reader(), 2, start=start).fingerprint()
    ids = held_out()[:4]
    assert torch.equal(
        own_logits(extended(a_reader(), done.stage), ids), own_logits(a_reader(), ids)
    )
    assert done.stage.provenance["chosen_step"] == 0


def test_the_base_is_not_touched_and_never_run(tokens: HardTokens, tmp_path: Path) -> None:
    stack = DecoderStack(tiny_model("llama"), tokenizer=tiny_tokenizer())
    own: list[Any] = [layer.self_attn for layer in stack.layers]
    runs = []

    def note(module: Any, *_: Any) -> None:
        if any(module is part for part in own):  # a stage's copies have this hook too
            runs.append(module)

    for part in own:
        part.register_forward_pre_hook(note)
    before = stack.weights_in_memory()
    flags = [value.requires_grad for value in stack.model.parameters()]
    train_stage(stack, tokens, dataclasses.replace(RECIPE, epochs=0.3), tmp_path)
    assert not runs
    assert stack.weights_in_memory() == before
    assert [value.requires_grad for value in stack.model.parameters()] == flags
    assert all(value.grad is None for value in stack.model.parameters())


def test_gradients_into_the_base_are_noticed(tokens: HardTokens, tmp_path: Path) -> None:
    stack = DecoderStack(tiny_model("llama"), tokenizer=tiny_tokenizer())

    def told(kind: str, about: dict[str, Any]) -> None:
        if kind == "step":
            with torch.no_grad():
                stack.lm_head.weight[0, 0] += 1e-3  # type: ignore[operator]

    with pytest.raises(AssertionError, match="changed the base's weights"):
        train_stage(stack, tokens, dataclasses.replace(RECIPE, epochs=0.1), tmp_path, told=told)


def test_the_record_says_how_it_came_about(trained: Training, tokens: HardTokens) -> None:
    about = trained.stage.provenance
    assert about["base"]["weights_hash"] == a_reader().weights_hash()
    assert (about["tokens"]["layer"], about["tokens"]["threshold"]) == (3, tokens.threshold)
    assert about["tokens"]["parts"] == tokens.record["parts"]
    splits = [about["tokens"]["corpora"][part]["part"] for part in ("train", "held-out")]
    assert splits == ["train", "held-out"]
    assert about["recipe"] == dataclasses.asdict(RECIPE)
    assert (about["steps"], about["chosen_step"]) == (trained.steps, trained.chosen.step)
    assert [look["step"] for look in about["looks"]] == [look.step for look in trained.looks]


def test_a_training_can_be_repeated(trained: Training, tokens: HardTokens, tmp_path: Path) -> None:
    again = train_stage(a_reader(), tokens, RECIPE, tmp_path)
    assert again.looks == trained.looks
    assert again.stage.fingerprint() == trained.stage.fingerprint()
    other = train_stage(a_reader(), tokens, dataclasses.replace(RECIPE, seed=1), tmp_path / "b")
    assert other.stage.fingerprint() != trained.stage.fingerprint()


def test_the_loss_is_that_of_the_tokens_that_enter(
    tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    losses = training._StageModule.losses

    def counting(self: Any, states: Tensor, labels: Tensor, *, own: bool = True) -> Tensor:
        if torch.is_grad_enabled():
            seen.append((len(labels), int((labels < 0).sum())))
        return losses(self, states, labels, own=own)

    monkeypatch.setattr(training._StageModule, "losses", counting)
    train_stage(
        a_reader(), tokens, RECIPE, tmp_path, steps=math.ceil(len(tokens.part("train")) / 8)
    )
    batches = list(tokens.batches("train", 1000))
    hard = sum(int((batch["hard"] & (batch["labels"] >= 0)).sum()) for batch in batches)
    assert sum(rows for rows, _ in seen) == hard
    assert not any(unlabelled for _, unlabelled in seen)


def test_a_batch_without_hard_tokens_is_passed_over(tmp_path: Path) -> None:
    few = some_hard_tokens(tmp_path / "d", hard_ratio=0.003)
    hard = [bool(batch["hard"].any()) for batch in few.batches("train", 1)]
    assert not all(hard)
    assert any(hard)
    one_by_one = dataclasses.replace(RECIPE, batch_size=1, epochs=1, looks=1)
    done = train_stage(a_reader(), few, one_by_one, tmp_path / "c")
    assert done.steps == len(hard)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom"])
def test_other_families_train(family: str, tmp_path: Path) -> None:
    stack = a_reader(family)
    found = some_hard_tokens(tmp_path / "d", stack)
    done = train_stage(stack, found, dataclasses.replace(RECIPE, epochs=1), tmp_path / "c")
    assert done.chosen.worst < 1


def test_an_own_head_is_trained_and_chosen(tokens: HardTokens, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, own_head=True, epochs=1)
    done = train_stage(a_reader(), tokens, recipe, tmp_path)
    assert done.chosen.step > 0
    assert done.stage.head is not None
    weight: Any = done.stage.head.weight
    assert not torch.equal(weight, a_reader().lm_head.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("routing", ["hard", "all", "random"])
def test_a_stage_starts_at_a_ratio_of_exactly_one(
    routing: Any, tokens: HardTokens, tmp_path: Path
) -> None:
    for size in (3, 8):  # of batches, and so of the rows that go through the LM head together
        recipe = dataclasses.replace(RECIPE, routing=routing, batch_size=size)
        done = train_stage(a_reader(), tokens, recipe, tmp_path, steps=1)
        assert set(done.looks[0].ratios.values()) == {1.0}


@pytest.mark.parametrize("bf16", [False, True])
def test_an_own_head_starts_as_the_models(bf16: bool, tmp_path: Path) -> None:
    stack = a_reader(bf16=bf16)
    found = some_hard_tokens(tmp_path / "d", stack, dtype="bfloat16")
    recipe = dataclasses.replace(RECIPE, own_head=True)
    done = train_stage(stack, found, recipe, tmp_path / "c", steps=1)
    assert list(done.looks[0].ratios.values()) == pytest.approx([1.0] * 4, abs=1e-5)


def test_text_without_any_response_is_trained_on(tmp_path: Path) -> None:
    parts = {
        part: dataclasses.replace(blocks, response=np.zeros_like(blocks.response))
        for part, blocks in some_text().items()
    }
    found = collect_hard(a_reader(), parts, tmp_path / "d", layer=3, hard_ratio=0.5)
    recipe = dataclasses.replace(RECIPE, epochs=0.5)
    done = train_stage(a_reader(), found, recipe, tmp_path / "c")
    assert set(done.chosen.ratios) == set(done.perplexities) == {"all", "hard"}
    assert done.chosen.worst == done.chosen.ratios["all"] < 1
    to_json(done.stage.provenance)


def test_a_bf16_base_keeps_its_weights_and_trains_in_fp32(tmp_path: Path) -> None:
    stack = a_reader(bf16=True)
    before = stack.weights_in_memory()
    found = some_hard_tokens(tmp_path / "d", stack, dtype="bfloat16")
    done = train_stage(stack, found, dataclasses.replace(RECIPE, epochs=1), tmp_path / "c")
    assert done.chosen.worst < 1
    assert {value.dtype for value in done.stage.parameters()} == {torch.float32}
    assert stack.weights_in_memory() == before
    cascade = Cascade(stack)
    cascade.add_stage(done.stage, Entry(3, found.threshold))
    alone = cascade.score(held_out(), stages=0).perplexity
    assert cascade.score(held_out()).perplexity / alone == pytest.approx(
        done.chosen.ratios["all"], abs=0.02
    )


def test_a_second_stage_learns_what_the_first_leaves(
    trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    cascade = Cascade(a_reader())
    stage = new_stage(a_reader(), 2)
    stage.load({name: value.clone() for name, value in trained.stage.weights().items()})
    cascade.add_stage(stage, Entry(tokens.layer, tokens.threshold))
    routed, top = cascade.routed(), cascade.stack.num_layers
    found = some_hard_tokens(tmp_path / "d", routed, layer=top, hard_ratio=0.25)
    done = train_stage(routed, found, dataclasses.replace(RECIPE, epochs=1), tmp_path / "c")
    before = cascade.score(held_out())
    cascade.add_stage(done.stage, Entry(found.layer, found.threshold))
    after = cascade.score(held_out())
    ratio = after.perplexity / before.perplexity
    assert ratio == pytest.approx(done.chosen.ratios["all"], rel=5e-3)
    entered = after.exit_layers == cascade.stack.num_layers
    assert not bool((entered & (before.exit_layers < top)).any()), "an easy token came back"
    assert 0.1 < float(entered.double().mean()) < 0.4


# --- Who learns -------------------------------------------------------------------------------


def test_each_routing_lets_in_its_tokens(tokens: HardTokens) -> None:
    ratio = tokens.record["parts"]["train"]["hard_ratio"]
    (batch,) = tokens.batches("train", 1000)
    assert torch.equal(goes_on(batch, Recipe(), 4, ratio), batch["hard"])
    assert bool(goes_on(batch, Recipe(routing="all"), 4, ratio).all())
    drawn = goes_on(batch, Recipe(routing="random"), 4, ratio)
    assert abs(float(drawn.double().mean()) - ratio) < 0.05
    overlap = float((drawn & batch["hard"]).double().mean())
    assert abs(overlap - ratio * ratio) < 0.06, "random tokens are no others than hard ones"


def test_the_random_routing_is_what_the_random_entry_does(tokens: HardTokens) -> None:
    ratio = tokens.record["parts"]["train"]["hard_ratio"]
    cascade = Cascade(a_reader())
    cascade.add_stage(a_moved_stage(a_reader()), Entry(4, ratio, "random"))
    for batch in tokens.batches("held-out", 16):
        entered = cascade.score(batch["input_ids"], torch.ones_like(batch["input_ids"]))
        drawn = goes_on(batch, Recipe(routing="random"), 4, ratio)
        assert torch.equal(entered.exit_layers > 4, drawn)


@pytest.mark.parametrize("routing", ["all", "random"])
def test_controls_make_the_same_number_of_steps(
    routing: Any, tokens: HardTokens, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, routing=routing, patience=1)
    done = train_stage(a_reader(), tokens, recipe, tmp_path, steps=17)
    assert done.steps == 17
    assert done.stage.provenance["recipe"]["routing"] == routing
    assert done.chosen.worst <= 1


def test_patience_stops(tokens: HardTokens, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        RECIPE, learning_rate=0.3, clipping=1e6, looks=4, epochs=20, patience=2
    )
    done = train_stage(a_reader(), tokens, recipe, tmp_path)
    best = min(done.looks[1:], key=lambda look: look.worst)
    assert done.looks.index(best) + 2 == len(done.looks) - 1
    assert done.steps < 20 * len(tokens.part("train")) / 8


def test_it_is_told_what_happens(tokens: HardTokens, tmp_path: Path) -> None:
    told: Told = []
    done = train_stage(
        a_reader(),
        tokens,
        dataclasses.replace(RECIPE, epochs=1),
        tmp_path,
        told=lambda kind, about: told.append((kind, about)),
    )
    assert [about["step"] for kind, about in told if kind == "step"] == list(
        range(1, done.steps + 1)
    )
    assert [about["step"] for kind, about in told if kind == "look"] == [
        look.step for look in done.looks
    ]
    (start,) = [about for kind, about in told if kind == "start"]
    assert start == {"steps": done.steps, "done": 0}


def test_a_look_is_as_bad_as_its_worse_text() -> None:
    ratios = {"all": 0.7, "hard": 0.5, "response": 1.1, "hard_response": 0.9}
    assert Look(1, ratios).worst == 1.1
    assert Look(1, ratios | {"all": 1.2}).worst == 1.2


# --- Interrupted ------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818
    pass


def stopping_at(step: int) -> Callable[[str, dict[str, Any]], None]:
    def told(kind: str, about: dict[str, Any]) -> None:
        if (kind, about.get("step")) == ("step", step):
            raise Stopped

    return told


@pytest.mark.parametrize("part", [0.35, 0.7, 0.95])
def test_resumed_it_is_what_it_would_have_been(
    part: float, trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        train_stage(
            a_reader(), tokens, RECIPE, tmp_path, told=stopping_at(int(trained.steps * part))
        )
    told: Told = []
    done = train_stage(
        a_reader(),
        tokens,
        RECIPE,
        tmp_path,
        resume=True,
        told=lambda kind, about: told.append((kind, about)),
    )
    (start,) = [about for kind, about in told if kind == "start"]
    assert start["done"] > 0, "it began anew"
    assert done.looks == trained.looks
    assert done.chosen == trained.chosen
    assert done.stage.fingerprint() == trained.stage.fingerprint()
    assert done.stage.provenance == trained.stage.provenance


def test_a_finished_training_resumed_is_itself(
    trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    train_stage(a_reader(), tokens, RECIPE, tmp_path)
    done = train_stage(a_reader(), tokens, RECIPE, tmp_path, resume=True)
    assert (done.looks, done.chosen) == (trained.looks, trained.chosen)
    assert done.stage.fingerprint() == trained.stage.fingerprint()


def stopped(tokens: HardTokens, folder: Path, trained: Training) -> Path:
    """Interrupt a training; return its last checkpoint."""
    with pytest.raises(Stopped):
        train_stage(a_reader(), tokens, RECIPE, folder, told=stopping_at(int(trained.steps * 0.7)))
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_cut_short_is_one_line(
    name: str, trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    last = stopped(tokens, tmp_path, trained)
    path = last / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TrainingError, match="cut short") as caught:
        train_stage(a_reader(), tokens, RECIPE, tmp_path, resume=True)
    assert str(last) in one_line(caught)
    shutil.rmtree(last)  # as it says
    done = train_stage(a_reader(), tokens, RECIPE, tmp_path, resume=True)
    assert done.stage.fingerprint() == trained.stage.fingerprint()


@pytest.mark.parametrize("name", ["model.safetensors", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_file_gone_is_one_line(
    name: str, trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    last = stopped(tokens, tmp_path, trained)
    (last / name).unlink()
    with pytest.raises(TrainingError) as caught:
        train_stage(a_reader(), tokens, RECIPE, tmp_path, resume=True)
    assert str(last) in one_line(caught)


def test_checkpoints_of_another_recipe_are_refused(
    trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    stopped(tokens, tmp_path, trained)
    changes: list[dict[str, Any]] = [
        {"additional_layers": 1},
        {"learning_rate": 1e-3},
        {"routing": "all"},
        {"epochs": 3},
    ]
    for change in changes:
        recipe = dataclasses.replace(RECIPE, **change)
        (name,) = change
        with pytest.raises(TrainingError, match=rf"another recipe \({name} ") as caught:
            train_stage(a_reader(), tokens, recipe, tmp_path, resume=True)
        one_line(caught)
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(TrainingError, match="torn or edited") as caught:
        train_stage(a_reader(), tokens, RECIPE, tmp_path, resume=True)
    one_line(caught)


def test_a_training_that_starts_anew_never_goes_on_from_an_earlier_one(
    trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    stopped(tokens, tmp_path, trained)
    assert can_resume(tmp_path)
    other = dataclasses.replace(RECIPE, seed=1)
    with pytest.raises(Stopped):
        train_stage(a_reader(), tokens, other, tmp_path, told=stopping_at(2))
    assert not can_resume(tmp_path)
    with pytest.raises(TrainingError, match=r"no checkpoint in .* to resume from"):
        train_stage(a_reader(), tokens, other, tmp_path, resume=True)


def test_nothing_to_resume_from_is_one_line(tokens: HardTokens, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no checkpoint in .* to resume from") as caught:
        train_stage(a_reader(), tokens, RECIPE, tmp_path / "none", resume=True)
    one_line(caught)


# --- What goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_names_step_and_checkpoint(
    value: float,
    trained: Training,
    tokens: HardTokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = trained.steps - 1
    forward, calls = training._StageModule.forward, [0]

    def breaking(self: Any, **batch: Tensor) -> dict[str, Tensor]:
        calls[0] += 1
        made = forward(self, **batch)
        return {"loss": made["loss"] * value} if calls[0] == last else made

    monkeypatch.setattr(training._StageModule, "forward", breaking)
    with pytest.raises(TrainingError, match=f"the loss is {value:g} at step {last}") as caught:
        train_stage(a_reader(), tokens, RECIPE, tmp_path)
    text = one_line(caught)
    checkpoints = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints
    assert f"the last good checkpoint, of step {checkpoints[-1]}, is {tmp_path}" in text
    monkeypatch.undo()
    done = train_stage(a_reader(), tokens, RECIPE, tmp_path, resume=True)
    assert done.chosen.worst < 1, "what was kept is no good"


def test_a_loss_that_is_nan_at_once_says_that_nothing_was_kept(
    tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training._StageModule, "forward", lambda self, **_: {"loss": torch.tensor(math.nan)}
    )
    with pytest.raises(TrainingError, match="no checkpoint was made yet") as caught:
        train_stage(a_reader(), tokens, RECIPE, tmp_path)
    one_line(caught)


def test_a_learning_rate_beyond_all_reason_is_one_line(tokens: HardTokens, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, learning_rate=1e30, clipping=1e30)
    with pytest.raises(TrainingError, match=r"not finite at step|the loss is") as caught:
        train_stage(a_reader(), tokens, recipe, tmp_path)
    assert "take a smaller --lr" in one_line(caught)


def test_the_tokens_of_another_model_are_refused(tokens: HardTokens, tmp_path: Path) -> None:
    other = DecoderStack(tiny_model("llama", seed=1), tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match="the hard tokens in") as caught:
        train_stage(other, tokens, RECIPE, tmp_path)
    one_line(caught)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routing": "easy"}, "expected a routing among hard, all, random, got easy"),
        ({"epochs": 0}, "expected epochs above 0, got 0"),
        ({"epochs": math.inf}, "expected epochs above 0, got inf"),
        ({"learning_rate": 0.0}, "expected learning_rate above 0"),
        ({"learning_rate": math.nan}, "expected learning_rate above 0, got nan"),
        ({"clipping": -1.0}, "expected clipping above 0"),
        ({"batch_size": 0}, "expected batch_size above 0"),
        ({"looks": 0}, "expected looks above 0"),
        ({"patience": 0}, "expected patience above 0"),
        ({"weight_decay": -0.1}, "expected weight_decay of 0 or more"),
        ({"seed": -1}, "expected a seed in"),
        ({"additional_layers": 0}, "expected 1 to 4 layers for a stage"),
        ({"start": "zeros"}, "expected a start among copies, fresh"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    change: dict[str, Any], message: str, tokens: HardTokens, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        train_stage(a_reader(), tokens, dataclasses.replace(RECIPE, **change), tmp_path)
    one_line(caught)
    assert not list(tmp_path.iterdir())


def test_tensorboard_that_is_not_installed_is_one_line(
    tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="TensorBoard is not installed") as caught:
        train_stage(a_reader(), tokens, RECIPE, tmp_path / "c", tensorboard=tmp_path / "t")
    one_line(caught)


def test_tensorboard_gets_the_loss_and_every_look(tokens: HardTokens, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=0.5)
    train_stage(a_reader(), tokens, recipe, tmp_path / "c", tensorboard=tmp_path / "t")
    (events,) = (tmp_path / "t").rglob("events.out.tfevents*")
    text = events.read_bytes()
    assert b"loss" in text
    assert b"eval/worst" in text


def test_a_stage_that_starts_elsewhere_is_refused(
    tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = new_stage

    def shifted(*args: Any, **settings: Any) -> Any:
        return moved(made(*args, **settings), by=1e-3)

    monkeypatch.setattr(training, "new_stage", shifted)
    with pytest.raises(TrainingError, match="is not the identity on the held-out states") as caught:
        train_stage(a_reader(), tokens, RECIPE, tmp_path)
    one_line(caught)
    assert not list(tmp_path.iterdir())
