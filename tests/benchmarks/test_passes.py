"""Test that the reference passes do the expected work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_models import random_ids, tiny_model

from cascade.benchmarks.passes import (
    angular_distances,
    bare_forward,
    generate_plainly,
    seed_means,
)
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import EarlyExit
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import analyze


def blocks_of(batch: int, length: int) -> TokenBlocks:
    ids = random_ids(batch, length).numpy().astype(np.int32)
    return TokenBlocks(ids, "random", "random", batch)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_original_studys_pass_and_analyze_give_the_same_layer_means(family: str):
    stack = DecoderStack(tiny_model(family))
    blocks = blocks_of(5, 12)
    profile = analyze(stack, blocks, batch_size=2)
    means = dict(zip(profile.statistics.layers, profile.statistics.mean(), strict=True))
    del means["4"]  # hidden_states[-1] is behind the final norm, so the original study has no row 4
    assert list(means) == ["1", "2", "3", "4+norm"]
    # 1e-5 allows for fp32 rounding of a normalized product and of a quotient, at width 32.
    assert seed_means(stack, blocks, 2) == pytest.approx([*means.values()], abs=1e-5)


def test_angular_distances_match_the_angles_at_the_last_token():
    stack = DecoderStack(tiny_model("llama"))
    blocks = blocks_of(5, 12)
    with torch.no_grad():
        states = stack.model(
            torch.from_numpy(blocks.ids.astype(np.int64)), output_hidden_states=True
        ).hidden_states
    vectors = np.stack([state[:, -1].double().numpy() for state in states])
    units = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected = (np.arccos((units[:-1] * units[1:]).sum(-1)) / np.pi).mean(axis=1)
    # 1e-5 allows for computing the cosine in fp32 instead of float64.
    assert angular_distances(stack, blocks, 2) == pytest.approx(expected, abs=1e-5)


def test_the_bare_pass_runs_all_layers_on_all_tokens_without_the_head():
    stack = DecoderStack(tiny_model("llama"))
    seen: list[int] = []
    heads: list[int] = []
    stack.layers[-1].register_forward_hook(lambda _, args, out: seen.append(out.shape[0]))
    stack.model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    bare_forward(stack, blocks_of(5, 12), 2)
    assert (seen, heads) == ([2, 2, 1], [])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generate_plainly_makes_an_exact_number_of_tokens_equal_to_ours(family: str) -> None:
    stack, ids = DecoderStack(tiny_model(family)), random_ids(1, 8)
    ours = EarlyExit(stack).generate(ids, max_new_tokens=20, eos_token_id=())
    # The model's own penalties and beams are turned off.
    stack.model.generation_config.update(
        repetition_penalty=1.9, num_beams=2, suppress_tokens=[0], do_sample=True, stop_strings=["a"]
    )
    plain = generate_plainly(stack, ids, 20)
    assert plain.shape == (1, 28)
    assert torch.equal(plain[:, :8], ids)
    assert isinstance(ours, torch.Tensor)
    assert torch.equal(ours, plain)


def test_generate_plainly_continues_after_eos() -> None:
    stack, ids = DecoderStack(tiny_model("llama")), random_ids(1, 8)
    first = int(generate_plainly(stack, ids, 1)[0, -1])
    stack.model.generation_config.eos_token_id = first
    assert generate_plainly(stack, ids, 6).shape == (1, 14)
