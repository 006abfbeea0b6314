"""Tests of the ablations of a layer: outputs and perplexities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import planted_causes as planted

from cascade.models.sublayers import find_sublayers, split_update
from cascade.studies.explanations.ablations import ablated_outputs
from cascade.studies.explanations.causes import MeasuredUpdate, learn_traits
from cascade.studies.explanations.layer_explanation import explain


def test_perplexities_equal_those_of_the_model() -> None:
    stack = planted.quiet_stack()
    corpus = planted.blocks(8)
    record = explain(stack, corpus, 3, contrast=2)
    first = record.settings.pilot_sequences
    ids = torch.from_numpy(corpus.ids[first:].astype(np.int64))

    def perplexity() -> float:
        with torch.no_grad():
            return float(torch.exp(stack.model(ids, labels=ids).loss))

    rows = {row.ablation: row for row in record.ablations if row.layer == "3"}
    assert rows["layer_skipped"].full_perplexity == pytest.approx(perplexity(), rel=1e-4)
    layer: Any = stack.layers[2]
    for name, modules in (
        ("attention_skipped", [layer.self_attn.o_proj]),
        ("mlp_skipped", [layer.mlp.down_proj]),
        ("layer_skipped", [layer.self_attn.o_proj, layer.mlp.down_proj]),
    ):
        handles = [
            module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
            for module in modules
        ]
        expected = perplexity()
        for handle in handles:
            handle.remove()
        assert rows[name].perplexity == pytest.approx(expected, rel=1e-4), name
        assert rows[name].perplexity_ratio == pytest.approx(
            rows[name].perplexity / rows[name].full_perplexity
        )
    halved = layer.register_forward_hook(lambda _, args, output: (args[0] + output) / 2)
    expected = perplexity()
    halved.remove()
    assert rows["update_halved"].perplexity == pytest.approx(expected, rel=1e-4)


def test_the_common_update_is_removed_from_every_token_except_the_first() -> None:
    stack = planted.quiet_stack()
    ids = torch.from_numpy(planted.blocks(4).ids.astype(np.int64))
    plan = stack.plan(ids)
    sublayers = find_sublayers(stack, 1)
    _, update = split_update(stack, sublayers, 1, plan.embedded, plan.calls[0])
    traits, measured = learn_traits([update]), MeasuredUpdate(update, {})
    found = dict(ablated_outputs(stack, sublayers, 1, measured, traits, plan.calls[0]))
    whole = update.hidden + update.whole
    torch.testing.assert_close(found["common_left_out"][:, 1:], whole[:, 1:] - traits.common)
    torch.testing.assert_close(found["common_left_out"][:, 0], whole[:, 0])
    torch.testing.assert_close(found["layer_skipped"], update.hidden)
