"""The law of shards: any split, in any order, gives the bytes of one pass."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.build_profiles import LAYERS, similarities_of
from support.build_shards import compared, in_one_pass, planned, write
from support.tiny_models import KINDS, tiny_model

import cascade
from cascade.core.errors import OutputError, RecordError
from cascade.core.provenance import EngineProvenance, MachineProvenance
from cascade.core.schema import UNSET, known
from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from cascade.saturation import row_files
from cascade.shards.merging import machine_notes, merge, missing_shards


def merged(folder: Path, values: Any, borders: list[int], order: list[int], batch: int) -> Path:
    """Write the shards of a split in an order, merge them, and return the folder of the run."""
    plan = planned(folder / "plan", values, borders, batch)
    for number in order:
        assert write(plan, values, number)
    merge(plan, folder / "run")
    return folder / "run"


@given(st.data())
@settings(max_examples=25)
def test_any_split_in_any_order_gives_the_bytes_of_one_shard(data: st.DataObject) -> None:
    sequences = data.draw(st.integers(1, 14))
    batch = data.draw(st.integers(1, 4))
    values = similarities_of(sequences, seed=data.draw(st.integers(0, 3)))
    possible = list(range(batch, sequences, batch))
    borders = sorted(data.draw(st.sets(st.sampled_from(possible)))) if possible else []
    order = data.draw(st.permutations(range(len(borders) + 1)))
    group = data.draw(st.integers(1, 5))
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "GROUP", group)
        split = merged(Path(place, "split"), values, borders, order, batch)
        whole = merged(Path(place, "whole"), values, [], [0], batch)
        assert compared(split) == compared(whole)
        profile, expected = cascade.read_profile(split), in_one_pass(values, batch)
        assert profile.record().layers == expected.record().layers
        arrays = expected.arrays()
        assert all(np.array_equal(profile.arrays()[name], arrays[name]) for name in arrays)
        assert np.array_equal(profile.rows.all().statistics(), expected.rows.all().statistics())


def stack_of(family: str) -> DecoderStack:
    if family in KINDS:
        return DecoderStack(tiny_model(family, **KINDS[family]))
    return DecoderStack(tiny_model(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bloom", "mixtral"])
def test_shards_of_a_model_give_the_bytes_of_analyze(family: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(2, 97, (41, 12)).astype(np.int32)
    stack, blocks = stack_of(family), TokenBlocks(ids, "random", "random", 41)
    one = cascade.analyze(stack, blocks, batch_size=3)
    found = []
    for shards in (1, 2, 7):
        plan = cascade.plan(stack, blocks, tmp_path / f"p{shards}", shards=shards, batch_size=3)
        for number in np.random.default_rng(shards).permutation(shards).tolist():
            cascade.measure_shard(plan, number, model=stack)
        profile = cascade.merge(plan, tmp_path / f"r{shards}")
        found.append(compared(tmp_path / f"r{shards}"))
    assert found[1:] == found[:1] * 2
    record = profile.record()
    assert record.layers == one.record().layers
    assert replace(record.provenance, engine=UNSET) == one.provenance
    arrays = one.arrays()
    assert all(np.array_equal(profile.arrays()[name], arrays[name]) for name in arrays)
    assert cascade.compare(profile, one).verdict == "PASS"


def test_missing_shards_are_named(tmp_path: Path) -> None:
    values = similarities_of(8)
    plan = planned(tmp_path / "plan", values, [2, 4, 6])
    write(plan, values, 1)
    write(plan, values, 3)
    assert missing_shards(plan) == [0, 2]
    with pytest.raises(RecordError, match=r"lacks 2 of 4 shards \(0, 2\); measure each with"):
        merge(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_engine_is_recorded_apart_from_what_is_compared(tmp_path: Path) -> None:
    values = similarities_of(6)
    plan = planned(tmp_path / "plan", values, [2, 4])
    for number, engine in enumerate(("ray 2.60.0", "ray 2.60.0", "datatrove 1.0")):
        write(plan, values, number, engine=engine)
    provenance = merge(plan, tmp_path / "run").record().provenance
    engine = known(provenance.engine)
    assert engine is not None
    assert (engine.shards, engine.engines) == (3, ["datatrove 1.0", "ray 2.60.0"])
    assert [one.shards for one in engine.machines] == [3]
    assert provenance.machine == engine.machines[0].machine
    assert machine_notes(engine) == []


def test_different_processors_and_threads_are_said(tmp_path: Path) -> None:
    values = similarities_of(6)
    plan = planned(tmp_path / "plan", values, [2, 4])
    here = MachineProvenance(processor="A", threads=1, capability="AVX2", blas="mkl")
    machines = (here, replace(here, processor="B"), replace(here, threads=2, products="bf16"))
    for number, machine in enumerate(machines):
        write(plan, values, number, machine=machine)
    provenance = merge(plan, tmp_path / "run").record().provenance
    notes = machine_notes(engine_of(provenance))
    assert [note.partition(", so")[0] for note in notes] == [
        "Shards were measured on different processors (A, B)",
        "Shards were measured with different numbers of threads (1, 2)",
        "Shards were measured with different precisions of products (bf16, full)",
    ]
    # No machine is equal to this one, so that the gate measures noise where it compares with it.
    assert known(provenance.machine) not in machines
    assert known(provenance.machine).processor == "A and B"  # type: ignore[union-attr]
    assert known(provenance.machine).products == "bf16 and full"  # type: ignore[union-attr]


def engine_of(provenance: Any) -> EngineProvenance:
    engine: EngineProvenance = provenance.engine
    return engine


def test_a_merge_holds_one_group_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = similarities_of(40)
    monkeypatch.setattr(row_files, "GROUP", 4)
    plan = planned(tmp_path / "plan", values, list(range(8, 40, 8)))
    for number in range(5):
        write(plan, values, number)
    held: list[int] = []
    write_group = row_files.RowWriter._write

    def watched(self: Any, rows: Any, fingerprints: Any) -> None:
        held.append(self._count)
        write_group(self, rows, fingerprints)

    monkeypatch.setattr(row_files.RowWriter, "_write", watched)
    merge(plan, tmp_path / "run")
    assert len(held) == 10
    assert max(held) <= 2 * 4


def test_progress_counts_every_token(tmp_path: Path) -> None:
    values = similarities_of(10)
    plan = planned(tmp_path / "plan", values, [4])
    for number in range(2):
        write(plan, values, number)
    done: list[int] = []
    merge(plan, tmp_path / "run", progress=done.append)
    assert sum(done) == values[0].size


def test_a_merge_leaves_an_earlier_run_as_it_is(tmp_path: Path) -> None:
    values = similarities_of(4)
    plan = planned(tmp_path / "plan", values, [2])
    for number in range(2):
        write(plan, values, number)
    merge(plan, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(OutputError, match="holds another run"):
        merge(plan, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    merge(plan, tmp_path / "run", overwrite=True)


def test_layers_and_shards_of_the_helper_are_those_of_a_plan(tmp_path: Path) -> None:
    plan = planned(tmp_path / "plan", similarities_of(6), [2, 4])
    assert plan.record.layers == LAYERS
    assert [*itertools.chain(*(shard.sequences for shard in plan.record.shards))] == [*range(6)]
