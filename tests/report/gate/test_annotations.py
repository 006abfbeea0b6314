"""Annotations: a workflow command for what did not pass, in one line, escaped for GitHub."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed
from support.build_comparisons import (
    BUDGET,
    KINDS,
    a_full_session,
    a_session,
    clean,
    moved,
    named,
    other_text,
)

from cascade.gate.records import SessionRecord, session_record
from cascade.report.gate.annotations import (
    MOST,
    annotation_commands,
    escaped_data,
    escaped_property,
    session_paths,
)

BASELINE = "baselines/tiny/words.saturation.json"


def read(command: str) -> tuple[str, dict[str, str], str]:
    """Read a workflow command as the runner does: level, properties and message."""
    assert len(command.splitlines()) == 1
    found = re.fullmatch(r"::(\w+) ([^:]*)::(.*)", command)
    assert found, command
    pairs = (part.split("=", 1) for part in found[2].split(","))
    unescape = {"%3A": ":", "%2C": ",", "%0D": "\r", "%0A": "\n", "%25": "%"}

    def plain(text: str) -> str:
        return re.sub("%(3A|2C|0D|0A|25)", lambda match: unescape[match[0]], text)

    return found[1], {name: plain(value) for name, value in pairs}, plain(found[3])


def annotations(record: SessionRecord, **options: bool) -> list[tuple[str, dict[str, str], str]]:
    files = {path: f"sub/{path}" for path in session_paths(record)}
    return [read(line) for line in annotation_commands(record, files, **options)]


def test_a_session_that_passes_has_no_annotation() -> None:
    assert annotation_commands(a_session(clean()), {}) == []


def test_drift_is_an_error_at_the_file_of_the_baseline() -> None:
    ((level, properties, text),) = annotations(a_session(moved()))
    assert level == "error"
    assert properties == {"file": f"sub/{BASELINE}", "title": "CASCADE: FAIL: tiny/words"}
    headline, cause, *cells = text.splitlines()
    assert headline == moved().headline
    assert cause.startswith("Likely cause: one layer: layer 2 is the first that moved")
    assert len(cells) == 3
    assert re.fullmatch(r"layer \d \w+: 0\.\d{6} before, 0\.\d{6} now", cells[0])


def test_an_inconclusive_result_is_a_warning_and_an_error_if_strict() -> None:
    ((level, properties, text),) = annotations(a_session(other_text()))
    assert level == "warning"
    assert properties["title"] == "CASCADE: INCONCLUSIVE: tiny/words"
    assert "To decide: measure" in text
    assert annotations(a_session(other_text()), strict=True)[0][0] == "error"


def test_everything_that_did_not_pass_has_an_annotation_errors_first() -> None:
    found = annotations(a_full_session())
    assert [(level, properties["title"]) for level, properties, _ in found] == [
        ("error", "CASCADE: no baseline"),
        ("error", "CASCADE: FAIL: tiny/words"),
        ("error", "CASCADE: FAIL: tiny/texts"),
        ("error", "CASCADE: NOT COMPARABLE: tiny/words"),
        ("error", "CASCADE: NOT COMPARABLE: tiny/texts"),
        ("warning", "CASCADE: INCONCLUSIVE: tiny/words"),
    ]
    texts = [text for _, _, text in found]
    assert "agreement budget at least 0.897, measured 0.5000" in texts[2]
    assert "model.dtype: expected float32, got bfloat16" in texts[3]
    assert found[0][1]["file"] == "sub/baselines/a.json"


def test_a_baseline_outside_of_the_repository_has_no_file() -> None:
    (line,) = annotation_commands(a_session(moved()), {})
    assert line.startswith("::error title=CASCADE%3A FAIL%3A tiny/words::drift in ")


def test_more_than_github_shows_are_counted() -> None:
    for count in (MOST, MOST + 1, 300):
        many = [named(moved(), f"model-{number}") for number in range(count)]
        undecided = [named(other_text(), f"other-{number}") for number in range(count)]
        found = annotations(session_record([*undecided, *many]))
        assert [level for level, *_ in found] == ["error"] * MOST + ["warning"] * MOST
        left = count - MOST + 1
        expected = f"... and {left} more in the job summary" if count > MOST else moved().headline
        assert found[MOST - 1][2].splitlines()[0] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_comparison_is_one_line(kind: str) -> None:
    record = KINDS[kind]()
    found = annotations(a_session(record))
    assert len(found) == (record.verdict != "PASS")
    assert all(record.headline[:300] in text for *_, text in found)


NASTY = "a,b:c%0Ad\r\n::error::x\x1b[2J\u2028y"


def test_names_and_texts_cannot_end_a_command() -> None:
    record = session_record(
        [named(changed(moved(), headline=NASTY), NASTY)], [changed(BUDGET, name=NASTY, path=NASTY)]
    )
    for level, properties, text in annotations(record):
        assert level == "error"
        assert set(properties) == {"file", "title"}
        assert "a,b:c%0Ad ::error::x\\x1b[2J" in properties["title"]
        assert "\x1b" not in text


@given(st.text())
def test_escaping_is_undone_by_the_runner(text: str) -> None:
    line = f"::error title={escaped_property(text)}::{escaped_data(text)}"
    assert not re.search("[\r\n]", line)
    if len(line.splitlines()) == 1 and "::" not in text:
        _, properties, message = read(line)
        assert (properties["title"], message) == (text, text)
