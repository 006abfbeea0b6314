"""Properties of the mergeable statistics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cascade.stats.similarity_statistics import (
    BINS,
    EmptyStatisticsError,
    SimilarityStatistics,
    bin_edge,
    bin_index,
    quantile_edges,
)

Values = npt.NDArray[np.float32]

LAYERS = ["1", "2", "2+norm"]
EDGES = np.array([[200, 400, 800], [100, 300, 900], [1000, 3000, 5000]])

similarities = arrays(
    np.float32,
    st.tuples(st.just(len(LAYERS)), st.integers(1, 6), st.integers(1, 5)),
    elements=st.floats(-1, 1, width=32),
)
saturated = arrays(
    np.float32,
    st.tuples(st.just(1), st.just(1), st.integers(1, 300)),
    elements=st.floats(0.9810000061988831, 1, width=32),
)


def one_pass(values: Values) -> SimilarityStatistics:
    statistics = SimilarityStatistics(LAYERS, EDGES)
    statistics.update(values, np.arange(values.shape[1]))
    return statistics


def states_equal(a: SimilarityStatistics, b: SimilarityStatistics) -> bool:
    left, right = a.arrays(), b.arrays()
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) for name in left
    )


@given(similarities, st.data())
def test_merging_any_split_in_any_order_gives_the_bits_of_one_pass(
    values: Values, data: st.DataObject
) -> None:
    parts = data.draw(
        st.lists(st.integers(0, 3), min_size=values.shape[1], max_size=values.shape[1])
    )
    pieces = []
    for part in data.draw(st.permutations(range(4))):
        rows = np.flatnonzero(np.array(parts) == part)
        piece = SimilarityStatistics(LAYERS, EDGES)
        if len(rows):
            piece.update(values[:, rows], rows)
        pieces.append(piece)
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merged.merge(piece)
    assert states_equal(merged, one_pass(values))
    assert merged.table() == one_pass(values).table()


@given(similarities)
def test_updates_by_batch_equal_one_pass(values: Values) -> None:
    statistics = SimilarityStatistics(LAYERS, EDGES)
    for row in range(values.shape[1]):
        statistics.update(values[:, row : row + 1], np.array([row]))
    assert states_equal(statistics, one_pass(values))


@given(similarities)
def test_statistics_match_numpy(values: Values) -> None:
    statistics = one_pass(values)
    flat = values.reshape(len(LAYERS), -1).astype(np.float64)
    np.testing.assert_allclose(statistics.mean(), flat.mean(axis=1), atol=1e-11)
    np.testing.assert_allclose(statistics.std(), flat.std(axis=1), atol=1e-5)
    assert np.array_equal(statistics.minimum, flat.min(axis=1))
    assert np.array_equal(statistics.maximum, flat.max(axis=1))
    assert np.array_equal(statistics.negative, (flat < 0).sum(axis=1))
    assert np.array_equal(statistics.below_half, (flat < 0.5).sum(axis=1))
    assert statistics.count == flat.shape[1]


@given(saturated, st.floats(0, 1))
@settings(max_examples=300)
def test_quantiles_of_saturated_layers_are_exact_to_1e_4(values: Values, q: float) -> None:
    statistics = SimilarityStatistics(["1"], [[1, 2, 3]])
    statistics.update(values, np.array([0]))
    exact = np.quantile(values.ravel().astype(np.float64), q)
    assert abs(statistics.quantile(q)[0] - exact) <= 1e-4


@given(similarities, st.floats(0, 1))
def test_quantile_is_within_one_bin_of_exact(values: Values, q: float) -> None:
    exact = np.quantile(values.reshape(len(LAYERS), -1).astype(np.float64), q, axis=1)
    angles = np.arccos(np.clip([one_pass(values).quantile(q), exact], -1, 1))
    # A quantile between two order statistics mixes two values, each exact to its bin. A bin is at
    # most pi / BINS wide in similarity.
    width = np.pi / BINS
    close_in_angle = np.abs(angles[0] - angles[1]) <= width * 1.001
    close_in_similarity = np.abs(one_pass(values).quantile(q) - exact) <= width * 1.001
    assert (close_in_angle | close_in_similarity).all()


@given(similarities)
def test_arrays_survive_a_round_trip(values: Values) -> None:
    statistics = one_pass(values)
    restored = SimilarityStatistics.from_arrays(statistics.arrays())
    assert states_equal(restored, statistics)
    assert restored.table() == statistics.table()


@given(similarities)
def test_sequence_rows_agree_with_histogram_and_mean(values: Values) -> None:
    state = one_pass(values).arrays()
    tokens = values.shape[2]
    np.testing.assert_allclose(
        state["sequence_mean"].mean(axis=0), one_pass(values).mean(), atol=1e-11
    )
    for layer in range(len(LAYERS)):
        for column, edge in enumerate(EDGES[layer]):
            at_or_below = state["histogram"][layer, edge:].sum()
            counted = state["sequence_share"][:, layer, column].sum() * tokens
            assert counted == pytest.approx(at_or_below)


def test_sums_do_not_lose_one_token_among_millions() -> None:
    statistics = SimilarityStatistics(["1"], [[1, 2, 3]])
    block = np.full((1, 1, 1 << 20), 0.999, np.float32)
    for sequence in range(12):
        statistics.update(block, np.array([sequence]))
    statistics.update(np.full((1, 1, 1), -1, np.float32), np.array([99]))
    tokens = 12 * (1 << 20) + 1
    expected = (float(np.float32(0.999)) * (tokens - 1) - 1) / tokens
    assert statistics.mean()[0] == pytest.approx(expected, abs=1e-12)


def test_constant_layer_has_zero_standard_deviation() -> None:
    statistics = SimilarityStatistics(["1"], [[1, 2, 3]])
    statistics.update(np.full((1, 1, 1000), 0.5, np.float32), np.array([0]))
    assert statistics.std()[0] == 0
    assert statistics.quantile(0.5)[0] == 0.5


def test_zero_and_one_half_are_bin_edges() -> None:
    values = np.array([0.0, 0.5, np.nextafter(0.5, 1), np.nextafter(0.0, 1), 1.0, -1.0])
    index = bin_index(values)
    assert index[0] == BINS // 2
    assert index[1] == BINS // 3
    assert index[4] == 0
    assert index[5] == BINS - 1
    assert bin_edge(BINS // 3) == pytest.approx(0.5, abs=1e-15)
    # Counts of bins therefore equal the exact counters, except for values on the edge itself.
    below = np.array([0.4999, -0.0001])
    assert (bin_index(below) >= np.array([BINS // 3, BINS // 2])).all()
    above = np.array([0.5001, 0.0001])
    assert (bin_index(above) < np.array([BINS // 3, BINS // 2])).all()


def test_quantile_edges_are_nearest_to_the_quantiles() -> None:
    sample = np.linspace(0.9, 1, 1001)[None]
    edges = quantile_edges(sample)
    np.testing.assert_allclose(bin_edge(edges[0]), [0.91, 0.95, 0.99], atol=1.2e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.0001, -1.0001])
def test_error_for_nan_or_out_of_range_values_names_the_layer(value: float) -> None:
    values = np.zeros((3, 1, 4), np.float32)
    values[1, 0, 2] = value
    statistics = SimilarityStatistics(LAYERS, EDGES)
    with pytest.raises(ValueError, match=r"layer 2: expected similarities in \[-1, 1\]"):
        statistics.update(values, np.array([0]))
    assert statistics.count == 0


@pytest.mark.parametrize("statistic", ["mean", "std", "table"])
def test_statistic_without_tokens_is_an_error(statistic: str) -> None:
    with pytest.raises(EmptyStatisticsError, match="at least one token"):
        getattr(SimilarityStatistics(LAYERS, EDGES), statistic)()
    with pytest.raises(EmptyStatisticsError):
        SimilarityStatistics(LAYERS, EDGES).quantile(0.5)


def test_sequence_cannot_be_added_twice() -> None:
    values = np.zeros((3, 2, 4), np.float32)
    statistics = SimilarityStatistics(LAYERS, EDGES)
    with pytest.raises(ValueError, match="every sequence once"):
        statistics.update(values, np.array([5, 5]))
    statistics.update(values, np.array([0, 1]))
    with pytest.raises(ValueError, match="every sequence once"):
        statistics.update(values[:, :1], np.array([1]))
    with pytest.raises(ValueError, match="every sequence once"):
        statistics.merge(statistics)


def test_statistics_with_other_layers_or_edges_do_not_merge() -> None:
    with pytest.raises(ValueError, match="same layers and edges"):
        SimilarityStatistics(["1", "2", "3"], EDGES).merge(SimilarityStatistics(LAYERS, EDGES))
    with pytest.raises(ValueError, match="same layers and edges"):
        SimilarityStatistics(LAYERS, EDGES + 1).merge(SimilarityStatistics(LAYERS, EDGES))


def test_wrong_shapes_are_rejected() -> None:
    statistics = SimilarityStatistics(LAYERS, EDGES)
    with pytest.raises(ValueError, match=r"expected similarity of shape \[3, B, T\]"):
        statistics.update(np.zeros((2, 1, 4), np.float32), np.array([0]))
    with pytest.raises(ValueError, match="expected 1 sequences"):
        statistics.update(np.zeros((3, 1, 4), np.float32), np.array([0, 1]))
    with pytest.raises(ValueError, match="distinct layer labels"):
        SimilarityStatistics(["1", "1"], EDGES[:2])
    with pytest.raises(ValueError, match="expected edges of shape"):
        SimilarityStatistics(LAYERS, EDGES[:2])
    with pytest.raises(ValueError, match="quantile in"):
        one_pass(np.zeros((3, 1, 4), np.float32)).quantile(1.5)
    torn = one_pass(np.zeros((3, 1, 4), np.float32)).arrays()
    torn["histogram"] = torn["histogram"][:, :-1]
    with pytest.raises(ValueError, match="histogram: expected shape"):
        SimilarityStatistics.from_arrays(torn)


@given(similarities, st.floats(-1, 1))
def test_share_below_is_within_one_bin_of_exact(values: Values, limit: float) -> None:
    share = one_pass(values).share_below(limit)
    for row in range(len(LAYERS)):
        flat = values[row].astype(np.float64).ravel()
        near = np.abs(np.arccos(flat) - np.arccos(limit)) < 1.001 * np.pi / BINS
        below = ((flat < limit) & ~near).sum()
        assert below - 1e-9 <= share[row] * flat.size <= below + near.sum() + 1e-9


@given(similarities, st.floats(0, 1))
def test_share_below_inverts_quantile_within_one_token(values: Values, q: float) -> None:
    statistics = one_pass(values)
    tokens = values[0].size
    for row, value in enumerate(statistics.quantile(q)):
        share = statistics.share_below(float(value))[row]
        flat = np.sort(values[row].astype(np.float64).ravel())
        close = np.abs(np.arccos(flat) - np.arccos(value)).round(12) <= 2 * np.pi / BINS
        assert abs(share - q) <= (close.sum() + 1) / tokens


def test_share_below_spreads_tokens_evenly_over_a_bin() -> None:
    # One token in the middle of each of the bins 99 to 103.
    values = np.cos((np.arange(99, 104) + 0.5) * np.pi / BINS)
    statistics = SimilarityStatistics(["1"], EDGES[:1])
    statistics.update(values[None, None], np.array([0]))
    # A quarter into bin 101, three quarters of the bin and all of bins 102 and 103 are below.
    share = statistics.share_below(float(np.cos(101.25 * np.pi / BINS)))
    assert share == pytest.approx([2.75 / 5])


def test_share_below_is_exact_outside_minimum_and_maximum() -> None:
    statistics = SimilarityStatistics(["1"], EDGES[:1])
    statistics.update(np.full((1, 1, 4), 0.5), np.array([0]))
    assert statistics.share_below(0.5) == [0]
    assert statistics.share_below(0.5001) == [1]
    assert statistics.share_below(-1) == [0]
    assert statistics.share_below(1) == [1]
    with pytest.raises(ValueError, match="expected a similarity"):
        statistics.share_below(1.1)
    with pytest.raises(EmptyStatisticsError):
        SimilarityStatistics(["1"], EDGES[:1]).share_below(0.5)
