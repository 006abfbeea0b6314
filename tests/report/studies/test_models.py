"""Tests of the report of a comparison of models."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.build_models import levels, measured, sizes
from support.html import VOID, Page, ids

from cascade.core.errors import RecordError
from cascade.core.records import read_typed, to_json
from cascade.core.schema import from_plain, to_plain
from cascade.report.common.sections import html_page, markdown, print_sections
from cascade.report.studies.model_figures import label_range, operations_svg, profiles_svg
from cascade.report.studies.models import models_report
from cascade.studies.comparisons.altered_models import Alteration
from cascade.studies.comparisons.compared_models import MeasuredModel, UnmeasuredModel
from cascade.studies.comparisons.configurations import Configuration
from cascade.studies.comparisons.model_comparison import compare_models
from cascade.studies.comparisons.model_records import ModelComparison


def unmeasured(num_layers: int = 12, name: str = "other") -> UnmeasuredModel:
    return UnmeasuredModel(Configuration(name, "its config.json", None), sizes(num_layers))


def stored(*models: MeasuredModel | UnmeasuredModel) -> ModelComparison:
    """Return a comparison as it is read from a file."""
    record = compare_models(models, command="cascade")
    return from_plain(json.loads(to_json(to_plain(record))), ModelComparison)


def of_sizes() -> ModelComparison:
    """Three depths: dips at the same relative depth, and one without a match."""
    return stored(
        measured(levels(30, 25), name="small"),
        measured(levels(40, 12, 33), name="large"),
        measured(levels(24, 20), name="wide", tokenizer="another"),
    )


def of_copies() -> ModelComparison:
    moved = np.zeros((31, 6))
    moved[24] = -0.01
    return stored(
        measured(levels(30, 25)),
        measured(levels(30, 25), moved=moved, name="tiny+int8"),
        measured(levels(30, 25), moved=0.1 * moved, name="tiny+bf16"),
    )


def printed(record: ModelComparison, *, width: int = 80) -> str:
    stream = io.StringIO()
    print_sections(models_report(record), Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def row_of(text: str, start: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(start))


EVERY = {
    "sizes": of_sizes,
    "copies": of_copies,
    "mixed": lambda: stored(measured(levels(30, 25)), unmeasured(), measured(levels(10))),
    "unmeasured": lambda: stored(unmeasured(), unmeasured(20)),
    "one measured": lambda: stored(unmeasured(), measured(levels(30, 25))),
    "few layers": lambda: stored(measured([0.1, 0.9, 0.6]), measured([0.9, 0.8], norm=False)),
    "the same twice": lambda: stored(measured(levels(10)), measured(levels(10))),
    "same depth": lambda: stored(
        *[measured(levels(30, 25), moved=-0.004 * number) for number in range(3)]
    ),
    "no dips": lambda: stored(measured(levels(10)), measured(levels(20))),
    "one sequence": lambda: stored(*[measured(levels(10), sequences=1) for _ in range(2)]),
    "many": lambda: stored(*[measured(levels(10), moved=0.001 * n) for n in range(12)]),
}


@pytest.mark.parametrize("case", EVERY)
def test_every_record_has_a_valid_report(case: str) -> None:
    record = EVERY[case]()
    report = models_report(record)
    text = html_page(report)
    page = Page(text)
    assert not page.misnested
    assert not [tag for tag in page.open if tag not in VOID]
    assert len(set(ids(text))) == len(ids(text))
    assert "nan" not in text.lower().replace("provenance", "")
    assert markdown(report)
    assert html_page(models_report(record)) == text
    shown = printed(record)
    for entry in record.models:
        assert entry.name in shown
    if len(record.models) <= 5:
        assert max(map(len, shown.splitlines())) <= 80


def test_the_lead_names_exit_layers_and_matching_dips() -> None:
    text = " ".join(printed(of_copies()).split())
    assert "for all measured models: layer 29 of 30, relative depth 0.967." in text
    assert "The dips of all models match." in text
    text = " ".join(printed(of_sizes()).split())
    assert "exit layers lie at relative depths from 0.958 to 0.975." in text
    assert "Over all pairs 2 dips match and 1 has no match." in text


def test_the_lead_names_the_threshold_that_is_furthest_off() -> None:
    record = EVERY["same depth"]()
    worst = max(record.pairs[1].thresholds, key=lambda row: row.reached - row.hard_ratio)
    text = " ".join(printed(record).split())
    assert (
        f"The largest error of A's thresholds is in C, where {100 * worst.reached:.1f}% of the "
        f"tokens are hard instead of {100 * worst.hard_ratio:g}%."
    ) in text
    assert "The largest error" not in printed(of_sizes())


def test_matched_dips_have_depths_and_unmatched_ones_are_named() -> None:
    text = printed(of_sizes())
    assert "B  25 (0.833)  33 (0.825)" in text
    assert "C  25 (0.833)  20 (0.833)" in text
    assert "Without a match between A and B: 12 of B (tolerance 0.050 of depth)." in text


def test_profiles_of_several_depths_name_each_values_layer() -> None:
    record = of_sizes()
    text = printed(record)
    means = [{row.layer: f"{row.mean:.4f}" for row in entry.layers} for entry in record.models]
    # Line 33 of 40: 25/30 of A and 20/24 of C are nearest to it.
    assert row_of(text, "0.825") == [
        *("0.825", "25:", means[0]["25"], "33:", means[1]["33"], "20:", means[2]["20"]),
    ]
    # 2/30 is nearer to 3/40 than to 2/40.
    assert row_of(text, "0.075")[1::2] == ["2:", "3:", "2:"]
    line = row_of(text, " norm")
    assert [cell for cell in line if cell.endswith("norm:")] == ["30+norm:", "40+norm:", "24+norm:"]
    # Every layer of every model has a cell of its own.
    table = text.split("Mean similarity", 1)[1].split("The distance of each", 1)[0]
    assert len(re.findall(r" \d+(?:\+norm)?: ", table)) == 31 + 41 + 25


def test_exit_layers_are_shown_with_depth_share_and_thresholds() -> None:
    record = of_sizes()
    text = printed(record).split("Suggested exit layers", 1)[1]
    thresholds = [row.threshold for row in record.models[1].exit.by_hard_ratio]
    assert row_of(text, "B") == [
        *("B", "39", "40", "0.975", f"{100 / 42:.1f}%"),
        *(f"{each:.4f}" for each in thresholds),
    ]


def test_the_largest_mover_is_shown_for_models_over_the_same_tokens() -> None:
    text = printed(of_copies())
    rows = text.split("Changes on the same tokens", 1)[1]
    assert row_of(rows, "B")[:4] == ["B", "25", "0.01", "-0.01"]
    assert row_of(rows, "C")[:4] == ["C", "25", "0.001", "-0.001"]
    text = " ".join(printed(of_sizes()).split())
    assert (
        "A and B are not compared sequence by sequence: they have different numbers of layers"
        in text
    )
    assert "A and C are not compared sequence by sequence: their tokenizers differ" in text


def test_an_unchanged_model_is_named_and_not_drawn() -> None:
    record = EVERY["the same twice"]()
    assert row_of(printed(record).split("Changes on the same tokens", 1)[1], "B")[1] == "none"
    svg = profiles_svg(record)
    assert svg is not None
    assert "change of" not in svg


def test_unmeasured_models_are_marked() -> None:
    text = printed(EVERY["mixed"]())
    assert "other (not measured)" in text
    by_depth = text.split("Models that were not measured", 1)[1]
    assert row_of(by_depth, "B  0.900")[:4] == ["B", "0.900", "11", "7.1%"]
    assert "exit of C" in by_depth
    text = printed(EVERY["unmeasured"]())
    assert text.startswith("2 models by their configurations")
    assert "Nothing was measured." in text
    assert "there is no profile to draw" in text
    assert "Suggested exit layers" not in text
    assert text.count("for reference") == 10


def test_without_a_measurement_there_is_no_profile_to_draw() -> None:
    assert profiles_svg(EVERY["unmeasured"]()) is None
    assert [each.file for each in models_report(EVERY["unmeasured"]()).pictures()] == [
        "models-operations.svg"
    ]


def test_models_of_one_size_share_a_row_and_have_no_picture_of_operations() -> None:
    record = of_copies()
    assert operations_svg(record) is None
    text = printed(record)
    assert "All models are of one size" in text
    assert "A to C" in text


def texts(svg: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg) if text.strip()]


def test_the_picture_names_models_exits_and_dips() -> None:
    svg = profiles_svg(of_sizes())
    assert svg is not None
    said = texts(svg)
    # What lies close is written once, from left to right.
    assert "exit 23 (C), 29 (A), 39 (B)" in said
    assert {"dip 33 (B), 25 (A), 20 (C)", "dip 12 (B)"} <= set(said)
    assert {"A  small", "B  large", "C  wide"} <= set(said)
    assert "change of" not in svg


def test_models_over_the_same_tokens_have_a_panel_of_changes() -> None:
    svg = profiles_svg(of_copies())
    assert svg is not None
    said = texts(svg)
    assert "exit 29 (A to C)" in said
    assert "dip 25 (A to C)" in said
    assert any(text.startswith("change of a sequence") for text in said)
    assert {"B 25", "C 25"} <= set(said)


def test_pictures_have_a_text_alternative() -> None:
    svg, bars = profiles_svg(of_sizes()), operations_svg(of_sizes())
    assert svg is not None
    assert bars is not None
    assert "A layer 29 of 30, B layer 39 of 40, C layer 23 of 24" in svg
    assert "A 6.2%, B 4.8%, C 7.7%" in bars


def test_a_name_with_odd_characters_is_drawn() -> None:
    record = stored(measured(levels(10), name="a$b$_é" * 20), measured(levels(20)))
    assert profiles_svg(record) is not None
    assert Page(html_page(models_report(record))).misnested == []


@pytest.mark.parametrize(
    ("labels", "words"),
    [(["A"], "A"), (["A", "B"], "A, B"), (["A", "B", "C"], "A to C"), (["A", "C", "D"], "A, C, D")],
)
def test_consecutive_letters_are_shown_as_a_range(labels: list[str], words: str) -> None:
    assert label_range(labels) == words


def test_the_alteration_of_a_copy_is_described() -> None:
    model = measured(levels(10), name="tiny+int8", altered=Alteration("int8").words())
    text = " ".join(printed(stored(measured(levels(10)), model)).split())
    assert "the matrices of all decoder layers rounded to int8" in text


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda record: record.update(kind="saturation"), "a record of kind model-comparison"),
        (lambda record: record.update(schema=9), "has schema 9, this release reads up to 1"),
        (lambda record: record.pop("pairs"), "expected a list at pairs, got nothing"),
        (
            lambda record: record["models"][0]["sizes"].update(layer_share=float("nan")),
            r"at models\[0\].sizes.layer_share, got NaN",
        ),
    ],
)
def test_other_records_are_refused(spoil: Any, words: str, tmp_path: Path) -> None:
    record = to_plain(of_copies())
    spoil(record)
    path = tmp_path / "models.json"
    path.write_text(json.dumps(record))
    with pytest.raises(RecordError, match=words):
        read_typed(path, ModelComparison)
