"""A session as a comment: the verdict first, before and after, small, and notifying nobody."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as changed
from support.build_comparisons import (
    BUDGET,
    KINDS,
    a_full_session,
    a_session,
    clean,
    comparisons,
    moved,
    named,
)

from cascade.gate.records import session_record
from cascade.report.gate.comment import CommentOrigin, comment_markdown, no_verdict_markdown
from cascade.report.gate.wording import worst_cells

ORIGIN = CommentOrigin("tiny", "0123456789abcdef", "https://github.com/a/b/actions/runs/1")
LAST = (
    "Commit 0123456789ab. The [run of the job](https://github.com/a/b/actions/runs/1) has the "
    "summary and the whole report."
)


def headings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_is_the_first_line_that_is_shown(kind: str) -> None:
    record = KINDS[kind]()
    text = comment_markdown(a_session(record), ORIGIN)
    assert text.splitlines()[:2] == [ORIGIN.marker, f"## CASCADE: {record.verdict}"]
    assert text.endswith(f"\n{LAST}\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    shown = min(len(worst_cells(record)), 5)
    assert len(rows) == (shown + 2 if shown else 0)


def test_cells_are_shown_before_and_after() -> None:
    text = comment_markdown(a_session(moved()), ORIGIN)
    assert "| layer | statistic | before | after | moved | tolerance | verdict |" in text
    assert "| 2 | mean | 0.730652 | 0.740652 | +0.010000 | 2.0e-06 | fail |" in text
    assert "- **Likely cause**: one layer: layer 2 is the first that moved" in text
    assert "- **Baseline**: baselines/tiny/words.saturation.json" in text


def test_a_session_shows_failures_first_and_passes_in_short() -> None:
    text = comment_markdown(a_full_session(), ORIGIN)
    assert headings(text) == [
        "## CASCADE: FAIL",
        "### FAIL: missing baselines",
        "### FAIL: tiny/words",
        "### FAIL: budgets of tiny/texts",
        "### NOT COMPARABLE: tiny/words",
        "### NOT COMPARABLE: budgets of tiny/texts",
        "### INCONCLUSIVE: tiny/words",
        "### PASS",
        "### Other baselines",
    ]
    assert "| agreement | at least 0.897 | 0.5000 | layer 3," in text
    assert "create it with `cascade analyze --output a | tee b`" in text
    assert "- **model.dtype**: expected float32, got bfloat16" in text


def test_a_comment_stays_below_the_limit_and_keeps_failures_and_the_last_line() -> None:
    many = [named(moved(), f"model-{number}") for number in range(300)]
    overruns = changed(BUDGET, overruns=BUDGET.overruns * 100)
    text = comment_markdown(session_record([*many, named(clean())], [overruns]), ORIGIN)
    assert 50_000 < len(text) < 65_536
    assert "### FAIL: model-0\n" in text
    assert "more sections in the HTML report." in text
    assert text.endswith(f"\n{LAST}\n")
    few = comment_markdown(session_record([], [overruns]), ORIGIN)
    assert "Exceeded budgets. The first 5 of 200." in few


def test_names_notify_nobody_and_commands_can_be_copied() -> None:
    record = changed(moved(), headline="by @team/all, run `analyze --model a@main`, \\`@b`")
    text = comment_markdown(session_record([named(record, "@someone")]), ORIGIN)
    assert "@someone" not in text
    assert "@team" not in text
    assert "@\u200bsomeone" in text
    record = changed(moved(), headline="run `analyze --model a@main` for @b")
    text = comment_markdown(a_session(record), ORIGIN)
    assert "run `analyze --model a@main` for @\u200bb" in text


def test_a_gate_without_a_report_has_no_verdict() -> None:
    text = no_verdict_markdown(ORIGIN, 4)
    assert text.splitlines()[:4] == [
        ORIGIN.marker,
        "## CASCADE: NO VERDICT",
        "",
        "The gate ended with exit status 4 and wrote no report. The job's log says why.",
    ]
    assert text.endswith(f"\n{LAST}\n")


def test_markers_differ_and_end_only_at_their_end() -> None:
    markers = {CommentOrigin(name).marker for name in ("a", "a b", "a%20b", "-->", "--", "a\nb")}
    assert len(markers) == 6
    for marker in markers:
        assert marker.index("-->") == len(marker) - 3
        assert "--" not in marker[4:-3]  # older Markdown allows none in a comment of HTML
        assert "\n" not in marker
    assert not any(a != b and a.startswith(b) for a in markers for b in markers)


@settings(max_examples=20, deadline=None)
@given(record=comparisons(40), name=st.text(max_size=200), count=st.integers(1, 30))
def test_any_session_fits(record: object, name: str, count: int) -> None:
    parts = [named(record, name)] * count  # type: ignore[arg-type]
    text = comment_markdown(session_record(parts), CommentOrigin(name))
    assert len(text) < 65_536
    assert text.splitlines()[1].startswith("## CASCADE: ")
