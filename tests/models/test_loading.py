"""Loading gives the model that was saved, on a device that can compute, or one line."""

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
from support.tiny_models import WIDTH, random_ids, save_checkpoint, tiny_model
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
def test_auto_is_the_processor_where_nothing_faster_is_at_hand(name: str) -> None:
    assert resolve_device(name, torch.bfloat16) == torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps")],
)
def test_auto_prefers_an_accelerator(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.device, torch.dtype]] = []
    ones = torch.ones

    def ones_here(*args: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        asked.append((device, dtype))
        return ones(*args, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "ones", ones_here)
    assert resolve_device("auto", torch.bfloat16) == torch.device(expected)
    assert asked == [(torch.device(expected), torch.bfloat16)]


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu cpu"])
def test_a_name_that_is_no_device_is_refused_with_the_names_that_are(name: str) -> None:
    with pytest.raises(DeviceError) as error:
        resolve_device(name, torch.float32)
    assert str(error.value) == f"expected a device among auto, cpu, got {name}"


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "meta"])
def test_an_absent_device_is_refused_with_what_is_there(name: str) -> None:
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
def test_a_device_that_lacks_the_dtype_is_refused_with_both_names(
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
def test_a_checkpoint_loads_as_the_model_that_was_saved(family: str, tmp_path: Path) -> None:
    loaded = load(str(save_checkpoint(tmp_path / family, family)))
    check_capture_contract(loaded)
    ids = random_ids()
    expected = own_run(a_stack(family).model, ids).logits
    assert difference(own_run(loaded.model, ids).logits, expected) == 0.0


def test_loading_records_where_the_weights_come_from(saved: Path) -> None:
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


def test_an_unknown_dtype_is_refused_with_the_known_ones(saved: Path) -> None:
    with pytest.raises(DeviceError) as error:
        load(str(saved), dtype="float8")
    assert one_line(error) == "expected --dtype among float32, bfloat16, float16, got float8"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_is_taken_as_itself_and_as_its_name(dtype: torch.dtype | str, saved: Path) -> None:
    assert load(saved, dtype=dtype).dtype == torch.bfloat16


def test_an_unsupported_torch_dtype_is_refused_with_the_supported_ones(saved: Path) -> None:
    with pytest.raises(DeviceError) as error:
        load(saved, dtype=torch.float64)
    assert one_line(error) == "expected --dtype among float32, bfloat16, float16, got float64"


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")])
def test_a_device_map_places_the_same_model(device_map: Any, saved: Path) -> None:
    ids = random_ids()
    expected = own_run(load(saved).model, ids).logits
    assert difference(own_run(load(saved, device_map=device_map).model, ids).logits, expected) == 0


def test_device_and_device_map_together_are_refused(saved: Path) -> None:
    with pytest.raises(UsageError) as error:
        load(saved, device="cuda", device_map="auto")
    assert one_line(error) == "expected device or device_map, got cuda and auto"


def test_an_unknown_device_map_is_refused_with_what_to_check(saved: Path) -> None:
    with pytest.raises(ModelError) as error:
        load(saved, device_map="everywhere")
    assert one_line(error).startswith(f"cannot read the weights of {saved}: ")
    assert str(error.value).endswith("; check device_map, or get the checkpoint again")


def test_weights_that_a_device_map_offloads_to_disk_are_refused(saved: Path) -> None:
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    layers = [f"model.layers.{number}" for number in range(LAYERS)]
    device_map: dict[str, str | int | torch.device] = dict.fromkeys([*parts, *layers], "cpu")
    load(saved, device_map=device_map)
    with pytest.raises(ModelError) as error:
        load(saved, device_map=device_map | {"model.layers.2": "disk"})
    assert one_line(error) == (
        f"device_map leaves 9 weights of {saved} on no device, "
        "model.layers.2.self_attn.q_proj.weight first; expected memory for all of them: "
        "use more devices or a narrower dtype"
    )


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_kernel_can_be_chosen_and_is_recorded(name: str, saved: Path) -> None:
    stack = load(saved, attn_implementation=name)
    assert stack.model.config._attn_implementation == name
    assert stack.provenance.attention == name
    check_capture_contract(stack)


def test_an_unknown_attention_kernel_is_refused_with_what_to_check(saved: Path) -> None:
    with pytest.raises(ModelError) as error:
        load(saved, attn_implementation="nonsense")
    assert "nonsense" in one_line(error)
    assert str(error.value).endswith("; check attn_implementation, or get the checkpoint again")


def test_missing_weights_are_counted_and_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.2.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error) == (
        f"{folder} lacks 2 of its weights, model.layers.2.mlp.up_proj.weight first; "
        "get the checkpoint again"
    )


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"cannot read the weights of {folder}: ")


def test_a_weight_that_is_not_finite_is_refused_on_loading(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.3.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"decoder layer 4: model\.layers\.3\.self_attn\.q_proj"):
        load(str(folder))


@pytest.mark.parametrize("kept", [0, 7, 100, -1], ids=["empty", "no_header", "torn", "one_less"])
def test_truncated_weights_are_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"cannot read the weights of {folder}: ")
    assert str(error.value).endswith("; get the checkpoint again")


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    tiny = save_checkpoint(tmp_path / "sharded")
    (tiny / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(tiny, max_shard_size="40KB")
    shards = sorted(tiny.glob("*.safetensors"))
    assert len(shards) > 2
    load(str(tiny))
    shards[1].unlink()
    with pytest.raises(ModelError) as error:
        load(str(tiny))
    assert one_line(error).startswith(f"cannot read the weights of {tiny}: ")
    assert shards[1].name in str(error.value)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(
        f"cannot read the tokenizer of {folder} (expected tokenizer.json or its like in {folder})"
    )


def test_a_torn_tokenizer_is_refused(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"cannot read the tokenizer of {folder}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": "llama",', "config.json is not JSON ("),
        ("", "config.json is not JSON ("),
        ("\x80", "config.json is not JSON ("),
        ("[]", "config.json is no model config"),
        ("null", "config.json is no model config"),
        ('{"quantization_config": 4}', "config.json is no model config"),
        ("{}", "cannot read the config of "),
        ('{"model_type": "nonsense"}', "cannot read the config of "),
    ],
)
def test_a_broken_config_is_refused(folder: Path, text: str, said: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert said in one_line(error)
    assert str(error.value).endswith("; get the checkpoint again")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        load(str(tmp_path))
    assert (
        one_line(error) == f"{tmp_path} holds no config.json; expected a saved transformers model"
    )


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"{folder} holds no weights (*.safetensors or *.bin)")


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "t5", "distilbert"])
def test_an_unsupported_family_is_refused_before_any_weight_is_read(
    family: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"unreadable")
    with pytest.raises(UnsupportedModelError, match=f"^{family} "):
        load(str(tmp_path))


def test_a_revision_of_a_local_folder_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="--revision belongs to hub models"):
        load(str(saved), revision="main")


def test_an_absent_device_is_refused_before_the_weights_are_looked_for() -> None:
    with pytest.raises(DeviceError, match="expected a device among"):
        load("/no/such/folder", device="nonsense")
