"""The page of findings: what the commands that answer the study's questions found, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase

from cascade.core.errors import RecordError
from cascade.core.provenance import ModelProvenance
from cascade.core.records import read_typed
from cascade.core.schema import known
from cascade.evaluation.search.records import SearchRecord
from cascade.report.common.records import NORM_SUFFIX
from cascade.report.common.sections import Lead, Picture, Report, Section, markdown_lines, plain
from cascade.report.common.words import listed
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
        method: How it is answered, in two sentences.
        figure: The file of the picture that shows the answer.
        limits: Return what the answer does not show.
    """

    stem: str
    heading: str
    draw: Callable[[FindingsRecords], Report]
    why: str
    method: str
    figure: str
    limits: Callable[[FindingsRecords], str]


def _limits_of_explanation(records: FindingsRecords) -> str:
    settings = records.explanation.settings
    return (
        f"One model, one corpus, {settings.sequences:,} sequences. Each cause is removed by "
        "itself. Causes overlap, so their shares do not add up to 100 %. An ablation shows what "
        "the layer does, not why training made it so."
    )


def _limits_of_final_norm(records: FindingsRecords) -> str:
    settings = records.final_norm.settings
    return (
        f"One model, one corpus, {settings.sequences:,} sequences. Setting a weight to the median "
        "explains how the similarity is read. It does not show what the weight does for the "
        f"model's predictions. That was not measured.{_normed_rows(records)}"
    )


def _normed_rows(records: FindingsRecords) -> str:
    """Return how much the row after the final norm varies with the text; empty if unknown."""
    layer = f"{records.final_norm.settings.layer}{NORM_SUFFIX}"
    rows = [row for row in records.corpora.layers if row.layer == layer]
    if not rows or not _same_model(
        records.final_norm.provenance.model, records.corpora.provenance.model
    ):
        return ""
    means = listed([f"{each.mean:.2f}" for each in rows[0].means])
    return (
        f" After the norm, the similarity varies with the text: it is {means} in the next section."
    )


def _limits_of_corpora(records: FindingsRecords) -> str:
    transfers, settings = records.corpora.thresholds, records.corpora.settings
    return (
        f"One model, {len(records.corpora.corpora)} corpora, one exit layer "
        f"({settings.layer}), and the cosine alone. {transfers.counts['cannot tell']} of "
        f"{len(transfers.rows)} transfers are undecided with this much text. The details say how "
        "many tokens would decide."
    )


def _limits_of_models(records: FindingsRecords) -> str:
    rows = records.models.models
    first = rows[0].name
    others = [row.label for row in rows if row.measured and not row.name.startswith(f"{first}+")]
    unmeasured = [row.label for row in rows if not row.measured]
    limits = []
    if len(others) == 1:
        limits.append(
            f"Every measured model is {first} or an altered copy of it. The profile therefore "
            "survives rounding and noise, but this does not show that independently trained "
            "models share it."
        )
    if unmeasured:
        limits.append(
            f"The weights of {listed(unmeasured)} were not measured. Their figures follow from the "
            "configuration alone."
        )
    return " ".join(limits or ["One corpus, and only these models."])


def _limits_of_search(records: FindingsRecords) -> str:
    confirm = records.exit_search.provenance.corpus
    return (
        f"One model, one machine, {confirm.sequences:,} sequences to confirm on. Whether exiting "
        "random tokens would do as well was not measured here. The result can differ on a model "
        "whose LM head takes a smaller share of the operations."
    )


