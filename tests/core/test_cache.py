"""The cache folder: what is listed, named and cleared."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade.core.cache import cache_entries, cache_folder, clear, entries_named
from cascade.core.errors import UsageError


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a copy of weights, its lock, two noise floors, and a stranger's file."""
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path))
    copy = tmp_path / "weights" / "abc"
    copy.mkdir(parents=True)
    (copy / "model.safetensors").write_bytes(b"12345")
    (copy / "config.json").write_bytes(b"123")
    (tmp_path / "weights" / "abc.lock").touch()
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "1.json").write_bytes(b"12")
    (tmp_path / "noise" / "2.json").write_bytes(b"1")
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_entries_have_names_kinds_and_sizes(stored: Path) -> None:
    assert cache_folder() == stored
    found = [(entry.name, entry.kind, entry.size) for entry in cache_entries()]
    assert found == [
        ("weights/abc", "weights", 8),
        ("noise/1.json", "noise", 2),
        ("noise/2.json", "noise", 1),
    ]


def test_missing_cache_folder_has_no_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "absent"))
    assert cache_entries() == []


def test_entries_are_chosen_by_name_or_kind_once(stored: Path) -> None:
    chosen = entries_named(["noise/2.json", "noise"])
    assert sorted(entry.name for entry in chosen) == ["noise/1.json", "noise/2.json"]
    with pytest.raises(UsageError, match=r"got 'noise/3\.json'"):
        entries_named(["noise/3.json"])


def test_clear_deletes_the_entries_and_nothing_else(stored: Path) -> None:
    clear(entries_named(["weights", "noise/1.json"]))
    assert [entry.name for entry in cache_entries()] == ["noise/2.json"]
    assert (stored / "notes.txt").exists()
