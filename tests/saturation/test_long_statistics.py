"""Statistics of long sequences: exact, by ranges of positions, and read back as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.saturation.long_statistics import LongStatistics, range_edges


def statistics(length: int = 300, layers: int = 3, sequences: int = 2) -> LongStatistics:
    values = np.random.default_rng(0).uniform(-1, 1, (layers, sequences, length))
    numbers = np.arange(sequences)
    labels = [str(layer) for layer in range(1, layers + 1)]
    return LongStatistics.of(
        labels, values.astype(np.float32), numbers, numbers.astype(np.uint64) + 2**63
    )


def stored(found: LongStatistics) -> dict[str, Any]:
    corpus = {"layers": np.array(found.layers), "sequence_fingerprint": np.arange(9)}
    return {**corpus, **found.arrays()}


@given(st.integers(2, 10_000))
def test_ranges_are_equal_to_one_position_and_cover_all(length: int) -> None:
    edges = range_edges(length)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1]) == (0, length)
    assert sizes.max() - sizes.min() <= 1
    assert len(sizes) == 2 or (len(sizes) <= 16 and sizes.min() >= 64)


def test_means_are_those_of_numpy() -> None:
    values = np.random.default_rng(1).uniform(-1, 1, (3, 2, 256)).astype(np.float32)
    numbers = np.arange(2)
    found = LongStatistics.of(["1", "2", "2+norm"], values, numbers, numbers)
    wide = values.astype(np.float64).reshape(3, 2, 4, 64).transpose(1, 2, 0, 3)
    np.testing.assert_allclose(found.means(), wide.mean(-1), atol=1e-12)
    np.testing.assert_allclose(found.mean_squares(), (wide**2).mean(-1), atol=1e-12)


def test_they_are_read_back_as_they_were() -> None:
    found = statistics()
    back = LongStatistics.from_arrays(stored(found))
    assert back is not None
    assert back.record() == found.record()
    for name, value in found.arrays().items():
        assert np.array_equal(back.arrays()[name], value)
    assert back.only(slice(1)).total.shape == (1, 4, 3)
    assert LongStatistics.from_arrays({"layers": np.array(["1"])}) is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("long_total", lambda value: value[:, :-1]),
        ("long_total", lambda value: value + (1 << 50)),
        ("long_square_total", lambda value: value + (1 << 50)),
        ("long_fingerprint", lambda value: value[:1]),
        ("long_length", lambda value: value * 0),
        ("long_length", lambda value: value * 2),
        ("long_length", lambda value: value + (1 << 40)),
        ("long_start", lambda value: value + 8),
        ("long_start", lambda value: value - 1),
        ("long_start", lambda value: value + 0.5),
        ("layers", lambda value: value[:1]),
    ],
)
def test_arrays_that_do_not_match_are_refused(name: str, change: Any) -> None:
    arrays = stored(statistics())
    with pytest.raises(ValueError, match="expected"):
        LongStatistics.from_arrays(arrays | {name: change(arrays[name])})
    with pytest.raises(KeyError):
        LongStatistics.from_arrays({key: arrays[key] for key in arrays if key != "long_start"})
