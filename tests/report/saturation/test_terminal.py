"""A profile in the terminal: every number of the record, readable on 80 columns."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from support.build_profile_records import (
    STATISTICS,
    a_full_record,
    a_record,
    printed,
    section,
    typed,
)

from cascade.report.saturation.terminal import print_profile

EIGHTHS = {"█": 8, "▉": 7, "▊": 6, "▋": 5, "▌": 4, "▍": 3, "▎": 2, "▏": 1, "▐": 4}


def bar_rows(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in section(text, "Mean similarity")}


def special_layers(text: str) -> str:
    """Return the text below "Special layers": a sentence, then labels and texts."""
    return text.split("\nSpecial layers\n", 1)[1].split("\n\nSuggested thresholds", 1)[0]


def bar_length(line: str) -> int:
    """Return the signed length of a drawn bar, in eighths of a cell."""
    before, _, after = line.partition("│")
    right = sum(EIGHTHS.get(character, 0) for character in after)
    return right - sum(EIGHTHS.get(character, 0) for character in before)


def test_every_layer_is_printed_once_and_in_order_with_the_norm_row_last() -> None:
    record = a_full_record()
    lines = section(printed(record), "Similarity of input and output, per layer")[2:]
    assert [line.split()[0] for line in lines] == [row["layer"] for row in record["layers"]]
    assert lines[-1].split()[0] == "30+norm"


def test_the_printed_numbers_are_those_of_the_record() -> None:
    record = a_full_record()
    lines = section(printed(record), "Similarity of input and output, per layer")
    assert lines[0].split() == ["Layer", *STATISTICS, "role"]
    for line, row in zip(lines[2:], record["layers"], strict=True):
        assert line.split()[1:8] == [f"{row[name]:.4f}" for name in STATISTICS]


def test_only_active_layers_show_a_role() -> None:
    lines = section(printed(a_full_record()), "Similarity of input and output, per layer")[2:]
    roles = {line.split()[0]: " ".join(line.split()[8:]) for line in lines}
    assert {layer: role for layer, role in roles.items() if role} == {
        "1": "input transform",
        "2": "input transform",
        "25": "dip",
        "30": "output transform",
        "30+norm": "output transform",
    }


def test_a_mean_that_rounds_to_zero_has_no_minus_sign() -> None:
    text = printed(a_record([-0.00001, 0.95]))
    assert "-0.0000" not in text


def test_the_outlier_table_shows_a_tiny_share_as_more_than_zero() -> None:
    lines = section(printed(a_full_record()), "Outliers: share of tokens")[2:]
    assert [line.split() for line in lines] == [
        ["1", "36.77%", "100.00%"],
        ["12", "<0.01%", "0.78%"],
    ]


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (1e-9, "<0.01%"),
        (0.0000499, "<0.01%"),
        (0.00005, "0.01%"),
        (0.0078, "0.78%"),
        (0.9999, "99.99%"),
        (0.99999, ">99.99%"),
        (1.0, "100.00%"),
    ],
)
def test_a_share_is_shown_as_0_or_100_percent_only_if_exact(share: float, shown: str) -> None:
    record = a_record([0.9, 0.95])
    record["layers"][1]["frac_below_half"] = share
    lines = section(printed(record), "Outliers: share of tokens")[2:]
    assert [line.split() for line in lines] == [["2", "0.00%", shown]]


def test_a_profile_without_outliers_has_a_sentence() -> None:
    lines = section(printed(a_record([0.9, 0.95])), "Outliers: share of tokens")
    assert lines == ["No token lies below 0.5 in any layer."]


@pytest.mark.parametrize("normed", [0.08, -0.09])
def test_bar_length_grows_with_the_mean_on_both_sides_of_zero(normed: float) -> None:
    record = a_full_record(normed=normed)
    lines = bar_rows(printed(record))
    means = {row["layer"]: row["mean"] for row in record["layers"]}
    ordered = sorted(means, key=lambda layer: means[layer])
    lengths = [bar_length(lines[layer]) for layer in ordered]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 10
    assert (bar_length(lines["30+norm"]) < 0) == (normed < 0)


def test_bar_lengths_are_in_proportion_to_the_means() -> None:
    lines = bar_rows(printed(a_record([0.25, 0.5, 1.0], normed=-0.5)))
    full = bar_length(lines["3"])
    assert full > 200
    # Eighths of a cell to the right, halves to the left: half of that is the rounding.
    assert bar_length(lines["1"]) == pytest.approx(full / 4, abs=0.5)
    assert bar_length(lines["2"]) == pytest.approx(full / 2, abs=0.5)
    assert bar_length(lines["3+norm"]) == pytest.approx(-full / 2, abs=2)


def test_bars_share_one_zero_line_and_a_tiny_mean_is_visible() -> None:
    lines = bar_rows(printed(a_record([0.0001, -0.1, 0.9], normed=-0.3)))
    assert len({line.index("│") for line in lines.values()}) == 1
    assert bar_length(lines["1"]) > 0


def test_roles_are_aligned_next_to_the_bars() -> None:
    lines = bar_rows(printed(a_full_record(normed=-0.09)))
    marked = {layer: line.index("(") for layer, line in lines.items() if "(" in line}
    assert set(marked) == {"1", "2", "25", "30", "30+norm"}
    assert len(set(marked.values())) == 1


@pytest.mark.parametrize("width", [80, 100, 132])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("normed", [0.08, -0.95])
def test_no_line_is_longer_than_the_console(width: int, encoding: str, normed: float) -> None:
    record = a_full_record(normed=normed)
    record["structure"]["rule"] = "A long rule " * 30
    lines = printed(record, width=width, encoding=encoding).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)


def test_a_narrow_console_cuts_no_number_short() -> None:
    text = printed(a_full_record(), width=50)
    assert "…" not in text
    assert f"{a_full_record()['layers'][29]['max']:.4f} output transform" in text


def test_piped_output_holds_no_escape_codes_and_a_terminal_gets_the_same_text() -> None:
    record = a_full_record()
    plain = printed(record)
    assert "\x1b" not in plain
    stream = io.StringIO()
    print_profile(typed(record), Console(file=stream, width=80, force_terminal=True))
    styled = stream.getvalue()
    active = [line for line in styled.splitlines() if line.startswith("\x1b[33m")]
    assert ["25" in line for line in active if "dip" in line] == [True, True]
    assert re.sub(r"\x1b\[[0-9;]*m", "", styled) == plain


def test_an_ascii_stream_gets_the_same_tables_without_box_characters() -> None:
    text, plain = printed(a_full_record()), printed(a_full_record(), encoding="ascii")
    assert text.replace("─", "-").split("\nMean")[0] == plain.split("\nMean")[0]
    assert "2  0.8175 |####" in plain


def test_markup_in_a_name_is_printed_as_it_is() -> None:
    record = a_full_record()
    record["provenance"]["model"]["name"] = "[red]x[/red] :smile: [/nothing]"
    assert "[red]x[/red] :smile: [/nothing]" in printed(record)


def test_the_headline_names_model_corpus_and_run() -> None:
    head = printed(a_full_record()).split("\n\n")[0]
    words = ("tiny-llama", "llama", "30 decoder", "embedded", "1,000 tokens", "125 sequences x 8")
    for word in (*words, "float32 on cpu"):
        assert word in head
    assert "None" not in head


def test_special_layers_are_described_with_rule_and_source() -> None:
    text = special_layers(printed(a_full_record(), width=300))
    assert text.startswith("Hidden states are saturated in layers 3 to 24 and 26 to 29, where ")
    assert re.search(r"Stable bands +3 to 24 and 26 to 29\n", text)
    assert re.search(r"Input transform +1 \(mean 0\.0068\) and 2 \(mean 0\.8175\)\n", text)
    assert re.search(r"Dips +25 \(mean 0\.8316\)\n", text)
    assert re.search(r"layer 30 itself .* 0\.7101; .* \(row 30\+norm\) it is 0\.0800\.", text)
    assert "below 0.9146 is active" in text
    assert "A layer is active when its mean lies far below the median." in text
    assert "A citation, 2013" in text


def test_absent_special_layers_are_said_to_be_none() -> None:
    text = special_layers(printed(a_record([0.9, 0.95])))
    for label in ("Input transform", "Dips", "Output transform"):
        assert re.search(rf"{label} +none$", text, flags=re.MULTILINE)
    assert "Final norm" not in text


def test_a_stable_band_of_one_layer_is_not_a_range() -> None:
    record = a_record([0.9, 0.95])
    record["structure"]["stable_bands"] = [["2", "2"]]
    assert re.search(r"Stable bands +2\n", printed(record))


def test_thresholds_say_which_states_they_compare_and_who_goes_on() -> None:
    text = printed(a_full_record(), width=300).split("\nSuggested thresholds\n")[1]
    assert "Exit layer 29, input and output (history[28] against history[29])." in text
    assert "Hard: similarity < threshold, the token continues." in text
    assert "Easy: similarity >= threshold, the token exits." in text
    assert re.search(r"30% +0\.944312 +30% continue, 70% exit", text)
    assert re.search(r"70% +0\.956288 +70% continue, 30% exit", text)


def test_absent_thresholds_are_said_to_be_none() -> None:
    record = a_record([0.9, 0.95])
    record["thresholds"] = {"exit_layer": "1", "by_hard_ratio": []}
    assert printed(record).endswith("\nSuggested thresholds\nnone\n")
