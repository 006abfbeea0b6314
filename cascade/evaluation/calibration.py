"""Calibration: thresholds for a model, an exit layer and a rule, fitted and certified on text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cascade.core.arguments import check_seed
from cascade.core.arrays import Array
from cascade.core.errors import CorpusError, ModelError, RecordError, UsageError
from cascade.core.provenance import provenance_of
from cascade.core.records import read_record
from cascade.core.shapes import COUNT, NUMBER, SHARE, TEXT, WHOLE, Maybe, Shape, flaw, one_of
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.decoding.early_exit import PROPAGATIONS, EarlyExit, Propagation, make_exit
from cascade.decoding.forward import Pass, slices
from cascade.decoding.inputs import make_chunk
from cascade.decoding.selective_layers import SkippingLayers
from cascade.evaluation.operating_points import Evaluator, OperatingPoint
from cascade.exits.fitted_heads import FittedHeads, heads_provenance
from cascade.exits.rules import check_layers, find_rule
from cascade.models.flops import Counts
from cascade.models.identity import check_same_model
from cascade.models.stack import DecoderStack
from cascade.stats.certificates import Certificate, certify, check_certifiable, too_few
from cascade.stats.thresholds import fit_threshold, transfer

KIND = "calibration"

#: What a calibration must hold to run with.
_PARTS: Shape = {
    "exit_layer": COUNT,
    "rule": TEXT,
    "seed": WHOLE,
    "head": TEXT,
    "propagation": one_of(*PROPAGATIONS),
    "by_hard_ratio": [{"hard_ratio": SHARE, "threshold": NUMBER}],
    "certificate": Maybe({"threshold": Maybe(NUMBER, present=True)}, present=True),
    "provenance": {"model": {}, "heads_fingerprint": Maybe(TEXT)},
}

#: Exit shares whose thresholds are tested one after the other, the safest first.
_TESTED_SHARES = (0.01, 0.02, 0.03, 0.05, 0.07, *(share / 100 for share in range(10, 100, 5)), 1.0)


@dataclass(frozen=True)
class Wish:
    """What to calibrate.

    Attributes:
        layer: The exit layer.
        rule: The rule's name.
        hard_ratios: A threshold is fitted for each.
        propagation: What upper layers see of tokens that left; it decides the risk.
        risk: The largest mean share of tokens that may differ from the full model's; None: no
            certificate is wanted.
        confidence: How sure the certificate has to be.
    """

    layer: int
    rule: str = "cosine"
    hard_ratios: tuple[float, ...] = (0.3, 0.5, 0.7)
    propagation: Propagation = "frozen"
    risk: float | None = None
    confidence: float = 0.95

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: A ratio, risk or confidence out of range, nothing at all is asked for, or a
                rule without thresholds, or that needs the full model's answer or other exit layers.
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


@torch.no_grad()
def confidences(
    stack: DecoderStack,
    blocks: TokenBlocks,
    layer: int,
    rule: str,
    *,
    heads: FittedHeads | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
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
        progress: Called with the number of tokens done since the last call.

    Raises:
        UsageError: No such layer or rule.
        CorpusError: Sequences beyond the model's positions.
        ModelError: A state is not finite, or the heads belong to another model.
    """
    way_out = make_exit(stack, layer, rule, float("inf"), heads=heads)
    check_blocks(stack, blocks, batch_size)
    layers = SkippingLayers(stack, skip=False)
    parts = []
    for ids, _ in blocks.batches(batch_size):
        chunk = make_chunk(stack, torch.from_numpy(ids).long())
        cache = layers.new_cache(*ids.shape, keep=False)
        cache.window(0, ids.shape[1])
        counts = Counts.of(stack.num_layers)
        going = Pass(layers, (way_out,), chunk, cache, counts, seed=seed)
        going.climb(layer)
        rows, columns = torch.nonzero(chunk.valid, as_tuple=True)
        values = [
            way_out.rule.confidence(going.point(way_out, rows[some], columns[some]))
            for some in slices(len(rows), stack.max_positions)
        ]
        made = torch.cat(values).reshape(ids.shape).float()
        if not torch.isfinite(made).all():
            raise ModelError(
                f"the rule {rule} is not finite at exit layer {layer}, nor are the states or logits"
                " there; use a wider --dtype, or get the checkpoint again"
            )
        parts.append(made.cpu().numpy())
        if progress is not None:
            progress(ids.size)
    return np.concatenate(parts)


