"""Mergeable statistics of tokens: any split of the data gives the same bits as one pass.

Each layer has count, sums, minimum, maximum, exact counters and a histogram uniform in angle.
Memory does not grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cascade.core.arrays import Array
from cascade.stats.sequence_rows import QUANTILES

#: Histogram bins, uniform in angle over [0, pi]. Similarities 0 and 0.5 are bin edges. Above 0.981,
#: where saturated layers have nearly all tokens, bins are narrower than 1e-4.
BINS = 6144


#: Sums are integers in units of 2**-40, so that addition is exact in any order.
_UNIT = 1 << 40


class EmptyStatisticsError(ValueError):
    """A statistic was requested without any tokens."""


def bin_index(similarity: Array) -> npt.NDArray[np.int64]:
    """Return the angle bin of each similarity; bin k holds angles [k, k+1) * pi / BINS.

    Args:
        similarity: Values in [-1, 1], any shape.
    """
    angle = np.arccos(similarity.astype(np.float64))
    # The offset of 1e-9 bins makes arccos(0.5) * BINS / pi reach 2048 despite rounding.
    index = np.floor(angle * (BINS / np.pi) + 1e-9).astype(np.int64)
    return np.minimum(index, BINS - 1)


def bin_edge(index: Array | float) -> Array:
    """Return the similarity at the upper edge of bin `index`: cos(index * pi / BINS)."""
    edge: Array = np.cos(np.asarray(index, dtype=np.float64) * (np.pi / BINS))
    return edge


def quantile_edges(similarity: Array) -> npt.NDArray[np.int64]:
    """Return the bin edges nearest to each layer's QUANTILES.

    Args:
        similarity: A sample, `[L, tokens]`.

    Returns:
        Bin edges, `[L, len(QUANTILES)]`.
    """
    exact = np.quantile(similarity.astype(np.float64), QUANTILES, axis=1).T
    return np.rint(np.arccos(np.clip(exact, -1, 1)) * (BINS / np.pi)).astype(np.int64)


def exact_sums(values: Array) -> npt.NDArray[np.int64]:
    """Return the sums over the last axis, as integers in units of 2**-40.

    Args:
        values: Values in [-1, 1], `[..., tokens]`, at most some 8 million tokens.

    Example:
        >>> exact_sums(np.array([[0.5, 0.25]])).tolist() == [3 << 38]
        True
    """
    whole: npt.NDArray[np.int64] = np.rint(values * _UNIT).astype(np.int64).sum(axis=-1)
    return whole


def mean_of_sums(sums: Array, count: Array | int) -> Array:
    """Return the means that belong to the result of `exact_sums`.

    Args:
        sums: Integers in units of 2**-40.
        count: How many values each is the sum of.
    """
    mean: Array = np.asarray(sums, dtype=np.float64) / (float(_UNIT) * np.asarray(count))
    return mean


class TokenStatistics:
    """Statistics of the similarities of several layers, over all tokens.

    Args:
        layers: Row labels, e.g. `["1", ..., "30", "30+norm"]`.
        edges: `[L, 3]` bin edges for the shares of each sequence (see `quantile_edges`).

    Raises:
        ValueError: Labels are missing or repeated, or `edges` has another shape.

    Example:
        >>> statistics = TokenStatistics(["1"], np.array([[1000, 2000, 3000]]))
        >>> statistics.add(np.array([[0.25, 0.75]]))
        >>> statistics.count, statistics.mean().tolist()
        (2, [0.5])
    """

    def __init__(self, layers: Sequence[str], edges: Array) -> None:
        self.layers = tuple(layers)
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"expected distinct layer labels, got {list(layers)}")
        self.edges = np.asarray(edges, dtype=np.int64)
        rows = len(self.layers)
        if self.edges.shape != (rows, len(QUANTILES)):
            raise ValueError(
                f"expected edges of shape {(rows, len(QUANTILES))}, got {self.edges.shape}"
            )
        self.count = 0
        self.total = [0] * rows
        self.square_total = [0] * rows
        self.minimum = np.full(rows, np.inf)
        self.maximum = np.full(rows, -np.inf)
        self.negative = np.zeros(rows, np.int64)
        self.below_half = np.zeros(rows, np.int64)
        self.histogram = np.zeros((rows, BINS), np.int64)

    def add(self, values: Array, bins: Array | None = None) -> None:
        """Add tokens.

        Args:
            values: `[L, tokens]`, similarities in [-1, 1].
            bins: Their `bin_index`, where it is known.
        """
        bins = bin_index(values) if bins is None else bins
        rows, tokens = values.shape
        self.count += tokens
        for row, (value, square) in enumerate(
            zip(exact_sums(values), exact_sums(values**2), strict=True)
        ):
            self.total[row] += int(value)
            self.square_total[row] += int(square)
        self.minimum = np.minimum(self.minimum, values.min(axis=1))
        self.maximum = np.maximum(self.maximum, values.max(axis=1))
        self.negative += (values < 0).sum(axis=1)
        self.below_half += (values < 0.5).sum(axis=1)
        flat = (bins + BINS * np.arange(rows)[:, None]).ravel()
        self.histogram += np.bincount(flat, minlength=rows * BINS).reshape(rows, BINS)

    def merged_tokens(self, other: TokenStatistics) -> TokenStatistics:
        """Return the statistics of all tokens of both, equal to those of one pass over them.

        Raises:
            ValueError: The two differ in layers or edges.
        """
        merged = TokenStatistics(self.layers, self.edges)
        merged._take_tokens(self)
        merged._take_tokens(other)
        return merged

    def _take_tokens(self, other: TokenStatistics) -> None:
        """Add all tokens of other statistics."""
        if self.layers != other.layers or not np.array_equal(self.edges, other.edges):
            raise ValueError("expected statistics with the same layers and edges")
        self.count += other.count
        self.total = [a + b for a, b in zip(self.total, other.total, strict=True)]
        self.square_total = [
            a + b for a, b in zip(self.square_total, other.square_total, strict=True)
        ]
        self.minimum = np.minimum(self.minimum, other.minimum)
        self.maximum = np.maximum(self.maximum, other.maximum)
        self.negative = self.negative + other.negative
        self.below_half = self.below_half + other.below_half
        self.histogram = self.histogram + other.histogram

    def _require_tokens(self) -> None:
        if self.count == 0:
            raise EmptyStatisticsError("expected at least one token, got none")

    def mean(self) -> Array:
        """Return each layer's mean similarity, `[L]`.

        Raises:
            EmptyStatisticsError: There are no tokens.
        """
        self._require_tokens()
        return np.array([total / (_UNIT * self.count) for total in self.total])

    def std(self) -> Array:
        """Return each layer's population standard deviation, `[L]`.

        Raises:
            EmptyStatisticsError: There are no tokens.
        """
        self._require_tokens()
        # n * sum(v^2) - sum(v)^2 in integers loses no digits, even for a tiny variance.
        variance = [
            max(0, self.count * square * _UNIT - total * total) / (_UNIT * self.count) ** 2
            for total, square in zip(self.total, self.square_total, strict=True)
        ]
        std: Array = np.sqrt(np.array(variance))
        return std

    def quantile(self, q: float) -> Array:
        """Return each layer's quantile `q`, `[L]`, interpolated as `numpy.quantile` does.

        The error is at most the width of a bin, below 1e-4 for similarities above 0.981.

        Raises:
            EmptyStatisticsError: There are no tokens.
            ValueError: `q` is outside [0, 1].
        """
        self._require_tokens()
        if not 0 <= q <= 1:
            raise ValueError(f"expected a quantile in [0, 1], got {q}")
        rank = q * (self.count - 1)
        low = int(np.floor(rank))
        high = min(low + 1, self.count - 1)
        values = self._order_statistic(low)
        quantile: Array = values + (rank - low) * (self._order_statistic(high) - values)
        return quantile

    def _order_statistic(self, rank: int) -> Array:
        """Return each layer's value at an ascending rank; tokens fill their bin evenly."""
        ascending = self.histogram[:, ::-1]  # the largest angle is the smallest similarity
        upto = ascending.cumsum(axis=1)
        position = (upto <= rank).sum(axis=1)
        rows = np.arange(len(self.layers))
        inside = ascending[rows, position]
        before = upto[rows, position] - inside
        fraction = (rank - before + 0.5) / inside
        value: Array = np.clip(bin_edge(BINS - position - fraction), self.minimum, self.maximum)
        return value

    def share_below(self, similarity: float) -> Array:
        """Return each layer's share of tokens below a similarity, `[L]`, the inverse of `quantile`.

        The tokens of a bin are taken as evenly spread, so the error is at most one bin's tokens.

        Raises:
            EmptyStatisticsError: There are no tokens.
            ValueError: `similarity` is outside [-1, 1].
        """
        self._require_tokens()
        if not -1 <= similarity <= 1:
            raise ValueError(f"expected a similarity in [-1, 1], got {similarity}")
        position = float(np.arccos(similarity)) * (BINS / np.pi)
        inside = min(int(position), BINS - 1)
        # Larger angles are smaller similarities.
        below = self.histogram[:, inside + 1 :].sum(axis=1)
        below = below + self.histogram[:, inside] * (inside + 1 - position)
        share: Array = below / self.count
        # Below the minimum and above the maximum there are no tokens.
        share = np.where(similarity <= self.minimum, 0.0, share)
        return np.where(similarity > self.maximum, 1.0, share)

    def table(self) -> list[dict[str, Any]]:
        """Return one row per layer with the statistics of a profile, rounded to 6 decimals.

        Raises:
            EmptyStatisticsError: There are no tokens.
        """
        columns = {
            "mean": self.mean(),
            "std": self.std(),
            "min": self.minimum,
            "p10": self.quantile(0.1),
            "p50": self.quantile(0.5),
            "p90": self.quantile(0.9),
            "max": self.maximum,
            "frac_negative": self.negative / self.count,
            "frac_below_half": self.below_half / self.count,
        }
        return [
            {"layer": label, "count": self.count}
            | {name: round(float(values[row]), 6) for name, values in columns.items()}
            for row, label in enumerate(self.layers)
        ]

    def token_arrays(self) -> dict[str, Array]:
        """Return the whole state as arrays for an `.npz` file."""
        return {
            "layers": np.array(self.layers),
            "edges": self.edges,
            "count": np.array(self.count),
            # Decimal text, because exact sums exceed 64 bits after some 8 million tokens.
            "total": np.array([str(value) for value in self.total]),
            "square_total": np.array([str(value) for value in self.square_total]),
            "minimum": self.minimum,
            "maximum": self.maximum,
            "negative": self.negative,
            "below_half": self.below_half,
            "histogram": self.histogram,
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Restore statistics from the result of `token_arrays`; other arrays are ignored.

        Raises:
            KeyError: An array is missing.
            ValueError: The shapes of the arrays do not match.
        """
        self = cls([str(label) for label in arrays["layers"]], arrays["edges"])
        self.count = int(arrays["count"])
        for name in ("total", "square_total"):
            values = [int(value) for value in arrays[name]]
            if len(values) != len(self.layers):
                raise ValueError(f"{name}: expected {len(self.layers)} sums, got {len(values)}")
            setattr(self, name, values)
        for name in ("minimum", "maximum", "negative", "below_half", "histogram"):
            value = np.array(arrays[name])
            if value.shape != getattr(self, name).shape:
                raise ValueError(
                    f"{name}: expected shape {getattr(self, name).shape}, got {value.shape}"
                )
            setattr(self, name, value)
        return self
