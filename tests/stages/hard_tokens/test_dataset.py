"""Test reading a finished dataset, with `datasets` as reference, and refusing a changed one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from support.records import edit_sealed
from support.reference_early_exit import (
    a_stack,
    one_line,
)
from support.tiny_hard_tokens import (
    LENGTH,
    collect,
    edited,
    everything,
    some_splits,
)
from support.tiny_models import tiny_model

from cascade.core.errors import (
    ModelError,
    RecordError,
    UsageError,
)
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.dataset import load_hard_tokens


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_datasets_library_reads_the_same_values(tmp_path: Path, dtype: str) -> None:
    found = collect(tmp_path / "d", dtype=dtype)
    loaded = datasets.load_from_disk(str(tmp_path / "d"))
    assert isinstance(loaded, datasets.DatasetDict)
    assert list(loaded) == ["train", "held-out"]
    for split, blocks in some_splits().items():
        assert loaded[split].num_rows == len(blocks.ids)
        rows = loaded[split].with_format("numpy")[:]
        ours = everything(found, split)
        for name, values in ours.items():
            theirs = rows[name]
            if name == "states" and dtype == "bfloat16":
                bits = torch.from_numpy(theirs.astype(np.int16))
                theirs = bits.view(torch.bfloat16).float().numpy()
            assert np.array_equal(theirs, values.numpy()), name
        assert loaded[split].features["states"].shape == (LENGTH, 32)
    loaded.save_to_disk(str(tmp_path / "copy"))
    assert len(datasets.load_from_disk(str(tmp_path / "copy"))["held-out"]) == 7


def test_batches_can_be_reordered_and_modified(tmp_path: Path) -> None:
    found = collect(tmp_path / "d")
    whole = everything(found, "train")
    order = [21, 0, 7, 7, 3]
    batches = list(found.batches("train", 2, order=order))
    assert [len(batch["sequence"]) for batch in batches] == [2, 2, 1]
    for name, values in whole.items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), values[order])
    for values in batches[0].values():
        values.zero_()
    assert torch.equal(everything(found, "train")["states"], whole["states"])
    with pytest.raises(UsageError, match=r"expected sequences in 0\.\.21, got 0\.\.22"):
        next(found.batches("train", 2, order=[0, 22]))
    with pytest.raises(UsageError, match="batch size of at least 1, got 0"):
        next(found.batches("train", 0))
    with pytest.raises(UsageError, match="a split among train, held-out, got 'test'"):
        found.split("test")


def test_a_dataset_for_another_model_layer_or_threshold_is_refused(tmp_path: Path) -> None:
    found = collect(tmp_path / "d")
    found.check(a_stack("llama"), layer=3, threshold=found.threshold)
    found.check(DecoderStack(tiny_model("llama")))
    for stack in (DecoderStack(tiny_model("llama", seed=1)), a_stack("qwen2")):
        with pytest.raises(ModelError, match="make them again for this model") as caught:
            found.check(stack)
        assert one_line(caught).startswith("the hard tokens in ")
    with pytest.raises(UsageError, match="were collected for exit layer 3, got layer 2"):
        found.check(a_stack("llama"), layer=2)
    with pytest.raises(UsageError, match=r"for threshold .*, got 0\.9517; collect"):
        found.check(a_stack("llama"), threshold=0.9517)


def with_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_sealed(folder / "hard-tokens.json", change)


SHARD = "train/data-00000-of-00001.arrow"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edited(d / SHARD, lambda b: b[:-100]), "is incomplete or edited"),
        (lambda d: edited(d / SHARD, lambda b: b[:900] + b"?" + b[901:]), "its hash differs"),
        (lambda d: (d / SHARD).unlink(), "cannot be read (No such file"),
        (lambda d: edited(d / "dataset_dict.json", lambda b: b + b" "), "is incomplete or edited"),
        (lambda d: (d / "held-out/state.json").unlink(), "cannot be read (No such file"),
        (lambda d: (d / "hard-tokens.json").unlink(), "make one with `cascade collect-hard --out"),
        (lambda d: shutil.rmtree(d), "make one with `cascade collect-hard --output`"),
        (lambda d: edited(d / "hard-tokens.json", lambda b: b[:-9]), "is torn or edited"),
        (
            lambda d: edited(
                d / "hard-tokens.json", lambda b: b.replace(b'"layer": ', b'"layer": 1')
            ),
            "was changed after it was written",
        ),
        (lambda d: with_record(d, lambda r: r.pop("parts")), "an object at parts, got nothing"),
        (lambda d: with_record(d, lambda r: r.update(schema=2)), "this release reads up to 1"),
        (lambda d: with_record(d, lambda r: r.update(kind="bench")), "of kind hard-tokens, got"),
    ],
)
def test_a_damaged_dataset_gives_a_one_line_error(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    collect(tmp_path / "d")
    assert len(load_hard_tokens(tmp_path / "d")) == 29
    damage(tmp_path / "d")
    with pytest.raises(RecordError) as caught:
        load_hard_tokens(tmp_path / "d")
    assert message in one_line(caught)