def calibrate(
    stack: DecoderStack,
    blocks: TokenBlocks,
    wish: Wish,
    *,
    heads: FittedHeads | None = None,
    onto: TokenBlocks | None = None,
    batch_size: int = 32,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Fit thresholds for hard ratios; certify one for a risk; see what they do elsewhere.

    With a risk, the sequences are dealt out in turn: thresholds are proposed on one half and
    tested on the other.

    Args:
        stack: The model.
        blocks: The corpus to calibrate on.
        wish: What to calibrate.
        heads: Fitted heads; the logit lens where not given.
        onto: Another corpus, on which the thresholds' hard ratio and risk are measured.
        batch_size: Sequences per forward pass.
        seed: For rules that draw, and of the intervals.
        command: What the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call.

    Returns:
        A record of kind `calibration`.

    Raises:
        UsageError: Something that cannot be asked for.
        CorpusError: Too few sequences for an interval, or too long ones.
        ModelError: A state is not finite, or the heads belong to another model.
    """
    wish.check()
    check_seed(seed)
    wish = replace(wish, hard_ratios=tuple(dict.fromkeys(wish.hard_ratios)))
    for corpus in (blocks, onto):
        if corpus is None:
            continue
        if len(corpus.ids) < 2:
            raise CorpusError(
                f"expected at least 2 sequences to calibrate on, got {len(corpus.ids)} in "
                f"{corpus.name}: tokens of one are correlated and give no interval; take a larger "
                "corpus, a larger --max-tokens or a smaller --seq-len"
            )
        check_blocks(stack, corpus, batch_size)
    run = _Run(stack, wish, heads, batch_size, seed, progress)
    values = run.confidences(blocks)
    fitted = [fit_threshold(values, ratio, seed=seed) for ratio in wish.hard_ratios]
    certificate = run.certificate(blocks, values) if wish.risk is not None else None
    provenance = provenance_of(stack, blocks, command)
    provenance["model"]["weights_hash"] = stack.weights_hash()
    return {
        "schema": 1,
        "kind": KIND,
        "provenance": provenance | heads_provenance(heads, blocks),
        "exit_layer": wish.layer,
        "rule": wish.rule,
        "seed": seed,
        "head": run.evaluator.exits[wish.layer].head.name,
        "propagation": wish.propagation,
        "interval": "95 % percentile bootstrap over whole sequences",
        "by_hard_ratio": [asdict(row) for row in fitted],
        "certificate": None if certificate is None else asdict(certificate),
        "transfer": None
        if onto is None
        else run.transfer(onto, [row.threshold for row in fitted], certificate),
    }


def tokens_to_read(blocks: TokenBlocks, wish: Wish, *, onto: TokenBlocks | None = None) -> int:
    """Return how many tokens `calibrate` goes through, which `progress` adds up to.

    Args:
        blocks: The corpus to calibrate on.
        wish: What to calibrate.
        onto: Another corpus.
    """
    tests = wish.risk is not None and _beforehand(blocks, wish) is None
    moved = 0 if onto is None else 2 * onto.tokens
    return blocks.tokens + moved + (_tested(blocks).tokens if tests else 0)


def _tested(blocks: TokenBlocks) -> TokenBlocks:
    """Return the sequences that thresholds are tested on; the others propose them."""
    return replace(blocks, ids=blocks.ids[1::2])


def _beforehand(blocks: TokenBlocks, wish: Wish) -> Certificate | None:
    """Return the certificate of too few sequences; None where thresholds have to be tested."""
    assert wish.risk is not None
    return too_few(len(_tested(blocks).ids), risk=wish.risk, confidence=wish.confidence)


class _Run:
    """One calibration: what its steps share."""

    def __init__(
        self,
        stack: DecoderStack,
        wish: Wish,
        heads: FittedHeads | None,
        batch_size: int,
        seed: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.stack, self.wish, self.heads = stack, wish, heads
        self.batch_size, self.seed, self.progress = batch_size, seed, progress
        # Made before any work is done: it refuses a layer or heads that cannot be.
        self.evaluator = Evaluator(
            stack,
            {wish.layer: [wish.rule]},
            heads=heads,
            propagation=wish.propagation,
            seed=seed,
        )

    def confidences(self, blocks: TokenBlocks) -> Array:
        return confidences(
            self.stack,
            blocks,
            self.wish.layer,
            self.wish.rule,
            heads=self.heads,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=self.progress,
        )

    def losses(self, blocks: TokenBlocks, thresholds: Sequence[float]) -> Array:
        points = [
            OperatingPoint(self.wish.layer, self.wish.rule, threshold, "")
            for threshold in thresholds
        ]
        return self.evaluator.losses(blocks, points, progress=self.progress)

    def certificate(self, blocks: TokenBlocks, values: Array) -> Certificate:
        certificate = _beforehand(blocks, self.wish)
        if certificate is not None:
            return certificate
        assert self.wish.risk is not None
        proposed = np.quantile(values[0::2], [1 - share for share in _TESTED_SHARES])
        # In the confidences' own precision, in which they are compared.
        thresholds = np.unique(proposed.astype(values.dtype))[::-1]
        losses = self.losses(_tested(blocks), [float(value) for value in thresholds])
        return certify(thresholds, losses, risk=self.wish.risk, confidence=self.wish.confidence)

    def transfer(
        self, onto: TokenBlocks, thresholds: Sequence[float], certificate: Certificate | None
    ) -> dict[str, Any]:
        sources = [f"hard ratio {ratio:g}" for ratio in self.wish.hard_ratios]
        wanted = list(zip(sources, thresholds, strict=True))
        if certificate is not None and certificate.threshold is not None:
            wanted.append((f"risk {certificate.risk:g}", certificate.threshold))
        if not wanted:  # nothing was certified, and nothing else asked for
            return {"corpus": onto.provenance(), "rows": []}
        values = self.confidences(onto)
        losses = self.losses(onto, [threshold for _, threshold in wanted])
        rows = [
            {"from": source} | asdict(transfer(threshold, values, loss, seed=self.seed))
            for (source, threshold), loss in zip(wanted, losses, strict=True)
        ]
        return {"corpus": onto.provenance(), "rows": rows}


def read_calibration(path: Path, stack: DecoderStack) -> dict[str, Any]:
    """Read a calibration and make sure that it belongs to the model.

    Raises:
        RecordError: The file is missing, torn, or no calibration.
        ModelError: It belongs to another model (both are named).
    """
    record = read_record(path, kind=KIND)
    found = flaw(record, _PARTS)
    if found is not None:
        raise RecordError(
            f"{path} is torn or edited ({found}); make it anew with `cascade calibrate`"
        )
    check_same_model(record["provenance"]["model"], stack, what="this calibration's thresholds")
    try:
        rule = find_rule(record["rule"])
        check_layers({record["exit_layer"]: rule}, stack.num_layers)
        check_seed(record["seed"])
        for row in (*record["by_hard_ratio"], record["certificate"] or {}):
            if row.get("threshold") is not None:
                rule.check(row["threshold"])
    except UsageError as error:
        raise RecordError(f"{path}: {error}; make it anew with `cascade calibrate`") from error
    return record


def threshold_of(record: dict[str, Any], hard_ratio: float | None = None) -> float:
    """Return the threshold to run with.

    Args:
        record: Of kind `calibration`.
        hard_ratio: Take the one fitted for this ratio; where not given, the certified one, which is
            +inf (the full model) where none could be certified, or else the only one there is.

    Raises:
        UsageError: There is none for the ratio, or several and nothing says which.
    """
    rows = record["by_hard_ratio"]
    if hard_ratio is None and record.get("certificate") is not None:
        threshold = record["certificate"]["threshold"]
        return float("inf") if threshold is None else float(threshold)
    ratios = ", ".join(str(row["hard_ratio"]) for row in rows) or "none at all"
    if hard_ratio is None and len(rows) == 1:
        return float(rows[0]["threshold"])
    for row in rows:
        if row["hard_ratio"] == hard_ratio:
            return float(row["threshold"])
    raise UsageError(
        f"this calibration has thresholds for the hard ratios {ratios}; "
        f"choose one with --hard-ratio{'' if hard_ratio is None else f', got {hard_ratio:g}'}"
    )


def early_exit_of(
    record: dict[str, Any],
    stack: DecoderStack,
    *,
    heads: FittedHeads | None = None,
    hard_ratio: float | None = None,
) -> EarlyExit:
    """Return the model with the exit that a calibration describes.

    Args:
        record: Of kind `calibration`.
        stack: The model.
        heads: The heads that it was calibrated with.
        hard_ratio: Which of its thresholds; see `threshold_of`.

    Raises:
        UsageError: The heads are missing, too many or others, or no threshold is chosen.
    """
    used = "ridge" if heads is not None else "logit_lens"
    if (record["head"] == "logit_lens") != (heads is None):
        raise UsageError(
            f"this calibration was made with the {record['head']} head, got {used}; "
            "give the same --heads"
        )
    if heads is not None and heads.fingerprint() != record["provenance"].get("heads_fingerprint"):
        raise UsageError(
            "this calibration was made with other heads of the same model; give the same --heads, "
            "or calibrate anew with these"
        )
    return EarlyExit(
        stack,
        layer=record["exit_layer"],
        rule=record["rule"],
        threshold=threshold_of(record, hard_ratio),
        heads=heads,
        propagation=record["propagation"],
        seed=record["seed"],
    )
