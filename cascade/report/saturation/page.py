"""One self-contained HTML page of a profile: nothing is loaded, no script runs."""

from __future__ import annotations

import html

from cascade.report.common.html import (
    html_document,
    html_figure,
    html_head,
    html_pairs,
    html_provenance,
    html_section,
    html_table,
)
from cascade.report.common.records import (
    STATISTICS,
    Arrays,
    Record,
    check_profile,
    exit_rule,
    final_norm,
    findings,
    headline,
    is_normed,
    outlier_rows,
    roles_of,
    statistics_rows,
    summary,
    threshold_rows,
)
from cascade.report.saturation.figures import density_svg, layer_profile_svg


def profile_page(record: Record, arrays: Arrays, *, pictures: tuple[str, str] | None = None) -> str:
    """Return one self-contained HTML page of a profile: nothing is loaded, no script runs.

    Args:
        record: A saved record of kind `saturation`.
        arrays: Its arrays, as for `density_svg`.
        pictures: What `layer_profile_svg` and `density_svg` draw of them, where that is known.

    Raises:
        ValueError: The record is of another kind or schema, or the arrays do not belong to it.
    """
    check_profile(record)
    sections = [
        _page_head(record),
        _page_summary(record),
        _page_figures(pictures or (layer_profile_svg(record), density_svg(record, arrays)), record),
        _page_statistics(record),
        _page_thresholds(record),
        html_provenance(record["provenance"]),
    ]
    return html_document(f"Saturation of {record['provenance']['model']['name']}", sections)


def _page_head(record: Record) -> str:
    name = record["provenance"]["model"]["name"]
    about = " · ".join(text for _, text in headline(record)[1:])
    return html_head("CASCADE saturation profile", name, about)


def _page_summary(record: Record) -> str:
    norm = final_norm(record)
    paragraphs = [f'<p class="lead">{html.escape(summary(record))}</p>']
    if norm is not None:
        paragraphs.append(f"<p>{html.escape(norm[0].upper() + norm[1:])}</p>")
    details = html_pairs(pair for pair in findings(record) if pair[0] != "Final norm")
    return html_section("What was found", "\n".join([*paragraphs, details]))


def _page_figures(pictures: tuple[str, str], record: Record) -> str:
    apart = " The row behind the final norm stands apart: it is no decoder layer."
    profile = html_figure(
        pictures[0],
        "Similarity of each layer's input and output. The axis is uniform in angle, which spreads "
        f"the values near 1.{apart if any(map(is_normed, record['layers'])) else ''}",
    )
    density = html_figure(
        pictures[1],
        "Where the tokens lie: each column is one layer, each cell the share of its tokens at that "
        "similarity, on a logarithmic colour scale. Dark cells hold no token at all.",
    )
    return html_section("Similarity per layer", profile + density)


def _page_statistics(record: Record) -> str:
    statistics = html_table(
        "Similarity per layer: statistics over all tokens. Shaded rows are active layers.",
        ("Layer", *STATISTICS, "role"),
        statistics_rows(record),
        text_columns=1,
        active=roles_of(record).keys(),
    )
    outliers = "<p>No token lies below 0.5 in any layer.</p>\n"
    if outlier_rows(record):
        outliers = html_table(
            "Share of tokens below 0 and below 0.5, for the layers that have any. "
            "0.00% means none.",
            ("Layer", "below 0", "below 0.5"),
            outlier_rows(record),
        )
    return html_section("Statistics", statistics) + html_section("Outliers", outliers)


def _page_thresholds(record: Record) -> str:
    rows = threshold_rows(record)
    body = "<p>none</p>\n"
    if rows:
        table = html_table(
            "Thresholds by the wanted share of hard tokens.",
            ("hard ratio", "threshold", "meaning"),
            rows,
            text_columns=1,
        )
        body = f"<p>{html.escape(exit_rule(record))}</p>\n{table}"
    return html_section("Suggested thresholds", body)
