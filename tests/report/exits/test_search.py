"""The report of an exit-layer search: choice, every layer and rule, frontier."""

from __future__ import annotations

import io
from typing import Any

import pytest
from msgspec import structs
from rich.console import Console
from support.build_points import a_point, no_threshold
from support.build_searches import a_search_origin, renamed_model
from support.html import Page

from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.evaluation.search.choice import SearchConfig, search_record
from cascade.evaluation.search.records import NoThreshold, SearchRecord, SearchSource, TriedPoint
from cascade.report.common.sections import html_page, print_sections
from cascade.report.exits.search import FRONTIER, exit_search_report, frontier_svg

POINTS = (
    a_point(24, 0.93, 0.94, threshold=0.9662),
    a_point(24, 0.955, 0.95, threshold=0.9701),
    a_point(24, 0.97, 0.97, threshold=0.9755),
    a_point(28, 0.962, 1.08, rule="max_probability", threshold=0.2292),
)


def a_record(
    *points: TriedPoint,
    left_out: tuple[NoThreshold, ...] = (),
    sequences: int = 32,
    **changes: Any,
) -> SearchRecord:
    config = SearchConfig(**changes)
    return search_record(a_search_origin(config, sequences=sequences), points, left_out, config)


def a_source(name: str, propagation: str) -> SearchSource:
    return SearchSource(
        name=name,
        command=None,
        heads_fingerprint=None,
        propagation=propagation,
        words=f"{name}: {propagation}",
    )


def printed(record: SearchRecord, width: int = 80) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    print_sections(exit_search_report(record), console)
    return stream.getvalue()


def plain(text: str) -> str:
    return " ".join(text.split())


def test_the_choice_comes_first() -> None:
    text = plain(printed(a_record(*POINTS)))
    head, _, _ = text.partition("What was measured")
    assert (
        "Exit at layer 24, cosine >= 0.9701 with the ridge head. It predicts 95.5 % of all tokens"
        in head
    )
    assert "whole interval keeps it is layer 24, cosine >= 0.9755" in head


def test_every_layer_and_rule_shows_its_lowest_thresholds() -> None:
    lines = printed(a_record(*POINTS)).splitlines()
    rows = [line.split() for line in lines if line.startswith(("   24", "   28"))]
    assert [" ".join(row) for row in rows] == [
        "24 30.0% 95.1% 93.0% 92.0-94.0 0.940 0.94 33.2% no cosine 0.9662",
        "24 30.0% 95.1% 95.5% 94.5-96.5 0.950 0.95 30.7% yes cosine 0.9701 *",
        "24 30.0% 95.1% 97.0% 96.0-98.0 0.970 0.97 29.2% sure cosine 0.9755",
        "28 30.0% 95.1% 96.2% 95.2-97.2 1.080 1.08 30.0% sure max_probability 0.2292",
    ]
    assert max(map(len, lines)) <= 80


def test_unmeasured_points_have_a_question_mark_and_no_certificate() -> None:
    table = a_point(20, 0.99, 0.5, confirmed_by="table")
    text = printed(a_record(table, *POINTS))
    (row,) = [line for line in text.splitlines() if line.startswith("   20")]
    assert row.split()[-4:] == ["-", "sure?", "cosine", "0.9000"]
    assert "By the table, layer 20" in plain(text)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            a_record(*POINTS),
            "None can be certified: even without any loss, this needs 877 sequences.",
        ),
        (a_record(*POINTS, sequences=1000), "None is certified: too many tokens differed at each"),
        (
            a_record(*POINTS, sequences=1000, risk=0.1),
            "for a risk of 10.0%, at a joint confidence of 0.95. Certified: 3; the cheapest of "
            "them is layer 24, cosine >= 0.9701",
        ),
        (a_record(*POINTS, agreement=1.0), "the target agreement leaves none"),
        (
            a_record(a_point(20, 0.99, 0.5, confirmed_by="table")),
            "No measured threshold could be certified for a risk of 5.0%.",
        ),
    ],
)
def test_the_certificate_is_explained_in_words(record: SearchRecord, words: str) -> None:
    assert words in plain(printed(record))


def test_a_layer_and_rule_without_a_threshold_is_named_with_its_reason() -> None:
    record = a_record(*POINTS, left_out=(no_threshold(why="no threshold keeps it"),))
    text = plain(printed(record))
    assert "Layer 12, cosine (ridge, ridge): no threshold keeps it." in text
    assert ">12<" not in frontier_svg(record)


def test_without_any_point_there_is_no_picture() -> None:
    record = a_record(left_out=(no_threshold(), no_threshold(rule="top2_gap")))
    report = exit_search_report(record)
    assert report.pictures() == ()
    text = plain(printed(record))
    assert "There is nothing to draw" in text
    assert "No early exit keeps 95.0 % agreement" in text


def test_the_picture_has_a_legend_and_is_reproducible() -> None:
    record = a_record(a_point(20, 0.99, 0.5, confirmed_by="table"), *POINTS)
    (picture,) = exit_search_report(record).pictures()
    assert picture.file == FRONTIER
    for words in ("target agreement", "full model", "frontier", "cheapest that reaches it"):
        assert words in picture.svg
    for layer in (">20<", ">24<", ">28<"):
        assert layer in picture.svg
    assert picture.svg == frontier_svg(record)  # the same bytes every time
    assert "nearest to the target agreement" in frontier_svg(a_record(POINTS[0]))


def test_a_point_without_a_cost_is_in_the_table_and_not_in_the_picture() -> None:
    record = a_record(a_point(20, 0.99, None, confirmed_by="table"))
    (row,) = [line for line in printed(record).splitlines() if line.startswith("   20")]
    assert row.split()[5:8] == ["-", "-", "-"]
    assert "an unknown cost" in plain(printed(record))
    assert ">20<" not in frontier_svg(record)


def test_each_head_has_its_own_table_and_name_in_the_picture() -> None:
    other = structs.replace(POINTS[1], head="logit_lens", propagation="frozen", source=1)
    sources = [a_source("one", "ridge"), a_source("two", "frozen")]
    record = structs.replace(a_record(*POINTS, other), sources=sources)
    text = plain(printed(record))
    assert text.index("Head ridge:") < text.index("Head logit lens:")
    assert "From the record one: ridge" in text
    assert "cosine, logit_lens" in frontier_svg(record)


def test_the_page_is_self_contained() -> None:
    record = renamed_model(a_record(*POINTS), "<tiny> $x$")
    text = html_page(exit_search_report(record))
    page = Page(text)
    assert not page.misnested
    assert "<script" not in text
    assert "&lt;tiny&gt;" in text
    assert "Provenance" in text


@pytest.mark.parametrize("section", ["points", "certificate", "verdict"])
def test_an_incomplete_search_is_refused(section: str) -> None:
    plain = to_plain(a_record(*POINTS))
    del plain[section]
    with pytest.raises(SchemaError, match=section):
        from_plain(plain, SearchRecord)


def test_a_record_with_nan_or_of_another_schema_is_refused() -> None:
    record = a_record(*POINTS)
    torn = structs.replace(record.points[0], threshold=float("nan"))
    with pytest.raises(ValueError, match=r"got nan at points\[0\].threshold"):
        exit_search_report(structs.replace(record, points=[torn]))
    with pytest.raises(ValueError, match="expected schema 1, got 2"):
        exit_search_report(structs.replace(record, schema=2))
