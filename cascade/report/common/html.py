"""Building blocks of HTML pages, which load nothing and run no script."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cascade.core.printable import printable
from cascade.report.common.svg import LIGHT, PALETTE

_CSS = """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { container-type: inline-size; max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 2rem 0 .5rem; font-size: 1.02rem; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
.kicker, .about, caption, figcaption, dt { color: var(--muted); }
.kicker { margin: 0 0 .25rem; font-size: .85rem; letter-spacing: .04em; }
.lead { margin: 1.25rem 0 1rem; padding-left: 1rem; border-left: 4px solid var(--mean);
  font-size: 1.1rem; }
.fail { border-color: var(--active); }
.pass { border-color: var(--rule5); }
.open { border-color: var(--muted); }
h1.fail { color: var(--active); }
h1.pass { color: var(--rule5); }
code { padding: .05em .3em; border-radius: 3px; background: var(--tint); font-size: .92em; }
summary { margin: 2rem 0 .5rem; font-weight: 600; cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem;
  max-width: 50rem; margin: 1.25rem 0 0; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figcaption, caption { font-size: .9rem; text-align: left; }
figcaption { max-width: 46rem; margin-top: .25rem; }
caption { padding-bottom: .5rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: 100cqi; }
.scroll { container-type: inline-size; overflow-x: auto; margin-bottom: 1.5rem; }
.scroll svg { display: block; width: 100%; min-width: 40rem; height: auto; }
.scroll svg text { font-family: inherit !important; }
table { min-width: min(22rem, 100cqi); border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; border-bottom: 1px solid var(--grid); text-align: right; }
th { font-weight: 600; }
.scroll th[scope=row] { position: sticky; left: 0; background: var(--paper); }
thead th { border-bottom-color: var(--muted); white-space: nowrap; }
td:not(.text) { white-space: nowrap; }
td.text, th.text { text-align: left; }
.scroll tr.active > * { background: var(--tint); }
tr.active td.text { color: var(--active); font-weight: 600; white-space: nowrap; }
tr.control > * { color: var(--muted); font-weight: 400; }
.provenance { width: 100%; min-width: 0; }
.provenance td { overflow-wrap: anywhere; }
.provenance .active > * { background: var(--tint); }
.provenance tr.active td.text { white-space: normal; }
.provenance tbody th { font-weight: 400; color: var(--muted); vertical-align: top; }
.provenance tbody th[scope=rowgroup] { padding-top: 1rem; color: var(--ink); font-weight: 600; }
@container (max-width: 58rem) {
  table { font-size: .82rem; }
  th, td { padding: .22rem .38rem; }
}
@container (max-width: 33.5rem) {
  dl { display: block; }
  dd { margin-bottom: .75rem; }
  .scroll table { width: max-content; }
  td.text { max-width: 18rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  .scroll svg { min-width: 0; }
  .scroll th[scope=row] { position: static; }
  table { font-size: .72rem; }
  th, td { padding: .15rem .3rem; }
  h2, h3, caption { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  tr.active > * { print-color-adjust: exact; }
}
"""

#: What pages that show a fragment set for elements, as the page of a report has it.
_RESET = """
h1, h2, h3 { color: inherit; font-weight: 700; letter-spacing: normal; }
dl, dt, dd, p, figcaption { font-style: normal; letter-spacing: normal; }
figure { display: block; width: auto; max-width: none; text-align: left; }
p, dd, dt { font-size: 1em; }
table { display: table; background: none; border: 0; border-radius: 0; overflow: visible; }
th, td { min-width: 0; border-top: 0; vertical-align: baseline; }
"""


def escaped(text: str) -> str:
    """Return plain text as HTML, with its control characters spelled out."""
    return html.escape(printable(text))


def inline(text: str) -> str:
    """Return plain text as HTML. Text between a pair of backticks becomes code."""
    parts = escaped(text).split("`")
    if len(parts) % 2 == 0:
        return "`".join(parts)
    parts[1::2] = [f"<code>{part}</code>" for part in parts[1::2]]
    return "".join(parts)


def html_document(title: str, sections: Iterable[str]) -> str:
    """Return one self-contained HTML page.

    Args:
        title: Plain text; escaped here.
        sections: The sections of the page, as HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escaped(title)}</title>
<style>{_theme()}{_CSS}</style>
</head>
<body>
<main>
{"".join(sections)}</main>
</body>
</html>
"""


def html_fragment(sections: Iterable[str]) -> str:
    """Return HTML that can be part of another page, such as a notebook.

    Its styles apply to itself alone, and win over those of the page. It is light or dark as
    JupyterLab, VS Code and Material for MkDocs say that they are, else as the reader's system is.
    On paper it is light.

    Args:
        sections: The fragment's parts, as HTML.
    """
    light, dark = (f".{_FRAGMENT} {{ {_colours(index)} }}" for index in (0, 1))
    themes = (
        f"\n{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n"
        f"{_within_hosts(_LIGHT_HOSTS, light)}\n"
        f"@media screen {{ {_within_hosts(_DARK_HOSTS, dark)} }}"
    )
    return (
        f'<div class="{_FRAGMENT}">\n<style>{themes}{_scoped(_RESET + _CSS)}</style>\n<main>\n'
        f"{''.join(sections)}</main>\n</div>\n"
    )


#: The class of a fragment.
_FRAGMENT = "cascade-report"

#: How pages that show notebooks say whether they are light or dark.
_LIGHT_HOSTS = (
    '[data-jp-theme-light="true"]',
    '[data-md-color-scheme="default"]',
    '[data-vscode-theme-kind="vscode-light"]',
)
_DARK_HOSTS = (
    '[data-jp-theme-light="false"]',
    '[data-md-color-scheme="slate"]',
    '[data-vscode-theme-kind="vscode-dark"]',
)


def _within_hosts(hosts: Iterable[str], rule: str) -> str:
    selector, body = rule.split(" ", 1)
    return f"{', '.join(f'{host} {selector}' for host in hosts)} {body}"


def _scoped(css: str) -> str:
    """Return rules that apply within a fragment alone."""

    def scoped(rule: re.Match[str]) -> str:
        # Four times the class: more specific than the rules that pages have for their tables.
        root = 4 * f".{_FRAGMENT}"
        selectors = [selector.strip() for selector in rule[2].split(",")]
        named = [root if name == "body" else f"{root} {name}" for name in selectors]
        return f"{rule[1]}{', '.join(named)} {{"

    # A page can have another root font size: that of Material for MkDocs is 20 to 27 px.
    css = re.sub(r"(\d*\.?\d+)rem\b", lambda size: f"{16 * float(size[1]):g}px", css)
    return re.sub(r"(\A\s*|[{}]\s*)([^{}@]+?)\s*\{", scoped, css)


def own_ids(svg: str) -> str:
    """Return a figure with ids that no other figure of a page has: they name its content.

    Args:
        svg: One `<svg>` element whose ids all begin with its own.

    Example:
        >>> own_ids('<svg id="map"><use href="#map-1"/></svg>')
        '<svg id="map-27796ff9"><use href="#map-27796ff9-1"/></svg>'
    """
    found = re.match(r'<svg [^>]*?\bid="([^"]+)"', svg)
    if found is None:
        return svg
    name = re.escape(found[1])
    digest = hashlib.sha256(svg.encode()).hexdigest()[:8]
    return re.sub(rf'(\bid="|#){name}(?=["\-) ])', rf"\1{found[1]}-{digest}", svg)


def _theme() -> str:
    return (
        f"\n:root {{ color-scheme: light dark; {_colours(0)} }}"
        f"\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {_colours(1)} }} }}"
    )


def _colours(index: int) -> str:
    return " ".join(f"--{name}: {colours[index]};" for name, colours in PALETTE.items())


def _themed(svg: str) -> str:
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def html_head(kicker: str, name: str, about: str, *, mark: str = "") -> str:
    """Return the header of a page; all arguments are plain text.

    Args:
        kicker: The kind of report.
        name: The model or the verdict.
        about: How the record was measured.
        mark: A CSS class for the name, which only sets its colour.
    """
    opening = f'<h1 class="{mark}">' if mark else "<h1>"
    return (
        f'<header>\n<p class="kicker">{escaped(kicker)}</p>\n{opening}{escaped(name)}</h1>'
        f'\n<p class="about">{inline(about)}</p>\n</header>\n'
    )


def html_pairs(pairs: Iterable[tuple[str, str]]) -> str:
    """Return labels and texts as a definition list; both are plain text."""
    items = "\n".join(f"<dt>{escaped(label)}</dt><dd>{inline(text)}</dd>" for label, text in pairs)
    return f"<dl>\n{items}\n</dl>\n"


def html_section(heading: str, body: str) -> str:
    """Return a section of a page: a plain heading and HTML."""
    return f"<section>\n<h2>{escaped(heading)}</h2>\n{body}</section>\n"


def html_figure(svg: str, caption: str) -> str:
    """Return a figure with a caption, whose colours follow the light or dark theme."""
    return (
        '<figure>\n<div class="scroll" tabindex="0" role="region" aria-label="figure">\n'
        f"{_themed(svg)}</div>\n"
        f"<figcaption>{inline(caption)}</figcaption>\n</figure>\n"
    )


def html_table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 0,
    active: Collection[str] = (),
    classes: Mapping[int, str] | None = None,
) -> str:
    """Return a table whose first column names the row and whose last `text_columns` hold text.

    Args:
        caption: What the table shows.
        header: The column names.
        rows: Rows of plain text, each with as many cells as the header.
        text_columns: The number of columns at the end that hold text.
        active: First cells of the rows to highlight. This only sets the colour; write it out too.
        classes: CSS classes of other rows by row number, from 0, with the same limitation.
    """
    first_text = len(header) - text_columns

    def cell(tag: str, attributes: str, index: int, text: str) -> str:
        aligned = ' class="text"' if index >= first_text else ""
        return f"<{tag}{attributes}{aligned}>{inline(text)}</{tag}>"

    head = "".join(cell("th", ' scope="col"', *pair) for pair in enumerate(header))
    body = ""
    for number, row in enumerate(rows):
        cells = [cell("th", ' scope="row"', 0, row[0])]
        cells += [cell("td", "", index, text) for index, text in enumerate(row[1:], start=1)]
        mark = "active" if row[0] in active else (classes or {}).get(number, "")
        body += (
            f'<tr class="{mark}">{"".join(cells)}</tr>\n'
            if mark
            else f"<tr>{''.join(cells)}</tr>\n"
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table">\n<table>\n'
        f"<caption><span>{inline(caption)}</span></caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def html_provenance(provenance: Mapping[str, Any]) -> str:
    """Return the section with the whole provenance of a record."""
    return html_section("Provenance", _provenance_table([provenance], ()))


def html_provenances(new: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    """Return two provenances as one collapsed table, with differing rows marked.

    Args:
        new: The provenance of the new measurement.
        old: The provenance of the baseline.
    """
    table = _provenance_table([new, old], ("measured", "baseline"))
    return f"<details>\n<summary>Provenance</summary>\n{table}</details>\n"


def _provenance_table(sides: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    groups = [dict(_groups("run", side)) for side in sides]
    bodies = []
    for name in dict.fromkeys(name for side in groups for name in side):
        found = [side.get(name, {}) for side in groups]
        lines = ""
        for key in dict.fromkeys(key for group in found for key in group):
            values = [_shown(group.get(key)) for group in found]
            mark = "" if len(set(values)) == 1 else ' class="active"'
            cells = "".join(f'<td class="text">{escaped(value)}</td>' for value in values)
            lines += (
                f'<tr{mark}><th scope="row" class="text">{escaped(_spaced(key))}</th>{cells}</tr>\n'
            )
        bodies.append(
            f'<tbody>\n<tr><th scope="rowgroup" colspan="{1 + len(sides)}" class="text">'
            f"{escaped(_spaced(name))}</th></tr>\n{lines}</tbody>\n"
        )
    caption = "Model, corpus, machine and versions of the measurement."
    head = ""
    if names:
        caption += " Shaded rows differ."
        columns = "".join(f'<th scope="col" class="text">{name}</th>' for name in ("", *names))
        head = f"<thead><tr>{columns}</tr></thead>\n"
    return (
        f'<table class="provenance">\n<caption>{caption}</caption>\n{head}{"".join(bodies)}'
        "</table>\n"
    )


def _groups(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the nested groups, then the values that belong to no group."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _groups(key if name == "run" else f"{name}: {key}", value)
    alone = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    if alone:
        yield name, alone


def _spaced(key: str) -> str:
    return key.replace("_", " ")


def _shown(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    # bool is a subclass of int, and True would be shown as 1.
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_number else str(value)
