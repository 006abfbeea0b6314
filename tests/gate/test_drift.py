"""Comparisons: the same sequences one by one, different sequences by intervals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.build_profiles import (
    EDGES,
    LAYERS,
    TOKENS,
    a_profile,
    floor,
    profile_of,
    provenance,
    similarities_of,
)

from cascade.core.errors import RecordError, UsageError
from cascade.gate.baselines import StoredProfile
from cascade.gate.comparison import IDENTITY, LEAST_TOLERANCE, environment_differences
from cascade.gate.drift import MARGIN_FLOOR, STATISTICS, compare


def failed(comparison: Any) -> set[tuple[str, str]]:
    return {(c.layer, c.statistic) for c in comparison.cells if c.verdict == "FAIL"}


def sequence_limits(comparison: Any) -> list[float]:
    cells = comparison.cells
    return [c.limit for c in cells if c.statistic == "mean" and c.sequence is not None]


def moved(layer: int, sequence: int, by: float, *, sequences: int = 12) -> StoredProfile:
    """Return the example profile with one sequence's similarities of one layer moved."""
    values = similarities_of(sequences)
    values[layer, sequence] += by
    return profile_of(values)


# --- The same sequences ----------------------------------------------------------------------


def test_a_profile_matches_itself_in_every_cell() -> None:
    comparison = compare(a_profile(), a_profile())
    assert comparison.verdict == "PASS"
    assert comparison.method == "same sequences"
    assert comparison.sequences == (12, 12)
    assert comparison.tokens == 12 * TOKENS
    names = {cell.statistic for cell in comparison.cells}
    assert names == {*STATISTICS} | {
        *("count", "std", "min", "p10", "p50", "p90", "max", "frac_negative", "frac_below_half")
    }
    # The mean appears twice: per sequence, and in the table.
    assert len(comparison.cells) == len(LAYERS) * (len(STATISTICS) + 10)
    assert comparison.attribution is None
    assert comparison.exit_status() == comparison.exit_status(strict=True) == 0


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_one_sequence_beyond_the_tolerance_fails_and_is_named(layer: int, sign: int) -> None:
    within = compare(moved(layer, 5, sign * 0.9 * LEAST_TOLERANCE), a_profile())
    assert within.verdict == "PASS"
    comparison = compare(moved(layer, 5, sign * 1.1 * LEAST_TOLERANCE), a_profile())
    assert comparison.verdict == "FAIL"
    assert comparison.exit_status() == 1
    assert failed(comparison) == {(LAYERS[layer], "mean")}
    worst = comparison.worst()[0]
    assert (worst.layer, worst.statistic, worst.sequence) == (LAYERS[layer], "mean", 5)
    assert worst.difference == pytest.approx(sign * 1.1 * LEAST_TOLERANCE, rel=1e-3)


def test_a_subset_of_the_baselines_sequences_is_matched_by_fingerprint() -> None:
    values = similarities_of(12)
    few = profile_of(values[:, [9, 2]], fingerprints=np.array([9, 2]))
    comparison = compare(few, a_profile())
    assert comparison.verdict == "PASS"
    assert comparison.sequences == (2, 2)
    # Their table covers other tokens than the baseline's, so it is not compared.
    assert {cell.statistic for cell in comparison.cells} == {*STATISTICS}
    wrong = profile_of(values[:, [9, 2]], fingerprints=np.array([9, 3]))
    assert compare(wrong, a_profile()).verdict == "FAIL"


def test_sequences_missing_from_the_baseline_are_skipped_and_counted() -> None:
    few = profile_of(similarities_of(12)[:, :3], fingerprints=np.array([0, 77, 2]))
    comparison = compare(few, a_profile())
    assert comparison.verdict == "PASS"
    assert comparison.sequences == (2, 2)
    assert "1 of 3 sequences" in comparison.notes[0]


def test_one_shared_sequence_does_not_make_it_the_same_text() -> None:
    values = similarities_of(40, seed=3)
    values[:, 0] = similarities_of(12)[:, 4]
    other = profile_of(values, fingerprints=np.array([4, *range(100, 139)]))
    comparison = compare(other, a_profile())
    assert comparison.method == "other sequences"
    assert "only 1 of 40" in comparison.notes[0]


