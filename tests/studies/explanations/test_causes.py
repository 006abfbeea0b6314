"""What is taken away is away, and nothing else is."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_models import FAMILIES, random_ids, tiny_model

from cascade.models.stack import DecoderStack
from cascade.models.sublayers import Update, find_parts, split
from cascade.stats.cosine import cosine, norm
from cascade.studies.explanations.causes import (
    Measured,
    Pilot,
    angles_alike,
    angles_without,
    blocked,
    measure,
)
from cascade.studies.explanations.residual_stream import angle


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_hidden_is_read_by_nobody_but_itself(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    stack = DecoderStack(model)
    ids = random_ids()
    plan = stack.plan(ids)
    columns = torch.zeros_like(ids, dtype=torch.bool)
    columns[:, 2] = True
    call = blocked(plan.calls[0], columns)
    assert call is not None
    other = plan.embedded.clone()
    other[:, 2] += torch.randn(other.shape[-1], generator=torch.Generator().manual_seed(0))
    outputs = [stack.step(1, hidden, call) for hidden in (plan.embedded, other)]
    changed = (outputs[0] != outputs[1]).any(dim=-1).any(dim=0)
    assert changed.tolist() == [place == 2 for place in range(ids.shape[1])]
    plain = [stack.step(1, hidden, plan.calls[0]) for hidden in (plan.embedded, other)]
    assert (plain[0][:, 3:] != plain[1][:, 3:]).any(), "it would be read otherwise"


def test_a_call_without_a_mask_cannot_be_changed() -> None:
    stack = DecoderStack(tiny_model("llama"))  # SDPA: no mask where nothing is padded
    call = stack.plan(random_ids()).calls[0]
    assert blocked(call, torch.ones(2, 12, dtype=torch.bool)) is None


def an_update(seed: int = 0, *, tokens: int = 64) -> Update:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn((3, 2, tokens, 16), generator=generator)
    return Update(3 * parts[0], parts[1], parts[2])


def test_a_pilot_finds_the_common_part_and_the_dimensions() -> None:
    update = an_update()
    update.attention[..., 5] += 20.0
    pilot = Pilot.of([update])
    assert pilot.dimensions == (5,)
    assert pilot.needed == 1
    assert pilot.energy[0] > 0.9
    assert pilot.common_share > 0.9
    assert int(pilot.common.argmax()) == 5
    assert pilot.massive == ()
    diffuse = Pilot.of([an_update()])
    assert diffuse.dimensions == ()
    assert diffuse.needed > 5
    assert diffuse.common_share < 0.1


def test_a_pilot_does_not_learn_from_first_tokens() -> None:
    update = an_update()
    update.attention[:, 0] += 1e4
    plain = Pilot.of([an_update()])
    found = Pilot.of([update])
    torch.testing.assert_close(found.common, plain.common)
    assert found.size == plain.size


def test_each_removal_takes_away_what_it_says() -> None:
    update = an_update()
    update.attention[..., 5] += 20.0
    own = Pilot.of([update])
    stack = DecoderStack(tiny_model("llama"))
    plan = stack.plan(random_ids())
    parts = find_parts(stack, 1)
    _, real = split(stack, parts, 1, plan.embedded, plan.calls[0])
    assert not measure(stack, parts, 1, real, plan.calls[0], None).hidden_away, "SDPA: no mask"
    other = an_update(2)
    other.attention[..., 5] -= 30.0
    of = Pilot.of([other])
    assert of.dimensions == (5,)
    found = angles_without(Measured(update, {}), own, of)
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


def test_a_trait_made_the_neighbours_is_the_neighbours() -> None:
    update, other = an_update(0), an_update(1)
    own, of = Pilot.of([update]), Pilot.of([other])
    # An update of the layer's size at the neighbour's own angle, by hand for one token.
    size = float(norm(update.whole)[0, 3] / norm(update.hidden)[0, 3])
    along, across = 1 + size * of.cosine, size * math.sqrt(1 - of.cosine**2)
    found = angles_alike(update, own, of)["update_direction"]
    assert float(found[0][0, 3]) == pytest.approx(math.degrees(math.atan2(across, along)), rel=1e-4)
    alike = angles_alike(update, own, own)
    for name in ("update_size", "stream_size"):
        torch.testing.assert_close(
            alike[name][0], angle(update.hidden, update.hidden + update.whole)
        )
