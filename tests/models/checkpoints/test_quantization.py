"""Quantized checkpoints are read with their packages, or refused with the package's name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stacks import one_line
from support.tiny_models import random_ids, save_checkpoint, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig

from cascade.core.errors import DeviceError, ModelError
from cascade.models.checkpoints.quantization import METHODS, dequantize_when_read, quantization_of
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import similarities

FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
    "fmt": "e4m3",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "m")


def with_settings(folder: Path, settings: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps(config))
    return folder


def in_fp8(folder: Path) -> Path:
    """Store the projections of a checkpoint in fp8, one scale per block of 32 x 32."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "_proj.weight" in name]:
        weight = weights[name]
        rows, columns = -(-weight.shape[0] // 32), -(-weight.shape[1] // 32)
        scales = (1 + torch.arange(rows * columns, dtype=torch.float32)).reshape(rows, columns) / 64
        spread = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
        spread = spread[: weight.shape[0], : weight.shape[1]]
        weights[name] = (weight / spread).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scales
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return with_settings(folder, FP8)


def dequantized(folder: Path) -> dict[str, Tensor]:
    """Return the weights of an fp8 checkpoint, computed here."""
    stored = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in stored.items() if not name.endswith("_scale_inv")}
    for name, value in weights.items():
        if f"{name}_scale_inv" in stored:
            rows, columns = value.shape
            scales = stored[f"{name}_scale_inv"]
            spread = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)[:rows, :columns]
            weights[name] = value.float() * spread
    return weights


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(random_ids(2, 12)).logits
    return found


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq, 4 bit, groups of 128"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq, 8 bit"),
        (FP8, "fp8, e4m3, blocks of 32 x 32, dequantized"),
        ({"quant_method": "mxfp4"}, "mxfp4, dequantized"),
        ({"load_in_4bit": True}, "bitsandbytes, fp4, 4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bit"),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
            },
            "bitsandbytes, nf4, 4 bit",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 4, "group_size": 32},
                        "input_activations": {"num_bits": 8},
                    },
                    "group_1": {"weights": {"num_bits": 8}, "input_activations": None},
                },
            },
            "compressed-tensors, pack-quantized, 4/8 bit, activations of 8 bit, groups of 32",
        ),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnly"}}},
            "torchao, Int8WeightOnly",
        ),
    ],
)
@pytest.mark.parametrize("owner", ["config", "text_config"])
def test_provenance_says_how_weights_are_quantized(settings: Any, text: str, owner: str) -> None:
    plain = {"quantization_config": settings}
    found = quantization_of(plain if owner == "config" else {owner: plain}, "model")
    assert found is not None
    assert found.text == text


@pytest.mark.parametrize("settings", [None, {}])
def test_a_config_without_quantization_has_none(settings: Any) -> None:
    assert quantization_of({"quantization_config": settings}, "model") is None


@pytest.mark.parametrize(
    "settings", [{"quant_method": "mybits"}, {"bits": 4}, {"quant_algo": "FP8"}, "mybits", [4]]
)
def test_an_unknown_method_is_refused(settings: Any, folder: Path) -> None:
    with pytest.raises(ModelError) as error:
        load(with_settings(folder, settings))
    assert "is quantized with " in one_line(error)
    assert "quant_method among aqlm, auto-round, awq" in one_line(error)
    assert "update transformers" in one_line(error)


@pytest.mark.parametrize(
    "method",
    sorted(name for name, about in METHODS.items() if about.packages and not about.device),
)
def test_one_line_names_the_package_that_is_missing(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = METHODS[method]
    for module in about.packages.values():
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError) as error:
        load(with_settings(folder, {"quant_method": method, "bits": 4}))
    assert f"is quantized with {about.title}, which needs the package" in one_line(error)
    assert f"`pip install {' '.join(about.packages)}`" in one_line(error)


@pytest.mark.parametrize("method", sorted(name for name in METHODS if METHODS[name].device))
def test_one_line_says_which_device_a_method_needs(method: str, folder: Path) -> None:
    about = METHODS[method]
    with pytest.raises(ModelError) as error:
        load(with_settings(folder, {"quant_method": method}))
    assert f"{about.title}, which runs on {about.device} devices only, got cpu" in one_line(error)


@pytest.mark.parametrize("method", ["hqq", "nvfp4", "gguf"])
def test_a_method_whose_checkpoints_are_not_read_is_refused(method: str, folder: Path) -> None:
    with pytest.raises(ModelError, match=f"is quantized with {METHODS[method].title}: "):
        load(with_settings(folder, {"quant_method": method}))


