"""Exporting a drafter: the layout of the files, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.disk import contents
from support.tiny_drafters import DRAFTED, a_drafted_stack, stored
from support.tiny_models import tiny_model, tiny_tokenizer

from cascade.core.errors import ModelError, OutputError, RecordError, UsageError
from cascade.drafters.export.exporting import CONFIG, WEIGHTS, export_drafter
from cascade.drafters.network.drafter_network import embeddings_of
from cascade.drafters.stored import read_drafter
from cascade.models.stack import DecoderStack

TOKENS = torch.arange(1, 97, 2)


def exported(folder: Path, stack: DecoderStack | None = None, **settings: Any) -> Path:
    stack = stack or a_drafted_stack()
    if not (folder / "drafter").exists():
        stored(folder / "drafter", stack, "eagle3")
    return export_drafter(
        folder / "drafter", stack, folder / "out", **({"verifier": "tiny/model"} | settings)
    )


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("family", DRAFTED)
def test_tensors_have_the_names_and_shapes_of_the_layout(family: str, tmp_path: Path) -> None:
    found = load_file(exported(tmp_path, a_drafted_stack(family)) / WEIGHTS)
    wanted: dict[str, tuple[int, ...]] = {
        "fc.weight": (32, 96),
        "norm.weight": (32,),
        "lm_head.weight": (48, 32),
        "embed_tokens.weight": (97, 32),
        "layers.0.input_layernorm.weight": (32,),
        "layers.0.hidden_norm.weight": (32,),
        "layers.0.post_attention_layernorm.weight": (32,),
        "layers.0.self_attn.q_proj.weight": (32, 64),
        "layers.0.self_attn.k_proj.weight": (16, 64),
        "layers.0.self_attn.v_proj.weight": (16, 64),
        "layers.0.self_attn.o_proj.weight": (32, 32),
        "layers.0.mlp.gate_proj.weight": (48, 32),
        "layers.0.mlp.up_proj.weight": (48, 32),
        "layers.0.mlp.down_proj.weight": (32, 48),
    }
    if family == "qwen2":  # one option stands for the biases of all four
        sizes = zip(LINEAR, (32, 16, 16, 32), strict=True)
        wanted |= {f"layers.0.self_attn.{name}.bias": (size,) for name, size in sizes}
    if family == "qwen3":
        wanted |= {f"layers.0.self_attn.{name}_norm.weight": (8,) for name in "qk"}
    weights = {name: each for name, each in found.items() if name not in ("d2t", "t2d")}
    assert {name: tuple(each.shape) for name, each in weights.items()} == wanted
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}
    assert (found["d2t"].dtype, found["t2d"].dtype) == (torch.int64, torch.bool)
    assert (found["d2t"].shape, found["t2d"].shape) == ((48,), (97,))


def test_vocabulary_can_be_read_back_in_both_directions(tmp_path: Path) -> None:
    found = load_file(exported(tmp_path) / WEIGHTS)
    assert torch.equal(torch.arange(48) + found["d2t"], TOKENS)
    assert torch.equal(found["t2d"].nonzero()[:, 0], TOKENS)


def test_a_drafter_of_all_tokens_needs_no_tables(tmp_path: Path) -> None:
    stack = a_drafted_stack()
    stored(tmp_path / "drafter", stack, "eagle3", tokens=torch.arange(97), vocabulary=97)
    folder = exported(tmp_path)
    assert not {"d2t", "t2d"} & set(load_file(folder / WEIGHTS))
    assert config_of(folder)["draft_vocab_size"] == 97


@pytest.mark.parametrize("family", DRAFTED)
def test_weights_are_those_of_the_drafter_and_of_the_model(family: str, tmp_path: Path) -> None:
    stack = a_drafted_stack(family)
    found = load_file(exported(tmp_path, stack) / WEIGHTS)
    network: Any = read_drafter(tmp_path / "drafter", stack).network
    for name, weight in network.layer.state_dict().items():
        assert torch.equal(found[f"layers.0.{name}"], weight)
    head: Any = stack.lm_head
    assert torch.equal(found["lm_head.weight"], head.weight[TOKENS].bfloat16())
    assert torch.equal(found["embed_tokens.weight"], embeddings_of(stack).bfloat16())
    assert torch.equal(found["norm.weight"], network.norm.weight)
    # The network multiplies what it reads with 4, 1 and 1/2 instead.
    scaled = [4 * network.fc.weight[:, :32], network.fc.weight[:, 32:64]]
    scaled.append(network.fc.weight[:, 64:] / 2)
    assert torch.equal(found["fc.weight"], torch.cat(scaled, dim=1))


def test_biases_that_the_layer_lacks_are_zero(tmp_path: Path) -> None:
    found = load_file(exported(tmp_path, a_drafted_stack("qwen2")) / WEIGHTS)
    assert not found["layers.0.self_attn.o_proj.bias"].any()
    assert found["layers.0.self_attn.q_proj.bias"].any()


@pytest.mark.parametrize("family", DRAFTED)
def test_config_has_the_fields_that_loaders_read(family: str, tmp_path: Path) -> None:
    config = config_of(exported(tmp_path, a_drafted_stack(family)))
    assert config["speculators_model_type"] == "eagle3"
    assert config["draft_vocab_size"] == 48
    assert config["norm_before_residual"] is False
    # Layers 1, 3 and 4 are read: their inputs have passed 0, 2 and 3 layers.
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]
    layer = config["transformer_layer_config"]
    assert layer["model_type"] == ("qwen3" if family == "qwen3" else "llama")
    assert (layer["num_hidden_layers"], layer["vocab_size"], layer["hidden_size"]) == (1, 97, 32)
    assert layer["attention_bias"] == (family == "qwen2")
    assert layer["rope_parameters"]["rope_theta"] == layer["rope_theta"]
    assert layer["tie_word_embeddings"] is config["tie_word_embeddings"] is False
    assert layer["dtype"] == config["dtype"] == "bfloat16"
    speculation = config["speculators_config"]
    assert speculation["algorithm"] == "eagle3"
    assert speculation["default_proposal_method"] == "greedy"
    (method,) = speculation["proposal_methods"]
    assert (method["proposal_type"], method["speculative_tokens"]) == ("greedy", 3)
    classes = [type(a_drafted_stack(family).model).__name__]
    assert speculation["verifier"] == {"name_or_path": "tiny/model", "architectures": classes}


def test_config_says_where_the_drafter_comes_from(tmp_path: Path) -> None:
    folder = exported(tmp_path, command="cascade export-drafter")
    record = read_drafter(tmp_path / "drafter", a_drafted_stack()).record
    origin = config_of(folder)["cascade"]
    assert origin["drafter"] == record.sha256
    assert origin["command"] == "cascade export-drafter"
    assert origin["model"]["family"] == "llama"
    assert origin["model"]["weights_hash"] == a_drafted_stack().weights_hash()
    assert origin["accepted"] == record.accepted
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_nothing_else_is_written_and_equal_drafters_give_equal_files(tmp_path: Path) -> None:
    first = contents(exported(tmp_path))
    assert set(first) == {CONFIG, WEIGHTS}
    assert contents(exported(tmp_path, overwrite=True)) == first


def test_a_model_in_another_dtype_gives_the_same_weights(tmp_path: Path) -> None:
    hashes = {"weights_hash": "sha256:of the files"}
    model: Any = tiny_model("llama")
    stack = DecoderStack(model, tokenizer=tiny_tokenizer(), provenance=hashes)
    first = contents(exported(tmp_path, stack))
    rotary = copy.deepcopy(model.model.rotary_emb)  # which stays in fp32 when a model is loaded
    model.bfloat16().model.rotary_emb = rotary
    half = DecoderStack(model, tokenizer=tiny_tokenizer(), provenance=hashes)
    assert contents(exported(tmp_path, half, overwrite=True)) == first


# --- What is refused --------------------------------------------------------------------------


def test_a_drafter_of_the_usual_architecture_is_refused(tmp_path: Path) -> None:
    stored(tmp_path / "drafter")
    with pytest.raises(
        UsageError,
        match=r"expected a drafter of architecture eagle3, got cascade in .*; train one with "
        r"`cascade train-drafter --architecture eagle3`$",
    ):
        exported(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_drafter_of_another_model_is_refused(tmp_path: Path) -> None:
    exported(tmp_path)
    other = DecoderStack(tiny_model("llama", seed=1), tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match="weights_hash"):
        export_drafter(tmp_path / "drafter", other, tmp_path / "other", verifier="a/b")
    assert not (tmp_path / "other").exists()


def test_a_folder_without_a_drafter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"make one with `cascade train-drafter`"):
        export_drafter(tmp_path / "none", a_drafted_stack(), tmp_path / "out", verifier="a/b")


def test_an_earlier_export_is_replaced_only_on_request(tmp_path: Path) -> None:
    before = contents(exported(tmp_path))
    with pytest.raises(OutputError, match=r"holds an exported drafter: .* with --overwrite"):
        exported(tmp_path, verifier="another/model")
    assert contents(tmp_path / "out") == before
    exported(tmp_path, verifier="another/model", overwrite=True)
    assert contents(tmp_path / "out") != before


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_files_of_a_model_are_never_replaced(
    name: str, overwrite: bool, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"model_type": "llama"}')
    with pytest.raises(OutputError, match=f"holds {name} of another model; choose another"):
        exported(tmp_path, overwrite=overwrite)
    assert set(contents(tmp_path / "out")) == {name}


def test_a_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("text")
    with pytest.raises(OutputError, match="out is a file, expected a folder"):
        exported(tmp_path, overwrite=True)


# --- Where a server finds the model -----------------------------------------------------------


def named(source: str | None) -> DecoderStack:
    return DecoderStack(
        a_drafted_stack().model, tokenizer=tiny_tokenizer(), provenance={"source": source}
    )


def test_a_hub_id_and_a_folder_are_the_servers_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(source: str) -> str:
        folder = exported(tmp_path, named(source), verifier=None, overwrite=True)
        found: str = config_of(folder)["speculators_config"]["verifier"]["name_or_path"]
        return found

    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert name("owner/model") == "owner/model"
    assert name("model") == str(tmp_path / "model")


@pytest.mark.parametrize("source", ["smollm2-135m", "folder/model.gguf", None])
def test_other_sources_need_a_name_for_the_server(
    source: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.gguf").write_text("weights")
    shown = source or "a model in memory"
    with pytest.raises(UsageError, match=f"expected --verifier, .* as {shown} is neither"):
        exported(tmp_path, named(source), verifier=None)
    assert not (tmp_path / "out").exists()