def test_a_few_tokens_across_a_quantile_fail_its_share() -> None:
    baseline = a_profile(64)
    # Moving an edge takes some of 1,024 tokens to the other side, all in one direction.
    edges = EDGES.copy()
    edges[1, 1] += 12
    counted = profile_of(similarities_of(64), edges=edges)
    # The shares refer to other edges than the stored ones.
    wrong = StoredProfile(counted.content, counted.state | {"edges": EDGES}, counted.rows)
    comparison = compare(wrong, baseline)
    assert failed(comparison) == {("2", "share_p50")}
    assert comparison.attribution is not None
    assert comparison.attribution.cause == "counting"


def test_shares_at_other_quantiles_are_not_compared_and_are_noted() -> None:
    comparison = compare(a_profile(edges=EDGES + 5), a_profile())
    assert comparison.verdict == "PASS"
    assert not {cell.statistic for cell in comparison.cells} & {*STATISTICS[2:]}
    assert "shares were not compared" in comparison.notes[0]


@pytest.mark.parametrize("place", ["mean", "mean_square", "share"])
@pytest.mark.parametrize("on_both", [False, True])
def test_nan_fails_on_either_side_and_on_both(place: str, on_both: bool) -> None:
    profile = a_profile()
    rows = profile.rows.all()
    values = getattr(rows, place).copy()
    values[3, 1] = np.nan
    broken = replace(profile, rows=replace(rows, **{place: values}))
    assert compare(broken, profile).verdict == "FAIL"
    assert compare(profile, broken).verdict == "FAIL"
    if on_both:  # an ordinary table comparison treats NaN as equal to NaN
        assert compare(broken, broken).verdict == "FAIL"


@pytest.mark.parametrize("row", range(len(LAYERS)))
def test_a_layer_missing_on_one_side_fails_and_is_named(row: int) -> None:
    rest = [place for place in range(len(LAYERS)) if place != row]
    shorter = profile_of(
        similarities_of(12)[rest],
        layers=[LAYERS[place] for place in rest],
        edges=EDGES[rest],
    )
    for comparison in (compare(shorter, a_profile()), compare(a_profile(), shorter)):
        assert comparison.verdict == "FAIL"
        assert comparison.attribution is not None
        assert (comparison.attribution.cause, comparison.attribution.layer) == (
            "rows",
            LAYERS[row],
        )


# --- Noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"machine__processor": "B"},
        {"machine__capability": "AVX512"},
        {"machine__blas": "openblas"},
        {"machine__accelerator": "GPU"},
        {"model__device": "cuda"},
        {"versions__torch": "2.14.0"},
    ],
)
def test_another_environment_widens_the_tolerance_by_both_noise_floors(
    change: dict[str, Any],
) -> None:
    here = a_profile(about=provenance(**change), noise=floor(3e-6, 1e-6))
    there = a_profile(noise=floor(1e-6, 4e-6))
    assert environment_differences(here.content.provenance, there.content.provenance)
    comparison = compare(here, there)
    assert sequence_limits(comparison) == pytest.approx([3 * (3e-6 + 4e-6)] * len(LAYERS))
    (note,) = comparison.notes
    assert "made in another environment" in note
    assert "2.1e-05" in note
    # A given noise floor takes precedence over the profile's.
    again = compare(here, there, noise=floor(1e-6, 2e-6))
    assert sequence_limits(again) == pytest.approx([3 * (2e-6 + 4e-6)] * len(LAYERS))


# --- What cannot be compared -----------------------------------------------------------------


@pytest.mark.parametrize("path", IDENTITY)
def test_another_model_or_tokenizer_is_not_comparable(path: tuple[str, ...]) -> None:
    other = a_profile(about=provenance(**{"__".join(path): "another"}))
    comparison = compare(other, a_profile())
    assert comparison.verdict == "NOT COMPARABLE"
    assert comparison.exit_status() == 2
    assert comparison.cells == ()
    (mismatch,) = comparison.mismatches
    assert (mismatch.name, mismatch.obtained) == (".".join(path), "another")
    assert mismatch.expected != "another"
    assert mismatch.remedy
    assert mismatch.name in comparison.headline()
    assert comparison.record().mismatches == [mismatch]
    # With `anyway`, the numbers decide and the difference is noted.
    anyway = compare(other, a_profile(), anyway=True)
    assert anyway.verdict == "PASS"
    assert any(".".join(path) in note for note in anyway.notes)


# --- Other sequences -------------------------------------------------------------------------


def other_text(sequences: int, *, seed: int, by: dict[int, float] | None = None) -> StoredProfile:
    values = similarities_of(sequences, seed=seed)
    for layer, shift in (by or {}).items():
        values[layer] = np.clip(values[layer] + shift, -1, 1)
    return profile_of(values, fingerprints=1000 * seed + np.arange(sequences))


