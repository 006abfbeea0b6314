"""Tests of the remaining angle of a layer after removing a cause."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_models import FAMILIES, random_ids, tiny_model

from cascade.models.stack import DecoderStack
from cascade.models.sublayers import Update, find_sublayers, split_update
from cascade.stats.cosine import cosine, norm
from cascade.studies.explanations.causes import (
    MeasuredUpdate,
    angles_with_neighbour_traits,
    angles_without,
    hide_tokens,
    learn_traits,
    measure_update,
)
from cascade.studies.explanations.residual_stream import angle


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hidden_token_is_read_only_by_itself(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    stack = DecoderStack(model)
    ids = random_ids()
    plan = stack.plan(ids)
    columns = torch.zeros_like(ids, dtype=torch.bool)
    columns[:, 2] = True
    call = hide_tokens(plan.calls[0], columns)
    assert call is not None
    other = plan.embedded.clone()
    other[:, 2] += torch.randn(other.shape[-1], generator=torch.Generator().manual_seed(0))
    outputs = [stack.step(1, hidden, call) for hidden in (plan.embedded, other)]
    changed = (outputs[0] != outputs[1]).any(dim=-1).any(dim=0)
    assert changed.tolist() == [position == 2 for position in range(ids.shape[1])]
    plain = [stack.step(1, hidden, plan.calls[0]) for hidden in (plan.embedded, other)]
    assert (plain[0][:, 3:] != plain[1][:, 3:]).any(), "without the mask, later tokens must read it"


def test_a_call_without_a_mask_cannot_be_changed() -> None:
    stack = DecoderStack(tiny_model("llama"))  # SDPA has no mask without padding
    call = stack.plan(random_ids()).calls[0]
    assert hide_tokens(call, torch.ones(2, 12, dtype=torch.bool)) is None


def an_update(seed: int = 0, *, tokens: int = 64) -> Update:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn((3, 2, tokens, 16), generator=generator)
    return Update(3 * parts[0], parts[1], parts[2])


def test_traits_contain_the_common_update_and_the_dimensions() -> None:
    update = an_update()
    update.attention[..., 5] += 20.0
    traits = learn_traits([update])
    assert traits.dimensions == (5,)
    assert traits.dimensions_for_half == 1
    assert traits.energy[0] > 0.9
    assert traits.common_share > 0.9
    assert int(traits.common.argmax()) == 5
    assert traits.massive == ()
    diffuse = learn_traits([an_update()])
    assert diffuse.dimensions == ()
    assert diffuse.dimensions_for_half > 5
    assert diffuse.common_share < 0.1


def test_traits_exclude_first_tokens() -> None:
    update = an_update()
    update.attention[:, 0] += 1e4
    plain = learn_traits([an_update()])
    found = learn_traits([update])
    torch.testing.assert_close(found.common, plain.common)
    assert found.update_size == plain.update_size


def test_each_removal_removes_only_its_cause() -> None:
    update = an_update()
    update.attention[..., 5] += 20.0
    own = learn_traits([update])
    stack = DecoderStack(tiny_model("llama"))
    plan = stack.plan(random_ids())
    sublayers = find_sublayers(stack, 1)
    _, real = split_update(stack, sublayers, 1, plan.embedded, plan.calls[0])
    assert not measure_update(stack, 1, real, plan.calls[0], None).outputs_hidden, (
        "SDPA has no mask"
    )
    other = an_update(2)
    other.attention[..., 5] -= 30.0
    of = learn_traits([other])
    assert of.dimensions == (5,)
    found = angles_without(MeasuredUpdate(update, {}), own, of)
    start, end = update.hidden, update.hidden + update.whole
    keep = [dim for dim in range(16) if dim != 5]
    for name, pair in {
        "nothing": (start, end),
        "attention": (start, start + update.mlp),
        "mlp": (start, start + update.attention),
        "common": (start, end - own.common),
        "dimensions": (start[..., keep], end[..., keep]),
    }.items():
        torch.testing.assert_close(found[name], (angle(*pair), cosine(*pair)))
    assert "massive" not in found
    assert "first_token" not in found


def test_replaced_traits_equal_those_of_the_neighbour() -> None:
    update, other = an_update(0), an_update(1)
    own, of = learn_traits([update]), learn_traits([other])
    # For one token, compute an update of the layer's size at the neighbour's angle.
    size = float(norm(update.whole)[0, 3] / norm(update.hidden)[0, 3])
    along, across = 1 + size * of.update_cosine, size * math.sqrt(1 - of.update_cosine**2)
    found = angles_with_neighbour_traits(update, own, of)["update_direction"]
    assert float(found[0][0, 3]) == pytest.approx(math.degrees(math.atan2(across, along)), rel=1e-4)
    alike = angles_with_neighbour_traits(update, own, own)
    for name in ("update_size", "stream_size"):
        torch.testing.assert_close(
            alike[name][0], angle(update.hidden, update.hidden + update.whole)
        )
