"""Hard tokens: what is stored is what the model gives, whole and in order, whatever happens."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from support.disk import contents, largest_file
from support.reference_early_exit import a_stack, one_line
from support.tiny_models import FAMILIES, tiny_model

from cascade.core.errors import (
    CascadeError,
    CorpusError,
    ModelError,
    OutputError,
    RecordError,
    UsageError,
)
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.evaluation.calibration import confidences
from cascade.models.stack import DecoderStack
from cascade.stages import collecting as hard_tokens
from cascade.stages.collecting import collect_hard, expected_bytes
from cascade.stages.dataset import HardTokens, load_hard_tokens
from cascade.stats.thresholds import fit_threshold

Parts = dict[str, TokenBlocks]
LENGTH = 12


@functools.cache
def some_parts(train: int = 22, held_out: int = 7, length: int = LENGTH) -> Parts:
    """Return random tokens in records of 10, of which the first 4 are no response text."""
    generator = np.random.default_rng(0)

    def blocks(rows: int, part: Any) -> TokenBlocks:
        place = np.arange(rows * length).reshape(rows, length)
        ids = generator.integers(2, 97, (rows, length)).astype(np.int32)
        records = (place // 10 + 1).astype(np.int32)
        return TokenBlocks(
            ids, "random", "random", 9, record_of=records, response=place % 10 > 3, part=part
        )

    return {"train": blocks(train, "train"), "held-out": blocks(held_out, "held-out")}


def collect(folder: Path, family: str = "llama", **settings: Any) -> HardTokens:
    """Collect with small batches; every batch is a shard of its own where they are small too."""
    usual = {"layer": 3, "hard_ratio": 0.5, "batch_size": 4}
    return collect_hard(a_stack(family), some_parts(), folder, **(usual | settings))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every batch be a shard of its own."""
    monkeypatch.setattr(hard_tokens, "_SHARD_BYTES", 1)
    monkeypatch.setattr(hard_tokens, "_MOST_SHARDS", 1000)


