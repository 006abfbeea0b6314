"""Test the loss of a stage: which tokens it covers, and which tokens enter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from support.tiny_stages import (
    SHORT,
    a_moved_stage,
    a_reader,
    some_hard_tokens,
)
from torch import Tensor

from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.trainer.stage_module import (
    SCOPES,
    StageModule,
    scope_masks,
    tokens_entering,
)
from cascade.stages.training import train_stage
from cascade.stages.training_config import TrainingConfig


def test_scopes_count_tokens_by_the_text_they_predict(tokens: HardTokens) -> None:
    (batch,) = tokens.batches("held-out", 1000)
    found = dict(zip(SCOPES, scope_masks(batch, batch["hard"]), strict=True))
    rows, length = batch["input_ids"].shape
    for row in range(rows):
        for position in range(length):
            counted = position + 1 < length  # the last token has no next token in its sequence
            response = counted and bool(batch["response"][row, position + 1])
            hard = bool(batch["hard"][row, position])
            expected = [counted, counted and hard, response, response and hard]
            assert [bool(found[scope][row, position]) for scope in SCOPES] == expected


def test_the_loss_covers_only_entering_tokens(
    tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    losses = StageModule.losses

    def counting(self: Any, states: Tensor, labels: Tensor, *, own: bool = True) -> Tensor:
        if torch.is_grad_enabled():
            seen.append((len(labels), int((labels < 0).sum())))
        return losses(self, states, labels, own=own)

    monkeypatch.setattr(StageModule, "losses", counting)
    train_stage(
        a_reader(), tokens, SHORT, tmp_path, steps=math.ceil(len(tokens.split("train")) / 8)
    )
    batches = list(tokens.batches("train", 1000))
    hard = sum(int((batch["hard"] & (batch["labels"] >= 0)).sum()) for batch in batches)
    assert sum(rows for rows, _ in seen) == hard
    assert not any(unlabelled for _, unlabelled in seen)


def test_a_batch_without_hard_tokens_is_skipped(tmp_path: Path) -> None:
    few = some_hard_tokens(tmp_path / "d", hard_ratio=0.003)
    hard = [bool(batch["hard"].any()) for batch in few.batches("train", 1)]
    assert not all(hard)
    assert any(hard)
    one_by_one = structs.replace(SHORT, batch_size=1, epochs=1, evaluations_per_epoch=1)
    done = train_stage(a_reader(), few, one_by_one, tmp_path / "c")
    assert done.steps == len(hard)


def test_each_routing_selects_its_tokens(tokens: HardTokens) -> None:
    ratio = tokens.record.splits["train"].hard_ratio
    (batch,) = tokens.batches("train", 1000)
    assert torch.equal(tokens_entering(batch, TrainingConfig(), 4, ratio), batch["hard"])
    assert bool(tokens_entering(batch, TrainingConfig(routing="all"), 4, ratio).all())
    drawn = tokens_entering(batch, TrainingConfig(routing="random"), 4, ratio)
    assert abs(float(drawn.double().mean()) - ratio) < 0.05
    overlap = float((drawn & batch["hard"]).double().mean())
    assert abs(overlap - ratio * ratio) < 0.06, (
        "the random tokens are correlated with the hard ones"
    )


def test_random_routing_matches_the_random_entry(tokens: HardTokens) -> None:
    ratio = tokens.record.splits["train"].hard_ratio
    cascade = Cascade(a_reader())
    cascade.add_stage(a_moved_stage(a_reader()), Entry(4, ratio, "random"))
    for batch in tokens.batches("held-out", 16):
        entered = cascade.score(batch["input_ids"], torch.ones_like(batch["input_ids"]))
        drawn = tokens_entering(batch, TrainingConfig(routing="random"), 4, ratio)
        assert torch.equal(entered.exit_layers > 4, drawn)
