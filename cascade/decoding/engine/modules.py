"""What the engine reads from a decoder layer: its projections, norms and settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from cascade.models.architecture import text_config_of

#: The module of the hooks that the first call with `output_hidden_states=True` leaves in a model.
#: They collect outputs only while the model's own forward runs, which never uses the engine.
_CAPTURING = "transformers.utils.output_capturing"

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


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


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a projection whose weight can be read in its place in memory."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.is_contiguous()
    )


@dataclass(frozen=True)
class LayerModules:
    """The modules of a decoder layer that is built as Llama's are.

    Attributes:
        layer: The layer.
        query: `[heads * head_dim, D]`; likewise `key` and `value` with the heads of keys.
        out: `[D, heads * head_dim]`.
        gate: `[inner, D]`; likewise `up`.
        down: `[D, inner]`.
        attention_norm: The norm before attention.
        mlp_norm: The norm before the MLP.
        query_norm: The norm of each query head, or None; likewise `key_norm`.
        act: The activation between gate and up projection.
        act_name: Its name in the config.
        head_dim: The width of a head.
        scaling: The factor of the attention scores.
        rotates: Whether queries and keys are rotated to their positions.
        window: The columns that a query sees, itself included; None for all.
    """

    layer: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    attention_norm: nn.Module
    mlp_norm: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    act: Callable[[Tensor], Tensor]
    act_name: str
    head_dim: int
    scaling: float
    rotates: bool
    window: int | None

    @classmethod
    def of(cls, layer: Any, config: Any) -> LayerModules:
        """Return the modules of a layer for which `obstacle_of` returns None.

        Args:
            layer: The layer.
            config: The model's config.
        """
        attention, mlp = layer.self_attn, layer.mlp
        text = text_config_of(config)
        kinds = getattr(text, "layer_types", None)
        window = getattr(attention, "sliding_window", getattr(text, "sliding_window", None))
        if kinds is not None and kinds[attention.layer_idx] == "full_attention":
            window = None
        return cls(
            layer=layer,
            query=attention.q_proj,
            key=attention.k_proj,
            value=attention.v_proj,
            out=attention.o_proj,
            gate=mlp.gate_proj,
            up=mlp.up_proj,
            down=mlp.down_proj,
            attention_norm=layer.input_layernorm,
            mlp_norm=layer.post_attention_layernorm,
            query_norm=getattr(attention, "q_norm", None),
            key_norm=getattr(attention, "k_norm", None),
            act=mlp.act_fn,
            act_name=str(getattr(text, "hidden_act", getattr(text, "hidden_activation", None))),
            head_dim=int(attention.head_dim),
            scaling=float(attention.scaling),
            rotates=bool(getattr(attention, "use_rope", True)),
            window=window,
        )

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """All projections."""
        return (self.query, self.key, self.value, self.out, self.gate, self.up, self.down)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """All norms."""
        found = (self.attention_norm, self.mlp_norm, self.query_norm, self.key_norm)
        return tuple(norm for norm in found if norm is not None)

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module whose call the engine replaces."""
        return tuple(self.layer.modules())

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.query.out_features // self.head_dim

    @property
    def key_heads(self) -> int:
        """The number of key heads."""
        return self.key.out_features // self.head_dim


def obstacle_of(layer: Any) -> str | None:
    """Return why a layer cannot be computed by the engine, or None if its modules are Llama's.

    The modules alone do not prove that the layer computes the same as Llama's; the engine's
    self-test compares the results.
    """
    attention: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    linear: list[Any] = [getattr(attention, name, None) for name in _PROJECTIONS]
    linear += [getattr(mlp, name, None) for name in _MLP]
    if not all(isinstance(module, nn.Module) for module in linear):
        return (
            f"its layers lack {', '.join(_PROJECTIONS)} in self_attn and {', '.join(_MLP)} in mlp"
        )
    # Quantized weights are subclasses of modules or of tensors; adapters are other modules.
    if not all(
        type(module) is nn.Linear and type(module.weight) is nn.Parameter for module in linear
    ):
        return "its projections are quantized or wrapped"
    if not all(weight.is_contiguous() for weight in layer.parameters()):
        return "its weights are not contiguous"
    if not all(isinstance(getattr(layer, name, None), nn.Module) for name in _NORMS):
        return f"its layers lack {' and '.join(_NORMS)}"
    names = ("scaling", "head_dim", "layer_idx")
    if not all(hasattr(attention, name) for name in names) or not hasattr(mlp, "act_fn"):
        return f"its layers lack {', '.join(names)} or act_fn"
    # The self-test need not reach the limit.
    if getattr(getattr(attention, "config", None), "clip_qkv", None) is not None:
        return "its queries, keys and values are clipped"
    # Qwen3 normalizes each head by itself; other models normalize all heads together.
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        shape = getattr(getattr(norm, "weight", None), "shape", None)
        if norm is not None and shape != torch.Size([attention.head_dim]):
            return "its queries are normalized across heads"
    changed = [name for name, module in layer.named_modules() if not is_untouched(module)]
    if changed:
        return f"its module {changed[0] or type(layer).__name__} has hooks or a replaced forward"
    return None
