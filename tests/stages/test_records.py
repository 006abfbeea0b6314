"""Test the records of stages."""

from __future__ import annotations

import msgspec

from cascade.core.schema import UNSET
from cascade.stages.records import (
    HeldOutEvaluation,
)


def test_the_worst_ratio_is_the_larger_one_of_all_and_response_text() -> None:
    one = HeldOutEvaluation(step=1, all=0.7, hard=0.5, response=1.1, hard_response=0.9)
    assert one.worst == 1.1
    assert msgspec.structs.replace(one, all=1.2).worst == 1.2
    assert msgspec.structs.replace(one, response=UNSET).worst == 0.7
