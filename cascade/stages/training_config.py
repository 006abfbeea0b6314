"""The options of training a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cascade.core.arguments import check_seed
from cascade.core.errors import UsageError

#: What a stage's layers start from: copies of the layers before them, or random weights.
Start = Literal["copies", "fresh"]
STARTS = ("copies", "fresh")

#: Which tokens a stage is trained on: the hard ones, all, or as many drawn at random (controls).
Routing = Literal["hard", "all", "random"]
ROUTINGS = ("hard", "all", "random")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train a stage.

    Attributes:
        additional_layers: Layers of the stage.
        start: "copies" of the model's last layers, or "fresh" ones.
        own_head: Whether the stage trains an LM head of its own.
        routing: The tokens that enter the stage in training: "hard", "all" or "random".
        epochs: Passes over the training split.
        learning_rate: The highest learning rate of AdamW; it rises over a twentieth of the steps
            and falls to 0 along a half cosine.
        batch_size: Sequences per step.
        patience: Stop after so many evaluations without a better one; never where None.
        looks: Evaluations on the held-out split per epoch.
        weight_decay: AdamW's.
        clipping: The largest norm of a step's gradient.
        seed: Of fresh weights, of the order of sequences, and of random routing.

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
    looks: int = 2
    weight_decay: float = 0.0
    clipping: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuse invalid options.

        Raises:
            UsageError: Names the option and what was expected.
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
            ("looks", self.looks, 0),
            ("patience", 1 if self.patience is None else self.patience, 0),
        ):
            if not low < value < math.inf:
                raise UsageError(f"expected {name} above {low}, got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"expected weight_decay of 0 or more, got {self.weight_decay}")


#: The former name.
Recipe = TrainingConfig
