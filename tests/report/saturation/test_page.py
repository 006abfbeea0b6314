"""The page of a profile: well formed, escaped, with every number of the record."""

from __future__ import annotations

import re
from typing import Any

from support.build_profile_records import STATISTICS, a_full_record, full_page, page_of, some_arrays
from support.html import Page, ids, svgs


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    record = a_full_record()
    record["provenance"]["corpus"]["source"] = "https://example.org/corpus"
    page = page_of(record, some_arrays(record))
    references = [
        str(value)
        for _, tag in Page(page).tags
        for name, value in tag.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "rdf:resource")
    ]
    assert any(reference.startswith("data:") for reference in references)
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert not {tag for tag, _ in Page(page).tags} & {"script", "link", "iframe", "img", "a"}
    assert not re.findall(r"@import|url\((?!#)|<!DOCTYPE svg", page)


def test_the_page_is_well_formed_with_unique_ids() -> None:
    page = full_page()
    parsed = Page(page)
    assert parsed.misnested == []
    assert parsed.open == []
    assert len(ids(page)) == len(set(ids(page)))
    assert len(svgs(page)) == 2
    assert not set(ids(svgs(page)[0])) & set(ids(svgs(page)[1]))


def test_all_texts_of_a_record_are_escaped() -> None:
    nasty = "<script>alert('x')</script>\"&amp;<b>"
    record = a_full_record()

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()}
        return nasty if isinstance(value, str) or value is None else value

    record["provenance"] = poison(record["provenance"])
    record["provenance"]["versions"][nasty] = "1"
    record["structure"]["rule"] = record["structure"]["source"] = nasty
    page = page_of(record, some_arrays(record))
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "b"}
    assert parsed.misnested == []
    # Shown as it is, in heading, table and definition list, not swallowed.
    assert parsed.texts.count(nasty) >= 15


def test_the_page_shows_the_records_numbers() -> None:
    record = a_full_record()
    rows = Page(full_page()).rows
    for row in record["layers"]:
        expected = [row["layer"], *(f"{row[name]:.4f}" for name in STATISTICS)]
        assert [cells[:8] for cells in rows].count(expected) == 1
    assert ["12", "<0.01%", "0.78%"] in rows
    assert ["30%", "0.944312", "30% continue, 70% exit"] in rows


def test_the_page_begins_with_the_findings() -> None:
    text = " ".join("".join(Page(full_page()).texts).split())
    found = text.index(
        "Hidden states are saturated in layers 3 to 24 and 26 to 29, where every layer's mean "
        "similarity is at least 0.9146. Active layers: input transform in 1 and 2; dip in 25; "
        "output transform in 30 and 30+norm."
    )
    norm = text.index(
        "layer 30 itself has a mean similarity of 0.7101; after the final norm "
        "(row 30+norm) it is 0.0800. The difference comes from the norm, not from the layer."
    )
    assert found < norm < text.index("Similarity of each layer's input and output")


def test_every_entry_of_the_provenance_is_on_the_page() -> None:
    rows = Page(full_page()).rows
    for row in (
        ["weights hash", "sha256:11aa"],
        ["revision", "not recorded"],
        ["tokenizer hash", "sha256:22bb"],
        ["tokens", "1,000"],
        ["threads", "2"],
        ["torch", "2.13.0"],
        ["command", "cascade analyze tiny"],
    ):
        assert row in rows


def test_tables_have_captions_and_scopes_and_figures_have_labels() -> None:
    tags = Page(full_page()).tags
    names = [name for name, _ in tags]
    assert names.count("table") == names.count("caption") == 4
    assert names.count("figure") == names.count("figcaption") == 2
    assert names.count("h1") == 1
    assert {str(tag.get("scope")) for name, tag in tags if name == "th"} == {
        "col",
        "row",
        "rowgroup",
    }
    assert all(tag.get("aria-label") for name, tag in tags if name == "svg")


def test_colours_follow_the_light_or_dark_theme() -> None:
    page = full_page()
    assert "@media screen and (prefers-color-scheme: dark)" in page  # paper is light
    used = set(re.findall(r"var\((--[a-z]+)\)", page))
    root = re.findall(r":root \{(.*?)\}", page)
    assert len(root) == 2
    for variables in root:
        assert used <= set(re.findall(r"(--[a-z]+):", variables))
    # A colour written out in a drawing would stay light in the dark.
    assert not any(re.search(r"#[0-9a-f]{6}\b", svg) for svg in svgs(page))
