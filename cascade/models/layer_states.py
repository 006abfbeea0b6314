"""What each decoder layer keeps of earlier tokens: keys and values, or something else."""

from __future__ import annotations

from typing import Any

from torch import nn

from cascade.models.architecture import text_config_of

_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "indexed_attention")


def other_state(model: Any, layers: nn.ModuleList) -> str | None:
    """Return the first layer that keeps other things than keys and values, and what it keeps.

    Args:
        model: The model.
        layers: Its decoder layers.

    Returns:
        One line such as "decoder layer 1 (MambaBlock, linear_attention) keeps a recurrent state
        instead of keys and values"; None if every layer keeps keys and values, or nothing.
    """
    caches = _cache_layers(model.config)
    types = layer_types(model.config, len(layers))
    for index, layer in enumerate(layers):
        kind = types[index]
        name = type(layer).__name__ + (f", {kind}" if kind else "")
        what = _other_state_of(caches[index]) if index < len(caches) else None
        if what is None and not caches and kind is not None and kind not in _ATTENTION:
            what = f"{kind} states, of which nothing is known here,"
        if what is not None:
            return f"decoder layer {index + 1} ({name}) keeps {what} keys and values"
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} keeps a recurrent state instead of keys and values"
    return None


def layer_types(config: Any, num_layers: int) -> list[str | None]:
    """Return the config's name of each layer's kind, such as "full_attention"; None if unknown."""
    types = getattr(text_config_of(config), "layer_types", None)
    if not isinstance(types, (list, tuple)) or len(types) != num_layers:
        return [None] * num_layers
    return list(types)


def attending(model: Any, layers: nn.ModuleList) -> tuple[bool, ...]:
    """Return for each layer whether its attention compares every token with every earlier one.

    Args:
        model: The model.
        layers: Its decoder layers.
    """
    kinds = layer_types(model.config, len(layers))
    stateful = getattr(model, "_is_stateful", False) and not any(kinds)
    return tuple(
        _has_attention(layer) and not stateful and kind not in ("linear_attention", "conv")
        for layer, kind in zip(layers, kinds, strict=True)
    )


def sharing_layer(config: Any) -> int | None:
    """Return the first layer that takes another one's keys and values by the config, 1..N."""
    modes = getattr(text_config_of(config), "kv_sharing_modes", None) or []
    taking = [at for at, mode in enumerate(modes, start=1) if str(mode).startswith("reuse")]
    return taking[0] if taking else None


def shared_keys(model: Any, layers: nn.ModuleList, stored: set[int]) -> str | None:
    """Return the first layer that takes another layer's keys and values, and that layer.

    Args:
        model: The model.
        layers: Its decoder layers.
        stored: The layers that stored keys and values of their own in a test run, from 0.

    Returns:
        One line such as "decoder layer 7 takes the keys and values of decoder layer 5", or None.
    """
    index = next(
        (at for at, layer in enumerate(layers) if at not in stored and _has_attention(layer)), None
    )
    if index is None:
        return None
    config = text_config_of(model.config)
    modes = getattr(config, "kv_sharing_modes", None) or []
    types = layer_types(config, len(layers))
    sources = [at for at, mode in enumerate(modes[:index]) if mode == "store"]
    same = [at for at in sources if types[at] == types[index]]
    source = f"decoder layer {same[-1] + 1}" if same else "an earlier layer"
    return f"decoder layer {index + 1} takes the keys and values of {source}"


def _has_attention(layer: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in layer.modules())


def _cache_layers(config: Any) -> list[Any]:
    """Return the cache that `transformers` makes for each layer; empty where it makes none."""
    from transformers import DynamicCache

    try:
        return list(DynamicCache(config=text_config_of(config)).layers)
    except Exception:  # kinds of layers that only the model's own code can cache
        return []


def _other_state_of(cache: Any) -> str | None:
    """Return what a layer's cache holds that is not keys and values per token, or None."""
    from transformers import cache_utils

    def known(name: str) -> type:
        found: type = getattr(cache_utils, name, type(None))
        return found

    if isinstance(cache, known("LinearAttentionCacheLayerMixin")):
        both = isinstance(cache, cache_utils.DynamicLayer)
        return "a recurrent state in addition to" if both else "a recurrent state instead of"
    plain = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer")
    return None if type(cache) in map(known, plain) else f"a {type(cache).__name__} instead of"
