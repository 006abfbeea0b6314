"""Tiny stages that do something, cascades of them, and the tokens that they are trained on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.core.provenance import SPLITS, Split
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.decoding.early_exit import Propagation, Score
from cascade.models.stack import DecoderStack
from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.hard_tokens.plan import CollectingConfig
from cascade.stages.records import HeldOutEvaluation
from cascade.stages.stage import Stage, new_stage
from cascade.stages.trainer.stage_trainer import NoProgress
from cascade.stages.training_config import TrainingConfig
from support.reference_early_exit import a_stack
from support.tiny_models import tiny_model, tiny_tokenizer


def moved(stage: Stage, seed: int = 0, by: float = 0.3) -> Stage:
    """Give a stage random weights, as training would leave it: none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in stage.parameters():
            value.add_(by * torch.randn(value.shape, generator=generator))
    return stage


def a_moved_stage(stack: DecoderStack, num_layers: int = 2, seed: int = 0, **about: Any) -> Stage:
    """Return a stage for a model that changes what comes to it."""
    return moved(new_stage(stack, num_layers, **about), seed)


def share_of(stack: DecoderStack, ids: Tensor, layer: int, share: float = 0.5) -> float:
    """Return the threshold at a layer's similarity below which a share of some tokens is."""
    kept: dict[int, Tensor] = {}
    stack.visit(ids, kept.__setitem__)
    similarity = torch.cosine_similarity(kept[layer - 1].float(), kept[layer].float(), dim=-1)
    return similarity.double().quantile(share).item()


@functools.cache
def a_cascade(
    family: str, propagation: Propagation = "frozen", *, stages: int = 2, rule: str = "cosine"
) -> Cascade:
    """Return a cascade whose stages each take about half of the tokens that come to them.

    By cosine, layer 3 of 4 decides who enters the first one, and the last layer who enters the
    second. Made once; for tests that leave it as it is.
    """
    cascade = Cascade(a_stack(family), propagation=propagation)
    for number in range(stages):
        top = cascade.stack
        layer = 3 if rule == "cosine" and number == 0 else top.num_layers
        threshold = 0.5 if rule == "random" else share_of(top, TEXT, layer, (0.6, 0.4)[number])
        stage = a_moved_stage(top, 2 - number, seed=number)
        cascade.add_stage(stage, Entry(layer, threshold, rule))
    return cascade


def ends(stack: DecoderStack, thresholds: Sequence[float], **settings: Any) -> Cascade:
    """Return a cascade of as many stages as thresholds, entered by cosine at the last layer."""
    cascade = Cascade(stack, **settings)
    for number, threshold in enumerate(thresholds):
        top = cascade.stack
        cascade.add_stage(
            a_moved_stage(top, 2 - number, seed=number), Entry(top.num_layers, threshold)
        )
    return cascade


def a_text(batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (batch, length), generator=generator)


TEXT = a_text(3, 20, seed=1)


# --- A model to train stages for ---------------------------------------------------------------


@functools.cache
def a_reader(family: str = "llama", *, bf16: bool = False) -> DecoderStack:
    """Return a tiny model with its tokenizer, made once; for tests that leave it as it is."""
    model = tiny_model(family)
    return DecoderStack(model.bfloat16() if bf16 else model, tokenizer=tiny_tokenizer())


@functools.cache
def some_text(samples: int = 40) -> dict[Split, TokenBlocks]:
    """Return the embedded corpus in characters, "train" and "held-out", with marks."""
    return {
        split: load_blocks(
            "embedded",
            tiny_tokenizer(),
            seq_len=32,
            num_samples=samples,
            record_split=split,
            marks=True,
        )
        for split in SPLITS
    }


def some_hard_tokens(
    folder: Path, stack: DecoderStack | None = None, *, samples: int = 40, **about: Any
) -> HardTokens:
    """Collect the tiny model's hard tokens at layer 3 of 4, half of all."""
    usual: dict[str, Any] = {"layer": 3, "hard_ratio": 0.5}
    config = CollectingConfig(**(usual | about))
    return collect_hard(stack or a_reader(), some_text(samples), folder, config)


def held_out() -> Tensor:
    return torch.from_numpy(some_text()["held-out"].ids).long()


# --- Training them -----------------------------------------------------------------------------

#: Lowers the held-out perplexity in a second or two.
SHORT = TrainingConfig(epochs=2, evaluations_per_epoch=2, learning_rate=3e-3)


class Noted(NoProgress):
    """Keeps everything that a training reports."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, int]] = []
        self.steps: list[int] = []
        self.evaluations: list[HeldOutEvaluation] = []

    def started(self, steps: int, done: int) -> None:
        self.starts.append((steps, done))

    def step_done(self, step: int) -> None:
        self.steps.append(step)

    def evaluated(self, evaluation: HeldOutEvaluation) -> None:
        self.evaluations.append(evaluation)


class StageStopped(Exception):  # noqa: N818
    """An interruption of a training."""


class StoppingAt(NoProgress):
    """Interrupts a training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def step_done(self, step: int) -> None:
        if step == self.step:
            raise StageStopped


def logits_of(score: Score) -> Tensor:
    assert score.logits is not None
    return score.logits
