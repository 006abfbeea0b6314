"""Tiny random causal LMs of many families, their norm weights perturbed.

Freshly initialized norms are all ones and hide a doubled or a missing norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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


def tiny_model(
    family: str, *, num_layers: int = 4, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Return a random model of `family` in fp32 evaluation mode, every norm weight perturbed."""
    special = {"pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 1}
    settings = FAMILIES[family] | {"vocab_size": VOCABULARY} | special | changes
    if family == "gpt_neo":
        settings["attention_types"] = [[["global", "local"], num_layers // 2]]
    config = AutoConfig.for_model(family, num_hidden_layers=num_layers, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)  # the default spread of 0.02 hardly moves a narrow stream
    return model


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


def save_checkpoint(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Save a tiny model and its tokenizer as `transformers` would; return the folder."""
    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
