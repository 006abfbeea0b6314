"""Plans: the sequences of `load_blocks`, whole batches in each shard, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.disk import contents, largest_file
from support.records import edit_sealed
from support.tiny_models import save_checkpoint, tiny_model

import cascade
from cascade.core.errors import CascadeError, CorpusError, OutputError, RecordError, UsageError
from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from cascade.shards.plan import Plan
from cascade.shards.planning import planned_shards


def blocks_of(sequences: int, length: int = 12, seed: int = 0) -> TokenBlocks:
    ids = np.random.default_rng(seed).integers(2, 97, (sequences, length)).astype(np.int32)
    return TokenBlocks(ids, "random", "random", sequences)


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return DecoderStack(tiny_model("llama"))


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 16))
def test_shards_hold_whole_batches_that_are_divided_evenly(
    sequences: int, shards: int, batch: int
) -> None:
    batches = -(-sequences // batch)
    if shards > batches:
        with pytest.raises(UsageError, match=f"expected at most {batches} shards"):
            planned_shards(blocks_of(sequences, 2), shards, batch)
        return
    found = planned_shards(blocks_of(sequences, 2), shards, batch)
    assert [number for shard in found for number in shard.sequences] == list(range(sequences))
    assert all(shard.first % batch == 0 for shard in found)
    sizes = [-(-len(shard.sequences) // batch) for shard in found]
    assert max(sizes) - min(sizes) <= 1


def test_a_plan_has_the_edges_of_analyze_for_any_batch_size(
    stack: DecoderStack, tmp_path: Path
) -> None:
    blocks = blocks_of(40)
    for batch in (1, 5, 32):
        plan = cascade.plan(stack, blocks, tmp_path / f"{batch}", batch_size=batch)
        expected = cascade.analyze(stack, blocks, batch_size=batch).statistics.edges
        assert np.array_equal(plan.edges, expected)


def test_the_edges_of_a_baseline_are_taken_where_one_is_given(
    stack: DecoderStack, tmp_path: Path
) -> None:
    baseline = cascade.analyze(stack, blocks_of(20, seed=1))
    plan = cascade.plan(stack, blocks_of(20), tmp_path / "plan", edges=baseline.arrays()["edges"])
    cascade.measure_shard(plan, 0, model=stack)
    found = cascade.merge(plan, tmp_path / "run")
    assert np.array_equal(found.arrays()["edges"], baseline.statistics.edges)
    with pytest.raises(UsageError, match="expected the bin edges of 5 layers, got 3"):
        cascade.plan(stack, blocks_of(4), tmp_path / "other", edges=np.ones((3, 3)))


def test_a_plan_holds_nothing_of_the_engine(stack: DecoderStack, tmp_path: Path) -> None:
    plan = cascade.plan(stack, blocks_of(9), tmp_path / "plan", shards=3, batch_size=2)
    record = json.loads((plan.folder / "plan.json").read_text())
    assert "engine" not in record["provenance"]
    assert [shard["first"] for shard in record["shards"]] == [0, 2, 6]
    assert Plan.read(plan.folder).hash == record["hash"]


def test_a_file_is_planned_as_load_blocks_reads_it(tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path / "tiny")
    text = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"Number {k} of many short texts."}) for k in range(30)]
    text.write_text("\n".join(lines))
    tokenizer = cascade.load(str(saved)).tokenizer
    plan = cascade.plan(str(saved), text, tmp_path / "plan", seq_len=8, shards=2, batch_size=4)
    expected = cascade.load_blocks(text, tokenizer, seq_len=8)
    assert np.array_equal(plan.all_ids(), expected.ids)
    assert plan.record.provenance.corpus == expected.provenance()


def test_a_plan_says_why_it_has_no_long_sequences(stack: DecoderStack, tmp_path: Path) -> None:
    plan = cascade.plan(stack, blocks_of(4), tmp_path / "plan", long_context=0)
    assert plan.record.long_context.reason == "turned off with --long-context 0"  # type: ignore[union-attr]
    assert plan.long is None


def test_long_sequences_and_noise_are_those_of_a_whole_measurement(
    stack: DecoderStack, tmp_path: Path
) -> None:
    from cascade.gate.remeasuring import measure_whole

    blocks = blocks_of(20)
    plan = cascade.plan(stack, blocks, tmp_path / "plan", shards=3, batch_size=4, long_context=40)
    for number in range(3):
        cascade.measure_shard(plan, number, model=stack)
    found = cascade.merge(plan, tmp_path / "run")
    whole = measure_whole(stack, blocks, long_context=40, batch_size=4)
    assert found.record().long_context == whole.record().long_context
    arrays = whole.arrays()
    assert all(np.array_equal(found.arrays()[name], arrays[name]) for name in arrays)
    assert found.record().noise is not None
    assert found.record().parts == whole.record().parts


# --- Refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shards": 0}, UsageError, "expected at least 1 shard, got 0"),
        ({"shards": 9}, UsageError, "9 sequences make as many batches of 2|expected at most 5"),
        ({"batch_size": 0}, CorpusError, "expected --batch-size of at least 1"),
        ({"seq_len": 4}, UsageError, "seq_len: the corpus is already cut into blocks"),
        ({"long_context": 50}, CorpusError, "a smaller --long-context"),
    ],
)
def test_a_plan_that_cannot_be_made_leaves_nothing(
    stack: DecoderStack,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[CascadeError],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        cascade.plan(stack, blocks_of(4), tmp_path / "plan", **{"batch_size": 2} | options)
    assert contents(tmp_path) == {}


def test_another_plan_is_replaced_on_request_only(stack: DecoderStack, tmp_path: Path) -> None:
    first = cascade.plan(stack, blocks_of(4), tmp_path / "plan")
    cascade.measure_shard(first, 0, model=stack)
    with pytest.raises(OutputError, match="holds another run"):
        cascade.plan(stack, blocks_of(4, seed=1), tmp_path / "plan")
    second = cascade.plan(stack, blocks_of(4, seed=1), tmp_path / "plan", overwrite=True)
    assert second.hash != first.hash
    with pytest.raises(RecordError, match="is of another plan"):
        cascade.measure_shard(second, 0, model=stack)


def test_a_full_disk_leaves_no_plan(stack: DecoderStack, tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(OutputError, match="cannot write"):
        cascade.plan(stack, blocks_of(400), tmp_path / "plan")
    assert contents(tmp_path) == {}


BROKEN: dict[str, tuple[Any, str]] = {
    "a record edited": (
        lambda at: (at / "plan.json").write_text(
            (at / "plan.json").read_text().replace('"batch_size": 2', '"batch_size": 3')
        ),
        "plan.json was changed after it was written",
    ),
    "arrays of another plan": (
        lambda at: (at / "plan.npz").write_bytes((at.parent / "other/plan.npz").read_bytes()),
        "plan.npz is not the file that was written with plan.json",
    ),
    "no token ids": (lambda at: (at / "tokens.bin").unlink(), "no token ids .*tokens.bin"),
    "token ids truncated": (
        lambda at: (at / "tokens.bin").write_bytes((at / "tokens.bin").read_bytes()[:-4]),
        "tokens.bin is torn or edited: expected 432 bytes, got 428",
    ),
    "token ids edited": (
        lambda at: (at / "tokens.bin").write_bytes(bytes(432)),
        "tokens.bin was changed after it was written",
    ),
    "no plan": (lambda at: (at / "plan.json").unlink(), "no record .*plan.json"),
    "a gap between shards": (
        lambda at: edit_sealed(at / "plan.json", lambda r: r["shards"][1].update(first=4)),
        "expected whole batches from sequence 2 on in shard 1",
    ),
    "a shard too few": (
        lambda at: edit_sealed(at / "plan.json", lambda r: r["shards"].pop()),
        "expected shards of 9 sequences, got 6",
    ),
}


@pytest.mark.parametrize(("break_it", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plan_is_refused_by_name(
    stack: DecoderStack, tmp_path: Path, break_it: Any, words: str
) -> None:
    cascade.plan(stack, blocks_of(9, seed=1), tmp_path / "other", batch_size=2)
    cascade.plan(stack, blocks_of(9), tmp_path / "plan", shards=3, batch_size=2)
    break_it(tmp_path / "plan")
    with pytest.raises(RecordError, match=words):
        cascade.measure_shard(tmp_path / "plan", 1, model=stack)
    assert not (tmp_path / "plan/shards").exists()
