"""What planning has measured is not measured again, and the bytes are those of measuring it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.build_shards import compared
from support.records import edit_sealed
from support.tiny_models import tiny_model

import cascade
from cascade.core.errors import BrokenRecordError
from cascade.core.records import packed
from cascade.core.schema import UNSET, known
from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from cascade.shards import pilots
from cascade.shards.pilots import read_pilot
from cascade.shards.plan import PILOT_FILE, Plan

SEQUENCES = 41
IDS = np.random.default_rng(0).integers(2, 97, (SEQUENCES, 8)).astype(np.int32)
BLOCKS = TokenBlocks(IDS, "random", "random", SEQUENCES)


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return DecoderStack(tiny_model("llama"))


@contextlib.contextmanager
def counted(stack: DecoderStack) -> Iterator[list[int]]:
    """Yield the numbers of sequences that the model runs over, one for each forward pass."""
    found: list[int] = []

    def count(_: Any, inputs: Any, __: Any) -> None:
        found.append(len(inputs[0]))

    handle = stack.layers[0].register_forward_hook(count)
    try:
        yield found
    finally:
        handle.remove()


def planned(stack: DecoderStack, folder: Path, **options: Any) -> Plan:
    return cascade.plan(stack, BLOCKS, folder, long_context=0, **options)


def measured(plan: Plan, stack: DecoderStack) -> list[int]:
    """Measure all shards, the last one first; return the sequences of each forward pass."""
    with counted(stack) as found:
        for number in reversed(range(len(plan.record.shards))):
            cascade.measure_shard(plan, number, model=stack)
    return found


@pytest.mark.parametrize(
    ("batch_size", "shards", "pilot", "by_shard"),
    [
        (32, 1, 32, [32]),
        (32, 2, 32, [32, 0]),
        (5, 3, 20, [15, 5, 0]),
        (1, 41, 16, [1] * 16 + [0] * 25),
        (64, 1, 41, [41]),
    ],
)
def test_no_sequence_is_measured_twice_and_the_bytes_are_those_of_measuring_all(
    batch_size: int,
    shards: int,
    pilot: int,
    by_shard: list[int],
    stack: DecoderStack,
    tmp_path: Path,
) -> None:
    plan = planned(stack, tmp_path / "plan", shards=shards, batch_size=batch_size)
    assert known(plan.record.pilot).sequences == pilot  # type: ignore[union-attr]
    assert sum(measured(plan, stack)) == SEQUENCES - pilot
    taken = [cascade.measure_shard(plan, number).record.piloted for number in range(shards)]
    assert taken == [count or UNSET for count in by_shard]
    cascade.merge(plan, tmp_path / "run")
    # Given edges leave nothing to a pilot, so here the model runs over every sequence.
    options: dict[str, Any] = {"shards": shards, "batch_size": batch_size, "edges": plan.edges}
    whole = planned(stack, tmp_path / "whole", **options)
    assert whole.record.pilot is UNSET
    assert not (whole.folder / PILOT_FILE).exists()
    assert sum(measured(whole, stack)) == SEQUENCES
    cascade.merge(whole, tmp_path / "measured")
    assert compared(tmp_path / "run") == compared(tmp_path / "measured")


def test_a_plan_holds_the_similarities_as_they_were_measured(
    stack: DecoderStack, tmp_path: Path
) -> None:
    seen: list[Any] = []
    cascade.analyze(stack, BLOCKS, batch_size=5, sink=lambda values, _: seen.append(values))
    plan = planned(stack, tmp_path / "plan", batch_size=5)
    found = read_pilot(plan, known(plan.record.pilot))  # type: ignore[arg-type]
    assert found.dtype == np.float32
    assert np.array_equal(found, np.concatenate(seen[:4], axis=1))


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("machine", "processor", "another"),
        ("machine", "threads", 99),
        ("machine", "accelerator", "another"),
        ("model", "device", "cuda"),
        ("model", "attention", "eager"),
        ("model", "placed", "cpu, disk"),
    ],
)
def test_a_shard_on_another_kind_of_machine_measures_everything(
    place: str, name: str, value: Any, stack: DecoderStack, tmp_path: Path
) -> None:
    plan = planned(stack, tmp_path / "plan", batch_size=8)
    edit_sealed(plan.folder / "plan.json", lambda r: r["provenance"][place].update({name: value}))
    assert measured(Plan.read(plan.folder), stack) == [8, 8, 8, 8, 8, 1]


def test_other_threads_than_those_of_the_plan_measure_everything(
    stack: DecoderStack, tmp_path: Path
) -> None:
    plan = planned(stack, tmp_path / "plan", batch_size=32)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert measured(plan, stack) == [32, 9]
    finally:
        torch.set_num_threads(before)


def test_a_pilot_that_is_too_large_to_store_is_measured_again(
    stack: DecoderStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilots, "LARGEST_PILOT", 5 * 16 * 8 * 4 - 1)
    plan = planned(stack, tmp_path / "plan", batch_size=16)
    assert not (plan.folder / PILOT_FILE).exists()
    assert measured(plan, stack) == [16, 16, 9]


def test_a_plan_without_a_pilot_removes_that_of_the_plan_before_it(
    stack: DecoderStack, tmp_path: Path
) -> None:
    edges = planned(stack, tmp_path / "plan").edges
    assert (tmp_path / "plan" / PILOT_FILE).exists()
    planned(stack, tmp_path / "plan", edges=edges, overwrite=True)
    assert not (tmp_path / "plan" / PILOT_FILE).exists()


# --- Refusals --------------------------------------------------------------------------------


def edited(path: Path) -> None:
    with np.load(path) as stored:
        values = stored["similarity"]
    values[0, 0, 0] += np.float32(1e-6)
    path.write_bytes(packed({"similarity": values}))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


BROKEN: dict[str, tuple[Any, str]] = {
    "one number edited": (edited, "pilot.npz is not the file that was written with plan.json"),
    "of another plan": (
        lambda path: shutil.copy(path.parent.parent / "other" / PILOT_FILE, path),
        "pilot.npz is not the file that was written with plan.json",
    ),
    "truncated": (truncated, "pilot.npz is torn"),
    "missing": (lambda path: path.unlink(), "no file .*pilot.npz"),
}


@pytest.mark.parametrize(("break_it", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_pilot_is_refused_by_name(
    break_it: Any, words: str, stack: DecoderStack, tmp_path: Path
) -> None:
    planned(DecoderStack(tiny_model("llama", seed=3)), tmp_path / "other", batch_size=8)
    plan = planned(stack, tmp_path / "plan", shards=2, batch_size=8)
    break_it(plan.folder / PILOT_FILE)
    with pytest.raises(BrokenRecordError, match=words):
        cascade.measure_shard(plan.folder, 0, model=stack)
    assert not (plan.folder / "shards").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequences": 17}, "expected a pilot of whole batches, got 17 sequences"),
        ({"sequences": 48}, "expected a pilot of whole batches, got 48 sequences"),
        ({"sequences": 8}, r"expected similarities of shape \[5, 8, 8\] in float32"),
        ({"arrays_hash": "sha256:0"}, "expected hash sha256:0"),
    ],
)
def test_a_record_that_does_not_fit_its_pilot_is_refused(
    change: dict[str, Any], words: str, stack: DecoderStack, tmp_path: Path
) -> None:
    plan = planned(stack, tmp_path / "plan", batch_size=8)
    edit_sealed(plan.folder / "plan.json", lambda record: record["pilot"].update(change))
    with pytest.raises(BrokenRecordError, match=words):
        cascade.measure_shard(plan.folder, 0, model=stack)
