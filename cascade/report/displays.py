"""How results show themselves: the tables, figures and report of each kind of record.

`cascade.core.display.Displayed` finds this module by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import UsageError
from cascade.core.schema import StoredRecord, to_plain
from cascade.evaluation.records import EvaluationRecord
from cascade.evaluation.search.records import SearchRecord
from cascade.gate.records import ComparisonRecord
from cascade.report.common.records import Arrays
from cascade.report.common.sections import Report, Section, html_part
from cascade.report.common.svg import shown_figure
from cascade.saturation.records import ProfileRecord
from cascade.stages.records import CascadeEvaluationRecord
from cascade.studies.comparisons.corpus_records import CorpusComparison
from cascade.studies.comparisons.model_records import ModelComparison
from cascade.studies.explanations.records import FinalNormExplanation, LayerExplanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

#: Rows of a table: parts of records, or columns by name.
_Rows = Iterable[object]


@dataclass(frozen=True)
class Display:
    """What a result shows; the first table and the first figure are the main ones.

    Attributes:
        report: Makes the report with its figures.
        tables: Name -> rows.
        figures: Name -> draws the figure, with `new_figure` and `as_svg`.
    """

    report: Callable[[], Report]
    tables: Mapping[str, _Rows]
    figures: Mapping[str, Callable[[], object]]


def dataframe_of(record: StoredRecord, arrays: Arrays, name: str | None) -> DataFrame:
    """Return a table of a record.

    Args:
        record: The record.
        arrays: The arrays next to it, if there are any.
        name: Which table; None for the main one.

    Raises:
        UsageError: There is no such table, or pandas is not installed.
    """
    tables = display_of(record, arrays).tables
    rows = tables[_chosen("table", tables, name)]
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise UsageError(
            f"to_dataframe() needs pandas, which cannot be imported ({error}); run "
            "`pip install pandas`"
        ) from error
    return DataFrame([_columns(to_plain(row)) for row in rows])


def axes_of(record: StoredRecord, arrays: Arrays, name: str | None) -> Axes | Array:
    """Draw a figure of a record with pyplot, and return its axes.

    Args:
        record: The record.
        arrays: The arrays next to it, if there are any.
        name: Which figure; None for the main one.

    Raises:
        UsageError: There is no such figure, or nothing to draw in it.
    """
    figures = display_of(record, arrays).figures
    chosen = _chosen("figure", figures, name)
    figure = shown_figure(figures[chosen])
    if figure is None:
        raise UsageError(f"the record has nothing to draw as {chosen!r}; use to_dataframe()")
    axes = [panel for panel in figure.axes if panel.get_label() != "<colorbar>"]
    return axes[0] if len(axes) == 1 else np.array(axes, dtype=object)


def html_of(record: StoredRecord, arrays: Arrays) -> str:
    """Return the report of a record as HTML for a notebook.

    Args:
        record: The record.
        arrays: The arrays next to it, if there are any.
    """
    return html_part(display_of(record, arrays).report())


def _chosen(what: str, names: Iterable[str], name: str | None) -> str:
    known = list(names)
    if name in known:
        return str(name)
    if name is None and known:
        return known[0]
    if not known:
        raise UsageError(f"the record has no {what}; use to_dataframe()")
    raise UsageError(f"expected a {what} among {', '.join(known)}, got {name!r}")


def _columns(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the columns of a row: intervals as two columns, nested values by joined names."""
    columns: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if name.endswith("interval"):
            ends = (None, None) if value is None else value
            stem = name.removesuffix("interval")
            columns |= {f"{stem}low": ends[0], f"{stem}high": ends[1]}
        elif isinstance(value, Mapping):
            columns |= _columns(value, f"{name}_")
        else:
            columns[name] = value
    return columns


# --- What each kind of record shows ----------------------------------------------------------


@singledispatch
def display_of(record: StoredRecord, arrays: Arrays) -> Display:
    """Return what a record shows.

    Args:
        record: The record.
        arrays: The arrays next to it, if there are any.
    """
    raise TypeError(f"expected a record that shows itself, got {type(record).__name__}")


@display_of.register
def _(record: ProfileRecord, arrays: Arrays) -> Display:
    from cascade.report.saturation.figures import density_svg, layer_profile_svg
    from cascade.report.saturation.wording import profile_report

    figures: dict[str, Callable[[], str]] = {"layers": lambda: layer_profile_svg(record)}
    if arrays:
        figures["density"] = lambda: density_svg(record, arrays)

    def report() -> Report:
        drawn = (layer_profile_svg(record), density_svg(record, arrays)) if arrays else None
        return profile_report(record, drawn)

    thresholds = [
        {"exit_layer": record.thresholds.exit_layer, **to_plain(row)}
        for row in record.thresholds.by_hard_ratio
    ]
    return Display(report, {"layers": record.layers, "thresholds": thresholds}, figures)


