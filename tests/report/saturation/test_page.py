"""The reports show the record's numbers, all of them, readably and safely."""

from __future__ import annotations

import copy
import functools
import io
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.html import Page, ids, svgs

from cascade.report.saturation.figures import density_svg, layer_profile_svg
from cascade.report.saturation.page import profile_page
from cascade.report.saturation.terminal import print_profile

BINS = 6144
STATISTICS = ("mean", "std", "min", "p10", "p50", "p90", "max")
EIGHTHS = {"█": 8, "▉": 7, "▊": 6, "▋": 5, "▌": 4, "▍": 3, "▎": 2, "▏": 1, "▐": 4}


def a_row(layer: str, mean: float, *, width: float = 0.04) -> dict[str, Any]:
    """Return one layer's statistics, every number of which is different at four decimals."""
    return {
        "layer": layer,
        "count": 1000,
        "mean": mean,
        "std": width / 3.7,
        "min": max(-1.0, mean - 4.1 * width),
        "p10": mean - width,
        "p50": mean + width / 9,
        "p90": min(0.997, mean + width / 1.3),
        "max": min(0.999, mean + 1.2 * width),
        "frac_negative": 0.0,
        "frac_below_half": 0.0,
    }


def a_record(means: list[float], *, normed: float | None = None) -> dict[str, Any]:
    """Return a record with one decoder layer per mean, no layer of which is active."""
    names = [str(layer) for layer in range(1, len(means) + 1)]
    rows = [a_row(name, mean) for name, mean in zip(names, means, strict=True)]
    if normed is not None:
        rows.append(a_row(f"{names[-1]}+norm", normed, width=0.2))
    return {
        "schema": 2,
        "kind": "saturation",
        "provenance": {
            "model": {
                "source": "tiny",
                "name": "tiny-llama",
                "family": "llama",
                "revision": None,
                "weights_hash": "sha256:11aa",
                "quantization": None,
                "num_layers": len(means),
                "hidden_size": 32,
                "dtype": "float32",
                "device": "cpu",
                "attention": "sdpa",
            },
            "tokenizer_hash": "sha256:22bb",
            "corpus": {
                "source": "embedded",
                "name": "embedded",
                "fingerprint": "sha256:33cc",
                "records": 20,
                "tokens": 1000,
                "sequences": 125,
                "seq_len": 8,
            },
            "machine": {"processor": "a processor", "threads": 2},
            "versions": {"cascade": "0.1.0", "torch": "2.13.0"},
            "command": "cascade analyze tiny",
        },
        "layers": rows,
        "structure": {
            "rule": "A layer is active when its mean lies far below the median.",
            "source": "A citation, 2013",
            "cutoff": 0.9146,
            "input_transform": [],
            "dips": [],
            "output_transform": [],
            "stable_bands": [[names[0], names[-1]]],
        },
        "thresholds": {
            "exit_layer": names[-2],
            "by_hard_ratio": [
                {"hard_ratio": 0.3, "threshold": 0.944312},
                {"hard_ratio": 0.7, "threshold": 0.956288},
            ],
        },
    }


def a_full_record(*, normed: float = 0.08) -> dict[str, Any]:
    """Return a record with every role and with outliers, shaped like SmolLM2-135M's."""
    means = [0.0068, 0.8175, *(0.955 + 0.0007 * layer for layer in range(3, 30)), 0.7101]
    means[24] = 0.8316
    record = a_record(means, normed=normed)
    record["structure"].update(
        input_transform=["1", "2"],
        dips=["25"],
        output_transform=["30", "30+norm"],
        stable_bands=[["3", "24"], ["26", "29"]],
    )
    record["layers"][0].update(frac_negative=0.3677, frac_below_half=1.0)
    record["layers"][11].update(frac_negative=0.00002, frac_below_half=0.0078)
    return record


