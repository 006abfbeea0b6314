"""Sealed files: what was written is read, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cascade.core.reading import UnreadableError
from cascade.drafters.sealed import read_sealed, write_sealed

TENSORS = {"one": torch.arange(6.0).reshape(2, 3), "two": torch.ones(2, dtype=torch.bfloat16)}


def test_tensors_and_values_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_sealed(tmp_path / "file", TENSORS, {"step": 3, "rows": [1, 2]})
    tensors, about = read_sealed(tmp_path / "file")
    assert about.pop("hash").startswith("sha256:")
    assert about == {"step": 3, "rows": [1, 2]}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert tensors["two"].dtype == torch.bfloat16


@pytest.mark.parametrize("place", [-1, 40, 80])
def test_a_changed_byte_is_noticed(tmp_path: Path, place: int) -> None:
    path = tmp_path / "file"
    write_sealed(path, TENSORS, {"step": 3})
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableError):
        read_sealed(path)


def test_a_file_without_a_hash_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file")
    with pytest.raises(UnreadableError, match="its hash differs"):
        read_sealed(tmp_path / "file")


def test_a_missing_file_is_no_unreadable_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "file")
