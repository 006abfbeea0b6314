"""Test that untrained stages are the identity, and that trained stages run the same everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.reference_early_exit import (
    ALL_FAMILIES,
    CLOSE,
    LAYERS,
    a_bf16_stack,
    a_stack,
    one_line,
    own_logits,
    some_mask,
)
from support.tiny_models import FAMILIES, tiny_model
from support.tiny_stages import a_moved_stage, a_text, moved, share_of
from torch import Tensor, nn

from cascade.core.errors import ModelError, UnsupportedModelError, UsageError
from cascade.models.stack import DecoderStack
from cascade.stages import stage as stages
from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.stage import Stage, extended, new_stage, run_stage
from cascade.stages.training_config import STARTS

ALL_STARTS = pytest.mark.parametrize("start", STARTS)
TEXT = a_text(3, 20, seed=1)
MASK = some_mask(3, 20)


def own_generate(stack: DecoderStack, ids: Tensor, mask: Tensor) -> Tensor:
    model: Any = stack.model
    settings = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 1}
    sequences: Tensor = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings
    )
    return sequences


# --- Untrained stages are the identity -------------------------------------------------------


@ALL_STARTS
@ALL_FAMILIES
def test_an_untrained_stage_is_exactly_the_identity(family: str, start: Any) -> None:
    stack = a_stack(family)
    longer = extended(stack, new_stage(stack, 2, start=start))
    assert longer.num_layers == LAYERS + 2
    for mask in (None, MASK):
        assert torch.equal(own_logits(longer, TEXT, mask), own_logits(stack, TEXT, mask))
    again = extended(longer, new_stage(longer, 1, start=start))
    assert again.num_layers == LAYERS + 3
    assert torch.equal(own_logits(again, TEXT), own_logits(stack, TEXT))


@ALL_STARTS
@ALL_FAMILIES
def test_transformers_generates_the_same_with_an_untrained_stage(family: str, start: Any) -> None:
    stack = a_stack(family)
    longer = extended(stack, new_stage(stack, 3, start=start))
    one, other = (own_generate(model, TEXT[:, :9], MASK[:, :9]) for model in (stack, longer))
    assert torch.equal(one.sequences, other.sequences)
    for mine, expected in zip(other.logits, one.logits, strict=True):
        assert torch.equal(mine, expected)


@ALL_STARTS
@ALL_FAMILIES
def test_an_untrained_stage_is_the_identity_in_bf16(family: str, start: Any) -> None:
    stack = a_bf16_stack(family)
    cascade = Cascade(stack)
    cascade.add_stage(new_stage(stack, 2, start=start), Entry(LAYERS, float("inf")))
    assert cascade.stack.dtype == torch.bfloat16
    assert torch.equal(own_logits(cascade.stack, TEXT), own_logits(stack, TEXT))


@ALL_FAMILIES
def test_only_the_output_projections_are_zero(family: str) -> None:
    stack = a_stack(family)
    stage = new_stage(stack, 2)
    for source, layer in zip(stage.sources, stage.layers, strict=True):
        copied = dict(stack.layers[source - 1].named_parameters())
        changed = {
            name for name, value in layer.named_parameters() if not value.equal(copied[name])
        }
        zeroed = {name.rpartition(".")[0] for name in changed}
        assert len(zeroed) == 2, f"expected the outputs of attention and MLP, got {sorted(zeroed)}"
        for name in changed:
            assert not bool(dict(layer.named_parameters())[name].any())


# --- The base does not change -----------------------------------------------------------------


@ALL_STARTS
@ALL_FAMILIES
def test_the_base_and_its_config_are_not_changed(family: str, start: Any) -> None:
    stack = DecoderStack(tiny_model(family))
    indices = [
        {name: vars(module)[name] for name in ("layer_idx", "layer_id") if name in vars(module)}
        for module in stack.model.modules()
    ]
    before = (
        stack.weights_in_memory(),
        stack.model.config.to_dict(),
        own_logits(stack, TEXT),
        [id(value) for value in stack.model.parameters()],
    )
    stage = moved(new_stage(stack, 2, start=start))
    longer = extended(stack, stage)
    own_generate(longer, TEXT[:, :9], MASK[:, :9])
    assert stack.weights_in_memory() == before[0]
    assert stack.model.config.to_dict() == before[1]
    assert torch.equal(own_logits(stack, TEXT), before[2])
    assert [id(value) for value in stack.model.parameters()] == before[3]
    assert indices == [
        {name: vars(module)[name] for name in ("layer_idx", "layer_id") if name in vars(module)}
        for module in stack.model.modules()
    ]
    assert len(stack.layers) == LAYERS
    assert stack.below is None


@ALL_FAMILIES
def test_the_extended_model_shares_all_weights(family: str) -> None:
    stack = a_stack(family)
    stage = a_moved_stage(stack)
    longer = extended(stack, stage)
    ids = {id(value) for value in (*stack.model.parameters(), *stage.parameters())}
    assert {id(value) for value in longer.model.parameters()} == ids
    assert longer.below is stack
    before = own_logits(longer, TEXT)
    moved(stage, seed=1)
    assert not torch.equal(own_logits(longer, TEXT), before), "training does not change the model"


def test_the_extended_model_has_another_weights_hash() -> None:
    stack = DecoderStack(tiny_model("llama"), provenance={"weights_hash": "sha256:of-the-base"})
    longer = extended(stack, a_moved_stage(stack))
    assert longer.weights_hash() != stack.weights_hash()
    assert longer.provenance.num_layers == LAYERS + 2


# --- Stages over stored states ----------------------------------------------------------------


@ALL_STARTS
@ALL_FAMILIES
def test_a_stage_over_stored_states_equals_frozen_propagation(family: str, start: Any) -> None:
    stack = a_stack(family)
    stage = a_moved_stage(stack, start=start)
    kept: dict[int, Tensor] = {}
    stack.visit(TEXT, kept.__setitem__)
    cascade = Cascade(stack)
    cascade.add_stage(stage, Entry(3, share_of(stack, TEXT, 3)))
    score = cascade.score(TEXT, keep_logits=True)
    entering = score.exit_layers > LAYERS
    assert 0 < int(entering.sum()) < entering.numel()
    with torch.no_grad():
        states = run_stage(stack, stage, TEXT, kept[LAYERS], entering)
    assert torch.equal(states[~entering], kept[LAYERS][~entering])
    assert not torch.allclose(states[entering], kept[LAYERS][entering], atol=1e-2)
    assert score.logits is not None
    assert (stack.decode(states) - score.logits).abs().max() <= CLOSE


@ALL_FAMILIES
def test_entering_tokens_attend_only_to_earlier_exit_states(family: str) -> None:
    stack = a_stack(family)
    stage = a_moved_stage(stack)
    states = torch.randn((1, 10, 32), generator=torch.Generator().manual_seed(0))
    entering = torch.tensor([[False, False, True] + [False] * 5 + [True, False]])
    with torch.no_grad():
        usual = run_stage(stack, stage, TEXT[:1, :10], states, entering)
        for easy, touched in ((1, [2, 8]), (5, [8]), (9, [])):
            other = states.clone()
            other[0, easy, ::2] += 1.0
            seen = run_stage(stack, stage, TEXT[:1, :10], other, entering)
            moves = (seen - usual)[0].abs().amax(dim=-1) > 0
            assert moves.nonzero().flatten().tolist() == sorted([easy, *touched])


# --- Training ---------------------------------------------------------------------------------


def one_step(stack: DecoderStack, stage: Stage) -> None:
    """Make one step of gradient descent on random tokens."""
    kept: dict[int, Tensor] = {}
    stack.visit(TEXT, kept.__setitem__)
    entering = torch.rand(TEXT.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    states = run_stage(stack, stage, TEXT, kept[LAYERS], entering)
    through = stack if stage.head is None else extended(stack, stage)
    logits = through.decode(states)[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), TEXT[:, 1:].flatten()).backward()
    with torch.no_grad():
        for value in stage.parameters():
            if value.grad is not None:
                value.sub_(0.1 * value.grad)


@ALL_STARTS
@ALL_FAMILIES
def test_gradients_reach_all_weights_of_the_stage_and_none_of_the_base(
    family: str, start: Any
) -> None:
    stack = DecoderStack(tiny_model(family))
    stack.model.requires_grad_(False)
    stage = new_stage(stack, 2, start=start)
    one_step(stack, stage)  # zeroed outputs block gradients until their first update
    for value in stage.parameters():
        value.grad = None
    one_step(stack, stage)
    for name, value in stage.layers.named_parameters():
        # A key bias adds the same value to every score of a query, so softmax cancels it.
        if not is_key_bias(name):
            assert value.grad is not None, f"{name} has no gradient"
            assert bool(value.grad.any()), f"{name} has a zero gradient"
    assert all(value.grad is None for value in stack.model.parameters())


def is_key_bias(name: str) -> bool:
    return name.endswith(("k_proj.bias",))


def test_a_separate_head_starts_as_a_copy_and_trains_separately() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.model.requires_grad_(False)
    head = stack.lm_head.weight.clone()
    stage = new_stage(stack, 1, own_head=True)
    assert stage.head is not None
    assert torch.equal(own_logits(extended(stack, stage), TEXT), own_logits(stack, TEXT))
    one_step(stack, stage)
    weight: Any = stage.head.weight
    assert not torch.equal(weight, head)
    assert torch.equal(stack.lm_head.weight, head)
    assert {"head.weight", "layers.0.mlp.down_proj.weight"} <= stage.weights().keys()


# --- Starts and seeds -------------------------------------------------------------------------


@ALL_FAMILIES
def test_fresh_layers_depend_on_the_seed_and_copies_do_not(family: str) -> None:
    stack = a_stack(family)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    prints = {
        (start, seed): new_stage(stack, 2, start=start, seed=seed).fingerprint()
        for start in STARTS
        for seed in (0, 1)
    }
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert prints["fresh", 0] != prints["fresh", 1]
    assert prints["copies", 0] == prints["copies", 1]
    assert new_stage(stack, 2, start="fresh", seed=1).fingerprint() == prints["fresh", 1]


def test_fresh_norms_start_at_one() -> None:
    stage = new_stage(a_stack("llama"), 1, start="fresh")
    for name, value in stage.layers.named_parameters():
        if "norm" in name:
            assert bool((value == 1).all())


def test_a_stage_copies_the_last_layers_and_their_attention_types() -> None:
    stack = a_stack("gemma2")
    stage = new_stage(stack, 2)
    assert stage.sources == (3, 4)
    types = stack.model.config.layer_types
    config = extended(stack, stage).model.config
    assert config.num_hidden_layers == LAYERS + 2
    assert config.layer_types == [*types, *types[2:]]


# --- Reading and loading weights --------------------------------------------------------------


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_loading_the_weights_gives_the_same_stage(family: str, own_head: bool) -> None:
    stack = a_stack(family)
    one = a_moved_stage(stack, own_head=own_head)
    other = new_stage(stack, 2, own_head=own_head)
    assert one.fingerprint() != other.fingerprint()
    other.load({name: value.clone() for name, value in one.weights().items()})
    assert one.fingerprint() == other.fingerprint()
    logits = [own_logits(extended(stack, stage), TEXT) for stage in (one, other)]
    assert torch.equal(*logits)


def test_weights_with_other_names_or_shapes_are_refused_and_not_copied() -> None:
    stack = a_stack("llama")
    stage = a_moved_stage(stack)
    before = stage.fingerprint()
    weights = {name: torch.zeros_like(value) for name, value in stage.weights().items()}
    last = "layers.1.mlp.down_proj.weight"
    cases = [
        ({name: value for name, value in weights.items() if name != last}, "got none"),
        (weights | {"zzz": torch.zeros(2)}, "zzz: expected none, got [2]"),
        (weights | {last: torch.zeros(32, 49)}, "expected [32, 48], got [32, 49]"),
    ]
    for wrong, message in cases:
        with pytest.raises(ModelError, match="weights that were saved with this stage") as caught:
            stage.load(wrong)
        assert message in one_line(caught)
        assert stage.fingerprint() == before


# --- Invalid arguments ------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_post_norm_layers_are_refused(start: Any) -> None:
    stack = DecoderStack(tiny_model("opt", do_layer_norm_before=False))
    with pytest.raises(UnsupportedModelError, match="a layer of opt changes its input") as caught:
        new_stage(stack, 1, start=start)
    one_line(caught)


def a_mixture(monkeypatch: pytest.MonkeyPatch) -> DecoderStack:
    settings = FAMILIES["llama"] | {"num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(FAMILIES, "mixtral", settings)
    return DecoderStack(tiny_model("mixtral"))


def test_a_mixture_of_experts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="mixtures of experts do") as caught:
        new_stage(a_mixture(monkeypatch))
    one_line(caught)


def test_quantized_layers_are_refused() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.layers[3].mlp.down_proj.weight = nn.Parameter(  # type: ignore[union-attr]
        torch.zeros((32, 48), dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match="are quantized") as caught:
        new_stage(stack)
    assert "--dtype float32" in one_line(caught)


@pytest.mark.parametrize("count", [0, -1, LAYERS + 1])
def test_a_layer_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"expected 1 to 4 layers for a stage, got {count}"):
        new_stage(a_stack("llama"), count)


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a start among copies, fresh, got 'zeros'"):
        new_stage(a_stack("llama"), start="zeros")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "changes", "own_head", "message"),
    [
        ("gpt2", {}, False, "expected a stage of LlamaDecoderLayers, got GPT2Blocks"),
        ("llama", {"hidden_size": 64}, False, "the stage was made for another width"),
        ("llama", {"intermediate_size": 40}, False, "the stage was made for another width"),
        ("llama", {"vocab_size": 50}, True, r"another vocabulary \(expected 97 tokens, got 50\)"),
    ],
)
def test_a_stage_of_another_model_is_refused(
    family: str, changes: dict[str, Any], own_head: bool, message: str
) -> None:
    other = DecoderStack(tiny_model(family, **changes))
    stage = new_stage(other, 1, own_head=own_head)
    for append in (lambda: extended(a_stack("llama"), stage), lambda: added(stage)):
        with pytest.raises(ModelError, match=message) as caught:
            append()
        one_line(caught)


def added(stage: Stage) -> None:
    Cascade(a_stack("llama")).add_stage(stage, Entry(4, 0.5))


def test_weights_that_are_not_finite_are_refused() -> None:
    stack = a_stack("llama")
    stage = a_moved_stage(stack)
    with torch.no_grad():
        stage.layers[1].mlp.down_proj.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(ModelError, match=r"NaN or infinite values \(decoder layer 6") as caught:
        extended(stack, stage)
    one_line(caught)


# --- The identity check -----------------------------------------------------------------------


@ALL_STARTS
def test_a_stage_that_is_not_zeroed_is_refused(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "zero_outputs", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="would not start as the identity"):
        new_stage(a_stack("llama"), start=start)
