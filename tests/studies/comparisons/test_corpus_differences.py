"""Tests of the differences between corpora: layers, special layers and thresholds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.build_corpora import CORPORA, LAYERS, compared, text_of, the_record
from support.reference_early_exit import a_stack

from cascade import TokenBlocks, analyze
from cascade.core.arrays import Array
from cascade.core.schema import from_plain, to_plain
from cascade.evaluation.calibration import confidences
from cascade.stats.thresholds import fit_threshold
from cascade.studies.comparisons.corpus_comparison import TOLERANCE
from cascade.studies.comparisons.corpus_differences import special_layers, transferred
from cascade.studies.comparisons.corpus_records import ComparedCorpus

# --- Layers ----------------------------------------------------------------------------------


def test_means_equal_those_of_each_corpus_profile() -> None:
    rows = the_record().layers
    assert [row.layer for row in rows] == LAYERS
    for number, blocks in enumerate(CORPORA):
        expected = analyze(a_stack("llama"), blocks).statistics.mean()
        found = [row.means[number] for row in rows]
        assert [mean.mean for mean in found] == pytest.approx(expected, abs=1e-9)
        for mean in found:
            low, high = mean.interval
            assert low < mean.mean < high
            assert (low + high) / 2 == pytest.approx(mean.mean)


def test_intervals_narrow_with_the_root_of_the_number_of_sequences() -> None:
    rows = compared(text_of(400, seed=3), text_of(25, seed=4)).layers
    widths = np.array([[m.interval[1] - m.interval[0] for m in r.means] for r in rows])
    ratio = widths[:, 1] / widths[:, 0]
    assert ratio.mean() == pytest.approx(4, rel=0.25)  # 25 sequences estimate their spread roughly


def test_differences_are_to_the_first_corpus_and_change_sign_with_the_order() -> None:
    pairs = the_record().differences
    assert [(pair.corpus, pair.against) for pair in pairs] == [("B", "A"), ("C", "A")]
    for number, pair in enumerate(pairs, start=1):
        for row, means in zip(pair.rows, the_record().layers, strict=True):
            assert row.layer == means.layer
            expected = means.means[number].mean - means.means[0].mean
            assert row.difference == pytest.approx(expected)
            assert sum(row.interval) / 2 == pytest.approx(expected)
    turned = compared(CORPORA[2], CORPORA[0]).differences[0]
    for row, back in zip(pairs[1].rows, turned.rows, strict=True):
        assert row.difference == pytest.approx(-back.difference)


def test_intervals_of_differences_are_wider_than_those_of_either_mean() -> None:
    record = the_record()
    for number, pair in enumerate(record.differences, start=1):
        for row, means in zip(pair.rows, record.layers, strict=True):
            width = row.interval[1] - row.interval[0]
            for mean in (means.means[0], means.means[number]):
                assert width > mean.interval[1] - mean.interval[0]


def test_layers_stay_on_similar_text_and_move_on_other_text() -> None:
    same, other = compared(margin=0.05).differences
    assert same.layers["moves"] == []
    assert other.layers["moves"][:2] == ["1", "2"]


@pytest.mark.parametrize("margin", [1e-6, 0.02, 1.9])
def test_a_layers_verdict_follows_from_its_interval(margin: float) -> None:
    for pair in compared(margin=margin).differences:
        by_verdict: dict[str, list[str]] = {"stays": [], "moves": [], "cannot tell": []}
        for row in sorted(pair.rows, key=lambda row: -abs(row.difference)):
            nearest = 0.0 if np.prod(row.interval) < 0 else min(map(abs, row.interval))
            farthest = max(map(abs, row.interval))
            expected = (
                "stays" if farthest <= margin else "moves" if nearest > margin else "cannot tell"
            )
            assert row.verdict == expected
            by_verdict[expected].append(row.layer)
        assert pair.layers == by_verdict


def test_undecided_layers_name_the_tokens_needed_for_a_verdict() -> None:
    row, blocks = None, [text_of(20, seed=5), text_of(20, 30, 60, seed=6)]
    for margin in (0.01, 0.02, 0.05):
        rows = compared(*blocks, margin=margin).differences[0].rows
        assert all((row.tokens_needed is None) == (row.verdict != "cannot tell") for row in rows)
        row = next((row for row in rows if row.verdict == "cannot tell"), row)
        if row is None:
            continue
        # With that many tokens, the interval would just touch the margin.
        half = (row.interval[1] - row.interval[0]) / 2
        half /= np.sqrt(row.tokens_needed / blocks[0].tokens)
        if row in rows:
            assert half == pytest.approx(abs(abs(row.difference) - margin), rel=0.01)
    assert row is not None


# --- Special layers --------------------------------------------------------------------------


def corpus_of(label: str, **special: tuple[str | None, float]) -> ComparedCorpus:
    """Return the record of a corpus from the role and share of resamples of each layer."""
    roles: dict[str, list[str]] = {"input_transform": [], "dips": [], "output_transform": []}
    for layer, (role, _) in special.items():
        if role is not None:
            roles[role].append(layer[1:])
    rows = [
        {"layer": layer[1:], "role": role, "share_of_resamples": share}
        for layer, (role, share) in special.items()
    ]
    structure = {"rule": "", "source": "", "cutoff": 0.9, "stable_bands": []} | roles
    corpus = {
        "label": label,
        "name": label,
        "tokens": 24,
        "sequences": 2,
        "seq_len": 12,
        "structure": structure,
        "suggested_exit_layer": 3,
        "special": rows,
    }
    return from_plain(corpus, ComparedCorpus)


def test_equal_special_layers_do_not_differ() -> None:
    corpora = [corpus_of(label, l2=("dips", 1.0)) for label in "AB"]
    assert to_plain(special_layers(corpora, ["1", "2", "3"])) == {"same": True, "differ": []}


@pytest.mark.parametrize(
    ("there", "here", "sure"),
    [(1.0, 0.0, True), (0.96, 0.04, True), (0.9, 0.0, False), (1.0, 0.2, False)],
)
def test_a_difference_in_special_layers_is_sure_only_if_resamples_agree(
    there: float, here: float, sure: bool
) -> None:
    corpora = [
        corpus_of("A", l1=("input_transform", 1.0), l3=("dips", there)),
        corpus_of("B", l1=("input_transform", 1.0), l3=(None, here)),
    ]
    found = special_layers(corpora, ["1", "2", "3"])
    shares = {"A": there, "B": here}
    row = {"layer": "3", "special_in": ["A"], "shares": shares, "sure": sure}
    assert to_plain(found) == {"same": False, "differ": [row]}


def test_another_role_makes_the_structure_differ() -> None:
    corpora = [corpus_of("A", l2=("dips", 1.0)), corpus_of("B", l2=("input_transform", 1.0))]
    assert to_plain(special_layers(corpora, ["1", "2"])) == {"same": False, "differ": []}


# --- Thresholds ------------------------------------------------------------------------------


def similarities_of(blocks: TokenBlocks, layer: int) -> Array:
    """Return an exit layer's similarities, `[S, T]`, as the exits of a model compute them."""
    return confidences(a_stack("llama"), blocks, layer, "cosine")


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_thresholds_are_fitted_and_applied_at_the_exit_layer(layer: int) -> None:
    corpora = [*CORPORA[:2], text_of(50, 20, 70, seed=2)]
    record = compared(*corpora, layer=layer, hard_ratios=(0.25, 0.6))
    rows = record.thresholds.rows
    pairs = list(itertools.permutations("ABC", 2))
    assert [(row.fitted_on, row.applied_to) for row in rows[::2]] == pairs
    assert [row.hard_ratio for row in rows] == [0.25, 0.6] * len(pairs)
    values = dict(zip("ABC", (similarities_of(blocks, layer) for blocks in corpora), strict=True))
    for row in rows:
        # First tokens of sequences have equal similarities, and rounding breaks such ties. The
        # similarities of a neighbouring layer would differ by tenths.
        for side, share in ((row.fitted_on, row.hard_ratio), (row.applied_to, row.realized)):
            assert (values[side] < row.threshold).mean() == pytest.approx(share, abs=0.02)
        low, high = row.interval
        assert low <= row.realized <= high
        assert row.off == pytest.approx(row.realized - row.hard_ratio)
        assert row.off_interval == pytest.approx([end - row.hard_ratio for end in (low, high)])


