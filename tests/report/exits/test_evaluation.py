"""The report of an evaluation: the verdict first, then every operating point."""

from __future__ import annotations

import copy
import functools
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from support.html import Page
from support.lossless import a_decoding_row, drafts, plain_figures

from cascade.core.schema import SchemaError, from_plain
from cascade.evaluation.records import EvaluationRecord
from cascade.report.common.sections import Report, html_page, print_sections
from cascade.report.exits.evaluation import evaluation_report
from cascade.report.exits.pareto import curves_of, front_of, pareto_svg


def a_corpus(name: str) -> dict[str, Any]:
    return {
        "source": name,
        "name": name,
        "fingerprint": "sha256:33cc",
        "records": 35,
        "tokens": 2048,
        "sequences": 16,
        "seq_len": 128,
    }


def a_point(
    layer: int, rule: str, threshold: float, share: float, **changes: Any
) -> dict[str, Any]:
    """Return an operating point that loses and saves more, the more tokens exit and the earlier."""
    loss = min(1.0, share * (30 - layer) / 20)
    return {
        "exit_layer": layer,
        "rule": rule,
        "head": "ridge",
        "threshold": threshold,
        "threshold_from": f"hard ratio {1 - share:.1f}",
        "exit_share": share,
        "agreement": 1 - loss / 2,
        "agreement_interval": [1 - loss / 1.8, 1 - loss / 2.2],
        "exit_agreement": 1 - loss,
        "perplexity": 36.6 * (1 + loss),
        "perplexity_ratio": 1 + loss,
        "perplexity_ratio_interval": [1 + loss / 1.1, 1 + loss * 1.1],
        "hard_perplexity_ratio": 1.004,
        "kl": loss / 3,
        "layers_per_token": 30 - share * (30 - layer),
        "flops_ratio": 1 - share * (30 - layer) / 40,
        "seconds_ratio": 1.01 - share * (30 - layer) / 40,
        "seconds_ratio_interval": [1 - share * (30 - layer) / 40, 1.02 - share * (30 - layer) / 40],
        **changes,
    }


def a_record(layers: tuple[int, ...] = (24, 28), **changes: Any) -> dict[str, Any]:
    points, auroc = [], []
    for layer in layers:
        points += [
            a_point(layer, "cosine", 0.9405, 0.7),
            a_point(layer, "cosine", 0.9528, 0.5),
            a_point(layer, "fixed", 0.5, 1.0, hard_perplexity_ratio=None),
            a_point(layer, "oracle", 0.5, 0.64, exit_agreement=1.0),
            a_point(layer, "random", 0.5, 0.5, threshold_from="control"),
            a_point(layer, "top2_gap", 0.3875, 0.3, flops_ratio=1.104, seconds_ratio=1.215),
        ]
        auroc += [
            {"exit_layer": layer, "rule": rule, "head_agreement": 0.644, "auroc": value}
            for rule, value in (("cosine", 0.567), ("top2_gap", 0.808), ("random", None))
        ]
    return {
        "schema": 1,
        "kind": "evaluation",
        "provenance": {
            "tokenizer_hash": "sha256:22bb",
            "model": {
                "name": "tiny-llama",
                "family": "llama",
                "quantization": None,
                "num_layers": 30,
                "dtype": "float32",
                "device": "cpu",
            },
            "corpus": a_corpus("held-out-confirm"),
            "fitted_on": a_corpus("held-out-fit"),
            "machine": {
                "processor": "a processor",
                "threads": 2,
                "capability": "AVX2",
                "blas": None,
            },
            "versions": {"torch": "2.13.0"},
            "command": "cascade evaluate",
            "heads": {"strengths": {"24": [0.01, 1e-6]}, "corpus": a_corpus("train")},
            "heads_fingerprint": "sha256:44dd",
        },
        "settings": {
            "propagation": "ridge",
            "layers": list(layers),
            "rules": ["cosine", "top2_gap"],
            "hard_ratios": [0.3, 0.5],
            "agreement": 0.95,
            "perplexity_ratio": 1.05,
            "batch_size": 8,
            "seed": 0,
            "computes_every_token_because": None,
            "interval": "95 % percentile bootstrap",
            "seconds": "what the seconds mean",
        },
        "full": {
            "perplexity": 36.634,
            "tokens": 2048,
            "scored_tokens": 2032,
            "sequences": 16,
            "layers": 30,
            "flops_per_token": 277_807_104.0,
        },
        "points": points,
        "auroc": auroc,
        "search": {
            "agreement": 0.95,
            "points": [1, 5],
            "confirmed": [5],
            "best": 5,
            "saves": False,
        },
        "verdict": {
            "use": False,
            "point": 1,
            "headline": "Do not use early exit here. Nearest: layer 24, cosine >= 0.9528.",
            "reasons": [
                "92.5 % of all tokens (target: 95.0 %)",
                "perplexity is 1.150 x",
                "scoring takes 0.93 x",
                "random exit of 50.0 %",
                "every token leaving",
            ],
            "failed": ["agreement", "random"],
            "good_enough": None,
            "faster": None,
            "against": {"random": 4, "static": 2, "oracle": 3},
            "wanted": {"agreement": 0.95, "perplexity_ratio": 1.05},
        },
        **changes,
    }