FINDINGS = (
    Finding(
        "explanation",
        "Why does a layer dip?",
        lambda records: explanation_report(records.explanation),
        "Most layers in the middle of the model hardly change a token's state. One of them, a dip, "
        "changes every token's state. Why?",
        "The command removes one possible cause after the other from the layer and from its "
        "nearest neighbour that is no dip, and measures which share of the gap between their "
        "angles closes. A cause is supported if more than half of the gap closes, by a 95 % "
        "interval over whole sequences.",
        "explanation-causes.svg",
        _limits_of_explanation,
    ),
    Finding(
        "final-norm",
        "What does the final norm do to the last layer?",
        lambda records: final_norm_report(records.final_norm),
        "The study published a similarity of 0.13 for the last layer, with its output read "
        "after the final norm. It concluded that the layer changes all tokens so much that easy "
        "and hard ones cannot be told apart there. How much of the change is due to the layer, and "
        "how much to the norm?",
        "The command measures the similarity on the residual stream and after the norm. It then "
        "sets the norm's weights to their median, those that reduce the similarity most first, and "
        "measures again.",
        "final-norm.svg",
        _limits_of_final_norm,
    ),
    Finding(
        "corpora",
        "Does it hold on other text?",
        lambda records: corpora_report(records.corpora),
        "The study measured one corpus, but thresholds that are fitted on one text are "
        "used on other text. Do layers and thresholds behave the same there?",
        "The command measures a sample of each corpus and compares the mean similarity of every "
        "layer, with simultaneous intervals over whole sequences. It then applies each corpus's "
        "thresholds to the others and compares the hard ratio with its target.",
        "corpora-profiles.svg",
        _limits_of_corpora,
    ),
    Finding(
        "models",
        "Does it hold for other models?",
        lambda records: models_report(records.models),
        "The study measured one model in one size. Do other models have the same profile?",
        "All models read the same text, and layers are compared by relative depth, which is the "
        "layer's number divided by the number of layers. Altered copies of the first model show "
        "what fewer bits or noise in the weights change.",
        "models-profiles.svg",
        _limits_of_models,
    ),
    Finding(
        "exit-search",
        "Which exit layer is best?",
        lambda records: exit_search_report(records.exit_search),
        "The study exits at the second to last layer. Is there a better exit, and does it "
        "save time?",
        "The command fits the threshold of every exit layer and rule on one half of the text, so "
        "that the agreement with the full model reaches a target. It runs the best thresholds on "
        "the other half, next to the full model, and certifies what the number of sequences "
        "allows.",
        "exit-search-frontier.svg",
        _limits_of_search,
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
        *_introduction(records.explanation),
        "## In short",
        "",
    ]
    for finding, report in reports:
        lines += [f"**{finding.heading}** {plain(_answer(finding, report, records))}", ""]
        shared = _one_number(records.explanation, records.final_norm)
        if finding.stem == "final-norm" and shared:
            lines += [plain(shared), ""]
    for finding, report in reports:
        lines += _finding_lines(finding, report, records, pictures)
    return "\n".join(lines).rstrip() + "\n"


def _introduction(explanation: LayerExplanation) -> list[str]:
    """Return what was asked and measured, and the terms of the answers."""
    model = explanation.provenance.model
    name = known(model.name) or known(model.family) or "a model"
    return [
        '"SmolLM2-135M Saturation Analysis" (2024), the study that started this project, measured '
        "how much each layer of SmolLM2-135M-Instruct changes its hidden states, on Alpaca text in "
        "fp16. It proposed that easy tokens exit early, and left questions open. This page answers "
        f"five of them for {plain(name)} "
        f"({model.dtype}). Each section has the command that measured it.",
        "",
        "- **Similarity** is the cosine of a layer's input and output on the residual stream, for "
        "one token. The angle between the two says the same in degrees: the layer turns the stream "
        "by that angle. A layer with a similarity close to 1 hardly changes the state.",
        "- A layer's **update** is what it adds to the stream: its attention output and its MLP "
        "output. The **common part** is the mean update, which is the same for every token.",
        "- A **dip** is a layer in the middle that changes the state much more than its "
        "neighbours. Row **N+norm** compares the last layer's input with its output after the "
        "final norm.",
        "- A token is **hard** if its confidence is below a threshold, and continues. An **easy** "
        "token exits. The share of hard tokens is the **hard ratio**.",
        "- **Agreement** is the share of tokens for which the next-token prediction is the full "
        "model's. Perplexity, operations and time are given relative to the full model (1.03 x).",
        "- An **exit rule** gives each token a confidence. `cosine` is the similarity at the exit "
        "layer, `top2_gap` the gap between the exit head's two largest probabilities. An **exit "
        "head** predicts the next token from the state at the exit layer. The ridge head is a "
        "fitted affine map before the LM head.",
        "- Intervals are 95 % intervals over whole sequences, those of times over batches. "
        "**Significant** means that the whole interval supports the statement.",
        "",
        "The figures of a layer differ a little between sections, because each measured its own "
        "sample of the text. The [glossary](glossary.md) has all terms. `cascade findings` draws "
        "this page from the stored records of the commands, and `cascade findings --measure` "
        "measures them again.",
        "",
    ]


def _finding_lines(
    finding: Finding, report: Report, records: FindingsRecords, pictures: str
) -> list[str]:
    """Return question, method, answer, figure and limits of a finding, and its details, folded."""
    command = (report.provenance or {}).get("command")
    first, *others = report.sections
    paragraphs = [block for block in first.blocks if isinstance(block, str)]
    # Where nothing is to be explained, there is no figure either.
    figures = tuple(one for one in report.pictures() if one.file == finding.figure)
    rest = tuple(block for block in first.blocks if not isinstance(block, str | Lead))
    lines = [
        f"## {finding.heading}",
        "",
        f"**Question.** {plain(finding.why)}",
        "",
        f"**Method.** {plain(finding.method)}",
        "",
        *(["```bash", str(command), "```", ""] if command else []),
        f"*{plain(report.about)}*",
        "",
        f"**Answer.** {plain(_answer(finding, report, records))}",
        "",
        *(line for paragraph in paragraphs for line in (plain(paragraph), "")),
        *markdown_lines(Section("", figures), level=3, pictures=pictures),
        f"**Limits.** {plain(finding.limits(records))}",
        "",
        # Markdown inside is read by GitHub after an empty line, by the site with the attribute.
        '<details markdown="1">',
        f"<summary>Details: {plain(finding.heading)}</summary>",
        "",
    ]
    for section in (Section("", rest), *others):
        blocks = tuple(block for block in section.blocks if block not in figures)
        lines += markdown_lines(replace(section, blocks=blocks), level=3, pictures=pictures)
    return [*lines, "</details>", ""]


def _answer(finding: Finding, report: Report, records: FindingsRecords) -> str:
    return f"{_lead(report)}{_letters(finding, records)}"


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
    """Say where the layer writes into the same dimensions whose sign the final norm reverses.

    None where they are other dimensions, or where they are not supported as a cause.
    """
    side = explanation.sides[0]
    turned = {row.dimension: row for row in norm.dimensions if row.weight < 0}
    both = [row.dimension for row in side.dimensions if row.dimension in turned]
    same_model = _same_model(explanation.provenance.model, norm.provenance.model)
    if not both or not same_model or "dimensions" not in explanation.verdict.carried_by:
        return None
    layer, last = explanation.settings.layer, norm.settings.layer
    energy = sum(row.energy for row in side.dimensions if row.dimension in both)
    lost = sum(turned[dim].before - turned[dim].behind for dim in both)
    means = {row.between: row.mean for row in norm.similarities}
    share = lost / (means["residual"] - means["behind"])
    others = f"; the other dimensions regain {100 * (share - 1):.0f} %" if share > 1 else ""
    return (
        f"Both answers have the same origin, {_dimensions(both)} of the residual stream. Layer "
        f"{layer} writes {100 * energy:.0f} % of its update's energy there, and the final norm "
        "reverses the sign there by a negative weight. The similarity that is lost there is "
        f"{100 * share:.0f} % of the difference between layer {last} and row {last}+norm{others}."
    )


def _same_model(first: ModelProvenance, other: ModelProvenance) -> bool:
    return first.name == other.name and first.weights_hash == other.weights_hash


def _dimensions(numbers: Sequence[int]) -> str:
    return f"dimension{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
