"""The report of a drafter: what was trained, what is accepted, and which way to draft to use."""

from __future__ import annotations

import io

import pytest
from msgspec.structs import replace
from rich.console import Console
from support.build_drafters import a_record

from cascade.report.exits.drafters import advice, drafter_report, print_drafter


def printed() -> str:
    out = io.StringIO()
    print_drafter(a_record(), Console(file=out, width=100))
    return " ".join(out.getvalue().split())


def test_report_shows_origin_evaluations_and_worth() -> None:
    text = printed()
    assert "Drafter of tiny: 48 tokens, a copy of layer 4" in text
    assert "embedded: 400 prompts to train, 99 held out, 1 too long" in text
    assert "200,123 tokens in 1,500 texts, 40.0% of them greedy; held out 8,123 tokens" in text
    assert "reads the inputs of layers 1, 3 and 4 and the normed output" in text
    assert "12,345 n-grams of up to 3 tokens" in text
    assert "its tokens cover 91.0% of held-out text" in text
    assert "300 steps of 2,048 tokens in float32, seed 0" in text
    assert "600 40.0% 35.0% 30.0% 30.0% 1.72 kept" in text
    assert "table and network 1.80 18.0 1.37 x" in text


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("none", "Draft nothing: decoding is 1.37 times as fast"),
        ("lookup", "Draft without this drafter: decoding is 1.37 times as fast"),
        ("table", "Draft with the table of this drafter, without its network: decoding"),
        (
            "table and network",
            "Draft with this drafter: decoding is 1.37 times as fast with its table and network as "
            "without drafts, 1.25 times with its table alone, and 1.13 times with lookup and "
            "runner-ups alone.",
        ),
    ],
)
def test_advice_names_the_fastest_way(use: str, words: str) -> None:
    assert words in advice(replace(a_record(), use=use))  # type: ignore[arg-type]


def test_report_has_the_provenance_of_the_record() -> None:
    provenance = drafter_report(a_record()).provenance
    assert provenance is not None
    assert provenance["model"]["name"] == "tiny"
