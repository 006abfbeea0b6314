"""Values found in another array, against a search one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cascade.stats.matching import places_in

numbers = st.lists(st.integers(0, 12), max_size=12)


@given(numbers, numbers)
def test_values_are_found_at_their_first_place(values: list[int], among: list[int]) -> None:
    mine, theirs = places_in(np.array(values, np.uint64), np.array(among, np.uint64))
    expected = [place for place, value in enumerate(values) if value in among]
    assert mine.tolist() == expected
    assert theirs.tolist() == [among.index(values[place]) for place in expected]
