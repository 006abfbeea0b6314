"""The report of a calibration: thresholds, transfer to another corpus, and certificate."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from cascade.core.schema import to_plain
from cascade.evaluation.calibration_record import (
    CalibrationRecord,
    CalibrationTransfer,
    CertifiedThreshold,
    HardRatioThreshold,
)
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
from cascade.report.common.records import check_record, headline, percent, rule_sentence
from cascade.report.common.sections import (
    Block,
    Pairs,
    Report,
    Section,
    Table,
    print_sections,
    table_of,
)


def print_calibration(record: CalibrationRecord, console: Console) -> None:
    """Print a calibration: thresholds with intervals, transfer and certificate.

    Args:
        record: A calibration.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record contains NaN or has another schema.
    """
    print_sections(calibration_report(record), console)


def calibration_report(record: CalibrationRecord) -> Report:
    """Return the report of a calibration.

    Args:
        record: A calibration.

    Raises:
        ValueError: The record contains NaN or has another schema.
    """
    check_record(record)
    (_, model), corpus, (_, run) = headline(record)
    measured = [
        corpus,
        ("Head", head_words(record.head)),
        *heads_pairs(record.provenance),
        ("Propagation", propagation_words(record.propagation)),
        *few_pairs(record.provenance.corpus),
    ]
    sections = [
        Section("", (Pairs(tuple(measured)),)),
        Section("Thresholds by target hard ratio", tuple(_thresholds(record))),
    ]
    if record.transfer is not None:
        same = _is_same_text(record, record.transfer)
        place = "the same text" if same else "another corpus"
        blocks = tuple(_transfer(record.transfer, same_text=same))
        sections.append(Section(f"The same thresholds on {place}", blocks))
    if record.certificate is not None:
        sections.append(Section("Certificate", (_certificate(record.certificate),)))
    return Report(
        kicker="CASCADE calibration",
        title=model,
        about=f"Exit layer {record.exit_layer}, rule {record.rule}; {run}",
        sections=tuple(sections),
        provenance=to_plain(record.provenance),
    )


def _is_same_text(record: CalibrationRecord, transfer: CalibrationTransfer) -> bool:
    return transfer.corpus.fingerprint == record.provenance.corpus.fingerprint


def _thresholds(record: CalibrationRecord) -> Iterator[Block]:
    rows = record.by_hard_ratio
    if not rows:
        yield "none"
        return
    ties = any(row.ties for row in rows)
    yield table_of(
        rule_sentence(str(record.exit_layer), record.rule),
        ("hard ratio", "threshold", "interval", "reached", "interval", *(["ties"] * ties)),
        [_threshold_cells(row, ties=ties) for row in rows],
    )
    notes = [
        ("reached", "the share of these tokens below the threshold, i.e. the reached hard ratio"),
        ("interval", record.interval),
    ]
    if ties:
        exactly = "tokens exactly at the threshold, which exit; rounding alone could change this"
        notes.append(("ties", exactly))
    yield Pairs(tuple(notes))


def _threshold_cells(row: HardRatioThreshold, *, ties: bool) -> list[str]:
    return [
        f"{100 * row.hard_ratio:g}%",
        show_threshold(row.threshold),
        between(row.threshold_interval, show_threshold, " to "),
        percent(row.reached),
        between(row.reached_interval, percent, " to "),
        *([f"{row.ties:,}"] * ties),
    ]


def _transfer(transfer: CalibrationTransfer, *, same_text: bool) -> Iterator[Block]:
    about = [("Corpus", corpus_words(transfer.corpus)), *few_pairs(transfer.corpus)]
    if same_text:
        about.append(("Warning", "the thresholds were fitted on this text; use another corpus"))
    yield Pairs(tuple(about))
    if not transfer.rows:
        yield "none"
        return
    yield _transfer_table(transfer)
    yield Pairs(
        (
            ("hard ratio", "the share of that corpus's tokens below the threshold"),
            (
                "loss",
                "the share of a sequence's tokens with another prediction than the full model, "
                "averaged over the sequences",
            ),
        )
    )


def _transfer_table(transfer: CalibrationTransfer) -> Table:
    rows = [
        [
            show_threshold(row.threshold),
            share(row.hard_ratio),
            between(row.hard_ratio_interval, share, " to "),
            share(row.loss),
            between(row.loss_interval, share, " to "),
            row.source,
        ]
        for row in transfer.rows
    ]
    header = ("threshold", "hard ratio", "interval", "loss", "interval", "fitted for")
    return table_of("The same thresholds on that corpus", header, rows, text_columns=1)


def _certificate(certificate: CertifiedThreshold) -> Pairs:
    risk, confidence = f"{100 * certificate.risk:g}%", f"{100 * certificate.confidence:g}%"
    wanted = (
        f"on average, at most {risk} of a sequence's tokens have another prediction than the full "
        f"model, with {confidence} confidence"
    )
    tested = f"on {certificate.sequences:,} sequences that were not used to choose thresholds"
    if certificate.threshold is None:
        outcome = _nothing_certified(certificate, tested)
    else:
        lost = share(certificate.empirical_risk, 2)
        outcome = [
            ("Result", f"certified: threshold {show_threshold(certificate.threshold)}"),
            ("Tested", f"{tested}; {lost} of their tokens had another prediction"),
            (
                "Holds",
                "for sequences drawn independently from the same distribution; at least "
                f"{confidence} of such calibrations satisfy the bound",
            ),
        ]
    return Pairs((("Target", wanted), *outcome, ("Why", certificate.reason)))


def _nothing_certified(certificate: CertifiedThreshold, tested: str) -> list[tuple[str, str]]:
    result = ("Result", "nothing is certified; use the full model, no token exits")
    if certificate.sequences >= certificate.sequences_needed:
        return [result, ("Tested", tested)]
    return [
        result,
        ("Tested", f"none, because there are only {certificate.sequences:,} test sequences"),
        (
            "Needed",
            f"at least {certificate.sequences_needed:,} test sequences; every second sequence of "
            "the corpus is a test sequence, the others are used to choose thresholds",
        ),
    ]
