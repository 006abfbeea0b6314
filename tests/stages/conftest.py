"""Fixtures for stages: a dataset of hard tokens, and a stage that was trained on it."""

from __future__ import annotations

import pytest
from support.tiny_stages import SHORT, a_reader, some_hard_tokens

from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.training import Training, train_stage


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> HardTokens:
    return some_hard_tokens(tmp_path_factory.mktemp("hard") / "d")


@pytest.fixture(scope="session")
def trained(tokens: HardTokens, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Train a stage, for tests that do not change it."""
    return train_stage(a_reader(), tokens, SHORT, tmp_path_factory.mktemp("checkpoints"))
