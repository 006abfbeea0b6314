"""The faults that made the first CASCADE five times worse, planted one by one: the suite goes red.

Scratch weights without zeroed outputs, hard tokens of different sequences glued together, positions
lost, the exit on the normed row, and selection by hard tokens alone. Each has its law, which holds
without the fault and is broken by it; where the code itself refuses, that is shown as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from support.reference_early_exit import CLOSE, a_stack, one_line, own_logits, visited
from support.tiny_stages import TEXT, a_moved_stage, a_reader, share_of, some_hard_tokens, some_text
from torch import Tensor

from cascade.core.errors import TrainingError, UnsupportedModelError
from cascade.exits.rules import ExitPoint
from cascade.models.stack import DecoderStack
from cascade.stages import stage as stages
from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.dataset import Batch, HardTokens
from cascade.stages.hard_tokens.plan import CollectingConfig
from cascade.stages.records import HeldOutEvaluation
from cascade.stages.stage import Stage, extended, new_stage
from cascade.stages.trainer import stage_module
from cascade.stages.trainer.stage_module import StageModule
from cascade.stages.training import Training, train_stage
from cascade.stages.training_config import STARTS, TrainingConfig

SHORT = TrainingConfig(epochs=1, evaluations_per_epoch=2, learning_rate=3e-3)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> HardTokens:
    return some_hard_tokens(tmp_path_factory.mktemp("hard") / "d")


@contextlib.contextmanager
def goes_red() -> Iterator[None]:
    with pytest.raises(AssertionError):
        yield


# --- Scratch weights without zeroed outputs ---------------------------------------------------


def law_of_the_identity() -> None:
    stack = a_stack("llama")
    for start in STARTS:
        longer = extended(stack, new_stage(stack, 2, start=start))
        assert torch.equal(own_logits(longer, TEXT), own_logits(stack, TEXT))


def test_scratch_weights_that_are_not_zeroed_are_seen(
    tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law_of_the_identity()
    monkeypatch.setattr(stages, "zero_outputs", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="would not start as the identity"):
        new_stage(a_reader(), start="fresh")
    monkeypatch.setattr(stages, "check_identity", lambda *_: None)
    with goes_red():
        law_of_the_identity()
    config = structs.replace(SHORT, start="fresh")
    with pytest.raises(TrainingError, match="not the identity on the held-out states") as caught:
        train_stage(a_reader(), tokens, config, tmp_path)
    one_line(caught)


# --- Glued sequences, lost positions: where the stage is run -----------------------------------


def law_of_stored_states() -> None:
    """What training runs is the cascade's own pass."""
    stack = a_stack("llama")
    stage = a_moved_stage(stack)
    cascade = Cascade(stack)
    cascade.add_stage(stage, Entry(3, share_of(stack, TEXT, 3)))
    score = cascade.score(TEXT, keep_logits=True)
    entering = score.exit_layers > stack.num_layers
    with torch.no_grad():
        states = stage_module.run_stage(stack, stage, TEXT, visited(stack, TEXT)[-1], entering)
    assert score.logits is not None
    assert (stack.decode(states) - score.logits).abs().max() <= CLOSE


def glued(
    stack: DecoderStack, stage: Stage, ids: Tensor, states: Tensor, entering: Tensor
) -> Tensor:
    """Run a stage over the hard tokens of all sequences in one row, as the first CASCADE did."""
    made = states.clone()
    row, row_ids = states[entering], ids[entering]
    for some in torch.arange(len(row)).split(stack.max_positions or 64):
        own = torch.ones((1, len(some)), dtype=torch.bool)
        made_row = stages.run_stage(stack, stage, row_ids[some][None], row[some][None], own)
        where = tuple(axis[some] for axis in torch.nonzero(entering, as_tuple=True))
        made = made.index_put(where, made_row[0])
    return made


def without_the_easy(
    stack: DecoderStack, stage: Stage, ids: Tensor, states: Tensor, entering: Tensor
) -> Tensor:
    """Run a stage over each sequence's hard tokens, as if they stood side by side."""
    rows = []
    for number in range(len(ids)):
        one = slice(number, number + 1)
        rows.append(glued(stack, stage, ids[one], states[one], entering[one]))
    return torch.cat(rows)


def nowhere(
    stack: DecoderStack, stage: Stage, ids: Tensor, states: Tensor, entering: Tensor
) -> Tensor:
    """Run a stage with every token at position 0."""
    calls = stack.plan(ids, position_ids=torch.zeros_like(ids)).calls
    hidden = states
    for source, layer in zip(stage.sources, stage.layers, strict=True):
        output = stages.run_in_fp32(layer, hidden, calls[source - 1])
        hidden = torch.where(entering[..., None], output, states)
    return hidden


