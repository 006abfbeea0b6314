"""Checks of a causal language model's config and weights, and finding its decoder layers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade.core.errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Layer types with keys and values per token. Other types have a recurrent state instead.
_ATTENTION_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def check_config(config: Any) -> None:
    """Check that a model can be measured, before its weights are read.

    Args:
        config: The config of `transformers`.

    Raises:
        UnsupportedModelError: The model is an encoder-decoder, is not a causal language model, or
            has recurrent layers.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    family = getattr(config, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{family} is an encoder-decoder; expected a decoder-only causal language model"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{family} is not a causal language model that this transformers release knows"
        )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    types = set(getattr(config.get_text_config(), "layer_types", None) or _ATTENTION_TYPES)
    if getattr(model_class, "_is_stateful", False) or types - _ATTENTION_TYPES:
        kinds = ", ".join(sorted(types - _ATTENTION_TYPES)) or "a recurrent state"
        raise UnsupportedModelError(
            f"{family} has recurrent layers ({kinds}), which keep no keys and values for an early"
            " exit to propagate; expected attention in every layer"
        )


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers, the outermost list of blocks with the config's length."""
    config = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", 0)
    blocks = set(model._no_split_modules or ())
    lists = [
        (not blocks & {type(child).__name__ for child in module}, name.count("."), module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth > 0
    ]
    if not lists:
        raise _no_layers(model, depth, blocks)
    return min(lists, key=lambda entry: entry[:2])[2]


def _no_layers(model: PreTrainedModel, depth: int, blocks: set[str]) -> UnsupportedModelError:
    """Return the error for a model without a list of `depth` layers of the classes `blocks`."""
    counts = {
        len(module)
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList) and blocks & {type(child).__name__ for child in module}
    }
    if len(counts) == 1:
        (count,) = counts
        return UnsupportedModelError(
            f"the model has {count} decoder layers, but its config counts {depth}; set"
            f" model.config.num_hidden_layers to {count} where layers were removed or added"
        )
    return UnsupportedModelError(
        f"{model.config.model_type} has no list of {depth} decoder layers; "
        "expected a decoder-only model whose layers are an nn.ModuleList"
    )


def check_weights(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Check that no weight is NaN or infinite.

    Args:
        model: The model.
        layers: Its decoder layers.

    Raises:
        ModelError: A weight is NaN or infinite, or on no device; the message names the weight.
    """
    layer_of = {
        id(parameter): number
        for number, layer in enumerate(layers, start=1)
        for parameter in layer.parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"the weight {name} is on no device (meta, or offloaded to disk); expected all"
                " weights in memory, load the model without offloading"
            )
        if torch.isfinite(parameter).all():
            continue
        number = layer_of.get(id(parameter))
        where = f"decoder layer {number}" if number else "outside the decoder layers"
        if model.dtype == torch.float16 and not torch.isnan(parameter).any():
            most = torch.finfo(torch.float16).max
            raise ModelError(
                f"the weights are infinite in float16 ({where}: {name}), which holds "
                f"numbers up to {most:.0f}; use --dtype bfloat16 or float32"
            )
        raise ModelError(
            f"the weights hold NaN or infinite values ({where}: {name}); "
            "expected finite weights, get the checkpoint again"
        )


def check_layer_numbers(layers: nn.ModuleList) -> None:
    """Check that every layer stores its keys and values under its own number.

    Args:
        layers: The decoder layers. One that is in the list twice is not checked.

    Raises:
        ModelError: A layer has the number of another one, because layers were removed or moved.
    """
    counts = Counter(id(layer) for layer in layers)
    for index, layer in enumerate(layers):
        if counts[id(layer)] > 1:
            continue
        for module in layer.modules():
            found = getattr(module, "layer_idx", index)
            if isinstance(found, int) and found != index:
                raise ModelError(
                    f"decoder layer {index + 1} has layer_idx {found}, expected {index}: layers"
                    " were removed or moved; set layer_idx again, or save and load the model"
                )


def check_dtypes(layers: nn.ModuleList) -> None:
    """Check that the same weight has the same dtype in every layer of a model that cannot run.

    Args:
        layers: The decoder layers.

    Raises:
        ModelError: A layer has another dtype than the others.
    """
    dtypes: dict[str, torch.dtype] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            first = dtypes.setdefault(name, parameter.dtype)
            if first.is_floating_point and parameter.dtype != first:
                raise ModelError(
                    f"{name} is {_short(parameter.dtype)} in decoder layer {index + 1} and"
                    f" {_short(first)} in an earlier one; expected one dtype, use model.to(dtype)"
                )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_decoder(decoder: nn.Module, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """Run a model without its LM head.

    Args:
        decoder: The model's base model.
        input_ids: `[B, T]`.
        kwargs: Further arguments of its forward. The default mask attends to every token, and no
            KV cache is created.

    Returns:
        The last hidden states, `[B, T, D]`, after the final norm if there is one.
    """
    kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
    kwargs.setdefault("use_cache", kwargs.get("past_key_values") is not None)
    output: Tensor = decoder(input_ids=input_ids, **kwargs).last_hidden_state
    return output
