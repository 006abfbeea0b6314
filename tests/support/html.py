"""Reading a page as a browser would: tags, nesting, texts, tables, figures."""

from __future__ import annotations

import re
from html.parser import HTMLParser

#: Elements that HTML never closes.
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects what a browser would: tags in order, nesting errors, texts and tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.misnested: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.misnested.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def ids(svg: str) -> list[str]:
    """Return every id, in order."""
    return [tag["id"] for _, tag in Page(svg).tags if tag.get("id")]


def svgs(page: str) -> list[str]:
    """Return the figures of a page."""
    return re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
