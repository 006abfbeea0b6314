"""The files that are read are those of `transformers`; integers are not read as weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stacks import one_line
from support.tiny_models import save_checkpoint, tiny_model

from cascade.core.errors import ModelError
from cascade.models.checkpoints.files import weight_files
from cascade.models.checkpoints.weights import resolve
from cascade.models.loading import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model")


def split_in_two(folder: Path) -> list[Path]:
    """Save another model's weights as two shards; return them and their index."""
    other = tiny_model("llama", seed=1)
    other.save_pretrained(folder / "other", max_shard_size="20KB")
    (folder / "other" / "config.json").unlink()
    moved = [shutil.move(path, folder / path.name) for path in (folder / "other").iterdir()]
    (folder / "other").rmdir()
    return sorted(map(Path, moved))


def test_a_single_file_is_read_before_shards_and_the_others_are_named(folder: Path) -> None:
    before = resolve(str(folder))
    split_in_two(folder)
    found = weight_files(folder, {})
    assert [path.name for path in found.read] == ["model.safetensors"]
    assert all(path.name.startswith("model-0") for path in found.others)
    assert len(found.others) > 1
    after = load(folder)
    assert after.provenance.weights_hash == before.hash
    assert str(after.provenance.unread_files).split(", ") == [path.name for path in found.others]
    torch.testing.assert_close(after.model.state_dict(), tiny_model("llama").state_dict())


def test_shards_are_read_where_there_is_no_single_file(folder: Path) -> None:
    shards = [path for path in split_in_two(folder) if path.suffix == ".safetensors"]
    (folder / "model.safetensors").unlink()
    assert list(weight_files(folder, {}).read) == shards
    torch.testing.assert_close(
        load(folder).model.state_dict(), tiny_model("llama", seed=1).state_dict()
    )


def test_a_missing_shard_is_named(folder: Path) -> None:
    shards = [path for path in split_in_two(folder) if path.suffix == ".safetensors"]
    (folder / "model.safetensors").unlink()
    shards[1].unlink()
    with pytest.raises(ModelError) as error:
        load(folder)
    assert one_line(error) == (
        f"{folder} lacks 1 of its {len(shards)} weight files: {shards[1].name}; get them again"
    )


def test_files_beside_the_weights_change_no_hash(folder: Path) -> None:
    before = resolve(str(folder))
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    (folder / "optimizer.bin").write_bytes(b"0")
    assert resolve(str(folder)) == before
    save_file({"x": torch.zeros(2)}, folder / "consolidated.safetensors")
    after = resolve(str(folder))
    assert after.hash == before.hash
    assert after.unread == ("consolidated.safetensors",)


def test_a_file_that_the_config_names_is_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "weights.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(load(folder).model.state_dict(), tiny_model("llama").state_dict())


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"weight_map": 3}', '{"weight_map": [2]}'])
def test_a_broken_index_gives_a_one_line_error(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json names no files of weights"):
        weight_files(folder, {})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_weights_without_their_scales_are_refused(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(folder)
    assert f"stores {name} as " in one_line(error)
    assert "quantization_config" in one_line(error)
