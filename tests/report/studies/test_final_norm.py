"""Tests of the report of a final norm."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console
from support import planted_causes as planted
from support.html import Page, svgs

from cascade.core.schema import from_plain, to_plain
from cascade.report.common.sections import Report, html_page, print_sections
from cascade.report.studies.final_norm import final_norm_report
from cascade.studies.explanations.final_norm import explain_norm
from cascade.studies.explanations.records import FinalNormExplanation


def printed(report: Report) -> str:
    stream = io.StringIO()
    print_sections(report, Console(file=stream, width=80, color_system=None))
    return stream.getvalue()


def report_of(record: dict[str, Any]) -> Report:
    return final_norm_report(from_plain(record, FinalNormExplanation))


@pytest.fixture(scope="module")
def norm_record() -> dict[str, Any]:
    stack = planted.quiet_stack(4, name="tiny")
    plain: dict[str, Any] = to_plain(explain_norm(stack, planted.blocks()))
    return plain


def verdict_of(record: dict[str, Any]) -> str:
    return report_of(record).sections[0].blocks[0].text  # type: ignore[union-attr]


def test_the_verdict_names_the_fewest_weights_needed(
    norm_record: dict[str, Any],
) -> None:
    record = copy.deepcopy(norm_record)
    record["levelled"][0] |= {"explained": 0.9, "similarity": 0.65}
    record["dimensions"][0] |= {"dimension": 17, "weight": -1.26}
    text = verdict_of(record)
    assert "The negative weight of dimension 17, -1.26, alone explains 90 %" in text
    assert "the similarity is 0.650" in text
    record["levelled"][0]["explained"] = 0.2
    record["levelled"][1] |= {"explained": 0.85, "weights": 2}
    assert "The weights of the dimensions 17, " in verdict_of(record)
    for row in record["levelled"]:
        row["explained"] = 0.1
    assert "No small number of weights explains the difference" in verdict_of(record)


def test_rows_on_bias_and_mean_are_shown_only_if_they_apply(
    norm_record: dict[str, Any],
) -> None:
    text = printed(report_of(norm_record))
    assert "equal weights" not in text
    assert "without its bias" not in text
    record = copy.deepcopy(norm_record)
    record["norm"] = {"subtracts_mean": True, "has_bias": True}
    text = printed(report_of(record))
    assert "equal weights" in text
    assert "without its bias" in text


def test_the_page_of_a_norm_holds_its_picture(norm_record: dict[str, Any]) -> None:
    page = html_page(report_of(norm_record))
    assert len(svgs(page)) == 1
    assert not Page(page).misnested
