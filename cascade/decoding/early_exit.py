"""EarlyExit: score and generate with tokens that exit early."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from msgspec.structs import replace
from torch import Tensor

from cascade.core.arguments import as_int, read_threshold
from cascade.core.errors import UsageError
from cascade.decoding.drafting.ngrams import NgramLookup
from cascade.decoding.drafting.proposers import Proposer
from cascade.decoding.drafting.runner_ups import RunnerUps
from cascade.decoding.engine.engine import EngineKind
from cascade.decoding.exit_support import check_exits
from cascade.decoding.forward import Chunk, Exit, ForwardPass, PassConfig
from cascade.decoding.generation import ExitConfig, Verification, generate
from cascade.decoding.generation_settings import DecodingConfig, padding_token
from cascade.decoding.graph_pool import check_graphs
from cascade.decoding.growing_text import Generation
from cascade.decoding.inputs import make_chunk, read_seed
from cascade.decoding.processors import CustomProcessing
from cascade.decoding.selective_layers import SkippingLayers
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.heads import ExitHead, LogitLens
from cascade.exits.history import exit_entries
from cascade.exits.rules import ExitRule, check_layers, find_rule
from cascade.models.flops import Counts
from cascade.models.identity import check_same_model
from cascade.models.stack import DecoderStack
from cascade.stats.perplexity import perplexity

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
    from transformers.generation.streamers import BaseStreamer

Propagation = Literal["frozen", "ridge", "exact"]


PROPAGATIONS = ("frozen", "ridge", "exact")


@dataclass(frozen=True)
class Score:
    """The results of a forward pass over given tokens.

    Attributes:
        exit_layers: The layer at which each token exited, `[B, T]`; N if it did not exit.
        predictions: The most likely next token after each token, `[B, T]`.
        log_probabilities: The log-probability of the next token, `[B, T-1]`, in nats.
        scored: `[B, T-1]`, false where either token is padding.
        counts: The work that was actually computed.
        logits: `[B, T, V]` in fp32 with `keep_logits`, zeros at padding; otherwise None.
    """

    exit_layers: Tensor
    predictions: Tensor
    log_probabilities: Tensor
    scored: Tensor
    counts: Counts
    logits: Tensor | None = None

    @property
    def nats_per_token(self) -> float:
        """The mean negative log-probability of the scored tokens; NaN without any."""
        values = self.log_probabilities[self.scored].double()
        return -float(values.mean()) if len(values) else math.nan

    @property
    def perplexity(self) -> float:
        """The exponential of `nats_per_token`; infinity above e^700, where only nats are exact."""
        nats = self.nats_per_token
        if math.isnan(nats):
            return nats
        found = perplexity(nats)
        return math.inf if found is None else found


class EarlyExit:
    """Scores and generates text with a model whose easy tokens exit early.

    Three laws hold. Without an exit, or with all thresholds at +inf, the result is the full
    model's. With a threshold of -inf, it is the exit head's alone. Generating a text gives the same
    exits and predictions as scoring it.

    Several threads may use one model, each with a separate `EarlyExit` or all with the same one,
    because the model's modules and config are never changed. The exception is a model whose calls
    are handled by another library, e.g. one that `accelerate` distributes over several devices, or
    one after `Module.compile`. Use such a model from one thread at a time.

    Args:
        stack: The model.
        layer: The exit layer, 1..N. For several exits, give `exits` instead.
        rule: The name of the exit rule.
        threshold: Tokens with a confidence at or above it exit.
        heads: Fitted ridge heads (default: the logit lens).
        exits: Several exits, in ascending order of layers, instead of `layer`.
        propagation: How upper layers get the keys and values of exited tokens: "frozen" (from the
            exit state; CALM, Schuster et al. 2022), "ridge" (from a fitted prediction; needs
            `heads`) or "exact" (computed once they are needed).
        skip: False computes every token and discards the results that exited tokens do not need.
        seed: Seed for rules that draw random numbers.
        engine: What computes passes over a few tokens: "compiled" (C, compiled for this machine),
            "fused" (PyTorch with joined weights), "model" (the model's own modules), "graphs" (the
            model's own forward over a static cache, in CUDA graphs), or "auto": graphs on CUDA,
            elsewhere the first of the others that supports the model and passes a comparison.

    Raises:
        UsageError: A layer, rule, threshold, heads, propagation, seed or engine is invalid.
        ModelError: The heads, or those of `exits`, belong to another model.
        UnsupportedModelError: A layer keeps other things than keys and values per token, or, with
            exact propagation, takes those of another layer.

    Example:
        >>> from cascade import EarlyExit, load
        >>> stack = load("smollm2-135m")
        >>> early = EarlyExit(stack, layer=29, threshold=0.95)
        >>> ids = stack.tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> early.score(ids).exit_layers.shape
        torch.Size([1, 5])
        >>> early.generate(ids, max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 9])
    """

    def __init__(
        self,
        stack: DecoderStack,
        *,
        layer: int | None = None,
        rule: str = "cosine",
        threshold: float = math.inf,
        heads: FittedHeads | None = None,
        exits: Sequence[Exit] | None = None,
        propagation: Propagation = "frozen",
        skip: bool = True,
        seed: int = 0,
        engine: EngineKind = "auto",
    ) -> None:
        if propagation not in PROPAGATIONS:
            raise UsageError(
                f"expected a propagation among {', '.join(PROPAGATIONS)}, got {propagation!r}"
            )
        if propagation == "ridge" and exits is None and heads is None:
            raise UsageError(
                "ridge propagation needs fitted heads; create them with `cascade fit-heads`"
            )
        check_exits(stack, exact=propagation == "exact")
        if heads is not None and layer is None:  # otherwise make_exit checks them
            _check_fitted(heads)
            heads.check(stack)
        if layer is not None and exits is not None:
            raise UsageError(
                f"expected either layer or exits, got layer={layer} and exits; give only one"
            )
        self.stack = stack
        self.propagation = propagation
        if exits is None:
            exits = (
                []
                if layer is None
                else [
                    make_exit(stack, layer, rule, threshold, heads=heads, propagation=propagation)
                ]
            )
        self.exits = _checked(exits, stack, propagation)
        self.layers = SkippingLayers(stack, skip=skip, engine=engine)
        check_graphs(stack, self.layers.engine_kind)
        self.seed = read_seed(seed)

    @property
    def fallback_reason(self) -> str | None:
        """Why exited tokens save no work in this model family, or None if they do."""
        return self.layers.reason

    @torch.no_grad()
    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        keep_logits: bool = False,
    ) -> Score:
        """Return the predictions and exits of given tokens.

        Each token exits where it would exit if it were generated.

        Args:
            input_ids: Token ids, `[B, T]`.
            attention_mask: `[B, T]`, 1 for tokens and 0 for padding. Without it, padding is
                inferred as in `generate`: the model's padding token is padding, unless it is also
                an end-of-sequence token.
            keep_logits: Return all logits, which take B x T x V x 4 bytes.

        Raises:
            UsageError: Token ids or a mask are invalid.
            ModelError: A confidence or logits are not finite.
        """
        own = self.stack.model.generation_config
        padding = padding_token(own.pad_token_id, own.eos_token_id)
        chunk = make_chunk(self.stack, input_ids, attention_mask, padding=padding)
        full = None
        if any(at.rule.needs_full for at in self.exits):
            full = self._score(chunk, (), keep_logits=False, full=None).predictions
        return self._score(chunk, self.exits, keep_logits=keep_logits, full=full)

    def _score(
        self, chunk: Chunk, exits: Sequence[Exit], *, keep_logits: bool, full: Tensor | None
    ) -> Score:
        batch, length = chunk.ids.shape
        counts = Counts.of(self.stack.num_layers)
        cache = self.layers.new_cache(batch, length, keep=False)
        cache.window(0, length)
        predictions = torch.zeros_like(chunk.ids)
        log_probabilities = torch.zeros(chunk.ids.shape, device=chunk.ids.device)
        logits: Tensor | None = None
        if keep_logits:
            shape = (batch, length, self.stack.vocab_size)
            logits = torch.zeros(shape, device=chunk.ids.device)
        following = torch.cat([chunk.ids[:, 1:], torch.zeros_like(chunk.ids[:, :1])], dim=1)

        def on_logits(_: int, rows: Tensor, columns: Tensor, made: Tensor) -> None:
            predictions[rows, columns] = made.argmax(dim=-1)
            target = following[rows, columns]
            chosen = made.gather(1, target[:, None])[:, 0]
            log_probabilities[rows, columns] = chosen - made.logsumexp(dim=-1)
            if logits is not None:
                logits[rows, columns] = made

        config = PassConfig(
            stop_exited=self.propagation != "exact", full_prediction=full, seed=self.seed
        )
        forward = ForwardPass(self.layers, exits, chunk, cache, counts, config)
        forward.run(chunk.valid, on_logits)
        return Score(
            forward.exit_layers,
            predictions,
            log_probabilities[:, :-1],
            chunk.valid[:, 1:] & chunk.valid[:, :-1],
            counts,
            logits,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        streamer: BaseStreamer | None = None,
        return_dict_in_generate: bool = False,
        verify: bool = False,
        drafter: Proposer | Sequence[Proposer] | None = None,
        draft_length: int = 8,
        pass_costs: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> Tensor | Generation:
        """Return prompts with their continuations, generated with tokens that exit early.

        The interface and the defaults are those of `transformers`.

        Args:
            input_ids: The prompts, `[B, T]`, padded on the left.
            attention_mask: `[B, T]`, 1 for tokens and 0 for padding. Without it, padding is
                inferred as in `transformers`: the padding token is padding, unless it is also an
                end-of-sequence token.
            generation_config: Settings of `transformers` (default: the model's generation config).
                Penalties, bans and samplers are followed by the logits processors of
                `transformers`. Settings that early exit does not support (beams, contrastive
                search, guidance, ...) raise an error.
            logits_processor: Processors in addition to those of the settings. They get the tokens
                and logits of the whole batch, once per column; zeros for rows that have ended.
            stopping_criteria: Criteria that end rows, in addition to those of the settings.
            prefix_allowed_tokens_fn: Returns the tokens that may follow, from a row's number and
                its tokens.
            streamer: Receives each token as soon as it is final.
            return_dict_in_generate: Return a `Generation` instead of the ids alone.
            verify: Draft several tokens and let the full model check them in one pass. The result
                is the full model's, token for token. Without exits, tokens are drafted by n-gram
                lookup in the text so far and from the model's own runner-ups, and by a `drafter`.
                With exits, they draft (self-speculative decoding; needs propagation="exact").
            drafter: What drafts tokens in addition, with `verify` and without exits.
            draft_length: With `verify`, the maximum number of tokens drafted before the full model
                checks them.
            pass_costs: With `verify`, the milliseconds of a pass over 1, 2, ... tokens. They decide
                how much is drafted (default: measured on this machine, once).
            kwargs: Single settings of a generation config (max_new_tokens, do_sample,
                repetition_penalty, ...) and `seed`.

        Logits processors change the logits from which a token is chosen: those of an exit head, of
        a draft and of the full model. Exit rules see the logits before that, so thresholds keep
        their meaning.

        Returns:
            Token ids, `[B, T + new]`, in which rows that ended earlier are padded; or a
            `Generation`.

        Raises:
            UsageError: A prompt, mask or setting is invalid.
            ModelError: A confidence or logits are not finite.
        """
        config = DecodingConfig.of(self.stack, generation_config, kwargs)
        custom = CustomProcessing.of(logits_processor, stopping_criteria, prefix_allowed_tokens_fn)
        if any(at.rule.needs_full for at in self.exits):
            names = ", ".join(at.rule.name for at in self.exits if at.rule.needs_full)
            raise UsageError(
                f"the rule {names} needs the full model's prediction, so it can score but not "
                "generate; use another rule"
            )
        if verify and self.exits and self.propagation != "exact":
            raise UsageError(
                f'verify=True with exits needs propagation="exact", got "{self.propagation}"; the '
                "full model can only confirm tokens with exact keys and values"
            )
        verification = verification_of(self.stack, drafter, draft_length, pass_costs)
        if drafter is not None and (self.exits or not verify):
            raise UsageError(
                "a drafter needs verify=True and no exits; leave the exits or the drafter out"
            )
        prompt = make_chunk(self.stack, input_ids, attention_mask, padding=config.padding)
        result = generate(
            self.layers,
            ExitConfig(self.exits, exact=self.propagation == "exact", seed=self.seed),
            prompt,
            config,
            custom=custom,
            verification=verification if verify else None,
            streamer=streamer,
        )
        return result if return_dict_in_generate else result.sequences


def verification_of(
    stack: DecoderStack,
    drafter: Proposer | Sequence[Proposer] | None,
    draft_length: int,
    pass_costs: Sequence[float] | None,
) -> Verification:
    """Return how drafts are made and checked, from the arguments of `EarlyExit.generate`.

    Raises:
        UsageError: One of them is invalid.
        ModelError: A drafter belongs to another model.
    """
    drafts = as_int(draft_length)
    if drafts is None or drafts < 1:
        raise UsageError(f"expected a draft_length of at least 1, got {draft_length!r}")
    proposers = [NgramLookup(), *_proposers(drafter), RunnerUps()]
    for proposer in proposers:
        proposer.check(stack)
    return Verification(proposers, drafts, _costs(pass_costs))


def _proposers(drafter: Any) -> list[Proposer]:
    given = list(drafter) if isinstance(drafter, list | tuple) else [drafter]
    found = [entry for entry in given if entry is not None]
    for entry in found:
        if not isinstance(entry, Proposer):
            raise UsageError(
                f"expected a drafter with the methods of Proposer, got {type(entry).__name__}"
            )
    return [proposer for entry in found for proposer in (*entry.companions, entry)]


def _costs(given: Sequence[float] | None) -> Sequence[float] | None:
    if given is None:
        return None
    costs = list(given)
    if not costs or not all(isinstance(cost, int | float) and cost > 0 for cost in costs):
        raise UsageError(f"expected pass_costs above 0, got {costs[:8]}")
    return costs


def make_exit(
    stack: DecoderStack,
    layer: int,
    rule: str | ExitRule,
    threshold: float,
    *,
    heads: FittedHeads | None = None,
    propagation: Propagation = "frozen",
) -> Exit:
    """Return an exit with the ridge head and map fitted for its layer, or with the logit lens.

    Args:
        stack: The model.
        layer: 1..N.
        rule: The rule or its name.
        threshold: Tokens with a confidence at or above it exit.
        heads: Fitted heads (default: the logit lens).
        propagation: The exit gets a propagation map only for "ridge".

    Raises:
        UsageError: There is no such layer or rule, the threshold is not a number, or no head was
            fitted for the layer.
        ModelError: The heads belong to another model.
    """
    rule = rule if isinstance(rule, ExitRule) else find_rule(rule)
    _, layer = exit_entries(layer, stack.num_layers)  # the layer as an int
    check_layers({layer: rule}, stack.num_layers)
    if heads is not None:
        _check_fitted(heads)
    head: ExitHead = LogitLens(stack) if heads is None else heads.head(stack, layer)
    takes_map = heads is not None and propagation == "ridge"
    return Exit(
        layer,
        rule,
        read_threshold(threshold),
        head,
        heads.propagation(stack, layer) if heads is not None and takes_map else None,
    )


def _check_fitted(heads: Any) -> None:
    if not isinstance(heads, FittedHeads):
        raise UsageError(
            f"expected fitted heads, got {type(heads).__name__}; read them with load_heads"
        )


def _checked(
    exits: Sequence[Exit], stack: DecoderStack, propagation: Propagation
) -> tuple[Exit, ...]:
    """Check exits and return them, with their propagation maps only for "ridge"."""
    layers = [at.layer for at in exits]
    if layers != sorted(set(layers)):
        raise UsageError(f"expected exits in ascending order of layers, got layers {layers}")
    check_layers({at.layer: at.rule for at in exits}, stack.num_layers)
    for at in exits:
        at.rule.check(at.threshold)
        owner = getattr(at.head, "stack", stack)  # a custom head need not have a model
        if owner.model not in [below.model for below in stack.with_base_models()]:
            model = replace(owner.provenance, weights_hash=owner.weights_hash())
            check_same_model(model, stack, what=f"the heads of the exit at layer {at.layer}")
        if propagation == "ridge" and at.propagation is None and at.layer < stack.num_layers:
            raise UsageError(
                f"the exit at layer {at.layer} has no propagation map; pass the map of its fitted "
                "heads, or use frozen propagation"
            )
    comparing = [at for at in exits if at.rule.needs_earlier]
    # With several such exits, the first one is the earlier exit of the others.
    if len(comparing) == 1 and comparing[0] is exits[0]:
        raise UsageError(
            f"the rule {exits[0].rule.name} needs an earlier exit, and there is none below layer "
            f"{exits[0].layer}; add exits below it, or use another rule"
        )
    if propagation == "ridge":
        return tuple(exits)
    return tuple(dataclasses.replace(at, propagation=None) for at in exits)
