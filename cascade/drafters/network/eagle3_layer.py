"""The layer of an EAGLE-3 drafter, as the config of Llama or Qwen 3 describes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from cascade.core.errors import UnsupportedModelError, UsageError
from cascade.decoding.engine.modules import LayerModules
from cascade.drafters.network.layers import rotary_tables
from cascade.models.architecture import text_config_of
from cascade.models.probing import close
from cascade.models.stack import DecoderStack

#: The projections of an attention and of an MLP; either all of one have a bias, or none.
ATTENTION = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
MLP = tuple(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj"))

_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

#: The number of layers whose inputs are read.
_READ = 3

#: Positions at which rotations are compared.
_POSITIONS = 64


class LayerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The config of a drafter's layer, with the names of `LlamaConfig` and `Qwen3Config`.

    Attributes:
        model_type: "qwen3" if the heads of queries and keys are normed, otherwise "llama".
        rope_parameters: The rotation, as `transformers` 5 reads it.
        rope_theta: Its base, as older releases read it.
        rope_scaling: Its scaling, as older releases read it; None without any.
    """

    model_type: Literal["llama", "qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = 1
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool = False
    use_cache: bool = True
    dtype: str = "bfloat16"


def layer_config_of(stack: DecoderStack, feature_layers: Sequence[int]) -> LayerConfig:
    """Return the config of an EAGLE-3 layer that is a copy of one of a model's layers.

    Args:
        stack: The model, whose layers are Llama's (see `check_can_draft`).
        feature_layers: The layers whose inputs are read, 1..N; the last one is copied.

    Raises:
        UsageError: They are not three.
        UnsupportedModelError: The layout of EAGLE-3 cannot describe the layer.
    """
    if len(feature_layers) != _READ:
        raise UsageError(
            f"expected {_READ} layers for EAGLE-3 to read, got {listed(feature_layers)}; choose a"
            " higher --layer, or --architecture cascade"
        )
    number = feature_layers[-1]
    layer: Any = stack.layers[number - 1]
    modules = LayerModules.of(layer, stack.model.config)
    named = dict(layer.named_parameters())
    eps = _eps_of(modules.attention_norm)
    limit = stack.max_positions
    if eps is None or limit is None:
        lacks = "an eps of its norms" if eps is None else "max_position_embeddings"
        raise _refused(stack, f"it has no {lacks}")
    rope = dict(getattr(text_config_of(stack.model.config), "rope_parameters", None) or {})
    config = LayerConfig(
        model_type="llama" if modules.query_norm is None else "qwen3",
        vocab_size=stack.vocab_size,
        hidden_size=stack.hidden_size,
        intermediate_size=modules.gate.out_features,
        num_attention_heads=modules.heads,
        num_key_value_heads=modules.key_heads,
        head_dim=modules.head_dim,
        hidden_act=modules.act_name,
        max_position_embeddings=limit,
        rms_norm_eps=eps,
        rope_parameters=rope,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        rope_scaling=_scaling_of(rope),
        attention_bias=any(f"{name}.bias" in named for name in ATTENTION),
        mlp_bias=any(f"{name}.bias" in named for name in MLP),
    )
    obstacle = _obstacle(stack, layer, modules, config)
    if obstacle is not None:
        raise _refused(stack, obstacle)
    return config


def listed(layers: Sequence[int]) -> str:
    """Return the numbers of layers as text."""
    return ", ".join(map(str, layers))


def _refused(stack: DecoderStack, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{stack.model.config.model_type} cannot have a drafter of architecture eagle3: {reason};"
        " train one with --architecture cascade"
    )


def _scaling_of(rope: dict[str, Any]) -> dict[str, Any] | None:
    if rope.get("rope_type", "default") == "default":
        return None
    return {name: value for name, value in rope.items() if name != "rope_theta"}


def _eps_of(norm: Any) -> float | None:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return None if found is None else float(found)


def _obstacle(
    stack: DecoderStack, layer: nn.Module, modules: LayerModules, config: LayerConfig
) -> str | None:
    """Return what the config cannot describe, or None."""
    head: Any = stack.lm_head
    if head.bias is not None:
        return "its LM head has a bias"
    known = {f"{name}.{kind}" for name in (*ATTENTION, *MLP) for kind in ("weight", "bias")}
    known |= {f"{name}.weight" for name in (*_NORMS, *_HEAD_NORMS)}
    others = sorted({name for name, _ in layer.named_parameters()} - known)
    if others:
        return f"its layers have {others[0]}"
    if config.mlp_bias and config.model_type == "qwen3":
        return "its MLP has biases, and its queries have norms"
    return _difference(stack, modules, config)


@torch.no_grad()
def _difference(stack: DecoderStack, modules: LayerModules, config: LayerConfig) -> str | None:
    """Return what is computed in another way than the config says, or None."""
    decoder: Any = stack.decoder
    for norm in (*modules.norms, decoder.norm):
        if not _is_llamas(norm, config.rms_norm_eps):
            return f"its norm {type(norm).__name__} computes something else than Llama's"
    sample = _sample(stack, 8)
    if config.hidden_act not in ACT2FN or not close(
        modules.act(sample), ACT2FN[config.hidden_act](sample)
    ):
        return f"its activation is not the {config.hidden_act} that its config names"
    length = min(_POSITIONS, config.max_position_embeddings)
    own = rotary_tables(stack, length)
    made = LlamaRotaryEmbedding(LlamaConfig(**msgspec.to_builtins(config))).to(stack.device)
    wanted = made(sample, torch.arange(length, device=stack.device)[None])
    same = all(a.shape == b.shape and close(a, b) for a, b in zip(own, wanted, strict=True))
    return None if same else "its rotations are not Llama's"


def _is_llamas(norm: Any, eps: float) -> bool:
    """Return whether a norm computes what Llama's computes with the same weight."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or len(list(norm.parameters())) != 1:
        return False
    made = LlamaRMSNorm(len(weight), eps).to(weight.device, weight.dtype)
    made.weight.copy_(weight)
    # Small inputs show a difference in eps.
    samples = [scale * _sample_like(weight) for scale in (1.0, 1e-3)]
    return all(close(norm(sample), made(sample)) for sample in samples)


def _sample(stack: DecoderStack, width: int) -> Tensor:
    return _sample_like(torch.empty(width, device=stack.device))


def _sample_like(weight: Tensor) -> Tensor:
    """Return two rows of the width of a weight, in its dtype."""
    count = torch.arange(2 * len(weight), device=weight.device, dtype=torch.float32)
    return (count.view(2, -1) + 1).sin().to(weight.dtype)
