"""Lossless decoding of every family: its texts, and the stored speeds next to `generate`."""

from __future__ import annotations

from support.family_speeds import BATCHES, DTYPES, speeds_of, stored
from support.tiny_models import FAMILIES

#: Lossless decoding may never be slower than this many times the speed of `generate`.
LEAST = 0.95


def test_the_stored_speeds_cover_all_families_and_none_is_slow() -> None:
    found = stored()
    assert {(one.family, one.dtype, one.batch) for one in found} == {
        (family, str(dtype).removeprefix("torch."), str(batch))
        for family in FAMILIES
        for dtype in DTYPES
        for batch in BATCHES
    }
    assert [one for one in found if one.equal != "yes"] == []
    assert [one for one in found if float(one.speed) < LEAST] == []


def test_a_family_is_measured_and_its_texts_are_equal() -> None:
    found = list(speeds_of("llama", DTYPES[0], batches=[1, 2], rounds=2))
    assert [one.batch for one in found] == ["1", "2"]
    assert {one.equal for one in found} == {"yes"}
    assert all(float(one.low) <= float(one.speed) <= float(one.high) for one in found)
