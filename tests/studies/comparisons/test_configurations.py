"""Tests of sizes and operations computed from a configuration."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import FAMILIES, VOCABULARY, save_checkpoint, save_gguf, tiny_model

from cascade.core.errors import ModelError, UnsupportedModelError
from cascade.core.printable import printable
from cascade.models.checkpoints.weights import HUB_NAMES, WHEELS
from cascade.models.flops import full_flops
from cascade.models.stack import DecoderStack
from cascade.studies.comparisons.configurations import (
    known_names,
    lacks_weights,
    layer_at,
    read_configuration,
    sizes_of,
)

#: Layers, hidden size and parameters as published in the model cards.
PARAMETERS = {
    "smollm2-135m": (30, 576, 134_515_008),
    "smollm2-360m": (32, 960, 361_821_120),
    "smollm2-1.7b": (24, 2048, 1_711_376_384),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_of_known_models_equal_the_published_ones(name: str) -> None:
    sizes = sizes_of(read_configuration(name).config, 128)
    assert (sizes.num_layers, sizes.hidden_size, sizes.parameters) == PARAMETERS[name]


def test_every_short_name_has_sizes() -> None:
    assert set(known_names()) == {*WHEELS, *HUB_NAMES} == set(PARAMETERS)


@pytest.mark.parametrize("hub_id", HUB_NAMES.values())
def test_hub_ids_of_known_models_need_no_hub(here: Path, hub_id: str) -> None:
    short = next(name for name, known in HUB_NAMES.items() if known == hub_id)
    by_id, by_name = read_configuration(hub_id), read_configuration(short)
    assert by_id.config.to_dict() == by_name.config.to_dict()
    assert by_id.origin == by_name.origin


def test_operations_of_the_smallest_model_equal_those_counted_by_hand() -> None:
    # Operations per token: 2 x 576 x 49152 for the head; for a layer, 2 x (2 x 576^2 + 2 x 192 x
    # 576 + 3 x 576 x 1536) for its matrices and 4 x 128 x 576 for attention.
    head = 2 * 576 * 49152
    layer = 2 * (2 * 576**2 + 2 * 192 * 576 + 3 * 576 * 1536) + 4 * 128 * 576
    sizes = sizes_of(read_configuration("smollm2-135m").config, 128)
    assert sizes.operations == head + 30 * layer
    assert sizes.lm_head_share == pytest.approx(head / (head + 30 * layer))
    assert sizes.layer_shares == pytest.approx([layer / (head + 30 * layer)] * 30)
    assert sizes.spared(29) == pytest.approx(sizes.layer_shares[-1])
    assert sizes.spared(30) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_equal_those_of_the_built_model(family: str) -> None:
    model = tiny_model(family)
    before = model.config.to_dict()
    sizes = sizes_of(model.config, 16)
    stack = DecoderStack(model)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.layer_parameters == sum(each.numel() for each in stack.layers.parameters())
    assert sizes.operations * 16 == full_flops(stack, 1, 16)
    assert sizes.vocab_size == VOCABULARY
    assert sum(sizes.layer_shares) + sizes.lm_head_share == pytest.approx(1)
    assert model.config.to_dict() == before
    assert model.device == torch.device("cpu")


def test_a_folder_needs_only_its_configuration(folder: Path) -> None:
    whole = sizes_of(read_configuration(str(folder)).config, 16)
    assert not lacks_weights(str(folder))
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert lacks_weights(str(folder))
    found = read_configuration(str(folder))
    assert sizes_of(found.config, 16) == whole
    assert found.origin == str(folder / "config.json")


def test_a_folder_of_torch_files_has_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert not lacks_weights(str(folder))


@pytest.mark.parametrize("source", ["smollm2-135m", "smollm2-360m", "nowhere", "a\0b", "a" * 5000])
def test_only_a_folder_can_lack_weights(here: Path, source: str) -> None:
    assert not lacks_weights(source)


def test_a_folder_takes_precedence_over_a_short_name(here: Path) -> None:
    save_checkpoint(here / "smollm2-360m")
    assert read_configuration("smollm2-360m").config.hidden_size == 32


def test_a_gguf_file_has_a_configuration(tmp_path: Path) -> None:
    model = save_gguf(tmp_path / "Tiny.gguf")
    found = read_configuration(str(tmp_path / "Tiny.gguf"))
    assert found.name == "tiny"
    assert found.config.num_hidden_layers == model.config.num_hidden_layers


def test_a_hub_model_is_described_by_its_cached_configuration(
    here: Path, saved: Path, models: Path
) -> None:
    snapshot = models / "hub" / "models--Some-Org--Sizes" / "snapshots" / ("a" * 40)
    refs = snapshot.parents[1] / "refs"
    for made in (snapshot, refs):
        made.mkdir(parents=True, exist_ok=True)
    (refs / "main").write_text("a" * 40)
    shutil.copy(saved / "config.json", snapshot)
    found = read_configuration("Some-Org/Sizes")
    assert (found.name, found.origin) == ("some-org--sizes", "hub: Some-Org/Sizes")
    assert found.config.hidden_size == 32


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda path: path.unlink(), ModelError, "holds no config.json"),
        (lambda path: path.write_text("{"), ModelError, "cannot read the config of"),
        (
            lambda path: path.write_text('{"model_type": "t5"}'),
            UnsupportedModelError,
            "encoder-decoder",
        ),
        (
            lambda path: path.write_text('{"model_type": "vit"}'),
            UnsupportedModelError,
            "not a causal language model",
        ),
        (
            lambda path: path.write_text(
                json.dumps(json.loads(path.read_text()) | {"hidden_act": "none of them"})
            ),
            UnsupportedModelError,
            "expected the config.json of a complete model",
        ),
    ],
)
def test_invalid_configurations_give_a_one_line_error(
    folder: Path, spoil: object, error: type[ModelError], words: str
) -> None:
    spoil(folder / "config.json")  # type: ignore[operator]
    with pytest.raises(error, match=words) as caught:
        sizes_of(read_configuration(str(folder)).config, 16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["some-org/unknown", "~nobody/x", "a" * 2000, "a\0b"])
def test_the_error_for_an_unknown_model_lists_the_known_names(here: Path, source: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_configuration(source)
    assert str(caught.value).startswith(f"no configuration of {printable(source)}: ")
    assert "smollm2-135m, smollm2-360m, smollm2-1.7b" in str(caught.value)


def test_a_file_that_is_not_a_model_is_refused(here: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a model folder or a .gguf file"):
        read_configuration("texts.jsonl")


def test_the_nearest_layer_matches_examples() -> None:
    assert layer_at(Fraction(29, 30), 30) == 29
    assert layer_at(Fraction(29, 30), 32) == 31
    assert layer_at(Fraction(29, 30), 24) == 23
    assert layer_at(0.5, 5) == 3
    assert layer_at(0.001, 5) == 1


@given(st.integers(1, 120), st.data())
def test_the_depth_of_a_layer_gives_the_same_layer(num_layers: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(1, num_layers))
    assert layer_at(Fraction(layer, num_layers), num_layers) == layer
    other = data.draw(st.integers(1, 120))
    found = layer_at(Fraction(layer, num_layers), other)
    assert 1 <= found <= other
    nearest = min(
        abs(Fraction(each, other) - Fraction(layer, num_layers)) for each in range(1, other + 1)
    )
    assert abs(Fraction(found, other) - Fraction(layer, num_layers)) == nearest
