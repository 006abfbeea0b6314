"""Reports in sections: the same content in the terminal, as HTML page and as Markdown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from support.html import VOID, Page

from cascade.report.common.sections import (
    Bars,
    Lead,
    Pairs,
    Picture,
    Report,
    Section,
    Table,
    html_page,
    markdown,
    print_sections,
    table_of,
)

SVG = '<svg id="dots" role="img" aria-label="Dots."><title>x</title></svg>'


def a_report() -> Report:
    table = table_of(
        "Shares per class.", ("class", "share", "words"), [["a|b", "0.5", "x*y"]], text_columns=1
    )
    return Report(
        kicker="CASCADE test",
        title="tiny_model <1>",
        about="4 tokens, float32",
        sections=(
            Section("", (Lead("All is [well].", "pass"),)),
            Section("What was found", ("A plain sentence.", Pairs((("Layer", "25"),)), table)),
            Section("Only a picture", (Picture("dots.svg", SVG, "Some dots."),)),
            Section("Nothing", ()),
        ),
        provenance={"model": {"name": "tiny"}},
    )


def printed(width: int = 80, report: Report | None = None) -> str:
    stream = io.StringIO()
    print_sections(report or a_report(), Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def test_the_terminal_omits_pictures() -> None:
    text = printed()
    for part in ("tiny_model <1>", "All is [well].", "A plain sentence.", "a|b", "x*y", "25"):
        assert part in text
    assert "Only a picture" not in text
    assert "Nothing" not in text


def test_the_page_is_well_formed_with_pictures_and_provenance() -> None:
    text = html_page(a_report())
    page = Page(text)
    assert not page.misnested
    assert not [tag for tag in page.open if tag not in VOID]
    assert SVG.replace("Dots.", "Dots.") in text
    assert ["a|b", "0.5", "x*y"] in page.rows
    assert "Provenance" in text
    assert "Nothing" not in text
    assert "tiny_model &lt;1&gt;" in text


def test_markdown_escapes_markup() -> None:
    text = markdown(a_report(), level=2, pictures="findings")
    assert "## tiny\\_model &lt;1&gt;" in text
    assert "### What was found" in text
    assert "| a\\|b | 0.5 | x\\*y |" in text
    assert "| ---: | ---: | :--- |" in text
    assert "![Some dots.](findings/dots.svg)" in text
    assert "Nothing" not in text


def test_only_the_terminal_shows_bars() -> None:
    bars = Bars((("1", 0.5, ""), ("2", -0.25, "a dip")))
    report = Report("k", "t", "a", (Section("Mean", (bars,)), Section("More", ("x",))), {})
    text = printed(report=report)
    assert "Mean\n    1  0.5000 " in text
    assert "(a dip)" in text
    for shown in (html_page(report), markdown(report)):
        assert "Mean" not in shown
        assert "a dip" not in shown


def test_labels_replace_the_title_in_the_terminal() -> None:
    labels = (("Model", "tiny_model <1> (llama)"), ("Run", "float32"))
    report = Report("k", "tiny_model <1>", "float32 · 4 tokens", (), {}, labels)
    assert printed(report=report) == "Model  tiny_model <1> (llama)\nRun    float32\n"
    assert "float32 · 4 tokens" in html_page(report)


def test_the_terminal_omits_a_page_caption() -> None:
    table = Table("Shares per class.", ("class", "share"), (("a", "0.5"),), page_caption=True)
    report = Report("k", "t", "a", (Section("Shares", (table,)),), {})
    assert "Shares per class." not in printed(report=report)
    assert "Shares per class." in html_page(report)


@pytest.mark.parametrize("start", ["#", "+", "-"])
def test_a_paragraph_does_not_become_a_heading_or_list(start: str) -> None:
    report = Report("k", "t", "a", (Section("", (f"{start} no heading,\nno list",)),), {})
    assert f"\\{start} no heading, no list" in markdown(report)


def test_a_report_lists_its_pictures() -> None:
    assert [picture.file for picture in a_report().pictures()] == ["dots.svg"]


def test_commands_are_code_and_a_single_backtick_is_escaped() -> None:
    report = Report("k", "t", "a", (Section("", ("`cascade --a_b *`, not a_b", "a ` b_c")),), {})
    text = markdown(report)
    assert "`cascade --a_b *`, not a\\_b" in text
    assert "a \\` b\\_c" in text