def some_arrays(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return histograms with tokens between p10 and p90 and one at min and max."""
    histogram = np.zeros((len(record["layers"]), BINS), dtype=np.int64)
    for counts, row in zip(histogram, record["layers"], strict=True):
        inner = np.linspace(row["p10"], row["p90"], row["count"] - 2)
        values = np.clip([row["min"], *inner, row["max"]], -1, 1)
        bins = np.minimum(np.arccos(values) / np.pi * BINS, BINS - 1).astype(int)
        np.add.at(counts, bins, 1)
    return {"layers": np.array([row["layer"] for row in record["layers"]]), "histogram": histogram}


@functools.cache
def full_drawings() -> tuple[str, str]:
    """Return both drawings of the full record, drawn once for all tests that only read them."""
    record = a_full_record()
    return layer_profile_svg(record), density_svg(record, some_arrays(record))


@functools.cache
def full_page() -> str:
    record = a_full_record()
    return profile_page(record, some_arrays(record))


def printed(record: dict[str, Any], *, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.BytesIO()
    file = io.TextIOWrapper(stream, encoding=encoding)
    print_profile(record, Console(file=file, width=width))
    file.flush()
    return stream.getvalue().decode(encoding)


def section(text: str, heading: str) -> list[str]:
    """Return the printed lines below a heading, up to the next blank line."""
    below = text.split(f"\n{heading}\n", 1)[1]
    return below.split("\n\n", 1)[0].splitlines()


def bar_rows(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in section(text, "Mean similarity")}


def bar_length(line: str) -> int:
    """Return the signed length of a drawn bar, in eighths of a cell."""
    before, _, after = line.partition("│")
    right = sum(EIGHTHS.get(character, 0) for character in after)
    return right - sum(EIGHTHS.get(character, 0) for character in before)


# --- Terminal --------------------------------------------------------------------------------


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


def test_active_layers_carry_their_role_in_words_and_others_carry_none() -> None:
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
def test_a_share_is_neither_none_nor_all_unless_it_is(share: float, shown: str) -> None:
    record = a_record([0.9, 0.95])
    record["layers"][1]["frac_below_half"] = share
    lines = section(printed(record), "Outliers: share of tokens")[2:]
    assert [line.split() for line in lines] == [["2", "0.00%", shown]]


def test_without_outliers_the_table_says_none() -> None:
    assert section(printed(a_record([0.9, 0.95])), "Outliers: share of tokens") == ["none"]


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


def test_every_bar_starts_at_the_same_zero_line_and_a_tiny_mean_is_seen() -> None:
    lines = bar_rows(printed(a_record([0.0001, -0.1, 0.9], normed=-0.3)))
    assert len({line.index("│") for line in lines.values()}) == 1
    assert bar_length(lines["1"]) > 0


def test_roles_stand_in_one_column_beside_the_bars() -> None:
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
    print_profile(record, Console(file=stream, width=80, force_terminal=True))
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


def test_special_layers_are_said_in_words_with_rule_and_source() -> None:
    text = "\n".join(section(printed(a_full_record(), width=300), "Special layers"))
    assert re.search(r"Stable bands +3 to 24 and 26 to 29\n", text)
    assert re.search(r"Input transform +1 \(mean 0\.0068\) and 2 \(mean 0\.8175\)\n", text)
    assert re.search(r"Dips +25 \(mean 0\.8316\)\n", text)
    assert re.search(r"layer 30 itself .* 0\.7101; .* \(row 30\+norm\) it is 0\.0800\.", text)
    assert "below 0.9146 is active" in text
    assert "A layer is active when its mean lies far below the median." in text
    assert "A citation, 2013" in text


def test_absent_special_layers_are_said_to_be_none() -> None:
    text = "\n".join(section(printed(a_record([0.9, 0.95])), "Special layers"))
    for label in ("Input transform", "Dips", "Output transform"):
        assert re.search(rf"{label} +none$", text, flags=re.MULTILINE)
    assert "Final norm" not in text


def test_a_stable_band_of_one_layer_is_not_a_range() -> None:
    record = a_record([0.9, 0.95])
    record["structure"]["stable_bands"] = [["2", "2"]]
    assert re.search(r"Stable bands +2\n", printed(record))


def test_thresholds_say_which_states_they_compare_and_who_goes_on() -> None:
    text = printed(a_full_record(), width=300).split("\nSuggested thresholds\n")[1]
    assert "Exit layer 29, history[28] against history[29]." in text
    assert "Hard: similarity < threshold, the token goes on." in text
    assert "Easy: similarity >= threshold, the token exits." in text
    assert re.search(r"30% +0\.944312 +30% go on, 70% exit", text)
    assert re.search(r"70% +0\.956288 +70% go on, 30% exit", text)


def test_absent_thresholds_are_said_to_be_none() -> None:
    record = a_record([0.9, 0.95])
    record["thresholds"] = {"exit_layer": None, "by_hard_ratio": []}
    assert printed(record).endswith("\nSuggested thresholds\nnone\n")


# --- Plots -----------------------------------------------------------------------------------


def test_the_same_record_gives_the_same_bytes_whatever_the_users_style() -> None:
    import matplotlib

    record = a_full_record()
    arrays = some_arrays(record)
    first = layer_profile_svg(record), density_svg(record, arrays), profile_page(record, arrays)
    record = copy.deepcopy(record)
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "ytick.labelsize": 20}):
        again = layer_profile_svg(record), density_svg(record, arrays), profile_page(record, arrays)
        assert matplotlib.rcParams["font.size"] == 20
    assert first == again


def test_another_record_gives_another_drawing() -> None:
    record, other = a_full_record(), a_full_record()
    other["layers"][6]["mean"] -= 0.01
    assert layer_profile_svg(record) != layer_profile_svg(other)
    arrays, others = some_arrays(record), some_arrays(record)
    others["histogram"][6] = others["histogram"][24]
    assert density_svg(record, arrays) != density_svg(record, others)


def test_two_drawings_share_no_id_and_every_reference_has_its_target() -> None:
    profile, density = full_drawings()
    assert not set(ids(profile)) & set(ids(density))
    for svg in (profile, density):
        assert len(ids(svg)) == len(set(ids(svg))) > 10
        references = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        assert references
        assert references <= set(ids(svg))


def test_drawings_are_small_and_the_heat_map_is_an_image() -> None:
    profile, density = full_drawings()
    assert len(profile) < 300_000
    assert len(density) < 300_000
    assert "data:image/png;base64," in density


def test_a_drawing_is_labelled_and_styles_only_itself() -> None:
    svg = full_drawings()[0]
    _, root = Page(svg).tags[0]
    assert root["role"] == "img"
    assert "saturated in layers 3 to 24 and 26 to 29" in str(root["aria-label"])
    assert re.findall(r"<style[^>]*>(.*?)\{", svg) == ["#layer-profile *"]


def test_every_layer_role_and_cutoff_is_named_in_the_line_chart() -> None:
    texts = [text.strip() for text in Page(full_drawings()[0]).texts]
    assert {str(layer) for layer in range(1, 31)} <= set(texts)
    for text in ("+norm", "stable 3-24", "stable 26-29", "cutoff 0.9146", "dip", "layer 25"):
        assert text in texts
    assert "0.8316" in texts


def test_a_long_name_does_not_run_out_of_the_drawing() -> None:
    record = a_record([0.9, 0.95])
    record["provenance"]["model"]["name"] = "models/" * 40
    texts = Page(layer_profile_svg(record)).texts
    assert any(text.startswith("models/models/") and "... on embedded:" in text for text in texts)
    assert max(map(len, texts)) < 110


def test_many_layers_get_thinned_labels() -> None:
    texts = [text.strip() for text in Page(layer_profile_svg(a_record([0.95] * 80))).texts]
    assert {"1", "5", "75", "80"} <= set(texts)
    assert not {"2", "77", "79"} & set(texts)


def test_similarity_one_is_at_the_top_of_both_drawings() -> None:
    for svg in full_drawings():
        heights = {
            text: float(y)
            for y, text in re.findall(
                r'<text [^>]*?y="([\d.]+)"[^>]*>(-?[01](?:\.\d+)?)</text>', svg
            )
        }
        assert heights["0.99"] < heights["0.9"] < heights["0.5"] < heights["0"]


def test_the_density_axis_is_cropped_to_the_range_in_use() -> None:
    record = a_record([0.95, 0.96])
    texts = [text.strip() for text in Page(density_svg(record, some_arrays(record))).texts]
    assert "0.9" in texts
    assert not {"0", "0.5", "-1"} & set(texts)


def test_equal_tokens_still_get_a_colour_scale_and_an_axis() -> None:
    record = all_equal(0.7312)
    drawn = density_svg(record, some_arrays(record))
    texts = [text.strip() for text in Page(drawn).texts]
    assert {"10%", "100%", "0.72", "0.73", "0.74"} <= set(texts)


def test_rebinning_for_display_loses_no_token() -> None:
    from cascade.report.saturation.figures import _rebinned

    generator = np.random.default_rng(0)
    for low, high in ((0, BINS), (0, 1), (BINS - 1, BINS), (17, 1500), (300, 419), (6000, BINS)):
        histogram = np.zeros((3, BINS), dtype=np.int64)
        histogram[:, low:high] = generator.integers(0, 9, (3, high - low))
        histogram[:, low] = histogram[:, high - 1] = 1
        shares, edges = _rebinned(histogram)
        assert shares.sum(axis=1) == pytest.approx(1.0)
        assert len(edges) == shares.shape[1] + 1 <= 122
        # The edges enclose what they must, and lie where the bins lie.
        # (A tenth of a bin: room for the last bit of a float.)
        first, last = edges[0] / np.pi * BINS, edges[-1] / np.pi * BINS
        assert first <= low + 0.1
        assert high - 0.1 <= last <= BINS + 0.1
        for share, counts in zip(shares, histogram, strict=True):
            expected, _ = np.histogram(
                (np.arange(BINS) + 0.5) * np.pi / BINS, edges, weights=counts
            )
            assert share * counts.sum() == pytest.approx(expected)


# --- Page ------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    record = a_full_record()
    record["provenance"]["corpus"]["source"] = "https://example.org/corpus"
    page = profile_page(record, some_arrays(record))
    references = [
        str(value)
        for _, tag in Page(page).tags
        for name, value in tag.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "rdf:resource")
    ]
    assert any(reference.startswith("data:") for reference in references)
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert not {tag for tag, _ in Page(page).tags} & {"script", "link", "iframe", "img", "a"}
    assert not re.findall(r"@import|url\((?!#)|<!DOCTYPE svg", page)


def test_the_page_is_well_nested_and_its_ids_are_unique() -> None:
    page = full_page()
    parsed = Page(page)
    assert parsed.misnested == []
    assert parsed.open == []
    assert len(ids(page)) == len(set(ids(page)))
    assert len(svgs(page)) == 2
    assert not set(ids(svgs(page)[0])) & set(ids(svgs(page)[1]))


def test_everything_of_the_record_is_escaped() -> None:
    nasty = "<script>alert('x')</script>\"&amp;<b>"
    record = a_full_record()

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()}
        return nasty if isinstance(value, str) or value is None else value

    record["provenance"] = poison(record["provenance"])
    record["provenance"]["machine"][nasty] = 1
    record["structure"]["rule"] = record["structure"]["source"] = nasty
    page = profile_page(record, some_arrays(record))
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "b"}
    assert parsed.misnested == []
    # Shown as it is, in heading, table and definition list, not swallowed.
    assert parsed.texts.count(nasty) >= 15


def test_the_page_shows_the_records_numbers() -> None:
    record = a_full_record()
    rows = Page(full_page()).rows
    for row in record["layers"]:
        expected = [row["layer"], *(f"{row[name]:.4f}" for name in STATISTICS)]
        assert [cells[:8] for cells in rows].count(expected) == 1
    assert ["12", "<0.01%", "0.78%"] in rows
    assert ["30%", "0.944312", "30% go on, 70% exit"] in rows


def test_the_page_begins_with_what_was_found() -> None:
    text = " ".join("".join(Page(full_page()).texts).split())
    found = text.index(
        "Hidden states are saturated in layers 3 to 24 and 26 to 29: there, every layer's mean "
        "similarity is at least 0.9146. Active layers: input transform in 1 and 2; dip in 25; "
        "output transform in 30 and 30+norm."
    )
    norm = text.index(
        "Layer 30 itself has a mean similarity of 0.7101; read behind the final norm "
        "(row 30+norm) it is 0.0800. The difference is made by the norm, not by the layer."
    )
    assert found < norm < text.index("Similarity per layer")


def test_every_entry_of_the_provenance_is_on_the_page() -> None:
    rows = Page(full_page()).rows
    for row in (
        ["weights hash", "sha256:11aa"],
        ["revision", "not recorded"],
        ["tokenizer hash", "sha256:22bb"],
        ["tokens", "1,000"],
        ["threads", "2"],
        ["torch", "2.13.0"],
        ["command", "cascade analyze tiny"],
    ):
        assert row in rows


def test_tables_have_captions_and_scopes_and_figures_have_labels() -> None:
    tags = Page(full_page()).tags
    names = [name for name, _ in tags]
    assert names.count("table") == names.count("caption") == 4
    assert names.count("figure") == names.count("figcaption") == 2
    assert names.count("h1") == 1
    assert {str(tag.get("scope")) for name, tag in tags if name == "th"} == {
        "col",
        "row",
        "rowgroup",
    }
    assert all(tag.get("aria-label") for name, tag in tags if name == "svg")


def test_colours_of_the_page_follow_the_readers_scheme() -> None:
    page = full_page()
    assert "prefers-color-scheme: dark" in page
    used = set(re.findall(r"var\((--[a-z]+)\)", page))
    root = re.findall(r":root \{(.*?)\}", page)
    assert len(root) == 2
    for variables in root:
        assert used <= set(re.findall(r"(--[a-z]+):", variables))
    # A colour written out in a drawing would stay light in the dark.
    assert not any(re.search(r"#[0-9a-f]{6}\b", svg) for svg in svgs(page))


# --- All kinds of records --------------------------------------------------------------------


def two_layers() -> dict[str, Any]:
    record = a_record([0.1, 0.9])
    record["structure"].update(cutoff=None, stable_bands=[])
    return record


def all_equal(value: float) -> dict[str, Any]:
    record = a_record([value] * 5)
    for row in record["layers"]:
        row.update(dict.fromkeys(("mean", "min", "p10", "p50", "p90", "max"), value), std=0.0)
    record["structure"].update(cutoff=None, stable_bands=[])
    return record


def without_stable_bands() -> dict[str, Any]:
    record = a_record([0.1, 0.9, 0.2], normed=-0.4)
    record["structure"]["stable_bands"] = []
    return record


def many_dips() -> dict[str, Any]:
    record = a_record([0.8, 0.95] * 50, normed=0.3)
    record["structure"].update(
        dips=[str(layer) for layer in range(1, 100, 2)],
        stable_bands=[[str(layer)] * 2 for layer in range(2, 101, 2)],
    )
    return record


def named_in_another_script() -> dict[str, Any]:
    record = a_full_record()
    record["provenance"]["model"]["name"] = "模型 $x^{$ 😀"
    return record


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "record",
    [
        pytest.param(two_layers(), id="two layers, no cutoff"),
        pytest.param(all_equal(0.7312), id="all equal"),
        pytest.param(all_equal(1.0), id="all one"),
        pytest.param(all_equal(-1.0), id="all minus one"),
        pytest.param(without_stable_bands(), id="no stable band"),
        pytest.param(many_dips(), id="a hundred layers"),
        pytest.param(named_in_another_script(), id="name beyond the font"),
        pytest.param(a_full_record(normed=-0.09), id="negative mean"),
    ],
)
def test_every_kind_of_record_is_drawn_whole(record: dict[str, Any]) -> None:
    text = printed(record)
    assert max(map(len, text.splitlines())) <= 80
    lines = section(text, "Similarity of input and output, per layer")[2:]
    assert [line.split()[0] for line in lines] == [row["layer"] for row in record["layers"]]
    page = profile_page(record, some_arrays(record))
    assert Page(page).misnested == []
    assert len(svgs(page)) == 2
    assert max(map(len, svgs(page))) < 300_000
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*", "", page), re.IGNORECASE)


def test_without_a_cutoff_nothing_is_called_active_or_stable() -> None:
    record = two_layers()
    text = printed(record)
    assert "too few layers to tell active layers from stable ones" in text
    page = "".join(Page(profile_page(record, some_arrays(record))).texts)
    assert "There are too few layers to tell active ones from stable ones." in page
    assert "saturated" not in page
    assert "cutoff" not in layer_profile_svg(record)


def test_without_a_norm_row_nothing_is_said_of_the_norm() -> None:
    record = a_record([0.9, 0.95, 0.96])
    assert "norm" not in printed(record)
    assert "norm" not in "".join(Page(layer_profile_svg(record)).texts)
    page = profile_page(record, some_arrays(record))
    assert "final norm" not in page


def test_reporting_leaves_record_and_arrays_as_they_were() -> None:
    record = a_full_record()
    arrays = some_arrays(record)
    before = copy.deepcopy((record, arrays["histogram"]))
    printed(record)
    profile_page(record, arrays)
    assert record == before[0]
    assert np.array_equal(arrays["histogram"], before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "evaluation"}, "expected kind 'saturation', got 'evaluation'"),
        ({"kind": None}, "expected kind 'saturation', got None"),
        ({"schema": 3}, "expected schema 2, got 3"),
        ({"layers": []}, "expected at least one layer, got none"),
    ],
)
def test_another_record_is_refused_by_every_report(change: dict[str, Any], message: str) -> None:
    record = a_full_record()
    arrays = some_arrays(record)
    record.update(change)
    for report in (
        lambda: printed(record),
        lambda: layer_profile_svg(record),
        lambda: density_svg(record, arrays),
        lambda: profile_page(record, arrays),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            report()


def test_a_record_without_a_section_is_refused_by_name() -> None:
    record = a_full_record()
    del record["structure"]
    with pytest.raises(ValueError, match=r"expected the sections .*, got none of \['structure'\]"):
        printed(record)


def test_arrays_of_another_record_are_refused() -> None:
    record = a_full_record()
    arrays = some_arrays(record)
    wrong = {
        "expected arrays of the layers": {**arrays, "layers": arrays["layers"][::-1]},
        "expected a histogram of shape": {**arrays, "histogram": arrays["histogram"][1:]},
        "got only zeros": {**arrays, "histogram": np.zeros_like(arrays["histogram"])},
        r"got none of \['histogram'\]": {"layers": arrays["layers"]},
    }
    for message, others in wrong.items():
        with pytest.raises(ValueError, match=message):
            density_svg(record, others)


def test_importing_the_room_loads_no_matplotlib() -> None:
    import subprocess
    import sys

    code = "import cascade.report, sys; print({'matplotlib', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
