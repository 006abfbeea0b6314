"""A session as HTML page: map, profiles and sections."""

from __future__ import annotations

import html
import itertools
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
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
    hidden_drift,
    lacking,
    mixed,
    moved,
    named,
    of_a_model,
    of_layers,
    other_text,
    with_cell,
)
from support.build_profiles import a_profile, provenance
from support.html import Page, ids, svgs

from cascade.core.schema import from_plain, to_plain
from cascade.gate.drift import compare
from cascade.gate.records import CellRow, ComparisonRecord, Overrun, session_record
from cascade.report.common.heat_map import shade
from cascade.report.gate.figures import drift_map_svg, profiles_svg
from cascade.report.gate.page import report_page
from cascade.report.gate.wording import cell_name, cell_row, distance, worst_cells

SPACE = "{http://www.w3.org/2000/svg}"


def flat(text: str) -> str:
    return " ".join(text.split())


def visible_text(page: str) -> str:
    """Return the visible text of a page."""
    return flat(" ".join(Page(page).texts))


def drawing(record: Record) -> ElementTree.Element:
    """Return the map of the page, with colour names in place of CSS variables."""
    found = [svg for svg in svgs(report_page(a_session(record))) if 'id="map-1"' in svg]
    return ElementTree.fromstring(re.sub(r"var\(--(\w+)\)", r"\1", found[0]))


def squares(record: Record) -> dict[str, ElementTree.Element]:
    """Return the cells of the map by their tooltips."""
    found = {}
    for square in drawing(record).iter(f"{SPACE}rect"):
        title = square.findtext(f"{SPACE}title")
        if title is not None:
            found[title] = square
    return found


def square_of(
    record: Record, cell: CellRow, found: dict[str, ElementTree.Element]
) -> tuple[str, ElementTree.Element]:
    """Return the tooltip and rectangle of a cell, found by row and column."""
    layers = list(dict.fromkeys(c.layer for c in record.cells))
    columns = list(dict.fromkeys(cell_name(record, c) for c in record.cells))
    place = columns.index(cell_name(record, cell)), layers.index(cell.layer)
    xs = sorted({float(square.get("x", 0)) for square in found.values()})
    ys = sorted({float(square.get("y", 0)) for square in found.values()})
    ((title, square),) = [
        (title, square)
        for title, square in found.items()
        if (xs.index(float(square.get("x", 0))), ys.index(float(square.get("y", 0)))) == place
    ]
    return title, square


# --- The map ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moved", "mixed", "model: broken", "model: broken, whole"])
def test_every_cell_has_its_place_and_numbers_on_the_map(kind: str) -> None:
    record = KINDS[kind]()
    found = squares(record)
    places = {(square.get("x"), square.get("y")) for square in found.values()}
    assert len(found) == len(places) == len(record.cells)
    for cell in itertools.islice(record.cells, 0, None, 7):
        title, square = square_of(record, cell, found)
        assert title.startswith(f"layer {cell.layer}, ")
        assert f"({cell.verdict})" in title
        _, _, *numbers, _ = cell_row(record, cell)
        assert all(number in title for number in numbers)
        assert cell.standardized is not None
        assert square.get("fill") == ("active" if cell.standardized > 0 else "mean")
        opacity = shade(abs(cell.standardized))
        assert float(square.get("fill-opacity", -1)) == pytest.approx(opacity, abs=1e-3)


def test_a_failing_cell_is_drawn_over_a_passing_one() -> None:
    record = hidden_drift()
    by_verdict = {
        name: {c.verdict for c in record.cells if cell_name(record, c) == name}
        for name in ("mean", "table mean")
    }
    assert by_verdict == {"mean": {"PASS", "FAIL"}, "table mean": {"PASS"}}
    framed = [title for title, s in squares(record).items() if s.get("stroke") == "ink"]
    assert len(framed) == 6
    # Of two cells in one place (which no comparison creates), the worse one is on top.
    failed = next(cell for cell in record.cells if cell.verdict == "FAIL")
    passed = changed(failed, standardized=0.0, verdict="PASS")
    for cells in ([passed, *record.cells], [*record.cells, passed]):
        titles = [
            title
            for title in squares(changed(record, cells=cells))
            if title.startswith(f"layer {failed.layer}, mean similarity: ")
        ]
        assert ["FAIL" in title for title in titles] == [False, True]


