"""Test the folder of a dataset: user files are never lost, and disk errors take one line."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import datasets
import pytest
from support.disk import contents, largest_file
from support.reference_early_exit import (
    a_stack,
    one_line,
)
from support.tiny_hard_tokens import (
    SMALL_SHARDS,
    Stopped,
    collect,
    some_splits,
    stop_after,
)

from cascade.core.errors import (
    OutputError,
)
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.dataset import load_hard_tokens
from cascade.stages.hard_tokens.plan import CollectingConfig
from cascade.stages.hard_tokens.splits import expected_bytes


def test_the_size_of_the_dataset_is_estimated_correctly(tmp_path: Path) -> None:
    splits = some_splits(200, 50, 64)
    found = collect_hard(
        a_stack("llama"), splits, tmp_path / "d", CollectingConfig(layer=3, hard_ratio=0.5)
    )
    size = sum(file.bytes for file in found.record.files)
    assert (
        size
        == sum(path.stat().st_size for path in (tmp_path / "d").rglob("*") if path.is_file())
        - (tmp_path / "d/hard-tokens.json").stat().st_size
    )
    # Metadata files add a size that does not depend on the corpus.
    assert expected_bytes(a_stack("llama"), splits) == pytest.approx(size, rel=0.03)


def test_a_too_small_disk_is_refused_before_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 9999, 9999))
    monkeypatch.setattr(DecoderStack, "visit", None)
    with pytest.raises(OutputError) as caught:
        collect(tmp_path / "d")
    assert "the disk has 1e-05 GB free" in one_line(caught)
    assert not (tmp_path / "d").exists()


@SMALL_SHARDS
def test_a_disk_that_fills_up_keeps_the_finished_shards(tmp_path: Path) -> None:
    collect(tmp_path / "whole")
    with largest_file(1000), pytest.raises(OutputError, match="free some space"):
        collect(tmp_path / "d")
    assert not (tmp_path / "d").exists()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    calls = iter([lambda _: None] * 3 + [full])
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        collect(tmp_path / "d", progress=lambda done: next(calls)(done))
    assert contents(tmp_path / "d")
    collect(tmp_path / "d")
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_an_existing_dataset_is_replaced_only_with_overwrite_and_only_by_a_finished_one(
    tmp_path: Path,
) -> None:
    collect(tmp_path / "d")
    (tmp_path / "d/mine.txt").write_text("mine")
    before = contents(tmp_path / "d")
    with pytest.raises(OutputError, match="replace it with --overwrite"):
        collect(tmp_path / "d", hard_ratio=0.3)
    for ratio in (0.3, 0.5):
        with pytest.raises(Stopped):
            collect(tmp_path / "d", hard_ratio=ratio, overwrite=True, progress=stop_after(1))
        assert contents(tmp_path / "d") == before
    collect(tmp_path / "d", hard_ratio=0.3, overwrite=True)
    collect(tmp_path / "e", hard_ratio=0.3)
    assert contents(tmp_path / "d") == contents(tmp_path / "e") | {"mine.txt": b"mine"}


def test_reuse_returns_a_finished_dataset_with_the_same_arguments(tmp_path: Path) -> None:
    done: list[int] = []
    made = collect(tmp_path / "d", hard_ratio=0.3)
    before = contents(tmp_path / "d")
    for same in ({"reuse": True}, {"reuse": True, "overwrite": True}):
        again = collect(tmp_path / "d", hard_ratio=0.3, progress=done.append, **same)
        assert again.record == made.record
        assert contents(tmp_path / "d") == before
    assert not done, "the model ran again"
    with pytest.raises(OutputError, match="replace it with --overwrite"):
        collect(tmp_path / "d", hard_ratio=0.5, reuse=True)
    other = collect(tmp_path / "d", hard_ratio=0.5, reuse=True, overwrite=True)
    assert other.threshold != made.threshold


@pytest.mark.parametrize("name", ["train/mine.py", "held-out/x", "dataset_dict.json"])
@pytest.mark.parametrize("ours", [False, True])
def test_foreign_files_are_never_replaced(tmp_path: Path, name: str, ours: bool) -> None:
    if ours and "/" not in name:
        return
    folder = tmp_path / "d"
    if ours:
        collect(folder)
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("mine")
    before = contents(folder)
    with pytest.raises(OutputError, match="does not belong to a dataset of hard tokens"):
        collect(folder, overwrite=True)
    assert contents(folder) == before


def test_cache_files_of_the_datasets_library_are_allowed(tmp_path: Path) -> None:
    collect(tmp_path / "d")
    loaded = datasets.load_from_disk(str(tmp_path / "d"))["train"]
    loaded.map(lambda row: {"hards": sum(row["hard"])})
    assert list((tmp_path / "d/train").glob("cache-*"))
    load_hard_tokens(tmp_path / "d")
    del loaded
    collect(tmp_path / "d", overwrite=True)
    assert not list((tmp_path / "d/train").glob("cache-*"))


def test_a_file_or_another_process_at_the_output_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        collect(tmp_path / "f")
    with pytest.raises(OutputError, match="File name too long"):
        collect(tmp_path / ("x" * 300))

    def second(_: int) -> None:
        collect(tmp_path / "d")

    with pytest.raises(OutputError, match="another process is collecting into"):
        collect(tmp_path / "d", progress=second)
