"""A session as Markdown: the worst verdict first, below 100 kB, markup escaped."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from msgspec.structs import replace as changed
from support.build_comparisons import (
    BUDGET,
    KINDS,
    Record,
    a_full_session,
    a_session,
    clean,
    comparisons,
    foreign,
    moved,
    named,
)

from cascade.gate.records import MissingBaseline, session_record
from cascade.report.gate.markdown import report_markdown
from cascade.report.gate.wording import cell_row, worst_cells

PARSER = MarkdownIt("commonmark").enable("table").enable("strikethrough")


def tokens(markdown: str) -> list[Token]:
    return PARSER.parse(markdown)


def shown(inline: Token) -> str:
    """Return the visible text of a line."""
    return "".join(
        child.content if child.type != "softbreak" else " " for child in inline.children or ()
    )


def headings(markdown: str) -> list[str]:
    found = tokens(markdown)
    return [
        shown(found[place + 1]) for place, token in enumerate(found) if token.type == "heading_open"
    ]


def tables(markdown: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = []
    for before, token in zip(tokens(markdown), tokens(markdown)[1:], strict=False):
        if before.type == "table_open":
            found.append([])
        if before.type == "tr_open":
            found[-1].append([])
        if before.type in ("th_open", "td_open"):
            found[-1][-1].append(shown(token))
    return found


def everything(markdown: str) -> str:
    return "\n".join(shown(token) for token in tokens(markdown) if token.type == "inline")


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_is_the_first_line_and_tables_are_rectangular(kind: str) -> None:
    record = KINDS[kind]()
    text = report_markdown(a_session(record))
    assert text.startswith(f"# CASCADE: {record.verdict}\n")
    assert headings(text)[1] == f"{record.verdict}: tiny/words"
    found = tables(text)
    assert [len({len(row) for row in rows}) for rows in found] == [1] * len(found)
    if worst_cells(record):
        expected = [cell_row(record, cell) for cell in worst_cells(record)[:10]]
        assert found[-1][1:] == expected


def test_markdown_has_the_text_of_a_comparison() -> None:
    text = everything(report_markdown(a_session(moved())))
    for part in (
        "Likely cause: one layer: layer 2 is the first",
        "15 cells beyond tolerance; showing the worst 10.",
        "Measured: tiny (float32 on cpu)",
        "Baseline file: baselines/tiny/words.saturation.json",
    ):
        assert part in text
    text = everything(report_markdown(a_session(foreign())))
    assert "model.dtype: expected float32, got bfloat16; run with the baseline's --dtype" in text


def test_a_session_shows_missing_baselines_then_the_worst_verdicts() -> None:
    text = report_markdown(a_full_session())
    assert headings(text) == [
        "CASCADE: FAIL",
        "Missing, regenerated and unused baselines",
        "FAIL: tiny/words",
        "FAIL: budgets of tiny/texts",
        "NOT COMPARABLE: tiny/words",
        "NOT COMPARABLE: budgets of tiny/texts",
        "INCONCLUSIVE: tiny/words",
        "PASS: tiny/words",
        "PASS: budgets of tiny/texts",
    ]
    overview, *_ = tables(text)
    assert [row[0] for row in overview[1:]] == [
        *("FAIL", "FAIL", "NOT COMPARABLE", "NOT COMPARABLE", "INCONCLUSIVE", "PASS", "PASS")
    ]
    assert ["agreement", "at least 0.897", "0.5000", BUDGET.overruns[0].point] in [
        row for rows in tables(text) for row in rows
    ]
    # A bar in code is not escaped.
    assert "`cascade analyze --output a | tee b`" in text
    assert "Regenerated: baselines/b.json" in everything(text)
    assert "Unused: baselines/c.json" in everything(text)


NASTY = "a|b\\|c *d* <script>x</script> ![e](f) ~~g~~ `h` _i_ __k__ l_m # j"


def test_markup_in_a_record_is_escaped() -> None:
    record = changed(moved(), headline=NASTY, notes=[NASTY])
    text = report_markdown(session_record([named(record, NASTY)] * 2))
    overview, *_ = tables(text)
    plain = NASTY.replace("`h`", "h")  # text between backticks is code
    assert overview[1][1:] == [plain, plain]
    assert f"FAIL: {plain}" in headings(text)
    assert f"Note: {plain}" in everything(text)
    types = {child.type for token in tokens(text) for child in token.children or ()}
    assert types <= {"text", "code_inline", "strong_open", "strong_close", "softbreak"}
    (code,) = tables(report_markdown(session_record([named(clean(), "`x|y`")] * 2)))
    assert code[1][1] == "x|y"


def test_long_texts_are_cut() -> None:
    text = report_markdown(a_session(changed(moved(), notes=["long " * 1000, *["short"] * 50])))
    assert len(max(text.splitlines(), key=len)) < 700
    assert "long..." in text.replace("long ...", "long...")
    assert re.search(r"\n\.\.\. and 3\d more\n", text)


def test_omitted_sections_are_counted_and_failures_kept() -> None:
    many = [named(clean(), f"clean-{number}") for number in range(500)]
    text = report_markdown(session_record([*many, named(moved(), "broken")]))
    assert 50_000 < len(text.encode()) < 100_000
    assert headings(text)[1] == "FAIL: broken"
    kept = len(headings(text)) - 1
    assert f"... and {501 - kept} more sections in the HTML report." in text
    overview, *_ = tables(text)
    assert f"... and {501 - (len(overview) - 1)} more\n" in text


@settings(max_examples=20, deadline=None)
@given(
    record=comparisons(),
    count=st.integers(1, 60),
    name=st.text(max_size=300) | st.text("\U0001f600|*", min_size=300, max_size=300),
    overruns=st.integers(0, 500),
)
def test_markdown_stays_below_a_hundred_kilobytes(
    record: Record, count: int, name: str, overruns: int
) -> None:
    overrun = changed(BUDGET.overruns[0], point=name, command=name)
    budget = changed(BUDGET, name=name, overruns=[overrun] * overruns)
    parts: dict[str, Any] = {
        "budgets": [budget],
        "missing": [MissingBaseline(path=name, command=name)] * overruns,
        "unused": [name] * overruns,
    }
    text = report_markdown(session_record([named(record, name)] * count, **parts))
    assert len(text.encode()) < 100_000
    assert text.startswith("# CASCADE: FAIL\n")
    assert tables(text)[0][0] == ["verdict", "baseline", "outcome"]


def test_a_name_that_cannot_be_encoded_is_shown() -> None:
    text = report_markdown(session_record([named(clean(), "a\udcffb")]))
    assert "a?b" in text.encode().decode()
