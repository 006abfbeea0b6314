"""Calibration: thresholds for a model, an exit layer and a rule, fitted and certified on text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from msgspec import structs

from cascade.core.arguments import check_seed
from cascade.core.arrays import Array
from cascade.core.defaults import HARD_RATIOS
from cascade.core.errors import CorpusError, RecordError, UsageError, not_finite
from cascade.core.provenance import CorpusProvenance
from cascade.core.records import read_typed
from cascade.core.schema import UnsetType, from_plain, to_plain
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.decoding.early_exit import PROPAGATIONS, EarlyExit, Propagation, make_exit
from cascade.decoding.forward import Exit, ForwardPass, PassConfig, slices
from cascade.decoding.inputs import make_chunk
from cascade.decoding.selective_layers import SkippingLayers
from cascade.evaluation.calibration_record import (
    CalibrationRecord,
    CalibrationTransfer,
    CertifiedThreshold,
    HardRatioThreshold,
    TransferRow,
)
from cascade.evaluation.exit_evaluation import exit_provenance
from cascade.evaluation.operating_points import Evaluator, OperatingPoint
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.rules import check_layers, find_rule
from cascade.models.flops import Counts
from cascade.models.identity import check_same_model
from cascade.models.stack import DecoderStack
from cascade.stats.certificates import Certificate, certify, check_certifiable, too_few
from cascade.stats.thresholds import fit_threshold, transfer

Progress = Callable[[int], None] | None

#: Exit shares whose thresholds are tested one after the other, the safest first.
_TESTED_SHARES = (0.01, 0.02, 0.03, 0.05, 0.07, *(share / 100 for share in range(10, 100, 5)), 1.0)

_INTERVAL = "95 % percentile bootstrap over whole sequences"


@dataclass(frozen=True)
class CalibrationConfig:
    """What to calibrate, and how.

    Attributes:
        layer: The exit layer.
        rule: The rule's name.
        hard_ratios: A threshold is fitted to each.
        propagation: What upper layers see of exited tokens; it changes the risk.
        risk: The largest mean share of a sequence's tokens that may be predicted differently from
            the full model; None: no threshold is certified.
        confidence: The probability with which the certificate holds.
        batch_size: Sequences per forward pass.
        seed: For rules that draw, and of the intervals.

    Example:
        >>> CalibrationConfig(layer=29, hard_ratios=(0.5,)).check()
    """

    layer: int
    rule: str = "cosine"
    hard_ratios: tuple[float, ...] = HARD_RATIOS
    propagation: Propagation = "frozen"
    risk: float | None = None
    confidence: float = 0.95
    batch_size: int = 32
    seed: int = 0

    def check(self) -> None:
        """Refuse a configuration that cannot be run with.

        Raises:
            UsageError: A ratio, risk, confidence or seed is out of range; neither a hard ratio nor
                a risk is given; or the rule has no thresholds, or needs the full model's answer or
                other exit layers.
        """
        self._check_rule()
        if not self.hard_ratios and self.risk is None:
            raise UsageError("expected a hard ratio or a risk to calibrate for, got neither")
        if self.propagation not in PROPAGATIONS:
            raise UsageError(
                f"expected a propagation among {', '.join(PROPAGATIONS)}, got {self.propagation!r}"
            )
        for ratio in self.hard_ratios:
            if not 0 <= ratio <= 1:
                raise UsageError(f"expected a hard ratio in 0..1, got {ratio:g}")
        check_certifiable(self.risk, self.confidence)
        check_seed(self.seed)

    def _check_rule(self) -> None:
        rule = find_rule(self.rule)
        if rule.needs_full:
            raise UsageError(
                f"the rule {self.rule} needs the full model's answer: it has nothing to calibrate"
            )
        if rule.needs_earlier:
            raise UsageError(
                f"the rule {self.rule} looks at earlier exit layers, and a calibration has only one"
                " layer; calibrate another rule"
            )
        if self.rule == "fixed":
            raise UsageError(
                "the rule fixed lets every token leave: it has no threshold to calibrate"
            )


def confidences(
    stack: DecoderStack,
    blocks: TokenBlocks,
    layer: int,
    rule: str,
    *,
    heads: FittedHeads | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Array:
    """Return every token's confidence at an exit layer, `[S, T]`; nothing above it is computed.

    Args:
        stack: The model.
        blocks: The corpus.
        layer: The exit layer.
        rule: The rule's name.
        heads: Fitted heads; the logit lens where not given.
        batch_size: Sequences per forward pass.
        seed: For rules that draw.

    Raises:
        UsageError: No such layer or rule.
        CorpusError: Sequences beyond the model's positions.
        ModelError: A state is not finite, or the heads belong to another model.
    """
    at = make_exit(stack, layer, rule, float("inf"), heads=heads)
    return np.concatenate([*_confidence_batches(stack, blocks, at, batch_size, seed)])


@torch.no_grad()
def _confidence_batches(
    stack: DecoderStack, blocks: TokenBlocks, at: Exit, batch_size: int, seed: int
) -> Iterator[Array]:
    """Yield every token's confidence at an exit, `[B, T]` per batch of sequences."""
    check_blocks(stack, blocks, batch_size)
    layers = SkippingLayers(stack, skip=False)
    for ids, _ in blocks.batches(batch_size):
        chunk = make_chunk(stack, torch.from_numpy(ids).long())
        cache = layers.new_cache(*ids.shape, keep=False)
        cache.window(0, ids.shape[1])
        counts = Counts.of(stack.num_layers)
        going = ForwardPass(layers, (at,), chunk, cache, counts, PassConfig(seed=seed))
        going.run_layers_to(at.layer)
        rows, columns = torch.nonzero(chunk.valid, as_tuple=True)
        values = [
            at.rule.confidence(going.exit_point(at, rows[some], columns[some]))
            for some in slices(len(rows), stack.max_positions)
        ]
        made = torch.cat(values).reshape(ids.shape).float()
        if not torch.isfinite(made).all():
            raise not_finite(
                f"the rule {at.rule.name} is not finite at exit layer {at.layer}, nor are "
                "the states or logits there"
            )
        yield made.cpu().numpy()


