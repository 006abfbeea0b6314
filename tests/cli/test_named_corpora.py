"""Corpora as a command names them: NAME:CONFIG@SPLIT#COLUMN."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.cli.named_corpora import NamedCorpus
from cascade.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("embedded", ("embedded", None, None, None)),
        ("embedded@held-out", ("embedded", None, "held-out", None)),
        ("org/name", ("org/name", None, None, None)),
        ("org/name:conf", ("org/name", "conf", None, None)),
        ("org/name:conf@test", ("org/name", "conf", "test", None)),
        ("org/name:conf@test#body", ("org/name", "conf", "test", "body")),
        ("org/name#body", ("org/name", None, None, "body")),
        ("org/name:conf#body", ("org/name", "conf", None, "body")),
        ("org/name@train[:10%]", ("org/name", None, "train[:10%]", None)),
        ("org/name:conf@train[5:10]#b", ("org/name", "conf", "train[5:10]", "b")),
        ("a.jsonl#body", ("a.jsonl", None, None, "body")),
        ("a@b.jsonl", ("a@b.jsonl", None, None, None)),
        ("a:b@c#d.txt", ("a:b@c#d.txt", None, None, None)),
        ("a:b@c.PARQUET#d", ("a:b@c.PARQUET", None, None, "d")),
        ("C:\\texts\\a", ("C:\\texts\\a", None, None, None)),
        ("C:/texts/a@test", ("C:/texts/a", None, "test", None)),
    ],
)
def test_settings_stand_behind_a_name(text: str, expected: tuple[str | None, ...]) -> None:
    found = NamedCorpus.read(text)
    assert (found.source, found.config, found.split, found.text_column) == expected


@pytest.mark.parametrize("name", ["odd@name", "odd:name", "odd#name", "a:b@c#d"])
def test_what_exists_is_a_path_whatever_its_name_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert NamedCorpus.read(f"./{name}").source != f"./{name}"
    (tmp_path / name).mkdir()
    assert NamedCorpus.read(f"./{name}") == NamedCorpus(f"./{name}")
    assert NamedCorpus.read(f"./{name}:conf@test#x") == NamedCorpus(
        f"./{name}", "conf", "test", "x"
    )


@pytest.mark.parametrize("text", ["a@", "a#", "a:", "@test", "#x", ":conf", "a@#x", "a:@test"])
def test_a_part_left_empty_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="fill in all parts"):
        NamedCorpus.read(text)


_WORD = st.text("abcXYZ019-_", min_size=1, max_size=6)


@given(
    name=st.builds("{}/{}".format, _WORD, _WORD),
    config=st.none() | _WORD,
    split=st.none() | st.builds("{}[{}:{}]".format, _WORD, st.integers(0, 9), st.integers(0, 9)),
    column=st.none() | _WORD,
)
def test_what_is_put_together_is_read_back(
    name: str, config: str | None, split: str | None, column: str | None
) -> None:
    parts = zip(":@#", (config, split, column), strict=True)
    text = name + "".join(sign + part for sign, part in parts if part is not None)
    assert NamedCorpus.read(text) == NamedCorpus(name, config, split, column)


def test_a_path_is_one_place_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("")
    os.symlink("a.jsonl", tmp_path / "b.jsonl")
    spellings = ("a.jsonl", "./a.jsonl", "~/a.jsonl", "b.jsonl", str(tmp_path / "a.jsonl"))
    assert len({NamedCorpus.read(text).place() for text in spellings}) == 1
    assert NamedCorpus.read("a.jsonl#x").place() != NamedCorpus.read("a.jsonl").place()
