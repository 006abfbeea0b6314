"""Long contexts in the gate: what is compared, what is said, and what cannot be checked."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec.structs
import numpy as np
import pytest
from support.build_profiles import write_rows
from support.long_faults import LONG_FAULTS, long_blocks, long_stack

from cascade.core.errors import BrokenRecordError
from cascade.core.schema import UNSET, from_plain, to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.gate import long_context_check
from cascade.gate.baselines import StoredProfile, seal
from cascade.gate.comparison import LEAST_TOLERANCE, NOISE_FACTOR, tolerance_of
from cascade.gate.drift import compare
from cascade.gate.long_context_comparison import compare_long
from cascade.gate.quick_gate import run_gate
from cascade.gate.records import ComparisonRecord
from cascade.gate.remeasuring import measure_whole, still_holds
from cascade.models.stack import DecoderStack
from cascade.report.gate.wording import long_context_rows, sentences
from cascade.saturation.long_context import measure_long
from cascade.saturation.long_statistics import LongStatistics
from cascade.saturation.profile import SaturationProfile, analyze

BLOCKS = long_blocks()


@pytest.fixture(scope="module")
def profile() -> SaturationProfile:
    return measure_whole(long_stack("llama"), BLOCKS)


@pytest.fixture(scope="module")
def baseline(profile: SaturationProfile) -> StoredProfile:
    return stored(profile)


def stored(profile: SaturationProfile) -> StoredProfile:
    return StoredProfile(seal(profile.record(), profile.arrays()), profile.arrays(), profile.rows)


def said(record: ComparisonRecord) -> list[tuple[str, str]]:
    return list(sentences(record))


def test_the_quick_gate_measures_one_long_sequence_and_the_full_gate_all(
    baseline: StoredProfile,
) -> None:
    stack = long_stack("llama")
    for full, sequences in ((False, 1), (True, 2)):
        gate = run_gate(stack, BLOCKS, baseline, full=full)
        long = gate.comparison.long_context
        assert long is not None
        assert (long.verdict, long.length, long.sequences) == ("PASS", 512, sequences)
        assert [each.first for each in long.ranges] == list(range(1, 513, 64))
        assert gate.profile is not None
        assert gate.profile.long is not None
        # Its tokens are not part of the quick gate's budget.
        assert gate.comparison.tokens == (BLOCKS.tokens if full else 512)
        label, text = said(gate.record())[1]
        assert label == "Long contexts"
        assert "of 512 tokens in 8 ranges of positions agree (largest difference 0e+00" in text


def test_a_failure_names_the_first_positions_and_layer(baseline: StoredProfile) -> None:
    stack = long_stack("llama")
    with LONG_FAULTS["llama frozen"].fault.plant(stack):
        comparison = run_gate(stack, BLOCKS, baseline).comparison
    assert comparison.exit_status() == 1
    assert comparison.headline().startswith(
        "positions beyond 128 differ from the baseline; short sequences: no drift"
    )
    assert comparison.attribution is not None
    assert comparison.attribution.text.startswith(
        "positions beyond 128 are computed differently, from layer 1 on, by up to "
    )
    assert comparison.decoding is None
    record = comparison.record()
    assert from_plain(to_plain(record), ComparisonRecord) == record
    rows = long_context_rows(record)
    assert [row[2] for row in rows] == ["none"] * 2 + ["1"] * 6
    assert rows[2][0] == "129 to 192"
    assert "Long contexts" not in dict(said(record))


def test_a_broken_layer_is_named_by_the_short_sequences(baseline: StoredProfile) -> None:
    stack: Any = long_stack("llama")
    stack.layers[2].mlp.down_proj.weight.data.mul_(1.01)
    comparison = run_gate(stack, BLOCKS, baseline).comparison
    assert comparison.attribution is not None
    assert comparison.attribution.cause == "layer"
    assert comparison.long_context is None


def test_it_can_be_turned_off(baseline: StoredProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a long sequence was measured")

    monkeypatch.setattr(long_context_check, "measure_long", refused)
    comparison = run_gate(long_stack("llama"), BLOCKS, baseline, long_context=False).comparison
    assert comparison.verdict == "PASS"
    assert comparison.long_context is None
    with pytest.raises(AssertionError, match="was measured"):
        run_gate(long_stack("llama"), BLOCKS, baseline)


# --- What cannot be checked ------------------------------------------------------------------


def older(baseline: StoredProfile) -> StoredProfile:
    """Return a baseline as an earlier release wrote it."""
    arrays = {name: v for name, v in baseline.state.items() if not name.startswith("long_")}
    content = msgspec.structs.replace(baseline.content, long_context=UNSET)
    return StoredProfile(seal(content, arrays), arrays, baseline.rows)


def unchecked(stack: DecoderStack, blocks: TokenBlocks, baseline: StoredProfile) -> list[str]:
    comparison = run_gate(stack, blocks, baseline).comparison
    assert comparison.verdict == "PASS"
    return [text for label, text in said(comparison.record()) if label == "Not checked"]


def test_an_older_baseline_is_read_with_a_note_how_to_add_them(baseline: StoredProfile) -> None:
    assert unchecked(long_stack("llama"), BLOCKS, older(baseline)) == [
        "long contexts: the baseline has no long sequences; to add them, run `cascade analyze "
        "--output RUN` and `cascade accept RUN`"
    ]


def test_an_older_baseline_of_a_model_with_few_positions_needs_no_note() -> None:
    stack = long_stack("llama", max_position_embeddings=128)
    old = older(stored(measure_whole(stack, BLOCKS)))
    assert unchecked(stack, BLOCKS, old) == []
    assert still_holds(measure_whole(stack, BLOCKS), old)


@pytest.mark.parametrize(
    ("sequences", "wanted", "reason"),
    [
        (80, 0, "turned off with --long-context 0"),
        (
            20,
            None,
            "random gives 320 tokens, too few for a sequence of 512; take more records or "
            "a smaller --long-context",
        ),
    ],
)
def test_a_baseline_without_long_sequences_says_why(
    sequences: int, wanted: int | None, reason: str
) -> None:
    stack, blocks = long_stack("llama"), long_blocks(sequences)
    made = stored(measure_whole(stack, blocks, long_context=wanted))
    assert unchecked(stack, blocks, made) == [
        f"long contexts: the baseline has no long sequences: {reason}"
    ]


def test_a_corpus_that_lost_the_long_text_is_said(baseline: StoredProfile) -> None:
    long = LongStatistics.from_arrays(baseline.arrays())
    assert long is not None
    edited = BLOCKS.ids.copy()
    edited[long.starts + 1, 3] = 5
    found = unchecked(long_stack("llama"), dataclasses.replace(BLOCKS, ids=edited), baseline)
    assert found == [
        "long contexts: the corpus does not have the baseline's long sequences any more"
    ]


def test_a_corpus_that_has_grown_has_them_still(baseline: StoredProfile) -> None:
    more = np.random.default_rng(9).integers(2, 97, (7, 16)).astype(np.int32)
    grown = dataclasses.replace(BLOCKS, ids=np.concatenate([more, BLOCKS.ids]))
    assert unchecked(long_stack("llama"), grown, baseline) == []


def test_a_baseline_without_them_does_not_hold_any_more(
    profile: SaturationProfile, baseline: StoredProfile
) -> None:
    assert still_holds(profile, baseline)
    assert not still_holds(profile, older(baseline))
    assert still_holds(dataclasses.replace(profile, long=None), baseline)


# --- Two profiles ----------------------------------------------------------------------------


def test_two_profiles_are_compared_with_their_long_sequences(
    profile: SaturationProfile, baseline: StoredProfile
) -> None:
    assert profile.long is not None
    same = compare(profile, baseline).long_context
    assert same is not None
    assert same.verdict == "PASS"
    moved = profile.long.total.copy()
    moved[1, 5, 2] += 1 << 34
    other = dataclasses.replace(profile, long=dataclasses.replace(profile.long, total=moved))
    found = compare(other, baseline)
    assert found.verdict == "FAIL"
    assert found.long_context is not None
    (wrong,) = found.long_context.moved
    assert (wrong.first, wrong.last, wrong.layer) == (321, 384, "3")
    assert found.headline().startswith("positions 321 to 384 differ from the baseline; ")
    alone = compare(analyze(long_stack("llama"), BLOCKS), baseline)
    assert alone.verdict == "PASS"
    assert alone.long_context is not None
    assert alone.long_context.reason == "the new profile has no long sequences"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"length": 511}, "the long sequences of both sides have other layers or lengths"),
        ({"layers": ("1",)}, "the long sequences of both sides have other layers or lengths"),
        ({"fingerprints": np.zeros(2, np.uint64)}, "both sides have other long sequences"),
    ],
)
def test_other_long_sequences_are_not_compared(
    profile: SaturationProfile, change: dict[str, Any], reason: str
) -> None:
    assert profile.long is not None
    found = compare_long(dataclasses.replace(profile.long, **change), profile.long, 2e-6)
    assert (found.verdict, found.reason) == ("NOT CHECKED", reason)


def test_a_square_that_moves_alone_is_seen(profile: SaturationProfile) -> None:
    assert profile.long is not None
    squares = profile.long.square_total.copy()
    squares[0, 0, 1] -= 1 << 34
    other = dataclasses.replace(profile.long, square_total=squares)
    found = compare_long(other, profile.long, 2e-6)
    assert [each.layer for each in found.moved] == ["2"]


def test_the_tolerance_covers_the_noise_of_long_sequences(profile: SaturationProfile) -> None:
    record = profile.record()
    assert profile.noise is not None
    assert profile.noise.long is not UNSET
    assert 0 < profile.noise.long < LEAST_TOLERANCE
    noisy = msgspec.structs.replace(profile.noise, long=1e-3)
    loud = msgspec.structs.replace(record, noise=noisy)
    assert tolerance_of(loud, loud, None, long=True)[0] == NOISE_FACTOR * 1e-3
    assert tolerance_of(loud, loud, None)[0] == LEAST_TOLERANCE


def test_a_record_with_other_long_sequences_than_its_arrays_is_refused(
    baseline: StoredProfile, tmp_path: Any
) -> None:
    from cascade.core.records import packed, to_file
    from cascade.gate.baselines import read_profile

    path = tmp_path / "profile.json"
    about = msgspec.structs.replace(baseline.content.long_context, sequences=3)  # type: ignore[type-var]
    content = seal(msgspec.structs.replace(baseline.content, long_context=about), baseline.arrays())
    path.write_text(to_file(content), encoding="utf-8")
    path.with_suffix(".npz").write_bytes(packed(baseline.arrays()))
    write_rows(path.with_suffix(".parquet"), baseline)
    with pytest.raises(BrokenRecordError, match="have other long sequences"):
        read_profile(path)
    path.write_text(to_file(baseline.content), encoding="utf-8")
    assert read_profile(path).record() == baseline.record()


def test_long_sequences_are_measured_one_by_one(profile: SaturationProfile) -> None:
    from cascade.saturation.long_context import choose_long

    stack = long_stack("llama")
    chosen = choose_long(stack, BLOCKS, None).sequences
    assert chosen is not None
    assert profile.long is not None
    alone = measure_long(stack, chosen.only(slice(1, 2)))
    assert np.array_equal(alone.total, profile.long.total[1:])
