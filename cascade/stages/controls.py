"""Controls of a cascade: the same stage, trained on all tokens or on random tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from cascade.models.stack import DecoderStack
from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.saved_cascades import CONFIG
from cascade.stages.trainer.checkpoints import can_resume
from cascade.stages.trainer.stage_trainer import TrainingProgress
from cascade.stages.training import Training, train_stage

#: The tokens that a control is trained on.
Control = Literal["all", "random"]
CONTROLS: tuple[Control, ...] = ("all", "random")

#: Subfolder of a cascade that holds one folder per control, named after the control.
CONTROLS_FOLDER = "controls"


def train_control(
    stack: DecoderStack,
    tokens: HardTokens,
    trained: Training,
    control: Control,
    folder: Path,
    *,
    resume: bool = False,
    progress: TrainingProgress | None = None,
) -> Training:
    """Train a control: the same configuration and number of steps, on other tokens.

    Args:
        stack: Model that the stage follows. Its weights are not changed.
        tokens: Exit states of that model.
        trained: The stage that was trained on hard tokens.
        control: Tokens to train on instead.
        folder: Folder for checkpoints.
        resume: Continue from the last checkpoint in the folder, if there is one.
        progress: Called during training.

    Raises:
        TrainingError: A loss is NaN or infinite, or a checkpoint is incomplete or belongs to
            another configuration.
    """
    return train_stage(
        stack,
        tokens,
        replace(trained.provenance.config, routing=control),
        folder,
        steps=max(1, trained.steps),
        resume=resume and can_resume(folder),
        progress=progress,
    )


def control_entry(control: Control, below: DecoderStack, tokens: HardTokens) -> Entry:
    """Return the entry that selects the tokens a control was trained on.

    Args:
        control: "all" tokens, or "random" for as many random tokens as are hard.
        below: Model that the stage follows.
        tokens: The hard tokens.
    """
    if control == "all":
        return Entry(below.num_layers, math.inf, "fixed")
    return Entry(below.num_layers, tokens.record.splits["train"].hard_ratio, "random")


def read_controls(folder: Path, base: DecoderStack) -> dict[str, Cascade]:
    """Load the controls that were saved with a cascade, without the missing ones.

    Args:
        folder: Folder of the cascade.
        base: Base model of the cascade.

    Raises:
        RecordError: A control is torn, edited or from a newer release.
        ModelError: A control was made for another base model.
    """
    folders = {control: folder / CONTROLS_FOLDER / control for control in CONTROLS}
    return {
        control: Cascade.from_pretrained(path, base)
        for control, path in folders.items()
        if (path / CONFIG).exists()
    }
