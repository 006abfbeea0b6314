"""The trade-off of an evaluation as SVG: the loss of each operating point against its cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from cascade.core.formatting import HUGE_NATS
from cascade.evaluation.records import EvaluationRecord, OperatingPointRow
from cascade.evaluation.verdict import CONTROLS
from cascade.report.common.svg import LIGHT, as_svg, new_figure, plain_style, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colour and marker of every rule; the last entry is for unknown rules.
RULE_STYLES = {
    "cosine": ("rule1", "o"),
    "mean_cosine": ("rule2", "p"),
    "top2_gap": ("rule3", "s"),
    "max_probability": ("rule4", "^"),
    "entropy": ("rule5", "v"),
    "patience": ("rule6", "D"),
    "": ("ink", "P"),
}
_CONTROL_MARKERS = {"fixed": "d", "random": "x", "oracle": "*"}
#: Beyond this many curves their labels would cover each other; those of the front remain.
_MAX_LABELS = 12
#: From this largest perplexity ratio on, the axis is logarithmic.
_LOGARITHMIC_FROM = 3.0


@dataclass(frozen=True)
class _Panel:
    """One panel: its axes, the cost and loss that it shows, and the full model's loss."""

    axes: Axes
    cost: Callable[[OperatingPointRow], float]
    loss: Callable[[OperatingPointRow], float]
    full_loss: float

    def place(self, row: OperatingPointRow) -> tuple[float, float]:
        """Return the position of an operating point."""
        return self.cost(row), self.loss(row)


#: The losses, each with the full model's value: perplexity relative to the full model, and the
#: share of tokens with another prediction.
_LOSSES: tuple[tuple[Callable[[OperatingPointRow], float], float], ...] = (
    (lambda row: row.compared_ratio, 1.0),
    (lambda row: 1 - row.agreement, 0.0),
)
#: The same where a perplexity is huge: losses in nats per token, relative to the full model's.
_LOSSES_IN_NATS = ((lambda row: row.added_nats, 0.0), _LOSSES[1])
_COSTS: tuple[Callable[[OperatingPointRow], float], ...] = (
    lambda row: row.flops_ratio,
    lambda row: row.seconds_ratio,
)


def pareto_svg(record: EvaluationRecord) -> str:
    """Draw perplexity and differing predictions of each operating point against its costs.

    The full model is at (1, 1) and (1, 0); lower left is better. Rules differ in colour and marker,
    and controls are grey. A line joins the operating points that no other one beats.

    Args:
        record: A saved record of kind `evaluation`.

    Returns:
        One `<svg>` element, which is identical for equal records and is also a complete file.
    """
    with plain_style():
        figure = new_figure((10, 8.6))
        grid = figure.subplots(2, 2, sharex="col", sharey="row")
        title = title_of(record, "loss against cost, numbers are exit layers")
        # parse_math=False, because a "$" in a name would start a formula.
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
        losses = _LOSSES_IN_NATS if _in_nats(record) else _LOSSES
        for row, (loss, full_loss) in zip(grid, losses, strict=True):
            for axes, cost in zip(row, _COSTS, strict=True):
                _draw_panel(_Panel(axes, cost, loss, full_loss), record)
        _name_axes(grid, record)
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4)
        return as_svg(figure, "pareto", _label(record))


def _in_nats(record: EvaluationRecord) -> bool:
    return any(abs(row.added_nats) > HUGE_NATS for row in record.points)


def _draw_panel(panel: _Panel, record: EvaluationRecord) -> None:
    panel.axes.grid(linewidth=0.8)
    panel.axes.margins(0.08)
    panel.axes.axvline(1, color=LIGHT["muted"], linewidth=0.9, zorder=1)
    points = [row for row in record.points if all(map(math.isfinite, panel.place(row)))]
    controls = [row for row in points if row.rule in CONTROLS]
    rules = [row for row in points if row.rule not in CONTROLS]
    front = front_of([(1.0, panel.full_loss), *map(panel.place, rules)])
    _draw_curves(panel, rules, front)
    _draw_curves(panel, controls, front)
    panel.axes.plot(
        *zip(*front, strict=True),
        color=LIGHT["ink"],
        linewidth=1.1,
        zorder=2,
        label="none is better in both",
    )
    panel.axes.plot(
        [1.0],
        [panel.full_loss],
        color=LIGHT["ink"],
        marker="o",
        markersize=9,
        markerfacecolor=LIGHT["paper"],
        markeredgewidth=2,
        linestyle="none",
        zorder=5,
        label="full model",
    )
    _ring_verdict(panel, record)


