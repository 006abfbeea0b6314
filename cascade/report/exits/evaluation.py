"""The report of an early-exit evaluation: the verdict first, then every operating point."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from cascade.core.formatting import perplexity_words, ratio_words
from cascade.core.provenance import CorpusProvenance
from cascade.core.schema import UNSET, known, to_plain
from cascade.evaluation.records import EvaluationRecord, OperatingPointRow
from cascade.evaluation.verdict import CONTROLS
from cascade.report.common.exit_wording import (
    between,
    corpus_words,
    few_pairs,
    full_model_words,
    heads_pairs,
    interval_cell,
    propagation_words,
    ratio,
    ratio_cell,
    share,
    show_threshold,
)
from cascade.report.common.records import headline, percent
from cascade.report.common.sections import (
    Block,
    Lead,
    Pairs,
    Picture,
    Report,
    Section,
    Table,
    table_of,
)
from cascade.report.exits.lossless import lossless_pairs, lossless_sections, missing_notes
from cascade.report.exits.pareto import pareto_svg

#: The file of the figure.
PARETO = "pareto.svg"

_NONE = "No operating point was measured."
_MARK = " *"


def _headline(record: EvaluationRecord) -> list[tuple[str, str]]:
    model, corpus, run = headline(record)
    return [
        model,
        ("Measured on", corpus[1]),
        ("Thresholds", _thresholds(record)),
        run,
        *_heads(record),
        ("Propagation", propagation_words(record.settings.propagation)),
        ("Full model", full_model_words(record.full)),
        *few_pairs(record.provenance.corpus),
    ]


def _thresholds(record: EvaluationRecord) -> str:
    fitted_on = record.provenance.fitted_on
    if fitted_on is UNSET:
        return "all given, none fitted"
    return f"fitted on {corpus_words(fitted_on)}"


def _heads(record: EvaluationRecord) -> list[tuple[str, str]]:
    return heads_pairs(record.provenance) or [
        ("Head", "logit lens: the model's own final norm and LM head")
    ]


def _reasons(record: EvaluationRecord) -> list[tuple[str, str]]:
    """Return every check of the verdict as ("passed" or "failed", the finding)."""
    verdict = record.verdict
    if not verdict.reasons:
        return []
    against = verdict.against
    # The checks in the order of the verdict's reasons; a missing control has no check.
    names = ["agreement", "perplexity", "speed"]
    names += [name for name in ("random", "static") if getattr(against, name) is not None]
    if len(names) != len(verdict.reasons):
        raise ValueError(
            f"expected one reason for each of {', '.join(names)}, got {len(verdict.reasons)}"
        )
    reasons = []
    for name, reason in zip(names, verdict.reasons, strict=True):
        failed = name in verdict.failed
        if name in ("random", "static"):
            reason = f"{'no better' if failed else 'better'} than this control: {reason}"
        reasons.append(("failed" if failed else "passed", reason))
    return [*reasons, *_oracle(record)]


def _oracle(record: EvaluationRecord) -> list[tuple[str, str]]:
    """Return the oracle as a reference: exit exactly the tokens where the exit head is right.

    The oracle exits the most tokens without a wrong prediction of the head. It can still lose
    quality, because the tokens that continue see approximate keys and values of exited ones.
    """
    number = record.verdict.against.oracle
    if number is None:
        return []
    row = record.points[number]
    return [
        (
            "reference",
            f"an oracle that exits at layer {row.exit_layer} exactly the tokens for which the "
            f"exit head is right ({share(row.exit_share)}) has perplexity "
            f"{ratio_words(row.perplexity_ratio, known(row.nats_difference))}, "
            f"agreement {share(row.agreement)} and "
            f"{ratio(row.flops_ratio, 2)} x the operations; a rule that exits fewer tokens can "
            "lose less",
        )
    ]


def _is_control(row: OperatingPointRow) -> bool:
    return row.rule in CONTROLS


def _ordered(record: EvaluationRecord) -> list[tuple[int, OperatingPointRow]]:
    """Return the operating points with their numbers, by layer, each layer's controls last."""
    return sorted(
        enumerate(record.points),
        key=lambda pair: (pair[1].exit_layer, _is_control(pair[1])),
    )


def _rule_cell(row: OperatingPointRow) -> str:
    """Return the rule with its threshold, if it uses one."""
    if row.rule in ("fixed", "oracle"):
        return f"control: {row.rule}"
    if row.rule == "random":
        return f"control: random {row.threshold:.4g}"
    return f"{row.rule} {show_threshold(row.threshold, 4)}"


def _point_cells(row: OperatingPointRow) -> list[str]:
    """Return the cells of an operating point for a table of 80 columns."""
    return [
        share(row.exit_share),
        share(row.agreement),
        ratio_cell(row.perplexity_ratio, row.nats_difference),
        ratio(row.kl),
        f"{row.layers_per_token:.2f}",
        ratio(row.flops_ratio, 2),
        ratio(row.seconds_ratio, 2),
        between(row.seconds_ratio_interval, lambda value: ratio(value, 2), "-"),
        _rule_cell(row),
    ]


