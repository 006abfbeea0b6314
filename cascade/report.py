"""Terminal tables, plots and pages of a saturation profile, all drawn from the saved record.

Nothing is measured here: numbers are formatted, scaled to pixels, or rebinned for display.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Arrays = Mapping[str, npt.NDArray[Any]]

_KIND = "saturation"
_SCHEMA = 1
_SECTIONS = ("provenance", "layers", "structure", "thresholds")
_STATISTICS = ("mean", "std", "min", "p10", "p50", "p90", "max")
_ROLES = {
    "input_transform": "input transform",
    "dips": "dip",
    "output_transform": "output transform",
}
_NORM_SUFFIX = "+norm"


# --- Reading the record ----------------------------------------------------------------------


def _check(record: Record) -> None:
    """Refuse what is not a saturation profile, before anything is drawn."""
    for key, expected in (("kind", _KIND), ("schema", _SCHEMA)):
        if record.get(key) != expected:
            raise ValueError(f"expected {key} {expected!r}, got {record.get(key)!r}")
    missing = [section for section in _SECTIONS if section not in record]
    if missing:
        raise ValueError(f"expected the sections {', '.join(_SECTIONS)}, got none of {missing}")
    if not record["layers"]:
        raise ValueError("expected at least one layer, got none")


def _check_histogram(record: Record, arrays: Arrays) -> None:
    """Refuse arrays that belong to another record."""
    missing = [name for name in ("layers", "histogram") if name not in arrays]
    if missing:
        raise ValueError(f"expected the arrays layers and histogram, got none of {missing}")
    names = [row["layer"] for row in record["layers"]]
    got = [str(name) for name in arrays["layers"]]
    if got != names:
        raise ValueError(f"expected arrays of the layers {names}, got {got}")
    shape = arrays["histogram"].shape
    if len(shape) != 2 or shape[0] != len(names):
        raise ValueError(f"expected a histogram of shape [{len(names)}, bins], got {list(shape)}")
    if not arrays["histogram"].any():
        raise ValueError("expected a histogram with counted tokens, got only zeros")


def _roles(record: Record) -> dict[str, str]:
    """Return the role of every active layer, by layer name."""
    structure = record["structure"]
    return {layer: role for key, role in _ROLES.items() for layer in structure[key]}


def _is_normed(row: Record) -> bool:
    return str(row["layer"]).endswith(_NORM_SUFFIX)


def _number(value: float) -> str:
    # "z": a mean of -0.00001 reads 0.0000, not -0.0000.
    return f"{value:z.4f}"


def _percent(share: float) -> str:
    """Format a share so that 0.00% means none and 100.00% means all, never nearly."""
    if 0 < share < 0.00005:
        return "<0.01%"
    if 0.99995 <= share < 1:
        return ">99.99%"
    return f"{100 * share:.2f}%"


def _statistics_rows(record: Record) -> list[list[str]]:
    roles = _roles(record)
    return [
        [row["layer"], *(_number(row[name]) for name in _STATISTICS), roles.get(row["layer"], "")]
        for row in record["layers"]
    ]


def _outlier_rows(record: Record) -> list[list[str]]:
    return [
        [row["layer"], _percent(row["frac_negative"]), _percent(row["frac_below_half"])]
        for row in record["layers"]
        if row["frac_negative"] > 0 or row["frac_below_half"] > 0
    ]


def _threshold_rows(record: Record) -> list[list[str]]:
    return [
        [
            f"{100 * entry['hard_ratio']:g}%",
            f"{entry['threshold']:.6f}",
            f"{100 * entry['hard_ratio']:g}% go on, {100 - 100 * entry['hard_ratio']:g}% exit",
        ]
        for entry in record["thresholds"]["by_hard_ratio"]
    ]


# --- Saying it in words ----------------------------------------------------------------------


def _listed(parts: Sequence[str]) -> str:
    if len(parts) < 2:
        return "".join(parts) or "none"
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _bands(record: Record) -> str:
    """Name the stable bands: `3 to 24 and 26 to 29`, or `none`."""
    bands = record["structure"]["stable_bands"]
    return _listed([first if first == last else f"{first} to {last}" for first, last in bands])


def _active(record: Record, key: str) -> str:
    """Name the layers of one role with their means, or `none`."""
    means = {row["layer"]: row["mean"] for row in record["layers"]}
    layers = record["structure"][key]
    return _listed([f"{layer} (mean {_number(means[layer])})" for layer in layers])


def _final_norm(record: Record) -> str | None:
    """Tell the last layer from the final norm behind it; None without a `+norm` row."""
    rows = {row["layer"]: row for row in record["layers"]}
    normed = next((row for row in record["layers"] if _is_normed(row)), None)
    if normed is None:
        return None
    last = normed["layer"].removesuffix(_NORM_SUFFIX)
    return (
        f"layer {last} itself has a mean similarity of {_number(rows[last]['mean'])}; read behind "
        f"the final norm (row {normed['layer']}) it is {_number(normed['mean'])}. The difference "
        "is made by the norm, not by the layer."
    )


def _cutoff(record: Record) -> str:
    cutoff = record["structure"]["cutoff"]
    if cutoff is None:
        return "too few layers to tell active layers from stable ones"
    return f"a layer with a mean similarity below {_number(cutoff)} is active"


def _findings(record: Record) -> list[tuple[str, str]]:
    """Return the special layers in words, as (label, text)."""
    structure = record["structure"]
    findings = [
        ("Stable bands", _bands(record)),
        ("Input transform", _active(record, "input_transform")),
        ("Dips", _active(record, "dips")),
        ("Output transform", _active(record, "output_transform")),
    ]
    norm = _final_norm(record)
    if norm is not None:
        findings.append(("Final norm", norm))
    return [
        *findings,
        ("Cutoff", _cutoff(record)),
        ("Rule", structure["rule"]),
        ("Source", structure["source"]),
    ]


def _exit_rule(record: Record) -> str:
    """Say which two states the thresholds compare, and what hard and easy mean."""
    layer = str(record["thresholds"]["exit_layer"])
    # Spelled out because the pair one further up is the off-by-one of the first study.
    pair = f", history[{int(layer) - 1}] against history[{layer}]" if layer.isdigit() else ""
    return (
        f"Exit layer {layer}{pair}. Hard: similarity < threshold, the token goes on. "
        "Easy: similarity >= threshold, the token exits."
    )


def _headline(record: Record) -> list[tuple[str, str]]:
    """Return model, corpus and run in one line each."""
    model, corpus = record["provenance"]["model"], record["provenance"]["corpus"]
    traits = [model["family"], f"{model['num_layers']} decoder layers", model["quantization"]]
    return [
        ("Model", f"{model['name']} ({', '.join(trait for trait in traits if trait)})"),
        (
            "Corpus",
            f"{corpus['name']}, {corpus['tokens']:,} tokens: "
            f"{corpus['sequences']:,} sequences x {corpus['seq_len']:,}",
        ),
        ("Run", f"{model['dtype']} on {model['device']}"),
    ]


# --- Terminal --------------------------------------------------------------------------------

#: The widest that the bar chart becomes: longer bars say no more and part from their labels.
_CHART_WIDTH = 100
#: Seven statistics and the longest role fit into this; narrower consoles break the lines.
_TABLE_WIDTH = 80

#: Only an addition: the role is also said in words.
_ACTIVE_STYLE = "yellow"

#: rich replaces box characters on an ASCII stream by a box with edges, which is wider than 80.
_ASCII_BOX = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def print_profile(record: Record, console: Console) -> None:
    """Print a profile: headline, statistics, outliers, bar chart, special layers, thresholds.

    Nothing depends on colour, and 80 columns are enough.

    Args:
        record: A saved record of kind `saturation`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema, or lacks a section.
    """
    _check(record)
    _print_pairs(_headline(record), console)
    _print_heading("Similarity of input and output, per layer", console)
    _print_table(
        ("Layer", *_STATISTICS, "role"),
        _statistics_rows(record),
        console,
        text_columns=1,
        active=_roles(record).keys(),
    )
    _print_heading("Outliers: share of tokens", console)
    outliers = _outlier_rows(record)
    if outliers:
        _print_table(("Layer", "below 0", "below 0.5"), outliers, console, gap=2)
    else:
        console.print(Text("none"))
    _print_heading("Mean similarity", console)
    for line in _bar_chart(record, min(console.width, _CHART_WIDTH), console.options.ascii_only):
        console.print(line, soft_wrap=True)
    _print_heading("Special layers", console)
    _print_pairs(_findings(record), console)
    _print_heading("Suggested thresholds", console)
    _print_thresholds(record, console)


def _print_heading(text: str, console: Console) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _print_pairs(pairs: Iterable[tuple[str, str]], console: Console) -> None:
    """Print labels and texts in two columns, the texts wrapped with a hanging indent."""
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in pairs:
        grid.add_row(Text(label, style="dim"), Text(text))
    _print_lines(grid, console, console.width)


def _print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    console: Console,
    *,
    gap: int = 0,
    text_columns: int = 0,
    active: Collection[str] = (),
) -> None:
    """Print numbers right-aligned and the last `text_columns` left-aligned.

    The box itself leaves one blank between columns; `gap` adds more.
    """
    table = Table(
        box=_ASCII_BOX if console.options.ascii_only else box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, gap, 0, 0),
        pad_edge=False,
        header_style="bold",
    )
    for index, name in enumerate(header):
        is_text = index >= len(header) - text_columns
        table.add_column(Text(name), justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        # Text, not str: a cell is never read as rich markup.
        style = _ACTIVE_STYLE if row[0] in active else ""
        table.add_row(*(Text(cell, style=style) for cell in row))
    _print_lines(table, console, max(console.width, _TABLE_WIDTH))


def _print_lines(content: Table | Text, console: Console, width: int) -> None:
    """Print a table or text line by line, without the blanks that rich pads lines with.

    Unlike `console.print`, this lets a line be wider than the console: it cuts no number short.
    """
    for segments in console.render_lines(content, console.options.update_width(width), pad=False):
        line = Text.assemble(*((segment.text, segment.style or "") for segment in segments))
        line.rstrip()
        console.print(line, soft_wrap=True)


def _print_thresholds(record: Record, console: Console) -> None:
    rows = _threshold_rows(record)
    if not rows:
        console.print(Text("none"))
        return
    _print_lines(Text(_exit_rule(record)), console, console.width)
    console.print()
    _print_table(("hard ratio", "threshold", "meaning"), rows, console, gap=2, text_columns=1)


def _bar_chart(record: Record, width: int, ascii_only: bool) -> Iterator[Text]:
    """Yield one line per layer: name, mean, bar from 0 towards 1 (or left of 0), and role."""
    roles = _roles(record)
    means = [row["mean"] for row in record["layers"]]
    name_width = max(5, *(len(row["layer"]) for row in record["layers"]))
    role_width = max((len(role) + 3 for role in roles.values()), default=0)
    # Two blanks and the mean ("-0.1234") stand before the bar; the zero line takes one cell.
    cells = max(10, width - name_width - 9 - role_width)
    lowest = min(0.0, *means)
    scale = int((cells - 2) / (1 - lowest))
    left = math.ceil(-lowest * scale)
    for row in record["layers"]:
        bar = _bar(row["mean"], scale, left, ascii_only)
        role = roles.get(row["layer"])
        line = f"{row['layer']:>{name_width}} {_number(row['mean']):>7} {bar}"
        if role:
            line = f"{line:<{name_width + 9 + left + 1 + scale}} ({role})"
        yield Text(line, style=_ACTIVE_STYLE if role else "")


def _bar(mean: float, scale: int, left: int, ascii_only: bool) -> str:
    """Draw one bar from the zero line, `scale` cells per unit, `left` cells kept for negatives.

    Eighths of a cell to the right; to the left there is only a half block to be had. Whatever is
    not zero is seen.
    """
    steps = 1 if ascii_only else 8 if mean >= 0 else 2
    length = max(round(abs(mean) * scale * steps), 1 if mean else 0)
    whole, part = divmod(length, steps)
    full, zero = ("#", "|") if ascii_only else ("█", "│")
    if mean >= 0:
        return " " * left + zero + full * whole + " ▏▎▍▌▋▊▉"[part].strip()
    return ("▐" * part + full * whole).rjust(left) + zero


# --- Plots -----------------------------------------------------------------------------------

#: Colours by name, for light and dark surroundings. A plot is drawn in the light ones; the page
#: swaps each for a CSS variable, so one drawing serves both.
_PALETTE = {
    "paper": ("#ffffff", "#14181f"),
    "ink": ("#1c2430", "#e4e8ee"),
    "muted": ("#5b6675", "#9aa6b5"),
    "grid": ("#e3e7ec", "#2a323d"),
    "stable": ("#e6f2ec", "#1b2e29"),
    "tint": ("#fbf0e9", "#2e231d"),
    "spread": ("#a9c4ea", "#35558a"),
    "whisker": ("#8d9bb0", "#76859b"),
    "mean": ("#1d5bb8", "#7fb0f5"),
    "active": ("#c2410c", "#fb9a5b"),
    "empty": ("#1a1626", "#0b0a12"),
}
_LIGHT = {name: light for name, (light, _) in _PALETTE.items()}

_MARKERS = {"input transform": "^", "dip": "v", "output transform": "s"}
_HEAT_ROWS = 120
_HEAT_DPI = 200
#: Beyond this many active layers their names would cover each other; the markers still tell.
_MAX_ANNOTATIONS = 8


def layer_profile_svg(record: Record) -> str:
    """Draw similarity against layer: mean, p10-p90 band, min and max, special layers.

    Args:
        record: A saved record of kind `saturation`.

    Returns:
        One `<svg>` element, the same bytes for the same record; it stands alone as a file, too.

    Raises:
        ValueError: The record is of another kind or schema, or lacks a section.
    """
    _check(record)
    with _plain_style():
        figure, axes = _new_figure(record, "similarity per layer")
        _limit_angles(axes, *_angle_range(record))
        _draw_stable_bands(axes, record)
        _draw_statistics(axes, record)
        _draw_active_layers(axes, record)
        _label_layers(axes, record)
        figure.legend(loc="outside lower center", ncols=5)
        first, last = record["layers"][0]["layer"], record["layers"][-1]["layer"]
        label = f"Line chart: similarity per layer, {first} to {last}. {_summary(record)}"
        return _svg(figure, "layer-profile", label)


def density_svg(record: Record, arrays: Arrays) -> str:
    """Draw where the tokens of each layer lie, as a heat map of layers x similarity.

    Args:
        record: A saved record of kind `saturation`.
        arrays: Its arrays: `layers`, names [L], and `histogram`, counts [L, bins], bins uniform
            in angle over [0, pi].

    Returns:
        One `<svg>` element with the map as an embedded image, the same bytes for the same input.

    Raises:
        ValueError: The record is of another kind or schema, or the arrays do not belong to it.
    """
    _check(record)
    _check_histogram(record, arrays)
    with _plain_style():
        figure, axes = _new_figure(record, "where the tokens lie")
        shares, edges = _rebinned(arrays["histogram"])
        _draw_heat_map(figure, axes, shares, edges, _positions(record))
        _limit_angles(axes, float(edges[0]), float(edges[-1]))
        _label_layers(axes, record)
        first, last = record["layers"][0]["layer"], record["layers"][-1]["layer"]
        label = f"Heat map: share of tokens per similarity, layers {first} to {last}."
        return _svg(figure, "token-density", label)


@contextmanager
def _plain_style() -> Iterator[None]:
    """Draw independently of the user's matplotlibrc, and reproducibly."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "cascade",
                "svg.fonttype": "none",
                "font.size": 9.5,
                "figure.facecolor": _LIGHT["paper"],
                "axes.facecolor": _LIGHT["paper"],
                "axes.edgecolor": _LIGHT["muted"],
                "axes.labelcolor": _LIGHT["muted"],
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "grid.color": _LIGHT["grid"],
                "text.color": _LIGHT["ink"],
                "xtick.color": _LIGHT["muted"],
                "ytick.color": _LIGHT["muted"],
                "legend.frameon": False,
            }
        )
        yield


