"""Fixtures for datasets of hard tokens."""

from __future__ import annotations

import pytest

from cascade.stages.hard_tokens import plan


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every batch a separate shard."""
    monkeypatch.setattr(plan, "SHARD_BYTES", 1)
    monkeypatch.setattr(plan, "MOST_SHARDS", 1000)