_POINTS = (
    "ppl, FLOPs and time are relative to the full model. The notes explain every column. * marks "
    "the verdict's operating point."
)
_POINT_HEADER = ("exits", "agree", "ppl", "KL", "layers", "FLOPs", "time", "interval", "rule")


def _auroc(record: EvaluationRecord) -> Block:
    """Return a table with one row per layer and one column per rule."""
    if not record.auroc:
        return _NONE
    rules = list(dict.fromkeys(row.rule for row in record.auroc))
    rows = []
    for layer, group in groupby(record.auroc, key=lambda row: row.exit_layer):
        found = list(group)
        values = {row.rule: row.auroc for row in found}
        cells = [ratio(values.get(rule)) for rule in rules]
        rows.append([str(layer), share(found[0].head_agreement), *cells])
    return table_of(_AUROC, ["layer", "agrees", *rules], rows)


_AUROC = (
    "The probability that a token for which the exit head agrees with the full model gets a higher "
    "confidence than a token for which it does not: 1 is perfect, 0.5 is chance. "
    '"agrees" is the share of tokens for which the exit head agrees.'
)


def _search_question(record: EvaluationRecord, fitted_on: CorpusProvenance) -> str:
    return (
        "Which layer, rule and threshold save most with an agreement of "
        f"{share(record.search.agreement)} with the full model? For every layer and rule, the "
        f"lowest such threshold was fitted on {fitted_on.name} and measured on "
        f"{record.provenance.corpus.name}."
    )


_NOT_SEARCHED = "There was no search: only the given operating points were measured."
_SEARCH_HEADER = ("layer", "threshold", "exits", "agree", "interval", "FLOPs", "rule", "outcome")


def _search_rows(record: EvaluationRecord) -> list[list[str]]:
    found = record.search
    rows = []
    for number in found.points:
        row = record.points[number]
        confirmed = "confirmed" if number in found.confirmed else "not confirmed"
        rows.append(
            [
                str(row.exit_layer),
                show_threshold(row.threshold, 4),
                share(row.exit_share),
                percent(row.agreement),
                between(row.agreement_interval, share, "-"),
                ratio(row.flops_ratio, 2),
                row.rule,
                f"{confirmed}, best" if number == found.best else confirmed,
            ]
        )
    return rows


def _search_answer(record: EvaluationRecord) -> str:
    found = record.search
    if not found.points:
        return "No threshold reaches that agreement and exits any token."
    if found.best is None:
        return "No threshold reached that agreement on the confirmation split."
    row = record.points[found.best]
    best = (
        f"Best: layer {row.exit_layer}, {row.rule} >= {show_threshold(row.threshold)}, "
        f"at {ratio(row.flops_ratio)} x the operations of the full model"
    )
    return f"{best}." if found.saves else f"{best}. It reaches that agreement but saves nothing."


def _notes(record: EvaluationRecord) -> list[tuple[str, str]]:
    settings, full = record.settings, record.full
    notes = [
        ("exits", "share of tokens that exit at the layer; the others continue to the last layer"),
        ("agree", "share of all tokens with the same prediction as the full model"),
        (
            "ppl",
            "perplexity relative to the full model's "
            f"{perplexity_words(full.perplexity, known(full.nats_per_token))} on "
            f"{full.scored_tokens:,} tokens",
        ),
        ("KL", "KL divergence from the full model's predictions, in nats per token"),
        ("layers", f"layers computed per token, of {full.layers}"),
        (
            "FLOPs",
            "counted operations, including those of the exit decision, relative to the full "
            f"model's {full.flops_per_token / 1e6:,.1f} million per token",
        ),
        ("time", f"seconds relative to the full model's; {settings.seconds}"),
        ("interval", settings.interval),
        (
            "controls",
            "references, not meant for use: fixed (every token exits), random (the same number of "
            "tokens exit, chosen at random), oracle (the tokens exit for which the exit head is "
            "right)",
        ),
    ]
    because = settings.computes_every_token_because
    if because is not None:
        notes.append(("no skipping", f"every layer computed every token here: {because}"))
    return [*notes, *missing_notes(record)]


_QUALITY = (
    "Quality of every operating point; perplexities are relative to the full model. of exits: "
    "share of the exited tokens with the same prediction as the full model; hard ppl: perplexity "
    "of the tokens that continued, relative to the full model on the same tokens. Grey rows are "
    "controls."
)
_QUALITY_HEADER = (
    "layer",
    "exits",
    "agree",
    "interval",
    "of exits",
    "ppl",
    "interval",
    "hard ppl",
    "KL",
    "rule",
)
_COST = "Cost of every operating point, relative to the full model."
_COST_HEADER = (
    "layer",
    "exits",
    "layers per token",
    "FLOPs",
    "time",
    "interval",
    "rule",
    "threshold for",
)


def _quality_cells(row: OperatingPointRow, chosen: bool) -> list[str]:
    return [
        str(row.exit_layer),
        share(row.exit_share),
        share(row.agreement),
        between(row.agreement_interval, share, "-"),
        share(row.exit_agreement),
        ratio_cell(row.perplexity_ratio, row.nats_difference),
        interval_cell(row.perplexity_ratio_interval, row.nats_difference_interval),
        ratio_cell(row.hard_perplexity_ratio, row.hard_nats_difference),
        ratio(row.kl),
        _rule_cell(row) + _MARK * chosen,
    ]