@pytest.mark.parametrize("fault", [glued, without_the_easy, nowhere], ids=lambda f: f.__name__)
def test_a_stage_that_is_run_otherwise_is_seen(
    fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    law_of_stored_states()
    monkeypatch.setattr(stage_module, "run_stage", fault)
    with goes_red():
        law_of_stored_states()


# --- Glued sequences, lost positions: in what is stored ----------------------------------------


def law_of_whole_sequences(tokens: HardTokens) -> None:
    """Every row is a sequence of the corpus, whole and in order, with the model's own states."""
    for split, blocks in some_text().items():
        for batch in tokens.batches(split, 16):
            ids = torch.from_numpy(blocks.ids)[batch["sequence"]].long()
            assert torch.equal(batch["input_ids"], ids)
            assert torch.equal(batch["labels"][:, :-1], ids[:, 1:])
            assert bool((batch["positions"] == torch.arange(ids.shape[1])).all())
            states = visited(a_reader(), ids)[-1]
            assert torch.allclose(batch["states"], states, rtol=2**-10, atol=1e-5)


def glued_batch(batch: Batch) -> Batch:
    """Keep the hard tokens alone, in rows of the same length, whatever sequence they are of."""
    length, hard = batch["hard"].shape[1], batch["hard"]
    rows = int(hard.sum()) // length
    return {
        name: values
        if name == "sequence"
        else values[hard][: rows * length].unflatten(0, (rows, length))
        for name, values in batch.items()
    }


def glued_and_renumbered(batch: Batch) -> Batch:
    made = glued_batch(batch)
    made["positions"] = torch.arange(made["positions"].shape[1]).expand_as(made["positions"])
    return made


def shifted(batch: Batch) -> Batch:
    return batch | {"positions": batch["positions"] + 1}


@pytest.mark.parametrize(
    "fault", [glued_batch, glued_and_renumbered, shifted], ids=lambda f: f.__name__
)
def test_sequences_that_are_not_whole_are_seen_and_refused(
    fault: Callable[[Batch], Batch],
    tokens: HardTokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    law_of_whole_sequences(tokens)
    sound = HardTokens.batches

    def batches(self: HardTokens, *args: Any, **settings: Any) -> Iterator[Batch]:
        yield from map(fault, sound(self, *args, **settings))

    monkeypatch.setattr(HardTokens, "batches", batches)
    with goes_red():
        law_of_whole_sequences(tokens)
    with pytest.raises(TrainingError, match="expected whole sequences") as caught:
        train_stage(a_reader(), tokens, SHORT, tmp_path)
    one_line(caught)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_sequences_that_are_not_whole_are_refused_in_either_split(
    split: str, tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = HardTokens.batches

    def batches(self: HardTokens, name: str, *args: Any, **settings: Any) -> Iterator[Batch]:
        found = sound(self, name, *args, **settings)
        yield from map(shifted, found) if name == split else found

    monkeypatch.setattr(HardTokens, "batches", batches)
    with pytest.raises(TrainingError, match="expected whole sequences"):
        train_stage(a_reader(), tokens, SHORT, tmp_path)


# --- The exit on the normed row ---------------------------------------------------------------


def law_of_the_residual_stream(folder: Path) -> None:
    """The last layer's similarity is that of its input and its own output, before the norm."""
    stack = a_reader()
    found = some_hard_tokens(folder, stack, layer=4)
    (batch,) = found.batches("held-out", 1000)
    history = visited(stack, batch["input_ids"])
    similarity = torch.cosine_similarity(history[3], history[4], dim=-1)
    assert torch.allclose(batch["similarity"], similarity, atol=1e-5)
    cascade = Cascade(stack)
    cascade.add_stage(a_moved_stage(stack), Entry(4, found.threshold))
    entered = cascade.score(batch["input_ids"], torch.ones_like(batch["input_ids"])).exit_layers > 4
    sure = (similarity - found.threshold).abs() > 1e-5
    assert torch.equal(entered[sure], (similarity < found.threshold)[sure])


def test_an_exit_on_the_normed_row_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    law_of_the_residual_stream(tmp_path / "sound")

    def normed(at: ExitPoint, layer: int) -> Tensor:
        before, after = at.history.pair(layer)
        norm: Any = a_reader().decoder.norm
        return torch.cosine_similarity(before, norm(after) if layer == 4 else after, dim=-1)

    monkeypatch.setattr(ExitPoint, "similarity", normed)
    with goes_red():
        law_of_the_residual_stream(tmp_path / "planted")


# --- Selection by hard tokens alone -----------------------------------------------------------


def law_of_never_worse(done: Training) -> None:
    """The chosen stage is not worse than none, neither over all text nor over response text."""
    assert done.chosen.ratios["all"] <= 1
    assert done.chosen.ratios["response"] <= 1


def learns_all_but_the_response(self: Any, **batch: Tensor) -> dict[str, Tensor]:
    """Lower the loss of tokens that flatter, and raise that of response text."""
    selected = self.selected(batch)
    counted = selected & (batch["labels"] >= 0)
    losses = self.losses(self.states(batch, selected)[counted], batch["labels"][counted])
    response = batch["response"].roll(-1, dims=1)[counted]
    return {"loss": (torch.where(response, -1.0, 1.0) * losses).mean()}


def test_selection_by_hard_tokens_alone_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Marks that a stage can tell apart at once: the last letters of the alphabet.
    splits = {
        split: dataclasses.replace(blocks, response=blocks.ids > 85)
        for split, blocks in some_text().items()
    }
    tokens = collect_hard(
        a_reader(), splits, tmp_path / "d", CollectingConfig(layer=3, hard_ratio=0.5)
    )
    monkeypatch.setattr(StageModule, "forward", learns_all_but_the_response)
    done = train_stage(a_reader(), tokens, SHORT, tmp_path / "sound")
    assert any(one.ratios["hard"] < 1 < one.ratios["response"] for one in done.evaluations)
    law_of_never_worse(done)
    monkeypatch.setattr(HeldOutEvaluation, "worst", property(lambda one: one.ratios["hard"]))
    planted = train_stage(a_reader(), tokens, SHORT, tmp_path / "planted")
    assert planted.chosen.step > 0
    with goes_red():
        law_of_never_worse(planted)
