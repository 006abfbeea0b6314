"""Measuring baselines and budgets again: same text, operating points, heads and settings."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from support.build_evaluations import a_plain_evaluation, a_row, an_evaluation
from support.build_gate import BLOCKS, broken
from support.build_gate import a_stack as a_small_stack
from support.build_profiles import a_profile, profile_of, provenance, similarities_of
from support.disk import contents, largest_file
from support.records import edit_sealed
from support.tiny_models import tiny_model, tiny_tokenizer

from cascade.core.errors import ModelError, OutputError, RecordError, UsageError
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.evaluation.records import EvaluationRecord, OperatingPointRow
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_fitting import fit_heads
from cascade.gate.accepting import store_profile
from cascade.gate.baseline_corpus import GivenCorpus
from cascade.gate.baselines import StoredProfile, read_profile
from cascade.gate.budgets import accept_budgets, check_budgets, read_budgets
from cascade.gate.drift import compare
from cascade.gate.remeasuring import (
    PointsConfig,
    evaluate_points,
    find_heads,
    first_points,
    group_blocks,
    measure_whole,
    replace_budgets,
    rerun,
    still_holds,
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


def test_a_group_is_measured_again_on_the_same_tokens_and_settings(
    tmp_path: Path, source: str, blocks: TokenBlocks
) -> None:
    stack = a_stack()
    points = first_points(stack, blocks, None)
    config = PointsConfig(propagation="exact", batch_size=3, seed=5, command="cascade evaluate")
    made = evaluate_points(stack, points, blocks, config=config)
    path = accept_budgets(tmp_path, made).path
    (group,) = read_budgets(path).groups
    # The last of 81 sequences is in no confirmation split, so 80 are read.
    again = group_blocks(stack, group, GivenCorpus(source=source))
    assert len(again.ids) == 80
    record = rerun(stack, group, again)

    def untimed(evaluation: EvaluationRecord) -> list[OperatingPointRow]:
        timed = {"seconds_ratio": 1.0, "seconds_ratio_interval": None}
        return [replace(row, **timed) for row in evaluation.points]

    assert untimed(record) == untimed(made)
    assert record.settings == made.settings
    assert record.provenance.corpus.fingerprint == group.provenance.corpus.fingerprint
    assert {o.figure for o in check_budgets(record, [group])} <= {"seconds_ratio"}


def test_default_operating_points_use_the_studys_hard_ratios(blocks: TokenBlocks) -> None:
    stack = a_stack()
    suggested = first_points(stack, blocks, None)
    assert {point.layer for point in suggested} == {3}
    assert [point.threshold for point in suggested] == sorted(p.threshold for p in suggested)
    assert len(suggested) == 3
    given = first_points(stack, blocks, 2)
    assert {(point.layer, point.rule, point.source) for point in given} == {(2, "cosine", "given")}
    rows = evaluate_points(stack, given, blocks).points
    # Thresholds come from the other half of the text, so the shares are approximate.
    np.testing.assert_allclose([row.exit_share for row in rows], [0.7, 0.5, 0.3], atol=0.1)
    with pytest.raises(UsageError, match=r"expected an exit layer in 1\.\.4, got 5"):
        first_points(stack, blocks, 5)


def test_heads_are_found_by_their_fingerprint(tmp_path: Path, blocks: TokenBlocks) -> None:
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
def test_budgets_without_a_field_that_a_rerun_needs_are_refused(
    tmp_path: Path, blocks: TokenBlocks, place: str
) -> None:
    stack = a_stack()
    made = evaluate_points(stack, first_points(stack, blocks, 2), blocks)
    path = accept_budgets(tmp_path, made).path
    edit_sealed(path, _drop(place))
    with pytest.raises(RecordError, match=f"torn or edited .*{place.rpartition('.')[2]}"):
        read_budgets(path)


# --- Baselines and budgets, stored -----------------------------------------------------------


def test_a_baseline_covers_the_whole_corpus_and_stores_its_noise_floor(tmp_path: Path) -> None:
    profile = measure_whole(a_small_stack(), BLOCKS, command="pytest --force-regen")
    path, before = store_profile(tmp_path, profile)
    assert (path, before) == (tmp_path / "tiny/random.saturation.json", None)
    stored = read_profile(path)
    record = stored.record()
    assert record.noise
    assert record.noise.repeat < 1e-6
    assert record.provenance.command == "pytest --force-regen"
    assert len(stored.rows) == len(BLOCKS.ids)
    again = measure_whole(broken(), BLOCKS)
    _, before = store_profile(tmp_path, again)
    assert before is not None
    assert before.record() == stored.record()


def test_a_repeated_profile_still_holds_and_a_moved_one_does_not() -> None:
    before = a_profile(12)
    assert still_holds(a_profile(12), before)
    assert not still_holds(a_profile(12, seed=1), before)
    assert compare(a_profile(12, seed=1), before).verdict == "FAIL"


def test_a_baseline_with_fewer_or_more_sequences_does_not_hold() -> None:
    values = similarities_of(12)
    ten, twelve = profile_of(values[:, :10]), profile_of(values)
    for new, before in ((ten, twelve), (twelve, ten)):
        assert compare(new, before).verdict == "PASS"
        assert not still_holds(new, before)


def test_another_model_or_an_older_schema_never_holds() -> None:
    old = a_profile(12)
    assert not still_holds(a_profile(12, about=provenance(model__weights_hash="w2")), old)
    first = StoredProfile(replace(old.content, schema=1), old.state, old.rows)
    assert compare(old, first).verdict == "PASS"
    assert not still_holds(old, first)


def test_anyway_compares_different_checkpoints() -> None:
    other = a_profile(12, seed=1, about=provenance(model__weights_hash="w2"))
    assert compare(other, a_profile(12)).verdict == "NOT COMPARABLE"
    assert compare(other, a_profile(12), anyway=True).verdict == "FAIL"


def test_budgets_are_replaced_as_a_whole_even_by_another_checkpoint(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tiny/words.budgets.json"
    replace_budgets(path, [an_evaluation(a_row()), an_evaluation(a_row(), propagation="exact")])
    assert len(json.loads(path.read_text())["groups"]) == 2
    other = a_plain_evaluation(a_row())
    other["provenance"]["model"]["weights_hash"] = "w2"
    replace_budgets(path, [other])
    (group,) = json.loads(path.read_text())["groups"]
    assert group["provenance"]["model"]["weights_hash"] == "w2"


def test_budgets_that_cannot_be_made_or_written_leave_those_before(tmp_path: Path) -> None:
    path = tmp_path / "tiny/words.budgets.json"
    replace_budgets(path, [an_evaluation(a_row())])
    before = contents(tmp_path)
    with pytest.raises(RecordError, match="torn"):
        replace_budgets(path, [an_evaluation(a_row()), a_plain_evaluation({})])
    with largest_file(100), pytest.raises(OutputError):
        replace_budgets(path, [an_evaluation(a_row(agreement=0.5))])
    assert contents(tmp_path) == before
