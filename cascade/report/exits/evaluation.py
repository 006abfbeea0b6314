"""Evaluations of early exit: the verdict first, then every point, for terminal and browser."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from cascade.evaluation.verdict import CONTROLS
from cascade.report.common.exit_wording import (
    between,
    corpus_words,
    few_pairs,
    heads_pairs,
    propagation_words,
    ratio,
    share,
    show_threshold,
)
from cascade.report.common.html import (
    html_document,
    html_figure,
    html_head,
    html_pairs,
    html_provenance,
    html_section,
    html_table,
)
from cascade.report.common.records import Record, headline, percent
from cascade.report.common.terminal import (
    ACTIVE_STYLE,
    print_heading,
    print_lines,
    print_pairs,
    print_table,
)
from cascade.report.exits.pareto import check_evaluation, pareto_svg

_CONTROL_STYLE = "dim"
_NONE = "No point was measured."
_MARK = " *"


# --- What the record says --------------------------------------------------------------------


def _headline(record: Record) -> list[tuple[str, str]]:
    model, corpus, run = headline(record)
    return [
        model,
        ("Measured on", corpus[1]),
        ("Thresholds", _thresholds(record)),
        run,
        *_heads(record),
        ("Propagation", propagation_words(record["settings"]["propagation"])),
        ("Full model", f"perplexity {record['full']['perplexity']:.2f}"),
        *few_pairs(record["provenance"]["corpus"]),
    ]


def _was_fitted(record: Record) -> bool:
    """Say whether any threshold was fitted: where points alone were measured, none was."""
    return "fitted_on" in record["provenance"]


def _thresholds(record: Record) -> str:
    if not _was_fitted(record):
        return "as given, none was fitted"
    return f"fitted on {corpus_words(record['provenance']['fitted_on'])}"


def _heads(record: Record) -> list[tuple[str, str]]:
    return heads_pairs(record) or [("Head", "logit lens: the model's own final norm and LM head")]


def _reasons(record: Record) -> list[tuple[str, str]]:
    """Return every check of the verdict as (passed or failed, what was found)."""
    verdict = record["verdict"]
    if not verdict["reasons"]:
        return []
    against = verdict["against"]
    # The checks in the order in which they are made; a control that is not there checks nothing.
    names = ["agreement", "perplexity", "speed"]
    names += [name for name in ("random", "static") if against[name] is not None]
    if len(names) != len(verdict["reasons"]):
        raise ValueError(
            f"expected one reason for each of {', '.join(names)}, got {len(verdict['reasons'])}"
        )
    reasons = []
    for name, reason in zip(names, verdict["reasons"], strict=True):
        failed = name in verdict["failed"]
        if name in ("random", "static"):
            reason = f"{'not better' if failed else 'better'} than this: {reason}"
        reasons.append(("failed" if failed else "passed", reason))
    return [*reasons, *_oracle(record)]


def _oracle(record: Record) -> list[tuple[str, str]]:
    """Return what to measure a rule by: leaving exactly where the exit head is right.

    It lets the most go without a wrong prediction of the head, and can lose by how many it lets
    go: those that stay see less of them.
    """
    number = record["verdict"]["against"]["oracle"]
    if number is None:
        return []
    row = record["points"][number]
    return [
        (
            "yardstick",
            f"an oracle that lets exactly those leave at layer {row['exit_layer']} for which the "
            f"exit head is right ({share(row['exit_share'])}): perplexity "
            f"{ratio(row['perplexity_ratio'])} x, agreement {share(row['agreement'])}, "
            f"{ratio(row['flops_ratio'], 2)} x the operations; a rule that lets fewer go can lose "
            "less",
        )
    ]


def _is_control(row: Record) -> bool:
    return row["rule"] in CONTROLS


def _ordered(record: Record) -> list[tuple[int, Record]]:
    """Return the points with their numbers, by layer, each layer's controls last."""
    return sorted(
        enumerate(record["points"]),
        key=lambda pair: (pair[1]["exit_layer"], _is_control(pair[1])),
    )


