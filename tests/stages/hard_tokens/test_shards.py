"""Test that shards hold the same rows, in few files or many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_hard_tokens import (
    LENGTH,
    collect,
    everything,
    some_splits,
)

from cascade.stages.hard_tokens import plan, shards


def test_the_number_of_shards_does_not_change_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = collect(tmp_path / "one")
    monkeypatch.setattr(plan, "SHARD_BYTES", 1)
    monkeypatch.setattr(plan, "MOST_SHARDS", 1000)
    many = collect(tmp_path / "many")
    assert len(list((tmp_path / "many/train").glob("*.arrow"))) == 6
    for split in some_splits():
        for name, values in everything(one, split).items():
            assert torch.equal(everything(many, split)[name], values)


def test_record_batches_stay_below_the_limit_of_arrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = everything(collect(tmp_path / "a"), "train")
    monkeypatch.setattr(shards, "MOST_VALUES", 3 * LENGTH * 32)
    for name, values in everything(collect(tmp_path / "b"), "train").items():
        assert torch.equal(values, expected[name])
