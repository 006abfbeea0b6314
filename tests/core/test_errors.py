"""Messages of errors stay one line of readable length."""

from __future__ import annotations

from cascade.core.errors import UsageError


def test_a_message_is_one_line() -> None:
    assert str(UsageError("expected a name,\ngot a\x1b[2Jb")) == "expected a name, got a\\x1b[2Jb"


def test_a_value_of_absurd_length_is_cut_and_the_remedy_kept() -> None:
    text = str(UsageError(f"no folder {'a' * 100_000}; choose another --output"))
    assert len(text) < 2100
    assert text.startswith("no folder aaa")
    assert "[100,035 characters]" in text
    assert text.endswith("; choose another --output")