def _cost_cells(row: OperatingPointRow, chosen: bool) -> list[str]:
    return [
        str(row.exit_layer),
        share(row.exit_share),
        f"{row.layers_per_token:.2f}",
        ratio(row.flops_ratio),
        ratio(row.seconds_ratio),
        between(row.seconds_ratio_interval, ratio, "-"),
        _rule_cell(row) + _MARK * chosen,
        row.threshold_from,
    ]


def _page_tables(record: EvaluationRecord) -> list[Table]:
    """Return all figures of all operating points, for the width of a page."""
    points = _ordered(record)
    chosen = record.verdict.point
    return [
        Table(
            caption,
            header,
            tuple(tuple(cells(row, number == chosen)) for number, row in points),
            text_columns,
            styles=_styles(points, chosen),
            medium="page",
        )
        for caption, header, cells, text_columns in (
            (_QUALITY, _QUALITY_HEADER, _quality_cells, 1),
            (_COST, _COST_HEADER, _cost_cells, 2),
        )
    ]


def _terminal_tables(record: EvaluationRecord) -> list[Table]:
    """Return the figures that fit into 80 columns, one table for each layer."""
    points = _ordered(record)
    chosen = record.verdict.point
    cells = {number: _point_cells(row) for number, row in points}
    if chosen is not None:
        cells[chosen][-1] += _MARK
    # The same widths in every layer's table, so that the columns are aligned.
    widths = [max(map(len, column)) for column in zip(_POINT_HEADER, *cells.values(), strict=True)]
    header = [name.rjust(width) for name, width in zip(_POINT_HEADER, widths, strict=True)]
    header[-1] = header[-1].strip()
    tables = []
    for layer, group in groupby(points, key=lambda pair: pair[1].exit_layer):
        rows = list(group)
        tables.append(
            Table(
                f"Layer {layer}",
                tuple(header),
                tuple(tuple(cells[number]) for number, _ in rows),
                text_columns=1,
                styles=_styles(rows, chosen),
                medium="terminal",
            )
        )
    return tables


def _styles(
    rows: Sequence[tuple[int, OperatingPointRow]], chosen: int | None
) -> tuple[tuple[int, str], ...]:
    """Return which rows are highlighted and which are muted, by row number."""
    styles = {place: "control" for place, (_, row) in enumerate(rows) if _is_control(row)}
    styles |= {place: "active" for place, (number, _) in enumerate(rows) if number == chosen}
    return tuple(styles.items())


def _points(record: EvaluationRecord) -> list[Block]:
    picture = Picture(
        PARETO,
        pareto_svg(record),
        "Loss against cost; lower left is better. Top: perplexity relative to the full model. "
        "Bottom: share of tokens with another prediction than the full model. Each line is one "
        "rule at one exit layer (the number) over its thresholds; grey marks are controls. The "
        "line without marks joins the operating points that no other one beats in both loss and "
        "cost.",
    )
    if not record.points:
        return [picture, _NONE]
    return [picture, _POINTS, *_terminal_tables(record), *_page_tables(record)]


def _search(record: EvaluationRecord) -> list[Block]:
    fitted_on = record.provenance.fitted_on
    if fitted_on is UNSET:
        return [_NOT_SEARCHED]
    blocks: list[Block] = [_search_question(record, fitted_on), _search_answer(record)]
    if record.search.points:
        caption = "Thresholds fitted on one half, and their results on the confirmation split."
        blocks.append(table_of(caption, _SEARCH_HEADER, _search_rows(record), text_columns=2))
    return blocks


def evaluation_report(record: EvaluationRecord) -> Report:
    """Return the report of an evaluation.

    Args:
        record: The record.

    Raises:
        ValueError: The verdict's reasons do not match its checks.
    """
    model, *_ = headline(record)
    provenance = to_plain(record.provenance)
    # The logit lens has no fitted heads, so their entries are omitted.
    if record.provenance.heads is None:
        provenance = {key: value for key, value in provenance.items() if "heads" not in key}
    verdict = record.verdict
    reasons = [*_reasons(record), *lossless_pairs(record)]
    return Report(
        kicker="CASCADE evaluation of early exit",
        title=model[1],
        about=" · ".join(text for _, text in headline(record)[1:]),
        sections=(
            Section(
                "Verdict",
                (
                    Lead(verdict.headline, "pass" if verdict.use else "open"),
                    *([Pairs(tuple(reasons))] if reasons else []),
                ),
            ),
            Section("What was measured", (Pairs(tuple(_headline(record))),)),
            Section("Quality and cost", tuple(_points(record))),
            *lossless_sections(record),
            Section(
                "Does the confidence predict when the exit head is right? (AUROC)",
                (_auroc(record),),
            ),
            Section("Exit-layer search", tuple(_search(record))),
            Section("Notes", (Pairs(tuple(_notes(record))),)),
        ),
        provenance=provenance,
    )