def own_history(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the residual stream entry by entry, by hooks of our own on the layers."""
    stack = DecoderStack(model)
    kept: list[torch.Tensor] = []
    first = stack.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in stack.layers
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in (first, *hooks):
        hook.remove()
    return kept


def by_hand(model: Any, blocks: TokenBlocks, layer: int) -> dict[str, Any]:
    """Return a part's columns, written out sequence by sequence."""
    columns: dict[str, list[Any]] = {"states": [], "similarity": [], "labels": []}
    for row in blocks.ids:
        history = own_history(model, torch.from_numpy(row[None]).long())
        columns["states"].append(history[-1][0])
        columns["similarity"].append(
            torch.cosine_similarity(history[layer - 1][0], history[layer][0], dim=-1)
        )
        columns["labels"].append(torch.tensor([*row[1:].tolist(), -100]))
    return {name: torch.stack(values) for name, values in columns.items()}


def everything(found: HardTokens, part: str, batch_size: int = 5) -> dict[str, torch.Tensor]:
    batches = list(found.batches(part, batch_size))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


# --- What is stored --------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_are_what_the_model_gives(family: str, layer: int, tmp_path: Path) -> None:
    found = collect(tmp_path / "d", family, layer=layer)
    for part, blocks in some_parts().items():
        got, expected = everything(found, part), by_hand(tiny_model(family), blocks, layer)
        # In float16 a number keeps 11 bits; a batch sums up as a single row does, but for rounding.
        assert torch.allclose(got["states"], expected["states"], rtol=2**-11, atol=1e-5)
        assert torch.allclose(got["similarity"], expected["similarity"], rtol=0, atol=2e-6)
        assert torch.equal(got["labels"], expected["labels"])
        assert np.array_equal(got["input_ids"], blocks.ids)
        assert np.array_equal(got["records"], blocks.record_of)
        assert np.array_equal(got["response"], blocks.response)
        assert got["sequence"].tolist() == list(range(len(blocks.ids)))
        assert torch.equal(got["positions"], torch.arange(LENGTH).expand(len(blocks.ids), LENGTH))
        assert torch.equal(got["hard"], got["similarity"] < found.threshold)


def test_the_similarity_is_the_cosine_rules_to_the_last_bit(tmp_path: Path) -> None:
    found = collect(tmp_path / "d")
    for part, blocks in some_parts().items():
        expected = confidences(a_stack("llama"), blocks, 3, "cosine", batch_size=4)
        assert np.array_equal(everything(found, part)["similarity"], expected)


def test_the_stored_states_lead_to_the_models_own_logits(tmp_path: Path) -> None:
    # Behind the norm they would be normed twice.
    stack, blocks = a_stack("llama"), some_parts()["train"]
    states = everything(collect(tmp_path / "d"), "train")["states"]
    with torch.no_grad():
        expected = stack.model(torch.from_numpy(blocks.ids).long()).logits
    assert (stack.decode(states) - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_datasets_reads_it_as_ours_does(tmp_path: Path, dtype: str) -> None:
    found = collect(tmp_path / "d", dtype=dtype)
    loaded = datasets.load_from_disk(str(tmp_path / "d"))
    assert isinstance(loaded, datasets.DatasetDict)
    assert list(loaded) == ["train", "held-out"]
    for part, blocks in some_parts().items():
        assert loaded[part].num_rows == len(blocks.ids)
        rows = loaded[part].with_format("numpy")[:]
        ours = everything(found, part)
        for name, values in ours.items():
            theirs = rows[name]
            if name == "states" and dtype == "bfloat16":
                bits = torch.from_numpy(theirs.astype(np.int16))
                theirs = bits.view(torch.bfloat16).float().numpy()
            assert np.array_equal(theirs, values.numpy()), name
        assert loaded[part].features["states"].shape == (LENGTH, 32)
    loaded.save_to_disk(str(tmp_path / "copy"))
    assert len(datasets.load_from_disk(str(tmp_path / "copy"))["held-out"]) == 7


def test_bfloat16_states_are_rounded_once(tmp_path: Path) -> None:
    exact = everything(collect(tmp_path / "a"), "train")["states"]
    rounded = everything(collect(tmp_path / "b", dtype="bfloat16"), "train")["states"]
    assert torch.allclose(rounded, exact, rtol=2**-8, atol=0)
    assert not torch.equal(rounded, exact)


def test_batches_come_in_any_order_and_can_be_written_to(tmp_path: Path) -> None:
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
    with pytest.raises(UsageError, match="a part among train, held-out, got 'test'"):
        found.part("test")


def test_the_batch_size_of_the_pass_moves_no_more_than_rounding(tmp_path: Path) -> None:
    one, all_at_once = (collect(tmp_path / str(n), batch_size=n) for n in (1, 64))
    for part in some_parts():
        a, b = (everything(found, part) for found in (one, all_at_once))
        assert torch.allclose(a["states"], b["states"], rtol=2**-10, atol=1e-5)
        assert torch.equal(a["labels"], b["labels"])


def test_few_shards_or_many_hold_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = collect(tmp_path / "one")
    monkeypatch.setattr(hard_tokens, "_SHARD_BYTES", 1)
    monkeypatch.setattr(hard_tokens, "_MOST_SHARDS", 1000)
    many = collect(tmp_path / "many")
    assert len(list((tmp_path / "many/train").glob("*.arrow"))) == 6
    for part in some_parts():
        for name, values in everything(one, part).items():
            assert torch.equal(everything(many, part)[name], values)


def test_one_record_batch_never_holds_more_values_than_arrow_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = everything(collect(tmp_path / "a"), "train")
    monkeypatch.setattr("cascade.stages.shards._MOST_VALUES", 3 * LENGTH * 32)
    for name, values in everything(collect(tmp_path / "b"), "train").items():
        assert torch.equal(values, expected[name])


# --- Threshold and ratio ---------------------------------------------------------------------


def test_a_ratio_alone_fits_the_threshold_to_the_training_part(tmp_path: Path) -> None:
    found = collect(tmp_path / "d", hard_ratio=0.3)
    values = everything(found, "train")["similarity"].numpy()
    fitted = fit_threshold(values, 0.3, resamples=39)
    assert (found.threshold, found.record["parts"]["train"]["hard_ratio"]) == (
        fitted.threshold,
        fitted.reached,
    )
    assert found.notes == ()


def test_a_given_threshold_decides_and_a_ratio_far_off_is_told(tmp_path: Path) -> None:
    fitted = collect(tmp_path / "a", hard_ratio=0.5).threshold
    near = collect(tmp_path / "b", threshold=fitted, hard_ratio=0.46)
    assert (near.threshold, near.notes) == (fitted, ())
    far = collect(tmp_path / "c", threshold=fitted, hard_ratio=0.3)
    assert far.threshold == fitted
    assert far.record["parts"]["train"]["hard_ratio"] == 0.5
    (note,) = far.notes
    assert f"the threshold {fitted:.6g} decides: it makes 0.500" in note
    assert "not the 0.300 that were asked for" in note


def test_a_token_at_the_threshold_is_easy_and_one_between_two_fp32_numbers_is_not_moved(
    tmp_path: Path,
) -> None:
    similarity = everything(collect(tmp_path / "a"), "train")["similarity"].flatten().sort().values
    middle = similarity[130]
    at = collect(tmp_path / "b", hard_ratio=None, threshold=float(middle))
    assert at.record["parts"]["train"]["hard"] == int((similarity < middle).sum())
    # fp32 would round it to the similarity itself, and let the token go.
    above = collect(tmp_path / "c", hard_ratio=None, threshold=float(middle) + 1e-12)
    assert above.record["parts"]["train"]["hard"] == int((similarity <= middle).sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hard_ratio": None}, "expected a threshold or a hard ratio, got neither"),
        ({"hard_ratio": 0.0}, "expected a hard ratio between 0 and 1, got 0.0"),
        ({"hard_ratio": 1.0}, "expected a hard ratio between 0 and 1, got 1.0"),
        ({"hard_ratio": float("nan")}, "expected a hard ratio between 0 and 1, got nan"),
        ({"threshold": 2.0}, "gives confidences from -1 to 1; expected a threshold in there"),
        ({"threshold": float("nan")}, "got nan"),
        ({"layer": 5}, "expected an exit layer in 1..4, got 5"),
        ({"layer": 0}, "expected an exit layer in 1..4, got 0"),
        ({"dtype": "float32"}, "expected states in float16 or bfloat16, got 'float32'"),
        ({"batch_size": 0}, "at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CascadeError) as caught:
        collect(tmp_path / "d", **settings)
    assert message in one_line(caught)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(("threshold", "what"), [(-1.0, "no token"), (1.0000001, "every token")])
def test_no_hard_tokens_or_only_hard_ones_are_refused_and_the_pass_is_kept(
    tmp_path: Path, threshold: float, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as caught:
        collect(tmp_path / "d", threshold=threshold)
    assert f"{what} of the train part is hard" in one_line(caught)
    with pytest.raises(FileNotFoundError):
        datasets.load_from_disk(str(tmp_path / "d"))
    with pytest.raises(RecordError, match="is not finished"):
        load_hard_tokens(tmp_path / "d")
    expected = collect(tmp_path / "e")
    monkeypatch.setattr(DecoderStack, "visit", None)
    assert everything(collect(tmp_path / "d"), "train")["hard"].sum() == 132
    assert contents(tmp_path / "d") == contents(tmp_path / "e")
    assert load_hard_tokens(tmp_path / "d").record == expected.record


# --- The corpus ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"train": p["train"]}, "expected the parts train and held-out, got train"),
        (lambda p: p | {"train": replace(p["train"], response=None)}, "marks=True"),
        (lambda p: p | {"held-out": replace(p["held-out"], record_of=None)}, "the held-out part"),
        (lambda p: p | {"train": replace(p["train"], ids=p["train"].ids[:3])}, "marks=True"),
        (lambda p: p | {"train": some_parts(8, 3, 11)["train"]}, "one length, got 11 tokens in"),
        (lambda _: some_parts(3, 3, 65), "sequences of 65 tokens exceed the model's 64 positions"),
    ],
)
def test_parts_that_cannot_be_collected_are_refused(
    tmp_path: Path, change: Callable[[Parts], Parts], message: str
) -> None:
    with pytest.raises(CorpusError) as caught:
        collect_hard(
            a_stack("llama"), change(some_parts()), tmp_path / "d", layer=3, hard_ratio=0.5
        )
    assert message in one_line(caught)
    assert not (tmp_path / "d").exists()


def test_held_out_sequences_that_are_trained_on_are_told(tmp_path: Path) -> None:
    train = some_parts()["train"]
    seen = replace(
        train, ids=train.ids[:3], record_of=train.record_of[:3], response=train.response[:3]
    )
    found = collect_hard(
        a_stack("llama"),
        {"train": train, "held-out": seen},
        tmp_path / "d",
        layer=3,
        hard_ratio=0.5,
    )
    (note,) = found.notes
    assert note.startswith("3 of the held-out sequences are in the training part too")


# --- The model -------------------------------------------------------------------------------


def scaled(by: float) -> DecoderStack:
    """Return a model whose residual stream is `by` times as large."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(by)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(by)
            layer.mlp.down_proj.weight.mul_(by)
    return DecoderStack(model)


def test_states_beyond_float16_are_refused_and_bfloat16_holds_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"layer": 3, "hard_ratio": 0.5}
    with pytest.raises(ModelError) as caught:
        collect_hard(scaled(1e5), some_parts(), tmp_path / "d", **settings)
    assert "store them with --states-dtype bfloat16" in one_line(caught)
    assert not (tmp_path / "d").exists()
    found = collect_hard(scaled(1e5), some_parts(), tmp_path / "d", dtype="bfloat16", **settings)
    states = everything(found, "train")["states"]
    assert torch.isfinite(states).all()
    assert states.abs().max() > 65504


@pytest.mark.parametrize("entry", [2, 3, 4])
def test_states_that_are_not_finite_are_refused_by_layer(
    tmp_path: Path, entry: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit = DecoderStack.visit

    def broken(self: DecoderStack, ids: torch.Tensor, visitor: Any) -> Any:
        return visit(
            self, ids, lambda at, hidden: visitor(at, hidden * (torch.nan if at == entry else 1))
        )

    monkeypatch.setattr(DecoderStack, "visit", broken)
    with pytest.raises(ModelError) as caught:
        collect(tmp_path / "d")
    layer = 4 if entry == 4 else 3
    assert f"layer {layer} gives NaN or infinite hidden states" in one_line(caught)
    assert not (tmp_path / "d").exists()


def test_a_dataset_of_another_model_layer_or_threshold_is_refused(tmp_path: Path) -> None:
    found = collect(tmp_path / "d")
    found.check(a_stack("llama"), layer=3, threshold=found.threshold)
    found.check(DecoderStack(tiny_model("llama")))
    for stack in (DecoderStack(tiny_model("llama", seed=1)), a_stack("qwen2")):
        with pytest.raises(ModelError, match="make them anew for this model") as caught:
            found.check(stack)
        assert one_line(caught).startswith("the hard tokens in ")
    with pytest.raises(UsageError, match="are those of exit layer 3, got layer 2"):
        found.check(a_stack("llama"), layer=2)
    with pytest.raises(UsageError, match=r"below the threshold .*, got 0\.9517; collect"):
        found.check(a_stack("llama"), threshold=0.9517)


# --- What can happen to a dataset ------------------------------------------------------------


def edited(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def with_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / "hard-tokens.json").read_text())
    change(record)
    (folder / "hard-tokens.json").write_text(json.dumps(record))


SHARD = "train/data-00000-of-00001.arrow"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: edited(d / SHARD, lambda b: b[:-100]), "was cut short or edited"),
        (lambda d: edited(d / SHARD, lambda b: b[:900] + b"?" + b[901:]), "its hash is another"),
        (lambda d: (d / SHARD).unlink(), "cannot be read (No such file"),
        (lambda d: edited(d / "dataset_dict.json", lambda b: b + b" "), "was cut short or edited"),
        (lambda d: (d / "held-out/state.json").unlink(), "cannot be read (No such file"),
        (lambda d: (d / "hard-tokens.json").unlink(), "make one with `cascade collect-hard --out"),
        (lambda d: shutil.rmtree(d), "make one with `cascade collect-hard --output`"),
        (lambda d: edited(d / "hard-tokens.json", lambda b: b[:-9]), "is torn or edited"),
        (lambda d: with_record(d, lambda r: r.update(layer=2)), "it is not what its hash says"),
        (lambda d: with_record(d, lambda r: r.pop("parts")), "expected an object at parts"),
        (lambda d: with_record(d, lambda r: r.update(schema=2)), "this release reads up to 1"),
        (lambda d: with_record(d, lambda r: r.update(kind="bench")), "of kind hard-tokens, got"),
    ],
)
def test_a_dataset_that_was_harmed_is_refused_in_one_line(
    tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    collect(tmp_path / "d")
    assert len(load_hard_tokens(tmp_path / "d")) == 29
    harm(tmp_path / "d")
    with pytest.raises(RecordError) as caught:
        load_hard_tokens(tmp_path / "d")
    assert message in one_line(caught)


def test_what_a_record_says_of_its_origin(tmp_path: Path) -> None:
    found = collect(tmp_path / "d", provenance={"command": "cascade collect-hard"})
    record = load_hard_tokens(str(tmp_path / "d")).record
    assert record == found.record
    said = record["provenance"]
    assert said["model"]["weights_hash"] == a_stack("llama").weights_hash()
    assert said["command"] == "cascade collect-hard"
    for part, blocks in some_parts().items():
        assert said["corpora"][part] == to_plain(blocks.provenance())
        hard = everything(found, part)["hard"].numpy()
        assert record["parts"][part] == {
            "sequences": len(blocks.ids),
            "tokens": blocks.tokens,
            "hard": hard.sum(),
            "hard_ratio": hard.mean(),
            "response": blocks.response.sum(),
            "hard_response": (hard & blocks.response).sum(),
        }


# --- The folder ------------------------------------------------------------------------------


def test_the_size_is_known_beforehand(tmp_path: Path) -> None:
    parts = some_parts(200, 50, 64)
    found = collect_hard(a_stack("llama"), parts, tmp_path / "d", layer=3, hard_ratio=0.5)
    size = sum(file["bytes"] for file in found.record["files"])
    assert (
        size
        == sum(path.stat().st_size for path in (tmp_path / "d").rglob("*") if path.is_file())
        - (tmp_path / "d/hard-tokens.json").stat().st_size
    )
    # Beside the columns there are descriptions of the same size whatever the corpus.
    assert expected_bytes(a_stack("llama"), parts) == pytest.approx(size, rel=0.03)


def test_a_disk_that_is_too_small_is_refused_before_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 9999, 9999))
    monkeypatch.setattr(DecoderStack, "visit", None)
    with pytest.raises(OutputError) as caught:
        collect(tmp_path / "d")
    assert "the disk has 1e-05 GB free" in one_line(caught)
    assert not (tmp_path / "d").exists()


@pytest.mark.usefixtures("small_shards")
def test_a_disk_that_fills_on_the_way_keeps_what_it_has(tmp_path: Path) -> None:
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


def test_an_earlier_dataset_goes_only_when_told_and_only_for_a_finished_one(
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


def test_a_whole_dataset_of_the_same_arguments_is_reused_when_asked_for(tmp_path: Path) -> None:
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
def test_files_that_are_not_ours_are_never_replaced(tmp_path: Path, name: str, ours: bool) -> None:
    if ours and "/" not in name:
        return
    folder = tmp_path / "d"
    if ours:
        collect(folder)
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("mine")
    before = contents(folder)
    with pytest.raises(OutputError, match="is in the way, and of no dataset of hard tokens"):
        collect(folder, overwrite=True)
    assert contents(folder) == before


def test_what_datasets_caches_in_the_folder_is_no_stranger(tmp_path: Path) -> None:
    collect(tmp_path / "d")
    loaded = datasets.load_from_disk(str(tmp_path / "d"))["train"]
    loaded.map(lambda row: {"hards": sum(row["hard"])})
    assert list((tmp_path / "d/train").glob("cache-*"))
    load_hard_tokens(tmp_path / "d")
    del loaded
    collect(tmp_path / "d", overwrite=True)
    assert not list((tmp_path / "d/train").glob("cache-*"))


def test_a_file_or_another_process_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        collect(tmp_path / "f")
    with pytest.raises(OutputError, match="File name too long"):
        collect(tmp_path / ("x" * 300))

    def second(_: int) -> None:
        collect(tmp_path / "d")

    with pytest.raises(OutputError, match="another process is collecting into"):
        collect(tmp_path / "d", progress=second)


# --- Interruptions ---------------------------------------------------------------------------


class Stopped(BaseException):
    """As Ctrl-C: not an error."""


def stop_after(tokens: int) -> Callable[[int], None]:
    left = tokens

    def progress(done: int) -> None:
        nonlocal left
        left -= done
        if left <= 0:
            raise Stopped

    return progress


@pytest.mark.usefixtures("small_shards")
def test_progress_adds_up_to_all_tokens_and_counts_what_is_there_already(tmp_path: Path) -> None:
    done: list[int] = []
    collect(tmp_path / "a", progress=done.append)
    assert sum(done) == 29 * LENGTH
    with pytest.raises(Stopped):
        collect(tmp_path / "d", progress=stop_after(12 * LENGTH))
    done.clear()
    collect(tmp_path / "d", progress=done.append)
    assert sum(done) == 29 * LENGTH


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_pass_goes_on_and_computes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(tmp_path / "whole")
    visit, seen = DecoderStack.visit, []

    def counted(self: DecoderStack, ids: torch.Tensor, visitor: Any) -> Any:
        seen.append(len(ids))
        return visit(self, ids, visitor)

    with pytest.raises(Stopped):
        collect(tmp_path / "d", progress=stop_after(13 * LENGTH))
    monkeypatch.setattr(DecoderStack, "visit", counted)
    collect(tmp_path / "d")
    # Three whole shards of 4 sequences were there; the fourth was half on its way.
    assert sum(seen) == 29 - 12
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_a_shard_that_was_harmed_meanwhile_is_made_again(tmp_path: Path) -> None:
    collect(tmp_path / "whole")
    with pytest.raises(Stopped):
        collect(tmp_path / "d", progress=stop_after(13 * LENGTH))
    shards = sorted((tmp_path / "d").rglob("data-*.arrow"))
    edited(shards[0], lambda content: content[: len(content) // 2])
    shutil.copy(shards[2], shards[1])
    collect(tmp_path / "d")
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layer": 2}, "states, layer: 3, now 2"),
        ({"dtype": "bfloat16"}, "states, dtype: float16, now bfloat16"),
        ({"batch_size": 2}, "batches, batch_size: 4, now 2"),
        ({"family": "qwen2"}, "model, family: llama, now qwen2"),
        ({"parts": some_parts(21, 8)}, "train part, tokens: 264, now 252"),
    ],
)
def test_an_unfinished_dataset_of_other_arguments_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stopped):
        collect(tmp_path / "d", progress=stop_after(13 * LENGTH))
    if "parts" in settings:
        parts = settings.pop("parts")
        monkeypatch.setitem(globals(), "some_parts", lambda: parts)
    before = contents(tmp_path / "d")
    with pytest.raises(OutputError) as caught:
        collect(tmp_path / "d", **settings)
    assert f"holds an unfinished dataset of other arguments ({named})" in one_line(caught)
    assert contents(tmp_path / "d") == before
    collect(tmp_path / "d", overwrite=True, **settings)
    collect(tmp_path / "e", **settings)
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


_KILLED = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
import test_hard_tokens as tests
from cascade import hard_tokens
from support.disk import contents

torch.set_num_threads(1)
hard_tokens._SHARD_BYTES, hard_tokens._MOST_SHARDS = 1, 1000
folder = Path(sys.argv[2])
tests.a_stack("llama"), tests.some_parts()
earlier = len(sys.argv) > 3

def collect(name):
    return tests.collect(folder / name, overwrite=earlier)

def dies_at(number):
    # Every rename, and every removal of a file: all that changes what is on the disk for good.
    left = [number]
    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    Path.replace = counted(Path.replace)
    os.unlink = counted(os.unlink)
    os.rmdir = counted(os.rmdir)

collect("whole")
expected = contents(folder / "whole")
killed = 0
for number in range(1000):
    name = str(number)
    if earlier:
        tests.collect(folder / name, hard_ratio=0.3)
    child = os.fork()
    if child == 0:
        dies_at(number)
        collect(name)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, (number, status)
    killed += 1
    if not (folder / name / "hard-tokens.json").exists():
        try:
            tests.load_hard_tokens(folder / name)
        except tests.RecordError:
            pass
        else:
            raise AssertionError(number)
    found = collect(name)
    assert contents(folder / name) == expected, number
    assert tests.load_hard_tokens(folder / name).record == found.record
print(killed)
"""


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_at_any_point_it_goes_on_to_the_same_bytes(tmp_path: Path, earlier: bool) -> None:
    """Kill a process at every single change of the disk, over an earlier dataset as well."""
    arguments = [str(Path(__file__).parents[1]), str(tmp_path), *(["earlier"] if earlier else [])]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    # 8 shards are written and then marked, and 6 files more; moved up, and cleared away.
    assert int(done.stdout) > 25


# --- Memory ----------------------------------------------------------------------------------

_PEAK = """
import sys, tempfile
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
import test_hard_tokens as tests
from cascade import hard_tokens
from cascade.benchmarks.memory import peak_memory, reset_peak_memory

torch.set_num_threads(1)
hard_tokens._SHARD_BYTES = 1e6
stack = tests.DecoderStack(tests.tiny_model("llama", hidden_size=512, num_layers=2))
peaks = []
for rows in (160, 160, 1280):
    parts = tests.some_parts(rows, rows // 4, 32)
    reset_peak_memory()
    found = tests.collect_hard(stack, parts, Path(sys.argv[2]) / "d", layer=1, hard_ratio=0.5,
                               batch_size=8, overwrite=True)
    peaks.append(peak_memory())
print(peaks[2] - peaks[1], sum(file["bytes"] for file in found.record["files"]))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    from cascade.benchmarks.memory import STEADY_MALLOC

    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(Path(__file__).parents[1]), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | STEADY_MALLOC,
    )
    assert done.returncode == 0, done.stderr
    growth, size = map(int, done.stdout.split())
    # Eight times the tokens: the states alone would add 46 MB. Tokens, marks and similarities do.
    assert size > 50e6
    assert growth < 8e6
