"""Early exit scores as its laws say, counts what it computes, and refuses what cannot be meant."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_early_exit import (
    ALL_FAMILIES,
    ALL_PROPAGATIONS,
    CLOSE,
    LAYERS,
    PROPAGATIONS,
    SKIPPING,
    SKIPPING_FAMILIES,
    a_bf16_stack,
    a_stack,
    bf16_heads,
    by_hand,
    confidence,
    difference,
    head_logits,
    is_mixed,
    one_line,
    own_logits,
    random_blocks,
    some_exits,
    some_heads,
    some_mask,
    state_of,
    visited,
)
from support.tiny_models import FAMILIES, VOCABULARY, random_ids, tiny_model
from torch import Tensor, nn
from transformers import BatchEncoding

from cascade.core.errors import ModelError, UsageError
from cascade.decoding.early_exit import EarlyExit, Propagation, Score, make_exit
from cascade.decoding.forward import Exit, ForwardPass
from cascade.decoding.inputs import make_chunk
from cascade.decoding.selective_layers import SkippingLayers
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_fitting import fit_heads
from cascade.exits.rules import RULES, find_rule
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack

INF = math.inf
TEXT = random_ids(3, 20, seed=1)
MASK = some_mask(3, 20)
#: Rules whose confidences differ from token to token, in families of either kind.
RULES_THAT_TELL_TOKENS_APART = [name for name in RULES if name != "fixed"]


@functools.cache
def scorer(
    family: str,
    propagation: Propagation = "frozen",
    *,
    rule: str = "top2_gap",
    layers: tuple[int, ...] = (1, 2, 3),
    seed: int = 0,
    skip: bool = True,
) -> EarlyExit:
    """Return early exit with fitted heads whose exits each let a third of TEXT go."""
    exits = exits_for_text(a_stack(family), some_heads(family), propagation, rule, layers, seed)
    return EarlyExit(a_stack(family), exits=exits, propagation=propagation, seed=seed, skip=skip)


def exits_for_text(
    stack: DecoderStack,
    heads: FittedHeads,
    propagation: Propagation,
    rule: str = "top2_gap",
    layers: Sequence[int] = (1, 2, 3),
    seed: int = 0,
) -> list[Exit]:
    return some_exits(
        stack,
        rule,
        layers,
        heads=heads,
        propagation=propagation,
        share=0.35,
        text=TEXT,
        seed=seed,
    )


def logits_of(score: Score) -> Tensor:
    assert score.logits is not None
    return score.logits


# --- The two ends: nobody leaves, everybody leaves -------------------------------------------


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_where_nobody_leaves_it_is_the_full_model(family: str, propagation: Propagation) -> None:
    stack, ids = a_stack(family), random_ids(3, 20)
    expected = own_logits(stack, ids)
    for layers in ((), (1,), (2, 3), (LAYERS,)):
        exits = [
            make_exit(
                stack, layer, "top2_gap", INF, heads=some_heads(family), propagation=propagation
            )
            for layer in layers
        ]
        score = EarlyExit(stack, exits=exits, propagation=propagation).score(ids, keep_logits=True)
        assert difference(logits_of(score), expected) == 0.0
        assert torch.equal(score.predictions, expected.argmax(dim=-1))
        assert bool((score.exit_layers == LAYERS).all())


@ALL_FAMILIES
def test_a_padded_row_where_nobody_leaves_is_the_full_models(family: str) -> None:
    stack, ids, mask = a_stack(family), random_ids(2, 20), some_mask(2, 20)
    score = EarlyExit(stack).score(ids, mask, keep_logits=True)
    expected = own_logits(stack, ids, mask)
    assert difference(logits_of(score)[mask.bool()], expected[mask.bool()]) == 0.0
    assert not bool(logits_of(score)[~mask.bool()].any())


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_where_everybody_leaves_it_is_the_exit_head_alone(
    family: str, propagation: Propagation
) -> None:
    stack, ids = a_stack(family), random_ids(2, 20)
    history = visited(stack, ids)
    for layer in range(1, LAYERS + 1):
        for heads in (None, some_heads(family)):
            if propagation == "ridge" and heads is None:
                continue
            early = EarlyExit(
                stack,
                layer=layer,
                rule="cosine",
                threshold=-INF,
                heads=heads,
                propagation=propagation,
            )
            score = early.score(ids, keep_logits=True)
            expected = head_logits(stack, early.exits[0], history[layer])
            # Written out, the head rounds otherwise than in one fused product.
            assert difference(logits_of(score), expected) <= (0.0 if heads is None else CLOSE)
            assert bool((score.exit_layers == layer).all())


# --- In between: the mixed pass, written out by hand -----------------------------------------


def check_it_is_the_mixed_pass(
    early: EarlyExit, ids: Tensor, mask: Tensor | None, *, heads: FittedHeads, close: float = CLOSE
) -> Score:
    """Raise AssertionError unless everything in a score is what the mixed pass by hand gives."""
    score = early.score(ids, mask, keep_logits=True)
    expected = by_hand(
        early.stack,
        ids,
        early.exits,
        mask,
        propagation=early.propagation,
        heads=heads,
        seed=early.seed,
    )
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert torch.equal(score.exit_layers, expected.exit_layers), "other exits"
    assert difference(logits_of(score), expected.logits * valid[..., None]) <= close, "other logits"
    assert torch.equal(score.predictions[valid], expected.logits.argmax(dim=-1)[valid])
    logs = expected.logits.log_softmax(dim=-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    scored = valid[:, 1:] & valid[:, :-1]
    assert torch.equal(score.scored, scored)
    assert difference(score.log_probabilities[scored], logs[scored]) <= close
    assert score.perplexity == pytest.approx(math.exp(-logs[scored].double().mean()), rel=1e-5)
    return score


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_a_mixture_of_exits_is_the_mixed_pass_by_hand(
    family: str, propagation: Propagation
) -> None:
    early = scorer(family, propagation)
    for mask in (None, MASK):
        score = check_it_is_the_mixed_pass(early, TEXT, mask, heads=some_heads(family))
        assert is_mixed(score.exit_layers, [1, 2, 3])


@pytest.mark.parametrize("rule", RULES_THAT_TELL_TOKENS_APART)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_rule_decides_as_by_hand(family: str, rule: str) -> None:
    layers = (2, 3, 4) if rule == "mean_cosine" else (1, 2, 3)
    early = scorer(family, "ridge", rule=rule, layers=layers, seed=5)
    # The oracle's full model is run on padded rows too, where own_logits knows no mask.
    mask = None if rule == "oracle" else MASK
    score = check_it_is_the_mixed_pass(early, TEXT, mask, heads=some_heads(family))
    assert is_mixed(score.exit_layers, [layers[1], layers[2]])


def test_a_rule_without_logits_and_patience_can_share_a_cascade() -> None:
    stack = a_stack("llama")
    first = some_exits(stack, "cosine", (1,), share=0.3)
    rest = some_exits(stack, "patience", (2, 3))
    early = EarlyExit(stack, exits=first + rest)
    score = check_it_is_the_mixed_pass(early, TEXT, None, heads=some_heads("llama"))
    assert is_mixed(score.exit_layers, [1, 3])


def test_a_token_at_the_threshold_leaves() -> None:
    stack = a_stack("llama")
    early = EarlyExit(stack, layer=2, rule="fixed", threshold=1.0)
    assert bool((early.score(TEXT).exit_layers == 2).all())
    at = make_exit(stack, 2, "cosine", 0.0)
    value = confidence(stack, TEXT, at)[1, 3].item()
    for threshold, layer in ((value, 2), (math.nextafter(value, 1.0), LAYERS)):
        early = EarlyExit(stack, layer=2, rule="cosine", threshold=threshold)
        assert early.score(TEXT).exit_layers[1, 3] == layer


def test_the_oracle_lets_go_exactly_those_on_whom_head_and_full_model_agree() -> None:
    stack, ids = a_stack("llama"), random_ids(4, 20)
    early = EarlyExit(stack, layer=3, rule="oracle", threshold=1.0)
    score = early.score(ids)
    full = own_logits(stack, ids).argmax(dim=-1)
    assert is_mixed(score.exit_layers, [3])
    agrees = stack.decode(visited(stack, ids)[3]).argmax(dim=-1) == full
    assert torch.equal(score.exit_layers == 3, agrees)


@pytest.mark.parametrize("seed", [1.5, "1", None, True, [1]])
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any) -> None:
    with pytest.raises(UsageError) as caught:
        EarlyExit(a_stack("llama"), seed=seed)
    assert str(caught.value) == f"expected seed a whole number, got {seed!r}"


def test_a_seed_of_numpy_is_one_of_pythons() -> None:
    assert type(EarlyExit(a_stack("llama"), seed=np.int64(3)).seed) is int  # type: ignore[arg-type]


def test_random_exits_depend_on_the_seed() -> None:
    first, again, other = (
        scorer("llama", rule="random", seed=seed).score(TEXT).exit_layers for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@ALL_FAMILIES
def test_exact_hard_tokens_are_the_full_models(family: str) -> None:
    early = scorer(family, "exact")
    score = early.score(TEXT, keep_logits=True)
    hard = score.exit_layers == LAYERS
    assert is_mixed(score.exit_layers, [1, 2, 3])
    assert difference(logits_of(score)[hard], own_logits(early.stack, TEXT)[hard]) == 0.0


@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
@ALL_FAMILIES
def test_hard_tokens_behind_exited_ones_are_not_the_full_models(
    family: str, propagation: Propagation
) -> None:
    early = scorer(family, propagation)
    score = early.score(TEXT, keep_logits=True)
    hard = score.exit_layers == LAYERS
    assert difference(logits_of(score)[hard], own_logits(early.stack, TEXT)[hard]) > 1e-3


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_a_left_padded_row_is_the_row_alone(family: str, propagation: Propagation) -> None:
    early, mask = scorer(family, propagation), some_mask(3, 20, left=5)
    together = early.score(TEXT, mask, keep_logits=True)
    alone = early.score(TEXT[:1, 5:], keep_logits=True)
    assert len(set(alone.exit_layers.flatten().tolist())) > 1
    assert torch.equal(together.exit_layers[:1, 5:], alone.exit_layers)
    assert difference(logits_of(together)[:1, 5:], logits_of(alone)) <= CLOSE
    other = TEXT.clone()
    other[0, :5] = 2
    assert torch.equal(logits_of(early.score(other, mask, keep_logits=True)), logits_of(together))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_padding_on_the_right_changes_nothing_before_it(family: str) -> None:
    early, mask = scorer(family), torch.ones_like(TEXT)
    mask[1, 14:] = 0
    together = early.score(TEXT, mask, keep_logits=True)
    alone = early.score(TEXT[1:2, :14], keep_logits=True)
    assert torch.equal(together.exit_layers[1:2, :14], alone.exit_layers)
    assert difference(logits_of(together)[1:2, :14], logits_of(alone)) <= CLOSE
    assert together.scored[1].tolist() == [True] * 13 + [False] * 6


def test_a_mask_without_padding_is_no_mask() -> None:
    early = scorer("llama")
    with_mask = early.score(TEXT, torch.ones_like(TEXT), keep_logits=True)
    assert torch.equal(logits_of(with_mask), logits_of(early.score(TEXT, keep_logits=True)))


def test_more_tokens_than_the_lm_head_takes_at_once_are_all_scored() -> None:
    early, ids = scorer("qwen3", "ridge"), random_ids(8, 40)
    assert early.stack.max_positions == 64
    score = check_it_is_the_mixed_pass(early, ids, None, heads=some_heads("qwen3"))
    assert score.counts.lm_head_rows > 8 * 40


def test_token_ids_may_be_lists_or_narrow_integers() -> None:
    early, ids = scorer("llama"), random_ids(2, 12)
    expected = early.score(ids)
    kinds: list[Any] = [ids.tolist(), ids.numpy(), ids.int(), ids.to(torch.uint8)]
    for same in kinds:
        assert torch.equal(early.score(same).predictions, expected.predictions)


def test_a_forked_pass_goes_on_by_itself() -> None:
    stack, nobody = a_stack("llama"), INF
    everybody, later = (make_exit(stack, layer, "patience", -INF) for layer in (2, 3))
    stays = make_exit(stack, 2, "patience", nobody)
    counts = Counts.of(LAYERS)
    layers, chunk = SkippingLayers(stack), make_chunk(stack, TEXT)
    cache = layers.new_cache(*TEXT.shape, keep=False)
    cache.window(0, TEXT.shape[1])
    first = ForwardPass(layers, [stays, later], chunk, cache, counts)
    first.run_layers_to(2)
    second = first.fork()
    second.exits = [everybody, later]
    made: dict[ForwardPass, list[tuple[int, int]]] = {first: [], second: []}
    for going in (second, first):  # the fork first: it must leave nothing of itself behind
        take = functools.partial(keep_layer, made[going])
        for at in going.exits:
            going.run_layers_to(at.layer)
            going.decide(at, chunk.valid, take)
        going.finish(chunk.valid, take)
    assert made == {first: [(3, 60)], second: [(2, 60)]}
    assert bool((first.exit_layers == 3).all())
    assert bool((second.exit_layers == 2).all())


def keep_layer(made: list[tuple[int, int]], layer: int, rows: Tensor, *_: Tensor) -> None:
    made.append((layer, len(rows)))


def test_one_token_has_no_perplexity() -> None:
    score = scorer("llama").score(random_ids(2, 1))
    assert score.log_probabilities.shape == (2, 0)
    assert math.isnan(score.perplexity)


def test_a_score_carries_no_gradient() -> None:
    score = scorer("llama").score(random_ids(), keep_logits=True)
    assert not logits_of(score).requires_grad
    assert not score.log_probabilities.requires_grad


# --- Packed and generic: the same results ----------------------------------------------------


@pytest.fixture
def with_attention() -> Iterator[Callable[[str, str], DecoderStack]]:
    """Return a family's stack with another implementation of attention, for one test."""
    changed: list[tuple[DecoderStack, str]] = []

    def change(family: str, implementation: str) -> DecoderStack:
        stack = a_stack(family)
        changed.append((stack, stack.model.config._attn_implementation))
        stack.model.set_attn_implementation(implementation)
        return stack

    yield change
    for stack, implementation in changed:
        stack.model.set_attn_implementation(implementation)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        (family, implementation)
        for family in SKIPPING
        for implementation in ("sdpa", "eager")
        if (family, implementation) != ("gemma2", "sdpa")  # soft-caps inside, which sdpa cannot
    ],
)
@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
def test_skipping_changes_no_result(
    family: str,
    implementation: str,
    propagation: Propagation,
    with_attention: Callable[[str, str], DecoderStack],
) -> None:
    stack = with_attention(family, implementation)
    exits = exits_for_text(stack, some_heads(family), propagation)
    packed, generic = (
        EarlyExit(stack, exits=exits, propagation=propagation, skip=skip) for skip in (True, False)
    )
    assert packed.fallback_reason is None
    assert generic.fallback_reason == "asked to compute every token"
    for mask in (None, MASK):
        one, other = (early.score(TEXT, mask, keep_logits=True) for early in (packed, generic))
        assert is_mixed(one.exit_layers, [1, 2, 3])
        assert torch.equal(one.exit_layers, other.exit_layers)
        assert torch.equal(one.predictions, other.predictions)
        assert difference(logits_of(one), logits_of(other)) <= CLOSE