def _new_figure(record: Record, subject: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.add_subplot()
    model, corpus = record["provenance"]["model"], record["provenance"]["corpus"]
    # A path can be a name: what is longer than this runs out of the figure.
    names = [
        name if len(name) <= 40 else f"{name[:37]}..." for name in (model["name"], corpus["name"])
    ]
    title = f"{' on '.join(names)}: {subject}"
    # A character that the font lacks would warn, and a "$" would start a formula.
    title = title.encode("ascii", "replace").decode()
    axes.set_title(title, loc="left", pad=20, fontsize=11, parse_math=False)
    axes.set_ylabel("similarity (axis uniform in angle)")
    axes.set_xlabel("decoder layer")
    return figure, axes


def _angle(similarity: float) -> float:
    return math.acos(min(1.0, max(-1.0, similarity)))


def _angles(rows: Iterable[Record], name: str) -> list[float]:
    return [_angle(row[name]) for row in rows]


def _positions(record: Record) -> list[float]:
    """Return where each row stands on the x axis: layer l at l, the `+norm` row set apart."""
    # Not a decoder layer. The gap grows with the axis: half a step of eighty is not to be seen.
    gap = max(0.5, len(record["layers"]) / 40)
    return [
        index + (gap if _is_normed(row) else 0.0)
        for index, row in enumerate(record["layers"], start=1)
    ]


def _angle_range(record: Record) -> tuple[float, float]:
    """Return the smallest and the largest angle that is drawn."""
    angles = _angles(record["layers"], "max") + _angles(record["layers"], "min")
    if record["structure"]["cutoff"] is not None:
        angles.append(_angle(record["structure"]["cutoff"]))
    return min(angles), max(angles)


def _limit_angles(axes: Axes, low: float, high: float) -> None:
    """Show the angles [low, high], similarity 1 at the top, with similarities as tick labels."""
    # 0.05 rad is 0.1% of similarity near 1: equal values still get an axis, not a point.
    margin = max(0.02 * (high - low), 0.05 - (high - low), 0.0)
    low, high = max(0.0, low - margin), min(math.pi, high + margin)
    ticks = _similarity_ticks(low, high)
    axes.set_ylim(high, low - (0.015 * (high - low) if low == 0 else 0.0))
    axes.set_yticks([_angle(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])


def _similarity_ticks(low: float, high: float) -> list[float]:
    """Return round similarities, the roundest first, as many as fit between two angles."""
    chosen: list[float] = []
    for per_unit in (1, 2, 10, 20, 100, 1000, 10_000):
        few = len(chosen) < 6
        for step in range(per_unit, -per_unit - 1, -1):
            tick = step / per_unit
            # Finer than a tenth only where the axis is short, or where the mass is: near 1.
            wanted = per_unit <= 10 or few or (tick > 0.9 and per_unit <= 100)
            apart = (abs(_angle(tick) - _angle(other)) for other in chosen)
            fits = low <= _angle(tick) <= high and all(gap > (high - low) / 18 for gap in apart)
            if wanted and fits:
                chosen.append(tick)
    return sorted(chosen)


def _label_layers(axes: Axes, record: Record) -> None:
    """Put layer names below the x axis, thinned out where there are too many to read."""
    positions = _positions(record)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10_000) if len(positions) <= 36 * step)
    ticks = [
        (position, row["layer"].replace(_NORM_SUFFIX, f"\n{_NORM_SUFFIX}"))
        for index, (position, row) in enumerate(zip(positions, record["layers"], strict=True), 1)
        if index % step == 0 or index == 1 or _is_normed(row)
    ]
    axes.set_xticks([position for position, _ in ticks], [name for _, name in ticks], fontsize=8.5)
    axes.set_xlim(positions[0] - 0.75, positions[-1] + 0.75)