def test_the_default_exit_layer_is_suggested_by_the_first_corpus() -> None:
    suggested = compared(layer=None)
    layer = suggested.corpora[0].suggested_exit_layer
    assert suggested.settings.layer == layer
    assert suggested.settings.layer_suggested
    given = compared(layer=layer)
    assert not given.settings.layer_suggested
    assert given.thresholds == suggested.thresholds


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.0, "transfers"), (0.05, "cannot tell"), (0.2, "does not")]
)
def test_a_threshold_transfers_if_its_interval_is_within_the_tolerance(
    shift: float, verdict: str
) -> None:
    generator = np.random.default_rng(0)
    here, there = generator.uniform(0, 0.5, (2, 400, 12))
    fitted = fit_threshold(here, 0.5)
    row = transferred(fitted, there - shift / 2, ("A", "B"), tolerance=TOLERANCE, seed=0)
    assert row.verdict == verdict
    assert row.off == pytest.approx(shift, abs=0.03)
    assert (row.tokens_needed is None) is (verdict != "cannot tell")


def test_repeated_hard_ratios_are_compared_once() -> None:
    record = compared(hard_ratios=(0.5, 0.3, 0.5))
    assert record.settings.hard_ratios == [0.5, 0.3]
    assert len(record.thresholds.rows) == 2 * 6
    assert sum(record.thresholds.counts.values()) == 2 * 6