def an_empty_record() -> dict[str, Any]:
    """Return a record without any operating point."""
    return a_record(
        (),
        search={"agreement": 0.95, "points": [], "confirmed": [], "best": None, "saves": False},
        verdict={
            "use": False,
            "point": None,
            "headline": "Do not use early exit here: no rule was measured.",
            "reasons": [],
            "failed": [],
            "good_enough": None,
            "faster": None,
            "against": {"random": None, "static": None, "oracle": None},
            "wanted": {"agreement": 0.95, "perplexity_ratio": 1.05},
        },
    )


def a_bare_record() -> dict[str, Any]:
    """Return a record without any optional field."""
    record = a_record()
    for row in record["points"]:
        row.update(
            exit_agreement=None,
            hard_perplexity_ratio=None,
            seconds_ratio_interval=None,
        )
    record["provenance"] |= {"heads": None, "heads_fingerprint": None}
    record["points"] = [row for row in record["points"] if row["rule"] in ("cosine", "top2_gap")]
    record["search"] = {
        "agreement": 0.95,
        "points": [1],
        "confirmed": [],
        "best": None,
        "saves": False,
    }
    record["verdict"]["against"] = {"random": None, "static": None, "oracle": None}
    record["verdict"]["reasons"] = record["verdict"]["reasons"][:3]
    return record


def a_poor_record() -> dict[str, Any]:
    """Return a record with the huge perplexities of a logit lens at low layers."""
    record = a_record()
    for row in record["points"]:
        row.update(perplexity_ratio=37_298_780.0, perplexity_ratio_interval=[2e6, 1e30])
    record["points"][0]["perplexity_ratio"] = 1e30
    return record


def a_crowded_record() -> dict[str, Any]:
    """Return a record with every rule at many layers."""
    rules = ("cosine", "mean_cosine", "top2_gap", "max_probability", "entropy", "patience", "novel")
    record = a_record(tuple(range(2, 30)))
    for layer in range(2, 30):
        for number, rule in enumerate(rules, start=1):
            record["points"].append(a_point(layer, rule, 0.123456, number / 10))
            row = {"exit_layer": layer, "rule": rule, "head_agreement": 0.5, "auroc": 0.5}
            record["auroc"].append(row)
    record["auroc"].sort(key=lambda row: row["exit_layer"])
    record["search"]["points"] = list(range(len(record["points"])))
    return record


def typed(record: dict[str, Any]) -> EvaluationRecord:
    return from_plain(record, EvaluationRecord)


def page_of(record: dict[str, Any]) -> str:
    return html_page(evaluation_report(typed(record)))


def figure_of(record: dict[str, Any]) -> str:
    return pareto_svg(typed(record))


@functools.cache
def full_page() -> str:
    return page_of(a_record())


@functools.cache
def full_text() -> str:
    return printed(a_record())


