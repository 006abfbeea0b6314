"""Tiny random causal LMs of many families, their norm weights perturbed.

Freshly initialized norms are all ones and hide a doubled or a missing norm.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 97
WIDTH = 32

_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GEMMA = _LLAMA | {"head_dim": 8, "sliding_window": 8}
_GPT = {"n_embd": WIDTH, "n_head": 4, "n_positions": 64}

#: family -> settings beside depth and vocabulary.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8},
    "gemma2": _GEMMA | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "mistral": _LLAMA | {"sliding_window": 8},
    "smollm3": _LLAMA,
    "gpt2": _GPT,
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "opt": {
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "bloom": {"hidden_size": WIDTH, "n_head": 4},
    "gpt_neo": {
        "hidden_size": WIDTH,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "window_size": 8,
        "intermediate_size": 48,
    },
    "gptj": _GPT | {"rotary_dim": 4},
    "falcon": {"hidden_size": WIDTH, "num_attention_heads": 4},
    "granite": _LLAMA | {"logits_scaling": 2.0, "residual_multiplier": 0.5},
    "cohere": _LLAMA | {"logit_scale": 0.25},
}

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = _LLAMA | {  # latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
#: With few heads, scores of zero tie, and the model's own choice between them is arbitrary.
_INDEXER = {"index_n_heads": 8, "index_head_dim": 16, "index_topk": 4}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}

#: Families of other kinds, which only some tests need: family -> settings, for four layers.
KINDS: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": WIDTH, "state_size": 8},
    "rwkv": {"hidden_size": WIDTH, "attention_hidden_size": WIDTH, "intermediate_size": 48},
    "jamba": _LLAMA
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8}
    | {"use_mamba_kernels": False},
    "lfm2": _LLAMA | {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "qwen3_next": _LLAMA
    | _EXPERTS
    | _LINEAR
    | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2}
    | {"shared_expert_intermediate_size": 16},
    "falcon_h1": _LLAMA
    | {"head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}
    | {"mamba_n_groups": 1, "mamba_d_state": 8},
    "zaya": _LLAMA | _EXPERTS | {"head_dim": 8, "num_experts_per_tok": 1},
    "mixtral": _LLAMA | {"num_local_experts": 4},
    "llama4_text": _LLAMA
    | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}
    | {"attention_chunk_size": 16},
    "deepseek_v32": _LATENT | _INDEXER | {"first_k_dense_replace": 1},
    "deepseek_v4": _LATENT | _INDEXER | {"head_dim": 8},
    "hy_v4": _LATENT | _INDEXER | {"head_dim": 8},
    "gemma4_text": _GEMMA
    | _PER_LAYER
    | {"global_head_dim": 8, "num_kv_shared_layers": 2, "layer_types": _ALTERNATING},
    "gemma3n_text": _GEMMA
    | _PER_LAYER
    | {"altup_num_inputs": 3, "laurel_rank": 4, "num_kv_shared_layers": 2}
    | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4}
    | {"layer_types": _ALTERNATING},
}

#: Families whose positions are special: attention sinks, and ALiBi without a family of its own.
POSITIONS: dict[str, dict[str, Any]] = {
    "gpt_oss": _GEMMA | {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": WIDTH, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64},
}


def tiny_model(
    family: str, *, num_layers: int = 4, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Return a random model of `family` in fp32 evaluation mode, every norm weight perturbed."""
    special = {"pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 1}
    settings = (
        (FAMILIES | KINDS | POSITIONS)[family] | {"vocab_size": VOCABULARY} | special | changes
    )
    if family == "gpt_neo":
        settings["attention_types"] = [[["global", "local"], num_layers // 2]]
    config = AutoConfig.for_model(family, num_hidden_layers=num_layers, **settings)
    torch.manual_seed(seed)
    return perturbed(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """Return a new model in evaluation mode, its weights changed so that every layer matters."""
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.mul_(4.0)  # the default spread of 0.02 hardly moves a narrow stream
    return model.eval()


def random_ids(batch: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Return random token ids `[batch, length]`, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per printable ASCII character; id 1 is EOS, 0 unknown."""
    symbols = ["<unk>", "<eos>", *map(chr, range(32, 127))]
    backend = Tokenizer(
        WordLevel({symbol: number for number, symbol in enumerate(symbols)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def made_tokenizer(template: str, **special: str) -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with other special tokens, which puts some around a text.

    Args:
        template: What it makes of a text, e.g. "<bos> $A <eos>".
        special: The special tokens by role, e.g. `bos_token`; new ones are added.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(special)
    around = {*template.split()} - {"$A"}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template,
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in around],
    )
    return tokenizer


def tiny_bos_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with a BOS token, id 97, which it puts before a text."""
    return made_tokenizer("<bos> $A", bos_token="<bos>")


def save_checkpoint(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Save a tiny model and its tokenizer as `transformers` would; return the folder."""
    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_gguf(
    path: Path,
    *,
    extra: Callable[[gguf.GGUFWriter], object] | None = None,
    without: Container[str] = (),
    **changes: Any,
) -> PreTrainedModel:
    """Save a tiny Llama as GGUF, most of its layers' weights in Q4_1, with a BPE tokenizer.

    Args:
        path: The file.
        extra: Adds settings and tensors.
        without: Names of tensors to leave out.
        changes: Of the model's config.

    Returns:
        The model that the file holds: its weights are what Q4_1 left of them.
    """
    model = tiny_model("llama", **changes)
    writer = gguf.GGUFWriter(path, "llama")
    _add_gguf_settings(writer, model.config)
    _add_gguf_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        target = names.get_name(name, try_suffixes=(".weight",))
        if target not in without:
            _add_gguf_tensor(writer, target, weight, model)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_gguf_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_gguf_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Add a byte-level BPE of printable ASCII and one merge; ids 0 and 1 as in tiny_tokenizer."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<unk>", "<eos>", "\u0120", *map(chr, range(33, 126)), "th"]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 95)
    writer.add_token_merges(["t h"])
    writer.add_unk_token_id(0)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(1)


def _add_gguf_tensor(
    writer: gguf.GGUFWriter, target: str, weight: torch.Tensor, model: PreTrainedModel
) -> None:
    """Add one tensor, in Q4_1 where it packs (32 weights of a row), and quantize the model's."""
    array = weight.numpy()
    heads = {
        "attn_q": model.config.num_attention_heads,
        "attn_k": model.config.num_key_value_heads,
    }.get(target.split(".")[2] if target.startswith("blk.") else "")
    if not target.startswith("blk.") or array.ndim == 1 or array.shape[1] % 32:
        writer.add_tensor(target, array)
        return
    if heads:  # llama.cpp interleaves the two halves that a rotary embedding pairs
        array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    packed = gguf.quants.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor(target, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    left = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
    if heads:
        left = left.reshape(heads, -1, 2, left.shape[1]).swapaxes(1, 2).reshape(left.shape)
    weight.copy_(torch.from_numpy(left.copy()))
