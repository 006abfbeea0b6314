"""The report of an exit-layer search: choice, every layer and rule, certificate, frontier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from cascade.core.schema import UnsetType, to_plain
from cascade.evaluation.search.records import SearchedPoint, SearchRecord, VariantResult
from cascade.report.common.exit_wording import (
    between,
    corpus_words,
    few_pairs,
    full_model_words,
    head_words,
    heads_pairs,
    propagation_words,
    ratio,
    share,
    show_threshold,
)
from cascade.report.common.records import check_record, headline
from cascade.report.common.sections import Block, Lead, Pairs, Picture, Report, Section, table_of
from cascade.report.common.svg import LIGHT, as_svg, new_figure, plain_style, title_of
from cascade.report.exits.pareto import RULE_STYLES, front_of, name_curve, ring, shade_cheaper

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRONTIER = "exit-search-frontier.svg"

#: Outcome of an operating point -> its text in the column.
_KEPT = {"significant": "sure", "kept": "yes", "lost": "no"}
_MARK = " *"
#: Beyond this many curves their labels would cover each other.
_MAX_LABELS = 16


def exit_search_report(record: SearchRecord) -> Report:
    """Return the report of a search for an exit layer.

    Args:
        record: A search.

    Raises:
        ValueError: The record contains NaN or has another schema.
    """
    verdict = record.verdict
    check_record(record)
    model, _, run = headline(record)
    return Report(
        kicker="CASCADE search for an exit layer",
        title=model[1],
        about=f"Target agreement {share(record.settings.agreement)}; {run[1]}",
        sections=(
            Section(
                "",
                (
                    Lead(verdict.headline, "pass" if verdict.exit else "open"),
                    *verdict.also,
                ),
            ),
            Section("What was measured", (Pairs(tuple(_measured(record))),)),
            Section("Every layer and rule", tuple(_tables(record))),
            Section("Certificate", (_certificate(record),)),
            Section("Frontier", tuple(_pictures(record))),
            Section("Notes", (Pairs(tuple(_notes(record))),)),
        ),
        provenance=to_plain(record.provenance),
    )


def _measured(record: SearchRecord) -> list[tuple[str, str]]:
    provenance, fitted_on = record.provenance, record.provenance.fitted_on
    pairs = [
        *([] if isinstance(fitted_on, UnsetType) else [("Fitted on", corpus_words(fitted_on))]),
        ("Confirmed on", corpus_words(provenance.corpus)),
        *heads_pairs(record.provenance),
        ("Full model", full_model_words(record.full)),
        *few_pairs(provenance.corpus),
    ]
    pairs += [("From the record", source.words) for source in record.sources]
    because = record.settings.computes_every_token_because
    if because is not None:
        pairs.append(("No skipping", f"every layer computed every token here: {because}"))
    return pairs


# --- The tables ------------------------------------------------------------------------------

_HEADER = ("layer", "exits", "fit", "agree", "interval", "FLOPs", "time", "risk", "kept", "rule")


def _tables(record: SearchRecord) -> Iterator[Block]:
    """Yield one table per head and propagation, then the layers and rules that exit no token."""

    def key(pair: VariantResult) -> tuple[int, str, str]:
        return pair.source, pair.head, pair.propagation

    pairs = sorted(record.pairs, key=lambda pair: (key(pair), pair.exit_layer, pair.rule))
    for (_, head, propagation), group in groupby(pairs, key=key):
        rows = [row for pair in group for row in _rows(record, pair)]
        if rows:
            yield table_of(
                f"Head {head_words(head)}. Propagation {propagation_words(propagation)}. For "
                "every layer and rule: the lowest fitted threshold and, if different, the lowest "
                "that kept the agreement and the lowest that kept it significantly.",
                _HEADER,
                rows,
                text_columns=2,
            )
    for row in record.nothing:
        yield (f"Layer {row.exit_layer}, {row.rule} ({row.head}, {row.propagation}): {row.why}.")


def _rows(record: SearchRecord, pair: VariantResult) -> list[list[str]]:
    numbers = (pair.fitted, pair.kept, pair.beyond_doubt)
    shown = dict.fromkeys(number for number in numbers if number is not None)
    return [_cells(record.points[number], number == record.best) for number in shown]


def _cells(row: SearchedPoint, best: bool) -> list[str]:
    on_table = row.only_on_table
    return [
        str(row.exit_layer),
        share(row.exit_share),
        share(row.fit_agreement),
        share(row.agreement),
        between(row.agreement_interval, lambda value: f"{100 * value:.1f}", "-"),
        ratio(row.flops_ratio),
        ratio(row.seconds_ratio, 2),
        share(row.risk_bound),
        f"{_KEPT[row.outcome]}{'?' if on_table else ''}",
        f"{row.rule} {show_threshold(row.threshold, 4)}{_MARK if best else ''}",
    ]


def _certificate(record: SearchRecord) -> str:
    found, settings = record.certificate, record.settings
    if settings.risk is None:
        return "Nothing to certify: no risk is given, and the target agreement leaves none."
    risk, sure = share(settings.risk), f"{settings.confidence:g}"
    if not found.tested:
        return f"No measured threshold could be certified for a risk of {risk}."
    tested = (
        f"{found.tested} thresholds, chosen on other sequences, were tested on "
        f"{found.sequences:,} sequences for a risk of {risk}, at a joint confidence of {sure}"
    )
    if found.best is not None:
        row = record.points[found.best]
        return (
            f"{tested}. Certified: {len(found.certified)}; the cheapest of them is layer "
            f"{row.exit_layer}, {row.rule} >= {show_threshold(row.threshold, 4)} "
            f"({share(1 - row.agreement)} of these tokens differed, "
            f"{ratio(row.flops_ratio)} x the operations)."
        )
    if found.sequences_needed is not None and found.sequences < found.sequences_needed:
        return (
            f"{tested}. None can be certified: even without any loss, this needs "
            f"{found.sequences_needed:,} sequences. Use a larger corpus or a larger --risk."
        )
    return f"{tested}. None is certified: too many tokens differed at each threshold."


# --- The picture -----------------------------------------------------------------------------


def _pictures(record: SearchRecord) -> Iterator[Block]:
    if not record.points:
        yield "There is nothing to draw: at no layer and rule does any token exit."
        return
    yield Picture(
        FRONTIER,
        frontier_svg(record),
        "Agreement against cost; upper left is better. Each line is one rule at one exit layer "
        "(the number) over its thresholds. Hollow marks were not measured but estimated from the "
        "exit table. The line without marks is the frontier: no other operating point "
        "is better in both agreement and cost. The full model is at the right.",
    )


def frontier_svg(record: SearchRecord) -> str:
    """Draw agreement against operations and time, point by point, with the frontier.

    Args:
        record: A search with at least one point.

    Returns:
        One `<svg>` element, which is identical for equal records.
    """
    with plain_style():
        figure = new_figure((10, 5.4))
        left, right = figure.subplots(1, 2, sharey=True)
        title = title_of(record, "agreement against cost")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
        for axes, cost, name in (
            (left, _operations, "operations / the full model's"),
            (right, _time, "time / the full model's"),
        ):
            _draw_panel(axes, record, cost)
            axes.set_xlabel(name)
        left.set_ylabel("agreement with the full model")
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4)
        return as_svg(figure, "exit-search-frontier", _label(record))


#: The cost of an operating point; None if unknown.
_Cost = Callable[[SearchedPoint], float | None]
#: An operating point and its position.
_Placed = tuple[SearchedPoint, tuple[float, float]]


def _operations(point: SearchedPoint) -> float | None:
    return point.flops_ratio


def _time(point: SearchedPoint) -> float | None:
    return point.seconds_ratio


def _priced(points: Sequence[SearchedPoint], cost: _Cost) -> list[_Placed]:
    """Return the operating points with a known cost, each with cost and agreement."""
    prices = ((point, cost(point)) for point in points)
    return [(point, (price, point.agreement)) for point, price in prices if price is not None]


def _draw_panel(axes: Axes, record: SearchRecord, cost: _Cost) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.grid(linewidth=0.8)
    axes.margins(0.08)
    axes.axvline(1, color=LIGHT["muted"], linewidth=0.9, zorder=1)
    rows = _priced(record.points, cost)
    _draw_curves(axes, rows)
    run = [place for point, place in rows if not point.only_on_table]
    front = front_of([(1.0, 0.0), *((price, 1 - agreement) for price, agreement in run)])
    axes.plot(
        [place for place, _ in front],
        [1 - loss for _, loss in front],
        color=LIGHT["ink"],
        linewidth=1.1,
        zorder=2,
        label="frontier: none is better in both",
    )
    axes.plot(
        [1.0],
        [1.0],
        color=LIGHT["ink"],
        marker="o",
        markersize=9,
        markerfacecolor=LIGHT["paper"],
        markeredgewidth=2,
        linestyle="none",
        zorder=5,
        label="full model",
    )
    _ring(axes, record, cost)
    _draw_wanted(axes, record.settings.agreement)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))


def _draw_curves(axes: Axes, rows: Sequence[_Placed]) -> None:
    def key(row: _Placed) -> tuple[int, str, str, str, int]:
        point = row[0]
        return point.source, point.head, point.propagation, point.rule, point.exit_layer

    ordered = sorted(rows, key=lambda row: (*key(row), row[0].threshold))
    groups = [(pair, list(group)) for pair, group in groupby(ordered, key=key)]
    several = len({pair[:3] for pair, _ in groups}) > 1
    sources = sorted({pair[0] for pair, _ in groups})
    named: set[str] = set()
    for number, ((source, head, _, rule, layer), points) in enumerate(groups):
        colour, marker = RULE_STYLES.get(rule, RULE_STYLES[""])
        name = f"{rule}, {head}" if several else rule
        places = [place for _, place in points]
        axes.plot(
            *zip(*places, strict=True),
            color=LIGHT[colour],
            linewidth=0.8,
            linestyle="-" if source == sources[0] else (0, (4, 2)),
            zorder=3,
        )
        for point, (price, agreement) in points:
            hollow = point.only_on_table
            axes.plot(
                [price],
                [agreement],
                color=LIGHT[colour],
                linestyle="none",
                marker=marker,
                markersize=5,
                markerfacecolor=LIGHT["paper" if hollow else colour],
                zorder=3,
                label="_" if name in named else name,
            )
            named.add(name)
        if len(groups) <= _MAX_LABELS:
            name_curve(axes, layer, places[0], number, LIGHT[colour])


def _ring(axes: Axes, record: SearchRecord, cost: _Cost) -> None:
    best = record.best
    number = record.nearest if best is None else best
    if number is None:
        return
    name = "nearest to the target agreement" if best is None else "cheapest that reaches it"
    for _, place in _priced([record.points[number]], cost):
        ring(axes, place, name)


def _draw_wanted(axes: Axes, agreement: float) -> None:
    """Draw the target agreement, and shade the region that reaches it and is cheaper."""
    axes.axhline(agreement, color=LIGHT["active"], linewidth=1, zorder=1, label="target agreement")
    shade_cheaper(axes, (agreement, None), "target: reached, and cheaper")


def _label(record: SearchRecord) -> str:
    rules = ", ".join(dict.fromkeys(row.rule for row in record.points))
    return (
        "Two scatter plots: agreement with the full model against operations and time relative to "
        f"the full model. Rules: {rules}. {record.verdict.headline}"
    )


# --- Notes -----------------------------------------------------------------------------------


def _notes(record: SearchRecord) -> list[tuple[str, str]]:
    settings, certificate = record.settings, record.certificate
    notes = [
        (
            "exits",
            "share of the confirmation tokens that exit; the others continue to the last layer",
        ),
        (
            "fit",
            "agreement with the full model on the fitting tokens; a dash means not recorded, but "
            "at least the target",
        ),
        ("agree", "agreement on the confirmation tokens, which were not used for fitting"),
        ("interval", f"of agree, in %; {settings.interval}"),
        ("FLOPs, time", f"relative to the full model; {settings.seconds}"),
        (
            "risk",
            "with confidence "
            f"{settings.confidence:g}, at most this share of tokens is predicted differently from "
            "the full model on sequences like these, jointly for all thresholds (Hoeffding's "
            f"bound, the error divided equally among the {certificate.tested} thresholds)",
        ),
        (
            "kept",
            "yes: the agreement on the confirmation tokens reaches the target; sure: so does its "
            "whole interval; no: it does not. A question mark means not measured but estimated "
            "from the exit table, which counts every token that continues as agreeing",
        ),
        (
            "not checked",
            "whether exiting at random would do as well; cascade evaluate checks an operating "
            "point against that control",
        ),
    ]
    if record.best is not None:
        notes.append(("*", "the cheapest operating point that reaches the agreement"))
    return notes
