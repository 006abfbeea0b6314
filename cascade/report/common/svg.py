"""Shared by all figures: colours, style, titles, and SVG that can share a page."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from cascade.core.printable import printable
from cascade.core.schema import known
from cascade.report.common.records import HasProvenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

#: Name -> light and dark colour. A plot is drawn with the light colours, and the page replaces each
#: by a CSS variable, so one drawing serves both themes.
PALETTE = {
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
    "control": ("#a3acb8", "#6a7480"),
    "rule1": ("#1d5bb9", "#7fb0f6"),
    "rule2": ("#0f7f87", "#45c4cd"),
    "rule3": ("#c2410d", "#fb9a5c"),
    "rule4": ("#7c3aab", "#c79bf0"),
    "rule5": ("#3f7d20", "#8ccb6a"),
    "rule6": ("#b02a6b", "#f08abc"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}

_DPI = 200


@contextmanager
def plain_style() -> Iterator[None]:
    """Make drawing reproducible and independent of the user's matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "cascade",
                "svg.fonttype": "none",
                "font.size": 9.5,
                "figure.facecolor": LIGHT["paper"],
                "axes.facecolor": LIGHT["paper"],
                "axes.edgecolor": LIGHT["muted"],
                "axes.labelcolor": LIGHT["muted"],
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "grid.color": LIGHT["grid"],
                "text.color": LIGHT["ink"],
                "xtick.color": LIGHT["muted"],
                "ytick.color": LIGHT["muted"],
                "legend.frameon": False,
            }
        )
        yield


#: Figures that pyplot is to show, in order; None while figures are drawn for a file.
_SHOWN: ContextVar[list[Figure] | None] = ContextVar("shown figures", default=None)


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure: one of pyplot within `shown_figure`, else one for a file.

    Args:
        size: Width and height, in inches.
    """
    shown = _SHOWN.get()
    if shown is None:
        from matplotlib.figure import Figure

        return Figure(figsize=size, layout="constrained")
    from matplotlib import pyplot

    shown.append(pyplot.figure(figsize=size, layout="constrained"))
    return shown[-1]


def shown_figure(draw: Callable[[], object]) -> Figure | None:
    """Return what a function draws as a figure of pyplot, which notebooks show.

    Args:
        draw: Draws one figure; makes it with `new_figure` and ends with `as_svg`.

    Returns:
        The figure; None where there was nothing to draw.
    """
    shown: list[Figure] = []
    token = _SHOWN.set(shown)
    try:
        draw()
    finally:
        _SHOWN.reset(token)
    return shown[0] if shown else None


def title_of(record: HasProvenance, subject: str) -> str:
    """Return `model on corpus: subject` in ASCII, which every font has."""
    model, corpus = known(record.provenance.model.name) or "model", record.provenance.corpus.name
    # A name can be a path; longer ones would not fit into the figure.
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in (model, corpus)]
    # matplotlib warns about characters that the font lacks.
    return printable(f"{' on '.join(names)}: {subject}").encode("ascii", "replace").decode()


def _texts_with_names(figure: Figure) -> Iterator[Text]:
    """Yield the texts of a figure that can hold names: all but the numbers at its axes."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    yield from figure.texts
    for legend in filter(None, legends):
        yield from legend.get_texts()
    for axes in figure.axes:
        yield from axes.texts
        yield from (axes.title, axes.xaxis.label, axes.yaxis.label)


def as_svg(figure: Figure, name: str, label: str) -> str:
    """Write a figure as one `<svg>` element that can share a page with others.

    Every id is renamed to `name-<number>` in order of appearance, so that ids are unique on a page
    and reproducible.

    Args:
        figure: A figure drawn inside `plain_style`.
        name: The id of the element.
        label: What the figure shows, for screen readers.
    """
    for text in _texts_with_names(figure):
        text.set_parse_math(False)  # a "$" in a name would start a formula
    with warnings.catch_warnings():
        # Control characters of a name, which are spelled out below.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        return _drawn(figure, name, label)


def _drawn(figure: Figure, name: str, label: str) -> str:
    if _SHOWN.get() is not None:
        # Ticks are made when they are first drawn, in the style of that moment.
        figure.draw_without_rendering()
        return ""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", dpi=_DPI, metadata=no_metadata)
    svg = buffer.getvalue()
    # Control characters would make it invalid XML.
    svg = printable(svg[svg.index("<svg") :].rstrip(), keep="\n\t") + "\n"
    numbers: dict[str, str] = {}
    # Texts escape "<" and ">", so this matches only attributes.
    for old in re.findall(r'<[^<>]*?\sid="([^"]+)"', svg):
        numbers.setdefault(old, f"{name}-{len(numbers) + 1}")
    svg = re.sub(r'(<[^<>]*?\sid=")([^"]+)', lambda m: m[1] + numbers[m[2]], svg)
    svg = re.sub(r"(url\(#)([^)]+)", lambda m: m[1] + numbers[m[2]], svg)
    svg = re.sub(r'(href="#)([^"]+)', lambda m: m[1] + numbers[m[2]], svg)
    # matplotlib's only CSS rule would otherwise apply to the whole page.
    svg = svg.replace("*{stroke", f"#{name} *{{stroke")
    root = f'<svg id="{name}" role="img" aria-label="{html.escape(printable(label))}" '
    return svg.replace("<svg ", root, 1)
