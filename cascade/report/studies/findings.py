"""The page of findings: what the commands that answer the study's questions found, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase

from cascade.core.schema import from_plain
from cascade.evaluation.search_record import SearchRecord
from cascade.report.common.records import Record
from cascade.report.common.sections import Lead, Picture, Report, markdown, plain
from cascade.report.exits.search import exit_search_report
from cascade.report.studies.corpora import corpora_report
from cascade.report.studies.explanation import explanation_report
from cascade.report.studies.final_norm import final_norm_report
from cascade.report.studies.models import models_report


def _exit_search(record: Record) -> Report:
    return exit_search_report(from_plain(record, SearchRecord))


@dataclass(frozen=True)
class Question:
    """One of the questions, and where its answer lies.

    Attributes:
        stem: The record's file is `stem.json`.
        kind: The record's kind.
        heading: The question.
        draw: Makes a report of the record.
        why: Why it is asked.
    """

    stem: str
    kind: str
    heading: str
    draw: Callable[[Record], Report]
    why: str


QUESTIONS = (
    Question(
        "explanation",
        "explanation",
        "Why does a layer dip?",
        explanation_report,
        "In the study's table one layer in the middle turns every token, between layers that "
        "hardly turn any. Every cause that could be thought of is taken away, from the layer and "
        "from a neighbour alike; a cause is named only where most of the difference goes with it.",
    ),
    Question(
        "final-norm",
        "final-norm",
        "What does the final norm do to the last layer?",
        final_norm_report,
        "The study published a similarity of 0.13 for the last layer, measured behind the final "
        "norm, and concluded that the layer transforms all tokens so much that easy and hard ones "
        "cannot be told apart there. What the layer does and what the norm does are two things.",
    ),
    Question(
        "corpora",
        "corpus-comparison",
        "Does it hold on other text?",
        corpora_report,
        "The study measured one corpus; thresholds fitted on one text are used on others.",
    ),
    Question(
        "models",
        "model-comparison",
        "Does it hold for other models?",
        models_report,
        "The study measured one size. Depths are compared relative to the number of layers.",
    ),
    Question(
        "exit-search",
        "exit-search",
        "Which exit layer is best?",
        _exit_search,
        "The study took the last layer but one. Every exit layer, rule and threshold is fitted on "
        "one half of the text and confirmed on the other.",
    ),
)


def findings_markdown(records: Mapping[str, Record], *, pictures: str) -> str:
    """Return the page of findings; every number in it is a record's.

    Args:
        records: Stem of a question -> its saved record; one for each of QUESTIONS.
        pictures: The folder of the pictures as seen from the page.

    Raises:
        ValueError: A record is missing, or of another kind or schema.
    """
    missing = [question.stem for question in QUESTIONS if question.stem not in records]
    if missing:
        raise ValueError(f"expected the records {', '.join(missing)}, got none of them")
    reports = {question.stem: question.draw(records[question.stem]) for question in QUESTIONS}
    lines = [
        "# Findings",
        "",
        "The study that started this project ended with open questions. Each is answered here by a "
        "command, its record and its pictures; this page is drawn from the records by "
        "`cascade findings`, which also measures them anew.",
        "",
        "## In short",
        "",
    ]
    for question in QUESTIONS:
        words = f"{_lead(reports[question.stem])}{_letters(records[question.stem])}"
        lines += [f"**{question.heading}** {plain(words)}", ""]
        shared = _one_number(records["explanation"], records["final-norm"])
        if question.stem == "final-norm" and shared:
            lines += [plain(shared), ""]
    for question in QUESTIONS:
        report = replace(reports[question.stem], title=question.heading)
        body = markdown(report, level=2, pictures=pictures).split("\n")
        command = records[question.stem]["provenance"].get("command")
        shown = ["```bash", command, "```", ""] if command else []
        # Heading and empty line first, then why it is asked and with which command.
        lines += [*body[:2], plain(question.why), "", *shown, *body[2:]]
    return "\n".join(lines).rstrip() + "\n"


def findings_pictures(records: Mapping[str, Record]) -> tuple[Picture, ...]:
    """Return every picture of the page.

    Args:
        records: As for `findings_markdown`.
    """
    return tuple(
        picture
        for question in QUESTIONS
        for picture in question.draw(records[question.stem]).pictures()
    )


def _lead(report: Report) -> str:
    """Return what the reader of a report should take home."""
    return next(
        block.text
        for section in report.sections
        for block in section.blocks
        if isinstance(block, Lead)
    )


def _letters(record: Record) -> str:
    """Say what the letters of a comparison stand for; nothing where a record has none."""
    rows = record.get("corpora") or record.get("models") or ()
    names = [f"{letter}: {row['name']}" for letter, row in zip(ascii_uppercase, rows, strict=False)]
    return f" ({'; '.join(names)}.)" if names else ""


def _one_number(explanation: Record, norm: Record) -> str | None:
    """Say where what a layer writes and what the final norm turns round are the same dimensions.

    None where they are not, or where the dimensions were not found to carry.
    """
    side = explanation["sides"][0]
    written = [row["dimension"] for row in side["dimensions"]]
    turned = {row["dimension"]: row for row in norm["dimensions"] if row["weight"] < 0}
    both = [dim for dim in written if dim in turned]
    same_model = all(
        explanation["provenance"]["model"].get(key) == norm["provenance"]["model"].get(key)
        for key in ("name", "weights_hash")
    )
    if not both or not same_model or "dimensions" not in explanation["verdict"]["carried_by"]:
        return None
    layer, last = explanation["settings"]["layer"], norm["settings"]["layer"]
    energy = sum(row["energy"] for row in side["dimensions"] if row["dimension"] in both)
    lost = sum(turned[dim]["before"] - turned[dim]["behind"] for dim in both)
    means = {row["between"]: row["mean"] for row in norm["similarities"]}
    share = lost / (means["residual"] - means["behind"])
    return (
        f"These two answers are one: {_dimensions(both)}, into which layer {layer} writes "
        f"{100 * energy:.0f} % of its update's energy, {'is' if len(both) == 1 else 'are'} where "
        "the final norm has a negative weight and turns the stream round. What is lost there "
        f"makes {100 * share:.0f} % of the difference between layer {last} and {last}+norm."
    )


def _dimensions(numbers: Sequence[int]) -> str:
    return f"dimension{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
