"""The calibration record: thresholds of one exit layer and rule, and their certificate."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from cascade.core.provenance import CorpusProvenance
from cascade.core.schema import Count, Finite, Index, Part, Share, StoredRecord, Text
from cascade.evaluation.records import ExitProvenance

#: Lower and upper end of an interval. A pair, not a list: `to_json` then writes a row on one line.
Ends = tuple[Finite, Finite]


class HardRatioThreshold(Part, frozen=True, kw_only=True):
    """A threshold fitted to a hard ratio (see `cascade.stats.thresholds.FittedThreshold`).

    Attributes:
        hard_ratio: The wanted share of hard tokens.
        threshold: Tokens exit from this confidence on.
        reached: The share of the fitted corpus's tokens that are hard at this threshold.
        threshold_interval: 95 % interval of the threshold.
        reached_interval: 95 % interval of `reached`.
        ties: How many tokens lie exactly at the threshold.
    """

    hard_ratio: Share
    threshold: Finite
    reached: Share
    threshold_interval: Ends
    reached_interval: Ends
    ties: Index


class CertifiedThreshold(Part, frozen=True, kw_only=True):
    """A certificate of a risk (see `cascade.stats.certificates.Certificate`).

    Attributes:
        threshold: The lowest certified threshold; None where none is certified.
        risk: The largest mean share of a sequence's tokens that may be predicted differently.
        confidence: The probability that the certificate holds.
        sequences: How many sequences the thresholds were tested on.
        sequences_needed: How many would certify a threshold that loses nothing.
        empirical_risk: The mean loss at the certified threshold; None where none is certified.
        p_values: One per tested threshold, the highest threshold first.
        certified: How many thresholds are certified.
        reason: Why testing stopped there, in one sentence.
    """

    threshold: Finite | None
    risk: Share
    confidence: Share
    sequences: Index
    sequences_needed: Count
    empirical_risk: Share | None
    p_values: list[Share]
    certified: Index
    reason: Text


class TransferRow(Part, frozen=True, kw_only=True):
    """One of the thresholds on another corpus (see `cascade.stats.thresholds.Transfer`).

    Attributes:
        source: What the threshold was fitted to, e.g. "hard ratio 0.3"; `from` in the JSON.
        threshold: The threshold.
        hard_ratio: The share of that corpus's tokens that are hard.
        hard_ratio_interval: Its 95 % interval.
        loss: The mean share of a sequence's tokens that are predicted differently; None where
            it was not measured.
        loss_interval: Its 95 % interval; None where `loss` is.
        sequences: How many sequences were measured.
    """

    source: Text = msgspec.field(name="from")
    threshold: Finite
    hard_ratio: Share
    hard_ratio_interval: Ends
    loss: Finite | None
    loss_interval: Ends | None
    sequences: Count


class CalibrationTransfer(Part, frozen=True, kw_only=True):
    """What the thresholds of a calibration do on another corpus."""

    corpus: CorpusProvenance
    rows: list[TransferRow]


class CalibrationRecord(StoredRecord, frozen=True, kw_only=True):
    """A calibration: kind `calibration`.

    Attributes:
        schema: The schema of the record.
        kind: Always "calibration".
        provenance: The model, the corpus that was calibrated on, and the exit heads.
        exit_layer: The exit layer.
        rule: The exit rule's name.
        seed: For rules that draw, and of the intervals.
        head: The exit head's name.
        propagation: What upper layers see of exited tokens.
        interval: How the intervals were made.
        by_hard_ratio: A threshold for each hard ratio.
        certificate: A threshold for a risk; None where no risk was given.
        transfer: The thresholds on another corpus; None where none was given.
    """

    KIND: ClassVar[str] = "calibration"
    COMMAND: ClassVar[str] = "calibrate --output"

    schema: int = 1
    kind: Literal["calibration"] = "calibration"
    provenance: ExitProvenance
    exit_layer: Count
    rule: Text
    seed: Index
    head: Text
    propagation: Literal["frozen", "ridge", "exact"]
    interval: Text
    by_hard_ratio: list[HardRatioThreshold]
    certificate: CertifiedThreshold | None
    transfer: CalibrationTransfer | None