def _draw_stable_bands(axes: Axes, record: Record) -> None:
    position = _positions_by_name(record)
    cutoff = record["structure"]["cutoff"]
    for index, (first, last) in enumerate(record["structure"]["stable_bands"]):
        left, right = position[first] - 0.5, position[last] + 0.5
        label = "stable band" if index == 0 else None
        axes.axvspan(left, right, color=_LIGHT["stable"], linewidth=0, zorder=0, label=label)
        if right - left > 0.08 * len(position):
            axes.annotate(
                f"stable {first}-{last}" if first != last else f"stable {first}",
                ((left + right) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=_LIGHT["muted"],
                fontsize=8.5,
            )
    axes.grid(axis="y", linewidth=0.8)
    if cutoff is not None:
        axes.axhline(
            _angle(cutoff),
            color=_LIGHT["active"],
            linestyle=(0, (5, 4)),
            linewidth=0.9,
            label=f"cutoff {_number(cutoff)}",
        )


def _positions_by_name(record: Record) -> dict[str, float]:
    names = (row["layer"] for row in record["layers"])
    return dict(zip(names, _positions(record), strict=True))


def _draw_statistics(axes: Axes, record: Record) -> None:
    """Draw mean, p10-p90 and min-max; the `+norm` row is not joined to the line."""
    position = _positions_by_name(record)
    rows = [row for row in record["layers"] if not _is_normed(row)]
    x = [position[row["layer"]] for row in rows]
    low, high = _angles(rows, "min"), _angles(rows, "max")
    axes.vlines(x, high, low, color=_LIGHT["whisker"], linewidth=0.9, label="min to max")
    p10, p90 = _angles(rows, "p10"), _angles(rows, "p90")
    axes.fill_between(x, p10, p90, color=_LIGHT["spread"], linewidth=0, label="p10 to p90")
    mean = _angles(rows, "mean")
    axes.plot(
        x, mean, color=_LIGHT["mean"], linewidth=1.6, marker="o", markersize=3.5, label="mean"
    )
    for row in record["layers"]:
        if _is_normed(row):
            _draw_normed(axes, row, position[row["layer"]])


def _draw_normed(axes: Axes, row: Record, x: float) -> None:
    axes.vlines(x, _angle(row["max"]), _angle(row["min"]), color=_LIGHT["whisker"], linewidth=0.9)
    axes.vlines(x, _angle(row["p90"]), _angle(row["p10"]), color=_LIGHT["spread"], linewidth=7)
    axes.plot(
        [x],
        [_angle(row["mean"])],
        color=_LIGHT["mean"],
        markerfacecolor=_LIGHT["paper"],
        markeredgewidth=1.6,
        marker="D",
        markersize=6,
        linestyle="none",
        label=f"{row['layer']}: behind the final norm",
    )


def _draw_active_layers(axes: Axes, record: Record) -> None:
    """Mark active layers by role, and name them where there is room."""
    position = _positions_by_name(record)
    rows = {row["layer"]: row for row in record["layers"]}
    annotated = len(_roles(record)) <= _MAX_ANNOTATIONS
    for key, role in _ROLES.items():
        layers = record["structure"][key]
        decoder = [layer for layer in layers if not _is_normed(rows[layer])]
        if decoder:
            axes.plot(
                [position[layer] for layer in decoder],
                [_angle(rows[layer]["mean"]) for layer in decoder],
                color=_LIGHT["active"],
                marker=_MARKERS[role],
                markersize=7,
                linestyle="none",
                zorder=4,
                label=role,
            )
        for layer in layers if annotated else ():
            to_left = position[layer] > 0.7 * max(position.values())
            _annotate(axes, rows[layer], position[layer], to_left=to_left)


def _annotate(axes: Axes, row: Record, x: float, *, to_left: bool) -> None:
    axes.annotate(
        f"layer {row['layer']}\n{_number(row['mean'])}",
        (x, _angle(row["mean"])),
        xytext=(-9 if to_left else 9, 0),
        textcoords="offset points",
        ha="right" if to_left else "left",
        va="center",
        fontsize=8.5,
        zorder=5,
        # Opaque, so that whiskers behind the text do not strike it through.
        bbox={"facecolor": _LIGHT["paper"], "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )


def _rebinned(histogram: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
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

    # The darkest quarter is left out: one token must stand out from none.
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.25, 1.0, 256)))
    highest = float(shares.max())
    decade = math.floor(math.log10(shares[shares > 0].min()))
    lowest = 10.0 ** (decade if 10.0**decade < highest else decade - 1)
    norm = LogNorm(lowest, highest)
    axes.set_facecolor(_LIGHT["empty"])
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


def _svg(figure: Figure, name: str, label: str) -> str:
    """Write a figure as one `<svg>` element that can share a page with others.

    Every id is renamed to `name-<number>`, in order of appearance: two figures on a page share
    none, and none depends on a memory address.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", dpi=_HEAT_DPI, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].rstrip() + "\n"
    numbers: dict[str, str] = {}
    # "<" and ">" are escaped in texts, so this sees only attributes.
    for old in re.findall(r'<[^<>]*?\sid="([^"]+)"', svg):
        numbers.setdefault(old, f"{name}-{len(numbers) + 1}")
    svg = re.sub(r'(<[^<>]*?\sid=")([^"]+)', lambda m: m[1] + numbers[m[2]], svg)
    svg = re.sub(r"(url\(#)([^)]+)", lambda m: m[1] + numbers[m[2]], svg)
    svg = re.sub(r'(href="#)([^"]+)', lambda m: m[1] + numbers[m[2]], svg)
    # matplotlib's one CSS rule would otherwise style the whole page.
    svg = svg.replace("*{stroke", f"#{name} *{{stroke")
    root = f'<svg id="{name}" role="img" aria-label="{html.escape(label)}" '
    return svg.replace("<svg ", root, 1)


# --- Page ------------------------------------------------------------------------------------

_CSS = """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
.kicker, .about, caption, figcaption, dt { color: var(--muted); }
.kicker { margin: 0 0 .25rem; font-size: .85rem; letter-spacing: .04em; }
.lead { margin: 1.25rem 0 1rem; padding-left: 1rem; border-left: 4px solid var(--mean);
  font-size: 1.1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem;
  max-width: 50rem; margin: 1.25rem 0 0; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0 0; }
figcaption, caption { font-size: .9rem; text-align: left; }
figcaption { max-width: 46rem; margin-top: .25rem; }
caption { padding-bottom: .5rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 2.5rem); }
.scroll { overflow-x: auto; }
.scroll svg { display: block; width: 100%; min-width: 40rem; height: auto; }
.scroll svg text { font-family: inherit !important; }
table { min-width: 22rem; border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; border-bottom: 1px solid var(--grid); text-align: right; }
th { font-weight: 600; }
.scroll th[scope=row] { position: sticky; left: 0; background: var(--paper); }
thead th { border-bottom-color: var(--muted); white-space: nowrap; }
td.text, th.text { text-align: left; }
.scroll tr.active > * { background: var(--tint); }
tr.active td.text { color: var(--active); font-weight: 600; white-space: nowrap; }
.provenance { width: 100%; }
.provenance td { overflow-wrap: anywhere; }
.provenance th { font-weight: 400; color: var(--muted); vertical-align: top; }
.provenance th[scope=rowgroup] { padding-top: 1rem; color: var(--ink); font-weight: 600; }
@media (max-width: 36rem) {
  dl { display: block; }
  dd { margin-bottom: .75rem; }
  th, td { padding: .22rem .45rem; }
}
"""


def profile_page(record: Record, arrays: Arrays) -> str:
    """Return one self-contained HTML page of a profile: nothing is loaded, no script runs.

    Args:
        record: A saved record of kind `saturation`.
        arrays: Its arrays, as for `density_svg`.

    Raises:
        ValueError: The record is of another kind or schema, or the arrays do not belong to it.
    """
    _check(record)
    sections = [
        _page_head(record),
        _page_summary(record),
        _page_figures(record, arrays),
        _page_statistics(record),
        _page_thresholds(record),
        _page_provenance(record),
    ]
    title = html.escape(f"Saturation of {record['provenance']['model']['name']}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{_theme()}{_CSS}</style>
</head>
<body>
<main>
{"".join(sections)}</main>
</body>
</html>
"""