@functools.cache
def report_of(make: Callable[[], dict[str, Any]]) -> Report:
    """Return the report of a record, cached because drawing its figure is slow."""
    return evaluation_report(typed(make()))


def printed(record: dict[str, Any]) -> str:
    return shown(evaluation_report(typed(record)))


def shown(report: Report, *, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.BytesIO()
    file = io.TextIOWrapper(stream, encoding=encoding)
    print_sections(report, Console(file=file, width=width))
    file.flush()
    return stream.getvalue().decode(encoding)


def flat(text: str) -> str:
    return " ".join(text.split())


def section(text: str, heading: str) -> str:
    """Return the printed text below a heading, up to the next empty line."""
    return text.split(f"\n{heading}\n", 1)[1].split("\n\n", 1)[0]


# --- Terminal --------------------------------------------------------------------------------


def test_the_verdict_comes_first_with_every_check_marked() -> None:
    text = full_text().split("\nWhat was measured\n")[0]
    lines = [flat(line) for line in text[text.index("Verdict\n") :].splitlines()]
    assert lines[:2] == ["Verdict", a_record()["verdict"]["headline"]]
    assert lines[3:8] == [
        "failed 92.5 % of all tokens (target: 95.0 %)",
        "passed perplexity is 1.150 x",
        "passed scoring takes 0.93 x",
        "failed no better than this control: random exit of 50.0 %",
        "passed better than this control: every token leaving",
    ]


def test_the_oracle_is_a_reference_and_not_a_limit() -> None:
    text = flat(full_text())
    assert (
        "reference an oracle that exits at layer 24 exactly the tokens for which the exit head is "
        "right (64.0%) has perplexity 1.192 x, agreement 90.4% and 0.90 x the operations; a rule "
        "that exits fewer tokens can lose less" in text
    )
    assert "limit" not in text


def test_checks_without_a_measured_control_are_omitted() -> None:
    text = printed(a_bare_record()).split("\nWhat was measured\n")[0]
    text = text[text.index("Verdict\n") :]
    assert [line.split()[0] for line in text.splitlines()[3:6]] == ["failed", "passed", "passed"]
    assert "this control:" not in text
    assert "reference" not in text


def test_reasons_that_match_no_check_are_refused() -> None:
    record = a_record()
    record["verdict"]["reasons"].pop()
    with pytest.raises(ValueError, match=r"one reason for each of agreement, .*static, got 4$"):
        printed(record)


def test_operating_points_are_printed_by_layer_with_controls_last() -> None:
    for layer in (24, 28):
        rules = [
            line.split("  ")[-1] for line in section(full_text(), f"Layer {layer}").splitlines()
        ]
        rules = [re.sub(r"^[-0-9.% ]+", "", rule) for rule in rules[2:]]
        mark = " *" if layer == 24 else ""
        assert rules == [
            "cosine 0.9405",
            f"cosine 0.9528{mark}",
            "top2_gap 0.3875",
            "control: fixed",
            "control: oracle",
            "control: random 0.5",
        ]


def test_the_printed_numbers_are_those_of_the_record() -> None:
    header, _, first, *_ = section(full_text(), "Layer 24").splitlines()
    assert flat(header) == "exits agree ppl KL layers FLOPs time interval rule"
    assert flat(first) == "70.0% 89.5% 1.210 0.070 25.80 0.90 0.91 0.90-0.92 cosine 0.9405"


def test_columns_of_all_layers_are_aligned() -> None:
    record = a_record()
    record["points"][0]["exit_share"] = 1.0
    first, second = (section(printed(record), f"Layer {layer}") for layer in (24, 28))
    assert first.splitlines()[0] == second.splitlines()[0]


def test_auroc_is_a_table_of_layers_and_rules_with_a_dash_for_none() -> None:
    text = full_text().split("(AUROC)\n")[1]
    lines = [line.split() for line in text.splitlines()]
    start = lines.index(["layer", "agrees", "cosine", "top2_gap", "random"])
    assert lines[start + 2 : start + 4] == [
        ["24", "64.4%", "0.567", "0.808", "-"],
        ["28", "64.4%", "0.567", "0.808", "-"],
    ]
    assert "0.5 is chance" in flat(text)


def test_the_search_shows_fitted_and_confirmed_thresholds() -> None:
    text = full_text().split("\nExit-layer search\n")[1]
    assert "fitted on held-out-fit and measured on held-out-confirm" in flat(text)
    lines = [flat(line) for line in text.splitlines()]
    assert "24 0.9528 50.0% 92.50% 91.7%-93.2% 0.93 cosine not confirmed" in lines
    assert "24 0.3875 30.0% 95.50% 95.0%-95.9% 1.10 top2_gap confirmed, best" in lines
    assert "Best: layer 24, top2_gap >= 0.387500, at 1.104 x the operations" in flat(text)
    assert "It reaches that agreement but saves nothing." in flat(text)


def test_a_search_that_saves_has_no_caveat() -> None:
    record = a_record()
    record["search"].update(confirmed=[1], best=1, saves=True)
    assert "at 0.925 x the operations of the full model." in flat(printed(record))


def test_a_search_that_confirms_nothing_is_reported() -> None:
    assert "No threshold reached that agreement on the confirmation split." in flat(
        printed(a_bare_record())
    )


def test_an_agreement_just_below_the_target_is_not_rounded_up() -> None:
    record = a_record()
    record["points"][1]["agreement"] = 0.9497
    assert "94.97%" in printed(record).split("\nExit-layer search\n")[1]


def test_the_notes_explain_every_column_and_the_seconds() -> None:
    notes = full_text().split("\nNotes\n")[1]
    for label in ("exits", "agree", "ppl", "KL", "layers", "FLOPs", "time", "interval", "controls"):
        assert re.search(rf"^{label} +\S", notes, flags=re.MULTILINE)
    assert "what the seconds mean" in notes
    assert "277.8 million" in notes
    assert "no skipping" not in notes


def test_the_reason_for_computing_every_token_is_shown() -> None:
    record = a_record()
    record["settings"]["computes_every_token_because"] = "its projections are fused"
    text = flat(printed(record))
    assert "no skipping every layer computed every token here: its projections are fused" in text
    assert "its projections are fused" in page_of(record)


def test_the_headline_names_both_splits_the_heads_and_the_propagation() -> None:
    text = flat(full_text())
    assert "Measured on held-out-confirm, 2,048 tokens" in text
    assert "Thresholds fitted on held-out-fit, 2,048 tokens" in text
    assert "Head corpus train, 2,048 tokens" in text
    assert "Propagation ridge:" in text
    assert "Head logit lens" in flat(printed(a_bare_record()))


def test_given_operating_points_are_not_reported_as_fitted_or_searched() -> None:
    record = a_bare_record()
    record["search"] |= {"points": [], "best": None}
    del record["provenance"]["fitted_on"]
    text, page = flat(printed(record)), flat(page_of(record))
    for shown in (text, page):
        assert "itted on" not in shown.split("Provenance")[0]
        assert "There was no search: only the given operating points were measured." in shown
        assert "that agreement" not in shown
    assert "Thresholds all given, none fitted" in text


def test_few_sequences_give_a_warning() -> None:
    record = a_record()
    assert "sequences are too few" not in full_text()
    record["provenance"]["corpus"]["sequences"] = 2
    said = "2 sequences are too few for reliable intervals"
    assert f"Warning {said}" in flat(printed(record))
    assert said in page_of(record)


def test_a_report_without_operating_points() -> None:
    text = printed(an_empty_record())
    assert text.count("No operating point was measured.") == 2
    assert "No threshold reaches that agreement and exits any token." in flat(text)
    assert "\nVerdict\nDo not use early exit here: no rule was measured.\n" in text


def test_huge_perplexities_keep_the_columns_narrow() -> None:
    text = section(printed(a_poor_record()), "Layer 24")
    assert " 3.7e7 " in text
    assert " 1.0e30 " in text


@pytest.mark.parametrize("width", [80, 100, 132])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    "make", [a_record, an_empty_record, a_bare_record, a_poor_record, a_crowded_record]
)
def test_no_line_is_longer_than_the_console(make: Any, width: int, encoding: str) -> None:
    lines = shown(report_of(make), width=width, encoding=encoding).splitlines()
    # The seventh rule, that nobody has, may take its own column.
    own = 6 if make is a_crowded_record else 0
    assert max(map(len, lines)) <= width + own
    assert not any("…" in line for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_piped_output_holds_no_escape_codes_and_a_terminal_gets_the_same_text() -> None:
    stream = io.StringIO()
    report = evaluation_report(typed(a_record()))
    print_sections(report, Console(file=stream, width=80, force_terminal=True))
    assert "\x1b" not in full_text()
    assert re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()) == full_text()


