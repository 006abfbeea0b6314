"""Building blocks of HTML pages."""

from __future__ import annotations

import pytest

from cascade.report.common.html import inline


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a < b", "a &lt; b"),
        ("run `gate`, then `<x>`", "run <code>gate</code>, then <code>&lt;x&gt;</code>"),
        ("one ` alone", "one ` alone"),
        ("``", "<code></code>"),
    ],
)
def test_text_between_backticks_is_code(text: str, expected: str) -> None:
    assert inline(text) == expected
