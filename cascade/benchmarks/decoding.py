"""Benchmark of early exit: time several variants of decoding, and scoring with skipped tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging

from cascade.benchmarks.decoding_results import (
    AssistantTimes,
    GeneratedRow,
    ScoringTimes,
    TimedExit,
    decoding_targets,
    generated_rows,
    share_equal,
    skipping_rows,
)
from cascade.benchmarks.passes import generate_plainly
from cascade.benchmarks.records import BenchmarkRecord
from cascade.benchmarks.timing import (
    INTERVAL,
    BenchmarkConfig,
    BenchmarkError,
    Session,
    Timings,
    Variant,
    check_least,
    session,
)
from cascade.core.errors import first_line
from cascade.core.provenance import provenance_of
from cascade.core.schema import UNSET
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.decoding.early_exit import EarlyExit, Propagation
from cascade.decoding.generation_settings import plain_settings
from cascade.evaluation.calibration import confidences
from cascade.exits.fitted_heads import FittedHeads, load_heads
from cascade.exits.head_fitting import fit_heads
from cascade.exits.rules import check_layers, find_rule
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.stats.thresholds import fit_threshold

#: Description of each variant, as stored in the record.
VARIANTS = {
    "generate": "transformers' generate, greedy",
    "full": "cascade at full depth, no exit",
    "exact": "early exit, exited tokens are computed when a later token continues",
    "verified": "as exact, and the full model verifies every token",
    "frozen": "early exit, keys and values from the exit state",
    "ridge": "early exit, keys and values from a ridge map",
}

#: Variants that are timed on fewer tokens, because `assistant_early_exit` is slow.
SHORT_VARIANTS = {
    "assistant": "transformers' generate with assistant_early_exit, greedy",
    "generate": "transformers' generate over the same few tokens",
}

#: New tokens and timed rounds of `SHORT_VARIANTS`. They make about 2 to 4 tokens/s on two cores.
SHORT_TOKENS, SHORT_ROUNDS = 8, 2

#: Tokens for fitting heads and for fitting thresholds, if none are given.
FITTED_TOKENS, CALIBRATED_TOKENS = 8192, 2048

#: Hard ratio, layers, rounds, sequences and tokens per sequence for timing skipped tokens.
SCORED_HARD_RATIO, SCORED_LAYERS, SCORED_ROUNDS = 0.3, (8, 15, 24), 3
SCORED_SEQUENCES, SCORED_LENGTH = 32, 128


@dataclass(frozen=True)
class DecodingBenchmarkConfig(BenchmarkConfig):
    """Options of the benchmark of early exit.

    Attributes:
        dtype: "float32" or "bfloat16".
        prompts: Number of prompts that every variant continues in one round.
        prompt_tokens: Tokens per prompt.
        new_tokens: New tokens per prompt.
        batch_size: Prompts per batch.
        layer: Exit layer (default: 24, the second to last in a shallower model, or the highest
            fitted layer).
        rule: Exit rule.
        threshold: Tokens exit at or above this confidence (default: fitted to `hard_ratio`).
        hard_ratio: Share of hard tokens on the text that the threshold is fitted on.
        heads: File of fitted heads (default: fit them).
        scoring: Also time scoring with skipped tokens.

    Raises:
        BenchmarkError: A number is out of range, or the dtype is not supported.
    """

    dtype: str = "float32"
    prompts: int = 2
    prompt_tokens: int = 64
    new_tokens: int = 24
    batch_size: int = 1
    rounds: int = 5
    layer: int | None = None
    rule: str = "cosine"
    threshold: float | None = None
    hard_ratio: float = 0.5
    heads: str | None = None
    scoring: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"prompts": 1, "prompt_tokens": 2, "new_tokens": 2, "batch_size": 1})
        if self.dtype not in ("float32", "bfloat16"):
            raise BenchmarkError(f"expected --dtype float32 or bfloat16, got {self.dtype}")
        if not 0 <= self.hard_ratio <= 1:
            raise BenchmarkError(f"expected --hard-ratio in 0..1, got {self.hard_ratio:g}")


class DecodingBenchmark(BenchmarkRecord, frozen=True, kw_only=True):
    """Record of the benchmark of early exit."""

    KIND = "bench.decode"
    COMMAND = "bench early-exit --output"

    kind: Literal["bench.decode"] = "bench.decode"
    settings: DecodingBenchmarkConfig
    exit: TimedExit
    generated: dict[str, GeneratedRow]
    assistant: AssistantTimes
    scoring: ScoringTimes


def benchmark_decoding(
    config: DecodingBenchmarkConfig,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> DecodingBenchmark:
    """Time every variant of decoding on the same prompts, and scoring with skipped tokens.

    Args:
        config: Options of the benchmark.
        command: Command that the user ran, for the provenance.
        progress: Called with a message for each step.

    Returns:
        The record. A missed target does not raise an error.

    Raises:
        BenchmarkError: The corpus has too few tokens, or the model has too few positions.
        UsageError: The layer or rule does not exist, or the threshold is outside the rule's range.
        RecordError: The heads cannot be read.
        ModelError: The model cannot be loaded, or the heads belong to another model.
        DeviceError: The device is missing or does not support the dtype.
    """
    with session(config, progress) as (config, run):
        subject = _Subject(config, run)
        timings, fallback = subject.decoding()
        assistant = subject.assistant()
        scoring = subject.scoring()
    ratios = run.ratios(timings, [(name, "generate") for name in VARIANTS if name != "generate"])
    generated = generated_rows(timings.results, config.prompt_tokens, subject.stack.num_layers)
    # Verified tokens are guaranteed to equal the full model's only in fp32.
    equal = generated["verified"].agreement if config.dtype == "float32" else None
    return DecodingBenchmark(
        provenance=run.provenance(provenance_of(subject.stack, subject.prompts, command)),
        settings=replace(config, layer=subject.layer, threshold=subject.threshold),
        exit=subject.exit(fallback),
        variants=timings.rows(VARIANTS, tokens=config.prompts * config.new_tokens),
        order=timings.order,
        ratios=ratios,
        interval=INTERVAL,
        generated=generated,
        assistant=assistant,
        scoring=scoring,
        targets=decoding_targets(
            ratios[0], equal, () if scoring.skipping is UNSET else scoring.skipping
        ),
    )


class _Subject:
    """The model, the prompts and the exit of one benchmark."""

    def __init__(self, config: DecodingBenchmarkConfig, run: Session) -> None:
        self.config, self.run = config, run
        run.progress(f"Loading {config.model} in {config.dtype}")
        self.stack = load(config.model, dtype=config.dtype, device=config.device)
        self._check_positions()
        given = None if config.heads is None else load_heads(Path(config.heads), self.stack)
        self.layer = _exit_layer(config.layer, given, self.stack)
        check_layers({self.layer: find_rule(config.rule)}, self.stack.num_layers)
        if config.threshold is not None:
            find_rule(config.rule).check(config.threshold)
        self.prompts, fitted_on = self._texts()
        self.heads = given or self._fit()
        self.threshold, self._threshold_from = self._threshold(fitted_on)

    def _check_positions(self) -> None:
        prompt, new, most = (
            self.config.prompt_tokens,
            self.config.new_tokens,
            self.stack.max_positions,
        )
        if most is not None and prompt + new > most:
            raise BenchmarkError(
                f"{prompt} --prompt-tokens and {new} --new-tokens exceed the model's {most} "
                "positions; use fewer"
            )

    def _texts(self) -> tuple[TokenBlocks, TokenBlocks]:
        """Return prompts from the second half of the held-out split, and blocks of the first."""
        config = self.config
        blocks = self._read("held-out", config.prompt_tokens)
        half = len(blocks.ids) // 2
        if len(blocks.ids) - half < config.prompts or half < 2:
            raise BenchmarkError(
                f"expected at least {max(4, 2 * config.prompts)} prompts of "
                f"{config.prompt_tokens} tokens (half of them for fitting a threshold), but the "
                f"embedded held-out text has {len(blocks.ids)}; use fewer --prompts or "
                "--prompt-tokens"
            )
        fitted = blocks.ids[:half][: max(2, CALIBRATED_TOKENS // config.prompt_tokens)]
        prompts = blocks.ids[half : half + config.prompts]
        return replace(blocks, ids=prompts), replace(blocks, ids=fitted)

    def _read(self, split: str, length: int, tokens: int | None = None) -> TokenBlocks:
        return load_blocks(
            EMBEDDED,
            self.stack.tokenizer,
            seq_len=length,
            num_samples=None,
            max_tokens=tokens,
            split=split,
        )

    def _fit(self) -> FittedHeads:
        self.run.progress(f"Fitting heads at layer {self.layer}")
        length = min(SCORED_LENGTH, self.stack.max_positions or SCORED_LENGTH)
        return fit_heads(self.stack, self._read("train", length, FITTED_TOKENS), [self.layer])

    def _threshold(self, blocks: TokenBlocks) -> tuple[float, str]:
        """Return the threshold and how it was determined."""
        if self.config.threshold is not None:
            return self.config.threshold, "given"
        self.run.progress("Fitting the threshold")
        found = confidences(self.stack, blocks, self.layer, self.config.rule, heads=self.heads)
        fitted = fit_threshold(found, self.config.hard_ratio)
        return fitted.threshold, (
            f"hard ratio {fitted.reached:.3f} on {blocks.tokens} tokens of the first half of the "
            "held-out text; prompts come from the second half"
        )

    def _early(self, propagation: Propagation) -> EarlyExit:
        return EarlyExit(
            self.stack,
            layer=self.layer,
            rule=self.config.rule,
            threshold=self.threshold,
            heads=self.heads,
            propagation=propagation,
            seed=self.config.seed,
        )

    def _batches(self) -> list[Tensor]:
        ids = torch.from_numpy(self.prompts.ids).long().to(self.stack.device)
        return list(ids.split(self.config.batch_size))

    def exit(self, fallback: str | None) -> TimedExit:
        """Return the exit as stored in the record."""
        fitted = f"closed form, {FITTED_TOKENS} tokens of the training split"
        return TimedExit(
            layer=self.layer,
            rule=self.config.rule,
            heads=self.config.heads or fitted,
            head=self.heads.head(self.stack, self.layer).name,
            threshold=self._threshold_from,
            fallback=fallback,
        )

    def decoding(self) -> tuple[Timings, str | None]:
        """Time every variant. Return the times, and why no work is skipped (None if it is)."""
        batches, new = self._batches(), self.config.new_tokens
        variants: dict[str, Variant] = {
            "generate": lambda: [generate_plainly(self.stack, ids, new) for ids in batches]
        }
        exact, frozen = self._early("exact"), self._early("frozen")
        for name, early in (
            ("full", EarlyExit(self.stack)),
            ("exact", exact),
            ("verified", exact),
            ("frozen", frozen),
            ("ridge", self._early("ridge")),
        ):
            variants[name] = _decoding(early, batches, new, verify=name == "verified")
        fallback = frozen.fallback_reason
        return self.run.time(variants, self.stack.device), fallback

    def assistant(self) -> AssistantTimes:
        """Time `assistant_early_exit` over one batch and few tokens, if it runs."""
        ids, new = self._batches()[0], min(SHORT_TOKENS, self.config.new_tokens)
        variants: dict[str, Variant] = {
            "assistant": lambda: generate_plainly(
                self.stack, ids, new, assistant_early_exit=self.layer
            ),
            "generate": lambda: generate_plainly(self.stack, ids, new),
        }
        config: Any = self.stack.decoder.config
        depth, verbosity = config.num_hidden_layers, logging.get_verbosity()
        logging.set_verbosity_error()  # transformers warns about its own deprecated arguments
        try:
            timings = self.run.time(variants, self.stack.device, rounds=SHORT_ROUNDS)
        except Exception as error:
            # It can fail on batches, cache classes or dtypes. The error is recorded as the reason.
            reason = f"assistant_early_exit does not run here ({first_line(error)})"
            return AssistantTimes(layer=self.layer, new_tokens=new, reason=reason)
        finally:
            config.num_hidden_layers = depth  # assistant_early_exit does not restore it on errors
            logging.set_verbosity(verbosity)
        results = timings.results
        return AssistantTimes(
            layer=self.layer,
            new_tokens=new,
            reason=None,
            variants=timings.rows(SHORT_VARIANTS, tokens=len(ids) * new),
            order=timings.order,
            ratios=self.run.ratios(timings, [("assistant", "generate")]),
            agreement=share_equal(results["assistant"], results["generate"], ids.shape[1]),
        )

    def scoring(self) -> ScoringTimes:
        """Time frozen scoring with 70 % exited tokens, compared with the counted operations."""
        if not self.config.scoring:
            return ScoringTimes(reason="disabled by --no-scoring")
        stack = self.stack
        layers = [layer for layer in SCORED_LAYERS if layer < stack.num_layers]
        if not layers:
            layers = [max(1, stack.num_layers // 2)]
        length = min(SCORED_LENGTH, stack.max_positions or SCORED_LENGTH)
        blocks = self._read("held-out", length, SCORED_SEQUENCES * length)
        ids = torch.from_numpy(blocks.ids).long().to(stack.device)
        variants: dict[str, Variant] = {"full": _scoring(EarlyExit(stack), ids)}
        for layer in layers:
            self.run.progress(f"Fitting the threshold at layer {layer}")
            found = confidences(stack, blocks, layer, "cosine")
            threshold = fit_threshold(found, SCORED_HARD_RATIO).threshold
            early = EarlyExit(stack, layer=layer, rule="cosine", threshold=threshold)
            variants[f"frozen at {layer}"] = _scoring(early, ids)
        rounds = min(SCORED_ROUNDS, self.config.rounds)
        timings = self.run.time(variants, stack.device, rounds=rounds)
        ratios = self.run.ratios(timings, [(name, "full") for name in variants if name != "full"])
        what = {name: f"score, {name}" for name in variants}
        return ScoringTimes(
            reason=None,
            tokens=blocks.tokens,
            seq_len=length,
            hard_ratio=SCORED_HARD_RATIO,
            what="logit lens, cosine, frozen; thresholds fitted on the scored text",
            variants=timings.rows(what, tokens=blocks.tokens),
            order=timings.order,
            ratios=ratios,
            skipping=skipping_rows(stack, timings.results, ratios),
        )


def _exit_layer(wanted: int | None, heads: FittedHeads | None, stack: DecoderStack) -> int:
    if wanted is not None:
        return wanted
    usual = min(24, max(1, stack.num_layers - 1))
    if heads is None or usual in heads.layers:
        return usual
    return heads.layers[-1]


def _decoding(early: EarlyExit, batches: Sequence[Tensor], new: int, *, verify: bool) -> Variant:
    # Greedy decoding, whatever the model's generation config adds.
    settings = plain_settings(early.stack.model.generation_config)
    settings |= {"do_sample": False, "eos_token_id": ()}
    return lambda: [
        early.generate(
            ids,
            torch.ones_like(ids),
            max_new_tokens=new,
            verify=verify,
            return_dict_in_generate=True,
            **settings,
        )
        for ids in batches
    ]


def _scoring(early: EarlyExit, ids: Tensor) -> Variant:
    return lambda: early.score(ids, torch.ones_like(ids))
