"""Exact codes of weights give the same weights, to the bit, and the same texts."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import needs_compiler
from support.tiny_models import random_ids, tiny_model
from torch import Tensor, nn

from cascade import EarlyExit
from cascade.decoding.engine.codes import Codes, codes_of
from cascade.decoding.engine.compiled_layers import CompiledLayers
from cascade.decoding.engine.compiler import compiled_library
from cascade.decoding.engine.engine import DecodingEngine, engine_of
from cascade.decoding.engine.modules import LayerModules
from cascade.models.stack import DecoderStack

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.bfloat16)


def quantized(weight: Tensor, kind: str) -> Tensor:
    """Return weights that went through a format of GGUF files, whose scales are in fp16."""
    blocks = weight.float().reshape(-1, 32)
    if kind == "Q4_1":
        low = blocks.amin(1, keepdim=True)
        scale = (blocks.amax(1, keepdim=True) - low) / 15
        codes = ((blocks - low) / scale.clamp_min(1e-30)).round().clamp(0, 15)
        made = codes * scale.half().float() + low.half().float()
    elif kind == "Q4_0":
        most = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = most / -8
        codes = (blocks / torch.where(scale == 0, 1, scale) + 8).round().clamp(0, 15)
        made = (codes - 8) * scale.half().float()
    else:
        scale = blocks.abs().amax(1, keepdim=True) / 127
        codes = (blocks / scale.clamp_min(1e-30)).round()
        made = codes * scale.half().float()
    return made.reshape(weight.shape).to(weight.dtype)


def found_codes(weight: Tensor) -> Codes | None:
    name = "fp32" if weight.dtype == torch.float32 else "bf16"
    return codes_of(compiled_library(name), weight.contiguous())


@functools.cache
def some_layers(dtype: torch.dtype) -> tuple[LayerModules, ...]:
    model = copy.deepcopy(tiny_model("llama")).to(dtype)
    return tuple(LayerModules.of(layer, model.config) for layer in model.model.layers[:1])


class Product:
    """Computes products with a weight by the compiled layers, with or without codes."""

    def __init__(self, weight: Tensor, *, coded: bool) -> None:
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.head.weight = nn.Parameter(weight, requires_grad=False)
        self.layers = CompiledLayers(some_layers(weight.dtype), [self.head] if coded else [])
        assert (self.layers.copied_bytes > 0) == coded

    def __call__(self, rows: Tensor) -> Tensor:
        return self.layers.linear(self.head, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 9999),
    blocks=st.integers(1, 5),
    outputs=st.integers(1, 12),
    scale=st.sampled_from([1e-3, 0.05, 1.0, 30.0]),
)
def test_weights_of_quantized_files_have_exact_codes(
    kind: str, bits: int, dtype: torch.dtype, seed: int, blocks: int, outputs: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, 32 * blocks, generator=generator) * scale
    weight = quantized(weight, kind).to(dtype)
    codes = found_codes(weight)
    assert codes is not None
    assert codes.bits in (4, bits)  # few weights of 8 bits may also be some of 4
    # One input of 1 and otherwise 0 reads a weight.
    product = Product(weight, coded=True)
    for rows in torch.eye(32 * blocks, dtype=dtype).split(1 + seed % 9):
        assert product(rows).equal(rows @ weight.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize("inputs", [32, 96, 576, 1536])
def test_products_are_those_of_the_weights(kind: str, dtype: torch.dtype, inputs: int) -> None:
    torch.manual_seed(inputs)
    weight = quantized(torch.randn(37, inputs, dtype=dtype), kind)
    coded, plainly = Product(weight, coded=True), Product(weight, coded=False)
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16, 32):
        rows = torch.randn(count, inputs, dtype=dtype)
        made, plain = coded(rows), plainly(rows)
        if dtype == torch.bfloat16:
            assert made.equal(plain), count
        else:
            torch.testing.assert_close(made, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_weights_have_no_codes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert found_codes(torch.randn(40, 64).to(dtype)) is None
    assert found_codes(quantized(torch.randn(40, 48 * 2), "Q4_1")[:, :48].to(dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [0.37, float("nan"), float("inf")])
def test_a_row_with_another_weight_is_read_as_it_is(dtype: torch.dtype, change: float) -> None:
    torch.manual_seed(1)
    weight = quantized(torch.randn(40, 64), "Q4_1").to(dtype)
    weight[17, 5] = change if change != 0.37 else weight[17, 5] * 1.37
    codes = found_codes(weight)
    assert codes is not None
    assert codes.coded.tolist() == [row != 17 for row in range(40)]
    rows = torch.randn(3, 64).to(dtype)
    made, plain = (Product(weight, coded=coded)(rows) for coded in (True, False))
    torch.testing.assert_close(made, plain, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormal_weights_have_no_codes(dtype: torch.dtype) -> None:
    """Some instructions take them for 0."""
    weight = torch.full((8, 64), 1.0)
    weight[3, 7] = 1e-39
    codes = found_codes(weight.to(dtype))
    assert codes is None or codes.coded.tolist() == [row != 3 for row in range(8)]
    weight[3, 7] = 0.0
    assert found_codes(weight.to(dtype)) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.5, -0.0123])
def test_constant_weights_have_codes(dtype: torch.dtype, value: float) -> None:
    assert found_codes(torch.full((8, 64), value, dtype=dtype)) is not None


def a_coded_stack(family: str, dtype: torch.dtype) -> DecoderStack:
    """Return a tiny model whose projections have codes."""
    model: Any = copy.deepcopy(tiny_model(family, hidden_size=64, intermediate_size=96)).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            kind = "Q8_0" if module is model.lm_head else "Q4_1"
            module.weight.data = quantized(module.weight.data, kind)
    return DecoderStack(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_model_with_codes_gives_its_own_text(family: str, dtype: torch.dtype) -> None:
    stack = a_coded_stack(family, dtype)
    engine = engine_of(stack)
    if engine.obstacle is None and engine.description.startswith("compiled"):
        assert engine.description == "compiled, 4- and 8-bit codes"
        assert engine.copied_bytes > 0
    ids = random_ids(1, 9)
    made: Any = EarlyExit(stack).generate(ids, max_new_tokens=24, verify=True)
    model: Any = stack.model
    own = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    assert made.equal(own)


@pytest.mark.parametrize("place", ["layer", "head"])
def test_weights_that_change_in_place_are_noticed(place: str) -> None:
    stack = a_coded_stack("llama", torch.float32)
    engine = DecodingEngine(stack, "compiled")
    assert engine.is_ready()
    layer: Any = stack.layers[1]
    head: Any = stack.lm_head
    with torch.no_grad():
        (layer.mlp.up_proj if place == "layer" else head).weight.mul_(2)
    assert not engine.is_ready()
    assert engine_of(stack, "compiled").is_ready()