def test_every_method_of_transformers_is_named() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    unnamed = {name.partition("_4bit")[0].partition("_8bit")[0] for name in AUTO_QUANTIZER_MAPPING}
    assert unnamed - set(METHODS) <= {"gemma", "paroquant"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_weights_are_dequantized_with_their_block_scales(
    dtype: torch.dtype, folder: Path
) -> None:
    save_checkpoint(folder, intermediate_size=64)
    stack = load(in_fp8(folder), dtype=dtype)
    expected = tiny_model("llama", intermediate_size=64)
    expected.load_state_dict(dequantized(folder))
    plain = tiny_model("llama", intermediate_size=64)
    assert (logits(expected) - logits(plain)).abs().max() > 0.01
    for weight in expected.parameters():  # buffers, such as rotary tables, stay in float32
        weight.data = weight.data.to(dtype)
    torch.testing.assert_close(logits(stack.model), logits(expected))
    assert {weight.dtype for weight in stack.model.parameters()} == {dtype}
    assert stack.provenance.dtype == str(dtype).removeprefix("torch.")
    assert stack.provenance.quantization == "fp8, e4m3, blocks of 32 x 32, dequantized"


def test_an_fp8_weight_with_a_smaller_last_block_is_refused(folder: Path) -> None:
    # 48 columns in blocks of 32 have two scales, which transformers takes for blocks of 24.
    with pytest.raises(ModelError) as error:
        load(in_fp8(folder))
    assert "no whole number of blocks of 32 x 32" in one_line(error)
    assert "mlp.down_proj.weight has the shape 32 x 48" in str(error.value)


def test_the_hash_of_a_quantized_copy_is_another(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(folder, intermediate_size=64)
    plain = load(folder).provenance
    quantized = load(in_fp8(Path(shutil.copytree(folder, tmp_path / "q")))).provenance
    assert plain.weights_hash != quantized.weights_hash
    assert plain.quantization is None


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "bitnet"])
def test_plain_weights_under_a_quantization_config_are_refused(method: str, folder: Path) -> None:
    with_settings(folder, FP8 | {"quant_method": method})
    if method == "bitnet":  # packs four weights in a byte
        path = folder / "model.safetensors"
        weights = load_file(path)
        packed = {name: value[::4].clone() for name, value in weights.items() if "_proj" in name}
        scales = {f"{name}_scale": torch.ones(1) for name in packed}
        save_file(weights | packed | scales, path, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "all of its weights are stored as floating-point numbers" in one_line(error)
    assert one_line(error).endswith(
        "remove quantization_config from config.json where they were dequantized"
    )


def save_quantized(folder: Path, settings: Any) -> Tensor:
    """Quantize a tiny model as `transformers` does; return its logits."""
    source = folder.parent / "plain"
    save_checkpoint(source, hidden_size=64, intermediate_size=128, head_dim=16)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return logits(model)


def in_4_bit() -> Any:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def in_8_bit() -> Any:
    return BitsAndBytesConfig(load_in_8bit=True)


def of_torchao() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


@pytest.mark.parametrize(
    ("settings", "package"),
    [(in_4_bit, "bitsandbytes"), (in_8_bit, "bitsandbytes"), (of_torchao, "torchao")],
)
@pytest.mark.filterwarnings("ignore")
def test_quantized_checkpoints_equal_those_of_transformers(
    settings: Callable[[], Any], package: str, tmp_path: Path
) -> None:
    pytest.importorskip(package, reason=f"needs {package}")
    expected = save_quantized(tmp_path / "q", settings())
    stack = load(tmp_path / "q")
    torch.testing.assert_close(logits(stack.model), expected, atol=0, rtol=0)
    check_steps(stack)
    assert str(stack.provenance.quantization).startswith(f"{package}, ")
    assert str(stack.provenance.packages).startswith(f"{package} ")
    if package == "bitsandbytes":
        with pytest.raises(DeviceError, match="expected --dtype float32, got bfloat16"):
            load(tmp_path / "q", dtype="bfloat16")


def check_steps(stack: DecoderStack) -> None:
    """Check that layers computed one at a time give the model's own logits."""
    plan = stack.plan(random_ids(2, 12))
    hidden = plan.embedded
    for layer, call in enumerate(plan.calls, start=1):
        hidden = stack.step(layer, hidden, call)
    torch.testing.assert_close(stack.decode(hidden), logits(stack.model), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors_are_decompressed_before_they_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    settings = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format="int-quantized",
        quantization_status="initialized",
    )
    apply_quantization_config(model, settings)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.abs().amax(-1, keepdim=True) / 127)
    expected = logits(model)
    compressor = ModelCompressor.from_pretrained_model(model, "int-quantized")
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "q")
    compressor.update_config(str(tmp_path / "q"))
    tiny_tokenizer().save_pretrained(tmp_path / "q")

    stack = load(tmp_path / "q")
    measured = similarities(stack, random_ids(2, 12))
    assert measured.isfinite().all()
    torch.testing.assert_close(logits(stack.model), expected, atol=1e-5, rtol=1e-5)
    check_steps(stack)
    assert "activations of 8 bit" in str(stack.provenance.quantization)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "mxfp8", "gptq"])
def test_methods_that_a_gpu_or_a_package_would_decide_are_dequantized(method: str) -> None:
    config = LlamaConfig(quantization_config={"quant_method": method})
    scheme = quantization_of(config.to_dict(), "model")
    assert scheme is not None
    dequantize_when_read(config, scheme)
    assert config.quantization_config.get("dequantize", False) is (method != "gptq")
