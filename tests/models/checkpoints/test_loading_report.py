"""Every tensor of a checkpoint's decoder is loaded, or loading is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stacks import ALL_FAMILIES, one_line
from support.tiny_models import save_checkpoint, tiny_model
from torch import Tensor

from cascade.core.errors import ModelError
from cascade.models.loading import load

Weights = dict[str, Tensor]
UP = "model.layers.1.mlp.up_proj"


def edit(folder: Path, change: Callable[[Weights], object]) -> Path:
    """Change the stored weights of a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_config(folder: Path, **changes: object) -> Path:
    """Change the config of a folder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@ALL_FAMILIES
def test_a_saved_model_of_every_family_is_loaded_whole(family: str, tmp_path: Path) -> None:
    stack = load(save_checkpoint(tmp_path / "model", family))
    assert "unused_parts" not in repr(stack.provenance) or not stack.provenance.unused_parts
    torch.testing.assert_close(stack.model.state_dict(), tiny_model(family).state_dict())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_layers_that_the_config_does_not_count_are_refused(family: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", family, num_layers=4)
    config = json.loads((folder / "config.json").read_text())
    name = next(name for name in ("num_hidden_layers", "n_layer") if name in config)
    changes: dict[str, object] = {name: 3}
    if config.get("layer_types"):
        changes["layer_types"] = config["layer_types"][:3]
    with pytest.raises(ModelError) as error:
        load(with_config(folder, **changes))
    assert "config.json counts 3 layers, but the files have more, such as" in one_line(error)
    assert ".3." in one_line(error)


UNUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "quantization scales": (
        {f"{UP}.weight_scale": (1,), f"{UP}.input_scale": (1,)},
        f"quantization scales that are not applied, such as {UP}.input_scale (1 more)",
    ),
    "GPTQ's names": ({f"{UP}.qzeros": (2, 2)}, f"such as {UP}.qzeros"),
    "a bias": ({"lm_head.bias": (97,)}, "weights that llama does not use, such as lm_head.bias"),
    "a norm": ({"model.layers.2.extra_norm.weight": (32,)}, "layers.2.extra_norm.weight"),
    "without the model's prefix": ({"layers.1.mlp.up_proj.bias": (8,)}, "up_proj.bias"),
    "LoRA": ({f"{UP}.lora_A.default.weight": (2, 32)}, "an adapter that are not applied"),
    "LoRA by PEFT": (
        {"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": (2, 2)},
        "an adapter that are not applied",
    ),
}


@pytest.mark.parametrize("case", UNUSED)
def test_tensors_of_the_decoder_that_are_not_used_are_refused(case: str, tmp_path: Path) -> None:
    tensors, message = UNUSED[case]
    folder = save_checkpoint(tmp_path / "model")
    edit(folder, lambda w: w.update({name: torch.ones(size) for name, size in tensors.items()}))
    with pytest.raises(ModelError) as error:
        load(folder)
    assert message in one_line(error)


@pytest.mark.parametrize(
    "name", ["v_head.summary.weight", "mtp.layers.0.up.weight", "score.weight"]
)
def test_other_parts_of_the_files_are_allowed_and_recorded(name: str, tmp_path: Path) -> None:
    folder = edit(save_checkpoint(tmp_path / "m"), lambda w: w.update({name: torch.ones(2)}))
    assert load(folder).provenance.unused_parts == name.split(".")[0]


def test_a_causal_mask_in_the_files_is_no_weight(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda w: w.update({name: torch.ones(4)}))
    assert not load(folder).provenance.unused_parts


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    folder = edit(save_checkpoint(tmp_path / "m"), lambda w: w.pop(f"{UP}.weight"))
    with pytest.raises(ModelError) as error:
        load(folder)
    assert one_line(error) == (
        f"{folder} lacks 1 of its weights, the first is {UP}.weight; get the checkpoint again"
    )


def test_weights_under_another_name_are_named(tmp_path: Path) -> None:
    folder = edit(
        save_checkpoint(tmp_path / "m"),
        lambda w: w.update(other_up_proj=w.pop(f"{UP}.weight")),
    )
    with pytest.raises(ModelError) as error:
        load(folder)
    assert f"the first is {UP}.weight (and has other_up_proj, which it does not use)" in one_line(
        error
    )


def test_a_weight_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m")
    edit(folder, lambda w: w.update({f"{UP}.weight": torch.ones(5, 7)}))
    with pytest.raises(ModelError) as error:
        load(folder)
    assert f"{UP}.weight has the shape 5 x 7 in the files and " in one_line(error)


def test_a_config_of_another_vocabulary_is_refused_with_the_shapes(tmp_path: Path) -> None:
    folder = with_config(save_checkpoint(tmp_path / "m"), vocab_size=90)
    with pytest.raises(ModelError, match=r"97 x \d+ in the files and 90 x \d+ by config\.json"):
        load(folder)
