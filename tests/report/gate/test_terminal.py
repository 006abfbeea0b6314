"""Comparisons and sessions in the terminal: verdict first, numbers as in the record."""

from __future__ import annotations

import copy
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as changed
from rich.console import Console
from support.build_comparisons import (
    BUDGET,
    KEPT,
    KINDS,
    REFUSED,
    Record,
    a_full_session,
    a_session,
    clean,
    comparisons,
    elsewhere,
    foreign,
    hidden_drift,
    lacking,
    mixed,
    moved,
    named,
    of_a_model,
    other_text,
    with_cell,
)
from support.build_profiles import a_profile, provenance

from cascade.core.errors import RecordError
from cascade.core.provenance import ModelProvenance
from cascade.core.records import read_typed, write_record
from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.gate.comparison import Comparison
from cascade.gate.drift import compare
from cascade.gate.records import DecodingRecord, SessionRecord, session_record
from cascade.report.gate.markdown import report_markdown
from cascade.report.gate.page import report_page
from cascade.report.gate.terminal import print_comparison, print_report
from cascade.report.gate.wording import cell_name, cell_row, distance, worst_cells


def show(record: Record | SessionRecord, console: Console) -> None:
    if isinstance(record, SessionRecord):
        print_report(record, console)
    else:
        print_comparison(record, console)


def printed(record: Record | SessionRecord, width: int = 80, **options: Any) -> str:
    text = io.StringIO()
    show(record, Console(file=text, width=width, **options))
    return text.getvalue()


def flat(text: str) -> str:
    return " ".join(text.split())


def table(text: str) -> list[dict[str, str]]:
    """Return the rows of the table of cells by column name; no cell contains a blank."""
    lines = text.splitlines()
    start = next(
        (n for n, line in enumerate(lines) if line.split()[:2] == ["layer", "statistic"]), None
    )
    if start is None:
        return []
    header, rows = lines[start].split(), []
    for line in lines[start + 2 :]:
        cells = line.replace("table ", "table_").split()
        if len(cells) != len(header):
            break
        rows.append(dict(zip(header, cells, strict=True)))
    return rows


def close(text: str, value: float | None) -> bool:
    """Return whether a text shows a value, up to the digits of the text."""
    if value is None:
        return text == "none"
    mantissa = text.split("e")[0]
    digits = len(mantissa.partition(".")[2])
    exponent = int(text.split("e")[1]) if "e" in text else 0
    return abs(float(text.replace(",", "")) - value) <= 0.51 * 10.0 ** (exponent - digits)


