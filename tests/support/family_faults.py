"""Faults of parts that SmolLM2 does not have, planted in tiny models of the families that do.

Each is a context manager, as those of `support.faults`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cascade.corpora.blocks import TokenBlocks
from cascade.gate.baselines import StoredProfile, seal
from cascade.models.stack import DecoderStack
from cascade.saturation import profile as saturation
from cascade.saturation.model_parts import parts_of
from cascade.saturation.profile import analyze
from support.family_configs import tiny_config
from support.faults import Plant, attribute_of, weights
from support.tiny_models import perturbed, tiny_model

ABOUT = {"name": "tiny", "weights_hash": "w", "tokenizer_hash": "t"}


@dataclass(frozen=True)
class FamilyFault:
    """A fault of one family, and what the gate is to make of it.

    Attributes:
        family: The model type.
        what: For the table.
        plant: Breaks a model or the path, and mends it on leaving.
        cause: The kind of the cause; None where the fault cannot be seen.
        layer: The layer that has to be named.
        named: The named cause; None where none may be named.
        without_parts: The named cause if the baseline has no parts of its model.
        reason: Why it is not seen.
    """

    family: str
    what: str
    plant: Plant
    cause: str | None
    layer: str | None = None
    named: str | None = None
    without_parts: str | None = None
    reason: str = ""


def family_stack(family: str) -> DecoderStack:
    """Return a tiny model of a family of `support.tiny_models` or of `transformers`."""
    if family == "qwen3_moe":
        torch.manual_seed(0)
        made = perturbed(AutoModelForCausalLM.from_config(tiny_config(family, norm_topk_prob=True)))
    elif family == "gemma2":
        made = tiny_model(family, attn_logit_softcapping=1.0)  # its own, 50, caps nothing here
    else:
        made = tiny_model(family)
    return DecoderStack(made, provenance=ABOUT)


def random_blocks(sequences: int = 40, length: int = 16) -> TokenBlocks:
    ids = np.random.default_rng(0).integers(2, 97, (sequences, length)).astype(np.int32)
    return TokenBlocks(ids, "random", "random", sequences)


def baseline_of(
    stack: DecoderStack, blocks: TokenBlocks, *, with_parts: bool = True
) -> StoredProfile:
    """Return a baseline of a model, as `cascade analyze` and `cascade accept` make it."""
    profile = analyze(stack, blocks)
    if with_parts:
        profile = replace(profile, parts=parts_of(stack))
    return StoredProfile(seal(profile.record(), profile.arrays()), profile.arrays(), profile.rows)


# --- Positions -------------------------------------------------------------------------------


def left_padding(left: int) -> Plant:
    """Pad each batch on the left, with a mask and without position ids."""

    def plant(_: DecoderStack) -> Any:
        @torch.no_grad()
        def similarities(stack: DecoderStack, ids: Tensor) -> Tensor:
            padding = ids.new_full((len(ids), left), 1)
            mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
            rows = torch.cat([padding, ids], dim=1)
            positions = torch.arange(rows.shape[1])[None]
            visitor = saturation.SimilarityVisitor()
            with stack.visiting(visitor) as decoder:
                final = decoder(
                    input_ids=rows, attention_mask=mask, position_ids=positions, use_cache=False
                ).last_hidden_state
            return visitor.finish(final)[..., left:]

        return attribute_of(saturation, "similarities", similarities)

    return plant


def learned_positions_rolled(stack: DecoderStack) -> Any:
    table: Any = stack.decoder.wpe
    rolled = table.weight.data.roll(-1, dims=0)
    return weights(table, lambda: table.weight.data.copy_(rolled))


def learned_positions_late(stack: DecoderStack) -> Any:
    table: Any = stack.decoder.wpe
    forward = table.forward
    return attribute_of(table, "forward", lambda ids: forward(ids + 1))


# --- Experts ---------------------------------------------------------------------------------


def _routers(stack: DecoderStack) -> list[nn.Module]:
    return [module for module in stack.model.modules() if "Router" in type(module).__name__]


def router_setting(name: str, value: object) -> Plant:
    @contextlib.contextmanager
    def plant(stack: DecoderStack) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for router in _routers(stack):
                patch.setattr(router, name, value)
            yield

    return plant


def routed(*, experts: int = 4, is_normalized: bool = True, top_k: int | None = None) -> Plant:
    """Route as Mixtral and Qwen do, but for one of the arguments."""

    @contextlib.contextmanager
    def plant(stack: DecoderStack) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for router in _routers(stack):

                def forward(hidden: Tensor, router: Any = router) -> Any:
                    logits = functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
                    logits[:, experts:] = -torch.inf
                    top = torch.topk(logits.softmax(dim=-1), top_k or router.top_k, dim=-1)
                    scores, chosen = top.values, top.indices
                    if is_normalized:
                        scores = scores / scores.sum(dim=-1, keepdim=True)
                    return logits, scores, chosen

                patch.setattr(router, "forward", forward)
            yield

    return plant


def _settings(name: str, value: object) -> Plant:
    """Give every module and the config that has a setting another value."""

    @contextlib.contextmanager
    def plant(stack: DecoderStack) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner in (*stack.model.modules(), stack.model.config):
                if name in vars(owner):
                    patch.setattr(owner, name, value)
            yield

    return plant


# --- Heads -----------------------------------------------------------------------------------


@contextlib.contextmanager
def tied_embedding(stack: DecoderStack) -> Iterator[None]:
    """Give the LM head the embedding's weights, as a wrong `tie_word_embeddings` does."""
    head, before = stack.lm_head, stack.lm_head.weight
    head.weight = stack.model.get_input_embeddings().weight
    try:
        yield
    finally:
        head.weight = before