# The figure's font has no escape character.
@pytest.mark.filterwarnings("ignore:Glyph 27")
def test_markup_in_names_is_printed_verbatim() -> None:
    record = a_record()
    nasty = "[red]x[/red] :smile: [/nothing]\x1b[2J"
    record["provenance"]["model"]["name"] = nasty
    record["points"][0]["rule"] = "[b]"
    text = printed(record)
    assert "[red]x[/red] :smile: [/nothing]\\x1b[2J" in text
    assert "[b] 0.9405" in text
    assert "\x1b" not in text


# --- Figure ----------------------------------------------------------------------------------


def test_the_figure_is_one_element_and_reproducible() -> None:
    svg = figure_of(a_record())
    assert svg == figure_of(a_record())
    assert svg.startswith("<svg ")
    assert svg.count("<svg") == 1
    assert Page(svg).misnested == []


def test_the_figure_distinguishes_rules_controls_and_the_full_model() -> None:
    texts = [text.strip() for text in Page(figure_of(a_record())).texts if text.strip()]
    for name in (
        "cosine",
        "top2_gap",
        "fixed (control)",
        "random (control)",
        "oracle (control)",
        "full model",
        "nearest to worthwhile",
    ):
        assert texts.count(name) == 1
    assert {"24", "28"} <= {*texts}
    assert "tiny-llama on held-out-confirm: loss against cost, numbers are exit layers" in texts


