"""Test that the stored rows match the model, sequence by sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_early_exit import (
    a_stack,
    one_line,
)
from support.tiny_hard_tokens import (
    LENGTH,
    collect,
    everything,
    some_splits,
)
from support.tiny_models import FAMILIES, tiny_model

from cascade.core.errors import (
    ModelError,
)
from cascade.corpora.blocks import TokenBlocks
from cascade.evaluation.calibration import confidences
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.plan import CollectingConfig


def own_history(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the hidden history, recorded by hooks on the layers."""
    stack = DecoderStack(model)
    kept: list[torch.Tensor] = []
    first = stack.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in stack.layers
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in (first, *hooks):
        hook.remove()
    return kept


def by_hand(model: Any, blocks: TokenBlocks, layer: int) -> dict[str, Any]:
    """Return the columns of a split, computed one sequence at a time."""
    columns: dict[str, list[Any]] = {"states": [], "similarity": [], "labels": []}
    for row in blocks.ids:
        history = own_history(model, torch.from_numpy(row[None]).long())
        columns["states"].append(history[-1][0])
        columns["similarity"].append(
            torch.cosine_similarity(history[layer - 1][0], history[layer][0], dim=-1)
        )
        columns["labels"].append(torch.tensor([*row[1:].tolist(), -100]))
    return {name: torch.stack(values) for name, values in columns.items()}


@pytest.mark.parametrize("layer", [1, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_rows_match_the_model(family: str, layer: int, tmp_path: Path) -> None:
    found = collect(tmp_path / "d", family, layer=layer)
    for split, blocks in some_splits().items():
        got, expected = everything(found, split), by_hand(tiny_model(family), blocks, layer)
        # float16 keeps 11 bits. A batch and a single row differ only by rounding.
        assert torch.allclose(got["states"], expected["states"], rtol=2**-11, atol=1e-5)
        assert torch.allclose(got["similarity"], expected["similarity"], rtol=0, atol=2e-6)
        assert torch.equal(got["labels"], expected["labels"])
        assert np.array_equal(got["input_ids"], blocks.ids)
        assert np.array_equal(got["records"], blocks.record_of)
        assert np.array_equal(got["response"], blocks.response)
        assert got["sequence"].tolist() == list(range(len(blocks.ids)))
        assert torch.equal(got["positions"], torch.arange(LENGTH).expand(len(blocks.ids), LENGTH))
        assert torch.equal(got["hard"], got["similarity"] < found.threshold)


def test_the_stored_similarity_equals_the_cosine_rule_bit_for_bit(tmp_path: Path) -> None:
    found = collect(tmp_path / "d")
    for split, blocks in some_splits().items():
        expected = confidences(a_stack("llama"), blocks, 3, "cosine", batch_size=4)
        assert np.array_equal(everything(found, split)["similarity"], expected)


def test_the_stored_states_give_the_logits_of_the_model(tmp_path: Path) -> None:
    # States behind the final norm would be normed twice.
    stack, blocks = a_stack("llama"), some_splits()["train"]
    states = everything(collect(tmp_path / "d"), "train")["states"]
    with torch.no_grad():
        expected = stack.model(torch.from_numpy(blocks.ids).long()).logits
    assert (stack.decode(states) - expected).abs().max() < 0.01 * expected.abs().max()


def test_bfloat16_states_are_rounded_once(tmp_path: Path) -> None:
    exact = everything(collect(tmp_path / "a"), "train")["states"]
    rounded = everything(collect(tmp_path / "b", dtype="bfloat16"), "train")["states"]
    assert torch.allclose(rounded, exact, rtol=2**-8, atol=0)
    assert not torch.equal(rounded, exact)


def test_the_batch_size_changes_states_only_by_rounding(tmp_path: Path) -> None:
    one, all_at_once = (collect(tmp_path / str(n), batch_size=n) for n in (1, 64))
    for split in some_splits():
        a, b = (everything(found, split) for found in (one, all_at_once))
        assert torch.allclose(a["states"], b["states"], rtol=2**-10, atol=1e-5)
        assert torch.equal(a["labels"], b["labels"])


def scaled(by: float) -> DecoderStack:
    """Return a model whose residual stream is `by` times as large."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(by)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(by)
            layer.mlp.down_proj.weight.mul_(by)
    return DecoderStack(model)


def test_states_too_large_for_float16_are_refused_and_fit_in_bfloat16(tmp_path: Path) -> None:
    config = CollectingConfig(layer=3, hard_ratio=0.5)
    with pytest.raises(ModelError) as caught:
        collect_hard(scaled(1e5), some_splits(), tmp_path / "d", config)
    assert "store them with --states-dtype bfloat16" in one_line(caught)
    assert not (tmp_path / "d").exists()
    found = collect_hard(
        scaled(1e5), some_splits(), tmp_path / "d", replace(config, dtype="bfloat16")
    )
    states = everything(found, "train")["states"]
    assert torch.isfinite(states).all()
    assert states.abs().max() > 65504


@pytest.mark.parametrize("entry", [2, 3, 4])
def test_states_that_are_not_finite_are_refused_with_their_layer(
    tmp_path: Path, entry: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit = DecoderStack.visit

    def broken(self: DecoderStack, ids: torch.Tensor, visitor: Any) -> Any:
        return visit(
            self, ids, lambda at, hidden: visitor(at, hidden * (torch.nan if at == entry else 1))
        )

    monkeypatch.setattr(DecoderStack, "visit", broken)
    with pytest.raises(ModelError) as caught:
        collect(tmp_path / "d")
    layer = 4 if entry == 4 else 3
    assert f"layer {layer} gives NaN or infinite hidden states" in one_line(caught)
    assert not (tmp_path / "d").exists()