def _theme() -> str:
    def variables(index: int) -> str:
        return " ".join(f"--{name}: {colours[index]};" for name, colours in _PALETTE.items())

    return (
        f"\n:root {{ color-scheme: light dark; {variables(0)} }}"
        f"\n@media (prefers-color-scheme: dark) {{ :root {{ {variables(1)} }} }}"
    )


def _themed(svg: str) -> str:
    for name, colour in _LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _summary(record: Record) -> str:
    """Say in two or three sentences what was found."""
    if record["structure"]["cutoff"] is None:
        return "There are too few layers to tell active ones from stable ones."
    bands, cutoff = _bands(record), _number(record["structure"]["cutoff"])
    if bands == "none":
        stable = f"No run of layers stays at or above a mean similarity of {cutoff}."
    else:
        stable = (
            f"Hidden states are saturated in layers {bands}: there, every layer's mean similarity "
            f"is at least {cutoff}."
        )
    active = [
        f"{role} in {_listed(record['structure'][key])}"
        for key, role in _ROLES.items()
        if record["structure"][key]
    ]
    return f"{stable} Active layers: {'; '.join(active) or 'none'}."


def _page_head(record: Record) -> str:
    name = record["provenance"]["model"]["name"]
    about = " · ".join(text for _, text in _headline(record)[1:])
    return (
        f'<header>\n<p class="kicker">CASCADE saturation profile</p>\n<h1>{html.escape(name)}</h1>'
        f'\n<p class="about">{html.escape(about)}</p>\n</header>\n'
    )


