"""The calibration record: thresholds of one exit layer and rule, and their certificate."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from cascade.core.provenance import CorpusProvenance
from cascade.core.schema import Count, Finite, Index, Part, Share, StoredRecord, Text, known
from cascade.evaluation.records import ExitProvenance

#: Lower and upper end of an interval. `to_json` writes rows with pairs (unlike lists) on one line.
Ends = tuple[Finite, Finite]


class HardRatioThreshold(Part, frozen=True, kw_only=True):
    """A threshold fitted to a hard ratio (see `cascade.stats.thresholds.FittedThreshold`).

    Attributes:
        hard_ratio: The target share of hard tokens.
        threshold: Tokens with a confidence at or above it exit.
        reached: The share of the fitted corpus's tokens that are hard at this threshold.
        threshold_interval: 95 % interval of the threshold.
        reached_interval: 95 % interval of `reached`.
        ties: The number of tokens exactly at the threshold.
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
        threshold: The lowest certified threshold; None if none is certified.
        risk: The largest mean share of a sequence's tokens that may be predicted differently.
        confidence: The probability that the certificate holds.
        sequences: The number of sequences that the thresholds were tested on.
        sequences_needed: The number that would certify a threshold without any loss.
        empirical_risk: The mean loss at the certified threshold; None if none is certified.
        p_values: One per tested threshold, the highest threshold first.
        certified: The number of certified thresholds.
        reason: Why testing stopped, in one sentence.
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
    """A threshold applied to another corpus (see `cascade.stats.thresholds.Transfer`).

    Attributes:
        source: What the threshold was fitted to, e.g. "hard ratio 0.3"; `from` in the JSON.
        threshold: The threshold.
        hard_ratio: The share of the other corpus's tokens that are hard.
        hard_ratio_interval: Its 95 % interval.
        loss: The mean share of a sequence's tokens that are predicted differently; None if it was
            not measured.
        loss_interval: Its 95 % interval; None if `loss` is None.
        sequences: The number of measured sequences.
    """

    source: Text = msgspec.field(name="from")
    threshold: Finite
    hard_ratio: Share
    hard_ratio_interval: Ends
    loss: Finite | None
    loss_interval: Ends | None
    sequences: Count


class CalibrationTransfer(Part, frozen=True, kw_only=True):
    """The thresholds of a calibration applied to another corpus."""

    corpus: CorpusProvenance
    rows: list[TransferRow]


class CalibrationRecord(StoredRecord, frozen=True, kw_only=True):
    """A calibration: kind `calibration`.

    Attributes:
        schema: The schema of the record.
        kind: Always "calibration".
        provenance: The model, the corpus of the calibration, and the exit heads.
        exit_layer: The exit layer.
        rule: The name of the exit rule.
        seed: Seed of the intervals and of rules that draw random numbers.
        head: The name of the exit head.
        propagation: How upper layers get keys and values of exited tokens.
        interval: The method of the intervals.
        by_hard_ratio: A threshold for each hard ratio.
        certificate: A certified threshold for a risk; None without a risk.
        transfer: The thresholds on another corpus; None without another corpus.
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

    def inconsistency(self) -> str | None:
        """Describe an exit layer that the model does not have."""
        layers = known(self.provenance.model.num_layers)
        if layers is not None and self.exit_layer > layers:
            return f"expected a layer in 1..{layers} at exit_layer, got {self.exit_layer}"
        return None
