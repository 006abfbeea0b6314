"""Text files: one document each, which is not held as a whole if it is long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cascade.corpora.files.kinds import CorpusFile
from cascade.corpora.files.opening import open_text

#: Characters that are read at a time. A shorter document is held as a whole.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class LongText:
    """A text that is read in pieces.

    Attributes:
        pieces: Returns the pieces, from the beginning.

    Example:
        >>> LongText(lambda: iter(["one ", "two"])).whole()
        'one two'
    """

    pieces: Callable[[], Iterator[str]]

    def whole(self) -> str:
        """Return the whole text."""
        return "".join(self.pieces())


def read_document(file: CorpusFile) -> Iterator[dict[str, Any]]:
    """Yield the text of a file as one record; none if the file is blank.

    Raises:
        CorpusError: It cannot be read.
    """
    blank = ""
    for piece in _pieces(file):
        blank += piece
        if piece.strip():
            break
    else:
        return
    if len(blank) < _CHUNK:
        yield {"text": blank}
    else:
        yield {"text": LongText(lambda: _pieces(file))}


def _pieces(file: CorpusFile) -> Iterator[str]:
    with open_text(file) as text:
        while piece := text.read(_CHUNK):
            yield piece
