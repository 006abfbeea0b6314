"""What a GGUF file holds is what is measured: every weight, shard and position scaling."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.stacks import one_line
from support.tiny_models import random_ids, save_gguf

from cascade.core.errors import ModelError
from cascade.models.checkpoints.gguf_files import frequency_scaling, llama3_factors, shards
from cascade.models.checkpoints.weights import model_name, resolve
from cascade.models.loading import load

HEAD = 8
THETA = 10_000.0

Extra = Callable[[gguf.GGUFWriter], object]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test its own cache."""
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def frequencies() -> np.ndarray[Any, np.dtype[np.float64]]:
    return THETA ** (-np.arange(0, HEAD, 2) / HEAD)


def yarn(factor: float, original: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the frequencies of the YaRN paper, with beta 32 and 1."""

    def dimension(rotations: float) -> float:
        return HEAD * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), HEAD - 1)
    ramp = np.clip((np.arange(HEAD // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequencies() / factor * ramp + frequencies() * (1 - ramp)


def linear_settings(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


def yarn_settings(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)


LLAMA3 = llama3_factors(2 * math.pi / frequencies(), 8.0, 4.0, 64)

SCALINGS: dict[str, tuple[Extra, dict[str, Any], Any]] = {
    "linear": (linear_settings, {"rope_type": "linear", "factor": 8.0}, frequencies() / 8),
    "linear, by the old setting": (
        lambda writer: writer.add_float32("llama.rope.scale_linear", 8.0),
        {"rope_type": "linear", "factor": 8.0},
        frequencies() / 8,
    ),
    "yarn": (
        yarn_settings,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        yarn(4.0, 64),
    ),
    "llama3": (
        lambda writer: writer.add_tensor("rope_freqs.weight", LLAMA3.astype(np.float32)),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        frequencies() / LLAMA3,
    ),
    "none": (
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE),
        {},
        frequencies(),
    ),
    "factors of 1": (
        lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32)),
        {},
        frequencies(),
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_positions_are_scaled_as_the_file_says(name: str, tmp_path: Path) -> None:
    extra, parameters, expected = SCALINGS[name]
    rope = {"rope_parameters": {"rope_theta": THETA} | parameters} if parameters else {}
    model = save_gguf(tmp_path / "scaled.gguf", extra=extra, **rope)
    stack = load(tmp_path / "scaled.gguf")
    rotary: Any = stack.model.base_model.rotary_emb
    np.testing.assert_allclose(rotary.inv_freq.double().numpy(), expected, rtol=1e-6)
    ids = random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(stack.model(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


@given(
    factor=st.floats(1.5, 64),
    high=st.sampled_from([4.0]),
    original=st.integers(16, 16384),
    size=st.sampled_from([4, 16, 32, 64]),
    theta=st.sampled_from([1e4, 5e5, 1e6]),
)
def test_frequency_factors_of_llama_3_are_recognized(
    factor: float, high: float, original: int, size: int, theta: float
) -> None:
    waves = 2 * math.pi * theta ** (np.arange(size) / size)
    factors = llama3_factors(waves, factor, high, original).astype(np.float32).astype(np.float64)
    found = frequency_scaling(factors, theta)
    if not found:
        assert np.all(factors == 1)
        return
    again = llama3_factors(
        waves, found["factor"], found["high_freq_factor"], found["original_max_position_embeddings"]
    )
    np.testing.assert_allclose(again, factors, rtol=1e-4)


UNREADABLE: dict[str, tuple[Extra, str]] = {
    "other factors": (
        lambda writer: writer.add_tensor("rope_freqs.weight", np.float32([1, 3, 2, 5])),
        "rope_freqs.weight are not those of Llama 3",
    ),
    "longrope": (
        lambda writer: writer.add_tensor("rope_factors_long.weight", np.ones(4, np.float32)),
        "scales positions by rope_factors_long.weight",
    ),
    "an unknown kind": (
        lambda writer: (
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            writer.add_rope_scaling_factor(4.0),
        ),
        "scales positions by longrope",
    ),
    "yarn without its length": (
        lambda writer: (
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            writer.add_rope_scaling_factor(4.0),
        ),
        "scales positions by yarn without original length",
    ),
    "an attention factor": (
        lambda writer: (linear_settings(writer), writer.add_rope_scaling_attn_factors(0.5)),
        "scales positions by llama.rope.scaling.attn_factor",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_scaling_that_cannot_be_expressed_is_refused(
    name: str, tmp_path: Path, cache: Path
) -> None:
    extra, message = UNREADABLE[name]
    save_gguf(tmp_path / "odd.gguf", extra=extra)
    with pytest.raises(ModelError) as error:
        load(tmp_path / "odd.gguf")
    assert message in one_line(error)
    assert "safetensors format" in one_line(error)
    assert [path for path in (cache / "weights").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "output_norm.weight"])
def test_a_missing_tensor_is_refused_before_anything_is_kept(
    name: str, tmp_path: Path, cache: Path
) -> None:
    save_gguf(tmp_path / "torn.gguf", without={name})
    with pytest.raises(ModelError) as error:
        load(tmp_path / "torn.gguf")
    assert "torn.gguf lacks 1 of its weights, the first is model." in one_line(error)
    assert [path for path in (cache / "weights").iterdir() if path.is_dir()] == []


def test_layers_that_the_settings_do_not_count_are_refused(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.4.attn_norm.weight", np.ones(32, np.float32))

    save_gguf(tmp_path / "more.gguf", extra=extra)
    with pytest.raises(ModelError) as error:
        load(tmp_path / "more.gguf")
    assert "says that it has 4 layers, but holds blk.4.attn_norm.weight" in one_line(error)


def split(path: Path, count: int) -> list[Path]:
    """Split a GGUF file as llama.cpp does: the first file has the settings."""
    reader = gguf.GGUFReader(path)
    made = []
    for number in range(count):
        name = f"{path.stem}-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path.parent / name, "llama")
        for field in reader.fields.values():
            if number or field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        made.append(path.parent / name)
    return made


def test_all_shards_of_a_split_file_are_read(tmp_path: Path) -> None:
    model = save_gguf(tmp_path / "big.gguf")
    files = split(tmp_path / "big.gguf", 3)
    assert shards(files[1]) == files
    for file in files:
        stack = load(file)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(stack.model.state_dict()[name], weight)
    one, other = (resolve(str(file)) for file in files[:2])
    assert (one.hash, one.name, one.files) == (other.hash, other.name, tuple(files))
    assert one.name == model_name(str(files[2])) == "big"
    files[2].write_bytes(files[2].read_bytes() + b"0")
    assert resolve(str(files[0])).hash != one.hash


def test_missing_shards_are_named(tmp_path: Path) -> None:
    save_gguf(tmp_path / "big.gguf")
    files = split(tmp_path / "big.gguf", 3)
    files[0].unlink()
    with pytest.raises(ModelError) as error:
        load(files[1])
    assert re.search(rf"is one of 3 files, and .* lacks {files[0].name}; get", one_line(error))


def test_a_shard_under_another_name_is_refused(tmp_path: Path) -> None:
    save_gguf(tmp_path / "big.gguf")
    first = split(tmp_path / "big.gguf", 2)[0]
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match="file 1 of a model in 2 files, but is not named so"):
        load(tmp_path / "renamed.gguf")
