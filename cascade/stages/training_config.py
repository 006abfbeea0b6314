"""Options for training a stage."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from cascade.core.arguments import check_seed
from cascade.core.errors import UsageError

#: Initial weights of a stage: copies of the model's last layers, or random weights.
Start = Literal["copies", "fresh"]
STARTS = ("copies", "fresh")

#: Tokens that a stage is trained on: the hard ones, or for controls all or as many random ones.
Routing = Literal["hard", "all", "random"]
ROUTINGS = ("hard", "all", "random")


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options for training a stage.

    Attributes:
        additional_layers: Number of layers in the stage.
        start: Initial weights: "copies" of the model's last layers, or "fresh".
        own_head: Train a separate LM head for the stage.
        routing: Tokens that enter the stage during training: "hard", "all" or "random".
        epochs: Passes over the training split.
        learning_rate: Peak learning rate of AdamW. It warms up over the first 5 % of the steps and
            decays to 0 along a half cosine.
        batch_size: Sequences per step.
        patience: Stop after this many evaluations without improvement; None to never stop early.
        evaluations_per_epoch: Evaluations on the held-out split per epoch.
        weight_decay: Weight decay of AdamW.
        clipping: Maximum gradient norm.
        seed: Seed of fresh weights, of the order of sequences and of random routing.

    Example:
        >>> TrainingConfig(epochs=1, learning_rate=1e-3).batch_size
        8
    """

    additional_layers: int = 2
    start: Start = "copies"
    own_head: bool = False
    routing: Routing = "hard"
    epochs: float = 2.0
    learning_rate: float = 3e-4
    batch_size: int = 8
    patience: int | None = 3
    evaluations_per_epoch: int = msgspec.field(default=2, name="looks")
    weight_decay: float = 0.0
    clipping: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Check the options.

        Raises:
            UsageError: An option is invalid. The message names it and the expected values.
        """
        check_seed(self.seed)
        if self.start not in STARTS:
            raise UsageError(f"expected a start among {', '.join(STARTS)}, got {self.start!r}")
        if self.routing not in ROUTINGS:
            raise UsageError(f"expected a routing among {', '.join(ROUTINGS)}, got {self.routing}")
        for name, value, low in (
            ("epochs", self.epochs, 0),
            ("learning_rate", self.learning_rate, 0),
            ("clipping", self.clipping, 0),
            ("batch_size", self.batch_size, 0),
            ("evaluations_per_epoch", self.evaluations_per_epoch, 0),
            ("patience", 1 if self.patience is None else self.patience, 0),
        ):
            if not low < value < math.inf:
                raise UsageError(f"expected {name} above {low}, got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"expected weight_decay of 0 or more, got {self.weight_decay}")


#: The former name.
Recipe = TrainingConfig
