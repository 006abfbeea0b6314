"""A tiny checkpoint that several rooms' tests break, each its own copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_models import save_checkpoint


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "Tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a checkpoint folder to break."""
    return shutil.copytree(saved, tmp_path / "Broken")
