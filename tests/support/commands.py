"""What a command leaves, and the corpus that commands are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TEXTS = [f"Number {number} of the texts, each of them a little longer." for number in range(40)]


@dataclass(frozen=True)
class Done:
    """What a command left: exit status and the two streams."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]
