"""Reports of comparisons: verdict first, every number from the record, no hole drawn as zero."""

from __future__ import annotations

import copy
import io
import math
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles_by_hand import EDGES, LAYERS, a_profile, profile_of, provenance, similarities_of
from rich.console import Console

from cascade.drift import compare
from cascade.report import print_comparison, print_report, report_markdown, report_page
from cascade.report.drift import worst_cells
from cascade.report.drift_page import shade
from cascade.session import session_record

Record = dict[str, Any]


def moved(by: float = 0.01) -> Record:
    values = similarities_of(12)
    values[1:, 5] += by
    return compare(profile_of(values), a_profile()).record()


def lacking() -> Record:
    values = similarities_of(12)
    shorter = profile_of(values[[0, 1, 3]], layers=[*LAYERS[:2], LAYERS[3]], edges=EDGES[:3])
    return compare(shorter, a_profile()).record()


def other_text(sequences: int = 12) -> Record:
    new = profile_of(similarities_of(sequences, seed=2), fingerprints=1000 + np.arange(sequences))
    return compare(new, a_profile(400)).record()


def foreign() -> Record:
    return compare(a_profile(about=provenance(model__dtype="bfloat16")), a_profile()).record()


def clean() -> Record:
    return compare(a_profile(), a_profile()).record()


KINDS = {
    "clean": clean,
    "moved": moved,
    "lacking": lacking,
    "other text": other_text,
    "foreign": foreign,
}


def named(record: Record, name: str = "tiny/words") -> Record:
    return record | {"name": name, "path": f"baselines/{name}.saturation.json"}


BUDGET = {
    "name": "tiny/words",
    "path": "baselines/tiny/words.budgets.json",
    "verdict": "FAIL",
    "points": 3,
    "overruns": [
        {
            "point": "layer 3, cosine >= 0.95, logit_lens",
            "figure": "agreement",
            "limit": "at least 0.897",
            "measured": "0.5000",
            "command": "cascade evaluate --point 3:cosine:0.95",
        }
    ],
    "reason": None,
}


def a_session(*records: Record, **parts: Any) -> Record:
    return session_record([named(record) for record in records], **parts)


def printed(record: Record, width: int = 80) -> str:
    text = io.StringIO()
    show = print_report if record["kind"] == "report" else print_comparison
    show(record, Console(file=text, width=width))
    return text.getvalue()


# --- The terminal ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_comes_first_and_eighty_columns_are_enough(kind: str) -> None:
    record = KINDS[kind]()
    text = printed(record)
    assert text.startswith(f"{record['verdict']}: ")
    assert max(map(len, text.splitlines())) <= 80


def test_what_moved_is_shown_worst_first_with_its_signed_difference_and_tolerance() -> None:
    record = moved(0.01)
    text = printed(record)
    assert "one layer" in text
    rows = [line.split() for line in text.splitlines() if line.endswith("fail")]
    cells = worst_cells(record)
    assert len(rows) == min(10, len(cells))
    for row, cell in zip(rows, cells, strict=False):
        assert row[0] == cell["layer"]
        assert float(row[1]) == pytest.approx(cell["expected"], abs=1e-6)
        assert float(row[2]) == pytest.approx(cell["obtained"], abs=1e-6)
        assert row[3][0] == ("+" if cell["difference"] > 0 else "-")
        assert float(row[3]) == pytest.approx(cell["difference"], rel=0.06)
        assert float(row[4]) == pytest.approx(cell["limit"], rel=0.06)
        assert row[5] == cell["statistic"]
    sizes = [abs(cell["standardized"]) for cell in cells]
    assert sizes == sorted(sizes, reverse=True)
    assert f"of {len(cells)} cells" in text


def test_a_row_that_is_missing_reads_none_and_never_zero() -> None:
    text = printed(lacking())
    assert "row 3 is on one side only" in " ".join(text.split())
    row = next(line for line in text.splitlines() if line.split()[:1] == ["3"])
    assert "none" in row


