"""Addresses of files elsewhere: what counts as one, and showing it without credentials."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote

#: What a hidden value is shown as.
HIDDEN = "***"

#: Shorter values would hide parts of other words.
_SHORTEST_SECRET = 4

#: Where the next address of a chain such as "zip://a.zip::s3://b/c" begins: no password goes on.
_NEXT = r"(?!:?:\w[\w+.-]*://)"

#: Host and port, such as "127.0.0.1:8000/" or "[::1]:8000/".
_PORT = r"(?:\[[^\]\s]*\]|[^/?#@:\s]*):\d+(?:[/?#\s]|$)"

#: User and password before the host. A password may hold slashes, as keys of S3 do. Digits after
#: the colon are a port: "http://127.0.0.1:8000/a@b" has no password.
_USER = re.compile(
    rf"://(?:(?!{_PORT})([^/?#@:\s'\"]*{_NEXT}:(?:{_NEXT}[^\s'\"])*)"
    r"|([^/?#\s'\"]*))@"
)

#: Slashes at the end, but not those of the protocol.
_LAST_SLASHES = re.compile(r"(?<![:/])/+$")

#: A query or fragment, where tokens and signatures are.
_QUERY = re.compile(r"(://[^\s?#'\"]*)[?#]([^\s'\",;)`]*)")


def is_url(text: str) -> bool:
    """Return whether a text is the address of something elsewhere, not a path.

    Example:
        >>> is_url("hf://datasets/ORG/NAME"), is_url("baselines")
        (True, False)
    """
    return "://" in text


def redacted(text: str) -> str:
    """Return a text in which the addresses have no user, password, query and fragment.

    Args:
        text: An address, or a message or command line with some.

    Example:
        >>> redacted("s3://key:secret@bucket/baselines"), redacted("https://host/a?token=b")
        ('s3://***@bucket/baselines', 'https://host/a?***')
        >>> redacted("hf://datasets/ORG/NAME@main")
        'hf://datasets/ORG/NAME@main'
    """
    if not is_url(text):
        return text
    return _QUERY.sub(rf"\1?{HIDDEN}", _USER.sub(f"://{HIDDEN}@", text))


def without_last_slash(url: str) -> str:
    """Return an address without slashes at its end, where they make no difference.

    Example:
        >>> without_last_slash("s3://bucket/baselines/"), without_last_slash("memory://")
        ('s3://bucket/baselines', 'memory://')
    """
    return _LAST_SLASHES.sub("", url)


def without_secrets(text: str, url: str) -> str:
    """Return a message about an address without the credentials in that address.

    Libraries quote them in other forms than the address has, e.g. the password alone.

    Args:
        text: The message.
        url: The address, with its credentials.
    """
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return redacted(text)


def _secrets(url: str) -> set[str]:
    found: set[str] = set()
    for match in _USER.finditer(url):
        user, _, password = (match[1] or match[2] or "").partition(":")
        found |= {user, password}
    for match in _QUERY.finditer(url):
        found |= {match[2], *(value for _, value in parse_qsl(match[2]))}
    found |= {unquote(secret) for secret in found}
    return {secret for secret in found if len(secret) >= _SHORTEST_SECRET}


def without_user(url: str) -> str:
    """Return an address without user and password: whoever reads it, it is the same place.

    Example:
        >>> without_user("s3://key:secret@bucket/baselines")
        's3://bucket/baselines'
    """
    return _USER.sub("://", url)