def _page_summary(record: Record) -> str:
    norm = _final_norm(record)
    paragraphs = [f'<p class="lead">{html.escape(_summary(record))}</p>']
    if norm is not None:
        paragraphs.append(f"<p>{html.escape(norm[0].upper() + norm[1:])}</p>")
    details = "\n".join(
        f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>"
        for label, text in _findings(record)
        if label != "Final norm"
    )
    body = "\n".join(paragraphs)
    return f"<section>\n<h2>What was found</h2>\n{body}\n<dl>\n{details}\n</dl>\n</section>\n"


def _page_figures(record: Record, arrays: Arrays) -> str:
    apart = " The row behind the final norm stands apart: it is no decoder layer."
    profile = _page_figure(
        layer_profile_svg(record),
        "Similarity of each layer's input and output. The axis is uniform in angle, which spreads "
        f"the values near 1.{apart if any(map(_is_normed, record['layers'])) else ''}",
    )
    density = _page_figure(
        density_svg(record, arrays),
        "Where the tokens lie: each column is one layer, each cell the share of its tokens at that "
        "similarity, on a logarithmic colour scale. Dark cells hold no token at all.",
    )
    return f"<section>\n<h2>Similarity per layer</h2>\n{profile}{density}</section>\n"


def _page_figure(svg: str, caption: str) -> str:
    return (
        '<figure>\n<div class="scroll" tabindex="0" role="region" aria-label="figure">\n'
        f"{_themed(svg)}</div>\n"
        f"<figcaption>{html.escape(caption)}</figcaption>\n</figure>\n"
    )


