"""Calibration: fitted and certified thresholds of an exit layer and rule for a model and corpus."""

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
from cascade.corpora.bos import check_same_bos
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

#: Exit shares whose thresholds are tested in this order, the safest first.
_TESTED_SHARES = (0.01, 0.02, 0.03, 0.05, 0.07, *(share / 100 for share in range(10, 100, 5)), 1.0)

_INTERVAL = "95 % percentile bootstrap over whole sequences"


@dataclass(frozen=True)
class CalibrationConfig:
    """The options of a calibration.

    Attributes:
        layer: The exit layer.
        rule: The name of the exit rule.
        hard_ratios: Hard ratios; a threshold is fitted to each.
        propagation: How upper layers get keys and values of exited tokens; it affects the risk.
        risk: The largest mean share of a sequence's tokens that may be predicted differently from
            the full model; None: no threshold is certified.
        confidence: The probability with which the certificate holds.
        batch_size: Sequences per forward pass.
        seed: Seed of the intervals and of rules that draw random numbers.

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
        """Check that the options are valid.

        Raises:
            UsageError: A ratio, risk, confidence or seed is out of range; neither a hard ratio nor
                a risk is given; or the rule has no threshold, or needs the full model's prediction
                or other exit layers.
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
                f"the rule {self.rule} needs the full model's prediction and cannot be calibrated; "
                "calibrate another rule"
            )
        if rule.needs_earlier:
            raise UsageError(
                f"the rule {self.rule} needs earlier exit layers, and a calibration has only one "
                "layer; calibrate another rule"
            )
        if self.rule == "fixed":
            raise UsageError(
                "the rule fixed lets every token exit and has no threshold; calibrate another rule"
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
    """Return every token's confidence at an exit layer, `[S, T]`.

    Layers above the exit layer are not computed.

    Args:
        stack: The model.
        blocks: The corpus.
        layer: The exit layer.
        rule: The name of the exit rule.
        heads: Fitted heads (default: the logit lens).
        batch_size: Sequences per forward pass.
        seed: Seed for rules that draw random numbers.

    Raises:
        UsageError: There is no such layer or rule.
        CorpusError: Sequences are longer than the model's positions.
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
        forward = ForwardPass(layers, (at,), chunk, cache, counts, PassConfig(seed=seed))
        forward.run_layers_to(at.layer)
        rows, columns = torch.nonzero(chunk.valid, as_tuple=True)
        values = [
            at.rule.confidence(forward.exit_point(at, rows[some], columns[some]))
            for some in slices(len(rows), stack.max_positions)
        ]
        made = torch.cat(values).reshape(ids.shape).float()
        if not torch.isfinite(made).all():
            raise not_finite(
                f"the rule {at.rule.name} is not finite at exit layer {at.layer}, because states or"
                " logits are not finite"
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
    """Return thresholds fitted to hard ratios and, with a risk, a certified threshold.

    For the certificate, half of the sequences propose thresholds and the other half tests them.

    Args:
        stack: The model.
        blocks: The corpus to calibrate on.
        config: The options of the calibration.
        heads: Fitted heads (default: the logit lens).
        onto: Another corpus, on which the hard ratio and the risk of the thresholds are measured.
        command: The command that the user ran, for the provenance.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        UsageError: An option is out of range.
        CorpusError: There are too few sequences for an interval, or they are too long.
        ModelError: A state is not finite, or the heads belong to another model.

    Example:
        >>> from cascade import calibrate, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, seq_len=32, max_tokens=256)
        >>> record = calibrate(stack, blocks, CalibrationConfig(layer=29, hard_ratios=(0.5,)))
        >>> row = record.by_hard_ratio[0]
        >>> row.hard_ratio, 0 < row.threshold < 1
        (0.5, True)
    """
    config.check()
    config = replace(config, hard_ratios=tuple(dict.fromkeys(config.hard_ratios)))
    for corpus in (blocks, *([] if onto is None else [onto])):
        _check_corpus(stack, corpus, config.batch_size)
        check_same_bos(blocks.bos, corpus.bos, what="thresholds are fitted on text")
    if heads is not None:
        heads.check_bos(blocks.bos)
    run = _Run(stack, config, heads, progress)
    values = run.confidences(blocks)
    fitted = [
        from_plain(asdict(fit_threshold(values, ratio, seed=config.seed)), HardRatioThreshold)
        for ratio in config.hard_ratios
    ]
    certificate = None if config.risk is None else run.certificate(blocks, values, config.risk)
    provenance = exit_provenance(stack, blocks, command, heads=heads)
    # Models in memory get a weights hash too, since a calibration is valid only for these weights.
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
            f"{blocks.name} (tokens of one sequence are correlated and give no interval); use a "
            "larger corpus, a larger --max-tokens or a smaller --seq-len"
        )
    check_blocks(stack, blocks, batch_size)


def tokens_to_read(
    blocks: TokenBlocks, config: CalibrationConfig, *, onto: TokenBlocks | None = None
) -> int:
    """Return the number of tokens that `calibrate` processes and reports to `progress` in total.

    Args:
        blocks: The corpus to calibrate on.
        config: The options of the calibration.
        onto: Another corpus, or None.
    """
    tested = 0
    if config.risk is not None:
        testing = _tested(blocks)
        enough = _too_few(testing, config.risk, config.confidence) is None
        tested = testing.tokens if enough else 0
    return blocks.tokens + tested + (0 if onto is None else 2 * onto.tokens)


def _tested(blocks: TokenBlocks) -> TokenBlocks:
    """Return the sequences that test thresholds; the others propose thresholds."""
    return replace(blocks, ids=blocks.ids[1::2])


def _too_few(tested: TokenBlocks, risk: float, confidence: float) -> Certificate | None:
    """Return the certificate for too few sequences, or None if there are enough to test."""
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
        # Created before any pass, because it checks layer and heads.
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
        """Return the certificate: half of the sequences test thresholds that the others propose.

        Args:
            blocks: All sequences.
            values: Confidences of all tokens, `[S, T]`.
            risk: The risk to certify.
        """
        tested, confidence = _tested(blocks), self.config.confidence
        found = _too_few(tested, risk, confidence)
        if found is None:
            proposed = np.quantile(values[0::2], [1 - share for share in _TESTED_SHARES])
            # Confidences are compared in their own precision.
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
        if not wanted:  # without hard ratios and without a certified threshold
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
    """Return a stored calibration, after checking its layer, thresholds and seed.

    `early_exit_of` checks that it belongs to a model.

    Args:
        path: The file.

    Raises:
        RecordError: The file is missing or torn, or it is not a calibration.
    """
    record = read_typed(path, CalibrationRecord)
    try:
        _check_rule_of(record)
    except UsageError as error:
        raise RecordError(f"{path}: {error}; create it again with `cascade calibrate`") from error
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
    """Return the threshold of a calibration to run with.

    Args:
        record: The calibration.
        hard_ratio: Return the threshold fitted to this ratio. None: return the certified threshold,
            or +inf (the full model) if none could be certified; without a certificate, return the
            only threshold.

    Raises:
        UsageError: There is no threshold for the ratio, or there are several and no ratio is given.
    """
    rows, certificate = record.by_hard_ratio, record.certificate
    if hard_ratio is None and certificate is not None:
        return float("inf") if certificate.threshold is None else certificate.threshold
    if hard_ratio is None and len(rows) == 1:
        return rows[0].threshold
    for row in rows:
        if row.hard_ratio == hard_ratio:
            return row.threshold
    ratios = ", ".join(str(row.hard_ratio) for row in rows) or "none"
    got = "no ratio" if hard_ratio is None else f"{hard_ratio:g}"
    raise UsageError(
        f"expected a hard ratio of this calibration ({ratios}), got {got}; choose one with "
        "--hard-ratio"
    )


def early_exit_of(
    record: CalibrationRecord,
    stack: DecoderStack,
    *,
    heads: FittedHeads | None = None,
    hard_ratio: float | None = None,
) -> EarlyExit:
    """Return the model with the calibrated exit.

    Args:
        record: The calibration.
        stack: The model of the calibration.
        heads: The heads of the calibration, or None for the logit lens.
        hard_ratio: The hard ratio whose threshold is used; see `threshold_of`.

    Raises:
        ModelError: The calibration belongs to another model; names both models.
        UsageError: The heads differ from those of the calibration, or no threshold is chosen.
    """
    about = record.provenance
    made_for = structs.replace(about.model, tokenizer_hash=about.tokenizer_hash)
    check_same_model(made_for, stack, what="this calibration's thresholds")
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
    """Check that heads are those of a calibration."""
    used = "ridge" if heads is not None else "logit_lens"
    if (record.head == "logit_lens") != (heads is None):
        raise UsageError(
            f"expected the {record.head} head of this calibration, got {used}; pass the same "
            "--heads"
        )
    if heads is not None and heads.fingerprint() != record.provenance.heads_fingerprint:
        raise UsageError(
            "expected the heads of this calibration, got other heads of the same model; pass the "
            "same --heads, or calibrate again with these"
        )