def test_a_verdict_for_early_exit_is_marked_as_one() -> None:
    record = a_record()
    record["verdict"]["use"] = True
    assert ">recommended<" in figure_of(record)


def test_the_front_has_the_undominated_points_and_the_full_model() -> None:
    places = [(0.9, 1.1), (0.95, 1.2), (0.8, 1.4), (0.9, 1.3), (1.1, 1.05), (0.8, 1.4)]
    assert front_of([(1.0, 1.0), *places]) == [(0.8, 1.4), (0.9, 1.1), (1.0, 1.0)]


def test_a_point_that_dominates_the_full_model_removes_it_from_the_front() -> None:
    assert front_of([(1.0, 1.0), (0.9, 0.98)]) == [(0.9, 0.98)]


def test_points_of_one_rule_and_layer_are_one_curve_by_threshold() -> None:
    rows = typed(a_record()).points
    curves = {(rule, layer): points for rule, layer, points in curves_of(rows[::-1])}
    assert len(curves) == 10
    assert [row.threshold for row in curves["cosine", 24]] == [0.9405, 0.9528]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [an_empty_record, a_bare_record, a_poor_record, a_crowded_record])
def test_every_kind_of_record_is_drawn(make: Any) -> None:
    page = html_page(report_of(make))
    assert Page(page).misnested == []
    assert page.count("<svg ") == 1
    svg = page[page.index("<svg ") : page.index("</svg>")]
    assert not re.search(r"\b(nan|inf)\b", svg, re.IGNORECASE)
    assert len(svg) < 1_000_000


@pytest.mark.filterwarnings("error")
def test_a_name_beyond_the_font_is_drawn() -> None:
    record = a_record()
    record["provenance"]["model"]["name"] = "模型 $x^{$ 😀"
    assert "$x^{$" in figure_of(record)


