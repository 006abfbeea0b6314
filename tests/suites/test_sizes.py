"""The whole way, from configuration alone: SmolLM2-360M and 1.7B in their true depth, narrow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import VOCABULARY, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from cascade import (
    Cascade,
    CollectingConfig,
    DecoderStack,
    Entry,
    TrainingConfig,
    analyze,
    collect_hard,
    load,
    load_blocks,
    train_stage,
)
from cascade.stages.evaluation import evaluate_cascade

#: Layers, heads, heads of keys and values: HuggingFaceTB/SmolLM2-360M and SmolLM2-1.7B. The heads
#: are as many as theirs, and narrower.
SHAPES = {"SmolLM2-360M": (32, 15, 5), "SmolLM2-1.7B": (24, 32, 32)}


@pytest.fixture(params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    layers, heads, key_value_heads = SHAPES[request.param]
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        hidden_size=4 * heads,
        intermediate_size=8 * heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    folder = tmp_path / request.param
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_measuring_training_and_evaluating_need_no_more_than_the_configuration(
    checkpoint: Path, tmp_path: Path
) -> None:
    stack = load(str(checkpoint))
    depth = SHAPES[checkpoint.name][0]
    splits = {
        split: load_blocks(
            "embedded", stack.tokenizer, seq_len=32, max_tokens=size, record_split=split, marks=True
        )
        for split, size in (("train", 1280), ("held-out", 640))
    }
    profile = analyze(stack, splits["held-out"])
    assert len(profile.record().layers) == depth + 1  # and the normed row
    tokens = collect_hard(
        stack, splits, tmp_path / "hard", CollectingConfig(layer=depth - 1, hard_ratio=0.5)
    )
    training = train_stage(
        stack, tokens, TrainingConfig(epochs=1, learning_rate=1e-3), tmp_path / "checkpoints"
    )
    assert training.chosen.step > 0
    cascade = Cascade(stack)
    cascade.add_stage(training.stage, Entry(tokens.layer, tokens.threshold))
    cascade.save_pretrained(tmp_path / "cascade")
    read = Cascade.from_pretrained(tmp_path / "cascade")
    assert isinstance(read.base, DecoderStack)
    assert read.stack.num_layers == depth + 2
    record = evaluate_cascade(read, splits["held-out"])
    assert record.rows[1].scopes["all"].ratio < 1
