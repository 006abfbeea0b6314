"""A model that a device map spreads over devices and disk gives the profile of the whole model."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stacks import one_line
from support.tiny_models import random_ids, save_checkpoint
from transformers import AutoModelForCausalLM

from cascade import CollectingConfig, analyze, collect_hard, fit_heads, load, load_blocks
from cascade.core.errors import ModelError, UsageError
from cascade.core.schema import known
from cascade.gate.noise import measure_noise
from cascade.models.dispatch import device_map_of, is_dispatched
from cascade.models.stack import DecoderStack

#: Every kind of decoder that differs in how it keeps its weights: fused projections, tied heads,
#: experts that are stored in another form.
SPREAD = ["llama", "gpt2", "gemma2", "bloom", "opt", "falcon", "mixtral", "gpt_oss"]

Map = dict[str, str | int | torch.device]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    # accelerate warns at every weight that it leaves on disk.
    monkeypatch.setattr(logging.getLogger("accelerate"), "disabled", True)


def spread_map(folder: Path, *, elsewhere: str, here: str = "cpu") -> Map:
    """Return a device map with every second layer elsewhere, and the embeddings too."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    stack = DecoderStack(model)
    paths = {id(module): name for name, module in model.named_modules()}
    layers = [paths[id(layer)] for layer in stack.layers]
    found: Map = {name: elsewhere if number % 2 else here for number, name in enumerate(layers)}
    inside = tuple(f"{name}." for name in layers)
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    tensors += [f"{paths[id(model.get_output_embeddings())]}.weight"]
    for name in tensors:
        if not name.startswith(inside):
            found[name.rpartition(".")[0]] = here
    embeddings = paths[id(model.get_input_embeddings())]
    if not model.config.tie_word_embeddings:
        found[embeddings] = elsewhere
    return found


def same(profile: Any, other: Any) -> bool:
    pairs = (profile.arrays(), other.arrays())
    return pairs[0].keys() == pairs[1].keys() and all(
        np.array_equal(value, pairs[1][name]) for name, value in pairs[0].items()
    )


def corpus(stack: DecoderStack) -> Any:
    return load_blocks("embedded", stack.tokenizer, seq_len=16, max_tokens=320)


@pytest.mark.parametrize("family", SPREAD)
def test_profile_of_a_model_on_cpu_and_disk_is_that_of_the_whole_model(
    family: str, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / family, family)
    whole = load(folder)
    spread = load(folder, device_map=spread_map(folder, elsewhere="disk"))
    assert is_dispatched(spread.model)
    assert not is_dispatched(whole.model)
    assert any(weight.is_meta for weight in spread.layers[1].parameters())
    assert not any(weight.is_meta for weight in spread.layers[2].parameters())
    assert spread.device == torch.device("cpu")
    assert known(spread.provenance.placed) in ("cpu, disk", "disk, cpu")
    blocks = corpus(whole)
    expected = analyze(whole, blocks)
    assert same(analyze(spread, blocks), expected)
    # It stays where it is.
    assert any(weight.is_meta for weight in spread.layers[1].parameters())