def _page_statistics(record: Record) -> str:
    statistics = _html_table(
        "Similarity per layer: statistics over all tokens. Shaded rows are active layers.",
        ("Layer", *_STATISTICS, "role"),
        _statistics_rows(record),
        text_columns=1,
        active=_roles(record).keys(),
    )
    outliers = "<p>No token lies below 0.5 in any layer.</p>\n"
    if _outlier_rows(record):
        outliers = _html_table(
            "Share of tokens below 0 and below 0.5, for the layers that have any. "
            "0.00% means none.",
            ("Layer", "below 0", "below 0.5"),
            _outlier_rows(record),
        )
    return (
        f"<section>\n<h2>Statistics</h2>\n{statistics}</section>\n"
        f"<section>\n<h2>Outliers</h2>\n{outliers}</section>\n"
    )


def _page_thresholds(record: Record) -> str:
    rows = _threshold_rows(record)
    body = "<p>none</p>\n"
    if rows:
        table = _html_table(
            "Thresholds by the wanted share of hard tokens.",
            ("hard ratio", "threshold", "meaning"),
            rows,
            text_columns=1,
        )
        body = f"<p>{html.escape(_exit_rule(record))}</p>\n{table}"
    return f"<section>\n<h2>Suggested thresholds</h2>\n{body}</section>\n"