@pytest.mark.parametrize("kind", ["moved", "mixed"])
def test_cells_that_do_not_pass_have_a_frame_and_failures_a_sign(kind: str) -> None:
    record = KINDS[kind]()
    for title, square in squares(record).items():
        verdict = re.findall(r"\((PASS|FAIL|INCONCLUSIVE)\)", title)[0]
        assert square.get("stroke") == {"FAIL": "ink", "INCONCLUSIVE": "muted"}.get(verdict, "grid")
        assert (square.get("stroke-dasharray") is not None) is (verdict == "INCONCLUSIVE")
    failed = [(cell.standardized or 0) > 0 for cell in record.cells if cell.verdict == "FAIL"]
    signs = [text.text for text in drawing(record).iter(f"{SPACE}text") if text.text in "+\u2212"]
    assert sorted(signs) == sorted("+" if above else "\u2212" for above in failed)


def test_cells_without_a_value_are_hatched_and_named() -> None:
    record = lacking()
    holes = [cell for cell in record.cells if cell.difference is None]
    found = squares(record)
    hatched = [title for title, s in found.items() if s.get("fill") == "url(#map-1-none)"]
    assert len(hatched) == len(holes) == 12
    assert all("no value on one side (FAIL)" in title for title in hatched)
    assert all("obtained none" in title for title in hatched)
    page = report_page(a_session(record))
    assert "map-1-none" in ids(page)
    assert "Hatched cells have no value on one side: layer 3 (12 statistics)." in visible_text(page)
    assert "no value on one side (missing or NaN)" in visible_text(page)
    whole = report_page(a_session(moved()))
    assert "atched" not in whole
    assert "missing or NaN" not in whole


def test_a_changed_count_has_the_deepest_colour() -> None:
    number = [cell.statistic for cell in moved().cells].index("count")
    record = with_cell(
        moved(),
        number,
        obtained=191.0,
        difference=-1.0,
        standardized=None,
        verdict="FAIL",
    )
    title, square = square_of(record, record.cells[number], squares(record))
    assert "-inf x its tolerance (FAIL); expected 192, obtained 191, moved -1" in title
    assert (square.get("fill"), square.get("fill-opacity")) == ("mean", "1.000")