def front_of(places: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the positions that no other one beats in both cost and loss, from left to right.

    Args:
        places: Cost and loss of each position; lower is better.
    """
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(places):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def curves_of(
    rows: Sequence[OperatingPointRow],
) -> Iterator[tuple[str, int, list[OperatingPointRow]]]:
    """Yield rule, layer and operating points of each curve, ordered by threshold."""

    def key(row: OperatingPointRow) -> tuple[str, int]:
        return row.rule, row.exit_layer

    ordered = sorted(rows, key=lambda row: (*key(row), row.threshold))
    for (rule, layer), group in groupby(ordered, key=key):
        yield rule, layer, list(group)


def _draw_curves(
    panel: _Panel, rows: Sequence[OperatingPointRow], front: Sequence[tuple[float, float]]
) -> None:
    curves = list(curves_of(rows))
    named: set[str] = set()
    for number, (rule, layer, points) in enumerate(curves):
        control = rule in CONTROLS
        colour, marker = RULE_STYLES.get(rule, RULE_STYLES[""])
        if control:
            colour, marker = "control", _CONTROL_MARKERS[rule]
        places = [panel.place(row) for row in points]
        panel.axes.plot(
            *zip(*places, strict=True),
            color=LIGHT[colour],
            linewidth=0.7,
            linestyle="none" if len(places) == 1 else (0, (2, 2)) if control else "-",
            marker=marker,
            markersize=7 if rule == "oracle" else 5,
            zorder=2.5 if control else 3,
            label="_" if rule in named else f"{rule} (control)" if control else rule,
        )
        named.add(rule)
        end = min(places)
        crowded = len(curves) > _MAX_LABELS
        if rule == "fixed" or not (control or (crowded and not set(places) & set(front))):
            name_curve(panel.axes, layer, end, number, LIGHT["muted" if control else colour])


def name_curve(axes: Axes, layer: int, end: tuple[float, float], number: int, colour: str) -> None:
    """Write a curve's exit layer at its end.

    Args:
        axes: The axes of the panel.
        layer: The exit layer.
        end: The end of the curve.
        number: The number of the curve. Names alternate between above and below, so that those of
            neighbouring ends do not overlap.
        colour: The colour of the curve.
    """
    axes.annotate(
        str(layer),
        end,
        xytext=(-4, -3 if number % 2 else 2),
        textcoords="offset points",
        ha="right",
        va="top" if number % 2 else "bottom",
        fontsize=8.5,
        color=colour,
        zorder=4,
    )


def ring(axes: Axes, place: tuple[float, float], name: str) -> None:
    """Draw a ring with a legend entry around an operating point."""
    axes.plot(
        [place[0]],
        [place[1]],
        color="none",
        marker="o",
        markersize=13,
        markeredgecolor=LIGHT["ink"],
        markeredgewidth=1.2,
        linestyle="none",
        zorder=5,
        label=name,
    )


def _ring_verdict(panel: _Panel, record: EvaluationRecord) -> None:
    number = record.verdict.point
    if number is None or not all(map(math.isfinite, panel.place(record.points[number]))):
        return
    place = panel.place(record.points[number])
    ring(panel.axes, place, "recommended" if record.verdict.use else "nearest to worthwhile")


def _name_axes(grid: Sequence[Sequence[Axes]], record: EvaluationRecord) -> None:
    from matplotlib.ticker import FuncFormatter

    settings = record.settings
    (perplexity, _), (differing, other) = grid
    in_nats = _in_nats(record)
    perplexity.set_ylabel(
        "nats per token above the full model" if in_nats else "perplexity / the full model's"
    )
    differing.set_ylabel("tokens with another prediction")
    differing.set_xlabel("operations / the full model's")
    other.set_xlabel("time / the full model's")
    ratios = [row.compared_ratio for row in record.points]
    if max(ratios, default=1.0) > _LOGARITHMIC_FROM and not in_nats:
        perplexity.set_yscale("log")
        perplexity.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        perplexity.yaxis.set_minor_formatter("")
    differing.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    target = settings.perplexity_ratio
    wanted = (math.log(target) if in_nats else target, 1 - settings.agreement)
    for row, most in zip(grid, wanted, strict=True):
        for axes in row:
            shade_cheaper(axes, (None, most), "target: good enough and cheaper")


def shade_cheaper(axes: Axes, target: tuple[float | None, float | None], name: str) -> None:
    """Shade the values of y that reach a target, where x is cheaper than the full model.

    Args:
        axes: Axes whose x is a cost relative to the full model. The shaded values are shown.
        target: Lowest and highest value; None for the end of the axis.
        name: Name of the region in the legend.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    least, most = (
        low if target[0] is None else target[0],
        high if target[1] is None else target[1],
    )
    axes.fill_between(
        [left, 1.0], least, most, color=LIGHT["stable"], linewidth=0, zorder=0, label=name
    )
    axes.set_xlim(left, right)
    axes.set_ylim(low, max(high, most))


def _label(record: EvaluationRecord) -> str:
    rules = ", ".join(dict.fromkeys(row.rule for row in record.points)) or "none"
    return (
        "Four scatter plots: perplexity and share of tokens with another prediction, against "
        f"operations and time, relative to the full model. Rules: {rules}. "
        f"{record.verdict.headline}"
    )
