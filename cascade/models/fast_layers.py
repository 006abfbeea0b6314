"""Fast layers: run a few tokens through a layer's modules with fewer operations in between.

When one token is decoded, the operations between the matrix products take half as long as the
products themselves (SmolLM2-135M in fp32 on two cores: 9.8 ms and 17.1 ms per token). Layers with
Llama's modules can compute the same result with fewer operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: The module of the hooks that the first call with `output_hidden_states=True` leaves in a model.
#: They collect outputs only while the model's own forward runs, which never uses fast layers.
_CAPTURING = "transformers.utils.output_capturing"

#: The most token rows, batch times tokens. With more, the products take most of the time.
MAX_ROWS = 16


def product(module: nn.Module, rows: Tensor) -> Tensor:
    """Return `module(rows)`; with AMX, a single bfloat16 row is a matrix-vector product.

    With AMX this takes half the time of a matrix product with one row. Without AMX it takes 1.5
    times as long (AVX-512 with bfloat16 on EPYC). Both were measured with torch 2.13 on two cores,
    for 576 x 1,536 and 576 x 49,152.

    Args:
        module: A projection.
        rows: `[..., D]`.
    """
    if type(module) is not nn.Linear or not is_untouched(module):
        made: Tensor = module(rows)
        return made
    weight, bias = module.weight, module.bias
    single = rows.numel() == rows.shape[-1] and weight.dtype is torch.bfloat16 and weight.is_cpu
    single = single and has_amx()
    # Quantized weights are tensor subclasses that report bfloat16.
    if not single or type(weight) is not nn.Parameter:
        return functional.linear(rows, weight, bias)
    made = torch.mv(weight, rows.reshape(-1)).view(*rows.shape[:-1], -1)
    return made if bias is None else made + bias


@functools.cache
def has_amx() -> bool:
    """Return whether the processor has AMX for bfloat16; False with torch before 2.9."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def is_untouched(module: nn.Module) -> bool:
    """Return whether a module has no hooks and no replaced forward, so its children can be called.

    Hooks with which `transformers` captures outputs do not count.
    """
    return not (
        any(map(_can_change_results, module._forward_hooks.values()))
        or module._forward_pre_hooks
        or "forward" in module.__dict__
    )


def _can_change_results(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__module__", None) != _CAPTURING


class FastLayers:
    """Decoder layers with Llama's modules, run on a few tokens.

    The modules alone do not prove that the layers compute the same as Llama's, so `SkippingLayers`
    compares the results.

    Args:
        layers: The decoder layers.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers: tuple[Any, ...] = tuple(layers)
        self._tables: tuple[Any, Tensor, Tensor] | None = None

    def are_supported(self) -> bool:
        """Return whether all layers have the modules that `compute` calls."""
        return all(_has_llama_modules(layer) for layer in self.layers)

    def can_compute(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Return whether `compute` can replace this call of a layer.

        Args:
            layer: 1..N.
            hidden: The input of the layer, `[B, T, D]`.
            kwargs: The arguments of the call.
        """
        module = self.layers[layer - 1]
        mask = kwargs.get("attention_mask")
        return (
            hidden.shape[0] * hidden.shape[1] <= MAX_ROWS
            and (mask is None or mask.ndim == 4)
            and kwargs.get("past_key_values") is not None
            and is_untouched(module)
            and is_untouched(module.self_attn)
        )

    def compute(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return a layer's output, `[B, T, D]`, and write its keys and values to the cache.

        Args:
            layer: 1..N.
            hidden: The input of the layer, `[B, T, D]`.
            kwargs: The arguments of the call.
        """
        module = self.layers[layer - 1]
        attention = module.self_attn
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        normed = _norm(module.input_layernorm, hidden)
        queries = product(attention.q_proj, normed).view(shape)
        keys = product(attention.k_proj, normed).view(shape)
        values = product(attention.v_proj, normed).view(shape)
        if getattr(attention, "q_norm", None) is not None:
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        if getattr(attention, "use_rope", True):
            both = torch.cat([queries, keys], dim=2)
            both = self._rotated(both, kwargs["position_embeddings"])
            queries, keys = both[:, :, : queries.shape[2]], both[:, :, queries.shape[2] :]
        keys, values = kwargs["past_key_values"].update(
            keys.transpose(1, 2), values.transpose(1, 2), attention.layer_idx
        )
        mask = kwargs.get("attention_mask")
        output = functional.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and hidden.shape[1] > 1,
            scale=attention.scaling,
            enable_gqa=True,
        )
        hidden = hidden + product(attention.o_proj, output.transpose(1, 2).flatten(2))
        return hidden + _mlp(module.mlp, _norm(module.post_attention_layernorm, hidden))

    def _rotated(self, heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate queries and keys, `[B, T, heads, head_dim]`, to their positions."""
        # All layers of a pass get the same tables. Another thread may replace the stored ones at
        # any time.
        stored = self._tables
        if stored is None or stored[0] is not tables:
            cos, sin = tables
            half = sin.shape[-1] // 2
            signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            stored = self._tables = (tables, cos[:, :, None], signed[:, :, None])
        _, cos, signed = stored
        return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), signed)


def _has_llama_modules(layer: nn.Module) -> bool:
    attention: Any = getattr(layer, "self_attn", None)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "scaling", "head_dim", "layer_idx", "config")
    return (
        all(hasattr(attention, name) for name in names)
        and attention.config._attn_implementation == "sdpa"
        and all(
            isinstance(getattr(layer, name, None), nn.Module)
            for name in ("input_layernorm", "post_attention_layernorm", "mlp")
        )
        # Qwen3 normalizes each head by itself; other models normalize all heads together.
        and all(
            norm is None or getattr(norm, "weight", torch.empty(0)).shape == (attention.head_dim,)
            for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        )
    )


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    epsilon = getattr(norm, "variance_epsilon", None)
    if epsilon is None or not is_untouched(norm):
        made: Tensor = norm(hidden)
        return made
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, epsilon)


def _mlp(mlp: Any, normed: Tensor) -> Tensor:
    if not hasattr(mlp, "gate_proj") or not is_untouched(mlp):
        made: Tensor = mlp(normed)
        return made
    gated = mlp.act_fn(product(mlp.gate_proj, normed)) * product(mlp.up_proj, normed)
    return product(mlp.down_proj, gated)
