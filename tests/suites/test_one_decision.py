"""One exit decision: scoring, generation, calibration, evaluation and collection decide alike.

Each is asked at a real token's confidence, and at the numbers next to it in single and in double
precision. The expected answer compares exactly, in double precision.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_early_exit import a_stack, random_blocks
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.provenance import SPLITS, Split
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import EarlyExit, make_exit
from cascade.decoding.growing_text import Generation
from cascade.evaluation.calibration import confidences
from cascade.evaluation.exit_curves import curve, exits_and_wrong
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate
from cascade.evaluation.operating_points import Evaluator, OperatingPoint
from cascade.exits.rules import find_rule
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.plan import CollectingConfig
from cascade.stats.thresholds import transfer

LAYER = 3


def single(value: float, toward: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(toward)))


#: Thresholds next to a confidence, in the order of the numbers.
THRESHOLDS = {
    "one single-precision step below": lambda value: single(value, -math.inf),
    "one double-precision step below": lambda value: math.nextafter(value, -math.inf),
    "exactly at it": lambda value: value,
    "one double-precision step above": lambda value: math.nextafter(value, math.inf),
    "one single-precision step above": lambda value: single(value, math.inf),
}
everywhere = pytest.mark.parametrize("place", THRESHOLDS)


@functools.cache
def blocks() -> TokenBlocks:
    return random_blocks(8, 12)


@functools.cache
def values() -> Array:
    """Return every token's confidence, `[S, T]` fp32."""
    found = confidences(a_stack("llama"), blocks(), LAYER, "cosine", batch_size=8)
    assert found.dtype == np.float32
    return found


def threshold_at(place: str, share: float = 0.5) -> float:
    """Return a threshold next to the confidence that about a share of the tokens reaches."""
    ordered = np.sort(values(), axis=None)[::-1]
    return THRESHOLDS[place](float(ordered[int(share * ordered.size)]))


def expected(threshold: float) -> Array:
    exits: Array = values().astype(np.float64) >= threshold
    return exits


def test_the_thresholds_decide_differently() -> None:
    counts = [int(expected(threshold_at(place)).sum()) for place in THRESHOLDS]
    assert counts == [49, 49, 49, 48, 48]


@everywhere
def test_scoring_decides_exactly(place: str) -> None:
    threshold = threshold_at(place)
    early = EarlyExit(a_stack("llama"), layer=LAYER, rule="cosine", threshold=threshold)
    score = early.score(torch.from_numpy(blocks().ids).long())
    assert np.array_equal(score.exit_layers.numpy() == LAYER, expected(threshold))


@everywhere
@pytest.mark.parametrize("new", [1, 4])
def test_generation_decides_exactly(place: str, new: int) -> None:
    stack = a_stack("llama")
    seen: list[Tensor] = []
    rule = find_rule("cosine")

    def recorded(at: Any) -> Tensor:
        seen.append(rule.confidence(at))
        return seen[-1]

    def generated(row: int, threshold: float) -> Generation:
        seen.clear()
        way_out = make_exit(stack, LAYER, replace(rule, confidence=recorded), threshold)
        early = EarlyExit(stack, exits=[way_out])
        found = early.generate(
            torch.from_numpy(blocks().ids[row : row + 1]).long(),
            max_new_tokens=new,
            eos_token_id=None,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert isinstance(found, Generation)
        return found

    # Take a prompt whose last new token has the highest confidence of them: none exits before it.
    for row in range(len(blocks().ids)):
        generated(row, math.inf)
        *earlier, last = (float(one[-1]) for one in seen)
        if all(value < last for value in earlier):
            break
    else:
        raise AssertionError("no prompt has its highest confidence last")
    threshold = THRESHOLDS[place](last)
    found = generated(row, threshold)
    assert float(seen[-1][-1]) == last
    assert bool(found.exit_layers[0, -1] == LAYER) == (last >= threshold)


@everywhere
def test_a_transferred_threshold_decides_exactly(place: str) -> None:
    threshold = threshold_at(place)
    assert transfer(threshold, values()).hard_ratio == (~expected(threshold)).mean()


@everywhere
def test_an_evaluated_operating_point_decides_exactly(place: str) -> None:
    threshold = threshold_at(place)
    evaluator = Evaluator(a_stack("llama"), {LAYER: ["cosine"]})
    rows, table = evaluator.run(blocks(), [OperatingPoint(LAYER, "cosine", threshold, "given")])
    assert np.array_equal(table.confidence[LAYER, "cosine"], values())
    assert rows[0].exit_share == expected(threshold).mean()


@everywhere
def test_a_random_control_has_the_exact_share_of_its_operating_point(place: str) -> None:
    threshold = threshold_at(place, share=0.1)
    request = EvaluationConfig(
        layers=(),
        rules=(),
        hard_ratios=(),
        thresholds=(OperatingPoint(LAYER, "cosine", threshold, "it"),),
    )
    record = evaluate(a_stack("llama"), blocks(), random_blocks(4, 12), request)
    shares = [row.threshold for row in record.points if row.rule == "random"]
    assert 1 - expected(threshold).mean() in shares


@everywhere
def test_an_exit_curve_decides_exactly(place: str) -> None:
    threshold = threshold_at(place)
    wrong = np.zeros(values().shape, dtype=bool)
    count = int(expected(threshold).sum())
    assert exits_and_wrong(values(), wrong, threshold) == (count, count)
    # Sequences that are all the same have an interval without width: the share that stays.
    number = int(np.argmax(expected(threshold).sum(axis=1) > 0))
    same = np.tile(values()[number], (4, 1))
    found = curve(LAYER, "cosine", (same, same > 2), (same, same > 2), [threshold])
    place_of = found.thresholds.index(threshold)
    stays = (~expected(threshold)[number]).mean()
    assert found.low[place_of] == found.high[place_of] == pytest.approx(stays, abs=1e-6)


@everywhere
def test_hard_tokens_are_collected_exactly(place: str, tmp_path: Path) -> None:
    threshold = threshold_at(place)
    splits: dict[Split, TokenBlocks] = {
        split: replace(
            blocks(),
            record_of=np.ones(blocks().ids.shape, dtype=np.int32),
            response=np.ones(blocks().ids.shape, dtype=bool),
            record_split=split,
        )
        for split in SPLITS
    }
    config = CollectingConfig(layer=LAYER, threshold=threshold, batch_size=8)
    found = collect_hard(a_stack("llama"), splits, tmp_path / "d", config)
    assert found.record.splits["train"].hard == (~expected(threshold)).sum()
    hard = torch.cat([batch["hard"] for batch in found.batches("train", 8)])
    assert np.array_equal(hard.numpy(), ~expected(threshold))
