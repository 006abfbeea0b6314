"""Figures of a comparison of models: profiles over relative depth, and where operations lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade.report.common.axes import angle, limit_angles
from cascade.report.common.records import is_normed
from cascade.report.common.svg import LIGHT, as_svg, new_figure, plain_style
from cascade.studies.comparisons.model_records import (
    ComparedModel,
    LayerChange,
    ModelComparison,
    ModelMeasurement,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("rule1", "rule3", "rule2", "rule4", "rule5", "rule6")
#: Longer names do not fit into the legend.
_LONGEST_NAME = 44
#: Depths closer than this share one label.
_CLOSE = 0.06
#: Beyond this many curves the labels of the largest changes would overlap, so only rings are drawn.
_MOST_NAMED = 6


def profiles_svg(record: ModelComparison) -> str | None:
    """Draw mean similarity against relative depth, and below it the changes of copies.

    Dips are triangles, joined where they match; dotted lines are suggested exit layers. The lower
    panel has the models that read the same tokens through as many layers as the first.

    Args:
        record: The comparison.

    Returns:
        One `<svg>` element, the same bytes for the same record; None where nothing was measured.
    """
    measured = record.measured()
    if not measured:
        return None
    moved = _moved_models(record)
    with plain_style():
        figure = new_figure((10, 8.6 if moved else 5.4))
        rows = figure.subplots(
            2 if moved else 1,
            1,
            sharex=True,
            squeeze=False,
            height_ratios=(3, 2)[: 1 + bool(moved)],
        )
        _draw_profiles(rows[0][0], record, measured)
        if moved:
            _draw_moves(rows[1][0], record, moved)
        rows[-1][0].set_xlabel("relative depth (layer / number of decoder layers)")
        rows[-1][0].set_xlim(0, 1.02)
        handles, names = rows[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2)
        return as_svg(figure, "models-profiles", _label(measured, moved))


def _label(measured: Sequence[ModelMeasurement], moved: Sequence[_MovedModel]) -> str:
    exits = ", ".join(
        f"{entry.label} layer {entry.exit.layer} of {entry.sizes.num_layers}" for entry in measured
    )
    text = f"Line chart: mean similarity over relative depth. Suggested exits: {exits}."
    if moved:
        names = ", ".join(model.label for model in moved)
        text += f" Below: the change of {names} from {moved[0].against}, per layer."
    return text


def _places(entry: ModelMeasurement) -> dict[str, tuple[float, float]]:
    """Return the relative depth and the angle of each decoder layer; the final norm has none."""
    return {
        row.layer: (row.depth, angle(row.mean)) for row in entry.layers if row.depth is not None
    }


def colour_of(record: ModelComparison, label: str) -> dict[str, Any]:
    """Return colour and line style of a model; dashed from the seventh model on."""
    number = [entry.label for entry in record.models].index(label)
    style = "-" if number < len(_COLOURS) else (0, (4, 1.5))
    return {"color": LIGHT[_COLOURS[number % len(_COLOURS)]], "linestyle": style}


def shown_name(entry: ComparedModel | ModelMeasurement) -> str:
    """Return "A name" in ASCII, which every font has."""
    name = entry.name
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
    # matplotlib warns about characters that the font lacks.
    return f"{entry.label}  {short}".encode("ascii", "replace").decode()


def _draw_profiles(
    axes: Axes, record: ModelComparison, measured: Sequence[ModelMeasurement]
) -> None:
    angles = [place[1] for entry in measured for place in _places(entry).values()]
    limit_angles(axes, min(angles), max(angles))
    axes.grid(axis="y", linewidth=0.8)
    axes.set_ylabel("mean similarity (axis uniform in angle)")
    axes.set_title("similarity over relative depth", loc="left", fontsize=11, pad=20)
    for number, entry in enumerate(measured):
        depths, angles_of = zip(*_places(entry).values(), strict=True)
        axes.plot(
            depths,
            angles_of,
            # The first line is broad, so that others that coincide with it remain visible.
            linewidth=4.5 if number == 0 and len(measured) > 1 else 1.3,
            alpha=0.4 if number == 0 and len(measured) > 1 else 1.0,
            marker="o",
            markersize=2.5,
            zorder=2 + number / 100,
            label=shown_name(entry),
            **colour_of(record, entry.label),
        )
    _draw_dips(axes, record, measured)
    _draw_exits(axes, measured)


def _draw_dips(axes: Axes, record: ModelComparison, measured: Sequence[ModelMeasurement]) -> None:
    places = {}
    for entry in measured:
        of_model = _places(entry)
        for layer in entry.structure.dips:
            places[entry.label, layer] = of_model[layer]
            axes.plot(
                *places[entry.label, layer],
                marker="v",
                markersize=7,
                zorder=4,
                **colour_of(record, entry.label) | {"linestyle": "none"},
            )
    _join_matches(axes, record, places)
    found = [(place[0], label, layer) for (label, layer), place in places.items()]
    for depths, names in _near(found):
        lowest = max(place[1] for place in places.values() if place[0] in depths)
        _write_below(axes, f"dip {names}", (sum(depths) / len(depths), lowest))


def _join_matches(
    axes: Axes, record: ModelComparison, places: Mapping[tuple[str, str], tuple[float, float]]
) -> None:
    for pair in record.pairs:
        for match in pair.dips.matched:
            ends = [
                places[label, layer]
                for label, layer in zip((pair.against, pair.model), match.layers, strict=True)
            ]
            axes.plot(
                *zip(*ends, strict=True), color=LIGHT["ink"], linewidth=1, linestyle=":", zorder=3
            )


def _draw_exits(axes: Axes, measured: Sequence[ModelMeasurement]) -> None:
    exits = [(entry.exit.depth, entry.label, entry.exit.layer) for entry in measured]
    for depths, names in _near(exits):
        for depth in depths:
            axes.axvline(depth, color=LIGHT["muted"], linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(
            f"exit {names}",
            (depths[-1], 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right" if depths[-1] > 0.5 else "left",
            color=LIGHT["muted"],
            fontsize=8.5,
        )


def _near(found: Iterable[tuple[float, str, str]]) -> list[tuple[list[float], str]]:
    """Return the shared label of close depths, such as "29 (A, B), 39 (C)".

    Args:
        found: Relative depth, label of the model, layer.
    """
    depths: dict[float, dict[str, list[str]]] = {}
    for depth, label, layer in found:
        depths.setdefault(depth, {}).setdefault(layer, []).append(label)
    groups: list[list[float]] = []
    for depth in sorted(depths):
        if groups and depth - groups[-1][-1] < _CLOSE:
            groups[-1].append(depth)
        else:
            groups.append([depth])
    return [
        (
            group,
            ", ".join(
                f"{layer} ({label_range(labels)})"
                for depth in group
                for layer, labels in depths[depth].items()
            ),
        )
        for group in groups
    ]


def label_range(labels: Sequence[str]) -> str:
    """Return "A to E" for consecutive letters, else "A, C"."""
    follow = [chr(ord(labels[0]) + number) for number in range(len(labels))]
    if len(labels) > 2 and list(labels) == follow:
        return f"{labels[0]} to {labels[-1]}"
    return ", ".join(labels)


def _write_below(axes: Axes, text: str, place: tuple[float, float]) -> None:
    axes.annotate(
        text,
        place,
        xytext=(0, -9),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=8.5,
        zorder=5,
        bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
    )


@dataclass(frozen=True)
class _MovedModel:
    """A model whose layers changed from the first one's over the same tokens.

    Attributes:
        label: The model's.
        against: The first model's label.
        rows: The changes of its decoder layers.
        largest_mover: The layer that changed most.
    """

    label: str
    against: str
    rows: list[LayerChange]
    largest_mover: str


def _moved_models(record: ModelComparison) -> list[_MovedModel]:
    """Return the models with a nonzero change, because the axis is logarithmic."""
    found = [
        _MovedModel(
            pair.model,
            pair.against,
            [row for row in pair.paired.layers if not is_normed(row)],
            pair.paired.largest_mover,
        )
        for pair in record.pairs
        if pair.paired is not None
    ]
    return [moved for moved in found if any(row.mean_size > 0 for row in moved.rows)]


def _draw_moves(axes: Axes, record: ModelComparison, moved: Sequence[_MovedModel]) -> None:
    num_layers = {model.label: model.sizes.num_layers for model in record.models}
    axes.set_yscale("log")
    axes.grid(axis="y", linewidth=0.8)
    axes.set_ylabel("mean absolute change")
    title = f"change of a sequence's mean similarity from {moved[0].against}, same tokens"
    axes.set_title(title, loc="left", fontsize=11)
    for model in moved:
        depth = num_layers[model.label]
        places = {row.layer: (int(row.layer) / depth, row.mean_size) for row in model.rows}
        style = colour_of(record, model.label)
        drawn = [place for place in places.values() if place[1] > 0]
        axes.plot(*zip(*drawn, strict=True), linewidth=1.3, marker="o", markersize=2.5, **style)
        place = places[model.largest_mover]
        if place[1] > 0:
            axes.plot(
                *place,
                marker="o",
                markersize=9,
                markerfacecolor="none",
                markeredgewidth=1.4,
                **style | {"linestyle": "none"},
            )
            if len(moved) <= _MOST_NAMED:
                _name_mover(axes, f"{model.label} {model.largest_mover}", place)


def _name_mover(axes: Axes, text: str, place: tuple[float, float]) -> None:
    to_left = place[0] > 0.9
    axes.annotate(
        text,
        place,
        xytext=(-7 if to_left else 7, 5),
        textcoords="offset points",
        ha="right" if to_left else "left",
        fontsize=8.5,
        zorder=5,
        bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.5, "alpha": 0.7},
    )


def operations_svg(record: ModelComparison) -> str | None:
    """Draw the shares of each model's operations before and after the exit, and in the LM head.

    Args:
        record: The comparison.

    Returns:
        One `<svg>` element; None where all models are of one size: there is nothing to compare.
    """
    sizes = [entry.sizes for entry in record.models]
    if len(set(sizes)) < 2:
        return None
    with plain_style():
        figure = new_figure((10, 1.5 + 0.45 * len(sizes)))
        axes = figure.subplots()
        seq_len = record.models[0].sizes.seq_len
        title = f"operations by layer group, sequences of {seq_len:,} tokens"
        axes.set_title(title, loc="left", fontsize=11)
        for number, entry in enumerate(record.models):
            _draw_bar(axes, number, entry)
        axes.set_yticks(range(len(sizes)), [shown_name(entry) for entry in record.models])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.spines["left"].set_visible(False)
        handles, names = axes.get_legend_handles_labels()
        once = dict(zip(names, handles, strict=True))
        figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=2)
        heads = ", ".join(
            f"{entry.label} {100 * entry.sizes.lm_head_share:.1f}%" for entry in record.models
        )
        return as_svg(figure, "models-operations", f"Stacked bars: LM head's share: {heads}.")


def _draw_bar(axes: Axes, number: int, entry: ComparedModel) -> None:
    head = entry.sizes.lm_head_share
    spared = None if entry.exit is None else entry.exit.spared
    parts = [
        ("layers up to the suggested exit", "spread", 1 - head - (spared or 0.0)),
        ("layers above it: the most that an exit can save", "rule3", spared or 0.0),
        ("LM head", "control", head),
    ]
    if spared is None:
        parts[:2] = [("decoder layers of a model that was not measured", "stable", 1 - head)]
    left = 0.0
    for name, colour, width in parts:
        axes.barh(number, width, left=left, height=0.62, color=LIGHT[colour], label=name)
        if width > 0.035:
            axes.text(left + width / 2, number, f"{100 * width:.1f}%", ha="center", va="center")
        left += width