@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
@SKIPPING_FAMILIES
def test_skipping_in_bfloat16_agrees(family: str, propagation: Propagation) -> None:
    stack = a_bf16_stack(family)
    exits = exits_for_text(stack, bf16_heads(family), propagation)
    packed, generic = (
        EarlyExit(stack, exits=exits, propagation=propagation, skip=skip) for skip in (True, False)
    )
    assert packed.fallback_reason is None
    one, other = (early.score(TEXT) for early in (packed, generic))
    assert is_mixed(one.exit_layers, [1, 2, 3])
    # Eight bits: a token whose confidence lies within a rounding of the threshold may part.
    assert (one.exit_layers == other.exit_layers).float().mean() >= 0.9
    assert (one.predictions == other.predictions).float().mean() >= 0.9


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_bfloat16_where_nobody_leaves_is_the_full_model(
    family: str, propagation: Propagation
) -> None:
    stack, heads = a_bf16_stack(family), bf16_heads(family)
    exits = [
        make_exit(stack, layer, "max_probability", INF, heads=heads, propagation=propagation)
        for layer in (1, 3)
    ]
    score = EarlyExit(stack, exits=exits, propagation=propagation).score(TEXT, keep_logits=True)
    assert difference(logits_of(score), own_logits(stack, TEXT).float()) == 0.0
    assert bool((score.exit_layers == LAYERS).all())


