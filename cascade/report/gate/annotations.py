"""A session as workflow commands of GitHub, which it shows as annotations in a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cascade.core.printable import printable
from cascade.gate.records import BudgetOutcome, NamedComparison, SessionRecord
from cascade.report.gate.wording import (
    cell_name,
    cell_numbers,
    mismatch_pairs,
    outcome,
    sentences,
    worst_cells,
    worst_first,
)

#: GitHub shows ten errors and ten warnings of a step, and drops the others.
MOST = 10

#: The maximum number of characters of a line, and the number of worst cells or budgets.
_MOST_TEXT, _WORST = 400, 3


@dataclass(frozen=True)
class Annotation:
    """One annotation.

    Attributes:
        level: "error" or "warning".
        title: Its title, in one line.
        text: Its text, of one or more lines.
        path: The file of the baseline, as the session's record names it.
    """

    level: str
    title: str
    text: str
    path: str

    def command(self, files: Mapping[str, str]) -> str:
        """Return the workflow command that makes GitHub show this annotation.

        Args:
            files: Path of a baseline -> its path in the repository. For any other path, GitHub
                shows the annotation with the run instead of a file.
        """
        properties = {"file": files.get(self.path), "title": self.title}
        listed = ",".join(
            f"{name}={escaped_property(printable(value))}"
            for name, value in properties.items()
            if value
        )
        return f"::{self.level} {listed}::{escaped_data(self.text)}"


def annotation_commands(
    record: SessionRecord, files: Mapping[str, str], *, strict: bool = False
) -> list[str]:
    """Return the workflow commands for everything in a session that did not pass.

    Args:
        record: A record of kind `report`.
        files: Path of a baseline -> its path in the repository.
        strict: Whether an inconclusive result fails, so that it is an error.

    Returns:
        One line for each: errors, then warnings, at most `MOST` of either.

    Example:
        >>> from cascade.gate.records import MissingBaseline, session_record
        >>> missing = MissingBaseline(path="baselines/a/b.saturation.json", command="make it")
        >>> annotation_commands(session_record([], missing=[missing]), {})
        ['::error title=CASCADE%3A no baseline::baselines/a/b.saturation.json; create it: make it']
    """
    found = list(_annotations(record, strict=strict))
    commands = []
    for level in ("error", "warning"):
        of_level = [one for one in found if one.level == level]
        shown = of_level[: MOST if len(of_level) <= MOST else MOST - 1]
        commands += [one.command(files) for one in shown]
        if len(of_level) > len(shown):
            more = f"... and {len(of_level) - len(shown):,} more in the job summary"
            commands.append(Annotation(level, "CASCADE", more, "").command({}))
    return commands


def session_paths(record: SessionRecord) -> list[str]:
    """Return the paths of all baselines that can have an annotation, each once."""
    parts: list[NamedComparison | BudgetOutcome] = [*record.comparisons, *record.budgets]
    found = [*(part.path for part in parts), *(missing.path for missing in record.missing)]
    return list(dict.fromkeys(found))


def escaped_data(text: str) -> str:
    r"""Return a text as the message of a workflow command, which is one line.

    Example:
        >>> escaped_data("90 %\nof all")
        '90 %25%0Aof all'
    """
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escaped_property(text: str) -> str:
    """Return a text as the value of a property of a workflow command.

    Example:
        >>> escaped_property("a:b,c")
        'a%3Ab%2Cc'
    """
    return escaped_data(text).replace(":", "%3A").replace(",", "%2C")


# --- What they say ---------------------------------------------------------------------------


def _annotations(record: SessionRecord, *, strict: bool) -> Iterator[Annotation]:
    for missing in record.missing:
        text = f"{missing.path}; create it: {missing.command}"
        yield Annotation("error", "CASCADE: no baseline", _line(text), missing.path)
    for part in worst_first([*record.comparisons, *record.budgets]):
        if part.verdict == "PASS":
            continue
        level = "warning" if part.verdict == "INCONCLUSIVE" and not strict else "error"
        title = _line(f"CASCADE: {part.verdict}: {part.name}")
        lines = [outcome(part), *_details(part)]
        yield Annotation(level, title, "\n".join(map(_line, lines)), part.path)


def _details(part: NamedComparison | BudgetOutcome) -> Iterator[str]:
    if isinstance(part, BudgetOutcome):
        yield from (f"{overrun.point}: {overrun.found}" for overrun in part.overruns[:_WORST])
        return
    yield from (f"{name}: {text}" for name, text in mismatch_pairs(part)[:_WORST])
    wanted = ("Likely cause", "To decide")
    yield from (f"{label}: {text}" for label, text in sentences(part) if label in wanted)
    for cell in worst_cells(part)[:_WORST]:
        numbers = cell_numbers(part, cell)
        yield (
            f"layer {cell.layer} {cell_name(part, cell)}: {numbers['expected']} before, "
            f"{numbers['obtained']} now"
        )


def _line(text: str) -> str:
    line = printable(" ".join(text.encode(errors="replace").decode().split()))
    return f"{line[:_MOST_TEXT]}..." if len(line) > _MOST_TEXT else line