@display_of.register
def _(record: EvaluationRecord, arrays: Arrays) -> Display:
    from cascade.report.exits.evaluation import evaluation_report
    from cascade.report.exits.pareto import pareto_svg

    return Display(
        lambda: evaluation_report(record),
        {"points": record.points, "auroc": record.auroc},
        {"pareto": lambda: pareto_svg(record)},
    )


@display_of.register
def _(record: SearchRecord, arrays: Arrays) -> Display:
    from cascade.report.exits.search import exit_search_report, frontier_svg

    return Display(
        lambda: exit_search_report(record),
        {"points": record.points},
        {"frontier": lambda: frontier_svg(record) if record.points else None},
    )


@display_of.register
def _(record: CascadeEvaluationRecord, arrays: Arrays) -> Display:
    from cascade.report.exits.cascades import cascade_report

    return Display(
        lambda: cascade_report(record),
        {"variants": record.rows, "comparisons": record.comparisons},
        {},
    )


@display_of.register
def _(record: ComparisonRecord, arrays: Arrays) -> Display:
    from cascade.report.gate.figures import profiles_svg
    from cascade.report.gate.sections import comparison_pictures, comparison_report

    def report() -> Report:
        whole = comparison_report(record)
        pictures = Section("", tuple(comparison_pictures(record, "1")))
        return replace(whole, sections=(*whole.sections, pictures))

    return Display(
        report,
        {"cells": record.cells, "profile": record.profile},
        {"profiles": lambda: profiles_svg(record, "profiles") if record.profile else None},
    )


@display_of.register
def _(record: CorpusComparison, arrays: Arrays) -> Display:
    from cascade.report.studies.corpora import corpora_report
    from cascade.report.studies.corpora_figures import (
        corpora_profiles_svg,
        corpora_thresholds_svg,
    )

    labels = [corpus.label for corpus in record.corpora]
    layers = [
        {"layer": row.layer, "corpus": label, **to_plain(mean)}
        for row in record.layers
        for label, mean in zip(labels, row.means, strict=True)
    ]
    differences = [
        {"corpus": found.corpus, "against": found.against, **to_plain(row)}
        for found in record.differences
        for row in found.rows
    ]
    return Display(
        lambda: corpora_report(record),
        {"layers": layers, "differences": differences, "thresholds": record.thresholds.rows},
        {
            "profiles": lambda: corpora_profiles_svg(record),
            "thresholds": lambda: corpora_thresholds_svg(record),
        },
    )


@display_of.register
def _(record: ModelComparison, arrays: Arrays) -> Display:
    from cascade.report.studies.model_figures import operations_svg, profiles_svg
    from cascade.report.studies.models import models_report

    layers = [
        {"model": model.label, **to_plain(row)}
        for model in record.measured()
        for row in model.layers
    ]
    models = [
        {
            "model": model.label,
            "name": model.name,
            "measured": model.measured,
            **to_plain(model.sizes),
            "exit_layer": None if model.exit is None else model.exit.layer,
        }
        for model in record.models
    ]
    changes = [
        {"model": pair.model, "against": pair.against, **to_plain(row)}
        for pair in record.pairs
        if pair.paired is not None
        for row in pair.paired.layers
    ]
    return Display(
        lambda: models_report(record),
        {"layers": layers, "models": models, "changes": changes},
        {
            "profiles": lambda: profiles_svg(record),
            "operations": lambda: operations_svg(record),
        },
    )


@display_of.register
def _(record: LayerExplanation, arrays: Arrays) -> Display:
    from cascade.report.studies import explanation_figures as figures
    from cascade.report.studies.explanation import explanation_report
    from cascade.report.studies.explanation_wording import closing_causes

    return Display(
        lambda: explanation_report(record),
        {
            "causes": record.causes,
            "layers": record.layers,
            "entries": record.entries,
            "classes": record.classes,
            "positions": record.positions,
            "ablations": record.ablations,
        },
        {
            "causes": lambda: figures.causes_svg(record) if closing_causes(record) else None,
            "depth": lambda: figures.depth_svg(record),
            "tokens": lambda: figures.tokens_svg(record),
            "ablations": lambda: figures.ablations_svg(record),
        },
    )


@display_of.register
def _(record: FinalNormExplanation, arrays: Arrays) -> Display:
    from cascade.report.studies.final_norm import final_norm_report, final_norm_svg

    return Display(
        lambda: final_norm_report(record),
        {
            "levelled": record.levelled,
            "similarities": record.similarities,
            "dimensions": record.dimensions,
        },
        {"levelled": lambda: final_norm_svg(record)},
    )