def _html_table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 0,
    active: Collection[str] = (),
) -> str:
    """Build a table whose first column names the row and whose last `text_columns` hold text."""
    first_text = len(header) - text_columns

    def cell(tag: str, attributes: str, index: int, text: str) -> str:
        aligned = ' class="text"' if index >= first_text else ""
        return f"<{tag}{attributes}{aligned}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", ' scope="col"', *pair) for pair in enumerate(header))
    body = ""
    for row in rows:
        cells = [cell("th", ' scope="row"', 0, row[0])]
        cells += [cell("td", "", index, text) for index, text in enumerate(row[1:], start=1)]
        mark = ' class="active"' if row[0] in active else ""
        body += f"<tr{mark}>{''.join(cells)}</tr>\n"
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table">\n<table>\n'
        f"<caption><span>{html.escape(caption)}</span></caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def _page_provenance(record: Record) -> str:
    """List everything that the record says about where its numbers come from."""
    provenance = record["provenance"]
    groups = {key: value for key, value in provenance.items() if isinstance(value, Mapping)}
    groups["run"] = {key: value for key, value in provenance.items() if key not in groups}
    bodies = []
    for name, group in groups.items():
        heading = html.escape(_spaced(name))
        lines = "".join(
            f'<tr><th scope="row" class="text">{html.escape(_spaced(key))}</th>'
            f'<td class="text">{html.escape(_shown(value))}</td></tr>\n'
            for key, value in group.items()
        )
        bodies.append(
            f'<tbody>\n<tr><th scope="rowgroup" colspan="2" class="text">{heading}</th></tr>\n'
            f"{lines}</tbody>\n"
        )
    return (
        "<section>\n<h2>Provenance</h2>\n"
        '<table class="provenance">\n<caption>What was measured, on what, with what.</caption>\n'
        f"{''.join(bodies)}</table>\n</section>\n"
    )