def calibrate(
    stack: DecoderStack,
    blocks: TokenBlocks,
    config: CalibrationConfig,
    *,
    heads: FittedHeads | None = None,
    onto: TokenBlocks | None = None,
    command: str | None = None,
    progress: Progress = None,
) -> CalibrationRecord:
    """Fit a threshold to each hard ratio; certify one for a risk; apply them to another corpus.

    With a risk, every second sequence tests the thresholds that the other sequences propose.

    Args:
        stack: The model.
        blocks: The corpus to calibrate on.
        config: What to calibrate.
        heads: Fitted heads; the logit lens where not given.
        onto: Another corpus, on which the thresholds' hard ratio and risk are measured.
        command: What the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call.

    Raises:
        UsageError: An option is out of its range.
        CorpusError: Too few sequences for an interval, or too long ones.
        ModelError: A state is not finite, or the heads belong to another model.
    """
    config.check()
    config = replace(config, hard_ratios=tuple(dict.fromkeys(config.hard_ratios)))
    for corpus in (blocks, *([] if onto is None else [onto])):
        _check_corpus(stack, corpus, config.batch_size)
    run = _Run(stack, config, heads, progress)
    values = run.confidences(blocks)
    fitted = [
        from_plain(asdict(fit_threshold(values, ratio, seed=config.seed)), HardRatioThreshold)
        for ratio in config.hard_ratios
    ]
    certificate = None if config.risk is None else run.certificate(blocks, values, config.risk)
    provenance = exit_provenance(stack, blocks, command, heads=heads)
    # Of a model in memory, too: a calibration runs with these weights alone.
    model = structs.replace(provenance.model, weights_hash=stack.weights_hash())
    return CalibrationRecord(
        provenance=structs.replace(provenance, model=model),
        exit_layer=config.layer,
        rule=config.rule,
        seed=config.seed,
        head=run.evaluator.exits[config.layer].head.name,
        propagation=config.propagation,
        interval=_INTERVAL,
        by_hard_ratio=fitted,
        certificate=certificate,
        transfer=None if onto is None else run.transfer(onto, fitted, certificate),
    )


