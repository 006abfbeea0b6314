"""Calibrations for the terminal: thresholds, what they do elsewhere, and what is certified."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cascade.report.common.exit_wording import (
    between,
    corpus_words,
    few_pairs,
    head_words,
    heads_pairs,
    propagation_words,
    share,
    show_threshold,
)
from cascade.report.common.records import Record, check_record, headline, percent, rule_sentence
from cascade.report.common.terminal import print_heading, print_lines, print_pairs, print_table

_SECTIONS = (
    "provenance",
    "exit_layer",
    "rule",
    "head",
    "propagation",
    "interval",
    "by_hard_ratio",
    "certificate",
    "transfer",
)


def print_calibration(record: Record, console: Console) -> None:
    """Print a calibration: thresholds with intervals, transfer, and the certificate in words.

    Args:
        record: A saved record of kind `calibration`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema, lacks a section, or holds NaN.
    """
    check_record(record, "calibration", _SECTIONS)
    print_pairs(_headline(record), console)
    print_heading("Thresholds by the wanted share of hard tokens", console)
    _print_thresholds(record, console)
    if record["transfer"] is not None:
        place = "the same text" if _is_same_text(record) else "another corpus"
        print_heading(f"The same thresholds on {place}", console)
        _print_transfer(record, console)
    if record["certificate"] is not None:
        print_heading("Certificate", console)
        print_pairs(_certificate(record), console)


def _headline(record: Record) -> list[tuple[str, str]]:
    return [
        *headline(record),
        ("Exit", f"layer {record['exit_layer']}, rule {record['rule']}"),
        ("Head", head_words(record["head"])),
        *heads_pairs(record),
        ("Propagation", propagation_words(record["propagation"])),
        *few_pairs(record["provenance"]["corpus"]),
    ]


def _is_same_text(record: Record) -> bool:
    corpora = (record["transfer"]["corpus"], record["provenance"]["corpus"])
    return len({corpus["fingerprint"] for corpus in corpora}) == 1


def _print_thresholds(record: Record, console: Console) -> None:
    rows = record["by_hard_ratio"]
    if not rows:
        console.print(Text("none"))
        return
    sentence = rule_sentence(str(record["exit_layer"]), record["rule"])
    print_lines(Text(sentence), console, console.width)
    console.print()
    ties = any(row["ties"] for row in rows)
    print_table(
        ("hard ratio", "threshold", "interval", "reached", "interval", *(["ties"] * ties)),
        [_threshold_row(row, ties=ties) for row in rows],
        console,
        gap=2,
    )
    console.print()
    notes = [
        ("reached", "the share of these tokens that is below the threshold: hard"),
        ("interval", record["interval"]),
    ]
    if ties:
        exactly = "tokens exactly at the threshold: they exit, and rounding alone could move them"
        notes.append(("ties", exactly))
    print_pairs(notes, console)


def _threshold_row(row: Record, *, ties: bool) -> list[str]:
    return [
        f"{100 * row['hard_ratio']:g}%",
        show_threshold(row["threshold"]),
        between(row["threshold_interval"], show_threshold, " to "),
        percent(row["reached"]),
        between(row["reached_interval"], percent, " to "),
        *([f"{row['ties']:,}"] * ties),
    ]


def _print_transfer(record: Record, console: Console) -> None:
    transfer = record["transfer"]
    about = [("Corpus", corpus_words(transfer["corpus"])), *few_pairs(transfer["corpus"])]
    if _is_same_text(record):
        about.append(("Beware", "it is the very text that they were fitted on: take another"))
    print_pairs(about, console)
    console.print()
    if not transfer["rows"]:
        console.print(Text("none"))
        return
    print_table(
        ("threshold", "hard ratio", "interval", "loss", "interval", "fitted for"),
        [
            [
                show_threshold(row["threshold"]),
                share(row["hard_ratio"]),
                between(row["hard_ratio_interval"], share, " to "),
                share(row["loss"]),
                between(row["loss_interval"], share, " to "),
                row["from"],
            ]
            for row in transfer["rows"]
        ],
        console,
        gap=2,
        text_columns=1,
    )
    console.print()
    print_pairs(
        [
            ("hard ratio", "the share of that corpus's tokens that is below the threshold"),
            (
                "loss",
                "the share of a sequence's tokens whose prediction is not the full model's, "
                "on average over its sequences",
            ),
        ],
        console,
    )


def _certificate(record: Record) -> list[tuple[str, str]]:
    certificate = record["certificate"]
    risk, sure = f"{100 * certificate['risk']:g}%", f"{100 * certificate['confidence']:g}%"
    wish = (
        f"on average at most {risk} of a sequence's tokens predicted otherwise than by the full "
        f"model, at a confidence of {sure}"
    )
    sequences, needed = certificate["sequences"], certificate["sequences_needed"]
    tested = f"on {sequences:,} sequences that no threshold was proposed from"
    if certificate["threshold"] is None:
        if sequences < needed:
            tested = f"none: there are {sequences:,} sequences to test on"
        outcome = [
            ("Result", "nothing is certified: the full model is used, no token leaves"),
            ("Tested", tested),
        ]
        if sequences < needed:
            enough = (
                f"{needed:,} such sequences at least; of a corpus every second one is tested, "
                "the others propose the thresholds"
            )
            outcome.append(("Needed", enough))
    else:
        outcome = [
            ("Result", f"certified: threshold {show_threshold(certificate['threshold'])}"),
            (
                "Tested",
                f"{tested}; there, {percent(certificate['empirical_risk'])} were predicted "
                "otherwise",
            ),
            (
                "Holds",
                "for sequences drawn as these were, independently of each other; of all "
                f"calibrations made so, {sure} keep the promise or more",
            ),
        ]
    return [("Wanted", wish), *outcome, ("Why", certificate["reason"])]
