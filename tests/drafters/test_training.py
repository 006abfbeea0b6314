"""The training of a drafter: it learns, it resumes to the bit, and its checkpoints are checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.tiny_drafters import (
    BRIEF,
    LAYERS,
    a_drafted_stack,
    a_moved_network,
    generated,
    jobs,
    some_texts,
)
from torch.nn import functional

from cascade.core.errors import OutputError, TrainingError
from cascade.drafters.acceptance import evaluation_of
from cascade.drafters.config import ARCHITECTURES, Architecture
from cascade.drafters.making import NoProgress
from cascade.drafters.network.drafter_network import CascadeNetwork, DraftHead, embeddings_of
from cascade.drafters.network.layers import rotary_tables
from cascade.drafters.records import DraftEvaluation
from cascade.drafters.texts.batches import GeneratedText
from cascade.drafters.training import (
    NetworkTraining,
    TrainedNetwork,
    TrainingData,
    fit_inputs,
    usual_precision,
)

TOKENS = torch.arange(1, 97, 2)


class Stopped(Exception):  # noqa: N818
    """An interruption of a training."""


class Noted(NoProgress):
    """Keeps what a training reports, and stops it after a step."""

    def __init__(self, stop: int = 0) -> None:
        self.starts: list[tuple[int, int]] = []
        self.steps: list[int] = []
        self.evaluations: list[DraftEvaluation] = []
        self.stop = stop

    def started(self, steps: int, done: int) -> None:
        self.starts.append((steps, done))

    def step_done(self, step: int) -> None:
        self.steps.append(step)
        if step == self.stop:
            raise Stopped

    def evaluated(self, evaluation: DraftEvaluation) -> None:
        self.evaluations.append(evaluation)


@functools.cache
def train_texts(family: str = "llama") -> tuple[GeneratedText, ...]:
    return tuple(generated(a_drafted_stack(family), jobs(40, seed=100), batch_size=8))


def a_training(family: str = "llama", request: str = "a", **changes: Any) -> NetworkTraining:
    stack = a_drafted_stack(family)
    head = DraftHead(stack, TOKENS, torch.float32)
    data = TrainingData(stack, train_texts(family), some_texts(family), head)
    return NetworkTraining(data, LAYERS, replace(BRIEF, **changes), "float32", {"request": request})


def run(
    folder: Path, progress: Any = None, *, resume: bool = False, **changes: Any
) -> TrainedNetwork:
    return a_training(**changes).run(folder, resume=resume, progress=progress or NoProgress())


def weights_of(trained: TrainedNetwork) -> dict[str, torch.Tensor]:
    return trained.network.state_dict()


def same(one: TrainedNetwork, other: TrainedNetwork) -> bool:
    mine, theirs = weights_of(one), weights_of(other)
    return (
        mine.keys() == theirs.keys()
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
        and one.evaluations == other.evaluations
        and one.chosen == other.chosen
    )


def loss_of(training: NetworkTraining) -> float:
    with torch.no_grad():
        return float(training.loss(training.data.train))


def test_closed_form_predicts_the_next_input_of_the_layer() -> None:
    stack = a_drafted_stack()
    network, embedding = CascadeNetwork(stack, LAYERS), embeddings_of(stack)
    fit_inputs(network, embedding, train_texts())
    errors = {"first": 0.0, "later": 0.0, "mean": 0.0}
    wanted = torch.cat([text.features[1:, 2].float() for text in train_texts()])
    with torch.no_grad():
        for text in train_texts():
            states = text.features.float()
            embedded, target = embedding[text.ids[1:-1].long()], states[1:, 2]
            first = network.first_input(embedded, states[:-1])
            later = network.next_input(embedded, states[:-1, 2])
            errors["first"] += float((first - target).square().sum())
            errors["later"] += float((later - target).square().sum())
            errors["mean"] += float((wanted.mean(0) - target).square().sum())
    assert errors["first"] < 0.3 * errors["mean"]
    assert errors["first"] < errors["later"] < 0.8 * errors["mean"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_training_lowers_the_loss(family: str, architecture: Architecture, tmp_path: Path) -> None:
    training = a_training(family, steps=60, learning_rate=5e-3, architecture=architecture)
    losses = {}

    class Measured(NoProgress):
        def step_done(self, step: int) -> None:
            losses[step] = loss_of(training)

    training.run(tmp_path, resume=False, progress=Measured())
    # It cannot fall far: half of it is at least the entropy of a random model.
    assert losses[60] < 0.9 * losses[1]


def test_weights_are_those_of_the_best_evaluation(tmp_path: Path) -> None:
    training = a_training(steps=30, evaluations=3, learning_rate=5e-3)
    trained = training.run(tmp_path, resume=False, progress=NoProgress())
    assert [each.step for each in trained.evaluations] == [0, 10, 20, 30]
    best = max(each.tokens_per_pass for each in trained.evaluations)
    assert trained.chosen.tokens_per_pass == best
    selection = training.data.selection
    again = evaluation_of(trained.chosen.step, selection, training.chains(selection))
    assert again == trained.chosen


def test_texts_that_judge_may_be_longer_than_those_of_the_training() -> None:
    training, short = a_training(), train_texts()[0]
    longer = GeneratedText(
        torch.cat([short.ids] * 5),
        short.prompt,
        True,
        torch.cat([short.features, short.features[-1:]]).repeat(5, 1, 1)[:-1],
    )
    assert len(longer.ids) > max(len(text.ids) for text in training.data.train)
    (found,) = training.chains([longer])
    assert len(found.hits) == len(longer.ids) - 1 - longer.prompt


def test_loss_is_the_cross_entropy_of_each_draft_step() -> None:
    training = a_training(draft_steps=3)
    training.network = a_moved_network(training.data.stack)
    stack, head = training.data.stack, training.data.head
    batch = train_texts()[:5]
    total = torch.zeros(3)
    weight = torch.zeros(3)
    with torch.no_grad():
        for text in batch:
            rows = len(text.ids) - 2
            states = training.network.unroll(
                embeddings_of(stack)[text.ids[1:-1].long()][None],
                text.features[None, :rows],
                rotary_tables(stack, rows),
                3,
            )
            for step in range(3):
                for row in range(rows):
                    behind = row - step >= text.prompt - 1
                    counts = 1.0 if behind else 0.4 if step == 0 else 0.0
                    logits = head.logits(training.network.norm(states[step][0, row]))
                    own = head.logits(text.features[row + 1, -1].float())
                    soft = functional.cross_entropy(logits, own.softmax(-1))
                    hard = functional.cross_entropy(logits, own.argmax())
                    total[step] += counts * (soft + hard) / 2
                    weight[step] += counts
        wanted = sum(0.8**step * total[step] / weight[step] for step in range(3))
        torch.testing.assert_close(training.loss(batch), wanted)


def test_the_same_training_gives_the_same_weights(tmp_path: Path) -> None:
    assert same(run(tmp_path / "a"), run(tmp_path / "b"))
    assert not same(run(tmp_path / "a"), run(tmp_path / "c", seed=1))


@pytest.mark.parametrize("stop", [5, 8])
def test_an_interrupted_training_resumes_to_the_bit(tmp_path: Path, stop: int) -> None:
    whole = Noted()
    wanted = run(tmp_path / "whole", whole)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", Noted(stop))
    resumed = Noted()
    found = run(tmp_path / "cut", resumed, resume=True)
    assert same(found, wanted)
    assert resumed.starts == [(8, 4)]
    assert resumed.steps == [5, 6, 7, 8]
    assert resumed.evaluations == whole.evaluations


def test_a_finished_training_resumes_without_a_step(tmp_path: Path) -> None:
    wanted, shown = run(tmp_path), Noted()
    assert same(run(tmp_path, shown, resume=True), wanted)
    assert (shown.starts, shown.steps) == ([(8, 8)], [])


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, evaluations=4)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-000006.safetensors", "step-000008.safetensors"]


def test_a_new_training_removes_earlier_checkpoints(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(Stopped):
        run(tmp_path, Noted(1))
    assert list(tmp_path.iterdir()) == []


def test_without_a_checkpoint_nothing_resumes(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no checkpoint in .* train without --resume"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "name"), [({"learning_rate": 0.1}, "config"), ({"request": "b"}, "request")]
)
def test_checkpoints_of_another_training_are_refused(
    tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    run(tmp_path)
    with pytest.raises(TrainingError, match=rf"belong to another run \({name} differs\)"):
        run(tmp_path, resume=True, **changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: b"",
        lambda data: b"{}" * 9,
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    ],
)
def test_a_torn_or_edited_checkpoint_is_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    run(tmp_path)
    path = tmp_path / "step-000008.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TrainingError, match=r"cannot resume from .*step-000008.* torn or edited"):
        run(tmp_path, resume=True)
    path.unlink()
    shown = Noted()
    run(tmp_path, shown, resume=True)
    assert shown.starts == [(8, 4)]


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss of the drafter is .* choose a smaller --lr"):
        run(tmp_path, learning_rate=1e30, steps=30)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises((OutputError, TrainingError), match="choose another --output"):
        run(tmp_path / "file")


def test_the_model_and_its_weights_are_not_changed(tmp_path: Path) -> None:
    before = a_drafted_stack().weights_in_memory()
    run(tmp_path)
    assert a_drafted_stack().weights_in_memory() == before


def test_bfloat16_products_train_about_the_same(tmp_path: Path) -> None:
    training = a_training()
    training.network = a_moved_network(training.data.stack)
    exact = loss_of(training)
    training.precision = "bfloat16"
    assert loss_of(training) == pytest.approx(exact, rel=0.05)  # 8 bits
    assert usual_precision() in ("bfloat16", "float32")
