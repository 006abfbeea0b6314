"""What the pages say that can be run: fenced blocks, their command lines, and code in prose."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass

from support.paths import ROOT

#: Languages of blocks that hold command lines; "" is a block without one.
SHELL = {"", "bash"}

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)$")
_CODE = re.compile(r"(?<![`\\])(`+)(?!`)(.+?)(?<![`\\])\1(?!`)", re.DOTALL)


class DocsError(Exception):
    """A page says what nobody can run, or what this room does not know how to run."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its page from the top of the repository, its first line's number."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that the block is to be written to, where its first line is that name."""
        named = re.match(r"# ([\w./-]+\.\w+)\n", self.text)
        return named[1] if named else None


@dataclass(frozen=True)
class Command:
    """One command of a command line.

    Attributes:
        place: Its page and line.
        words: As a shell would split them, comments left out.
        status: What it must end with, where a comment says `exit status N`; else 0.
    """

    place: str
    words: tuple[str, ...]
    status: int = 0

    @property
    def line(self) -> str:
        return shlex.join(self.words)


def pages() -> list[str]:
    """Return every page, as a path from the top of the repository."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "baselines/README.md"]
    found += sorted((ROOT / "docs").rglob("*.md"))
    return [path.relative_to(ROOT).as_posix() for path in found]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, text: str) -> list[Block]:
    """Return a page's fenced blocks, in order.

    Raises:
        DocsError: A block has no end.
    """
    blocks: list[Block] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, lines, first = fence, [], number + 1
        elif fence and fence["fence"].startswith(opened["fence"]) and not fence["info"].strip():
            language = (opened["info"].split() or [""])[0]
            inside = "".join(f"{line.removeprefix(opened['indent'])}\n" for line in lines)
            blocks.append(Block(page, first, language, inside))
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        raise DocsError(f"{page}:{first}: this block has no end")
    return blocks


def commands_of(block: Block) -> list[Command]:
    """Return the commands of a block of command lines: comments left out, `&&` taken apart.

    Raises:
        DocsError: A shell would do something else than run commands one after the other.
    """
    found: list[Command] = []
    line, first = "", block.line
    for number, part in enumerate(block.text.splitlines(), start=block.line):
        first = first if line else number
        line += part.removesuffix("\\")
        if part.endswith("\\"):
            continue
        found += _split(line, f"{block.page}:{first}")
        line = ""
    if line:
        raise DocsError(f"{block.page}:{first}: the last line goes on, but nothing follows")
    return found


def _split(line: str, place: str) -> list[Command]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""  # to shlex, one in the middle of a word would be a comment too
    try:
        words = list(itertools.takewhile(lambda word: not word.startswith("#"), lexer))
    except ValueError as error:
        raise DocsError(f"{place}: {error}: {line}") from error
    found: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        elif set(word) <= set("();<>|&"):
            raise DocsError(f"{place}: {word!r} is more than commands one after the other: {line}")
        else:
            found[-1].append(word)
    if words and not all(found):
        raise DocsError(f"{place}: nothing stands before or after &&: {line}")
    status = re.search(r"#.*\bexit status (\d+)", line)
    return [
        Command(place, tuple(words), int(status[1]) if status else 0) for words in found if words
    ]


def code_in_prose(page: str, text: str) -> list[Command]:
    """Return the code spans outside of blocks that begin as command lines do.

    What stands behind a word that only prose can mean (`...`) is left out.
    """
    outside = _without_blocks(text)
    found = []
    for span in _CODE.finditer(outside):
        code = " ".join(span[2].split())
        if re.match(r"(cascade|pytest|tox|pip) [\w-]", code) and "=" not in code.split()[1]:
            place = f"{page}:{outside.count(chr(10), 0, span.start()) + 1}"
            found += _split(code.replace("...", ""), place)
    return found


def _without_blocks(text: str) -> str:
    """Return a page with its blocks' lines emptied: line numbers stay."""
    lines, opened = [], ""
    for line in text.splitlines():
        fence = _FENCE.match(line)
        if fence and not opened:
            opened = fence["fence"]
            lines.append("")
        elif opened:
            if fence and fence["fence"].startswith(opened) and not fence["info"].strip():
                opened = ""
            lines.append("")
        else:
            lines.append(line)
    return "\n".join(lines)
