"""Comparisons: the same sequences one by one, other ones by intervals, and no holes in either."""

from __future__ import annotations

import math
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
from cascade.gate.comparison import IDENTITY, LEAST_TOLERANCE, made_elsewhere
from cascade.gate.drift import MARGIN_FLOOR, STATISTICS, compare


def failed(comparison: Any) -> set[tuple[str, str]]:
    return {(c.layer, c.statistic) for c in comparison.cells if c.verdict == "FAIL"}


def sequence_limits(comparison: Any) -> list[float]:
    cells = comparison.cells
    return [c.limit for c in cells if c.statistic == "mean" and c.sequence is not None]


def moved(layer: int, sequence: int, by: float, *, sequences: int = 12) -> StoredProfile:
    """Return the profile by hand with one sequence's similarities of one layer moved."""
    values = similarities_of(sequences)
    values[layer, sequence] += by
    return profile_of(values)


# --- The same sequences ----------------------------------------------------------------------


def test_a_profile_equals_itself_in_every_cell() -> None:
    comparison = compare(a_profile(), a_profile())
    assert comparison.verdict == "PASS"
    assert comparison.method == "same sequences"
    assert comparison.sequences == (12, 12)
    assert comparison.tokens == 12 * TOKENS
    names = {cell.statistic for cell in comparison.cells}
    assert names == {*STATISTICS} | {
        *("count", "std", "min", "p10", "p50", "p90", "max", "frac_negative", "frac_below_half")
    }
    # The mean is there twice: sequence by sequence, and of the table.
    assert len(comparison.cells) == len(LAYERS) * (len(STATISTICS) + 10)
    assert comparison.attribution is None
    assert comparison.exit_status() == comparison.exit_status(strict=True) == 0


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_one_sequence_that_moves_beyond_the_tolerance_fails_and_is_named(
    layer: int, sign: int
) -> None:
    within = compare(moved(layer, 5, sign * 0.9 * LEAST_TOLERANCE), a_profile())
    assert within.verdict == "PASS"
    comparison = compare(moved(layer, 5, sign * 1.1 * LEAST_TOLERANCE), a_profile())
    assert comparison.verdict == "FAIL"
    assert comparison.exit_status() == 1
    assert failed(comparison) == {(LAYERS[layer], "mean")}
    worst = comparison.worst()[0]
    assert (worst.layer, worst.statistic, worst.sequence) == (LAYERS[layer], "mean", 5)
    assert worst.difference == pytest.approx(sign * 1.1 * LEAST_TOLERANCE, rel=1e-3)


def test_a_few_of_the_baselines_sequences_are_found_by_their_fingerprints() -> None:
    values = similarities_of(12)
    few = profile_of(values[:, [9, 2]], fingerprints=np.array([9, 2]))
    comparison = compare(few, a_profile())
    assert comparison.verdict == "PASS"
    assert comparison.sequences == (2, 2)
    # Their table is of other tokens than the baseline's: it is not compared.
    assert {cell.statistic for cell in comparison.cells} == {*STATISTICS}
    wrong = profile_of(values[:, [9, 2]], fingerprints=np.array([9, 3]))
    assert compare(wrong, a_profile()).verdict == "FAIL"


def test_sequences_that_the_baseline_does_not_know_are_left_out_and_counted() -> None:
    few = profile_of(similarities_of(12)[:, :3], fingerprints=np.array([0, 77, 2]))
    comparison = compare(few, a_profile())
    assert comparison.verdict == "PASS"
    assert comparison.sequences == (2, 2)
    assert "1 of 3 sequences" in comparison.notes[0]


def test_a_sequence_in_common_by_chance_does_not_make_it_the_same_text() -> None:
    values = similarities_of(40, seed=3)
    values[:, 0] = similarities_of(12)[:, 4]
    other = profile_of(values, fingerprints=np.array([4, *range(100, 139)]))
    comparison = compare(other, a_profile())
    assert comparison.method == "other sequences"
    assert "only 1 of 40" in comparison.notes[0]


def test_shares_move_by_whole_tokens_and_a_few_of_them_fail() -> None:
    baseline = a_profile(64)
    # An edge two bins away takes some of 1,024 tokens to the other side, all in one direction.
    edges = EDGES.copy()
    edges[1, 1] += 12
    counted = profile_of(similarities_of(64), edges=edges)
    # Somebody counts against other edges and says that they are the old ones.
    lied = StoredProfile(counted.content, counted.state | {"edges": EDGES})
    comparison = compare(lied, baseline)
    assert failed(comparison) == {("2", "share_p50")}
    assert comparison.attribution is not None
    assert comparison.attribution.cause == "counting"


def test_shares_against_other_quantiles_are_not_compared_and_that_is_said() -> None:
    comparison = compare(a_profile(edges=EDGES + 5), a_profile())
    assert comparison.verdict == "PASS"
    assert not {cell.statistic for cell in comparison.cells} & {*STATISTICS[2:]}
    assert "shares were not compared" in comparison.notes[0]