def _check_corpus(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> None:
    if len(blocks.ids) < 2:
        raise CorpusError(
            f"expected at least 2 sequences to calibrate on, got {len(blocks.ids)} in "
            f"{blocks.name}: tokens of one are correlated and give no interval; take a larger "
            "corpus, a larger --max-tokens or a smaller --seq-len"
        )
    check_blocks(stack, blocks, batch_size)


def tokens_to_read(
    blocks: TokenBlocks, config: CalibrationConfig, *, onto: TokenBlocks | None = None
) -> int:
    """Return how many tokens `calibrate` reads: the sum of what `progress` is called with.

    Args:
        blocks: The corpus to calibrate on.
        config: What to calibrate.
        onto: Another corpus.
    """
    tested = 0
    if config.risk is not None:
        testing = _tested(blocks)
        enough = _too_few(testing, config.risk, config.confidence) is None
        tested = testing.tokens if enough else 0
    return blocks.tokens + tested + (0 if onto is None else 2 * onto.tokens)


def _tested(blocks: TokenBlocks) -> TokenBlocks:
    """Return the sequences that thresholds are tested on; the others propose them."""
    return replace(blocks, ids=blocks.ids[1::2])


def _too_few(tested: TokenBlocks, risk: float, confidence: float) -> Certificate | None:
    """Return the certificate of too few sequences; None where thresholds have to be tested."""
    return too_few(len(tested.ids), risk=risk, confidence=confidence)


class _Run:
    """One calibration: its model, configuration and evaluator."""

    def __init__(
        self,
        stack: DecoderStack,
        config: CalibrationConfig,
        heads: FittedHeads | None,
        progress: Progress,
    ) -> None:
        self.stack, self.config, self.progress = stack, config, progress
        # Made before any pass: it refuses a layer or heads that do not fit the model.
        self.evaluator = Evaluator(
            stack,
            {config.layer: [config.rule]},
            heads=heads,
            propagation=config.propagation,
            seed=config.seed,
        )
        self.exit = make_exit(stack, config.layer, config.rule, float("inf"), heads=heads)

    def confidences(self, blocks: TokenBlocks) -> Array:
        """Return every token's confidence, `[S, T]`."""
        config, batches = self.config, []
        for batch in _confidence_batches(
            self.stack, blocks, self.exit, config.batch_size, config.seed
        ):
            batches.append(batch)
            if self.progress is not None:
                self.progress(batch.size)
        return np.concatenate(batches)

    def losses(self, blocks: TokenBlocks, thresholds: Sequence[float]) -> Array:
        """Return each sequence's share of differing predictions, `[thresholds, S]`."""
        config = self.config
        points = [
            OperatingPoint(config.layer, config.rule, threshold, "") for threshold in thresholds
        ]
        return self.evaluator.losses(blocks, points, progress=self.progress)

    def certificate(self, blocks: TokenBlocks, values: Array, risk: float) -> CertifiedThreshold:
        """Test thresholds on half of the sequences, proposed by the confidences of the others.

        Args:
            blocks: All sequences.
            values: Their confidences, `[S, T]`.
            risk: The risk to certify.
        """
        tested, confidence = _tested(blocks), self.config.confidence
        found = _too_few(tested, risk, confidence)
        if found is None:
            proposed = np.quantile(values[0::2], [1 - share for share in _TESTED_SHARES])
            # In the confidences' own precision, in which they are compared.
            thresholds = np.unique(proposed.astype(values.dtype))[::-1]
            losses = self.losses(tested, [float(value) for value in thresholds])
            found = certify(thresholds, losses, risk=risk, confidence=confidence)
        return from_plain(asdict(found), CertifiedThreshold)

    def transfer(
        self,
        onto: TokenBlocks,
        fitted: Sequence[HardRatioThreshold],
        certificate: CertifiedThreshold | None,
    ) -> CalibrationTransfer:
        """Measure the fitted and the certified thresholds on another corpus."""
        wanted = [(f"hard ratio {row.hard_ratio:g}", row.threshold) for row in fitted]
        if certificate is not None and certificate.threshold is not None:
            wanted.append((f"risk {certificate.risk:g}", certificate.threshold))
        corpus = from_plain(to_plain(onto.provenance()), CorpusProvenance)
        if not wanted:  # no hard ratio was given, and nothing was certified
            return CalibrationTransfer(corpus=corpus, rows=[])
        values = self.confidences(onto)
        losses = self.losses(onto, [threshold for _, threshold in wanted])
        rows = []
        for (source, threshold), loss in zip(wanted, losses, strict=True):
            found = transfer(threshold, values, loss, seed=self.config.seed)
            rows.append(from_plain({"from": source} | asdict(found), TransferRow))
        return CalibrationTransfer(corpus=corpus, rows=rows)


# --- Running with a calibration --------------------------------------------------------------


def read_calibration(path: Path) -> CalibrationRecord:
    """Read a calibration, and check that its rule has such layers, thresholds and seeds.

    Whether it belongs to a model is checked where it is applied, by `early_exit_of`.

    Raises:
        RecordError: The file is missing, torn, or no calibration.
    """
    record = read_typed(path, CalibrationRecord)
    try:
        _check_rule_of(record)
    except UsageError as error:
        raise RecordError(f"{path}: {error}; make it anew with `cascade calibrate`") from error
    return record


def _check_rule_of(record: CalibrationRecord) -> None:
    rule, num_layers = find_rule(record.rule), record.provenance.model.num_layers
    if not isinstance(num_layers, UnsetType):
        check_layers({record.exit_layer: rule}, num_layers)
    check_seed(record.seed)
    thresholds = [row.threshold for row in record.by_hard_ratio]
    if record.certificate is not None and record.certificate.threshold is not None:
        thresholds.append(record.certificate.threshold)
    for threshold in thresholds:
        rule.check(threshold)


def threshold_of(record: CalibrationRecord, hard_ratio: float | None = None) -> float:
    """Return the threshold to run with.

    Args:
        record: A calibration.
        hard_ratio: Take the threshold fitted to this ratio. Where not given: the certified one,
            which is +inf (the full model) where none could be certified; without a certificate,
            the only one there is.

    Raises:
        UsageError: There is none for the ratio, or there are several and no ratio is given.
    """
    rows, certificate = record.by_hard_ratio, record.certificate
    if hard_ratio is None and certificate is not None:
        return float("inf") if certificate.threshold is None else certificate.threshold
    if hard_ratio is None and len(rows) == 1:
        return rows[0].threshold
    for row in rows:
        if row.hard_ratio == hard_ratio:
            return row.threshold
    ratios = ", ".join(str(row.hard_ratio) for row in rows) or "none at all"
    raise UsageError(
        f"this calibration has thresholds for the hard ratios {ratios}; "
        f"choose one with --hard-ratio{'' if hard_ratio is None else f', got {hard_ratio:g}'}"
    )


def early_exit_of(
    record: CalibrationRecord,
    stack: DecoderStack,
    *,
    heads: FittedHeads | None = None,
    hard_ratio: float | None = None,
) -> EarlyExit:
    """Return the model with the exit that a calibration describes.

    Args:
        record: A calibration.
        stack: The model that it was made with.
        heads: The heads that it was made with.
        hard_ratio: Which of its thresholds; see `threshold_of`.

    Raises:
        ModelError: The calibration belongs to another model (both are named).
        UsageError: The heads are missing, too many or others, or no threshold is chosen.
    """
    check_same_model(to_plain(record.provenance.model), stack, what="this calibration's thresholds")
    _check_heads(record, heads)
    return EarlyExit(
        stack,
        layer=record.exit_layer,
        rule=record.rule,
        threshold=threshold_of(record, hard_ratio),
        heads=heads,
        propagation=record.propagation,
        seed=record.seed,
    )


def _check_heads(record: CalibrationRecord, heads: FittedHeads | None) -> None:
    """Refuse other heads than those that a calibration was made with."""
    used = "ridge" if heads is not None else "logit_lens"
    if (record.head == "logit_lens") != (heads is None):
        raise UsageError(
            f"this calibration was made with the {record.head} head, got {used}; "
            "give the same --heads"
        )
    if heads is not None and heads.fingerprint() != record.provenance.heads_fingerprint:
        raise UsageError(
            "this calibration was made with other heads of the same model; give the same --heads, "
            "or calibrate anew with these"
        )
