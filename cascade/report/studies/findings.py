"""The page of findings: what the commands that answer the study's questions found, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase

from cascade.core.errors import RecordError
from cascade.core.records import read_typed
from cascade.evaluation.search.records import SearchRecord
from cascade.report.common.sections import Lead, Picture, Report, markdown, plain
from cascade.report.exits.search import exit_search_report
from cascade.report.studies.corpora import corpora_report
from cascade.report.studies.explanation import explanation_report
from cascade.report.studies.final_norm import final_norm_report
from cascade.report.studies.models import models_report
from cascade.studies.comparisons.corpus_records import ComparedCorpus, CorpusComparison
from cascade.studies.comparisons.model_records import ComparedModel, ModelComparison
from cascade.studies.explanations.records import FinalNormExplanation, LayerExplanation


@dataclass(frozen=True)
class FindingsRecords:
    """The records that the page is drawn from."""

    explanation: LayerExplanation
    final_norm: FinalNormExplanation
    corpora: CorpusComparison
    models: ModelComparison
    exit_search: SearchRecord


@dataclass(frozen=True)
class Finding:
    """A question of the study, and where its answer is found.

    Attributes:
        stem: The record's file is `stem.json`.
        heading: The question.
        draw: Makes the report of its record.
        why: Why the question is asked.
    """

    stem: str
    heading: str
    draw: Callable[[FindingsRecords], Report]
    why: str


FINDINGS = (
    Finding(
        "explanation",
        "Why does a layer dip?",
        lambda records: explanation_report(records.explanation),
        "In the study's table one layer in the middle turns every token, between layers that "
        "hardly turn any. Every cause that could be thought of is taken away, from the layer and "
        "from a neighbour alike; a cause is named only where most of the difference goes with it.",
    ),
    Finding(
        "final-norm",
        "What does the final norm do to the last layer?",
        lambda records: final_norm_report(records.final_norm),
        "The study published a similarity of 0.13 for the last layer, measured behind the final "
        "norm, and concluded that the layer transforms all tokens so much that easy and hard ones "
        "cannot be told apart there. What the layer does and what the norm does are two things.",
    ),
    Finding(
        "corpora",
        "Does it hold on other text?",
        lambda records: corpora_report(records.corpora),
        "The study measured one corpus; thresholds fitted on one text are used on others.",
    ),
    Finding(
        "models",
        "Does it hold for other models?",
        lambda records: models_report(records.models),
        "The study measured one size. Depths are compared relative to the number of layers.",
    ),
    Finding(
        "exit-search",
        "Which exit layer is best?",
        lambda records: exit_search_report(records.exit_search),
        "The study took the last layer but one. Every exit layer, rule and threshold is fitted on "
        "one half of the text and confirmed on the other.",
    ),
)


def read_findings(folder: Path) -> FindingsRecords:
    """Read the records of the page.

    Args:
        folder: Holds one record for each of FINDINGS.

    Raises:
        RecordError: A record is missing, torn, of another kind or of a newer schema.
    """
    paths = {finding.stem: folder / f"{finding.stem}.json" for finding in FINDINGS}
    for path in paths.values():
        if not path.exists():
            raise RecordError(f"{path} is missing; measure it with `cascade findings --measure`")
    return FindingsRecords(
        explanation=read_typed(paths["explanation"], LayerExplanation),
        final_norm=read_typed(paths["final-norm"], FinalNormExplanation),
        corpora=read_typed(paths["corpora"], CorpusComparison),
        models=read_typed(paths["models"], ModelComparison),
        exit_search=read_typed(paths["exit-search"], SearchRecord),
    )


def findings_markdown(records: FindingsRecords, *, pictures: str) -> str:
    """Return the page of findings; all of its numbers come from the records.

    Args:
        records: The records.
        pictures: The folder of the pictures, relative to the page.
    """
    reports = [(finding, finding.draw(records)) for finding in FINDINGS]
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
    for finding, report in reports:
        words = f"{_lead(report)}{_letters(finding, records)}"
        lines += [f"**{finding.heading}** {plain(words)}", ""]
        shared = _one_number(records.explanation, records.final_norm)
        if finding.stem == "final-norm" and shared:
            lines += [plain(shared), ""]
    for finding, report in reports:
        titled = replace(report, title=finding.heading)
        body = markdown(titled, level=2, pictures=pictures).split("\n")
        command = (report.provenance or {}).get("command")
        shown = ["```bash", command, "```", ""] if command else []
        # The heading and an empty line come first, then the reason and the command.
        lines += [*body[:2], plain(finding.why), "", *shown, *body[2:]]
    return "\n".join(lines).rstrip() + "\n"


def findings_pictures(records: FindingsRecords) -> tuple[Picture, ...]:
    """Return every picture of the page.

    Args:
        records: The records.
    """
    return tuple(picture for finding in FINDINGS for picture in finding.draw(records).pictures())


def _lead(report: Report) -> str:
    """Return what the reader of a report should take home."""
    return next(
        block.text
        for section in report.sections
        for block in section.blocks
        if isinstance(block, Lead)
    )


def _letters(finding: Finding, records: FindingsRecords) -> str:
    """Say what the letters of a comparison stand for; nothing for other findings."""
    rows: Sequence[ComparedCorpus | ComparedModel] = ()
    if finding.stem == "corpora":
        rows = records.corpora.corpora
    elif finding.stem == "models":
        rows = records.models.models
    names = [f"{letter}: {row.name}" for letter, row in zip(ascii_uppercase, rows, strict=False)]
    return f" ({'; '.join(names)}.)" if names else ""


def _one_number(explanation: LayerExplanation, norm: FinalNormExplanation) -> str | None:
    """Say where the layer writes into the same dimensions that the final norm turns round.

    None where they are other dimensions, or where they are not supported as a cause.
    """
    side = explanation.sides[0]
    turned = {row.dimension: row for row in norm.dimensions if row.weight < 0}
    both = [row.dimension for row in side.dimensions if row.dimension in turned]
    models = explanation.provenance.model, norm.provenance.model
    same_model = (
        models[0].name == models[1].name and models[0].weights_hash == models[1].weights_hash
    )
    if not both or not same_model or "dimensions" not in explanation.verdict.carried_by:
        return None
    layer, last = explanation.settings.layer, norm.settings.layer
    energy = sum(row.energy for row in side.dimensions if row.dimension in both)
    lost = sum(turned[dim].before - turned[dim].behind for dim in both)
    means = {row.between: row.mean for row in norm.similarities}
    share = lost / (means["residual"] - means["behind"])
    return (
        f"These two answers are one: {_dimensions(both)}, into which layer {layer} writes "
        f"{100 * energy:.0f} % of its update's energy, {'is' if len(both) == 1 else 'are'} where "
        "the final norm has a negative weight and turns the stream round. What is lost there "
        f"makes {100 * share:.0f} % of the difference between layer {last} and {last}+norm."
    )


def _dimensions(numbers: Sequence[int]) -> str:
    return f"dimension{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
