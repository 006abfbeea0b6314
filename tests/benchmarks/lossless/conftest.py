"""A tiny model with room for prompts of one token per character."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import save_checkpoint


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roomy") / "Roomy"
    return save_checkpoint(folder, max_position_embeddings=2048)
