"""Tests of the report of a comparison of corpora."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.html import VOID, Page

from cascade.core.errors import RecordError
from cascade.core.records import read_typed
from cascade.core.schema import from_plain
from cascade.report.common.sections import Report, html_page, markdown, print_sections
from cascade.report.studies.corpora import corpora_report
from cascade.studies.comparisons.corpus_records import CorpusComparison

Record = dict[str, Any]

LAYERS = ("1", "2", "3", "4", "5", "6", "6+norm")
_NAMES = ("embedded", "self-instruct-seed-tasks", "salesforce--wikitext-wikitext-2-raw-v1-test")


def a_difference(layer: str, by: float, half: float, verdict: str, needed: int | None) -> Record:
    return {
        "layer": layer,
        "difference": by,
        "interval": [by - half, by + half],
        "verdict": verdict,
        "tokens_needed": needed,
    }


def a_pair(corpus: str, rows: list[Record]) -> Record:
    by_size = sorted(rows, key=lambda row: -abs(row["difference"]))
    layers = {
        verdict: [row["layer"] for row in by_size if row["verdict"] == verdict]
        for verdict in ("stays", "moves", "cannot tell")
    }
    return {"corpus": corpus, "against": "A", "rows": rows, "layers": layers}


def a_transfer(one: str, other: str, off: float, verdict: str, needed: int | None) -> Record:
    return {
        "from": one,
        "to": other,
        "hard_ratio": 0.5,
        "threshold": 0.95123,
        "realized": 0.5 + off,
        "interval": [0.48 + off, 0.53 + off],
        "off": off,
        "off_interval": [off - 0.02, off + 0.03],
        "verdict": verdict,
        "tokens_needed": needed,
    }


def a_corpus(label: str, name: str, **changes: Any) -> Record:
    structure = {
        "rule": "",
        "source": "",
        "cutoff": 0.92,
        "input_transform": ["1"],
        "dips": [],
        "output_transform": ["6", "6+norm"],
        "stable_bands": [["2", "5"]],
    }
    return {
        "label": label,
        "name": name,
        "tokens": 16384,
        "sequences": 128,
        "seq_len": 128,
        "spread": "evenly over 511 sequences",
        "structure": structure,
        "suggested_exit_layer": 5,
        "special": [],
    } | changes


@functools.cache
def _record(count: int) -> Record:
    labels = "ABCDEFGH"[:count]
    names = [*_NAMES, *(f"corpus-{number}" for number in range(4, 9))][:count]
    corpora = [a_corpus(label, name) for label, name in zip(labels, names, strict=True)]
    corpora[0]["spread"] = None
    rows = [
        a_difference("1", 0.0031, 0.002, "stays", None),
        a_difference("2", -0.0081, 0.003, "cannot tell", 41_234),
        *(a_difference(layer, 0.0004, 0.001, "stays", None) for layer in LAYERS[2:5]),
        a_difference("6", 0.0325, 0.0176, "moves", None),
        a_difference("6+norm", -0.1045, 0.0231, "moves", None),
    ]
    verdicts = [("transfers", 0.01, None), ("does not", 0.11, None), ("cannot tell", 0.05, 10**9)]
    pairs = [(a, b) for a in labels for b in labels if a != b]
    transfers = [
        a_transfer(*pair, off, verdict, needed)
        for pair, (verdict, off, needed) in zip(pairs, verdicts * len(pairs), strict=False)
    ]
    mean = {"mean": 0.7093, "interval": [0.6992, 0.7194]}
    return {
        "schema": 1,
        "kind": "corpus-comparison",
        "provenance": {
            "model": {"name": "tiny", "num_layers": 6, "dtype": "float32", "device": "cpu"},
            "corpora": {
                corpus["label"]: {
                    "source": corpus["name"],
                    "name": corpus["name"],
                    "fingerprint": "c",
                    "records": 500,
                    "tokens": corpus["tokens"],
                    "sequences": corpus["sequences"],
                    "seq_len": corpus["seq_len"],
                }
                for corpus in corpora
            },
        },
        "settings": {
            "layer": 5,
            "layer_suggested": True,
            "hard_ratios": [0.5],
            "margin": 0.01,
            "tolerance": 0.05,
            "confidence": 0.95,
            "seed": 0,
        },
        "corpora": corpora,
        "shared": [],
        "layers": [{"layer": layer, "means": [mean] * count} for layer in LAYERS],
        "differences": [a_pair(label, rows) for label in labels[1:]],
        "special": {"same": True, "differ": []},
        "thresholds": {
            "fitted": [],
            "rows": transfers,
            "counts": {
                verdict: sum(row["verdict"] == verdict for row in transfers)
                for verdict, _, _ in verdicts
            },
        },
    }


def report_of(record: Record) -> Report:
    return corpora_report(from_plain(record, CorpusComparison))


def a_record(count: int = 3, **changes: Any) -> Record:
    """Return a comparison of so many corpora, made by hand."""
    return copy.deepcopy(_record(count)) | changes


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Leave the pictures empty: they take long, and a terminal does not show them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("corpora_profiles_svg", "corpora_thresholds_svg"):
            patch.setattr(f"cascade.report.studies.corpora.{name}", lambda record: "<svg></svg>")
        yield


def printed(record: Record, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with undrawn():
        report = report_of(record)
    print_sections(report, Console(file=stream, width=width, color_system=None))
    stream.flush()
    stream.seek(0)
    return stream.read()


def flat(text: str) -> str:
    return " ".join(text.split())


# --- Words -----------------------------------------------------------------------------------


def test_the_lead_counts_what_moves_and_what_transfers() -> None:
    text = flat(printed(a_record()))
    assert (
        "Of 7 mean similarities, these differ from A by significantly more than 0.01: 2 in B and 2 "
        "in C."
    ) in text
    assert (
        "Of 6 thresholds that were fitted on one corpus and used on another, 2 transfer (the hard "
        "ratio stays within 0.05 of its target), 2 do not, and 2 are undecided." in text
    )


def test_layers_that_move_are_named_the_farthest_first() -> None:
    text = flat(printed(a_record()))
    assert (
        "B (self-instruct-seed-tasks) against A: 2 of 7 layer means move: 6+norm (-0.1045) and 6 "
        "(+0.0325); 4 stay; 1 undecided: 2 (-0.0081). Layer 6 itself differs by +0.0325; "
        "after the final norm (row 6+norm) by -0.1045."
    ) in text


def test_without_a_moving_layer_the_words_say_so() -> None:
    record = a_record(2)
    rows = [a_difference(layer, 0.0, 0.001, "stays", None) for layer in LAYERS[:6]]
    record["differences"] = [a_pair("B", rows)]
    record["layers"] = record["layers"][:6]
    text = flat(printed(record))
    assert "none in B" in text
    assert "B (self-instruct-seed-tasks) against A: none of 6 layer means move; 6 stay." in text
    assert "do not stay within" not in text  # no table without rows
    assert "final norm" not in text


def test_one_moving_layer_is_in_the_singular() -> None:
    record = a_record(2)
    rows = [
        a_difference("1", 0.2, 0.001, "moves", None),
        *(a_difference(layer, 0.0, 0.1, "cannot tell", None) for layer in LAYERS[1:6]),
        a_difference("6+norm", 0.0, 0.001, "stays", None),
    ]
    record["differences"] = [a_pair("B", rows)]
    text = flat(printed(record))
    assert "1 of 7 layer means moves: 1 (+0.2000); 1 stays; 5 undecided: 2 (+0.0000)" in text


def test_many_layers_are_counted_rather_than_named() -> None:
    record = a_record(2)
    rows = [a_difference(str(n), 0.1 + n / 100, 0.01, "moves", None) for n in range(1, 13)]
    record["differences"] = [a_pair("B", rows)]
    record["layers"] = [{**record["layers"][0], "layer": str(n)} for n in range(1, 13)]
    assert "5 (+0.1500) and 4 more" in flat(printed(record))


def test_undecided_layers_show_the_tokens_needed() -> None:
    text = printed(a_record())
    assert re.search(r"2 +-0\.0081 +±0\.0030 +undecided +42,000$", text, re.M)
    assert re.search(r"undecided +> 9,900,000$", text, re.M)


def test_corpora_are_listed_with_their_size_and_spread() -> None:
    text = flat(printed(a_record()))
    assert "A embedded, 16,384 tokens: 128 sequences x 128 B " in text
    assert "x 128, spread evenly over 511 sequences" in text


def test_few_or_shared_sequences_give_a_warning() -> None:
    record = a_record(shared=[{"corpora": ["A", "C"], "sequences": 7}])
    record["corpora"][1]["sequences"] = 3
    text = flat(printed(record))
    assert "Warning 3 sequences are too few" in text
    assert "Warning A and C have 7 sequences in common: they are not independent" in text
    assert "Warning" not in printed(a_record())


@pytest.mark.parametrize(
    ("special", "words"),
    [
        ({"same": True, "differ": []}, "Every layer has the same role in all corpora."),
        ({"same": False, "differ": []}, "in all corpora, but not in the same role."),
        (
            {
                "same": False,
                "differ": [
                    {
                        "layer": "4",
                        "special_in": ["A", "C"],
                        "shares": {"A": 1.0, "B": 0.251, "C": 0.97},
                        "sure": False,
                    }
                ],
            },
            "Layer 4 is special only in A and C, not significantly so (share of resamples in which "
            "it is: A 100.0%, B 25.1%, C 97.0%).",
        ),
    ],
)
def test_special_layers_are_the_same_or_named(special: Record, words: str) -> None:
    assert words in flat(printed(a_record(special=special)))


def test_the_compared_states_of_a_threshold_are_named() -> None:
    assert "Exit layer 5, input and output (history[4] against history[5])." in flat(
        printed(a_record())
    )


# --- Tables ----------------------------------------------------------------------------------


def test_every_number_is_in_a_table() -> None:
    with undrawn():
        page = Page(html_page(report_of(a_record())))
    assert ["1", *["0.7093 ±0.0101"] * 3] in page.rows
    assert ["6+norm", "-0.1045", "±0.0231", "moves", ""] in page.rows
    assert ["B", "1", "none", "6, 6+norm", "2-5", "5"] in page.rows
    assert ["A to B", "50.0%", "0.9512", "51.0%", "49.0% to 54.0%", "transfers", ""] in page.rows
    assert ["A to C", "50.0%", "0.9512", "61.0%", "59.0% to 64.0%", "does not", ""] in page.rows


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_80_columns_are_enough_for_any_number_of_corpora(count: int, encoding: str) -> None:
    text = printed(a_record(count), encoding=encoding)
    assert max(map(len, text.splitlines())) <= 80
    for label in "ABCDEFGH"[:count]:
        assert re.search(rf"^{label}  ", text, re.MULTILINE)
    assert text.count("0.7093") == count * len(LAYERS)


# --- Pages and pictures ----------------------------------------------------------------------


def test_the_page_is_valid_and_has_both_pictures() -> None:
    report = report_of(a_record())
    text = html_page(report)
    page = Page(text)
    assert not page.misnested
    assert not [tag for tag in page.open if tag not in VOID]
    files = [picture.file for picture in report.pictures()]
    assert files == ["corpora-profiles.svg", "corpora-thresholds.svg"]
    assert text.count("<svg ") == 2
    assert "corpora: B" in text  # every corpus has its provenance
    assert "![" in markdown(report)


@pytest.mark.parametrize("count", [2, 8])
def test_pictures_are_deterministic(count: int) -> None:
    pictures = [picture.svg for picture in report_of(a_record(count)).pictures()]
    assert pictures == [picture.svg for picture in report_of(a_record(count)).pictures()]
    ids = [re.findall(r' id="([^"]+)"', svg) for svg in pictures]
    assert not set(ids[0]) & set(ids[1])
    for label in "ABCDEFGH"[:count]:
        assert f">{label}: " in pictures[0]
        assert f">on {label}: " in pictures[1]


def test_markers_are_filled_where_layers_move_or_thresholds_fail() -> None:
    def filled(svg: str) -> int:
        return len(re.findall(r"<use [^>]*fill: #c2410d", svg))

    def drawn(changes: dict[str, str]) -> list[int]:
        record = a_record(2)
        for row in (*record["differences"][0]["rows"], *record["thresholds"]["rows"]):
            row["verdict"] = changes.get(row["verdict"], row["verdict"])
        return [filled(picture.svg) for picture in report_of(record).pictures()]

    profiles, thresholds = drawn({})
    assert profiles - drawn({"moves": "stays"})[0] == 2
    assert thresholds - drawn({"does not": "transfers"})[1] == 1


def test_names_with_formulas_or_missing_glyphs_are_drawn() -> None:
    record = a_record(2)
    record["corpora"][0]["name"] = "$x$ 日本語 <b> " + "long" * 20
    for picture in report_of(record).pictures():
        assert "$x$ ??? &lt;b&gt;" in picture.svg
        assert "..." in picture.svg


# --- Refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "saturation"}, "expected a record of kind corpus-comparison, got saturation"),
        ({"schema": 2}, "has schema 2, this release reads up to 1"),
        ({"shared": float("nan")}, "expected a list at shared, got NaN"),
        (
            {"layers": [{"layer": "1", "means": [{"mean": float("nan"), "interval": [0, 1]}]}]},
            "at layers[0].means[0].mean, got NaN",
        ),
    ],
)
def test_other_records_are_refused(changes: Record, message: str, tmp_path: Path) -> None:
    path = tmp_path / "corpora.json"
    path.write_text(json.dumps(a_record(**changes)))
    with pytest.raises(RecordError, match=re.escape(message)):
        read_typed(path, CorpusComparison)


def test_an_incomplete_record_is_refused(tmp_path: Path) -> None:
    record = a_record()
    del record["special"]
    path = tmp_path / "corpora.json"
    path.write_text(json.dumps(record))
    with pytest.raises(RecordError, match="expected an object at special, got nothing"):
        read_typed(path, CorpusComparison)
