"""Loading returns the saved model on a usable device, or raises a one-line error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stacks import (
    ALL_FAMILIES,
    LAYERS,
    a_stack,
    check_capture_contract,
    difference,
    one_line,
    own_run,
)
from support.tiny_models import WIDTH, random_ids, save_checkpoint
from torch import Tensor
from transformers import AutoConfig

from cascade.core.errors import DeviceError, ModelError, UnsupportedModelError, UsageError
from cascade.core.schema import to_plain
from cascade.models.loading import load, resolve_device


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_auto_is_the_cpu_without_an_accelerator(name: str) -> None:
    assert resolve_device(name, torch.bfloat16) == torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps")],
)
def test_auto_prefers_an_accelerator(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[torch.device, torch.dtype]] = []
    ones = torch.ones

    def ones_here(*args: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        calls.append((device, dtype))
        return ones(*args, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "ones", ones_here)
    assert resolve_device("auto", torch.bfloat16) == torch.device(expected)
    assert calls == [(torch.device(expected), torch.bfloat16)]


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu cpu"])
def test_error_for_an_invalid_device_lists_the_valid_ones(name: str) -> None:
    with pytest.raises(DeviceError) as error:
        resolve_device(name, torch.float32)
    assert str(error.value) == f"expected a device among auto, cpu, got {name}"


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "meta"])
def test_error_for_an_absent_device_lists_the_available_ones(name: str) -> None:
    with pytest.raises(DeviceError) as error:
        resolve_device(name, torch.float32)
    assert one_line(error) == f"no {name} device on this machine; use --device cpu"


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'\nand a stack of frames"),
        TypeError("BFloat16 is not supported on MPS"),
        RuntimeError(""),
    ],
)
def test_error_for_an_unsupported_dtype_names_device_and_dtype(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def matmul(*_: Any) -> Tensor:
        raise failure

    monkeypatch.setattr(Tensor, "__matmul__", matmul)
    with pytest.raises(DeviceError) as error:
        resolve_device("cpu", torch.float16)
    assert one_line(error).startswith("cpu cannot compute in float16 (")
    assert str(error.value).endswith("; use --dtype float32 or another --device")
    assert (str(failure).split("\n")[0] or "RuntimeError") in str(error.value)


@ALL_FAMILIES
def test_loaded_checkpoint_equals_the_saved_model(family: str, tmp_path: Path) -> None:
    loaded = load(str(save_checkpoint(tmp_path / family, family)))
    check_capture_contract(loaded)
    ids = random_ids()
    expected = own_run(a_stack(family).model, ids).logits
    assert difference(own_run(loaded.model, ids).logits, expected) == 0.0


def test_load_records_provenance(saved: Path) -> None:
    stack = load(str(saved), dtype="bfloat16")
    assert stack.dtype == torch.bfloat16
    assert stack.tokenizer is not None
    assert stack.tokenizer.convert_ids_to_tokens(stack.tokenizer("a b").input_ids) == [*"a b"]
    provenance = to_plain(stack.provenance)
    hashes = {provenance.pop("weights_hash"), provenance.pop("tokenizer_hash")}
    assert {name.split(":")[0] for name in hashes} == {"sha256"}
    assert len(hashes) == 2
    assert provenance == {
        "family": "llama",
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "dtype": "bfloat16",
        "device": "cpu",
        "attention": "sdpa",
        "source": str(saved),
        "name": "tiny",
        "revision": None,
        "quantization": None,
    }


def test_error_for_an_unknown_dtype_lists_the_supported_ones(saved: Path) -> None:
    with pytest.raises(DeviceError) as error:
        load(str(saved), dtype="float8")
    assert one_line(error) == "expected --dtype among float32, bfloat16, float16, got float8"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_load_accepts_a_torch_dtype_and_its_name(dtype: torch.dtype | str, saved: Path) -> None:
    assert load(saved, dtype=dtype).dtype == torch.bfloat16


def test_error_for_an_unsupported_torch_dtype_lists_the_supported_ones(saved: Path) -> None:
    with pytest.raises(DeviceError) as error:
        load(saved, dtype=torch.float64)
    assert one_line(error) == "expected --dtype among float32, bfloat16, float16, got float64"


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")])
def test_device_map_gives_the_same_results(device_map: Any, saved: Path) -> None:
    ids = random_ids()
    expected = own_run(load(saved).model, ids).logits
    assert difference(own_run(load(saved, device_map=device_map).model, ids).logits, expected) == 0


def test_device_and_device_map_together_are_rejected(saved: Path) -> None:
    with pytest.raises(UsageError) as error:
        load(saved, device="cuda", device_map="auto")
    assert one_line(error) == "expected device or device_map, got cuda and auto"


def test_error_for_an_unknown_device_map_says_what_to_check(saved: Path) -> None:
    with pytest.raises(ModelError) as error:
        load(saved, device_map="everywhere")
    assert one_line(error).startswith(f"cannot read the weights of {saved}: ")
    assert str(error.value).endswith("; check device_map, or get the checkpoint again")


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_kernel_is_used_and_recorded(name: str, saved: Path) -> None:
    stack = load(saved, attn_implementation=name)
    assert stack.model.config._attn_implementation == name
    assert stack.provenance.attention == name
    check_capture_contract(stack)


def test_error_for_an_unknown_attention_kernel_says_what_to_check(saved: Path) -> None:
    with pytest.raises(UsageError) as error:
        load(saved, attn_implementation="nonsense")
    assert one_line(error).startswith("attn_implementation nonsense cannot run here: it needs ")
    assert str(error.value).endswith("; use sdpa or eager")


def test_error_counts_and_names_missing_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.2.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error) == (
        f"{folder} lacks 2 of its weights, the first is model.layers.2.mlp.up_proj.weight; "
        "get the checkpoint again"
    )


def test_weight_of_another_shape_is_rejected(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error) == (
        f"{folder}: model.norm.weight has the shape {WIDTH - 1} in the files and {WIDTH} by "
        "config.json; expected a config.json of these weights, get both from the same checkpoint"
    )


def test_load_rejects_a_non_finite_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.3.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"decoder layer 4: model\.layers\.3\.self_attn\.q_proj"):
        load(str(folder))


@pytest.mark.parametrize("kept", [0, 7, 100, -1], ids=["empty", "no_header", "torn", "one_less"])
def test_truncated_weights_are_rejected(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"{file} is ")
    assert "truncated" in one_line(error) or "empty (0 bytes)" in one_line(error)
    assert str(error.value).endswith("; get it again")


def test_missing_tokenizer_is_rejected(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error) == (
        f"cannot read the tokenizer of {folder}: {folder} holds none; expected tokenizer.json or"
        " similar, copy the tokenizer's files from the model that it was made from"
    )


def test_truncated_tokenizer_is_rejected(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"{file} is not JSON (")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama",', "config.json is not JSON ("),
        ("", "config.json is not JSON ("),
        ("\x80", "config.json is not JSON ("),
        ("[]", "config.json is not a JSON object, but a list; get it again"),
        ("null", "config.json is not a JSON object, but a NoneType"),
        ("{}", "config.json names no model_type (got None); add the family"),
        ('{"model_type": "nonsense"}', "; correct it in config.json, or update transformers"),
        ('{"model_type": "llama", "rms_norm_eps": 0}', "expected float, got int (value: 0)"),
        ('{"model_type": "llama", "max_position_embeddings": null}', "got NoneType (value: None)"),
    ],
)
def test_broken_config_is_rejected(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert message in one_line(error)


def test_folder_without_config_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        load(str(tmp_path))
    assert (
        one_line(error) == f"{tmp_path} holds no config.json; expected a saved transformers model"
    )


def test_folder_without_weights_is_rejected(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"{folder} holds no weights: expected model.safetensors or ")


@pytest.mark.parametrize("family", ["t5", "distilbert"])
def test_unsupported_family_is_rejected_before_weights_are_read(
    family: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    save_file({"of another model": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=f"^{family} "):
        load(str(tmp_path))


def test_revision_of_a_local_folder_is_rejected(saved: Path) -> None:
    with pytest.raises(ModelError, match="--revision belongs to hub models"):
        load(str(saved), revision="main")


def test_invalid_device_is_rejected_before_weights_are_resolved() -> None:
    with pytest.raises(DeviceError, match="expected a device among"):
        load("/no/such/folder", device="nonsense")