# --- One comparison --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_verdict_comes_first_and_eighty_columns_suffice(kind: str, ascii_only: bool) -> None:
    record = KINDS[kind]()
    for shown in (record, a_session(record)):
        file = io.TextIOWrapper(io.BytesIO(), encoding="ascii" if ascii_only else "utf-8")
        show(shown, Console(file=file, width=80))
        file.seek(0)
        text = file.read()
        assert text.startswith(f"{record.verdict}: ")
        assert flat(record.headline) in flat(text)
        assert max(map(len, text.splitlines())) <= 80
        assert not [line for line in text.splitlines() if line != line.rstrip()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_worst_cells_show_the_records_numbers(kind: str) -> None:
    record = KINDS[kind]()
    rows = table(printed(record))
    beyond = [cell for cell in record.cells if cell.verdict != "PASS"]
    assert len(rows) == min(10, len(beyond))
    for row, cell in zip(rows, worst_cells(record), strict=False):
        assert row["layer"] == cell.layer
        assert row["statistic"].removeprefix("table_") == cell.statistic
        assert close(row["expected"], cell.expected)
        assert close(row["obtained"], cell.obtained)
        assert close(row["moved"], cell.difference)
        assert row["moved"] == "none" or row["moved"][0] in "+-"
        limit = row["margin" if record.method == "other sequences" else "tolerance"]
        assert close(limit, cell.limit)
        assert row["verdict"] == {"FAIL": "fail", "INCONCLUSIVE": "undecided"}[cell.verdict]


def test_a_failure_names_the_likely_cause_and_shows_the_worst_first() -> None:
    record = moved()
    text = printed(record)
    assert "one layer: layer 2 is the first that moved" in flat(text)
    sizes = [abs(cell.standardized) for cell in worst_cells(record)]
    assert sizes == sorted(sizes, reverse=True)
    assert "15 cells beyond tolerance; showing the worst 10." in text
    # Six digits show the smallest differences.
    assert all(re.fullmatch(r"0\.\d{6}", row["expected"]) for row in table(text))


def test_the_title_counts_all_cells_if_all_fit() -> None:
    text = printed(hidden_drift())
    assert "\n6 cells beyond tolerance.\n" in text
    assert len(table(text)) == 6


def test_the_per_sequence_mean_and_the_table_mean_have_different_names() -> None:
    record = moved()
    means = [cell for cell in record.cells if cell.statistic == "mean"]
    assert {cell_name(record, cell) for cell in means} == {"mean", "table mean"}
    names = [(cell.layer, cell_name(record, cell)) for cell in record.cells]
    assert len(set(names)) == len(names)
    other = other_text()
    assert {cell_name(other, c) for c in other.cells if c.statistic == "mean"} == {"mean"}


def test_missing_values_are_named_and_shown_as_none() -> None:
    record = lacking()
    text = printed(record)
    holes = [cell for cell in record.cells if cell.layer == "3"]
    assert len(holes) == 12
    assert "No value on one side: layer 3 (12 statistics)" in flat(text)
    rows = [row for row in table(text) if row["layer"] == "3"]
    assert rows
    assert all((row["obtained"], row["moved"]) == ("none", "none") for row in rows)
    hole = {"obtained": None, "difference": None, "standardized": None, "verdict": "FAIL"}
    one = with_cell(moved(), 0, **hole)
    assert "No value on one side: layer 1 (mean)" in flat(printed(one))
    # A row without values has a dozen cells, which must not hide the others.
    assert [distance(cell) is None for cell in worst_cells(one)] == [False] * 15 + [True]


def test_a_changed_count_ranks_worst() -> None:
    names = [cell.statistic for cell in moved().cells]
    record = with_cell(
        moved(),
        names.index("count"),
        obtained=191.0,
        difference=-1.0,
        standardized=None,
        verdict="FAIL",
    )
    assert distance(record.cells[names.index("count")]) == -math.inf
    row = table(printed(record))[0]
    assert [row[name] for name in ("statistic", "expected", "obtained", "moved", "tolerance")] == [
        *("count", "192", "191", "-1", "0")
    ]
    assert "No value" not in printed(record)


def test_other_sequences_show_interval_and_margin() -> None:
    record = mixed()
    for row, cell in zip(table(printed(record)), worst_cells(record), strict=False):
        low, _, high = row["interval"].partition("..")
        assert cell.interval is not None
        assert close(low, cell.interval[0])
        assert close(high, cell.interval[1])
    assert "6 cells beyond margin, 10 undecided; showing the worst 10" in printed(record)
    # A decided comparison needs no more sequences.
    assert "To decide" not in printed(record)


def test_undecided_cells_name_the_number_of_sequences_needed() -> None:
    record = other_text()
    undecided = [n for n, cell in enumerate(record.cells) if cell.verdict == "INCONCLUSIVE"]
    needed = [record.cells[number].needed for number in undecided]
    counts = [count for count in needed if count is not None]
    assert len(counts) == len(needed)
    text = flat(printed(record))
    assert f"To decide measure {max(counts):,} new sequences (now: 12)" in text
    assert "11 cells undecided; showing the worst 10" in text
    for number in undecided[1:]:
        record = with_cell(record, number, needed=None)
    text = flat(printed(record))
    assert f"1 of the 11 undecided cells need {counts[0]:,} new sequences (now: 12)" in text
    assert "no number would suffice, because the baseline's 400 sequences are too few" in text
    record = with_cell(record, undecided[0], needed=None)
    text = flat(printed(record))
    assert "To decide no number of new sequences would suffice, because the baseline's 400" in text


def test_not_comparable_shows_both_sides_and_the_remedy_without_numbers() -> None:
    text = printed(foreign())
    assert "model.dtype expected float32, got bfloat16; run with" in flat(text)
    assert "the baseline's --dtype" in flat(text)
    assert not table(text)
    assert "cells" not in text
    hashes = ("sha256:" + "0123456789abcdef" * 4, "f" * 64)
    about = provenance(tokenizer_hash=hashes[0], model__revision=hashes[1])
    text = flat(printed(compare(a_profile(about=about), a_profile()).record()))
    assert "tokenizer_hash expected t, got sha256:0123456789ab...; restore the tokenizer" in text
    assert "model.revision expected none, got ffffffffffff...; pin --revision" in text


def test_a_gate_shows_after_how_many_tokens_it_decided() -> None:
    assert "Decided after 128 of at most 128 tokens" in flat(printed(of_a_model("clean")))
    assert "Decided after 16 of at most 128 tokens" in flat(printed(of_a_model("broken")))
    text = flat(printed(of_a_model("other words")))
    assert "Undecided after 128 of at most 128 tokens" in text
    assert "after" not in printed(clean())


def test_a_gate_shows_what_was_decoded_and_that_it_agrees() -> None:
    words = flat(printed(of_a_model("clean")))
    assert "Decoding 8 tokens of 2 sequences in 6 cached steps agree with the prefill" in words
    assert "largest difference" in words
    assert "Decoding" not in printed(of_a_model("broken"))


def test_a_failure_of_decoding_names_layer_and_step_and_lists_the_passes() -> None:
    words = flat(printed(of_a_model("decoding")))
    assert words.startswith(
        "FAIL: decoding differs from the prefill from layer 3 on; prefill: no drift: all "
    )
    assert "Likely cause decoding: cached step 1 (token 9 alone) is the first that differs" in words
    assert "Decoding compared with the prefill" in words
    for row in (
        "step tokens largest difference first layer what ran",
        "e-07 none the tokens that fill the KV cache 1 9 ",
        " a draft at once, 2 more rejected 5 15 ",
        "3 one token after the draft",
    ):
        assert row in words


def test_an_error_in_decoding_is_shown_with_step_and_layer() -> None:
    words = flat(printed(of_a_model("decoding raises")))
    assert words.startswith("FAIL: decoding raises an error; prefill: no drift: ")
    assert (
        "cached step 1 raises an error in layer 3, the prefill does not: RuntimeError: no page is "
        "left"
    ) in words
    assert " none the tokens that fill the KV cache 1 error 3" in words


def test_what_of_decoding_was_not_checked_is_said_with_the_reason() -> None:
    record = of_a_model("clean")
    decoding = record.decoding
    assert isinstance(decoding, DecodingRecord)
    singly = changed(record, decoding=changed(decoding, reason="only single tokens ran: layer 1"))
    words = flat(printed(singly))
    assert "Note decoding: only single tokens ran: layer 1" in words
    unchecked = changed(decoding, verdict="NOT CHECKED", passes=[], reason="no KV cache")
    words = flat(printed(changed(record, decoding=unchecked)))
    assert "Not checked decoding: no KV cache" in words
    assert "agree with the prefill" not in words


def test_a_widened_tolerance_is_noted_even_on_a_pass() -> None:
    record = elsewhere()
    assert record.verdict == "PASS"
    for shown in (record, a_session(record)):
        assert (
            "Note the baseline was made in another environment (processor B instead of A); "
            "tolerance" in flat(printed(shown))
        )


def test_the_provenance_takes_two_lines_and_the_second_shows_only_differences() -> None:
    lines = printed(clean(), width=200).splitlines()
    assert lines[-2:] == [
        "Measured  tiny (float32 on cpu) on corpus words; A, torch 2.13.0",
        "Baseline  the same model, corpus, machine and versions",
    ]
    about = provenance(versions__torch="2.14.0", machine__threads=3, command="another")
    lines = printed(compare(a_profile(about=about), a_profile()).record(), width=200).splitlines()
    assert lines[-1] == "Baseline  the same except threads 2, torch 2.13.0"
    # The mismatch itself is shown above.
    assert "Baseline otherwise the same" in flat(printed(foreign()))
    many = provenance(versions={f"library{number}": "1" for number in range(9)})
    text = flat(printed(compare(a_profile(about=many), a_profile()).record()))
    assert "the same except cascade-exit 0.1.0, torch 2.13.0, library0 none" in text
    assert "and 6 more" in text


def test_a_comparison_without_provenance_is_shown() -> None:
    record = changed(moved(), provenance=None, baseline=None)
    assert "Measured" not in printed(record)
    assert "Baseline" not in printed(record)
    about = changed(provenance(), model=ModelProvenance())
    assert "Measured None (None on None)" in flat(printed(changed(record, provenance=about)))


def test_a_failed_comparison_shows_only_its_reason() -> None:
    record = changed(Comparison(None).record(), headline="the baseline is torn")
    assert printed(record) == "NOT COMPARABLE: the baseline is torn\n"
    assert "NOT COMPARABLE: tiny/words: the baseline is torn" in printed(a_session(record))
    for form in (report_markdown, report_page):
        assert "the baseline is torn" in form(a_session(record))


def test_colours_only_add_to_the_text() -> None:
    for kind, code in (
        ("clean", "32"),
        ("moved", "1;31"),
        ("other text", "33"),
        ("foreign", "1;31"),
    ):
        record = KINDS[kind]()
        coloured = printed(record, force_terminal=True, color_system="standard")
        assert coloured.startswith(f"\x1b[{code}m{record.verdict}\x1b[0m: ")


def test_control_characters_and_markup_of_a_record_are_escaped() -> None:
    notes = ["\x07[b]note[/b]"]
    record = changed(moved(), headline="[red]drift[/red]\x1b[31m", notes=notes)
    text = printed(record)
    assert "[red]drift[/red]\\x1b[31m" in text
    assert "\\x07[b]note[/b]" in text
    assert not {"\x1b", "\x07"} & set(text)


# --- A session -------------------------------------------------------------------------------


def test_a_session_begins_with_its_verdict_and_an_overview() -> None:
    assert flat(printed(a_full_session())).startswith(
        "FAIL: 4 comparisons (1 FAIL, 1 NOT COMPARABLE, 1 INCONCLUSIVE, 1 PASS); 3 budget files "
        "(1 FAIL, 1 NOT COMPARABLE, 1 PASS); 1 baseline missing; 1 baseline regenerated; 1 "
        "baseline unused PASS: tiny/words: no drift"
    )
    assert printed(a_session(clean())).startswith("PASS: 1 comparison\n")
    both = a_session(clean(), elsewhere(), unused=["a", "b"])
    assert printed(both).startswith("PASS: 2 comparisons, all PASS; 2 baselines unused\n")


def test_a_session_without_comparisons_is_inconclusive() -> None:
    assert printed(a_session()) == "INCONCLUSIVE: nothing was compared with a baseline\n"


def test_a_session_shows_every_comparison_budget_and_baseline() -> None:
    text = flat(printed(a_full_session()))
    for part in (
        "PASS: tiny/words: no drift",
        "FAIL: tiny/words: drift in",
        "Baseline baselines/tiny/words.saturation.json",
        "PASS: tiny/texts: 3 operating points within budget",
        "FAIL: tiny/texts: 2 early-exit budgets exceeded",
        "agreement at least 0.897 0.5000 layer 3, cosine >= 0.95, logit_lens",
        "To inspect `cascade evaluate --point 3:cosine:0.95`",
        "NOT COMPARABLE: tiny/texts: other heads",
        "Missing baselines/a.json; create it with `cascade analyze --output a | tee b`",
        "Regenerated baselines/b.json; review and commit it",
        "Unused baselines/c.json; no test of this session used it",
    ):
        assert part in text
    # Shown once, although two budgets were exceeded.
    assert text.count("cascade evaluate") == 1
    one = changed(BUDGET, overruns=BUDGET.overruns[:1])
    assert "1 early-exit budget exceeded" in flat(printed(a_session(budgets=[one])))


def test_a_session_is_short() -> None:
    assert len(table(printed(a_session(moved())))) == 3
    assert "15 cells beyond tolerance; showing the worst 3" in printed(a_session(moved()))
    assert len(printed(a_session(*[clean()] * 10)).splitlines()) <= 1 + 10 * 3


def test_a_torn_session_is_refused(tmp_path: Path) -> None:
    report = to_plain(a_session(clean(), budgets=[KEPT, REFUSED]))
    assert from_plain(report, SessionRecord).verdict == "NOT COMPARABLE"
    for place in ("unused", "cells"):
        broken = copy.deepcopy(report)
        del (broken if place == "unused" else broken["comparisons"][0])[place]
        with pytest.raises(SchemaError, match=place):
            from_plain(broken, SessionRecord)
    broken = copy.deepcopy(report)
    del broken["budgets"][1]["reason"]
    with pytest.raises(SchemaError, match="reason"):
        from_plain(broken, SessionRecord)
    broken = copy.deepcopy(report)
    broken["comparisons"][0]["cells"][0]["expected"] = math.nan
    with pytest.raises(SchemaError, match="NaN"):
        from_plain(broken, SessionRecord)
    write_record(tmp_path / "report.json", report | {"schema": 2})
    with pytest.raises(RecordError, match="has schema 2, this release reads up to 1"):
        read_typed(tmp_path / "report.json", SessionRecord)


# --- Any record ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(record=comparisons(), name=st.text(max_size=80))
def test_any_record_is_printed(record: Record, name: str) -> None:
    text = printed(record)
    assert text.startswith(f"{record.verdict}: ")
    assert len(table(text)) <= 10
    assert printed(session_record([named(record, name)]))


@settings(max_examples=40, deadline=None)
@given(record=comparisons(most=3))
def test_any_cell_has_one_text_per_column_and_none_for_missing_values(record: Record) -> None:
    for cell in record.cells:
        row = cell_row(record, cell)
        assert len(row) == 7 + (record.method == "other sequences")
        assert (row[2] == "none") is (cell.expected is None)
        assert (row[4] == "none") is (cell.difference is None)
