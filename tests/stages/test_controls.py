"""Test controls: stages trained for the same number of steps on other tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs
from support.tiny_stages import (
    SHORT,
    a_moved_stage,
    a_reader,
    held_out,
)

from cascade.stages.cascades import Cascade
from cascade.stages.controls import (
    CONTROLS,
    CONTROLS_FOLDER,
    control_entry,
    read_controls,
    train_control,
)
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.training import Training


@pytest.mark.parametrize("control", ["all", "random"])
def test_a_control_is_trained_for_the_same_steps_without_patience(
    control: Any, trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    like = dataclasses.replace(
        trained,
        steps=17,
        provenance=msgspec.structs.replace(
            trained.provenance, config=structs.replace(SHORT, patience=1)
        ),
    )
    done = train_control(a_reader(), tokens, like, control, tmp_path)
    assert done.steps == 17
    assert done.provenance.config == structs.replace(SHORT, patience=1, routing=control)
    assert done.chosen.worst <= 1
    again = train_control(a_reader(), tokens, like, control, tmp_path, resume=True)
    assert again.stage.fingerprint() == done.stage.fingerprint()


def test_the_entry_of_a_control_selects_its_training_tokens(tokens: HardTokens) -> None:
    ids = held_out()
    ratio = tokens.record.splits["train"].hard_ratio
    shares = {}
    for control in CONTROLS:
        cascade = Cascade(a_reader()).with_stage(
            a_moved_stage(a_reader()), control_entry(control, a_reader(), tokens)
        )
        entered = cascade.score(ids).exit_layers > a_reader().num_layers
        shares[control] = float(entered.double().mean())
    assert shares["all"] == 1
    assert shares["random"] == pytest.approx(ratio, abs=0.05)


def test_saved_controls_are_loaded_and_missing_ones_are_skipped(
    tokens: HardTokens, tmp_path: Path
) -> None:
    assert read_controls(tmp_path, a_reader()) == {}
    cascade = Cascade(a_reader()).with_stage(
        a_moved_stage(a_reader()), control_entry("random", a_reader(), tokens)
    )
    cascade.save_pretrained(tmp_path / CONTROLS_FOLDER / "random")
    (name,) = found = read_controls(tmp_path, a_reader())
    assert name == "random"
    assert found[name].stages[0].fingerprint() == cascade.stages[0].fingerprint()
    assert found[name].stage_entries == cascade.stage_entries