def test_what_is_undecided_says_how_many_sequences_would_decide() -> None:
    record = other_text()
    assert record["verdict"] == "INCONCLUSIVE"
    needed = [c["needed"] for c in record["cells"] if c["verdict"] == "INCONCLUSIVE"]
    assert None not in needed
    text = printed(record)
    assert f"{max(needed):,} new sequences" in text
    assert "margin" in text
    assert " to +" in text
    never = copy.deepcopy(record)
    for cell in never["cells"]:
        cell["needed"] = None
    assert "no number of new sequences" in printed(never)


def test_what_cannot_be_compared_shows_both_sides_and_no_number() -> None:
    text = " ".join(printed(foreign()).split())
    assert "expected float32, got bfloat16" in text
    assert "run with the baseline's --dtype" in text
    assert "Cells" not in text


def test_notes_are_shown_with_a_pass_too() -> None:
    record = compare(a_profile(about=provenance(machine__processor="B")), a_profile()).record()
    assert "made elsewhere" in printed(record)


def test_a_session_shows_all_of_its_parts() -> None:
    report = a_session(
        clean(),
        moved(),
        budgets=[BUDGET, BUDGET | {"verdict": "PASS", "overruns": []}],
        missing=[{"path": "baselines/a.json", "command": "cascade analyze"}],
        regenerated=["baselines/b.json"],
        unused=["baselines/c.json"],
    )
    text = " ".join(printed(report).split())
    assert "PASS: tiny/words: no drift" in text
    assert "FAIL: tiny/words: drift" in text
    assert "agreement budget at least 0.897, measured 0.5000" in text
    assert "`cascade evaluate --point 3:cosine:0.95`" in text
    assert "all budgets of 3 points of early exit kept" in text
    assert "baselines/a.json; make it with `cascade analyze`" in text
    assert "baselines/b.json; review and commit it" in text
    assert "baselines/c.json: no test of this session" in text
    gone = BUDGET | {"verdict": "NOT COMPARABLE", "overruns": [], "reason": "other heads"}
    assert "NOT COMPARABLE: tiny/words: other heads" in printed(a_session(budgets=[gone]))


@pytest.mark.parametrize("show", [printed, report_markdown, report_page])
def test_a_record_of_another_kind_or_without_a_section_is_refused(show: Any) -> None:
    report = a_session(clean())
    with pytest.raises(ValueError, match="expected"):
        show(report | {"schema": 2})
    with pytest.raises(ValueError, match="unused"):
        show({key: value for key, value in report.items() if key != "unused"})
    broken = copy.deepcopy(report)
    broken["comparisons"][0]["cells"][0]["expected"] = math.nan
    with pytest.raises(ValueError, match="nan"):
        show(broken)


# --- Markdown --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_markdown_begins_with_the_verdict_and_has_whole_tables(kind: str) -> None:
    record = KINDS[kind]()
    text = report_markdown(a_session(record))
    assert text.startswith(f"# CASCADE: {record['verdict']}")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    # Escaped bars are no columns.
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert len(columns) <= 1
    assert bool(tables) is bool(worst_cells(record))


def test_markdown_escapes_what_would_be_a_column_or_a_tag() -> None:
    record = named(moved(), "a|b/<script>")
    text = report_markdown(session_record([record]))
    assert "a\\|b/&lt;script>" in text
    assert "<script>" not in text


