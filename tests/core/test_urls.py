"""Addresses: told from paths, and shown without credentials."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.core.urls import is_url, redacted, without_last_slash, without_secrets, without_user

SHOWN = {
    "s3://bucket/folder": "s3://bucket/folder",
    "hf://datasets/ORG/NAME@refs/pr/1": "hf://datasets/ORG/NAME@refs/pr/1",
    "http://127.0.0.1:8000/a@b/c": "http://127.0.0.1:8000/a@b/c",
    "s3://key:se/cr:et@bucket/folder": "s3://***@bucket/folder",
    "s3://key:a:0/b@bucket/folder": "s3://***@bucket/folder",
    "http://[::1]:8000/a@b/c": "http://[::1]:8000/a@b/c",
    "https://token@host/folder": "https://***@host/folder",
    "https://me@corp:p@ss@host:80/folder": "https://***@host:80/folder",
    "zip://a.zip::https://me:pass@host/b": "zip://a.zip::https://***@host/b",
    "https://host/a?X-Amz-Signature=abc&b=c": "https://host/a?***",
    "https://host/a#token=abc": "https://host/a?***",
    "cascade gate --baselines s3://k:s@b/x --full": "cascade gate --baselines s3://***@b/x --full",
    "got https://host/a?b=c; name another": "got https://host/a?***; name another",
    "a path@with:colon/and?mark": "a path@with:colon/and?mark",
}


@pytest.mark.parametrize("text", SHOWN)
def test_credentials_are_hidden_and_nothing_else(text: str) -> None:
    assert redacted(text) == SHOWN[text]
    assert redacted(redacted(text)) == redacted(text)


_WORDS = st.text("abcXYZ0189-_.~/:+=", min_size=4, max_size=20).filter(lambda text: text[0] != ":")


@given(
    _WORDS.filter(lambda text: ":" not in text and "/" not in text),
    _WORDS.filter(lambda text: "://" not in text),  # as where the next address begins
)
def test_no_user_and_password_is_shown(user: str, password: str) -> None:
    # Digits before a slash would be the port of a host without a user.
    url = f"s3://{user}:x{password}@bucket/folder"
    assert redacted(url) == "s3://***@bucket/folder"
    assert without_user(url) == "s3://bucket/folder"


def test_a_password_alone_is_hidden_in_what_a_library_says() -> None:
    url = "https://me:pass%2Fword@host/a?token=abcdef"
    for said in ("pass/word is wrong", "pass%2Fword is wrong", "token=abcdef is wrong", url):
        assert not {"pass/word", "pass%2Fword", "abcdef"} & set(
            without_secrets(said, url).replace("=", " ").split()
        )
    assert without_secrets("connection refused by host", url) == "connection refused by host"


def test_only_what_names_a_protocol_is_an_address() -> None:
    assert is_url("memory://a")
    assert not any(map(is_url, ("baselines", "C:/baselines", "/a//b", "hf:/datasets")))


def test_a_slash_of_the_protocol_stays() -> None:
    assert without_last_slash("s3://bucket/a//") == "s3://bucket/a"
    assert without_last_slash("file:///") == "file:///"