# --- Page ------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_loads_nothing() -> None:
    parsed = Page(full_page())
    assert parsed.misnested == []
    assert parsed.open == []
    found = [tag["id"] for _, tag in parsed.tags if tag.get("id")]
    assert len(found) == len(set(found)) > 0
    assert not {name for name, _ in parsed.tags} & {"script", "link", "iframe", "img", "a"}
    assert not re.findall(r"@import|url\((?!#)|<!DOCTYPE svg", full_page())
    references = [
        value for _, tag in parsed.tags for name, value in tag.items() if name.endswith("href")
    ]
    assert all(str(reference).startswith("#") for reference in references)


def test_the_page_begins_with_the_verdict() -> None:
    text = flat("".join(Page(full_page()).texts))
    order = [
        text.index(part)
        for part in (
            "Verdict",
            a_record()["verdict"]["headline"],
            "92.5 % of all tokens",
            "What was measured",
            "Quality and cost",
            "Does the confidence predict when the exit head is right?",
            "Exit-layer search",
            "Notes",
            "Provenance",
        )
    ]
    assert order == sorted(order)


def test_the_page_shows_every_operating_point_with_all_numbers() -> None:
    rows = Page(full_page()).rows
    assert [
        "24",
        "50.0%",
        "92.5%",
        "91.7%-93.2%",
        "85.0%",
        "1.150",
        "1.136-1.165",
        "1.004",
        "0.050",
        "cosine 0.9528 *",
    ] in rows
    assert [
        "24",
        "100.0%",
        "24.00",
        "0.850",
        "0.860",
        "0.850-0.870",
        "control: fixed",
        "hard ratio 0.0",
    ] in rows
    assert len([row for row in rows if row[0] in ("24", "28") and len(row) > 2]) == 2 * 12 + 2 + 2


def test_controls_are_muted_and_the_verdicts_point_is_highlighted() -> None:
    classes = [tag.get("class") for name, tag in Page(full_page()).tags if name == "tr"]
    assert classes.count("control") == 2 * 6
    assert classes.count("active") == 2


def test_the_page_shows_nested_provenance_without_absent_heads() -> None:
    rows = Page(full_page()).rows
    for row in (["heads: strengths"], ["24", "0.01, 1e-06"], ["heads: corpus"], ["name", "train"]):
        assert row in rows
    bare = [row[0] for row in Page(page_of(a_bare_record())).rows]
    assert not [name for name in bare if "heads" in name]


def test_all_texts_of_a_record_are_escaped() -> None:
    nasty = "<script>alert('x')</script>\"&amp;<b>"
    record = a_record()

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()}
        return nasty if isinstance(value, str) else value

    record["provenance"] = poison(record["provenance"])
    record["provenance"]["heads"][nasty] = 1
    record["settings"] = poison(record["settings"])
    record["verdict"]["headline"] = nasty
    record["verdict"]["reasons"] = [nasty] * 5
    for row in record["points"][:2]:
        row.update(rule=nasty, threshold_from=nasty)
    for row in record["auroc"]:
        row["rule"] = nasty
    page = page_of(record)
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "b"}
    assert parsed.misnested == []
    assert parsed.texts.count(nasty) >= 15


def test_tables_have_captions_and_the_figure_a_label() -> None:
    tags = Page(full_page()).tags
    names = [name for name, _ in tags]
    assert names.count("table") == names.count("caption") == 5
    assert names.count("figure") == names.count("figcaption") == names.count("h1") == 1
    label = next(str(tag["aria-label"]) for name, tag in tags if name == "svg")
    assert "Four scatter plots" in label
    assert a_record()["verdict"]["headline"] in label


def test_colours_follow_the_light_or_dark_theme() -> None:
    page = full_page()
    svg = page[page.index("<svg ") : page.index("</svg>")]
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", page))
    roots = re.findall(r":root \{(.*?)\}", page)
    assert len(roots) == 2
    for variables in roots:
        assert used <= set(re.findall(r"(--[a-z0-9]+):", variables))


