"""Tests of the statistics of the residual stream over depth."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_models import random_ids, tiny_model

from cascade.core.schema import to_plain
from cascade.models.stack import DecoderStack
from cascade.models.sublayers import Update
from cascade.studies.explanations.residual_stream import (
    StreamStatistics,
    angle,
    attention_weights,
    massive,
)


def test_massive_activations_exceed_both_bounds() -> None:
    hidden = torch.full((1, 4, 8), 0.15)
    hidden[0, 0, 3] = -160.0  # above 100 and above 1,000 x the median of 0.15
    hidden[0, 1, 2] = 140.0  # above 100, but not above 150
    assert massive(hidden).nonzero().tolist() == [[0, 0, 3]]
    small = torch.full((1, 4, 8), 0.001)
    small[0, 0, 0] = 99.0
    assert not massive(small).any()


def test_angles_are_in_degrees() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert float(angle(a, b)) == pytest.approx(45.0, abs=1e-3)
    assert float(angle(a, -a)) == pytest.approx(180.0, abs=1e-3)


def an_update() -> Update:
    hidden = torch.zeros(1, 3, 4)
    hidden[..., 0] = 2.0
    attention, mlp = torch.zeros_like(hidden), torch.zeros_like(hidden)
    attention[..., 1] = 2.0
    mlp[..., 0] = 1.0
    return Update(hidden, attention, mlp)


def test_shares_of_the_angle_add_up_to_one_and_may_be_negative() -> None:
    stream = StreamStatistics()
    stream.add_layer(1, an_update(), None, torch.zeros(1, 3, dtype=torch.bool))
    (row,) = stream.layer_rows()
    assert row.attention_ratio == pytest.approx(1.0)
    assert row.mlp_ratio == pytest.approx(0.5)
    assert row.attention_angle == pytest.approx(90.0, abs=1e-3)
    assert row.mlp_angle == pytest.approx(0.0, abs=0.1)
    turn = math.degrees(math.atan2(2, 3))
    assert row.angle == pytest.approx(turn, abs=1e-3)
    # The MLP alone does not turn the stream. It reduces the attention's 45 degrees to `turn`.
    assert row.attention_share == pytest.approx((turn + 45) / 2 / turn, abs=1e-4)
    assert row.mlp_share == pytest.approx((turn - 45) / 2 / turn, abs=1e-4)
    assert row.attention_share + row.mlp_share == pytest.approx(1.0)
    assert row.heads is None
    assert "first_token_attention" not in to_plain(row)


def test_the_first_token_does_not_count_as_a_delimiter() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [0.5, 0.2, 0.3]])[None, None]
    delimiters = torch.tensor([[True, True, False]])
    stream = StreamStatistics()
    stream.add_layer(1, an_update(), weights, delimiters)
    (row,) = stream.layer_rows()
    assert row.first_token_attention == pytest.approx(0.6)
    assert row.delimiter_attention == pytest.approx(0.25)
    assert row.heads == pytest.approx([0.6])


def test_massive_activations_are_counted_by_dimension_and_token() -> None:
    hidden = torch.full((2, 3, 4), 0.1)
    hidden[:, 0, 1] = 500.0
    hidden[1, 2, 1] = -700.0
    stream = StreamStatistics()
    stream.add_entry(5, hidden, torch.tensor([[7, 8, 9], [7, 8, 9]]))
    (row,) = stream.entry_rows({7: "A"})
    assert row.entry == 5
    assert row.largest == pytest.approx(700.0)
    assert to_plain(row.massive) == [
        {
            "dimension": 1,
            "activations": 3,
            "at_first_token": 2,
            "largest": pytest.approx(700.0),
            "tokens": [{"text": "A", "count": 2}, {"text": "9", "count": 1}],
        }
    ]


def test_attention_weights_equal_those_of_the_model() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    stack = DecoderStack(model)
    ids = random_ids()
    plan = stack.plan(ids)
    with attention_weights(stack.layers[0]) as found:
        stack.step(1, plan.embedded, plan.calls[0])
    expected = model(ids, output_attentions=True).attentions[0]
    torch.testing.assert_close(found[0], expected)
    stack.step(1, plan.embedded, plan.calls[0])
    assert len(found) == 1, "nothing is collected afterwards"
