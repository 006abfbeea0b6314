"""Budgets measured again: the same points, tokens, heads and settings, or a word on why not."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import tiny_model, tiny_tokenizer

from cascade.core.errors import ModelError, RecordError, UsageError
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_fitting import fit_heads
from cascade.gate.budgets import accept_budgets, check_budgets
from cascade.gate.remeasuring import (
    evaluate_points,
    find_heads,
    first_points,
    group_blocks,
    read_groups,
    rerun,
)
from cascade.models.stack import DecoderStack

TEXT = "".join(random.Random(0).choices(string.ascii_letters, k=2000))


def a_stack(seed: int = 0, weights: str = "w") -> DecoderStack:
    about = {"name": "tiny", "weights_hash": weights, "revision": None, "tokenizer_hash": "t"}
    model = tiny_model("llama", seed=seed)
    return DecoderStack(model, tokenizer=tiny_tokenizer(), provenance=about)


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def blocks(source: str) -> TokenBlocks:
    return load_blocks(source, tiny_tokenizer(), seq_len=16, max_tokens=81 * 16)


def fitted(stack: DecoderStack, blocks: TokenBlocks) -> FittedHeads:
    from cascade.core.provenance import provenance_of

    return fit_heads(stack, blocks, (2,), provenance=provenance_of(stack, blocks, None))


def test_a_group_is_measured_again_on_the_same_tokens_in_the_same_way(
    tmp_path: Path, source: str, blocks: TokenBlocks
) -> None:
    stack = a_stack()
    points = first_points(stack, blocks, None)
    made = evaluate_points(
        stack, points, blocks, propagation="exact", batch_size=3, seed=5, command="cascade evaluate"
    )
    path = accept_budgets(tmp_path, made).path
    (group,) = read_groups(path)
    # The last of 81 sequences confirms nothing: 80 are what is read.
    again = group_blocks(stack, group, source)
    assert len(again.ids) == 80
    record = rerun(stack, group, again)
    timed = ("seconds_ratio", "seconds_ratio_interval")
    same = [{k: v for k, v in row.items() if k not in timed} for row in made["points"]]
    assert [{k: v for k, v in row.items() if k not in timed} for row in record["points"]] == same
    for name in ("propagation", "batch_size", "seed"):
        assert record["settings"][name] == made["settings"][name]
    assert (
        record["provenance"]["corpus"]["fingerprint"]
        == group["provenance"]["corpus"]["fingerprint"]
    )
    assert {o.figure for o in check_budgets(record, {"groups": [group]})} <= {"seconds_ratio"}


def test_first_points_are_the_studys_at_the_layer_that_is_asked_for(blocks: TokenBlocks) -> None:
    stack = a_stack()
    suggested = first_points(stack, blocks, None)
    assert {point.layer for point in suggested} == {3}
    assert [point.threshold for point in suggested] == sorted(p.threshold for p in suggested)
    assert len(suggested) == 3
    asked = first_points(stack, blocks, 2)
    assert {(point.layer, point.rule, point.source) for point in asked} == {(2, "cosine", "given")}
    rows = evaluate_points(stack, asked, blocks)["points"]
    # Thresholds come from the other half of the text.
    np.testing.assert_allclose([row["exit_share"] for row in rows], [0.7, 0.5, 0.3], atol=0.1)
    with pytest.raises(UsageError, match=r"expected an exit layer in 1\.\.4, got 5"):
        first_points(stack, blocks, 5)


def test_heads_are_found_by_their_fingerprint_among_others(
    tmp_path: Path, blocks: TokenBlocks
) -> None:
    stack, other = a_stack(), a_stack(1, "other")
    heads = fitted(stack, blocks)
    fitted(other, blocks).save(tmp_path / "a.heads.safetensors")
    heads.save(tmp_path / "b.heads.safetensors")
    found = find_heads(tmp_path, heads.fingerprint(), stack)
    assert found is not None
    assert found.fingerprint() == heads.fingerprint()
    assert find_heads(tmp_path, None, stack) is None
    with pytest.raises(ModelError, match="other"):
        find_heads(tmp_path, "sha256:neither", stack)
    (tmp_path / "a.heads.safetensors").unlink()
    with pytest.raises(RecordError, match=r"no exit heads sha256:neither.*found: b\.heads"):
        find_heads(tmp_path, "sha256:neither", stack)
    with pytest.raises(RecordError, match="found: none"):
        find_heads(tmp_path / "nowhere", "sha256:neither", stack)


def _drop(place: str) -> Any:
    def edit(record: Any) -> None:
        *parents, last = place.split(".")
        inner = record
        for name in parents:
            inner = inner[int(name) if name.isdecimal() else name]
        del inner[last]

    return edit


@pytest.mark.parametrize(
    "place",
    [
        "groups",
        "groups.0.points",
        "groups.0.points.0.threshold",
        "groups.0.settings.batch_size",
        "groups.0.settings.seed",
        "groups.0.provenance.corpus.seq_len",
    ],
)
def test_a_file_that_lacks_what_a_rerun_needs_is_refused_by_that_name(
    tmp_path: Path, blocks: TokenBlocks, place: str
) -> None:
    stack = a_stack()
    made = evaluate_points(stack, first_points(stack, blocks, 2), blocks)
    path = accept_budgets(tmp_path, made).path
    record = json.loads(path.read_text())
    _drop(place)(record)
    path.write_text(json.dumps(record))
    with pytest.raises(RecordError, match=f"torn or edited .*{place.rpartition('.')[2]}"):
        read_groups(path)
