"""A search for an exit layer is shown with its choice, what each layer keeps, and the frontier."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console
from support.build_points import a_point
from support.html import Page

from cascade.evaluation.search_choice import Wish, search_record
from cascade.report.common.sections import html_page, print_sections
from cascade.report.exits.search import FRONTIER, exit_search_report, frontier_svg

Record = dict[str, Any]


def a_corpus(name: str, sequences: int) -> Record:
    return {
        "source": name,
        "name": name,
        "fingerprint": "sha256:33cc",
        "records": 35,
        "tokens": 128 * sequences,
        "sequences": sequences,
        "seq_len": 128,
    }


def nothing(rule: str = "cosine", why: str = "nothing kept it") -> Record:
    return {
        "exit_layer": 12,
        "rule": rule,
        "head": "ridge",
        "propagation": "ridge",
        "source": 0,
        "why": why,
    }


POINTS = (
    a_point(24, 0.93, 0.94, threshold=0.9662),
    a_point(24, 0.955, 0.95, threshold=0.9701),
    a_point(24, 0.97, 0.97, threshold=0.9755),
    a_point(28, 0.962, 1.08, rule="max_probability", threshold=0.2292),
)


def a_record(
    *points: Record, left_out: tuple[Record, ...] = (), sequences: int = 32, **wish: Any
) -> Record:
    parts = {
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
            "corpus": a_corpus("held-out-confirm", sequences),
            "fitted_on": a_corpus("held-out-fit", sequences),
            "machine": {"processor": "a processor", "threads": 2},
            "versions": {"torch": "2.13.0"},
            "command": "cascade search-exit",
            "heads": {"corpus": a_corpus("train", 100)},
            "heads_fingerprint": "sha256:44dd",
            "heads_saw_corpus": False,
        },
        "settings": {
            "layers": [24, 28],
            "rules": ["cosine", "max_probability"],
            "batch_size": 8,
            "seed": 0,
            "computes_every_token_because": None,
            "interval": "95 %: resampled sequences",
            "seconds": "one process",
        },
        "sources": [],
        "full": {"perplexity": 37.01, "sequences": sequences, "layers": 30},
    }
    return search_record(parts, copy.deepcopy(points), left_out, Wish(**wish))


def printed(record: Record, width: int = 80) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    print_sections(exit_search_report(record), console)
    return stream.getvalue()


def plain(text: str) -> str:
    return " ".join(text.split())


def test_the_choice_comes_first() -> None:
    text = plain(printed(a_record(*POINTS)))
    head, _, _ = text.partition("What was measured")
    assert "Exit at layer 24, cosine >= 0.9701 with the ridge head: 95.5 % of all tokens" in head
    assert "Beyond doubt is layer 24, cosine >= 0.9755" in head


def test_every_layer_and_rule_has_its_boldest_and_those_that_keep_it() -> None:
    lines = printed(a_record(*POINTS)).splitlines()
    rows = [line.split() for line in lines if line.startswith(("   24", "   28"))]
    assert [" ".join(row) for row in rows] == [
        "24 30.0% 95.1% 93.0% 92.0-94.0 0.940 0.94 33.2% no cosine 0.9662",
        "24 30.0% 95.1% 95.5% 94.5-96.5 0.950 0.95 30.7% yes cosine 0.9701 *",
        "24 30.0% 95.1% 97.0% 96.0-98.0 0.970 0.97 29.2% sure cosine 0.9755",
        "28 30.0% 95.1% 96.2% 95.2-97.2 1.080 1.08 30.0% sure max_probability 0.2292",
    ]
    assert max(map(len, lines)) <= 80


def test_what_was_not_run_carries_a_question_mark_and_no_certificate() -> None:
    table = a_point(20, 0.99, 0.5, confirmed_by="table")
    text = printed(a_record(table, *POINTS))
    (row,) = [line for line in text.splitlines() if line.startswith("   20")]
    assert row.split()[-4:] == ["-", "sure?", "cosine", "0.9000"]
    assert "On the table alone, layer 20" in plain(text)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (a_record(*POINTS), "None can be: even without any loss it takes 877 sequences."),
        (a_record(*POINTS, sequences=1000), "None is: too many tokens differed at each"),
        (
            a_record(*POINTS, sequences=1000, risk=0.1),
            "for a risk of 10.0%, all together at confidence 0.95. Certified: 3; the cheapest of "
            "them is layer 24, cosine >= 0.9701",
        ),
        (a_record(*POINTS, agreement=1.0), "the wanted agreement leaves none to certify"),
        (
            a_record(a_point(20, 0.99, 0.5, confirmed_by="table")),
            "No threshold was run that could be certified for a risk of 5.0%.",
        ),
    ],
)
def test_it_says_what_is_certified(record: Record, words: str) -> None:
    assert words in plain(printed(record))


def test_a_layer_and_rule_at_which_nothing_may_leave_is_named_in_words() -> None:
    record = a_record(*POINTS, left_out=(nothing(why="no threshold keeps it"),))
    text = plain(printed(record))
    assert "Layer 12, cosine (ridge, ridge): no threshold keeps it." in text
    assert ">12<" not in frontier_svg(record)


def test_without_any_point_there_is_no_picture() -> None:
    record = a_record(left_out=(nothing(), nothing("top2_gap")))
    report = exit_search_report(record)
    assert report.pictures() == ()
    text = plain(printed(record))
    assert "there is nothing to draw" in text
    assert "No early exit keeps 95.0 % agreement" in text


def test_the_picture_says_what_is_on_it() -> None:
    record = a_record(a_point(20, 0.99, 0.5, confirmed_by="table"), *POINTS)
    (picture,) = exit_search_report(record).pictures()
    assert picture.file == FRONTIER
    for words in ("wanted agreement", "full model", "frontier", "cheapest that keeps it"):
        assert words in picture.svg
    for layer in (">20<", ">24<", ">28<"):
        assert layer in picture.svg
    assert picture.svg == frontier_svg(record)  # the same bytes every time
    assert "nearest to the wanted agreement" in frontier_svg(a_record(POINTS[0]))


def test_a_point_without_a_cost_is_told_and_not_drawn() -> None:
    record = a_record(a_point(20, 0.99, None, confirmed_by="table"))
    (row,) = [line for line in printed(record).splitlines() if line.startswith("   20")]
    assert row.split()[5:8] == ["-", "-", "-"]
    assert "an unknown cost" in plain(printed(record))
    assert ">20<" not in frontier_svg(record)


def test_several_heads_have_a_table_each_and_are_told_apart() -> None:
    other = POINTS[1] | {"head": "logit_lens", "propagation": "frozen", "source": 1}
    record = a_record(*POINTS, other)
    record["sources"] = [{"words": "one: ridge"}, {"words": "two: frozen"}]
    text = plain(printed(record))
    assert text.index("Head: ridge") < text.index("Head: logit lens")
    assert "From the record one: ridge" in text
    assert "cosine, logit_lens" in frontier_svg(record)


def test_the_page_stands_alone() -> None:
    record = a_record(*POINTS)
    record["provenance"]["model"]["name"] = "<tiny> $x$"
    text = html_page(exit_search_report(record))
    page = Page(text)
    assert not page.misnested
    assert "<script" not in text
    assert "&lt;tiny&gt;" in text
    assert "Provenance" in text


@pytest.mark.parametrize("section", ["points", "certificate", "verdict"])
def test_a_torn_record_is_refused(section: str) -> None:
    record = a_record(*POINTS)
    del record[section]
    with pytest.raises(ValueError, match=section):
        exit_search_report(record)