def test_other_text_of_the_same_kind_passes_and_a_moved_layer_fails() -> None:
    baseline = other_text(400, seed=1)
    same = compare(other_text(400, seed=2), baseline)
    assert same.method == "other sequences"
    assert same.verdict == "PASS"
    assert same.sequences == (400, 400)
    comparison = compare(other_text(400, seed=2, by={2: 0.2}), baseline)
    assert comparison.verdict == "FAIL"
    assert {layer for layer, _ in failed(comparison)} == {"3"}
    assert comparison.attribution is not None
    assert (comparison.attribution.cause, comparison.attribution.layer) == ("layer", "3")


def test_too_few_sequences_are_inconclusive_and_name_the_number_needed() -> None:
    baseline = other_text(400, seed=1)
    few = compare(other_text(12, seed=2), baseline)
    assert few.verdict == "INCONCLUSIVE"
    assert few.exit_status() == 0
    assert few.exit_status(strict=True) == 1
    needed = [c.needed for c in few.cells if c.verdict == "INCONCLUSIVE"]
    assert all(number is None or number > 12 for number in needed)
    most = max(number for number in needed if number is not None)
    # That many sequences do decide; twice as many allow for another draw.
    assert compare(other_text(2 * most, seed=2), baseline).verdict == "PASS"
    assert all(c.needed is None for c in few.cells if c.verdict != "INCONCLUSIVE")


def test_the_margin_is_the_baselines_spread_with_a_floor() -> None:
    baseline = other_text(50, seed=1)
    spread = baseline.rows.all().mean.std(axis=0, ddof=1)
    comparison = compare(other_text(50, seed=2), baseline, margin=0.7)
    limits = {c.layer: c.limit for c in comparison.cells if c.statistic == "mean"}
    assert list(limits.values()) == pytest.approx(0.7 * spread)
    tiny = compare(other_text(50, seed=2), baseline, margin=1e-9)
    assert {c.limit for c in tiny.cells if c.statistic == "mean"} == {MARGIN_FLOOR["mean"]}


def test_independent_compares_means_of_shared_sequences() -> None:
    comparison = compare(a_profile(100), a_profile(100), independent=True)
    assert comparison.method == "other sequences"
    assert all(c.interval is not None for c in comparison.cells)


def test_minimum_and_maximum_are_never_resampled() -> None:
    comparison = compare(other_text(50, seed=1), other_text(50, seed=2))
    assert {c.statistic for c in comparison.cells} == {*STATISTICS}


def test_resampling_is_seeded() -> None:
    first, again, other = (
        compare(other_text(30, seed=1), other_text(30, seed=2), seed=seed).cells
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_a_layer_missing_on_one_side_fails_on_different_sequences_too() -> None:
    values = similarities_of(100, seed=5)[:3]
    shorter = profile_of(
        values, layers=LAYERS[:3], edges=EDGES[:3], fingerprints=5000 + np.arange(100)
    )
    for pair in ((shorter, a_profile(100)), (a_profile(100), shorter)):
        comparison = compare(*pair)
        assert comparison.verdict == "FAIL"
        assert {layer for layer, _ in failed(comparison)} == {"3+norm"}


def test_simultaneous_intervals_have_their_nominal_coverage() -> None:
    """Check 200 pairs of corpora of the same kind: the true difference is 0 in every cell."""
    missed = 0
    for seed in range(200):
        one, other = (other_text(60, seed=10 + 2 * seed + side) for side in (0, 1))
        cells = compare(one, other, confidence=0.95, seed=seed).cells
        missed += any(not c.interval[0] <= 0 <= c.interval[1] for c in cells if c.interval)
    # The nominal number is 10; more than 24 of 200 then has a probability of 1e-4. Intervals from
    # few resampled sequences are slightly short.
    assert missed <= 24


@pytest.mark.parametrize(
    "options", [{"margin": 0.0}, {"margin": math.nan}, {"confidence": 1.0}, {"confidence": 0.0}]
)
def test_a_margin_or_confidence_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="expected a margin above 0"):
        compare(a_profile(), a_profile(), **options)


def test_one_sequence_of_other_text_is_too_few() -> None:
    with pytest.raises(RecordError, match="expected at least 2"):
        compare(other_text(1, seed=3), a_profile())


def test_a_profile_without_rows_per_sequence_is_refused() -> None:
    profile = a_profile()
    bare = StoredProfile(profile.content, {"layers": profile.state["layers"]}, profile.rows)
    with pytest.raises(RecordError, match="no rows per sequence"):
        compare(bare, profile)