def _spaced(key: str) -> str:
    return key.replace("_", " ")


def _shown(value: Any) -> str:
    if value is None:
        return "not recorded"
    # bool is an int, and True would read 1.
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_number else str(value)


# --- Benchmark -------------------------------------------------------------------------------


def print_bench(record: Record, console: Console) -> None:
    """Print a benchmark: speed of every way, ratios, memory, and targets met or not.

    Args:
        record: A saved record of kind `bench.collect`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema.
    """
    for key, expected in (("kind", "bench.collect"), ("schema", _SCHEMA)):
        if record.get(key) != expected:
            raise ValueError(f"expected {key} {expected!r}, got {record.get(key)!r}")
    _print_pairs(_bench_headline(record), console)
    _print_heading("Speed", console)
    _print_table(
        ("tokens/s", "median seconds", "fastest", "slowest", "way"),
        _speed_rows(record),
        console,
        gap=2,
        text_columns=1,
    )
    _print_heading("Ratios of seconds: median and 95 % interval over rounds", console)
    _print_table(
        ("median", "interval", "way/reference"),
        _ratio_rows(record),
        console,
        gap=2,
        text_columns=1,
    )
    _print_heading("Peak memory", console)
    if record["memory"]["reason"] is None:
        _print_table(
            ("peak MB", "after loading", "tokens", "way"),
            _peak_rows(record),
            console,
            gap=2,
            text_columns=1,
        )
    else:
        console.print(Text(f"Not measured: {record['memory']['reason']}."))
    _print_heading("Targets (set for 2 cores and 4,096 tokens)", console)
    _print_table(
        ("target", "limit", "measured", "verdict"),
        _target_rows(record),
        console,
        gap=1,
        text_columns=1,
    )
    _print_heading("Notes", console)
    _print_pairs(_bench_notes(record), console)


def _bench_headline(record: Record) -> list[tuple[str, str]]:
    provenance, settings = record["provenance"], record["settings"]
    machine = provenance["machine"]
    load = machine["load_average_before"]
    busy = "" if load is None else f", load average before the start {load:.2f}"
    return [
        ("Model", f"{provenance['model']['name']} on {provenance['model']['device']}"),
        (
            "Pass",
            f"{settings['tokens']:,} tokens in sequences of {settings['seq_len']:,}, "
            f"{settings['batch_size']} per batch; {settings['rounds']} rounds",
        ),
        (
            "Machine",
            f"{machine['processor']}, {machine['cores']} cores, {settings['threads']} threads"
            f"{busy}",
        ),
    ]


def _speed_rows(record: Record) -> list[list[str]]:
    return [
        [
            f"{way['tokens_per_second']:,.0f}",
            f"{np.median(way['seconds']):.3f}",
            f"{min(way['seconds']):.3f}",
            f"{max(way['seconds']):.3f}",
            name,
        ]
        for name, way in record["ways"].items()
    ]


def _ratio_rows(record: Record) -> list[list[str]]:
    return [
        [f"{row['median']:.3f}", "{:.3f} to {:.3f}".format(*row["interval"]), row["name"]]
        for row in record["ratios"]
    ]


def _peak_rows(record: Record) -> list[list[str]]:
    return [
        [
            f"{row['peak_mb']:,.1f}",
            f"{row['loaded_mb']:,.1f}",
            f"{row['tokens']:,}",
            row["way"],
        ]
        for row in record["memory"]["peaks"]
    ]


def _target_rows(record: Record) -> list[list[str]]:
    return [
        [
            target["name"],
            f"{target['sense']} {target['limit']:g}",
            "-" if target["measured"] is None else f"{target['measured']:.4g}",
            _verdict(target),
        ]
        for target in record["targets"]
    ]


def _verdict(target: Record) -> str:
    if target["met"] is None:
        return "not measured"
    verdict = "met" if target["met"] else "not met"
    interval = target["interval"]
    # With the limit inside its interval, another run could well say the opposite.
    undecided = interval is not None and interval[0] <= target["limit"] <= interval[1]
    return f"{verdict}, within noise" if undecided else verdict


def _bench_notes(record: Record) -> list[tuple[str, str]]:
    agreement = record["agreement"]
    notes = [
        ("Interval", record["interval"]),
        (
            "bf16",
            "largest shift of a layer's mean from fp32: "
            f"{agreement['bf16']['difference']:+.2e} in layer {agreement['bf16']['layer']}",
        ),
        (
            "Same work",
            "largest difference of a layer's mean, the seed's way from analyze: "
            f"{agreement['seed']['difference']:+.2e} in layer {agreement['seed']['layer']}",
        ),
        ("Peer", f"{record['peer']['reason']} ({record['peer']['source']})"),
    ]
    if record["memory"]["reason"] is None:
        notes.append(("Memory", record["memory"]["what"]))
    return notes
