"""Figures as SVG, drawn from a record: the layer profile and the density of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cascade.report.common.axes import angle, label_layers, layer_positions, limit_angles
from cascade.report.common.records import ROLES, Arrays, is_normed, show
from cascade.report.common.svg import LIGHT, as_svg, new_figure, plain_style, title_of
from cascade.report.saturation.wording import check_histogram, check_profile, roles_of, summary
from cascade.saturation.records import LayerRow, ProfileRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {"input transform": "^", "dip": "v", "output transform": "s"}
_HEAT_ROWS = 120
#: Beyond this many active layers their names would overlap, so only markers are drawn.
_MAX_ANNOTATIONS = 8


def layer_profile_svg(record: ProfileRecord) -> str:
    """Draw similarity against layer: mean, p10-p90 band, min and max, special layers.

    Args:
        record: The profile's record.

    Returns:
        One `<svg>` element, which is identical for equal records and is also a complete file.

    Raises:
        ValueError: The record has another schema or no layers.
    """
    check_profile(record)
    with plain_style():
        figure, axes = _new_figure(record, "similarity per layer")
        limit_angles(axes, *_angle_range(record))
        _draw_stable_bands(axes, record)
        _draw_statistics(axes, record)
        _draw_active_layers(axes, record)
        label_layers(axes, record.layers)
        figure.legend(loc="outside lower center", ncols=5)
        first, last = record.layers[0].layer, record.layers[-1].layer
        label = f"Line chart: similarity per layer, {first} to {last}. {summary(record)}"
        return as_svg(figure, "layer-profile", label)


def density_svg(record: ProfileRecord, arrays: Arrays) -> str:
    """Draw the distribution of each layer's tokens as a heat map of layers x similarity.

    Args:
        record: The profile's record.
        arrays: Its arrays: `layers`, names [L], and `histogram`, counts [L, bins], bins uniform
            in angle over [0, pi].

    Returns:
        One `<svg>` element with the map as an embedded image, identical for equal input.

    Raises:
        ValueError: The record has another schema or no layers, or the arrays do not belong to it.
    """
    check_profile(record)
    check_histogram(record, arrays)
    with plain_style():
        figure, axes = _new_figure(record, "distribution of tokens")
        shares, edges = rebinned(arrays["histogram"])
        _draw_heat_map(figure, axes, shares, edges, layer_positions(record.layers))
        limit_angles(axes, float(edges[0]), float(edges[-1]))
        label_layers(axes, record.layers)
        first, last = record.layers[0].layer, record.layers[-1].layer
        label = f"Heat map: share of tokens per similarity, layers {first} to {last}."
        return as_svg(figure, "token-density", label)


def _new_figure(record: ProfileRecord, subject: str) -> tuple[Figure, Axes]:
    figure = new_figure((10, 5.2))
    axes = figure.add_subplot()
    # parse_math=False, because a "$" in a name would start a formula.
    title = title_of(record, subject)
    axes.set_title(title, loc="left", pad=20, fontsize=11, parse_math=False)
    axes.set_ylabel("similarity (axis uniform in angle)")
    axes.set_xlabel("decoder layer")
    return figure, axes


def _angles(rows: Iterable[LayerRow], name: str) -> list[float]:
    return [angle(getattr(row, name)) for row in rows]


def _angle_range(record: ProfileRecord) -> tuple[float, float]:
    """Return the smallest and the largest angle that is drawn."""
    angles = _angles(record.layers, "max") + _angles(record.layers, "min")
    if record.structure.cutoff is not None:
        angles.append(angle(record.structure.cutoff))
    return min(angles), max(angles)


def _draw_stable_bands(axes: Axes, record: ProfileRecord) -> None:
    position = _positions_by_name(record)
    cutoff = record.structure.cutoff
    for index, (first, last) in enumerate(record.structure.stable_bands):
        left, right = position[first] - 0.5, position[last] + 0.5
        label = "stable band" if index == 0 else None
        axes.axvspan(left, right, color=LIGHT["stable"], linewidth=0, zorder=0, label=label)
        if right - left > 0.08 * len(position):
            axes.annotate(
                f"stable {first}-{last}" if first != last else f"stable {first}",
                ((left + right) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=LIGHT["muted"],
                fontsize=8.5,
            )
    axes.grid(axis="y", linewidth=0.8)
    if cutoff is not None:
        axes.axhline(
            angle(cutoff),
            color=LIGHT["active"],
            linestyle=(0, (5, 4)),
            linewidth=0.9,
            label=f"cutoff {show(cutoff)}",
        )


def _positions_by_name(record: ProfileRecord) -> dict[str, float]:
    names = (row.layer for row in record.layers)
    return dict(zip(names, layer_positions(record.layers), strict=True))


def _draw_statistics(axes: Axes, record: ProfileRecord) -> None:
    """Draw mean, p10-p90 and min-max; the `+norm` row is not joined to the line."""
    position = _positions_by_name(record)
    rows = [row for row in record.layers if not is_normed(row)]
    x = [position[row.layer] for row in rows]
    low, high = _angles(rows, "min"), _angles(rows, "max")
    axes.vlines(x, high, low, color=LIGHT["whisker"], linewidth=0.9, label="min to max")
    p10, p90 = _angles(rows, "p10"), _angles(rows, "p90")
    axes.fill_between(x, p10, p90, color=LIGHT["spread"], linewidth=0, label="p10 to p90")
    mean = _angles(rows, "mean")
    axes.plot(x, mean, color=LIGHT["mean"], linewidth=1.6, marker="o", markersize=3.5, label="mean")
    for row in record.layers:
        if is_normed(row):
            _draw_normed(axes, row, position[row.layer])


def _draw_normed(axes: Axes, row: LayerRow, x: float) -> None:
    axes.vlines(x, angle(row.max), angle(row.min), color=LIGHT["whisker"], linewidth=0.9)
    axes.vlines(x, angle(row.p90), angle(row.p10), color=LIGHT["spread"], linewidth=7)
    axes.plot(
        [x],
        [angle(row.mean)],
        color=LIGHT["mean"],
        markerfacecolor=LIGHT["paper"],
        markeredgewidth=1.6,
        marker="D",
        markersize=6,
        linestyle="none",
        label=f"{row.layer}: after the final norm",
    )


def _draw_active_layers(axes: Axes, record: ProfileRecord) -> None:
    """Mark active layers by role, and name them if there are few."""
    position = _positions_by_name(record)
    rows = {row.layer: row for row in record.layers}
    annotated = len(roles_of(record)) <= _MAX_ANNOTATIONS
    for key, role in ROLES.items():
        layers: list[str] = getattr(record.structure, key)
        decoder = [layer for layer in layers if not is_normed(rows[layer])]
        if decoder:
            axes.plot(
                [position[layer] for layer in decoder],
                [angle(rows[layer].mean) for layer in decoder],
                color=LIGHT["active"],
                marker=_MARKERS[role],
                markersize=7,
                linestyle="none",
                zorder=4,
                label=role,
            )
        for layer in layers if annotated else ():
            to_left = position[layer] > 0.7 * max(position.values())
            _annotate(axes, rows[layer], position[layer], to_left=to_left)


def _annotate(axes: Axes, row: LayerRow, x: float, *, to_left: bool) -> None:
    axes.annotate(
        f"layer {row.layer}\n{show(row.mean)}",
        (x, angle(row.mean)),
        xytext=(-9 if to_left else 9, 0),
        textcoords="offset points",
        ha="right" if to_left else "left",
        va="center",
        fontsize=8.5,
        zorder=5,
        # Opaque, so that whiskers behind the text do not strike it through.
        bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )


def rebinned(histogram: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Sum angle bins [L, bins] into at most `_HEAT_ROWS` display cells over the range in use.

    Returns:
        Shares of each layer's tokens [L, cells], and the cells' edges in radians [cells + 1].
    """
    bins = histogram.shape[1]
    used = np.flatnonzero(histogram.any(axis=0))
    factor = max(1, math.ceil((used[-1] + 1 - used[0]) / _HEAT_ROWS))
    first, last = int(used[0]) // factor, int(used[-1]) // factor
    starts = np.arange(first, last + 1) * factor
    stop = min((last + 1) * factor, bins)
    cells = np.add.reduceat(histogram[:, :stop], starts, axis=1)
    totals = histogram.sum(axis=1, keepdims=True)
    edges = np.append(starts, stop) * (math.pi / bins)
    return cells / np.maximum(totals, 1), edges


def _draw_heat_map(
    figure: Figure,
    axes: Axes,
    shares: npt.NDArray[Any],
    edges: npt.NDArray[Any],
    positions: Sequence[float],
) -> None:
    """Colour every cell by its share of the layer's tokens; cells without tokens stay empty."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import NullLocator

    # Without the darkest quarter, so that one token is visible against none.
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.25, 1.0, 256)))
    highest = float(shares.max())
    decade = math.floor(math.log10(shares[shares > 0].min()))
    lowest = 10.0 ** (decade if 10.0**decade < highest else decade - 1)
    norm = LogNorm(lowest, highest)
    axes.set_facecolor(LIGHT["empty"])
    for x, share in zip(positions, shares, strict=True):
        column = np.ma.masked_equal(share[:, np.newaxis], 0)
        mesh = axes.pcolormesh(
            [x - 0.5, x + 0.5], edges, column, cmap=colours, norm=norm, rasterized=True
        )
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=30)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    ticks = [10.0**power for power in range(-12, 1) if lowest <= 10.0**power <= highest]
    bar.set_ticks(ticks, labels=[f"{100 * tick:.12g}%" for tick in ticks])
    bar.set_label("share of the layer's tokens in a cell")
