"""The ways to decode, timed and compared, and the time of skipping: a record `bench.decode`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from cascade.benchmarks.timing import (
    INTERVAL,
    BenchmarkError,
    Record,
    Way,
    check_least,
    load_average,
    machine_provenance,
    pinned_threads,
    ratio_rows,
    synchronize,
    target_row,
    time_ways,
    way_rows,
)
from cascade.core.errors import first_line
from cascade.core.provenance import provenance_of
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.decoding.early_exit import EarlyExit, Propagation, Score
from cascade.decoding.generation import Generation
from cascade.evaluation.calibration import confidences
from cascade.exits.fitted_heads import FittedHeads, load_heads
from cascade.exits.head_fitting import fit_heads
from cascade.exits.rules import check_layers, find_rule
from cascade.models.flops import flops
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.stats.thresholds import fit_threshold

#: The kind of the record.
KIND = "bench.decode"

#: What each way does, in the record's words.
WAYS = {
    "generate": "transformers' generate, greedy",
    "full": "cascade at full depth, no exit",
    "exact": "early exit, upper layers catch up when a token goes on",
    "verified": "the same, the full model confirms every token",
    "frozen": "early exit, keys and values from the exit state",
    "ridge": "early exit, keys and values from a ridge map",
}

#: What `assistant_early_exit` is timed against: it is too slow to make as many tokens.
SHORT_WAYS = {
    "assistant": "transformers' generate with assistant_early_exit, greedy",
    "generate": "transformers' generate over the same few tokens",
}

#: New tokens and timed rounds of `SHORT_WAYS`: some 2 to 4 tokens/s on two cores.
_SHORT_TOKENS, _SHORT_ROUNDS = 8, 2

#: Tokens that heads are fitted on, and that thresholds are, where none are given.
_FITTED_TOKENS, _CALIBRATED_TOKENS = 8192, 2048

#: Skipping is timed at this hard ratio, at these layers of a 30-layer model, on so many tokens.
_SCORED_HARD_RATIO, _SCORED_LAYERS, _SCORED_ROUNDS = 0.3, (8, 15, 24), 3
_SCORED_SEQUENCES, _SCORED_LENGTH = 32, 128


@dataclass(frozen=True)
class DecodeSetup:
    """What is measured; the same for every way.

    Attributes:
        model: Anything that `models.load` takes.
        dtype: "float32" or "bfloat16".
        prompts: How many prompts every way continues in one round.
        prompt_tokens: Tokens of each.
        new_tokens: Tokens added to each.
        batch_size: Prompts that are continued together.
        rounds: Timed rounds.
        layer: Exit layer; the heads', or 24, or the last but one where None.
        rule: The exit rule.
        threshold: From which confidence on tokens leave; fitted to `hard_ratio` where None.
        hard_ratio: The share of tokens that go all the way, on the text the threshold is fitted on.
        heads: A file of fitted heads; fitted anew where None.
        scoring: Time the scoring of skipped tokens too.
        threads: Threads that torch computes with; None leaves the number as it is.
        seed: Draws the order of the ways and the bootstrap's resamples.
        device: "cpu", "cuda", "mps" or "auto".

    Raises:
        BenchmarkError: A number is out of its range, or a dtype is not among the two.
    """

    model: str = "smollm2-135m"
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
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {
            "prompts": 1,
            "prompt_tokens": 2,
            "new_tokens": 2,
            "batch_size": 1,
            "rounds": 2,
            "threads": 1,
            "seed": 0,
        }
        check_least(self, least, {"rounds": "one round has no interval"})
        if self.dtype not in ("float32", "bfloat16"):
            raise BenchmarkError(f"expected --dtype float32 or bfloat16, got {self.dtype}")
        if not 0 <= self.hard_ratio <= 1:
            raise BenchmarkError(f"expected --hard-ratio in 0..1, got {self.hard_ratio:g}")


def decode(
    setup: DecodeSetup,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Record:
    """Time every way to decode on the same prompts, and the scoring of skipped tokens.

    Args:
        setup: What to measure.
        command: What the user ran, for the provenance.
        progress: Told what is being done.

    Returns:
        A record of kind `bench.decode`; no missed target raises.

    Raises:
        BenchmarkError: The corpus has too few tokens, or the model too few positions.
        UsageError: No such layer or rule, or a threshold outside the rule's range.
        RecordError: The heads cannot be read.
        ModelError: The model cannot be loaded, or the heads belong to another one.
        DeviceError: The device is absent or lacks the dtype.
    """
    load_before = load_average()
    setup = replace(setup, threads=setup.threads or torch.get_num_threads())
    with pinned_threads(setup.threads):
        bench = _Bench(setup, progress or (lambda _: None))
        seconds, order, first = bench.decoding()
        assistant = bench.assistant()
        scoring = bench.scoring()
    ratios = ratio_rows(
        seconds, [(way, "generate") for way in WAYS if way != "generate"], seed=setup.seed
    )
    tokens = setup.prompts * setup.new_tokens
    return {
        "schema": 1,
        "kind": KIND,
        "provenance": machine_provenance(
            provenance_of(bench.stack, bench.prompts, command), load_before
        ),
        "settings": asdict(setup) | {"layer": bench.layer, "threshold": bench.threshold},
        "exit": bench.about,
        "ways": way_rows(seconds, WAYS, tokens=tokens),
        "order": order,
        "ratios": ratios,
        "interval": INTERVAL,
        "generated": generated_rows(first, setup.prompt_tokens, bench.stack.num_layers),
        "assistant": assistant,
        "scoring": scoring,
        "targets": target_rows(
            ratios, first, scoring, setup.prompt_tokens, exactly=setup.dtype == "float32"
        ),
    }


class _Bench:
    """The model, the prompts and the exit of one benchmark."""

    def __init__(self, setup: DecodeSetup, tell: Callable[[str], None]) -> None:
        self.setup, self.tell = setup, tell
        tell(f"Loading {setup.model} in {setup.dtype}")
        self.stack = load(setup.model, dtype=setup.dtype, device=setup.device)
        self._check_positions()
        given = None if setup.heads is None else load_heads(Path(setup.heads), self.stack)
        self.layer = _exit_layer(setup.layer, given, self.stack)
        check_layers({self.layer: find_rule(setup.rule)}, self.stack.num_layers)
        if setup.threshold is not None:
            find_rule(setup.rule).check(setup.threshold)
        self.prompts, fitted_on = self._texts()
        self.heads = given or self._fit()
        self.about: Record = {
            "layer": self.layer,
            "rule": setup.rule,
            "heads": setup.heads or f"closed form, {_FITTED_TOKENS} tokens of the training split",
            "head": self.heads.head(self.stack, self.layer).name,
        }
        self.threshold = self._threshold(fitted_on)

    def _check_positions(self) -> None:
        prompt, new, most = (
            self.setup.prompt_tokens,
            self.setup.new_tokens,
            self.stack.max_positions,
        )
        if most is not None and prompt + new > most:
            raise BenchmarkError(
                f"{prompt} --prompt-tokens and {new} --new-tokens exceed the model's {most} "
                "positions; take fewer"
            )

    def _texts(self) -> tuple[TokenBlocks, TokenBlocks]:
        """Return the prompts, from the held-out split's second half, and blocks of its first."""
        setup = self.setup
        blocks = self._read("held-out", setup.prompt_tokens)
        half = len(blocks.ids) // 2
        if len(blocks.ids) - half < setup.prompts or half < 2:
            raise BenchmarkError(
                f"the embedded held-out text gives {len(blocks.ids)} prompts of "
                f"{setup.prompt_tokens} tokens, half of them to fit a threshold on; expected at "
                f"least {max(4, 2 * setup.prompts)}, use fewer --prompts or --prompt-tokens"
            )
        fitted = blocks.ids[:half][: max(2, _CALIBRATED_TOKENS // setup.prompt_tokens)]
        prompts = blocks.ids[half : half + setup.prompts]
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
        self.tell(f"Fitting heads at layer {self.layer}")
        length = min(_SCORED_LENGTH, self.stack.max_positions or _SCORED_LENGTH)
        return fit_heads(self.stack, self._read("train", length, _FITTED_TOKENS), [self.layer])

    def _threshold(self, blocks: TokenBlocks) -> float:
        if self.setup.threshold is not None:
            self.about["threshold"] = "given"
            return self.setup.threshold
        self.tell("Fitting the threshold")
        found = confidences(self.stack, blocks, self.layer, self.setup.rule, heads=self.heads)
        fitted = fit_threshold(found, self.setup.hard_ratio)
        self.about["threshold"] = (
            f"hard ratio {fitted.reached:.3f} on {blocks.tokens} tokens of the held-out text's "
            "first half; prompts come from its second"
        )
        return fitted.threshold

    def _early(self, propagation: Propagation) -> EarlyExit:
        return EarlyExit(
            self.stack,
            layer=self.layer,
            rule=self.setup.rule,
            threshold=self.threshold,
            heads=self.heads,
            propagation=propagation,
            seed=self.setup.seed,
        )

    def _batches(self) -> list[Tensor]:
        ids = torch.from_numpy(self.prompts.ids).long().to(self.stack.device)
        return list(ids.split(self.setup.batch_size))

    def _time(self, ways: Mapping[str, Way], rounds: int) -> tuple[Any, Any, Any]:
        return time_ways(
            ways,
            rounds=rounds,
            seed=self.setup.seed,
            synchronize=lambda: synchronize(self.stack.device),
            progress=self.tell,
        )

    def decoding(
        self,
    ) -> tuple[dict[str, list[float]], list[list[str]], dict[str, list[Generation | Tensor]]]:
        """Time every way of `WAYS`; return seconds, orders, and what each way generated."""
        batches, new = self._batches(), self.setup.new_tokens
        ways: dict[str, Way] = {
            "generate": lambda: [generate_plainly(self.stack, ids, new) for ids in batches]
        }
        full, exact = EarlyExit(self.stack), self._early("exact")
        frozen, ridge = self._early("frozen"), self._early("ridge")
        for name, early in (
            ("full", full),
            ("exact", exact),
            ("verified", exact),
            ("frozen", frozen),
            ("ridge", ridge),
        ):
            ways[name] = _decoding(early, batches, new, verify=name == "verified")
        self.about["fallback"] = frozen.fallback_reason
        first, order, seconds = self._time(ways, self.setup.rounds)
        return seconds, order, first

    def assistant(self) -> Record:
        """Time `assistant_early_exit` where it runs, over one batch and few tokens."""
        ids, new = self._batches()[0], min(_SHORT_TOKENS, self.setup.new_tokens)
        row: Record = {"layer": self.layer, "new_tokens": new, "reason": None}
        ways: dict[str, Way] = {
            "assistant": lambda: generate_plainly(
                self.stack, ids, new, assistant_early_exit=self.layer
            ),
            "generate": lambda: generate_plainly(self.stack, ids, new),
        }
        config: Any = self.stack.decoder.config
        depth, verbosity = config.num_hidden_layers, logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of its own use of deprecated arguments
        try:
            first, order, seconds = self._time(ways, _SHORT_ROUNDS)
        except Exception as error:
            # Whatever it raises (batches, cache classes, dtypes), that is why it is left out.
            return row | {"reason": f"it does not run here ({first_line(error)})"}
        finally:
            config.num_hidden_layers = depth  # it leaves its own number behind when it raises
            logging.set_verbosity(verbosity)
        return row | {
            "ways": way_rows(seconds, SHORT_WAYS, tokens=len(ids) * new),
            "order": order,
            "ratios": ratio_rows(seconds, [("assistant", "generate")], seed=self.setup.seed),
            "agreement": _share_equal(first["assistant"], first["generate"], ids.shape[1]),
        }

    def scoring(self) -> Record:
        """Time frozen scoring with 70 % of the tokens out, against what its operations predict."""
        if not self.setup.scoring:
            return {"reason": "not asked for (--no-scoring)"}
        stack = self.stack
        layers = [layer for layer in _SCORED_LAYERS if layer < stack.num_layers]
        if not layers:
            layers = [max(1, stack.num_layers // 2)]
        length = min(_SCORED_LENGTH, stack.max_positions or _SCORED_LENGTH)
        blocks = self._read("held-out", length, _SCORED_SEQUENCES * length)
        ids = torch.from_numpy(blocks.ids).long().to(stack.device)
        ways: dict[str, Way] = {"full": _scoring(EarlyExit(stack), ids)}
        for layer in layers:
            self.tell(f"Fitting the threshold at layer {layer}")
            found = confidences(stack, blocks, layer, "cosine")
            threshold = fit_threshold(found, _SCORED_HARD_RATIO).threshold
            early = EarlyExit(stack, layer=layer, rule="cosine", threshold=threshold)
            ways[f"frozen at {layer}"] = _scoring(early, ids)
        first, order, seconds = self._time(ways, min(_SCORED_ROUNDS, self.setup.rounds))
        names = [name for name in ways if name != "full"]
        ratios = ratio_rows(seconds, [(name, "full") for name in names], seed=self.setup.seed)
        return {
            "reason": None,
            "tokens": blocks.tokens,
            "seq_len": length,
            "hard_ratio": _SCORED_HARD_RATIO,
            "what": "logit lens, cosine, frozen; thresholds fitted on the text that is scored",
            "ways": way_rows(
                seconds, {name: f"score, {name}" for name in ways}, tokens=blocks.tokens
            ),
            "order": order,
            "ratios": ratios,
            "skipping": skipping_rows(stack, first, ratios),
        }


def _exit_layer(wanted: int | None, heads: FittedHeads | None, stack: DecoderStack) -> int:
    if wanted is not None:
        return wanted
    usual = min(24, max(1, stack.num_layers - 1))
    if heads is None or usual in heads.layers:
        return usual
    return heads.layers[-1]


# --- The ways --------------------------------------------------------------------------------


@torch.no_grad()
def generate_plainly(stack: DecoderStack, ids: Tensor, new_tokens: int, **settings: Any) -> Tensor:
    """Generate greedily with `transformers`, exactly so many tokens.

    Args:
        stack: The model.
        ids: The prompts, `[B, T]`, without padding.
        new_tokens: How many tokens to add to each.
        settings: Further ones of its generation config.

    Returns:
        `[B, T + new_tokens]`.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        # No token has this number, so nothing ends early; None would mean the model's own.
        eos_token_id=stack.vocab_size,
        pad_token_id=0,
        **settings,
    )
    made: Tensor = stack.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return made


def _decoding(early: EarlyExit, batches: Sequence[Tensor], new: int, *, verify: bool) -> Way:
    return lambda: [
        early.generate(
            ids,
            torch.ones_like(ids),
            max_new_tokens=new,
            eos_token_id=(),
            verify=verify,
            return_dict_in_generate=True,
        )
        for ids in batches
    ]


def _scoring(early: EarlyExit, ids: Tensor) -> Way:
    return lambda: early.score(ids, torch.ones_like(ids))


# --- What was found --------------------------------------------------------------------------


def _sequences(made: Any) -> Tensor:
    return made.sequences if isinstance(made, Generation) else made


def _share_equal(one: Tensor, other: Tensor, prompt: int) -> float:
    return float((one[:, prompt:] == other[:, prompt:]).double().mean())


def generated_rows(
    first: Mapping[str, Sequence[Any]], prompt: int, num_layers: int
) -> dict[str, Record]:
    """Return what each way generated, by name: exits, layers, counted rows, agreement.

    Args:
        first: Each way's generations, one per batch; of "generate" the token ids alone.
        prompt: Tokens of every prompt.
        num_layers: N.

    Returns:
        Per way `agreement`, the share of new tokens that are those of `generate` at the same
        place, and for our own ways what was computed for them.
    """
    expected = torch.cat([_sequences(made) for made in first["generate"]])
    rows: dict[str, Record] = {}
    for name, made in first.items():
        sequences = torch.cat([_sequences(part) for part in made])
        rows[name] = {"agreement": _share_equal(sequences, expected, prompt)}
        if name == "generate":
            continue
        left = torch.cat([part.exit_layers for part in made])
        counts = made[0].counts
        for part in made[1:]:
            counts = counts + part.counts
        rows[name] |= {
            "exit_share": float((left < num_layers).double().mean()),
            "layers_per_token": sum(counts.layer_rows) / sum(part.passed for part in made),
            "drafted": sum(part.drafted for part in made),
            "accepted": sum(part.accepted for part in made),
            "counts": counts.record(),
        }
    return rows


def skipping_rows(
    stack: DecoderStack, first: Mapping[str, Score], ratios: Sequence[Record]
) -> list[Record]:
    """Hold the time of skipping against what the counted operations predict.

    Args:
        stack: The model.
        first: What each way scored, "full" among them.
        ratios: Their seconds over those of "full", as `ratio_rows` returns them.

    Returns:
        One row per early exit: ratio of seconds, of operations, and the one over the other.
    """
    whole = flops(stack, first["full"].counts)
    rows = []
    for ratio in ratios:
        name = ratio["name"].partition("/")[0]
        score = first[name]
        operations = flops(stack, score.counts) / whole
        rows.append(
            {
                "name": name,
                "exit_share": float((score.exit_layers < stack.num_layers).double().mean()),
                "seconds_ratio": ratio["median"],
                "flops_ratio": operations,
                "excess": ratio["median"] / operations,
                "interval": [end / operations for end in ratio["interval"]],
            }
        )
    return rows


def target_rows(
    ratios: Sequence[Record],
    first: Mapping[str, Sequence[Any]],
    scoring: Record,
    prompt: int,
    *,
    exactly: bool,
) -> list[Record]:
    """Hold what was measured against what is promised.

    Args:
        ratios: As `ratio_rows` returns them, over "generate".
        first: Each way's generations.
        scoring: The record's section of that name.
        prompt: Tokens of every prompt.
        exactly: Whether verified tokens are promised to be the full model's (in fp32).

    Returns:
        One row per target; `met` is None where nothing was measured.
    """
    found = {row["name"]: row for row in ratios}["full/generate"]
    rows = [target_row("full/generate", "at most", 1.0, found["median"], found["interval"])]
    expected, verified = (
        torch.cat([_sequences(made) for made in first[name]]) for name in ("generate", "verified")
    )
    equal = _share_equal(verified, expected, prompt) if exactly else None
    rows.append(target_row("verified tokens equal, fp32", "at least", 1.0, equal))
    skipping = scoring.get("skipping")
    if skipping is None:
        rows.append(target_row("true_skipping", "at most", 1.15, None))
    for row in skipping or ():
        name = f"true_skipping, {row['name']}"
        measured = row["excess"] if math.isfinite(row["excess"]) else None
        rows.append(target_row(name, "at most", 1.15, measured, row["interval"]))
    return rows
