"""The engine computes models of unusual sizes and settings, or says why it does not."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.drafting import FREE, Oracle
from support.engines import (
    CLOSE,
    KINDS,
    difference_behind,
    filled,
    needs_compiler,
    own_states,
    states_of,
)
from support.tiny_models import VOCABULARY, perturbed, random_ids, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from cascade.core.errors import CascadeError, ModelError
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.engine.compiled_layers import CompiledLayers
from cascade.decoding.engine.compiler import CompilerError
from cascade.decoding.engine.engine import DecodingEngine, EngineKind, engine_of
from cascade.decoding.engine.modules import LayerModules
from cascade.decoding.engine.rows import Rows
from cascade.decoding.growing_text import Generation
from cascade.models.stack import DecoderStack

both = pytest.mark.parametrize("kind", KINDS)


def checked(stack: DecoderStack, kind: EngineKind, length: int = 20) -> DecodingEngine:
    """Check states and logits of an engine, and return it."""
    engine = DecodingEngine(stack, kind)
    assert engine.obstacle is None
    ids = random_ids(1, length)[0]
    for prompt in (1, length - 6, length - 1):
        if length - prompt <= 32:
            assert difference_behind(engine, ids, prompt) <= CLOSE
    return engine


def stack_of(family: str = "llama", **changes: Any) -> DecoderStack:
    return DecoderStack(tiny_model(family, **changes))


def lossless(early: EarlyExit, ids: Tensor, new: int = 16) -> Generation:
    """Check that drafts change nothing, and return the generation."""
    model: Any = early.stack.model
    expected = model.generate(
        ids, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=new
    )
    drafter = Oracle({0: expected[0].tolist()}, VOCABULARY, wrong=0.2, siblings=1)
    made = early.generate(
        ids,
        verify=True,
        do_sample=False,
        eos_token_id=(),
        max_new_tokens=new,
        drafter=drafter,
        pass_costs=FREE,
        return_dict_in_generate=True,
    )
    assert isinstance(made, Generation)
    assert torch.equal(made.sequences, expected)
    return made


# --- Sizes ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1},
        {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3},
        {"hidden_size": 28, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6},
        {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2},
        {"hidden_size": 14, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 34},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
@pytest.mark.parametrize("inner", [1, 10, 33])
def test_sizes_that_are_no_multiples_of_vectors(
    sizes: dict[str, int], inner: int, kind: EngineKind
) -> None:
    checked(stack_of(**sizes, intermediate_size=inner), kind)


@settings(max_examples=20)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    key_heads = data.draw(st.integers(1, 3))
    heads = key_heads * data.draw(st.integers(1, 4))
    changes = {
        "hidden_size": heads * data.draw(st.integers(2, 10)),
        "num_key_value_heads": key_heads,
        "num_attention_heads": heads,
        "head_dim": 2 * data.draw(st.integers(1, 18)),
        "intermediate_size": data.draw(st.integers(1, 50)),
        "attention_bias": data.draw(st.booleans()),
        "mlp_bias": data.draw(st.booleans()),
    }
    checked(stack_of(num_layers=2, **changes), data.draw(st.sampled_from(KINDS)))


@both
def test_one_key_head_serves_all_query_heads(kind: EngineKind) -> None:
    checked(stack_of(num_key_value_heads=1), kind)


@both
def test_every_query_head_can_have_its_own_key_head(kind: EngineKind) -> None:
    checked(stack_of(num_key_value_heads=4), kind)


@both
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("mlp", [True, False])
def test_biases(attention: bool, mlp: bool, kind: EngineKind) -> None:
    checked(stack_of(attention_bias=attention, mlp_bias=mlp), kind)


@both
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tied: bool, kind: EngineKind) -> None:
    checked(stack_of(tie_word_embeddings=tied), kind)


@both
@pytest.mark.parametrize("epsilon", [1e-12, 1e-3, 0.5])
def test_epsilon_of_norms(epsilon: float, kind: EngineKind) -> None:
    checked(stack_of(rms_norm_eps=epsilon), kind)
    checked(stack_of("qwen3", rms_norm_eps=epsilon), kind)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "outputs", "inputs"),
    [
        ("self_attn.q_proj", 64, 32),  # twice the heads, as with gates
        ("self_attn.v_proj", 8, 32),
        ("self_attn.o_proj", 32, 16),
        ("mlp.up_proj", 24, 32),
        ("mlp.down_proj", 32, 24),
        ("mlp.gate_proj", 96, 32),
    ],
)
def test_weights_of_other_shapes_are_not_read(name: str, outputs: int, inputs: int) -> None:
    stack = stack_of()
    modules = [LayerModules.of(layer, stack.model.config) for layer in stack.layers]
    for layer in stack.layers:
        parent, _, own = name.partition(".")
        setattr(layer.get_submodule(parent), own, nn.Linear(inputs, outputs, bias=False))
    changed = [LayerModules.of(layer, stack.model.config) for layer in stack.layers]
    CompiledLayers(modules)
    with pytest.raises(CompilerError, match="its projections have other shapes than Llama's"):
        CompiledLayers(changed)


@needs_compiler
def test_layers_of_different_shapes_are_fused() -> None:
    stack = stack_of()
    mlp: Any = stack.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(32, 24, bias=False), nn.Linear(32, 24, bias=False)
    mlp.down_proj = nn.Linear(24, 32, bias=False)
    assert DecodingEngine(stack, "compiled").obstacle == "layers differ in their shapes"
    checked(stack, "fused")


@needs_compiler
def test_tables_of_another_width_are_refused() -> None:
    engine = DecodingEngine(stack_of(), "compiled")
    ids = random_ids(1, 8)[0]
    rows = Rows.chains([0], [7], [1])
    half = tuple(values[:, :4] for values in engine.tables(rows))
    with pytest.raises(ValueError, match=r"cannot rotate by tables of shape \(1, 4\)"):
        engine.run(engine.embed(ids[7:]), rows, filled(engine, ids[:7], 8), tables=half)


@both
def test_default_dtype_does_not_matter(kind: EngineKind) -> None:
    engine, ids = DecodingEngine(stack_of(), kind), random_ids(1, 40)[0]
    torch.set_default_dtype(torch.float16)  # half the memory for as many numbers
    try:
        assert difference_behind(engine, ids, 10) <= CLOSE
    finally:
        torch.set_default_dtype(torch.float32)


@needs_compiler
def test_rows_on_another_device_are_not_read() -> None:
    engine, ids = DecodingEngine(stack_of(), "compiled"), random_ids(1, 9)[0]
    rows = Rows.chains([0], [8], [1])
    moved = Rows(*(values.to("meta") for values in vars(rows).values()))
    cache, tables = filled(engine, ids[:8], 9), engine.tables(rows)
    with pytest.raises((ValueError, RuntimeError)):
        engine.run(engine.embed(ids[8:]), moved, cache, tables=tables)


@needs_compiler
def test_layers_with_norms_of_their_own() -> None:
    stack = stack_of("qwen3")
    layers: Any = stack.layers
    layers[0].input_layernorm.variance_epsilon = 0.5
    layers[1].post_attention_layernorm.variance_epsilon = 0.3
    layers[2].self_attn.q_norm.variance_epsilon = 0.2
    layers[2].self_attn.k_norm.variance_epsilon = 0.2
    for kind in KINDS:
        checked(stack, kind)
    layers[2].self_attn.k_norm.variance_epsilon = 0.1
    assert DecodingEngine(stack, "compiled").obstacle == "the norms of queries and keys differ"
    checked(stack, "fused")


@needs_compiler
@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations_that_are_compiled(name: str) -> None:
    stack = stack_of(hidden_act=name)
    for kind in KINDS:
        checked(stack, kind)
    assert engine_of(stack).description == "compiled"


@needs_compiler
@pytest.mark.parametrize("name", ["mish", "tanh", "relu2", "quick_gelu", "laplace"])
def test_other_activations_are_fused(name: str) -> None:
    stack = stack_of(hidden_act=name)
    assert DecodingEngine(stack, "compiled").obstacle == f"the activation {name} is not compiled"
    checked(stack, "fused")
    assert engine_of(stack).description.startswith("fused")


def test_activation_that_is_not_that_of_the_config() -> None:
    stack = stack_of()
    layer: Any = stack.layers[1]
    layer.mlp.act_fn = nn.Tanh()
    engine = engine_of(stack)
    assert engine.description.startswith("fused")
    assert difference_behind(engine, random_ids(1, 9)[0], 6) <= CLOSE


@needs_compiler
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_large_activations_do_not_overflow(name: str) -> None:
    model: Any = tiny_model(hidden_act=name, family="llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(1000.0)  # far beyond the range of exp in fp32
            layer.mlp.down_proj.weight.div_(1000.0)
    engine = DecodingEngine(DecoderStack(model), "compiled")
    assert engine.obstacle is None
    ids = random_ids(1, 12)[0]
    scale = float(own_states(engine.stack, ids).abs().max())
    assert difference_behind(engine, ids, 6) <= CLOSE * max(1.0, scale)


# --- Attention ------------------------------------------------------------------------------

WINDOWS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0, 1, 0]},
}


@both
@pytest.mark.parametrize("family", WINDOWS)
def test_windows_of_some_layers(family: str, kind: EngineKind) -> None:
    stack = stack_of(family, **WINDOWS[family])
    engine = checked(stack, kind, length=30)
    windows = {layer.window for layer in engine._modules}
    assert windows - {None}, "the test needs a window"
    if family.startswith("qwen"):
        assert None in windows
    lossless(EarlyExit(stack, engine=kind), random_ids(1, 20), new=20)


@both
@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize("prompt", [3, 4, 5, 6, 7, 8, 9, 20])
def test_trees_in_windows(family: str, kind: EngineKind, prompt: int) -> None:
    engine = engine_of(stack_of(family, **WINDOWS[family]), kind)
    parents = [-1, 0, 0, 2, 3, 4, 1, 5, 6, 7]
    ids = random_ids(1, prompt + len(parents))[0]
    cache = filled(engine, ids[:prompt], len(ids))
    made = states_of(engine, Rows.trees([0], [prompt], [parents]), ids[prompt:], cache)
    for row in range(len(parents)):
        path = [row]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        text = torch.cat([ids[:prompt], ids[prompt:][path]])
        assert (made[row] - own_states(engine.stack, text)[-1]).abs().max() <= CLOSE


@both
def test_windows_count_from_the_first_token_behind_padding(kind: EngineKind) -> None:
    stack = stack_of("mistral")
    early = EarlyExit(stack, engine=kind)
    ids = random_ids(3, 16)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :9] = 0, 0
    model: Any = stack.model
    expected = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=16,
    )
    for verify in (True, False):
        made = early.generate(
            ids, mask, verify=verify, do_sample=False, eos_token_id=(), max_new_tokens=16
        )
        assert torch.equal(made, expected)  # type: ignore[arg-type]


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@both
@pytest.mark.parametrize("name", SCALED)
def test_scaled_positions_beyond_the_original_length(name: str, kind: EngineKind) -> None:
    rope = SCALED[name] | {"rope_theta": 10_000.0}
    stack = stack_of(rope_parameters=rope)
    checked(stack, kind, length=50)
    made = lossless(EarlyExit(stack, engine=kind), random_ids(1, 10), new=50)
    assert made.engine is not None
    assert made.engine.startswith(kind)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_positions_that_depend_on_the_length_are_left_to_the_model(rope: dict[str, Any]) -> None:
    stack = stack_of(rope_parameters=rope | {"rope_theta": 10_000.0})
    engine = DecodingEngine(stack)
    reason = f"its rotary tables ({rope['rope_type']}) depend on the length of the text"
    assert engine.obstacle == reason


@both
def test_positions_beyond_the_first_table(kind: EngineKind) -> None:
    engine = DecodingEngine(stack_of(max_position_embeddings=1024), kind)
    for length in (250, 256, 257, 300, 520):
        ids = random_ids(1, length)[0]
        assert difference_behind(engine, ids, length - 3) <= CLOSE


@both
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_eager_attention(family: str, kind: EngineKind) -> None:
    stack = stack_of(family, attn_implementation="eager")
    assert stack.model.config._attn_implementation == "eager"
    checked(stack, kind)
    lossless(EarlyExit(stack, engine=kind), random_ids(1, 9))


@pytest.mark.parametrize("engine", ["auto", *KINDS])
def test_queries_that_are_scaled_at_late_positions_are_left_to_the_model(
    engine: EngineKind,
) -> None:
    rope = SCALED["yarn"] | {"rope_theta": 10_000.0, "llama_4_scaling_beta": 0.5}
    config = AutoConfig.for_model(
        "ministral3",
        num_hidden_layers=4,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters=rope,
    )
    stack = DecoderStack(perturbed(AutoModelForCausalLM.from_config(config)))
    obstacle = DecodingEngine(stack, engine).obstacle
    # The first of the last three positions sees nothing but itself.
    assert obstacle == "its layers compute something else at position 62"
    lossless(EarlyExit(stack), random_ids(1, 10), new=50)


def test_clipped_queries_are_left_to_the_model() -> None:
    config = AutoConfig.for_model(
        "olmo",
        num_hidden_layers=4,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=1,
        eos_token_id=1,
        clip_qkv=50.0,
    )
    engine = DecodingEngine(DecoderStack(perturbed(AutoModelForCausalLM.from_config(config))))
    assert engine.obstacle == "its queries, keys and values are clipped"


def test_tables_take_no_more_memory_than_positions_need() -> None:
    engine = DecodingEngine(stack_of(max_position_embeddings=50_000))
    assert engine.obstacle is None
    engine.tables(Rows.chains([0], [3], [1]))
    assert engine._table is not None
    assert len(engine._table[0]) == 256


# --- Threads --------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_number_of_threads_changes_rounding_only(family: str) -> None:
    engine, ids = DecodingEngine(stack_of(family), "compiled"), random_ids(1, 20)[0]
    found = []
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)  # the fixture `one_thread` resets it
        rows = Rows.trees([0], [14], [[-1, 0, 0, 2, 3, 1]])
        found.append(states_of(engine, rows, ids[14:], filled(engine, ids[:14], 20)))
    for other in found[1:]:
        assert (other - found[0]).abs().max() <= CLOSE


@both
def test_threads_share_an_engine(kind: EngineKind) -> None:
    stack = stack_of()
    texts = [random_ids(1, 20, seed=seed)[0] for seed in range(4)]
    engine = DecodingEngine(stack, kind)
    expected = [own_states(stack, text)[12:] for text in texts]
    found: dict[int, float] = {}

    def compute(number: int) -> None:
        worst = 0.0
        for _ in range(20):
            cache = filled(engine, texts[number][:12], 20)
            rows = Rows.chains([0], [12], [8])
            made = states_of(engine, rows, texts[number][12:], cache)
            worst = max(worst, float((made - expected[number]).abs().max()))
        found[number] = worst

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert max(found.values()) <= CLOSE


# --- Models that are changed or wrapped -----------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_left_to_the_model() -> None:
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    stack = DecoderStack(model)
    assert engine_of(stack).obstacle == "its projections are quantized or wrapped"
    made = lossless(EarlyExit(stack), random_ids(1, 9))
    assert made.engine == "model (its projections are quantized or wrapped)"


@needs_compiler
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_merged_adapters_are_computed() -> None:
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    checked(DecoderStack(model.merge_and_unload()), "compiled")


@both
def test_weight_that_becomes_nan_is_reported(kind: EngineKind) -> None:
    stack = stack_of()
    early = EarlyExit(stack, engine=kind)
    layer: Any = stack.layers[2]
    with torch.no_grad():
        layer.mlp.up_proj.weight[0, 0] = float("nan")
    ids = random_ids(1, 9)
    for verify in (True, False):
        with pytest.raises(ModelError) as error:
            early.generate(ids, do_sample=False, verify=verify, pass_costs=FREE)
        assert "\n" not in str(error.value)
    # A new engine says that it differs; one line again.
    obstacle = DecodingEngine(stack, kind).obstacle
    assert obstacle is not None
    assert "\n" not in obstacle


def test_model_with_a_nan_weight_is_refused() -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CascadeError) as error:
        EarlyExit(DecoderStack(model))
    assert "\n" not in str(error.value)


@both
def test_converted_model_is_computed_again(kind: EngineKind) -> None:
    stack = stack_of()
    early = EarlyExit(stack, engine="auto" if kind == "compiled" else kind)
    stack.model.to(torch.float64)
    ids = random_ids(1, 9)
    with torch.no_grad():
        expected = stack.model(ids).logits  # type: ignore[operator]
    engine = early.layers.engine
    assert engine is not None
    assert not engine.is_ready()
    assert engine_of(stack).obstacle == (
        "it supports float32, bfloat16 and float16, not torch.float64"
    )
    assert expected.dtype == torch.float64


@both
def test_changed_lm_head_is_used(kind: EngineKind) -> None:
    stack = stack_of(tie_word_embeddings=False)
    engine = DecodingEngine(stack, kind)
    ids = random_ids(1, 9)[0]
    assert difference_behind(engine, ids, 6) <= CLOSE
    head: Any = stack.lm_head
    with torch.no_grad():
        head.weight.mul_(0.5)
    assert difference_behind(engine, ids, 6) <= CLOSE
    head.weight = nn.Parameter(torch.randn_like(head.weight))
    assert difference_behind(engine, ids, 6) <= CLOSE


@both
@pytest.mark.parametrize("change", ["view", "hook", "bias"])
def test_unusual_lm_head_is_called(kind: EngineKind, change: str) -> None:
    stack = stack_of(tie_word_embeddings=False)
    engine = DecodingEngine(stack, kind)
    head: Any = stack.lm_head
    if change == "view":
        head.weight = nn.Parameter(torch.randn(head.weight.shape[::-1]).t())
        assert not head.weight.is_contiguous()
    elif change == "bias":
        head.bias = nn.Parameter(torch.randn(head.out_features))
    else:
        head.register_forward_hook(lambda _, __, output: 2 * output)
    assert difference_behind(engine, random_ids(1, 9)[0], 6) <= CLOSE


@both
def test_changed_final_norm_and_embeddings_are_used(kind: EngineKind) -> None:
    stack = stack_of(tie_word_embeddings=False)
    engine = DecodingEngine(stack, kind)
    with torch.no_grad():
        stack.direct_norm.weight.mul_(2.0)  # type: ignore[union-attr, operator]
        stack.model.get_input_embeddings().weight.mul_(2.0)  # type: ignore[operator]
    assert difference_behind(engine, random_ids(1, 9)[0], 6) <= CLOSE


def test_engine_is_freed_with_its_model() -> None:
    stack = stack_of()
    for kind in KINDS:
        engine_of(stack, kind)
    model, engine = weakref.ref(stack.model), weakref.ref(engine_of(stack))
    del stack
    gc.collect()
    assert engine() is None
    assert model() is None
