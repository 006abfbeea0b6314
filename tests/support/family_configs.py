"""Tiny configs of every causal language model that `transformers` knows.

Sizes follow from the names of a config's fields. Families for which these sizes do not fit together
have settings of their own in `_OWN`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
WIDTH = 32
DEPTH = 4

#: Every causal language model of the installed release, by its model type.
CAUSAL_FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"
)

#: Names of fields -> their size. A field of another name keeps its default.
_NAMES: dict[str, int] = {
    "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size num_centroids"
    " pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab"
    " ngram_vocab_size_base": VOCABULARY,
    "hidden_size d_model n_embd dim embedding_dim emb_dim lru_width embedding_size"
    " word_embed_proj_dim attention_hidden_size backbone_hidden_size input_embedding_size"
    " output_embedding_size pronunciation_embed_dim shape_embed_dim cross_attention_hidden_size"
    " audio_embed_dim ple_embed_dim out_hidden_size projection_dim adapter_in_dim"
    " adapter_out_dim adapter_input_size hidden_size_global": WIDTH,
    "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff d_inner"
    " feed_forward_size n_inner dense_intermediate_size intermediate_size_mlp mlp_dim": 48,
    _DEPTHS: DEPTH,
    "encoder_layers num_encoder_layers depth num_global_layers": 2,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"
    " attention_heads num_decoder_attention_heads num_encoder_attention_heads"
    " swa_num_attention_heads linear_num_value_heads linear_num_heads num_experts"
    " n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim rotary_dim"
    " linear_conv_kernel_dim": 4,
    "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"
    " n_mamba_heads num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"
    " topk_group n_group zero_expert_num": 2,
    "head_dim d_head attention_head_dim attention_head_size kv_channels dim_head swa_head_dim"
    " linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim global_head_dim"
    " v_head_dim qk_nope_head_dim mamba_d_head mamba_head_dim query_pre_attn_scalar"
    " swa_v_head_dim mamba_n_heads mamba_num_heads": 8,
    "kv_lora_rank q_lora_rank o_lora_rank hc_lowrank adapter_rank laurel_rank gated_norm_rank"
    " router_hidden_size hidden_size_per_layer_input d_rel mamba_dt_rank time_step_rank"
    " prompt_mid_dim moe_intermediate_size shared_expert_intermediate_size"
    " expert_ffn_hidden_size shared_experts_intermediate_size shared_intermediate_size"
    " moe_shared_expert_intermediate_size moe_latent_size image_size"
    # With few heads, an indexer gives many keys the same score: zero.
    " downsample_hidden_size index_n_heads": 16,
    "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"
    " max_source_positions": 64,
    # Shorter than the texts, so that they matter.
    "sliding_window window_size attention_window_size sliding_window_size attention_chunk_size"
    " local_attention keep_window_size mamba_chunk_size chunk_size index_topk"
    " local_attention_window_len block_size patch_size": 8,
    "state_size mamba_d_state ssm_state_size": 8,
    "first_k_dense_replace": 1,
    # RWKV halves the states after so many layers.
    "rescale_every": 2,
    # The end of a text, and padding.
    "pad_token_id eos_token_id bos_token_id decoder_start_token_id": 1,
}
_SIZES = {name: size for names, size in _NAMES.items() for name in names.split()}
_TOKENS = {name for name in _SIZES if name.endswith("_token_id")}

_LATENT = {"head_dim": 4, "num_key_value_heads": 4}
_SHARED = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

#: family -> settings that its names do not give.
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "bailing_hybrid",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "kimi_linear",
            "minicpm3",
            "youtu",
        ),
        _LATENT,
    ),
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},
    "longcat_flash": _LATENT | {"qk_head_dim": 12},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "nemotron_h": {"n_groups": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {
            "hidden_size": WIDTH,
            "ffn_hidden_size": 16,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            kind: _ROPE | {"mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    # As in its checkpoints, the window never cuts: which of several equal values it keeps differs
    # between one pass and a cached one.
    "doge": {"keep_window_size": 64},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "dots3_note_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "head_dim": 12,
        "sliding_window": 8,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank")},
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma3n_text": _SHARED
    | {"intermediate_size": 48, "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0, 0.0]},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "num_hidden_layers": DEPTH,
            "vocab_size": VOCABULARY,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Return the config of a tiny model with every kind of layer that the family has.

    Args:
        family: A model type of `transformers`.
        changes: Further settings.
    """
    config_class = CONFIG_MAPPING[family]
    return config_class(**settings_of(config_class) | changes)


def settings_of(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the settings of a tiny config, those of its parts included."""
    default = None
    with contextlib.suppress(Exception):  # some have no default that is valid
        default = config_class()
    found: dict[str, Any] = {}
    fields = dataclasses.fields(config_class)
    depth = next((_default(default, name) for name in _DEPTHS.split() if _has(fields, name)), None)
    for field in fields:
        value = _default(default, field.name)
        if field.name in _TOKENS:
            found[field.name] = 1
        elif field.name in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[field.name] = _SIZES[field.name]
        elif _names_kinds(value):
            kinds = list(dict.fromkeys(value))
            found[field.name] = [kinds[layer % len(kinds)] for layer in range(DEPTH)]
        elif isinstance(value, list) and len(value) == depth:
            found[field.name] = value[:DEPTH]
        elif isinstance(value, PreTrainedConfig):
            part = settings_of(type(value))
            found[field.name] = part | {"model_type": value.model_type}
    # The family's decoder without its encoder, as its class for causal language models saves it.
    for name, wanted in (("is_decoder", True), ("is_encoder_decoder", False)):
        if _has(fields, name):
            found[name] = wanted
    return found | _OWN.get(config_class.model_type, {})


def _has(fields: Sequence[dataclasses.Field[Any]], name: str) -> bool:
    return any(field.name == name for field in fields)


def _default(config: PreTrainedConfig | None, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # a setting that differs by layer
        return None


def _names_kinds(value: Any) -> bool:
    """Return whether a setting names a kind for each layer."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(isinstance(each, str) and ("_" in each or each in _KINDS) for each in value)


#: Kinds of layers in one word. Others have an underscore, unlike names of classes.
_KINDS = {"dense", "sparse", "conv", "mlp", "moe", "mamba", "attention", "recurrent", "hybrid"}