@given(st.floats(0, 1e9), st.floats(0, 1e9))
@example(0.0, 1e-320)
@example(1.0, math.nextafter(1.0, 2.0))
@example(100.0, math.inf)
def test_a_larger_distance_has_a_deeper_colour(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= shade(low) <= shade(high) <= 1


def test_the_colour_steps_at_the_limit_and_differs_between_decades() -> None:
    assert shade(math.nextafter(1.0, 2.0)) - shade(1.0) >= 0.2
    depths = [shade(10.0**power) for power in (-3, -2, -1, 0, 1, 2)]
    assert all(high - low > 0.04 for low, high in itertools.pairwise(depths))
    assert (shade(0.0), shade(math.inf)) == (0.0, 1.0)


def test_the_legend_marks_the_limits_at_the_colour_steps() -> None:
    marks = {
        text.text: float(text.get("x", 0))
        for text in drawing(moved()).iter(f"{SPACE}text")
        if re.fullmatch(r"[+-]?[\d.]+( limit)?", text.text or "") and text.get("font-weight")
    }
    scale = ("-100", "-10", "-1 limit", "-0.1", "0", "+0.1", "+1 limit", "+10", "+100")
    places = [marks[name] for name in scale]
    gaps = [right - left for left, right in itertools.pairwise(places)]
    assert gaps == pytest.approx([gaps[0]] * 8, abs=0.5)
    # The colours step at the limit and end with the scale.
    strip = [rect for rect in drawing(moved()).iter(f"{SPACE}rect") if rect.get("height") == "12"]
    ends = (
        float(strip[0].get("x", 0)),
        float(strip[-1].get("x", 0)) + float(strip[-1].get("width", 0)),
    )
    assert ends == pytest.approx((places[0], places[-1]), abs=0.5)
    for rect in strip:
        middle = float(rect.get("x", 0)) + float(rect.get("width", 0)) / 2
        within = marks["-1 limit"] < middle < marks["+1 limit"]
        assert (float(rect.get("fill-opacity", 0)) <= shade(1.0)) is within
        assert rect.get("fill") == ("active" if middle > marks["0"] else "mean")


def test_the_likely_cause_is_marked_on_the_map_profile_and_table() -> None:
    page = report_page(a_session(moved()))
    names = [text.text for text in drawing(moved()).iter(f"{SPACE}text") if text.text]
    assert [name for name in names if "\u25b8" in name] == ["\u25b8 2"]
    assert "The arrow marks layer 2, the likely cause." in visible_text(page)
    assert "layer 2, the likely cause" in svgs(page)[1]
    active = re.findall(r'<tr class="active"><th scope="row">([^<]*)</th>', page)
    assert active
    assert set(active) == {"2"}
    nowhere = report_page(a_session(clean()))
    assert "\u25b8" not in nowhere
    assert "likely cause" not in nowhere


# --- The profiles ----------------------------------------------------------------------------


def curves(svg: str) -> list[list[str]]:
    """Return the path commands of every line with more than three points."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none', svg)
    found = [re.findall(r"[ML]", path) for path in paths]
    return [commands for commands in found if len(commands) > 3]


def test_both_profiles_are_drawn_and_a_missing_layer_is_a_gap() -> None:
    whole = profiles_svg(of_a_model("broken, whole"), "p")
    assert curves(whole) == [["M", *"LLLLL"]] * 2
    assert "no value on one side" not in whole
    rows = list(of_a_model("broken, whole").profile)
    rows[2] = changed(rows[2], obtained=None)
    record = changed(of_a_model("broken, whole"), profile=rows)
    # The baseline is one line; the new profile starts again after the gap.
    holed = profiles_svg(record, "p")
    assert curves(holed) == [["M", *"LLLLL"], ["M", "L", "M", "L", "L"]]
    assert "no value on one side" in holed


def test_the_lower_chart_shows_limits_and_differences() -> None:
    same, other = profiles_svg(moved(), "p"), profiles_svg(mixed(), "p")
    assert "within the tolerance" in same
    assert "within the margin" in other
    texts = [text.strip() for text in Page(same).texts]
    assert {"-2e-06", "0", "+2e-06", "+1e-05", "-1e-05"} <= set(texts)
    # A logarithmic axis would have far more ticks by default.
    assert len([text for text in texts if re.fullmatch(r"[+-]\de-\d\d", text)]) <= 8


def test_a_profile_without_values_is_drawn() -> None:
    hole = {"expected": None, "obtained": None, "difference": None, "standardized": None}
    empty = of_layers(3, [changed(moved().cells[0], **hole)], intervals=False)
    assert profiles_svg(empty, "p").startswith("<svg id=")
    assert drift_map_svg(empty, "m").count("url(#m-none)") == 3 + 1


def test_some_layer_names_are_skipped_with_eighty_layers() -> None:
    cell = moved().cells[0]
    record = of_layers(80, [cell], intervals=False)
    names = [text.strip() for text in Page(profiles_svg(record, "p")).texts]
    assert {"1", "5", "75", "80\n+norm"} <= set(names) | {"80\n+norm"}
    assert "2" not in names
    assert len(squares(record)) == 80


# --- The page --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_well_formed_and_loads_nothing(kind: str) -> None:
    record = KINDS[kind]()
    session = a_session(record, unused=["baselines/<c>.json"])
    page = report_page(session)
    parsed = Page(page)
    assert parsed.misnested == []
    assert parsed.open == []
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "img", "a"}
    urls = re.findall(r"https?://[^\"'<> ]+", page)
    assert set(urls) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "baselines/<c>.json" in visible_text(page)
    assert ("Every layer and statistic" in page) is bool(record.cells)
    assert ("Profiles" in page) is bool(record.profile)
    assert page == report_page(session)


def test_the_page_begins_with_the_verdict_and_has_its_sections_in_order() -> None:
    text = visible_text(report_page(a_session(moved())))
    order = [
        text.index(part)
        for part in (
            "CASCADE gate FAIL 1 comparison",
            "FAIL: tiny/words drift in 15 of 60 cells",
            "Likely cause one layer",
            "Measured tiny (float32 on cpu)",
            "Baseline file baselines/tiny/words.saturation.json",
            "Every layer and statistic",
            "Rows are layers",
            "Profiles",
            "Worst cells",
            "mean, mean_square: of the similarity, in the sequence that moved most",
            "Provenance",
        )
    ]
    assert order == sorted(order)


def test_the_page_lists_the_worst_cells_with_the_records_numbers() -> None:
    record = of_a_model("broken, whole")
    rows = Page(report_page(a_session(record))).rows
    cells = worst_cells(record)
    start = rows.index(cell_row(record, cells[0]))
    assert rows[start : start + 25] == [cell_row(record, cell) for cell in cells[:25]]
    assert rows[start + 25] != cell_row(record, cells[25])
    assert f"{len(cells)} cells beyond tolerance; showing the worst 25." in visible_text(
        report_page(a_session(record))
    )


def test_not_comparable_shows_both_sides_and_no_map() -> None:
    page = report_page(a_session(foreign()))
    assert "model.dtype expected float32, got bfloat16; run with" in visible_text(page)
    assert svgs(page) == []
    assert "Worst cells" not in page


def test_provenances_are_side_by_side_with_differences_marked() -> None:
    about = provenance(versions__torch="2.14.0", machine__accelerator="x")
    page = report_page(a_session(compare(a_profile(about=about), a_profile()).record()))
    rows = Page(page).rows
    assert ["", "measured", "baseline"] in rows
    assert ["torch", "2.14.0", "2.13.0"] in rows
    assert ["accelerator", "x", "not recorded"] in rows
    assert ["name", "tiny", "tiny"] in rows
    marked = re.findall(r'<tr class="active"><th scope="row" class="text">([^<]*)</th>', page)
    assert marked == ["accelerator", "torch"]
    bare = report_page(a_session(changed(moved(), provenance=None)))
    assert "<summary>Provenance" not in bare


def test_the_verdicts_colour_only_adds_to_its_text() -> None:
    for record, mark in ((clean(), "pass"), (moved(), "fail"), (other_text(), "open")):
        page = report_page(a_session(record))
        assert f'<h1 class="{mark}">{record.verdict}</h1>' in page
        assert f'<p class="lead {mark}">{html.escape(record.headline)}</p>' in page


def test_a_session_has_an_overview_with_the_worst_first() -> None:
    page = report_page(a_full_session())
    rows = Page(page).rows
    start = rows.index(["verdict", "baseline", "outcome"])
    assert [row[0] for row in rows[start + 1 : start + 8]] == [
        *("FAIL", "FAIL", "NOT COMPARABLE", "NOT COMPARABLE", "INCONCLUSIVE", "PASS", "PASS")
    ]
    text = visible_text(page)
    assert (
        "4 comparisons (1 FAIL, 1 NOT COMPARABLE, 1 INCONCLUSIVE, 1 PASS); 3 budget files" in text
    )
    assert "Missing baselines/a.json; create it with cascade analyze --output a | tee b" in text
    assert ["agreement", "at least 0.897", "0.5000", BUDGET.overruns[0].point] in rows
    assert "To inspect cascade evaluate --point 3:cosine:0.95" in text
    assert "NOT COMPARABLE: budgets of tiny/texts other heads" in text
    assert text.index("FAIL: tiny/words drift in") < text.index("PASS: tiny/words no drift")
    assert "Overview" not in visible_text(report_page(a_session(clean())))


def test_comparisons_on_one_page_share_no_id() -> None:
    page = report_page(a_session(lacking(), moved(), lacking()))
    assert len(svgs(page)) == 6
    assert len(ids(page)) == len(set(ids(page))) > 20
    # Every figure refers only to its own ids.
    for svg in svgs(page):
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids(svg))


def test_all_texts_of_a_record_are_escaped() -> None:
    nasty = "<script>alert('x')</script>\"&amp;<b>"

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()}
        return nasty if isinstance(value, str) else value

    plain = to_plain(moved())
    plain.update(headline=nasty, notes=[nasty])
    for name in ("tokenizer_hash", "model", "versions", "command"):
        plain["provenance"][name] = poison(plain["provenance"][name])
    plain["attribution"].update(text=nasty)
    for cell in plain["cells"]:
        cell.update(statistic=nasty) if cell["layer"] == "1" else None
    record = from_plain(plain, ComparisonRecord)
    overrun = from_plain(poison(to_plain(BUDGET.overruns[0])), Overrun)
    budget = changed(BUDGET, name=nasty, overruns=[overrun])
    session = session_record([named(record, nasty)], [budget], unused=[nasty])
    page = report_page(session)
    assert "<script" not in page
    assert Page(page).misnested == []
    assert visible_text(page).count("<script>alert('x')</script>\"&amp;<b>") > 10


@settings(max_examples=15, deadline=None)
@given(record=comparisons(most=40))
def test_any_record_is_drawn(record: Record) -> None:
    page = report_page(a_session(record))
    assert Page(page).misnested == []
    found = squares(record)
    assert found
    hatched = any(s.get("fill") == "url(#map-1-none)" for s in found.values())
    assert hatched is any(distance(cell) is None for cell in record.cells)
