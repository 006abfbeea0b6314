"""A PEFT adapter is applied to its base model and recorded, or refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from support.stacks import one_line
from support.tiny_models import random_ids, save_checkpoint, tiny_model
from torch import Tensor

from cascade.core.errors import ModelError
from cascade.models.loading import borrowed, load
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import similarities

# peft 0.21 reads it from transformers 5.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def an_adapter(seed: int = 0) -> PeftModel:
    """Return a tiny Llama with LoRA in all layers that changes what they compute."""
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_model("llama"), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return adapted


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Save an adapter next to its base model; return its folder."""
    save_checkpoint(tmp_path / "base")
    an_adapter().save_pretrained(tmp_path / "tuned")
    return name_base(tmp_path / "tuned", "../base")


def name_base(folder: Path, base: str | None) -> Path:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(config))
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(random_ids(2, 12)).logits
    return found


def test_an_adapter_is_applied_to_the_base_that_it_names(adapter: Path) -> None:
    stack = load(adapter)
    expected = logits(an_adapter())
    torch.testing.assert_close(logits(stack.model), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(tiny_model("llama"))).abs().max() > 0.01
    assert stack.provenance.adapter == str(adapter / "../base")
    assert str(stack.provenance.name).endswith("--tuned")


def test_merged_and_unmerged_the_similarities_are_the_same(adapter: Path) -> None:
    ids = random_ids(2, 12)
    torch.testing.assert_close(
        similarities(load(adapter), ids),
        similarities(DecoderStack(an_adapter()), ids),
        atol=1e-5,
        rtol=0,
    )


KINDS = {
    "DoRA": lambda: LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
    "rank patterns": lambda: LoraConfig(
        r=2, rank_pattern={"layers.1.self_attn.q_proj": 4}, target_modules=["q_proj", "up_proj"]
    ),
    "biases": lambda: LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"]),
    "whole modules": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    ),
    "IA3": lambda: IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "adaption prompts": lambda: AdaptionPromptConfig(adapter_len=2, adapter_layers=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_every_kind_are_applied(kind: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base")
    config = KINDS[kind]()
    config.task_type = "CAUSAL_LM"
    adapted = get_peft_model(tiny_model("llama"), config).eval()
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, adapted.parameters()):
            weight.add_(0.1)
    adapted.save_pretrained(tmp_path / "tuned")
    stack = load(name_base(tmp_path / "tuned", "../base"))
    torch.testing.assert_close(logits(stack.model), logits(adapted), atol=1e-4, rtol=1e-4)
    assert (logits(adapted) - logits(tiny_model("llama"))).abs().max() > 0.01


def test_adapters_that_add_virtual_tokens_are_refused(tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_model("llama"), config)
    adapted.save_pretrained(tmp_path / "tuned")
    for measured in (lambda: load(tmp_path / "tuned"), lambda: DecoderStack(adapted)):
        with pytest.raises(ModelError) as error:
            measured()
        assert "PROMPT_TUNING, which adds virtual tokens" in one_line(error)


def test_an_adapter_on_the_hub_is_applied_to_its_base_on_the_hub(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    expected = load(adapter)
    name_base(adapter, "acme/base")
    for name, commit in (("base", "a" * 40), ("tuned", "b" * 40)):
        repository = hub / f"models--acme--{name}"
        shutil.copytree(tmp_path / name, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    stack = load("acme/tuned")
    torch.testing.assert_close(logits(stack.model), logits(expected.model), atol=0, rtol=0)
    assert stack.provenance.name == "acme--tuned"
    assert stack.provenance.revision == "b" * 40
    assert stack.provenance.adapter == "acme/base"


def test_an_adapter_of_an_adapter_is_refused(adapter: Path) -> None:
    shutil.copytree(adapter, adapter.parent / "again")
    with pytest.raises(ModelError, match="tuned, which is an adapter itself; expected a model"):
        load(name_base(adapter.parent / "again", "../tuned"))


@pytest.mark.parametrize(
    ("layers", "text"), [(3, "its base model has no place for base_"), (6, "it lacks base_model.")]
)
def test_an_adapter_of_other_layers_is_refused(layers: int, text: str, adapter: Path) -> None:
    save_checkpoint(adapter.parent / "other", num_layers=layers)
    with pytest.raises(ModelError) as error:
        load(name_base(adapter, "../other"))
    assert text in one_line(error)


def test_folders_of_adapters_are_named(adapter: Path) -> None:
    shutil.rmtree(adapter.parent / "base")
    with pytest.raises(ModelError) as error:
        load(adapter.parent)
    assert "holds adapters in folders of their own (tuned)" in one_line(error)


def test_cards_next_to_an_adapter_are_no_model(adapter: Path) -> None:
    (adapter / "modelcard.json").write_text("{}")
    assert load(adapter).provenance.adapter == str(adapter / "../base")


def test_the_hash_covers_base_and_adapter(adapter: Path) -> None:
    def found() -> str:
        return str(load(adapter).provenance.weights_hash)

    first = found()
    assert found() == first
    an_adapter(seed=1).save_pretrained(adapter)
    name_base(adapter, "../base")
    second = found()
    save_checkpoint(adapter.parent / "base", seed=1)
    assert len({first, second, found()}) == 3


def test_a_model_of_peft_in_memory_is_measured_with_its_adapter() -> None:
    adapted = an_adapter()
    adapted.train()
    with borrowed(adapted, None) as stack:
        torch.testing.assert_close(logits(stack.model), logits(an_adapter()))
        with_adapter = stack.provenance.weights_hash
    assert adapted.training
    with borrowed(tiny_model("llama"), None) as stack:
        assert stack.provenance.weights_hash != with_adapter


def test_an_adapter_next_to_a_model_is_refused(adapter: Path) -> None:
    for file in (adapter.parent / "base").iterdir():
        shutil.copy(file, adapter)
    with pytest.raises(ModelError) as error:
        load(adapter)
    assert "holds an adapter (adapter_config.json) and a model (model.safetensors)" in one_line(
        error
    )


@pytest.mark.parametrize("base", [None, ""])
def test_an_adapter_without_a_base_is_refused(adapter: Path, base: str | None) -> None:
    with pytest.raises(ModelError, match="names no base_model_name_or_path; add the path"):
        load(name_base(adapter, base))


def test_an_adapter_of_another_model_is_refused(adapter: Path) -> None:
    save_checkpoint(adapter.parent / "wide", hidden_size=64)
    with pytest.raises(ModelError) as error:
        load(name_base(adapter, "../wide"))
    assert "cannot apply the adapter" in one_line(error)


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_a_torn_adapter_is_refused(adapter: Path, cut: int) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match="cannot apply the adapter"):
        load(adapter)


def test_an_adapter_without_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks the weights of its adapter"):
        load(adapter)


def test_without_peft_one_line_names_the_package(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError) as error:
        load(adapter)
    assert "`pip install cascade-exit[peft]`" in one_line(error)


def test_wrappers_of_training_are_taken_off() -> None:
    plain = tiny_model("llama")
    stack = DecoderStack(torch.nn.DataParallel(plain))  # type: ignore[arg-type]
    assert stack.model is plain
    with pytest.raises(ModelError, match="expected a causal language model of transformers, got L"):
        DecoderStack(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
