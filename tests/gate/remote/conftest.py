"""A remote place and an empty cache for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from support.build_profiles import a_profile
from support.remote_place import OTHER, PROFILE, RemotePlace, push_profile


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def place(cache: Path) -> Iterator[type[RemotePlace]]:
    """A remote place with two baselines under `remote://store/baselines`."""
    fsspec.register_implementation("remote", RemotePlace, clobber=True)
    RemotePlace.reset()
    push_profile(PROFILE, a_profile(seed=0))
    push_profile(OTHER, a_profile(seed=1))
    yield RemotePlace
    RemotePlace.reset()
