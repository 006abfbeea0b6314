"""The loss of a stage over stored states, as the module that the Trainer trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.decoding.forward import slices
from cascade.exits.history import HiddenHistory
from cascade.exits.rules import ExitPoint, find_rule
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.dataset import Batch
from cascade.stages.stage import Stage, extended, run_stage
from cascade.stages.training_config import TrainingConfig

#: The scopes of every figure.
SCOPES = ("all", "hard", "response", "hard_response")


def tokens_entering(
    batch: Batch, config: TrainingConfig, num_layers: int, hard_ratio: float
) -> Tensor:
    """Return a mask of the tokens that enter the stage, `[B, T]`.

    Args:
        batch: A batch of `HardTokens.batches`.
        config: Training options; routing and seed are used.
        num_layers: Number of layers of the model below the stage.
        hard_ratio: Share of tokens that enter under random routing.
    """
    if config.routing == "hard":
        return batch["hard"]
    if config.routing == "all":
        return torch.ones_like(batch["hard"])
    ids, positions = batch["input_ids"].flatten(), batch["positions"].flatten()

    def no_logits() -> Tensor:
        raise NotImplementedError  # the random rule reads only ids and positions

    history = HiddenHistory(num_layers)
    point = ExitPoint(num_layers, history, no_logits, ids, positions, seed=config.seed)
    drawn = find_rule("random").confidence(point)
    return (drawn < hard_ratio).view_as(batch["hard"])


def scope_masks(batch: Batch, selected: Tensor) -> Iterator[Tensor]:
    """Yield the mask of each scope in `SCOPES`, `[B, T]`.

    A token counts by the text that it predicts.

    Args:
        batch: A batch of `HardTokens.batches`.
        selected: Tokens that enter the stage, `[B, T]`.
    """
    counted = batch["labels"] >= 0
    response = torch.zeros_like(counted)
    response[:, :-1] = batch["response"][:, 1:]
    yield counted
    yield counted & selected
    yield counted & response
    yield counted & selected & response


@dataclass(frozen=True)
class StageInTraining:
    """A stage in training, with the frozen models around it.

    Attributes:
        stack: Model that the stage follows.
        stage: The stage.
        config: Training options.
        readout: Stack whose norm and LM head turn states behind the stage into logits.
        hard_ratio: Share of tokens that enter under random routing.
    """

    stack: DecoderStack
    stage: Stage
    config: TrainingConfig
    readout: DecoderStack
    hard_ratio: float

    @classmethod
    def of(
        cls, stack: DecoderStack, stage: Stage, config: TrainingConfig, hard_ratio: float
    ) -> StageInTraining:
        """Return a stage in training. It uses its own LM head if it has one."""
        return cls(stack, stage, config, _readout(stack, stage), hard_ratio)


class StageModule(nn.Module):
    """The weights of a stage and its loss over stored states.

    Args:
        context: The stage and its models. It is a dataclass, so the base is not a submodule of this
            module and is neither saved nor trained.
    """

    def __init__(self, context: StageInTraining) -> None:
        super().__init__()
        self.layers = context.stage.layers
        if context.stage.head is not None:
            self.head = context.stage.head
        self.context = context

    def selected(self, batch: Batch) -> Tensor:
        """Return a mask of the tokens that enter the stage, `[B, T]`."""
        own = self.context
        return tokens_entering(batch, own.config, own.stack.num_layers, own.hard_ratio)

    def states(self, batch: Batch, selected: Tensor) -> Tensor:
        """Return the states behind the stage, `[B, T, D]`."""
        own = self.context
        return run_stage(own.stack, own.stage, batch["input_ids"], batch["states"], selected)

    def losses(self, states: Tensor, labels: Tensor, *, own: bool = True) -> Tensor:
        """Return the negative log-probability of each row's label in nats, `[n]`.

        Args:
            states: States before the final norm, `[n, D]`.
            labels: Label ids, `[n]`.
            own: Use the stage's LM head if it has one. Otherwise, use the model's.
        """
        stack = self.context.readout if own else self.context.stack
        found = [
            functional.cross_entropy(
                stack.decode(states[rows][None].to(stack.dtype))[0].float(),
                labels[rows],
                reduction="none",
            )
            for rows in slices(len(states), stack.max_positions)
        ]
        return torch.cat(found) if found else states.new_zeros(0)

    def losses_without(self, batch: Batch) -> Tensor:
        """Return the losses of a batch without the stage, `[B, T]`, with 0 for missing labels."""
        counted = batch["labels"] >= 0
        losses = torch.zeros(counted.shape, device=counted.device)
        losses[counted] = self.losses(batch["states"][counted], batch["labels"][counted], own=False)
        return losses

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return the mean loss of the tokens that enter the stage."""
        selected = self.selected(batch)
        counted = selected & (batch["labels"] >= 0)
        if not counted.any():
            # Such a batch has zero loss and zero gradients.
            return {"loss": torch.stack([0 * weight.sum() for weight in self.parameters()]).sum()}
        losses = self.losses(self.states(batch, selected)[counted], batch["labels"][counted])
        return {"loss": losses.sum() / counted.sum()}


def _readout(stack: DecoderStack, stage: Stage) -> DecoderStack:
    if stage.head is None:
        return stack
    return extended(stack, dataclasses.replace(stage, head=_InFp32(stage.head)))


class _InFp32(nn.Module):
    """An LM head in training. It computes in fp32 regardless of the model's dtype."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, normed: Tensor) -> Tensor:
        """Return fp32 logits of normed states in any dtype."""
        logits: Tensor = self.head(normed.float())
        return logits
