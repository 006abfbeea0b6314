"""One self-contained HTML page of a profile: nothing is loaded, no script runs."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from cascade.report.figures import LIGHT, PALETTE, density_svg, layer_profile_svg
from cascade.report.reading import (
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
    check_profile(record)
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
        return " ".join(f"--{name}: {colours[index]};" for name, colours in PALETTE.items())

    return (
        f"\n:root {{ color-scheme: light dark; {variables(0)} }}"
        f"\n@media (prefers-color-scheme: dark) {{ :root {{ {variables(1)} }} }}"
    )


def _themed(svg: str) -> str:
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _page_head(record: Record) -> str:
    name = record["provenance"]["model"]["name"]
    about = " · ".join(text for _, text in headline(record)[1:])
    return (
        f'<header>\n<p class="kicker">CASCADE saturation profile</p>\n<h1>{html.escape(name)}</h1>'
        f'\n<p class="about">{html.escape(about)}</p>\n</header>\n'
    )


def _page_summary(record: Record) -> str:
    norm = final_norm(record)
    paragraphs = [f'<p class="lead">{html.escape(summary(record))}</p>']
    if norm is not None:
        paragraphs.append(f"<p>{html.escape(norm[0].upper() + norm[1:])}</p>")
    details = "\n".join(
        f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>"
        for label, text in findings(record)
        if label != "Final norm"
    )
    body = "\n".join(paragraphs)
    return f"<section>\n<h2>What was found</h2>\n{body}\n<dl>\n{details}\n</dl>\n</section>\n"


def _page_figures(record: Record, arrays: Arrays) -> str:
    apart = " The row behind the final norm stands apart: it is no decoder layer."
    profile = _page_figure(
        layer_profile_svg(record),
        "Similarity of each layer's input and output. The axis is uniform in angle, which spreads "
        f"the values near 1.{apart if any(map(is_normed, record['layers'])) else ''}",
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
        ("Layer", *STATISTICS, "role"),
        statistics_rows(record),
        text_columns=1,
        active=roles_of(record).keys(),
    )
    outliers = "<p>No token lies below 0.5 in any layer.</p>\n"
    if outlier_rows(record):
        outliers = _html_table(
            "Share of tokens below 0 and below 0.5, for the layers that have any. "
            "0.00% means none.",
            ("Layer", "below 0", "below 0.5"),
            outlier_rows(record),
        )
    return (
        f"<section>\n<h2>Statistics</h2>\n{statistics}</section>\n"
        f"<section>\n<h2>Outliers</h2>\n{outliers}</section>\n"
    )


def _page_thresholds(record: Record) -> str:
    rows = threshold_rows(record)
    body = "<p>none</p>\n"
    if rows:
        table = _html_table(
            "Thresholds by the wanted share of hard tokens.",
            ("hard ratio", "threshold", "meaning"),
            rows,
            text_columns=1,
        )
        body = f"<p>{html.escape(exit_rule(record))}</p>\n{table}"
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