@ALL_FAMILIES
def test_bfloat16_where_everybody_leaves_is_the_exit_head_alone(family: str) -> None:
    stack = a_bf16_stack(family)
    history = visited(stack, TEXT)
    for layer, heads, propagation in (
        (2, None, "frozen"),
        (2, bf16_heads(family), "ridge"),
        (LAYERS, None, "exact"),
    ):
        early = EarlyExit(stack, layer=layer, threshold=-INF, heads=heads, propagation=propagation)
        score = early.score(TEXT, keep_logits=True)
        expected = head_logits(stack, early.exits[0], history[layer]).float()
        # Written out, a ridge head may round otherwise, by a unit in the last of eight bits.
        close = torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        assert difference(logits_of(score), expected) <= (close if heads else 0.0)
        assert bool((score.exit_layers == layer).all())


@ALL_FAMILIES
def test_a_family_that_cannot_skip_says_so(family: str) -> None:
    reason = EarlyExit(a_stack(family)).fallback_reason
    if family in SKIPPING:
        assert reason is None
    else:
        assert reason == (
            f"{family} layers have no separate q_proj, k_proj, v_proj and o_proj behind an "
            "input_layernorm"
        )


# --- Counted, not assumed --------------------------------------------------------------------


@contextmanager
def rows_seen(stack: DecoderStack) -> Iterator[dict[str, list[int]]]:
    """Count the token rows that the model's own modules see, per layer."""
    seen = {name: [0] * LAYERS for name in ("mlp", "q_proj", "k_proj", "v_proj", "o_proj")}
    seen["lm_head"] = [0]

    def counting(name: str, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
            rows = args[0] if args else kwargs["hidden_states"]
            seen[name][index] += rows.numel() // rows.shape[-1]

        return hook

    handles = []
    for index, layer in enumerate(stack.layers):
        attention = layer.get_submodule("self_attn")
        modules = {name: getattr(attention, name) for name in seen if hasattr(attention, name)}
        modules["mlp"] = layer.get_submodule("mlp")
        for name, module in modules.items():
            hook = counting(name, index)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    hook = counting("lm_head", 0)
    handles.append(stack.lm_head.register_forward_hook(hook, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("rule", ["top2_gap", "cosine"])
@ALL_PROPAGATIONS
@SKIPPING_FAMILIES
def test_the_counts_are_the_rows_that_the_modules_saw(
    family: str, propagation: Propagation, rule: str
) -> None:
    early = scorer(family, propagation, rule=rule)
    with rows_seen(early.stack) as seen:
        score = early.score(TEXT)
    counts, left = score.counts, score.exit_layers
    assert is_mixed(left, [1, 2, 3])
    assert seen["mlp"] == seen["q_proj"] == seen["o_proj"] == counts.layer_rows
    projected = [a + b for a, b in zip(counts.layer_rows, counts.key_value_rows, strict=True)]
    assert seen["k_proj"] == seen["v_proj"] == projected
    assert seen["lm_head"] == [counts.lm_head_rows]
    above = [int((left >= layer).sum()) for layer in range(1, LAYERS + 1)]
    exited = [int((left < layer).sum()) for layer in range(1, LAYERS + 1)]
    if propagation == "exact":
        assert counts.layer_rows == [60] * LAYERS
        assert not any(counts.key_value_rows + counts.predicted_rows)
    else:
        # True skipping: no MLP, query or output projection of a token that left.
        assert counts.layer_rows == above
        of_exited = counts.key_value_rows if propagation == "frozen" else counts.predicted_rows
        of_nobody = counts.predicted_rows if propagation == "frozen" else counts.key_value_rows
        assert of_exited == exited
        assert not any(of_nobody)
    # Rules that look at logits probe everybody undecided; the cosine asks only those that leave.
    probed = (
        sum(above[:3]) if rule == "top2_gap" else sum(int((left == at).sum()) for at in (1, 2, 3))
    )
    assert counts.lm_head_rows == probed + int((left == LAYERS).sum())
    assert sum(counts.head_rows.values()) == probed
    assert set(counts.head_rows) == {1, 2, 3}


def test_pairs_are_queries_times_what_their_attention_sees() -> None:
    stack = a_stack("llama")
    ids = random_ids(2, 10)
    assert EarlyExit(stack).score(ids).counts.pairs == [2 * 10 * 10] * LAYERS
    early = scorer("llama", layers=(2,))
    score = early.score(ids)
    hard = (score.exit_layers == LAYERS).sum(dim=1)
    most = int(hard.max()) * int((hard > 0).sum())
    assert score.counts.pairs == [200, 200, most * 10, most * 10]
    assert most < 20


def test_the_generic_path_counts_every_row_it_computes() -> None:
    early = scorer("llama", "ridge", skip=False)
    with rows_seen(early.stack) as seen:
        score = early.score(TEXT)
    assert is_mixed(score.exit_layers, [1, 2, 3])
    assert score.counts.layer_rows == seen["mlp"] == seen["q_proj"] == [60] * LAYERS
    assert not any(score.counts.key_value_rows)
    exited = [int((score.exit_layers < layer).sum()) for layer in range(1, LAYERS + 1)]
    assert score.counts.predicted_rows == exited


def test_the_logit_lens_maps_nothing_before_the_lm_head() -> None:
    stack = a_stack("llama")
    early = EarlyExit(stack, exits=some_exits(stack, layers=(2,)))
    assert early.score(random_ids()).counts.head_rows == {}


def test_the_oracles_look_at_the_full_model_is_no_work_of_its_exits() -> None:
    early = EarlyExit(a_stack("llama"), layer=2, rule="oracle", threshold=1.0)
    score = early.score(random_ids(2, 10))
    assert score.counts.layer_rows[:2] == [20, 20]
    assert score.counts.layer_rows[3] == int((score.exit_layers == LAYERS).sum()) < 20


# --- What a pass leaves behind ---------------------------------------------------------------


def raise_it(*_: Any, **__: Any) -> Any:
    raise ArithmeticError("planted")


#: Where a pass can break: in a layer, inside its attention, in the LM head.
BREAKS: dict[str, Callable[[DecoderStack], nn.Module]] = {
    "layer": lambda stack: stack.layers[2],
    "attention": lambda stack: stack.layers[2].get_submodule("self_attn.o_proj"),
    "projection": lambda stack: stack.layers[3].get_submodule("self_attn.k_proj"),
    "lm_head": lambda stack: stack.lm_head,
}


@pytest.mark.parametrize("place", BREAKS)
@pytest.mark.parametrize("skip", [True, False], ids=["packed", "generic"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_model_is_left_as_it_was_also_when_something_raises(
    family: str, skip: bool, place: str
) -> None:
    early = scorer(family, "ridge", skip=skip)
    before, expected = state_of(early.stack), early.score(TEXT, keep_logits=True)
    assert is_mixed(expected.exit_layers, [1, 2, 3])
    assert state_of(early.stack) == before
    handle = BREAKS[place](early.stack).register_forward_pre_hook(raise_it)
    try:
        planted = state_of(early.stack)
        with pytest.raises(ArithmeticError, match="planted"):
            early.score(TEXT)
        assert state_of(early.stack) == planted
    finally:
        handle.remove()
    assert torch.equal(logits_of(early.score(TEXT, keep_logits=True)), logits_of(expected))


@ALL_FAMILIES
def test_scoring_leaves_every_family_as_it_was(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    before, logits = state_of(stack), own_logits(stack, ids)
    for propagation in PROPAGATIONS:
        scorer(family, propagation).score(ids)
        assert state_of(stack) == before
    assert difference(own_logits(stack, ids), logits) == 0.0


# --- Refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layer": 0}, "expected an exit layer in 1..4, got 0"),
        ({"layer": LAYERS + 1}, "expected an exit layer in 1..4, got 5"),
        ({"layer": -1}, "expected an exit layer in 1..4, got -1"),
        ({"layer": True}, "expected an exit layer in 1..4, got True"),
        ({"layer": 2.0}, "expected an exit layer in 1..4, got 2.0"),
        (
            {"layer": 1, "rule": "mean_cosine"},
            "the rule mean_cosine looks at 2 layers; expected an exit layer in 2..4, got 1",
        ),
        (
            {"layer": 2, "rule": "cosin"},
            f"expected a rule among {', '.join(RULES)}, got 'cosin'",
        ),
        (
            {"layer": 2, "propagation": "thawed"},
            "expected a propagation among frozen, ridge, exact, got 'thawed'",
        ),
        (
            {"layer": 2, "propagation": "ridge"},
            "ridge propagation needs fitted heads; make them with `cascade fit-heads`",
        ),
        (
            {"layer": 2, "threshold": 1.01},
            "the rule cosine gives confidences from -1 to 1; expected a threshold in there (or inf,"
            " or -inf), got 1.01",
        ),
        (
            {"layer": 2, "rule": "top2_gap", "threshold": -0.1},
            "the rule top2_gap gives confidences from 0 to 1; expected a threshold in there (or "
            "inf, or -inf), got -0.1",
        ),
        (
            {"layer": 2, "rule": "patience", "threshold": -1},
            "the rule patience gives confidences from 0; expected a threshold in there (or inf, or "
            "-inf), got -1",
        ),
        (
            {"layer": 2, "threshold": math.nan},
            "the rule cosine gives confidences from -1 to 1; expected a threshold in there (or inf,"
            " or -inf), got nan",
        ),
        ({"layer": [2, 3]}, "expected an exit layer in 1..4, got [2, 3]"),
        (
            {"layer": 2, "rule": ["cosine"]},
            f"expected a rule among {', '.join(RULES)}, got ['cosine']",
        ),
        *(
            (
                {"layer": 2, "threshold": value},
                f"expected a threshold as a number (inf where nothing is to leave), got {value!r}",
            )
            for value in (None, "x", "0.5", [0.5], 10**400)
        ),
        *(
            (
                layer | {"heads": "heads.safetensors"},
                "expected fitted heads, got str; read them with load_heads",
            )
            for layer in ({}, {"layer": 2})
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        EarlyExit(a_stack("llama"), **settings)
    assert one_line(error) == said


@pytest.mark.parametrize("layers", [(2, 1), (2, 2), (1, 3, 2)])
def test_exits_out_of_order_are_refused(layers: tuple[int, ...]) -> None:
    stack = a_stack("llama")
    exits = [make_exit(stack, layer, "cosine", 0.5) for layer in layers]
    with pytest.raises(UsageError) as error:
        EarlyExit(stack, exits=exits)
    assert one_line(error) == (
        f"expected exits in ascending order of layers, got layers {list(layers)}"
    )


@pytest.mark.parametrize(
    "others", [(), ((3, "cosine"),), ((3, "cosine"), (4, "top2_gap"))], ids=len
)
@pytest.mark.parametrize("threshold", [1.0, 0.0, INF])
def test_patience_is_refused_where_no_exit_lies_below_to_be_looked_at(
    others: tuple[tuple[int, str], ...], threshold: float
) -> None:
    stack = a_stack("llama")
    exits = [make_exit(stack, 2, "patience", threshold)]
    exits += [make_exit(stack, layer, rule, 0.5) for layer, rule in others]
    with pytest.raises(UsageError) as error:
        EarlyExit(stack, exits=exits)
    assert one_line(error) == (
        "the rule patience looks at earlier exits, and none lies below layer 2; give exits below "
        "it, or take another rule"
    )
    # One exit below is enough, and what patience looks at may be patience.
    for below in ("fixed", "patience"):
        EarlyExit(stack, exits=[make_exit(stack, 1, below, INF), *exits])


def test_a_threshold_in_exits_given_one_by_one_is_checked_too() -> None:
    stack = a_stack("llama")
    at = Exit(2, find_rule("entropy"), 1.5, make_exit(stack, 2, "entropy", 0.5).head)
    with pytest.raises(UsageError, match=r"^the rule entropy gives confidences from 0 to 1; "):
        EarlyExit(stack, exits=[at])


@pytest.mark.parametrize("threshold", ["x", None])
def test_a_threshold_in_exits_that_is_no_number_is_refused(threshold: Any) -> None:
    at = Exit(
        2, find_rule("entropy"), threshold, make_exit(a_stack("llama"), 2, "entropy", 0.5).head
    )
    with pytest.raises(UsageError) as error:
        EarlyExit(a_stack("llama"), exits=[at])
    assert one_line(error).startswith("expected a threshold as a number")


def test_numbers_of_numpy_are_numbers() -> None:
    early = EarlyExit(
        a_stack("llama"), layer=np.int64(3), rule="top2_gap", threshold=np.float32(0.5)
    )
    (at,) = early.exits
    assert (type(at.layer), at.layer) == (int, 3)
    assert (type(at.threshold), at.threshold) == (float, 0.5)


def test_one_exit_layer_and_a_list_of_exits_are_not_both_taken() -> None:
    stack = a_stack("llama")
    with pytest.raises(UsageError) as error:
        EarlyExit(stack, layer=1, exits=some_exits(stack))
    assert one_line(error) == "expected one exit layer or exits, got layer=1 and exits; give one"


def test_ridge_propagation_needs_a_map_of_every_exit_below_the_last_layer() -> None:
    stack, heads = a_stack("llama"), some_heads("llama")
    exits = [make_exit(stack, layer, "cosine", 0.5, heads=heads) for layer in (2, LAYERS)]
    with pytest.raises(UsageError) as error:
        EarlyExit(stack, exits=exits, propagation="ridge")
    assert one_line(error) == (
        "the exit at layer 2 has no propagation map; give it the one of its fitted heads, or use "
        "frozen propagation"
    )
    last = make_exit(stack, LAYERS, "cosine", 0.5, heads=heads, propagation="ridge")
    assert last.propagation is None
    EarlyExit(stack, exits=[last], propagation="ridge")


@pytest.mark.parametrize("propagation", ["frozen", "exact"])
def test_a_map_that_nobody_asked_for_is_not_used(propagation: Propagation) -> None:
    stack, heads, ids = a_stack("llama"), some_heads("llama"), random_ids(3, 20)
    with_map, without = (
        some_exits(stack, heads=heads, propagation=kind) for kind in ("ridge", "frozen")
    )
    assert with_map[0].propagation is not None
    one, other = (
        EarlyExit(stack, exits=exits, propagation=propagation).score(ids, keep_logits=True)
        for exits in (with_map, without)
    )
    assert torch.equal(logits_of(one), logits_of(other))
    assert not any(one.counts.predicted_rows)


def test_a_layer_without_a_fitted_head_is_refused_with_those_that_have_one() -> None:
    stack = a_stack("llama")
    heads = fit_heads(stack, random_blocks(), [1, 3])
    with pytest.raises(UsageError) as error:
        EarlyExit(stack, layer=2, heads=heads)
    assert one_line(error) == (
        "these heads were fitted for the layers 1, 3, got layer 2; fit it with `cascade fit-heads "
        "--layers`"
    )


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_heads_of_another_model_are_refused_and_both_are_named(propagation: Propagation) -> None:
    with pytest.raises(ModelError) as error:
        EarlyExit(a_stack("qwen2"), layer=2, heads=some_heads("llama"), propagation=propagation)
    text = one_line(error)
    assert text.startswith("these exit heads belong to ")
    assert "family llama" in text
    assert "family qwen2" in text
    assert text.endswith("; make them anew for this model")


def test_exits_of_another_model_are_refused_and_of_the_same_weights_taken() -> None:
    stack, same, other = (DecoderStack(tiny_model("llama", seed=seed)) for seed in (0, 0, 1))
    ids = random_ids()
    expected = EarlyExit(stack, layer=2, rule="top2_gap", threshold=0.1).score(ids)
    for heads in (None, fit_heads(other, random_blocks(), [2])):
        exits = [make_exit(other, 2, "top2_gap", 0.1, heads=heads)]
        with pytest.raises(ModelError) as error:
            EarlyExit(stack, exits=exits)
        assert one_line(error) == (
            "the heads of the exit at layer 2 belong to llama (weights_hash "
            f"{other.weights_hash()}), but the model is llama (weights_hash "
            f"{stack.weights_hash()}); make them anew for this model"
        )
    score = EarlyExit(stack, exits=[make_exit(same, 2, "top2_gap", 0.1)]).score(ids)
    assert torch.equal(score.predictions, expected.predictions)


def test_a_head_of_ones_own_need_not_know_its_model() -> None:
    class Own:
        name, multiplications = "own", 0

        def logits(self, hidden: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(torch.full((len(hidden),), 5), VOCABULARY).float()

    early = EarlyExit(a_stack("llama"), exits=[Exit(2, find_rule("fixed"), 1.0, Own())])
    assert bool((early.score(random_ids()).predictions == 5).all())


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "expected token ids [B, T], a row per prompt and none empty, got shape [0]"),
        ([[]], "expected token ids [B, T], a row per prompt and none empty, got shape [1, 0]"),
        ([3, 4], "expected token ids [B, T], a row per prompt and none empty, got shape [2]"),
        (
            [[[3]]],
            "expected token ids [B, T], a row per prompt and none empty, got shape [1, 1, 1]",
        ),
        (
            [[2, 3], [4]],
            "expected token ids [B, T], got rows of different length; pad them on the left and "
            "give an attention_mask",
        ),
        (
            [[2, VOCABULARY]],
            "expected token ids in 0..96, got 2 to 97; use the model's own tokenizer",
        ),
        ([[-1, 5]], "expected token ids in 0..96, got -1 to 5; use the model's own tokenizer"),
        (
            [[2.0, 3.0]],
            "expected token ids as whole numbers, got float32; use the model's own tokenizer",
        ),
        (
            [[True, False]],
            "expected token ids as whole numbers, got bool; use the model's own tokenizer",
        ),
        (
            torch.full((1, 65), 2),
            "65 tokens exceed the model's 64 positions; shorten the prompt",
        ),
        ("a text", "expected token ids [B, T], got str; use the model's own tokenizer"),
        (
            [["a", "text"]],
            "expected token ids [B, T], got a list that is no array of numbers; use the model's "
            "own tokenizer",
        ),
        (
            [[None]],
            "expected token ids [B, T], got a list that is no array of numbers; use the model's "
            "own tokenizer",
        ),
        (
            [[10**30]],
            "expected token ids [B, T], got a list that is no array of numbers; use the model's "
            "own tokenizer",
        ),
    ],
)
def test_token_ids_that_cannot_be_are_refused(ids: Any, said: str) -> None:
    for call in (EarlyExit(a_stack("llama")).score, EarlyExit(a_stack("llama")).generate):
        with pytest.raises(UsageError) as error:
            call(ids)
        assert one_line(error) == said


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 4), "expected an attention_mask of the ids' shape [2, 5], got [2, 4]"),
        (torch.ones(5), "expected an attention_mask of the ids' shape [2, 5], got [5]"),
        (
            torch.ones(2, 1, 5, 5),
            "expected an attention_mask of the ids' shape [2, 5], got [2, 1, 5, 5]",
        ),
        (
            torch.tensor([[1] * 5, [0] * 5]),
            "a row of the attention_mask is all zeros; expected at least one token",
        ),
        (
            [[1, 1, 1, 1, 1], [1]],
            "expected an attention_mask of the ids' shape [2, 5], got rows of different length",
        ),
        ("ones", "expected an attention_mask of the ids' shape [2, 5], got str"),
        *(
            (
                [[1] * 5, [0, value, 1, 1, 1]],
                "expected an attention_mask of 0 for padding and 1 for tokens alone, got "
                f"{shown} among them",
            )
            for value, shown in ((math.nan, "nan"), (0.5, "0.5"), (2, "2"), (-1, "-1"))
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Any, said: str) -> None:
    for call in (EarlyExit(a_stack("llama")).score, EarlyExit(a_stack("llama")).generate):
        with pytest.raises(UsageError) as error:
            call(random_ids(2, 5), mask)
        assert one_line(error) == said


def test_a_mask_of_any_kind_of_ones_and_zeros_is_read_alike() -> None:
    early, ids, mask = scorer("llama"), random_ids(2, 12), some_mask(2, 12)
    expected = early.score(ids, mask, keep_logits=True)
    kinds: list[Any] = [mask.bool(), mask.float(), mask.tolist(), mask.to(torch.int8)]
    for same in kinds:
        assert torch.equal(logits_of(early.score(ids, same, keep_logits=True)), logits_of(expected))


def with_nan(family: str, name: str) -> DecoderStack:
    """Return a stack one of whose weights became NaN after it was checked."""
    stack = DecoderStack(tiny_model(family))
    with torch.no_grad():
        stack.model.get_parameter(name)[0] = math.nan
    return stack


@pytest.mark.parametrize("rule", ["cosine", "top2_gap", "entropy", "max_probability"])
def test_a_confidence_that_is_nan_is_refused_with_rule_and_layer(rule: str) -> None:
    stack = with_nan("llama", "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(ModelError) as error:
        EarlyExit(stack, layer=2, rule=rule, threshold=0.5).score(random_ids())
    assert one_line(error) == (
        f"the rule {rule} is NaN at exit layer 2: the states or logits there are not finite; use a "
        "wider --dtype, or get the checkpoint again"
    )


@pytest.mark.parametrize("settings", [{}, {"layer": 3, "rule": "cosine", "threshold": -INF}])
def test_logits_that_are_nan_are_refused_where_no_rule_looks_at_them(
    settings: dict[str, Any],
) -> None:
    early = EarlyExit(with_nan("llama", "lm_head.weight"), **settings)
    for call in (early.score, early.generate):
        with pytest.raises(ModelError) as error:
            call(random_ids())
        assert one_line(error) == (
            f"the logits of layer {settings.get('layer', LAYERS)} are not finite; use a wider "
            "--dtype, or get the checkpoint again"
        )


def test_a_chunk_knows_its_positions() -> None:
    chunk = make_chunk(a_stack("llama"), random_ids(2, 5), some_mask(2, 5, left=2))
    assert chunk.positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert chunk.valid.tolist() == [[False, False, True, True, True], [True] * 5]
    assert set(FAMILIES) >= set(SKIPPING)


@pytest.mark.parametrize(
    "given", [None, {"input_ids": [[1, 2]]}, BatchEncoding({"input_ids": [[1]]})]
)
@pytest.mark.parametrize("method", ["score", "generate"])
def test_what_a_tokenizer_returns_is_refused_with_what_to_take_of_it(
    method: str, given: Any
) -> None:
    early = EarlyExit(a_stack("llama"), layer=2, threshold=0.9)
    with pytest.raises(UsageError) as error:
        getattr(early, method)(given)
    assert 'give ["input_ids"]' in one_line(error)


def test_values_that_are_no_numbers_are_refused() -> None:
    early = EarlyExit(a_stack("llama"), layer=2, threshold=0.9)
    with pytest.raises(UsageError, match="expected token ids"):
        early.score([["a", "b"]])  # type: ignore[arg-type]
