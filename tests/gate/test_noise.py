"""The noise floor: each variant has its settings, and the model is not changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.reference_early_exit import random_blocks
from support.tiny_models import tiny_model

from cascade.gate import noise
from cascade.gate.noise import measure_noise
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import similarities

IDS = random_blocks(4, 16).ids


# The grouped products of experts have no float64.
@pytest.mark.parametrize("family", ["llama", "mixtral", "lfm2"])
def test_the_fp32_noise_floor_is_near_fp32_precision_and_lists_its_variants(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    found = measure_noise(stack, IDS)
    assert set(found.variants) == {"batch_size", "threads", "attention", "float64"}
    assert found.sequences == 4
    # Means of 16 similarities, each accurate to about 1e-7.
    assert 0 < found.repeat < 1e-6
    assert found.exact is not None
    assert 0 < found.exact < 1e-6
    assert found.repeat == max(value for name, value in found.variants.items() if name != "float64")


def test_the_bf16_noise_floor_is_near_bf16_precision() -> None:
    found = measure_noise(DecoderStack(tiny_model("llama").to(torch.bfloat16)), IDS)
    assert found.exact is not None
    assert 1e-5 < found.exact < 1e-1
    assert found.repeat <= found.exact * 3


def test_each_variant_runs_with_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = DecoderStack(tiny_model("llama"))
    seen: list[tuple[Any, ...]] = []

    def watched(other: DecoderStack, ids: torch.Tensor) -> torch.Tensor:
        config: Any = other.model.config
        seen.append(
            (len(ids), torch.get_num_threads(), config._attn_implementation, str(other.dtype))
        )
        return similarities(other, ids)

    monkeypatch.setattr(noise, "similarities", watched)
    torch.set_num_threads(2)
    measure_noise(stack, IDS)
    assert seen == [
        (4, 2, "sdpa", "torch.float32"),
        *[(1, 2, "sdpa", "torch.float32")] * 4,
        (4, 1, "sdpa", "torch.float32"),
        (4, 2, "eager", "torch.float32"),
        (2, 2, "sdpa", "torch.float64"),
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_measuring_noise_does_not_change_the_model(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    ids = torch.from_numpy(IDS).long()
    before, threads = similarities(stack, ids), torch.get_num_threads()
    attention = stack.model.config._attn_implementation
    measure_noise(stack, IDS)
    assert torch.equal(similarities(stack, ids), before)
    assert stack.model.config._attn_implementation == attention
    assert stack.dtype == torch.float32
    assert torch.get_num_threads() == threads


def test_an_unavailable_variant_is_recorded_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = DecoderStack(tiny_model("llama"))
    monkeypatch.setattr(noise, "MOST_BYTES", 0)

    def refuse(implementation: str) -> None:
        if implementation == "eager":
            raise ValueError("no such attention")

    monkeypatch.setattr(stack.model, "set_attn_implementation", refuse)
    found = measure_noise(stack, IDS)
    assert found.exact is None
    assert "would take" in str(found.variants["float64"])
    assert "no eager attention" in str(found.variants["attention"])
    assert found.repeat == max(found.variants["batch_size"], found.variants["threads"])