def embedding_of_the_head(stack: DecoderStack) -> Any:
    """Give the embedding the LM head's weights."""
    embedding, head = stack.model.get_input_embeddings(), stack.lm_head
    return weights(embedding, lambda: embedding.weight.data.copy_(head.weight.data))


no_softcap = _settings("final_logit_softcapping", None)


# --- Adapters --------------------------------------------------------------------------------


def adapter_of(family: str, folder: Path) -> None:
    """Save a LoRA adapter of the queries and values of a tiny model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(family), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros, before training
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)


def merged(family: str, folder: Path, *, times: int = 1, scale: float = 1.0) -> DecoderStack:
    """Return a tiny model with a saved adapter merged into its weights, as `peft` does it.

    Args:
        family: The model type.
        folder: The saved adapter.
        times: How often it is merged.
        scale: Multiplies the adapter's own scale.
    """
    from peft import PeftModel

    model: Any = tiny_model(family)
    for _ in range(times):
        with_adapter = PeftModel.from_pretrained(model, folder)
        for module in with_adapter.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling = {key: value * scale for key, value in module.scaling.items()}
        model = with_adapter.merge_and_unload()
    return DecoderStack(model, provenance=ABOUT)


# --- The list --------------------------------------------------------------------------------

FAMILY_FAULTS = {
    "left padding": FamilyFault(
        "gpt2",
        "GPT-2: left padding that shifts positions by 5",
        left_padding(5),
        "model",
        "1",
        "positions shifted",
        without_parts="positions shifted",
    ),
    "rotary left padding": FamilyFault(
        "llama",
        "Llama: left padding that shifts positions by 5",
        left_padding(5),
        None,
        reason="rotary attention depends on distances only, so the numbers are right",
    ),
    "late positions": FamilyFault(
        "gpt2",
        "GPT-2: positions begin at 1",
        learned_positions_late,
        "model",
        "1",
        "positions shifted",
        without_parts="positions shifted",
    ),
    "rolled positions": FamilyFault(
        "gpt2",
        "GPT-2: the table of positions shifted by one row",
        learned_positions_rolled,
        "model",
        "1",
        "weights changed",
        without_parts="positions shifted",
    ),
    "top k": FamilyFault(
        "qwen3_moe",
        "Qwen3-MoE: each token goes to 1 expert instead of 2",
        router_setting("top_k", 1),
        "model",
        "1",
        "setting top_k",
        without_parts="experts per token",
    ),
    "unnormalized": FamilyFault(
        "qwen3_moe",
        "Qwen3-MoE: weights of experts not normalized, by a setting",
        router_setting("norm_topk_prob", False),
        "model",
        "1",
        "setting norm_topk_prob",
        without_parts="weights of experts",
    ),
    "unnormalized in code": FamilyFault(
        "mixtral",
        "Mixtral: weights of experts not normalized, in code",
        routed(is_normalized=False),
        "model",
        "1",
        named="weights of experts",
        without_parts="weights of experts",
    ),
    "fewer experts": FamilyFault(
        "mixtral",
        "Mixtral: the router never chooses the last expert",
        routed(experts=3),
        "model",
        "1",
        named="choice of experts",
        without_parts="choice of experts",
    ),
    "mixtral top k": FamilyFault(
        "mixtral",
        "Mixtral: each token goes to 1 expert instead of 2",
        router_setting("top_k", 1),
        "model",
        "1",
        "setting top_k",
        without_parts="experts per token",
    ),
    "top k in code": FamilyFault(
        "mixtral",
        "Mixtral: each token goes to 1 expert instead of 2, in code",
        routed(top_k=1),
        "model",
        "1",
        named="experts per token",
        without_parts="experts per token",
    ),
    "attention soft-cap": FamilyFault(
        "gemma2",
        "Gemma 2: attention soft-cap dropped",
        _settings("attn_logit_softcapping", None),
        "model",
        "1",
        "setting attn_logit_softcapping",
    ),
    "tied": FamilyFault(
        "llama",
        "Llama: embedding tied to the LM head when it should not be",
        tied_embedding,
        None,
        reason="no row depends on the LM head; budgets of early exit see it",
    ),
    "tied to the head": FamilyFault(
        "llama",
        "Llama: the LM head's weights in the embedding, as tying the other way leaves them",
        embedding_of_the_head,
        "model",
        "1",
        named="weights changed",
    ),
    "soft-cap": FamilyFault(
        "gemma2",
        "Gemma 2: logits soft-cap dropped",
        no_softcap,
        None,
        reason="no row depends on logits; budgets of early exit see it",
    ),
}

#: Parametrizes a test with every fault of a family.
ALL_FAMILY_FAULTS = pytest.mark.parametrize("name", FAMILY_FAULTS)

Merge = Callable[[str, Path], DecoderStack]
#: Adapters merged wrongly; the baseline is of one merged once.
WRONG_MERGES: dict[str, Merge] = {
    "LoRA merged twice": lambda family, folder: merged(family, folder, times=2),
    "LoRA merged with twice its scale": lambda family, folder: merged(family, folder, scale=2.0),
    "LoRA not merged": lambda family, folder: merged(family, folder, times=0),
}
