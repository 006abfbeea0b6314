"""Tests of the report of an explained layer."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import planted_causes as planted
from support.html import Page, svgs

from cascade.core.errors import RecordError
from cascade.core.records import read_typed
from cascade.core.schema import from_plain, to_plain
from cascade.report.common.sections import Report, html_page, markdown, print_sections
from cascade.report.studies.explanation import PICTURES, explanation_report
from cascade.studies.explanations.layer_explanation import explain
from cascade.studies.explanations.records import LayerExplanation


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    stack = planted.quiet_stack(name="tiny")
    planted.constant_of(stack, "attention", 4.0)
    found = explain(stack, planted.blocks(), planted.DIP, contrast=planted.DIP - 1)
    plain: dict[str, Any] = to_plain(found)
    return plain


@pytest.fixture
def record(whole: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(whole)


def printed(report: Report) -> str:
    stream = io.StringIO()
    print_sections(report, Console(file=stream, width=80, color_system=None))
    return stream.getvalue()


def report_of(record: dict[str, Any]) -> Report:
    return explanation_report(from_plain(record, LayerExplanation))


def lead(record: dict[str, Any]) -> str:
    return report_of(record).sections[0].blocks[0].text  # type: ignore[union-attr]


def test_the_verdict_names_the_supported_causes_with_their_numbers(
    record: dict[str, Any],
) -> None:
    text = lead(record)
    assert "Layer 4 turns the residual stream by" in text
    assert "its attention output" in text
    assert "dimension 7 of the stream" in text
    assert "its MLP output" not in text
    refused = report_of(record).sections[0].blocks[1]
    assert isinstance(refused, str)
    assert refused.startswith("Not supported, because less than half of the gap closes")
    assert "its MLP output" in refused
    assert "its attention output" not in refused


def test_without_a_supported_cause_none_is_named(record: dict[str, Any]) -> None:
    record["verdict"]["carried_by"] = []
    for row in record["causes"]:
        if "closed" in row:
            row["verdict"] = "not supported"
    assert "No single cause explains" in lead(record)


def test_without_a_gap_there_is_no_dip_to_explain(record: dict[str, Any]) -> None:
    record["gap"] |= {"asks_for_a_cause": False, "degrees": 0.4, "interval": [-0.1, 0.9]}
    record["verdict"]["carried_by"] = []
    assert "there is no dip to explain" in lead(record)
    text = printed(report_of(record))
    assert "Not supported" not in text
    assert " yes " not in text
    assert "no gap" in text


def test_terminal_page_and_markdown_hold_the_same_figures(record: dict[str, Any]) -> None:
    report = report_of(record)
    assert sorted(picture.file for picture in report.pictures()) == sorted(PICTURES)
    text, page = printed(report), html_page(report)
    for shown in (text, page, markdown(report)):
        assert f"{record['sides'][0]['degrees']:.1f}" in shown
        assert f"{record['ablations'][0]['perplexity_ratio']:.3f}" in shown
    assert len(svgs(page)) == 4
    assert not Page(page).misnested
    assert max(map(len, text.splitlines())) <= 90


def test_pictures_without_content_are_left_out(
    record: dict[str, Any],
) -> None:
    for row in record["causes"]:
        if "closed" in row:
            row |= {"closed": None, "interval": None, "verdict": "undecided"}
    record["verdict"]["carried_by"] = []
    for row in record["layers"]:
        row.pop("first_token_attention")
        row.pop("delimiter_attention")
        row["heads"] = None
    record["missing"] = ["attention weights: this family's layers do not return them"]
    report = report_of(record)
    assert "explanation-causes.svg" not in [picture.file for picture in report.pictures()]
    text = printed(report)
    assert "Attention weights: this family's layers do not return them." in text
    assert "attention to the first token, by head" not in text
    depth = next(p.svg for p in report.pictures() if p.file == "explanation-depth.svg")
    assert "share of the attention" not in depth


def test_an_empty_class_is_not_drawn(record: dict[str, Any]) -> None:
    kept = record["classes"][0]["name"]
    gone = record["classes"].pop()["name"]
    svg = next(p.svg for p in report_of(record).pictures() if p.file == "explanation-tokens.svg")
    assert kept in svg
    assert gone not in svg


def test_massive_activations_are_shown_by_dimension_and_entry(record: dict[str, Any]) -> None:
    words = " ".join(printed(report_of(record)).split())
    assert "No activation is massive anywhere" in words
    row = {
        "dimension": 3,
        "activations": 4,
        "at_first_token": 3,
        "largest": 1234.0,
        "tokens": [{"text": "\n", "count": 4}],
    }
    for entry in (2, 3, 5):
        record["entries"][entry]["massive"] = [row]
    text = printed(report_of(record))
    assert "2-3, 5" in text
    assert "75 % of 12" in text
    assert "'\\n' 4" in text


def test_the_same_record_gives_the_same_bytes(record: dict[str, Any]) -> None:
    assert html_page(report_of(record)) == html_page(report_of(record))


def test_other_records_are_refused(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "explanation.json"
    path.write_text(json.dumps(record | {"kind": "saturation"}))
    with pytest.raises(RecordError, match="expected a record of kind explanation"):
        read_typed(path, LayerExplanation)
    path.write_text(json.dumps(record | {"schema": 2}))
    with pytest.raises(RecordError, match="has schema 2, this release reads up to 1"):
        read_typed(path, LayerExplanation)
    del record["causes"]
    path.write_text(json.dumps(record))
    with pytest.raises(RecordError, match="expected a list at causes, got nothing"):
        read_typed(path, LayerExplanation)
