"""Damaged and incomplete checkpoints are refused with the file or setting, and what to do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stacks import one_line
from support.tiny_models import save_checkpoint

from cascade.core.errors import ModelError
from cascade.models.checkpoints.reading import cannot_read
from cascade.models.checkpoints.weights import resolve
from cascade.models.loading import load

Damage = Callable[[Path], object]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
UP = "model.layers.0.mlp.up_proj"


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def config(**settings: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return damage


def renamed(change: Callable[[str], str]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = {change(name): value for name, value in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})

    return damage


def moved(name: str) -> Damage:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def pickled_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Code()}, folder / "pytorch_model.bin")


def sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


CASES: dict[str, tuple[Damage, list[str]]] = {
    "eps is an integer": (config(rms_norm_eps=0), ["'rms_norm_eps'", "(value: 0)", "config.json"]),
    "positions are null": (
        config(max_position_embeddings=None),
        ["'max_position_embeddings'", "(value: None)", "correct config.json"],
    ),
    "heads do not divide the width": (config(num_attention_heads=5), ["heads (5)", "config.json"]),
    "unknown scaling": (
        config(rope_parameters={"rope_type": "lineer", "factor": 4.0, "rope_theta": 1e4}),
        ["lineer", "correct config.json"],
    ),
    "unknown activation": (config(hidden_act="siluu"), ["knows no siluu", "correct config.json"]),
    "no family": (config(model_type=None), ["names no model_type", "add the family"]),
    "unknown family": (config(model_type="llamma"), ["model_type llamma", "update transformers"]),
    "sampling settings are torn": (text("generation_config.json", "{"), ["is not JSON"]),
    "config is a pointer": (text("config.json", POINTER), ["config.json is a Git LFS pointer"]),
    "weights are a pointer": (
        text("model.safetensors", POINTER),
        ["model.safetensors is a Git LFS pointer", "run `git lfs pull` in"],
    ),
    "tokenizer is a pointer": (text("tokenizer.json", POINTER), ["json is a Git LFS pointer"]),
    "weights are empty": (text("model.safetensors", ""), ["is empty (0 bytes)", "get it again"]),
    "weights are a web page": (
        text("model.safetensors", "<!DOCTYPE html><html>404</html>"),
        ["model.safetensors is truncated or is no safetensors file", "31 bytes"],
    ),
    "weights are pickled code": (pickled_code, ["Python objects", "never loaded", "safetensors"]),
    "shards without an index": (
        moved("model-00001-of-00003.safetensors"),
        ["holds 1 files of weights, but no model.safetensors.index.json", "get that file"],
    ),
    "weights under another name": (
        moved("weights.safetensors"),
        ["got weights.safetensors; rename it to model.safetensors"],
    ),
    "weights of another format": (moved("tf_model.h5"), ["got tf_model.h5; convert them"]),
    "GGUF in the folder": (moved("tiny.gguf"), ["give --model", "tiny.gguf"]),
    "names of DataParallel": (
        renamed(lambda name: f"module.{name}"),
        ["module.lm_head.weight where lm_head.weight is expected", 'added "module."'],
    ),
    "names of peft": (
        renamed(lambda name: f"base_model.model.{name}"),
        ['added "base_model.model."', "save the model without the wrapper"],
    ),
    "names of a compiled layer": (
        renamed(lambda name: name.replace("layers.0.", "layers.0._orig_mod.")),
        ['added "_orig_mod."'],
    ),
    "packed weights": (
        renamed(lambda name: name.replace(f"{UP}.weight", f"{UP}.qweight")),
        [f"quantized weights, such as {UP}.qweight", "no quantization_config"],
    ),
    "tokenizer is torn": (text("tokenizer.json", "{"), ["tokenizer.json is not JSON"]),
    "tokenizer settings are torn": (
        text("tokenizer_config.json", "{"),
        ["tokenizer_config.json is not JSON"],
    ),
    "tokenizer needs sentencepiece": (
        sentencepiece,
        ["tokenizer.model, which needs the package sentencepiece", "`pip install sentencepiece`"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_checkpoint_is_refused_with_its_remedy(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "tokenizer needs sentencepiece":
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.chdir(tmp_path)
    damage, fragments = CASES[case]
    folder = save_checkpoint(tmp_path / "m", num_layers=2)
    damage(folder)
    with pytest.raises(ModelError) as error:
        load(folder)
    for fragment in fragments:
        assert fragment in one_line(error)
    assert not (tmp_path / "ran").exists()


def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    error = cannot_read(tmp_path / "config.json", PermissionError(13, "Permission denied"))
    assert str(error).endswith("config.json: Permission denied; change its permissions")


def test_a_gated_model_says_how_to_get_access(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError) as error:
        resolve("acme/gated")
    assert "it is gated; accept its terms on https://huggingface.co/acme/gated" in one_line(error)


def test_without_the_hub_the_error_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as error:
        resolve("acme/absent")
    assert "HF_HUB_OFFLINE is set" in one_line(error)
    assert "unset HF_HUB_OFFLINE" in one_line(error)
