"""Showing stored text: control characters are spelled out, so that it steers no terminal."""

from __future__ import annotations

import re
import unicodedata

#: Categories of characters that are spelled out: controls, surrogates, separators of lines and
#: paragraphs. Among those of format only the ones that change the direction of text: others join
#: the parts of an emoji or of a word.
_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

#: Characters that JSON allows in text, but a terminal acts upon.
_IN_JSON = re.compile(f"[\x7f-\x9f\u2028\u2029{''.join(sorted(_DIRECTIONS))}]")


def printable(text: str, *, keep: str = "") -> str:
    r"""Return a text without characters that steer a terminal, each spelled out instead.

    Args:
        text: Any text, such as a name from a stored file or generated text.
        keep: Control characters to keep, such as a line feed.

    Example:
        >>> printable("a name\x1b[2JPASS")
        'a name\\x1b[2JPASS'
    """
    if text.isprintable():  # true for nearly all texts
        return text
    return "".join(
        # repr shows "\x1b" instead of sending it.
        repr(character)[1:-1] if _steers(character) and character not in keep else character
        for character in text
    )


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _CATEGORIES or character in _DIRECTIONS


def is_utf8(text: str) -> bool:
    """Return whether a text can be written as UTF-8: other bytes of a command line cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def printable_json(text: str) -> str:
    """Return JSON with the same content, in which no character steers a terminal."""
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
