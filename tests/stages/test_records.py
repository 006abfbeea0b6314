"""Test the records of stages."""

from __future__ import annotations

import json
import math

import msgspec
import pytest

from cascade.core.records import to_json
from cascade.core.schema import UNSET, from_plain, to_plain
from cascade.stages.records import (
    HeldOutEvaluation,
)


def test_the_worst_ratio_is_the_larger_one_of_all_and_response_text() -> None:
    one = HeldOutEvaluation(step=1, all=0.7, hard=0.5, response=1.1, hard_response=0.9)
    assert one.worst == 1.1
    assert msgspec.structs.replace(one, all=1.2).worst == 1.2
    assert msgspec.structs.replace(one, response=UNSET).worst == 0.7


def test_an_evaluation_beyond_numbers_keeps_its_nats() -> None:
    one = HeldOutEvaluation.of(3, {"all": 1234.4, "response": -1234.4})
    assert (one.all, one.response, one.hard) == (None, None, UNSET)
    assert one.worst == math.inf
    assert one.words("all") == "+1,234 nats per token"
    assert from_plain(json.loads(to_json(to_plain(one))), HeldOutEvaluation) == one
    assert HeldOutEvaluation.of(3, {"all": -1234.4}).worst == 0.0
    small = HeldOutEvaluation.of(3, {"all": math.log(0.7)})
    assert small.all == pytest.approx(0.7)
    assert small.words("all") == "0.7000 x"
    earlier = from_plain({"step": 3, "all": 0.7}, HeldOutEvaluation)
    assert (earlier.worst, earlier.words("all")) == (0.7, "0.7000 x")
