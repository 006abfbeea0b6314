"""Stored text cannot steer a terminal, nor make a page invalid."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.core.printable import printable
from cascade.core.records import to_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("name", "name"),
        (
            "na\u00efve \u6f22\u5b57 \U0001f600 e\u0301",
            "na\u00efve \u6f22\u5b57 \U0001f600 e\u0301",
        ),
        ("\x1b[2J\x1b[HPASS", r"\x1b[2J\x1b[HPASS"),
        ("FAIL\rPASS", r"FAIL\rPASS"),
        ("one\ntwo", r"one\ntwo"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202eSSAP", r"\u202eSSAP"),
        ("\u2066a\u2069", r"\u2066a\u2069"),
        ("a\u2028b", r"a\u2028b"),
        ("\0\x7f\ud800", r"\x00\x7f\ud800"),
        # Joins the parts of an emoji; it moves nothing.
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    ],
)
def test_characters_that_steer_a_terminal_are_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(), st.sampled_from(["", "\n", "\n\t"]))
def test_only_kept_control_characters_remain(text: str, keep: str) -> None:
    shown = printable(text, keep=keep)
    assert {c for c in shown if unicodedata.category(c) in ("Cc", "Cs")} <= set(keep)
    assert printable(shown, keep=keep) == shown


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_holds_the_same_text_without_characters_that_steer(text: str) -> None:
    written = to_json({"name": text, text: 1})
    assert json.loads(written) == {"name": text, text: 1}
    assert printable(written, keep="\n") == written
