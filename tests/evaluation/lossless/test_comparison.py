"""Which saves more at the wanted quality, on constructed figures and on tiny models."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.lossless import a_decoding_row, drafts, plain_figures, some_figures
from support.reference_early_exit import a_settled_stack, one_line
from support.reference_points import blocks_of, settled_heads

from cascade.core.errors import CorpusError, ModelError
from cascade.core.records import read_typed, write_record
from cascade.core.schema import UNSET, from_plain, known, to_plain
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate, split
from cascade.evaluation.lossless.comparison import (
    compare_with_lossless,
    exits_of,
    judge_lossless,
)
from cascade.evaluation.lossless.decoding import LosslessConfig
from cascade.evaluation.lossless.records import LosslessVerdict
from cascade.evaluation.operating_points import OperatingPoint
from cascade.evaluation.records import EvaluationRecord, OperatingPointRow, WantedQuality

FIT, CONFIRM = split(blocks_of(8, seed=1))

#: An operating point of constructed evaluations.
POINT = OperatingPointRow(
    exit_layer=24,
    rule="cosine",
    head="ridge",
    threshold=0.9617,
    threshold_from="given",
    exit_share=0.3,
    agreement=0.97,
    agreement_interval=[0.96, 0.98],
    exit_agreement=0.9,
    perplexity=40.0,
    perplexity_ratio=1.02,
    perplexity_ratio_interval=[1.01, 1.03],
    hard_perplexity_ratio=1.01,
    kl=0.1,
    layers_per_token=28.0,
    flops_ratio=0.96,
    seconds_ratio=0.97,
    seconds_ratio_interval=[0.96, 0.98],
)


def exits(ratio: float, **changes: Any) -> dict[str, Any]:
    return a_decoding_row("exits", ratio, equal=1, **changes)


def judged(*rows: dict[str, Any], point: int | None = 0) -> LosslessVerdict:
    verdict = judge_lossless(some_figures(*rows, point=point), [POINT])
    assert verdict.headline.endswith(".")
    assert "\n" not in verdict.headline
    return verdict


# --- Verdicts --------------------------------------------------------------------------------


def test_faster_lossless_decoding_saves_more() -> None:
    found = judged(drafts(ratio=0.37), exits(0.42))
    assert (found.saves_more, found.method, found.point) == ("lossless", "drafts", 0)
    assert found.seconds_ratio == pytest.approx(0.37 / 0.42)
    assert found.seconds_ratio_interval == pytest.approx([0.37 / 0.42] * 2)
    assert found.headline == (
        "Lossless decoding saves more: generation by compiled layers takes 0.37 x the full "
        "model's time (0.36 to 0.38) at no loss, and 0.42 x with the best operating point of the "
        "wanted quality (layer 24, cosine >= 0.9617)."
    )


def test_faster_exits_save_more() -> None:
    found = judged(drafts(ratio=0.9), exits(0.6))
    assert (found.saves_more, found.method) == ("exits", "drafts")
    assert found.headline.startswith("Exits save more: generation by compiled layers takes 0.90 x ")
    assert found.seconds_ratio == pytest.approx(1.5)


def test_neither_saves_time_if_both_are_slower_than_the_full_model() -> None:
    found = judged(drafts(ratio=1.1), exits(1.3))
    assert found.saves_more == "neither"
    assert found.headline.startswith("Neither is significantly faster than the full model: ")


def test_an_interval_that_includes_1_decides_nothing() -> None:
    noisy = drafts(ratio=0.4, seconds=[0.2, 0.8, 0.2, 0.4])
    found = judged(noisy, exits(0.5))
    assert found.seconds_ratio_interval is not None
    assert found.seconds_ratio_interval[0] < 1 < found.seconds_ratio_interval[1]
    assert found.saves_more == "undecided"
    assert found.headline.startswith("This run does not decide which saves more: ")


def test_exits_that_are_faster_but_not_significantly_below_1_decide_nothing() -> None:
    slow = drafts(ratio=0.99, seconds_ratio_interval=[0.9, 1.1])
    found = judged(slow, exits(0.98, seconds_ratio_interval=[0.9, 1.1]))
    assert found.saves_more == "neither"


@pytest.mark.parametrize(("ratio", "saves_more"), [(0.4, "lossless"), (1.2, "neither")])
def test_without_an_operating_point_only_lossless_decoding_can_save(
    ratio: float, saves_more: str
) -> None:
    found = judged(drafts(ratio=ratio), point=None)
    assert found.saves_more == saves_more
    assert (found.point, found.seconds_ratio) == (None, None)
    assert found.headline.endswith(
        f" takes {ratio:.2f} x the full model's time ({0.98 * ratio:.2f} to {1.02 * ratio:.2f}) "
        "at no loss, and no operating point has the wanted quality."
    )


def test_the_fastest_lossless_way_is_compared() -> None:
    found = judged(a_decoding_row("engine", 0.45), drafts(ratio=0.5), exits(0.8))
    assert found.method == "engine"
    assert found.seconds_ratio == pytest.approx(0.45 / 0.8)


def test_a_way_with_another_text_is_not_compared() -> None:
    rows = (a_decoding_row("engine", 0.5), drafts(ratio=0.1, equal=3), exits(0.8))
    assert judged(*rows).method == "engine"
    found = judged(drafts(ratio=0.1, equal=3), exits(0.8))
    assert (found.saves_more, found.method) == ("undecided", None)
    assert found.headline == (
        "Lossless decoding is not compared: 1 of 4 texts differ from the full model's."
    )


@pytest.mark.parametrize("engine", [None, "model (its logits need more)"])
def test_without_an_engine_the_sentence_names_the_models_own_modules(engine: str | None) -> None:
    found = judged(drafts(ratio=0.7, engine=engine), exits(0.9))
    assert "generation by the model's own modules takes 0.70 x" in found.headline


# --- Evaluations -----------------------------------------------------------------------------

CONFIG = EvaluationConfig(
    layers=(2, 3),
    rules=("cosine", "patience"),
    hard_ratios=(0.5,),
    agreement=0.0,
    perplexity_ratio=100.0,
)
FEW = LosslessConfig(prompts=2, new_tokens=6)


@functools.cache
def evaluated() -> EvaluationRecord:
    return evaluate(a_settled_stack("llama"), FIT, CONFIRM, CONFIG, heads=settled_heads("llama"))


def with_lossless(record: EvaluationRecord) -> EvaluationRecord:
    stack, heads = a_settled_stack("llama"), settled_heads("llama")
    return compare_with_lossless(record, stack, CONFIRM, heads=heads, config=FEW)


@functools.cache
def compared() -> EvaluationRecord:
    return with_lossless(evaluated())


def test_an_evaluation_without_lossless_decoding_says_nothing_of_it() -> None:
    assert evaluated().lossless is UNSET
    assert evaluated().verdict.lossless is UNSET


def test_a_compared_evaluation_keeps_its_figures_and_is_read_again(tmp_path: Path) -> None:
    record = compared()
    verdict = known(record.verdict.lossless)
    assert verdict is not None
    bare = replace(record, lossless=UNSET, verdict=replace(record.verdict, lossless=UNSET))
    assert bare == evaluated()
    write_record(tmp_path / "evaluation.json", record)
    assert read_typed(tmp_path / "evaluation.json", EvaluationRecord) == record


def test_the_fastest_operating_point_of_the_wanted_quality_generates() -> None:
    record = evaluated()
    number = next(n for n, row in enumerate(record.points) if row.rule == "cosine")
    rows = list(record.points)
    rows[number] = replace(rows[number], exit_share=0.5, seconds_ratio=0.001)
    figures = known(with_lossless(replace(record, points=rows)).lossless)
    assert figures is not None
    assert figures.point == number
    assert [row.method for row in figures.rows] == ["modules", "engine", "drafts", "exits"]
    assert [row.equal for row in figures.rows[:3]] == [2, 2, 2]


def test_a_point_that_cannot_generate_is_passed_over() -> None:
    record = evaluated()
    number = next(
        n for n, row in enumerate(record.points) if (row.rule, row.exit_layer) == ("patience", 2)
    )
    rows = list(record.points)
    rows[number] = replace(rows[number], exit_share=0.5, seconds_ratio=0.001)
    figures = known(with_lossless(replace(record, points=rows)).lossless)
    assert figures is not None
    assert figures.point not in (None, number)


def test_without_the_wanted_quality_no_exits_generate() -> None:
    rows = [replace(row, agreement=0.5) for row in evaluated().points]
    verdict = replace(evaluated().verdict, wanted=WantedQuality(agreement=0.6, perplexity_ratio=2))
    record = with_lossless(replace(evaluated(), points=rows, verdict=verdict))
    figures = known(record.lossless)
    assert figures is not None
    assert figures.point is None
    assert figures.row("exits") is None


def test_given_operating_points_are_compared_without_a_verdict() -> None:
    stack = a_settled_stack("llama")
    point = OperatingPoint(3, "cosine", -1.0, "given")
    config = EvaluationConfig(
        layers=(), rules=(), thresholds=(point,), only_given=True, agreement=0, perplexity_ratio=100
    )
    record = evaluate(stack, FIT, CONFIRM, config)
    record = compare_with_lossless(record, stack, CONFIRM, config=FEW)
    assert record.verdict.point is None
    verdict = known(record.verdict.lossless)
    assert verdict is not None
    assert verdict.point == 0


def test_exits_generate_as_the_operating_point_scores() -> None:
    record, stack = evaluated(), a_settled_stack("llama")
    rules = set()
    for number, row in enumerate(record.points):
        if (row.rule, row.exit_layer) not in (("cosine", 2), ("cosine", 3), ("patience", 3)):
            continue
        early = exits_of(record, number, stack, settled_heads("llama"))
        *earlier, last = early.exits
        assert (last.layer, last.rule.name, last.threshold) == (
            row.exit_layer,
            row.rule,
            row.threshold,
        )
        assert last.head.name == row.head == "ridge"
        assert early.propagation == record.settings.propagation
        lower = [2] if (row.rule, row.exit_layer) == ("patience", 3) else []
        assert [(at.layer, at.threshold) for at in earlier] == [(at, math.inf) for at in lower]
        rules.add((row.rule, row.exit_layer))
    assert ("patience", 3) in rules


def test_another_corpus_or_model_is_refused() -> None:
    stack, heads = a_settled_stack("llama"), settled_heads("llama")
    with pytest.raises(CorpusError, match="expected the corpus that the evaluation was measured"):
        compare_with_lossless(evaluated(), stack, FIT, heads=heads, config=FEW)
    about = evaluated().provenance
    model = replace(about.model, weights_hash="sha256:another")
    other = replace(evaluated(), provenance=replace(about, model=model))
    with pytest.raises(ModelError) as error:
        compare_with_lossless(other, stack, CONFIRM, heads=heads, config=FEW)
    assert "the figures of this evaluation belong to" in one_line(error)


# --- Contradictions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"point": 99}, "lossless.point"),
        ({"rows": []}, "modules first"),
        ({"rows": [a_decoding_row("modules", tokens=[32])]}, "of 4 prompts"),
        ({"rows": [a_decoding_row("modules", equal=5)]}, "at most 4 equal texts"),
        ({"rows": [a_decoding_row("modules")]}, "the row of drafts"),
    ],
)
def test_figures_that_contradict_the_record_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    plain = to_plain(evaluated())
    plain["lossless"] = plain_figures(drafts(), exits(0.9), point=0) | changes
    plain["verdict"]["lossless"] = to_plain(judged(drafts(), exits(0.9)))
    assert words in (from_plain(plain, EvaluationRecord).inconsistency() or "")
    good = {"lossless": plain_figures(drafts(), exits(0.9), point=0)}
    assert from_plain(plain | good, EvaluationRecord).inconsistency() is None


def test_a_verdict_on_lossless_decoding_needs_its_figures() -> None:
    plain = to_plain(evaluated())
    plain["verdict"]["lossless"] = to_plain(judged(drafts(), exits(0.9)))
    wrong = from_plain(plain, EvaluationRecord).inconsistency()
    assert wrong == "expected lossless next to verdict.lossless"
