"""A profile that Ray measures has the bytes of one that this process measures."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from support.engine_faults import measure_and_count_loads, run_with
from support.shard_runs import (
    BATCH,
    measured_here,
    merged_files,
    planned,
    random_text,
    saved_model,
)

from cascade import DecoderStack, analyze, load_blocks, read_profile
from cascade.engines.cluster import Cluster
from cascade.engines.config import EngineConfig
from cascade.engines.profiles import measure_on_ray
from cascade.engines.steps import MeasureShards
from cascade.shards.plan import Plan
from cascade.shards.planning import plan
from cascade.shards.shard_files import read_shard

TWO = EngineConfig(workers=2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_shards_of_any_number_and_order_give_the_same_bytes(
    family: str, two_workers: Cluster, tmp_path: Path
) -> None:
    stack = saved_model(tmp_path, family)
    expected = None
    for shards in (1, 2, 7, 64):
        made = planned(stack, tmp_path / f"here-{shards}", shards)
        order = random.Random(shards).sample(range(shards), shards)
        found = merged_files(measured_here(made, stack, order), tmp_path / f"merged-{shards}")
        expected = expected or found
        assert found == expected
    for shards in (7, 64) if family == "llama" else (7,):
        made = planned(stack, tmp_path / f"ray-{shards}", shards)
        tokens: list[int] = []
        assert measure_on_ray(made, TWO, progress=tokens.append) == 2
        assert sum(tokens) == random_text().tokens
        assert len(tokens) == shards
        assert merged_files(made, tmp_path / f"from-ray-{shards}") == expected
        engine = read_shard(made, 3)
        assert engine is not None
        assert engine.record.engine == two_workers.engine
    alone = analyze(stack, random_text(), batch_size=BATCH).arrays()
    with np.load(tmp_path / "from-ray-7" / "profile.npz") as arrays:
        assert all(np.array_equal(arrays[name], value) for name, value in alone.items())


@pytest.mark.slow
def test_shards_of_the_reference_model_give_the_same_bytes(
    reference_model: DecoderStack, two_workers: Cluster, tmp_path: Path
) -> None:
    """4,096 tokens in one process, on Ray, and by the step that datatrove calls."""
    text = load_blocks("embedded", reference_model.tokenizer, seq_len=32, max_tokens=4096)

    def made_of(shards: int) -> Plan:
        return plan(
            reference_model,
            text,
            tmp_path / f"plan-{shards}",
            shards=shards,
            batch_size=2,
            long_context=0,
        )

    one = measured_here(made_of(1), reference_model)
    expected = merged_files(one, tmp_path / "merged-1")
    for shards in (2, 7, 64):
        made = made_of(shards)
        assert measure_on_ray(made, TWO) == 2
        assert merged_files(made, tmp_path / f"merged-{shards}") == expected
    made = made_of(5)
    for rank in (1, 0):
        MeasureShards(made.folder, engine="datatrove")(rank=rank, world_size=2)
    assert merged_files(made, tmp_path / "merged-5") == expected
    alone = analyze(reference_model, text, batch_size=2)
    assert alone.record().layers == read_profile(tmp_path / "merged-7").record().layers


def test_only_missing_shards_are_measured(two_workers: Cluster, tmp_path: Path) -> None:
    stack = saved_model(tmp_path)
    made = measured_here(planned(stack, tmp_path / "plan", 5), stack, [0, 3])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "plan").rglob("*.json")}
    tokens: list[int] = []
    measure_on_ray(made, TWO, progress=tokens.append)
    assert len(tokens) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert measure_on_ray(made, TWO, progress=tokens.append) == 0
    assert len(tokens) == 3


def test_the_model_is_loaded_once_in_each_process(two_workers: Cluster, tmp_path: Path) -> None:
    stack = saved_model(tmp_path)
    made = planned(stack, tmp_path / "plan", 12)
    run_with(two_workers, made, stack, measure_and_count_loads)
    loads = list((tmp_path / "plan" / "loads").iterdir())
    assert 1 <= len(loads) <= 2
    assert sum(int(path.read_text()) for path in loads) == 12
