"""Test the options of training. Invalid ones give a one-line error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from support.reference_early_exit import (
    one_line,
)
from support.tiny_stages import (
    SHORT,
    a_reader,
)

from cascade.core.errors import (
    UsageError,
)
from cascade.core.schema import from_plain, to_plain
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.training import train_stage
from cascade.stages.training_config import TrainingConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routing": "easy"}, "expected a routing among hard, all, random, got easy"),
        ({"epochs": 0}, "expected epochs above 0, got 0"),
        ({"epochs": math.inf}, "expected epochs above 0, got inf"),
        ({"learning_rate": 0.0}, "expected learning_rate above 0"),
        ({"learning_rate": math.nan}, "expected learning_rate above 0, got nan"),
        ({"clipping": -1.0}, "expected clipping above 0"),
        ({"batch_size": 0}, "expected batch_size above 0"),
        ({"evaluations_per_epoch": 0}, "expected evaluations_per_epoch above 0"),
        ({"patience": 0}, "expected patience above 0"),
        ({"weight_decay": -0.1}, "expected weight_decay of 0 or more"),
        ({"seed": -1}, "expected a seed in"),
        ({"additional_layers": 0}, "expected 1 to 4 layers for a stage"),
        ({"start": "zeros"}, "expected a start among copies, fresh"),
    ],
)
def test_an_invalid_config_is_refused(
    change: dict[str, Any], message: str, tokens: HardTokens, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        train_stage(a_reader(), tokens, structs.replace(SHORT, **change), tmp_path)
    one_line(caught)
    assert not list(tmp_path.iterdir())


def test_evaluations_per_epoch_are_stored_under_their_older_key() -> None:
    stored = to_plain(TrainingConfig(evaluations_per_epoch=4))
    assert stored["looks"] == 4
    assert from_plain(stored, TrainingConfig).evaluations_per_epoch == 4