def _rule_cell(row: Record) -> str:
    """Name the rule with its threshold, which means nothing to a rule that knows no degrees."""
    if row["rule"] in ("fixed", "oracle"):
        return f"control: {row['rule']}"
    if row["rule"] == "random":
        return f"control: random {row['threshold']:.4g}"
    return f"{row['rule']} {show_threshold(row['threshold'], 4)}"


def _point_cells(row: Record) -> list[str]:
    """Return a point for 80 columns."""
    return [
        share(row["exit_share"]),
        share(row["agreement"]),
        ratio(row["perplexity_ratio"]),
        ratio(row["kl"]),
        f"{row['layers_per_token']:.2f}",
        ratio(row["flops_ratio"], 2),
        ratio(row["seconds_ratio"], 2),
        between(row["seconds_ratio_interval"], lambda value: ratio(value, 2), "-"),
        _rule_cell(row),
    ]


_POINTS = (
    "ppl, FLOPs and time are relative to the full model's; the notes explain every column. "
    "* marks the verdict's point."
)
_POINT_HEADER = ("exits", "agree", "ppl", "KL", "layers", "FLOPs", "time", "interval", "rule")


def _auroc_table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: one row per layer, one column per rule."""
    rules = list(dict.fromkeys(row["rule"] for row in record["auroc"]))
    rows = []
    for layer, group in groupby(record["auroc"], key=lambda row: row["exit_layer"]):
        found = list(group)
        values = {row["rule"]: row["auroc"] for row in found}
        cells = [ratio(values.get(rule)) for rule in rules]
        rows.append([str(layer), share(found[0]["head_agreement"]), *cells])
    return ["layer", "agrees", *rules], rows


_AUROC = (
    "The chance that a token on which the exit head predicts what the full model does is given "
    "the higher confidence than one on which it does not: 1 always, 0.5 by chance. "
    '"agrees": the share of all tokens on which it does.'
)


def _search_question(record: Record) -> str:
    provenance = record["provenance"]
    return (
        f"Which layer, rule and threshold save most while {share(record['search']['agreement'])} "
        "of all tokens are predicted as by the full model? The lowest such threshold of every "
        f"layer and rule was fitted on {provenance['fitted_on']['name']} and measured on "
        f"{provenance['corpus']['name']}."
    )


_NOT_SEARCHED = "Not searched: only the given points were measured."
_SEARCH_HEADER = ("layer", "threshold", "exits", "agree", "interval", "FLOPs", "rule", "outcome")


def _search_rows(record: Record) -> list[list[str]]:
    found = record["search"]
    rows = []
    for number in found["points"]:
        row = record["points"][number]
        confirmed = "confirmed" if number in found["confirmed"] else "not confirmed"
        rows.append(
            [
                str(row["exit_layer"]),
                show_threshold(row["threshold"], 4),
                share(row["exit_share"]),
                percent(row["agreement"]),
                between(row["agreement_interval"], share, "-"),
                ratio(row["flops_ratio"], 2),
                row["rule"],
                f"{confirmed}, best" if number == found["best"] else confirmed,
            ]
        )
    return rows


def _search_answer(record: Record) -> str:
    found = record["search"]
    if not found["points"]:
        return "No threshold that lets any token leave keeps that agreement."
    if found["best"] is None:
        return "None of them kept its promise on the other sequences."
    row = record["points"][found["best"]]
    best = (
        f"Best: layer {row['exit_layer']}, {row['rule']} >= {show_threshold(row['threshold'])}, "
        f"at {ratio(row['flops_ratio'])} x the operations of the full model"
    )
    return f"{best}." if found["saves"] else f"{best}: it keeps its promise and saves nothing."


def _notes(record: Record) -> list[tuple[str, str]]:
    settings, full = record["settings"], record["full"]
    notes = [
        ("exits", "share of tokens that leave at the layer; the others go on to the last"),
        ("agree", "share of all tokens whose prediction is the full model's"),
        (
            "ppl",
            f"perplexity, relative to the full model's {full['perplexity']:.2f} on "
            f"{full['scored_tokens']:,} tokens",
        ),
        ("KL", "divergence of the predictions from the full model's, in nats per token"),
        ("layers", f"layers computed per token, of {full['layers']}"),
        (
            "FLOPs",
            "counted operations, those of deciding included, relative to the full model's "
            f"{full['flops_per_token'] / 1e6:,.1f} million per token",
        ),
        ("time", f"seconds, relative to the full model's: {settings['seconds']}"),
        ("interval", settings["interval"]),
        (
            "controls",
            "yardsticks, not to be run: fixed (every token leaves), random (as many leave, no "
            "matter which), oracle (those leave for which the exit head is right)",
        ),
    ]
    because = settings["computes_every_token_because"]
    if because is not None:
        notes.append(("no skipping", f"every layer computed every token here: {because}"))
    return notes


# --- The terminal ----------------------------------------------------------------------------


def print_evaluation(record: Record, console: Console) -> None:
    """Print an evaluation: the verdict, every point, how well rules know, the search, notes.

    Nothing depends on colour, and 80 columns are enough.

    Args:
        record: A saved record of kind `evaluation`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema, lacks a section, or holds NaN.
    """
    check_evaluation(record)
    reasons = _reasons(record)
    console.print(Text("Verdict", style="bold"))
    print_lines(Text(record["verdict"]["headline"]), console, console.width)
    if reasons:
        console.print()
        print_pairs(reasons, console)
    print_heading("What was measured", console)
    print_pairs(_headline(record), console)
    _print_points(record, console)
    print_heading("Does the rule know when the exit head is right? (AUROC)", console)
    header, rows = _auroc_table(record)
    if rows:
        print_table(header, rows, console, gap=2)
        console.print()
        print_lines(Text(_AUROC), console, console.width)
    else:
        console.print(Text(_NONE))
    print_heading("The exit-layer search", console)
    _print_search(record, console)
    print_heading("Notes", console)
    print_pairs(_notes(record), console)


def _print_points(record: Record, console: Console) -> None:
    print_heading("Quality and cost", console)
    if not record["points"]:
        console.print(Text(_NONE))
        return
    print_lines(Text(_POINTS), console, console.width)
    points = _ordered(record)
    cells = {number: _point_cells(row) for number, row in points}
    if record["verdict"]["point"] is not None:
        cells[record["verdict"]["point"]][-1] += _MARK
    # The same widths in every layer's table, so that columns stand below each other.
    widths = [max(map(len, column)) for column in zip(_POINT_HEADER, *cells.values(), strict=True)]
    header = [name.rjust(width) for name, width in zip(_POINT_HEADER, widths, strict=True)]
    header[-1] = header[-1].strip()
    for layer, group in groupby(points, key=lambda pair: pair[1]["exit_layer"]):
        rows = list(group)
        print_heading(f"Layer {layer}", console)
        print_table(
            header,
            [cells[number] for number, _ in rows],
            console,
            gap=1,
            text_columns=1,
            styles=_styles(rows, record, control=_CONTROL_STYLE, chosen=ACTIVE_STYLE),
        )


def _styles(
    rows: Sequence[tuple[int, Record]], record: Record, *, control: str, chosen: str
) -> dict[int, str]:
    """Return the styles of rows that stand out or back, by their place."""
    styles = {place: control for place, (_, row) in enumerate(rows) if _is_control(row)}
    verdict = record["verdict"]["point"]
    return styles | {place: chosen for place, (number, _) in enumerate(rows) if number == verdict}


def _print_search(record: Record, console: Console) -> None:
    if not _was_fitted(record):
        print_lines(Text(_NOT_SEARCHED), console, console.width)
        return
    print_lines(Text(_search_question(record)), console, console.width)
    console.print()
    if record["search"]["points"]:
        print_table(_SEARCH_HEADER, _search_rows(record), console, gap=2, text_columns=2)
        console.print()
    print_lines(Text(_search_answer(record)), console, console.width)


# --- The page --------------------------------------------------------------------------------


def evaluation_page(record: Record) -> str:
    """Return one self-contained HTML page of an evaluation: nothing is loaded, no script runs.

    Args:
        record: A saved record of kind `evaluation`.

    Raises:
        ValueError: The record is of another kind or schema, lacks a section, or holds NaN.
    """
    check_evaluation(record)
    provenance = record["provenance"]
    model = provenance["model"]["name"]
    about = " · ".join(text for _, text in headline(record)[1:])
    # The logit lens comes from nowhere: "heads: not recorded" would be wrong.
    lens = provenance.get("heads") is None
    known = {key: value for key, value in provenance.items() if not (lens and "heads" in key)}
    sections = [
        html_head("CASCADE evaluation of early exit", model, about),
        _page_verdict(record),
        _page_points(record),
        _page_auroc(record),
        _page_search(record),
        html_section("Notes", html_pairs([*_notes(record), *_PAGE_NOTES])),
        html_provenance(known),
    ]
    return html_document(f"Early exit of {model}", sections)


def _page_verdict(record: Record) -> str:
    lead = f'<p class="lead">{html.escape(record["verdict"]["headline"])}</p>\n'
    reasons = _reasons(record)
    return html_section("Verdict", lead + (html_pairs(reasons) if reasons else "")) + html_section(
        "What was measured", html_pairs(_headline(record)[1:])
    )


def _page_points(record: Record) -> str:
    figure = html_figure(
        pareto_svg(record),
        "What is lost against what it costs; lower left is better. Above: perplexity, relative to "
        "the full model's. Below: tokens whose prediction is not the full model's. Each line is "
        "one rule at one exit layer (the number) over its thresholds; grey marks are controls. "
        "The dark line joins the points that no other point beats in both.",
    )
    if not record["points"]:
        return html_section("Quality and cost", f"{figure}<p>{_NONE}</p>\n")
    points = _ordered(record)
    styles = _styles(points, record, control="control", chosen="active")
    tables = [
        html_table(
            caption,
            header,
            [cells(row, number == record["verdict"]["point"]) for number, row in points],
            text_columns=text_columns,
            classes=styles,
        )
        for caption, header, cells, text_columns in (
            (_QUALITY, _QUALITY_HEADER, _quality_cells, 1),
            (_COST, _COST_HEADER, _cost_cells, 2),
        )
    ]
    return html_section("Quality and cost", figure + "".join(tables))


_PAGE_NOTES = (
    ("of exits", "share of the tokens that left whose prediction is the full model's"),
    ("hard ppl", "perplexity of the tokens that went on, relative to the full model's of the same"),
)
_QUALITY = (
    "Quality of every point, perplexities relative to the full model's; the notes explain every "
    "column. * marks the verdict's point; grey rows are controls."
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
_COST = "Cost of every point, relative to the full model's."
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


def _quality_cells(row: Record, chosen: bool) -> list[str]:
    return [
        str(row["exit_layer"]),
        share(row["exit_share"]),
        share(row["agreement"]),
        between(row["agreement_interval"], share, "-"),
        share(row["exit_agreement"]),
        ratio(row["perplexity_ratio"]),
        between(row["perplexity_ratio_interval"], ratio, "-"),
        ratio(row["hard_perplexity_ratio"]),
        ratio(row["kl"]),
        _rule_cell(row) + _MARK * chosen,
    ]


def _cost_cells(row: Record, chosen: bool) -> list[str]:
    return [
        str(row["exit_layer"]),
        share(row["exit_share"]),
        f"{row['layers_per_token']:.2f}",
        ratio(row["flops_ratio"]),
        ratio(row["seconds_ratio"]),
        between(row["seconds_ratio_interval"], ratio, "-"),
        _rule_cell(row) + _MARK * chosen,
        row["threshold_from"],
    ]


def _page_auroc(record: Record) -> str:
    header, rows = _auroc_table(record)
    body = html_table(_AUROC, header, rows) if rows else f"<p>{_NONE}</p>\n"
    return html_section("Does the rule know when the exit head is right?", body)


def _page_search(record: Record) -> str:
    heading = "The exit-layer search"
    if not _was_fitted(record):
        return html_section(heading, f"<p>{_NOT_SEARCHED}</p>\n")
    question, answer = html.escape(_search_question(record)), html.escape(_search_answer(record))
    body = f"<p>{question}</p>\n<p>{answer}</p>\n"
    if record["search"]["points"]:
        body += html_table(
            "What was found on the one half, and what came of it on the other.",
            _SEARCH_HEADER,
            _search_rows(record),
            text_columns=2,
        )
    return html_section(heading, body)