def test_dispatched_model_of_transformers_is_analyzed_and_hashed_like_the_whole_one(
    tmp_path: Path,
) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    spread = AutoModelForCausalLM.from_pretrained(
        folder, device_map=spread_map(folder, elsewhere="disk")
    )
    tokenizer = load(folder).tokenizer
    texts = ["The cat sat on the mat."] * 4
    one, two = (analyze(each, texts, tokenizer=tokenizer, seq_len=8) for each in (whole, spread))
    assert same(one, two)
    assert one.provenance.model.weights_hash == two.provenance.model.weights_hash
    layer = load_file(folder / "model.safetensors")
    layer["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(layer, folder / "model.safetensors", metadata={"format": "pt"})
    changed = analyze(spread, texts, tokenizer=tokenizer, seq_len=8)
    assert changed.provenance.model.weights_hash != one.provenance.model.weights_hash


def test_heads_and_hard_tokens_of_a_dispatched_model_are_those_of_the_whole_one(
    tmp_path: Path,
) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    whole, spread = load(folder), load(folder, device_map=spread_map(folder, elsewhere="disk"))
    blocks = corpus(whole)
    one, two = (fit_heads(stack, blocks, [2, 3]) for stack in (whole, spread))
    for layer in (2, 3):
        for a, b in zip(one.weights[layer], two.weights[layer], strict=True):
            assert torch.equal(a, b)
    splits = {
        split: load_blocks(
            "embedded", whole.tokenizer, seq_len=16, max_tokens=160, record_split=split, marks=True
        )
        for split in ("train", "held-out")
    }
    config = CollectingConfig(hard_ratio=0.5)
    first, second = (
        collect_hard(stack, splits, tmp_path / name, config).record  # type: ignore[arg-type]
        for name, stack in (("one", whole), ("two", spread))
    )
    arrow = [[file for file in each.files if "arrow" in file.name] for each in (first, second)]
    assert first.threshold == second.threshold
    assert [file.bytes for file in arrow[0]] == [file.bytes for file in arrow[1]]


def test_noise_of_a_dispatched_model_is_measured_without_a_copy(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    spread = load(folder, device_map=spread_map(folder, elsewhere="disk"))
    noise = measure_noise(spread, random_ids(2, 12).numpy())
    assert noise.variants["float64"] == "a model over several devices is not copied"
    assert noise.exact is None
    assert noise.repeat < 1e-5


def test_a_nan_in_a_weight_on_disk_is_found_and_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    spread = spread_map(folder, elsewhere="disk")
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(folder, device_map=spread)
    assert "decoder layer 2: model.layers.1.mlp.up_proj.weight" in one_line(error)


def test_weights_stored_in_another_form_lie_in_the_cache_as_long_as_the_model(
    tmp_path: Path,
) -> None:
    folder = save_checkpoint(tmp_path / "mixtral", "mixtral")
    before = sorted(path for path in folder.rglob("*"))
    spread = load(folder, device_map=spread_map(folder, elsewhere="disk"))
    offload = tmp_path / "cache" / "offload"
    assert list(offload.rglob("*.safetensors"))
    del spread
    gc.collect()
    assert list(offload.iterdir()) == []
    assert sorted(path for path in folder.rglob("*")) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", SPREAD)
def test_profile_of_a_model_on_gpu_and_cpu_is_close_to_that_on_the_gpu(
    family: str, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / family, family)
    whole = load(folder, device="cuda")
    spread = load(folder, device_map=spread_map(folder, elsewhere="cpu", here="cuda:0"))
    blocks = corpus(whole)
    assert same(analyze(spread, blocks), analyze(whole, blocks))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_profile_of_a_model_on_two_gpus_is_that_of_one(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    whole = load(folder, device="cuda")
    spread = load(folder, device_map=spread_map(folder, elsewhere="cuda:1", here="cuda:0"))
    assert same(analyze(spread, corpus(whole)), analyze(whole, corpus(whole)))


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_strategies_are_taken_as_they_are(strategy: str) -> None:
    assert device_map_of(strategy) == strategy


def test_a_file_gives_the_device_of_each_module(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    wanted = {"model.embed_tokens": 0, "model.layers": "cuda:1", "lm_head": "disk"}
    file.write_text(json.dumps(wanted))
    assert device_map_of(str(file)) == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected --device-map auto, balanced, balanced_low_0, sequential or a .json file"),
        ("{", "cannot be read"),
        ("[]", "expected the device of each module in"),
        ("{}", "expected the device of each module in"),
        ('{"model": "gpu"}', "cuda:1, cpu or disk for model in"),
        ('{"": true}', "cuda:1, cpu or disk for the model in"),
        ('{"": -1}', "cuda:1, cpu or disk for the model in"),
    ],
)
def test_an_unusable_file_is_refused_in_one_line(
    content: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "map.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError) as error:
        device_map_of(str(file))
    assert message in one_line(error)


def test_another_word_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError) as error:
        device_map_of("nonsense")
    assert one_line(error) == (
        "expected --device-map auto, balanced, balanced_low_0, sequential or a .json file, got"
        " 'nonsense'"
    )
