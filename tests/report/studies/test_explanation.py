"""Explanations say which cause carries, refuse the others, and draw nothing that is not there."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from msgspec.structs import replace
from rich.console import Console
from support import planted_causes as planted
from support.html import Page, svgs

from cascade.report.common.sections import Report, html_page, markdown, print_sections
from cascade.report.studies.explanation import PICTURES, explanation_report
from cascade.report.studies.final_norm import final_norm_report
from cascade.studies.final_norm import explain_norm
from cascade.studies.layer_explanation import explain


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    stack = planted.quiet_stack()
    planted.constant_of(stack, "attention", 4.0)
    stack.provenance = replace(stack.provenance, name="tiny")
    return explain(stack, planted.blocks(), planted.DIP, contrast=planted.DIP - 1)


@pytest.fixture
def record(whole: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(whole)


def printed(report: Report) -> str:
    stream = io.StringIO()
    print_sections(report, Console(file=stream, width=80, color_system=None))
    return stream.getvalue()


def lead(record: dict[str, Any]) -> str:
    return explanation_report(record).sections[0].blocks[0].text  # type: ignore[union-attr]


def test_the_verdict_names_the_causes_that_carry_with_their_numbers(
    record: dict[str, Any],
) -> None:
    text = lead(record)
    assert "Layer 4 turns the stream by" in text
    assert "what its attention adds" in text
    assert "what it adds in dimension 7" in text
    assert "what its MLP adds" not in text
    refused = explanation_report(record).sections[0].blocks[1]
    assert isinstance(refused, str)
    assert refused.startswith("Not supported by their ablation, and so no cause")
    assert "what its MLP adds" in refused
    assert "attention adds" not in refused


def test_without_a_cause_that_carries_none_is_named(record: dict[str, Any]) -> None:
    record["verdict"]["carried_by"] = []
    for row in record["causes"]:
        if "closed" in row:
            row["verdict"] = "does not carry"
    assert "No single cause carries" in lead(record)


def test_without_a_gap_there_is_nothing_to_explain(record: dict[str, Any]) -> None:
    record["gap"] |= {"asks_for_a_cause": False, "degrees": 0.4, "interval": [-0.1, 0.9]}
    record["verdict"]["carried_by"] = []
    assert "there is no dip to explain" in lead(record)
    text = printed(explanation_report(record))
    assert "Not supported" not in text
    assert " yes " not in text
    assert "no gap" in text


def test_terminal_page_and_markdown_hold_the_same_figures(record: dict[str, Any]) -> None:
    report = explanation_report(record)
    assert sorted(picture.file for picture in report.pictures()) == sorted(PICTURES)
    text, page = printed(report), html_page(report)
    for shown in (text, page, markdown(report)):
        assert f"{record['sides'][0]['degrees']:.1f}" in shown
        assert f"{record['ablations'][0]['perplexity_ratio']:.3f}" in shown
    assert len(svgs(page)) == 4
    assert not Page(page).misnested
    assert max(map(len, text.splitlines())) <= 90


def test_a_picture_without_content_is_left_out_and_the_gap_is_named(
    record: dict[str, Any],
) -> None:
    for row in record["causes"]:
        if "closed" in row:
            row |= {"closed": None, "interval": None, "verdict": "cannot tell"}
    record["verdict"]["carried_by"] = []
    for row in record["layers"]:
        row.pop("first_token_attention")
        row.pop("delimiter_attention")
        row["heads"] = None
    record["missing"] = ["attention weights: this family's layers do not return them"]
    report = explanation_report(record)
    assert "explanation-causes.svg" not in [picture.file for picture in report.pictures()]
    text = printed(report)
    assert "Attention weights: this family's layers do not return them." in text
    assert "attention to the first token" not in text
    depth = next(p.svg for p in report.pictures() if p.file == "explanation-depth.svg")
    assert "share of the attention" not in depth


def test_an_empty_class_is_not_drawn(record: dict[str, Any]) -> None:
    kept = record["classes"][0]["name"]
    gone = record["classes"].pop()["name"]
    svg = next(
        p.svg for p in explanation_report(record).pictures() if p.file == "explanation-tokens.svg"
    )
    assert kept in svg
    assert gone not in svg


def test_massive_activations_are_told_with_place_and_entries(record: dict[str, Any]) -> None:
    words = " ".join(printed(explanation_report(record)).split())
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
    text = printed(explanation_report(record))
    assert "2-3, 5" in text
    assert "75 % of 12" in text
    assert "'\\n' 4" in text


def test_the_same_record_gives_the_same_bytes(record: dict[str, Any]) -> None:
    assert html_page(explanation_report(record)) == html_page(explanation_report(record))


def test_other_records_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected kind 'explanation'"):
        explanation_report(record | {"kind": "saturation"})
    del record["causes"]
    with pytest.raises(ValueError, match="none of \\['causes'\\]"):
        explanation_report(record)


# --- The final norm --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def norm_record() -> dict[str, Any]:
    stack = planted.quiet_stack(4)
    stack.provenance = replace(stack.provenance, name="tiny")
    return explain_norm(stack, planted.blocks())


def verdict_of(record: dict[str, Any]) -> str:
    return final_norm_report(record).sections[0].blocks[0].text  # type: ignore[union-attr]


def test_a_norm_is_judged_by_how_few_weights_explain_it(norm_record: dict[str, Any]) -> None:
    record = copy.deepcopy(norm_record)
    record["levelled"][0] |= {"explained": 0.9, "similarity": 0.65}
    record["dimensions"][0] |= {"dimension": 17, "weight": -1.26}
    text = verdict_of(record)
    assert "A single weight, -1.26 in dimension 17, which is negative, explains 90 %" in text
    assert "it is 0.650" in text
    record["levelled"][0]["explained"] = 0.2
    record["levelled"][1] |= {"explained": 0.85, "weights": 2}
    assert "The weights of the dimensions 17, " in verdict_of(record)
    for row in record["levelled"]:
        row["explained"] = 0.1
    assert "No few weights explain the difference" in verdict_of(record)


def test_a_norm_without_bias_or_mean_shows_no_row_of_them(norm_record: dict[str, Any]) -> None:
    text = printed(final_norm_report(norm_record))
    assert "equal weights" not in text
    assert "without its bias" not in text
    record = copy.deepcopy(norm_record)
    record["norm"] = {"subtracts_mean": True, "has_bias": True}
    text = printed(final_norm_report(record))
    assert "equal weights" in text
    assert "without its bias" in text


def test_the_page_of_a_norm_holds_its_picture(norm_record: dict[str, Any]) -> None:
    page = html_page(final_norm_report(norm_record))
    assert len(svgs(page)) == 1
    assert not Page(page).misnested
