"""Controls of a cascade: the same stage, trained on all tokens or on as many random ones."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from cascade.models.stack import DecoderStack
from cascade.stages.cascades import Cascade, Entry
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.saved_cascades import CONFIG
from cascade.stages.trainer.checkpoints import can_resume
from cascade.stages.trainer.stage_trainer import TrainingProgress
from cascade.stages.training import Training, train_stage

#: The tokens that a control is trained on.
Control = Literal["all", "random"]
CONTROLS: tuple[Control, ...] = ("all", "random")

#: In a cascade's folder: the controls, each in a folder named after its tokens.
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
    """Train a stage as another one was trained, for as many steps, on other tokens.

    Args:
        stack: The model that the stage follows; its weights are not changed.
        tokens: Its exit states.
        trained: The stage that was trained on hard tokens.
        control: The tokens to train on instead.
        folder: For checkpoints.
        resume: Continue from the last checkpoint in the folder, where there is one.
        progress: Called as the training goes.

    Raises:
        TrainingError: A loss is NaN or infinite, or a checkpoint is cut short or of another config.
    """
    return train_stage(
        stack,
        tokens,
        dataclasses.replace(trained.provenance.recipe, routing=control),
        folder,
        steps=max(1, trained.steps),
        resume=resume and can_resume(folder),
        progress=progress,
    )


def control_entry(control: Control, below: DecoderStack, tokens: HardTokens) -> Entry:
    """Return the entry by which a control's own tokens enter its stage.

    Args:
        control: The tokens: all of them, or as many drawn at random as are hard.
        below: The model that the stage follows.
        tokens: The hard tokens.
    """
    if control == "all":
        return Entry(below.num_layers, math.inf, "fixed")
    return Entry(below.num_layers, tokens.record.parts["train"].hard_ratio, "random")


def read_controls(folder: Path, base: DecoderStack) -> dict[str, Cascade]:
    """Read the controls that were saved with a cascade; those that are missing are left out.

    Args:
        folder: The cascade's.
        base: Its base model.

    Raises:
        RecordError: A control is torn, edited or of a newer release.
        ModelError: The base is another model than the one that it was made for.
    """
    folders = {control: folder / CONTROLS_FOLDER / control for control in CONTROLS}
    return {
        control: Cascade.from_pretrained(path, base)
        for control, path in folders.items()
        if (path / CONFIG).exists()
    }