@pytest.mark.parametrize("place", ["sequence_mean", "sequence_mean_square", "sequence_share"])
@pytest.mark.parametrize("on_both", [False, True])
def test_nan_in_a_row_fails_on_either_side_and_on_both(place: str, on_both: bool) -> None:
    profile = a_profile()
    broken = StoredProfile(
        profile.content, profile.state | {place: profile.state[place].astype(float).copy()}
    )
    broken.state[place][3, 1] = np.nan
    assert compare(broken, profile).verdict == "FAIL"
    assert compare(profile, broken).verdict == "FAIL"
    if on_both:  # the usual table comparison holds NaN equal to NaN
        assert compare(broken, broken).verdict == "FAIL"


@pytest.mark.parametrize("row", range(len(LAYERS)))
def test_a_layer_that_one_side_lacks_fails_and_is_named(row: int) -> None:
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
def test_a_baseline_from_elsewhere_widens_the_tolerance_by_both_floors_visibly(
    change: dict[str, Any],
) -> None:
    here = a_profile(about=provenance(**change), noise=floor(3e-6, 1e-6))
    there = a_profile(noise=floor(1e-6, 4e-6))
    assert made_elsewhere(here.content.provenance, there.content.provenance)
    comparison = compare(here, there)
    assert sequence_limits(comparison) == pytest.approx([3 * (3e-6 + 4e-6)] * len(LAYERS))
    (note,) = comparison.notes
    assert "made elsewhere" in note
    assert "2.1e-05" in note
    # Measured anew, it counts instead of what the profile says of itself.
    again = compare(here, there, noise=floor(1e-6, 2e-6))
    assert sequence_limits(again) == pytest.approx([3 * (2e-6 + 4e-6)] * len(LAYERS))


# --- What cannot be compared -----------------------------------------------------------------


@pytest.mark.parametrize("path", IDENTITY)
def test_another_origin_is_not_comparable_whatever_the_numbers(path: tuple[str, ...]) -> None:
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
    # Anyway: then the numbers speak, and what differs is noted.
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


def test_few_sequences_are_inconclusive_and_say_how_many_would_decide() -> None:
    baseline = other_text(400, seed=1)
    few = compare(other_text(12, seed=2), baseline)
    assert few.verdict == "INCONCLUSIVE"
    assert few.exit_status() == 0
    assert few.exit_status(strict=True) == 1
    needed = [c.needed for c in few.cells if c.verdict == "INCONCLUSIVE"]
    assert all(number is None or number > 12 for number in needed)
    most = max(number for number in needed if number is not None)
    # As many as that do decide, give or take what another draw of them says.
    assert compare(other_text(2 * most, seed=2), baseline).verdict == "PASS"
    assert all(c.needed is None for c in few.cells if c.verdict != "INCONCLUSIVE")


def test_the_margin_is_the_baselines_own_spread_and_never_below_the_floor() -> None:
    baseline = other_text(50, seed=1)
    spread = baseline.arrays()["sequence_mean"].std(axis=0, ddof=1)
    comparison = compare(other_text(50, seed=2), baseline, margin=0.7)
    limits = {c.layer: c.limit for c in comparison.cells if c.statistic == "mean"}
    assert list(limits.values()) == pytest.approx(0.7 * spread)
    tiny = compare(other_text(50, seed=2), baseline, margin=1e-9)
    assert {c.limit for c in tiny.cells if c.statistic == "mean"} == {MARGIN_FLOOR["mean"]}


def test_the_same_sequences_can_be_compared_as_if_they_were_others() -> None:
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


def test_a_layer_that_one_side_lacks_fails_on_other_sequences_too() -> None:
    values = similarities_of(100, seed=5)[:3]
    shorter = profile_of(
        values, layers=LAYERS[:3], edges=EDGES[:3], fingerprints=5000 + np.arange(100)
    )
    for pair in ((shorter, a_profile(100)), (a_profile(100), shorter)):
        comparison = compare(*pair)
        assert comparison.verdict == "FAIL"
        assert {layer for layer, _ in failed(comparison)} == {"3+norm"}


def test_intervals_hold_all_at_once_as_often_as_they_promise() -> None:
    """200 pairs of corpora of the same kind: a difference of 0 in every cell."""
    missed = 0
    for seed in range(200):
        one, other = (other_text(60, seed=10 + 2 * seed + side) for side in (0, 1))
        cells = compare(one, other, confidence=0.95, seed=seed).cells
        missed += any(not c.interval[0] <= 0 <= c.interval[1] for c in cells if c.interval)
    # 10 are promised; more than 24 of 200 has a chance of 1e-4 then, and few resampled sequences
    # make intervals a little short.
    assert missed <= 24


@pytest.mark.parametrize(
    "options", [{"margin": 0.0}, {"margin": math.nan}, {"confidence": 1.0}, {"confidence": 0.0}]
)
def test_a_margin_or_confidence_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="expected a margin above 0"):
        compare(a_profile(), a_profile(), **options)


def test_one_sequence_of_other_text_gives_no_interval() -> None:
    with pytest.raises(RecordError, match="expected at least 2"):
        compare(other_text(1, seed=3), a_profile())


def test_a_profile_without_rows_per_sequence_is_refused() -> None:
    profile = a_profile()
    bare = StoredProfile(profile.content, {"layers": profile.state["layers"]})
    with pytest.raises(RecordError, match="no rows per sequence"):
        compare(bare, profile)
