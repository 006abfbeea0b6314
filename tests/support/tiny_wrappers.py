"""Tiny random models that read images or audio next to text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

from support.tiny_models import VOCABULARY, WIDTH

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
}
#: As deep as the text decoder, so that its layers could be mistaken for the decoder's.
_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "image_size": 28,
    "patch_size": 14,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}

WRAPPERS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _VISION | {"model_type": "pixtral"},
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | {"model_type": "qwen2_5_vl_text", "rope_parameters": _ROPE},
        "vision_config": {"depth": 4, "num_heads": 4, "fullatt_block_indexes": [1]}
        | {"hidden_size": WIDTH, "intermediate_size": 48, "out_hidden_size": WIDTH},
    },
    "gemma3": {
        "text_config": _TEXT | {"model_type": "gemma3_text"},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
    },
    "llama4": {
        "text_config": _TEXT
        | {"model_type": "llama4_text", "num_local_experts": 2, "intermediate_size_mlp": 64},
        "vision_config": _VISION
        | dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
    },
    "qwen2_audio": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "audio_config": {"d_model": WIDTH, "encoder_layers": 4, "encoder_attention_heads": 4}
        | {"encoder_ffn_dim": 48},
    },
    "blip-2": {
        "text_config": _TEXT | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": WIDTH},
        "vision_config": _VISION,
        "qformer_config": {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
        | {"intermediate_size": 48, "encoder_hidden_size": WIDTH},
    },
}
_TOKENS = {
    name: 90 + number
    for number, name in enumerate(
        (
            "image_token_id",
            "video_token_id",
            "audio_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            "boi_token_index",
            "eoi_token_index",
        )
    )
}


def tiny_wrapper(kind: str) -> PreTrainedModel:
    """Return a random model of `kind` in evaluation mode, every norm weight perturbed."""
    config = AutoConfig.for_model(kind, **_TOKENS, image_token_index=90, **WRAPPERS[kind])
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForMultimodalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model
