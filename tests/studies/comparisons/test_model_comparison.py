"""Tests of the comparison of models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.build_models import levels, measured, sizes
from support.commands import TEXTS
from support.tiny_models import save_checkpoint, tiny_model, tiny_tokenizer

import cascade
from cascade.core.records import to_json
from cascade.core.schema import from_plain, to_plain
from cascade.models.loading import load
from cascade.saturation.records import ProfileRecord
from cascade.studies.comparisons.altered_models import Alteration, alter
from cascade.studies.comparisons.compared_models import (
    SameText,
    UnmeasuredModel,
    describe_model,
    measure_model,
)
from cascade.studies.comparisons.configurations import Configuration
from cascade.studies.comparisons.model_comparison import compare_models
from cascade.studies.comparisons.model_records import ModelComparison

# --- Depth and exit layers -----------------------------------------------------------------


def test_relative_depth_is_the_layer_over_the_number_of_layers() -> None:
    record = compare_models([measured(levels(10)), measured(levels(20), norm=False)])
    for entry, depth in zip(record.models, (10, 20), strict=True):
        layers = [row for row in entry.layers if row.layer.isdigit()]
        assert [row.depth for row in layers] == [
            round(layer / depth, 6) for layer in range(1, depth + 1)
        ]
    assert record.models[0].layers[-1].depth is None
    assert len(record.models[1].layers) == 20


def test_suggested_exits_equal_the_profiles() -> None:
    models = [measured(levels(10)), measured(levels(30, 25))]
    record = compare_models(models)
    for model, entry in zip(models, record.models, strict=True):
        own = from_plain(to_plain(model.profile.record()), ProfileRecord).thresholds
        assert entry.exit.layer == own.exit_layer
        assert entry.exit.by_hard_ratio == own.by_hard_ratio
    # The exits are 9 of 10 and 29 of 30. One of N + 2 equal shares lies behind them.
    assert [entry.exit.layer for entry in record.models] == ["9", "29"]
    assert [entry.exit.depth for entry in record.models] == [0.9, 0.966667]
    assert record.models[0].exit.spared == round(1 / 12, 6)


# --- Unmeasured models ---------------------------------------------------------------------


def test_an_unmeasured_model_has_layers_by_depth_and_no_exit() -> None:
    unmeasured = UnmeasuredModel(Configuration("other", "its config.json", None), sizes(12))
    record = compare_models([measured(levels(30, 25)), unmeasured, measured(levels(10))])
    entry = record.models[1]
    assert (entry.measured, entry.exit, entry.layers) == (False, None, None)
    assert entry.configuration == "its config.json"
    # Depths 0.9 (from C) and 29/30 (from A) of 12 layers are 10.8 and 11.6.
    assert to_plain(record.by_depth) == [
        {
            "depth": 0.9,
            "from": ["C"],
            "layers": [{"model": "B", "layer": 11, "spared": round(1 / 14, 6)}],
        },
        {
            "depth": 0.966667,
            "from": ["A"],
            "layers": [{"model": "B", "layer": 12, "spared": 0.0}],
        },
    ]


def test_without_a_measured_model_depths_are_for_reference() -> None:
    record = compare_models(
        [describe_model(name, 128) for name in ("smollm2-360m", "smollm2-1.7b")]
    )
    assert record.pairs == []
    assert [entry.depth for entry in record.by_depth] == [0.5, 0.666667, 0.8, 0.9, 0.966667]
    assert all(entry.suggested_by == [] for entry in record.by_depth)
    assert [row.layer for row in record.by_depth[-1].layers] == [31, 23]


def test_measured_models_have_no_layers_by_depth() -> None:
    assert compare_models([measured(levels(30)), measured(levels(10))]).by_depth == []


# --- Tiny models, trained ------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return Llama models of 6 and 9 layers, trained for a few steps on the test corpus."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer(" ".join(TEXTS))["input_ids"][:2048]).reshape(-1, 32)
    folders = {}
    for depth in (6, 9):
        folder = tmp_path_factory.mktemp("trained") / f"deep{depth}"
        model = tiny_model("llama", num_layers=depth, max_position_embeddings=64).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.25)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(30):
            batch = ids[torch.arange(16) + 16 * (step % 4)]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[depth] = folder
    return folders


def test_trained_models_of_two_depths_and_a_copy(here: Path, trained: dict[int, Path]) -> None:
    text = SameText("texts.jsonl", seq_len=16)

    def seen() -> Iterator[Any]:
        for depth, how in ((6, None), (6, "int8"), (9, None)):
            stack = load(str(trained[depth]))
            if how:
                alter(stack, Alteration(how))
            yield measure_model(stack, text.blocks(stack))

    record = compare_models(seen(), command="cascade compare-models")
    plain = to_plain(record)
    to_json(plain)  # refuses NaN
    assert from_plain(plain, ModelComparison) == record
    first, _, deeper = record.models
    assert [entry.name for entry in record.models] == ["deep6", "deep6+int8", "deep9"]
    assert [row.depth for row in deeper.layers[:3]] == [0.111111, 0.222222, 0.333333]
    assert first.provenance.corpus == deeper.provenance.corpus
    of_copy, of_deeper = record.pairs
    assert of_copy.same_tokenizer
    assert of_deeper.same_tokenizer
    assert of_deeper.unpaired == "they have different numbers of layers (6 and 9)"
    assert 0 < of_copy.apart.degrees < of_deeper.apart.degrees
    moves = [row.mean_size for row in of_copy.paired.layers]
    assert all(0 < move < 0.05 for move in moves)
    # The compared profiles equal those of `analyze`.
    stack = load(str(trained[9]))
    profile = cascade.analyze(stack, text.blocks(stack))
    own = from_plain(to_plain(profile.record()), ProfileRecord)
    assert [row.mean for row in deeper.layers] == [row.mean for row in own.layers]
    assert deeper.structure == own.structure


def test_the_same_model_twice_does_not_change(here: Path, trained: dict[int, Path]) -> None:
    text = SameText("texts.jsonl", seq_len=16, max_tokens=256)
    stacks = [load(str(trained[6])) for _ in range(2)]
    record = compare_models([measure_model(stack, text.blocks(stack)) for stack in stacks])
    (pair,) = record.pairs
    assert all(row.largest == 0 for row in pair.paired.layers)
    assert to_plain(pair.apart) == {
        "degrees": 0.0,
        "most_degrees": 0.0,
        "most_depth": 0.166667,
    }


def test_a_saved_quantized_checkpoint_equals_the_altered_model(here: Path, tmp_path: Path) -> None:
    """A checkpoint that a user quantized and saved is compared like any other folder."""
    folder = save_checkpoint(tmp_path / "mine")
    stack = load(str(folder))
    alter(stack, Alteration("int8"))
    stack.model.save_pretrained(tmp_path / "int8")
    tiny_tokenizer().save_pretrained(tmp_path / "int8")
    text = SameText("texts.jsonl", seq_len=16, max_tokens=256)
    saved = load(str(tmp_path / "int8"))
    pair = compare_models([measure_model(each, text.blocks(each)) for each in (stack, saved)])
    assert all(row.largest == 0 for row in pair.pairs[0].paired.layers)