# --- Lossless decoding -----------------------------------------------------------------------

LOSSLESS = {
    "saves_more": "lossless",
    "method": "drafts",
    "point": 0,
    "seconds_ratio": 0.88,
    "seconds_ratio_interval": [0.85, 0.91],
    "headline": "Lossless decoding saves more: generation takes 0.37 x the full model's time.",
}


def a_compared_record(*rows: dict[str, Any], **verdict: Any) -> dict[str, Any]:
    """Return a record with prompts that were continued in several ways."""
    record = a_record()
    rows = rows or (drafts(1.61, 0.37), a_decoding_row("exits", 0.42, equal=1))
    record["lossless"] = plain_figures(*rows, point=0)
    record["verdict"]["lossless"] = LOSSLESS | verdict
    return record


def test_the_verdict_says_which_saves_more_and_a_table_shows_every_way() -> None:
    text = printed(a_compared_record())
    verdict = flat(text.split("\nWhat was measured\n")[0])
    assert verdict.endswith(f"lossless {LOSSLESS['headline']}")
    lines = section(text, "Generation: lossless decoding and exits").splitlines()
    assert [flat(line) for line in lines[2:3] + lines[4:7]] == [
        "way tokens/pass equal ms/token time interval computed by",
        "own modules 1.00 4/4 31.2 1.00 0.98-1.02 own modules",
        "drafts 1.61 4/4 11.6 0.37 0.36-0.38 compiled",
        "exits 1.00 1/4 13.1 0.42 0.41-0.43 compiled",
    ]
    assert max(map(len, lines)) <= 80


def test_the_page_has_the_ways_too() -> None:
    page = page_of(a_compared_record())
    assert LOSSLESS["headline"].replace("'", "&#x27;") in page
    assert "Generation: lossless decoding and exits" in page


def test_the_notes_say_what_is_compared() -> None:
    text = flat(printed(a_compared_record()))
    assert "prompts the first 64 tokens of 4 sequences, each continued alone and greedily" in text
    assert "The times of the operating points above are of scoring" in text
    assert "compared drafts: 0.88 x the time of exits (0.85 to 0.91)" in text
    assert "exits layer 24, cosine >= 0.9405: the fastest operating point" in text
    assert "no engine" not in text
    assert "the drafter's in addition" not in text
    assert "lossless not compared" not in text


def test_a_missing_engine_and_a_drafter_are_named() -> None:
    rows = (
        drafts(engine="model (its logits need more)"),
        a_decoding_row("drafter", 0.9, engine="model (its logits need more)"),
    )
    text = flat(printed(a_compared_record(*rows, seconds_ratio=None, seconds_ratio_interval=None)))
    assert "no engine passes are computed by the model (its logits need more)" in text
    assert "runner-ups; the drafter's in addition" in text
    assert "compared drafts" not in text
    nothing = printed(a_compared_record(drafts(1.0, 1.0, engine=None)))
    assert "no engine nothing was drafted" in flat(nothing)


def test_a_record_without_lossless_decoding_says_how_to_measure_it() -> None:
    text = flat(full_text())
    assert "lossless not compared; `cascade evaluate` with --lossless, the default, does" in text
    assert "Generation: lossless decoding" not in text


# --- What is no evaluation -------------------------------------------------------------------


def broken() -> dict[str, Any]:
    record = a_record()
    record["points"][3]["kl"] = float("nan")
    return record


@pytest.mark.parametrize(
    ("record", "place"),
    [
        (a_record(kind="calibration"), "kind"),
        ({"schema": 1, "kind": "evaluation"}, "provenance"),
        (broken(), "points[3].kl"),
    ],
)
def test_an_invalid_record_gives_a_one_line_error(record: dict[str, Any], place: str) -> None:
    with pytest.raises(SchemaError, match=re.escape(place)) as caught:
        typed(record)
    assert "\n" not in str(caught.value)


def test_reporting_does_not_change_the_record() -> None:
    record = typed(a_record())
    before = copy.deepcopy(record)
    evaluation_report(record)
    assert record == before