CELL = st.fixed_dictionaries(
    {
        "statistic": st.sampled_from(["mean", "share_p50", "max"]),
        "expected": st.none() | st.floats(-1, 1),
        "obtained": st.none() | st.floats(-1, 1),
        "limit": st.floats(0, 1),
        "standardized": st.none() | st.floats(-1e6, 1e6),
        "interval": st.none() | st.just([-0.1, 0.2]),
        "sequence": st.none() | st.integers(0, 9),
        "needed": st.none() | st.integers(1, 10**6),
        "verdict": st.sampled_from(["PASS", "FAIL", "INCONCLUSIVE"]),
    }
)


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 200),
    cells=st.lists(CELL, min_size=1, max_size=6),
    comparisons=st.integers(1, 60),
    name=st.text(max_size=300),
)
def test_any_record_is_shown_and_markdown_stays_below_a_hundred_kilobytes(
    layers: int, cells: list[Record], comparisons: int, name: str
) -> None:
    record = moved() | {
        "cells": [
            cell | {"layer": str(layer), "difference": _minus(cell)}
            for layer in range(1, layers + 1)
            for cell in cells
        ]
    }
    report = session_record([named(record, name)] * comparisons)
    assert len(report_markdown(report).encode()) < 100_000
    assert printed(report)


def _minus(cell: Record) -> float | None:
    if cell["expected"] is None or cell["obtained"] is None:
        return None
    difference: float = cell["obtained"] - cell["expected"]
    return difference


# --- The page --------------------------------------------------------------------------------


def squares(page: str) -> list[tuple[str, ElementTree.Element]]:
    """Return the cells of the map: title and rectangle."""
    (svg,) = re.findall(r"<svg viewBox.*?</svg>", page, flags=re.DOTALL)
    root = ElementTree.fromstring(re.sub(r"var\(--(\w+)\)", r"\1", svg))
    space = "{http://www.w3.org/2000/svg}"
    return [
        (str(rect.findtext(f"{space}title")), rect)
        for rect in root.iter(f"{space}rect")
        if rect.find(f"{space}title") is not None
    ]


def test_the_map_has_every_cell_and_its_colour_tells_side_and_size() -> None:
    record = moved()
    found = squares(report_page(a_session(record)))
    assert len(found) == len(record["cells"])
    for cell, (title, rect) in zip(record["cells"], found, strict=True):
        assert title.startswith(f"layer {cell['layer']}, ")
        fill = "active" if cell["standardized"] > 0 else "mean"
        assert rect.get("fill") == fill
        assert float(rect.get("fill-opacity") or 0) == pytest.approx(
            shade(abs(cell["standardized"])), abs=1e-3
        )
        beyond = cell["verdict"] != "PASS"
        assert (rect.get("stroke") == "ink") is beyond


def test_cells_without_a_number_are_hatched_and_named_not_drawn_as_zero() -> None:
    record = lacking()
    page = report_page(a_session(record))
    holes = [c for c in record["cells"] if c["standardized"] is None]
    hatched = [title for title, rect in squares(page) if rect.get("fill") == "url(#none)"]
    assert len(hatched) == len(holes) > 0
    assert all("missing, NaN or infinitely far" in title for title in hatched)
    assert "Hatched: no number on one side (3 mean, " in page


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_the_farther_the_deeper(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= shade(low) <= shade(high) <= 1


def test_nothing_is_pale_beyond_the_limit_or_deep_within() -> None:
    assert shade(0.0) == 0
    assert shade(1.0) == pytest.approx(0.5)
    assert shade(math.inf) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_whole_and_loads_nothing(kind: str) -> None:
    record = KINDS[kind]()
    page = report_page(a_session(record, budgets=[BUDGET], unused=["baselines/<c>.json"]))
    assert page.startswith("<!DOCTYPE html>")
    assert f"<h1>{a_session(record, budgets=[BUDGET])['verdict']}</h1>" in page
    assert "<script" not in page
    assert not re.search(r'(src|href)="http', page)
    assert "baselines/&lt;c&gt;.json" in page
    assert ("Every cell" in page) is bool(record["cells"])
    assert page == report_page(a_session(record, budgets=[BUDGET], unused=["baselines/<c>.json"]))


def test_the_layer_that_the_evidence_points_to_is_marked() -> None:
    page = report_page(a_session(moved()))
    assert ">▸ 2</text>" in page
    assert page.count("▸") == 1
    assert "The arrow marks layer 2" in page


def test_two_comparisons_on_a_page_share_no_id() -> None:
    page = report_page(a_session(moved(), clean()))
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
