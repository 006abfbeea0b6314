"""Checks of a causal language model's config and weights, and finding its decoder layers."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade.core.errors import ModelError, UnsupportedModelError
from cascade.models.dispatch import device_of, is_dispatched, weights_of
from cascade.models.identity import plain_tensors
from cascade.models.overrides.views import holders, paths_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_config(config: Any) -> None:
    """Check that a config is that of a decoder with an LM head, before its weights are read.

    Args:
        config: The config of `transformers`.

    Raises:
        UnsupportedModelError: The model is an encoder-decoder, or is not a causal language model
            and has none as its text decoder.
    """
    _check_decoder_only(config)
    family = getattr(config, "model_type", "?")
    if auto_class(config) is None:
        raise UnsupportedModelError(
            f"{family} is not a causal language model that this transformers release knows"
        )


def check_kind(model: PreTrainedModel) -> None:
    """Check that a model in memory is a decoder with an LM head.

    Raises:
        UnsupportedModelError: The model is an encoder-decoder, or has no LM head.
    """
    _check_decoder_only(model.config)
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no LM head; expected a causal language model, such as"
            " AutoModelForCausalLM loads"
        )


def _check_decoder_only(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{getattr(config, 'model_type', '?')} is an encoder-decoder; expected a decoder-only"
            " causal language model"
        )


def auto_class(config: Any) -> Any:
    """Return the `Auto` class of `transformers` that loads a model with its LM head, or None.

    Args:
        config: The config of `transformers`.

    Returns:
        `AutoModelForCausalLM`, or for a model that also reads images or audio (LLaVA, Mistral 3,
        Qwen-VL) the class of such models.
    """
    import transformers

    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    for name in ("AutoModelForMultimodalLM", "AutoModelForImageTextToText"):
        auto = getattr(transformers, name, None)
        if auto is not None and type(config) in auto._model_mapping:
            return auto
    return None


def text_config_of(config: Any) -> Any:
    """Return the config of a model's text decoder; the config itself if the model has no other."""
    return config.get_text_config(decoder=True)


def find_decoder(model: PreTrainedModel, layers: nn.ModuleList) -> nn.Module:
    """Return the outermost module that runs the layers and returns the last hidden states.

    Args:
        model: The model with its LM head.
        layers: Its decoder layers.

    Raises:
        UnsupportedModelError: No module of the model returns the last hidden states.
    """
    base: nn.Module = model.base_model
    if base is not model:
        # Qwen-VL's outer module keeps positions of its last call; its text decoder does not.
        return model.get_decoder() if hasattr(base, "rope_deltas") else base
    # Llama 4's text model is not at the path that its class names.
    ids = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
    around = {id(held): held for path in paths_of(layers, model) for held in holders(model, path)}
    around.pop(id(model), None)
    for held in around.values():
        with contextlib.suppress(Exception):  # other modules take other arguments than token ids
            run_decoder(held, ids)
            return held
    raise UnsupportedModelError(
        f"no module of {model.config.model_type} returns the hidden states of its decoder layers;"
        " expected a model of transformers with a decoder and an LM head"
    )


#: Where configs count the decoder's layers. In BART, `num_hidden_layers` are those of the encoder;
#: in LongCat, it counts the two attentions of each layer.
_DEPTHS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers")


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers: the outermost list with the length that the text config counts.

    A vision or audio tower can have a list of the same length. The decoder's is then the one that
    runs on text.
    """
    config = text_config_of(model.config)
    blocks = set(model._no_split_modules or ())
    lists: list[tuple[bool, int, nn.ModuleList]] = []
    for depth in (getattr(config, name, 0) for name in _DEPTHS):
        lists = lists or [
            (not blocks & {type(child).__name__ for child in module}, name.count("."), module)
            for name, module in model.base_model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth > 0
        ]
    if not lists:
        raise _no_layers(model, getattr(config, "num_hidden_layers", 0), blocks)
    ordered = [module for _, _, module in sorted(lists, key=lambda entry: entry[:2])]
    if text_config_of(model.config) is not model.config:
        inside = {id(module) for module in model.get_decoder().modules()}
        ordered = [found for found in ordered if id(found) in inside] or ordered
        if len(ordered) > 1:
            return _run_on_text(model, ordered)
    return ordered[0]


@torch.no_grad()
def _run_on_text(model: PreTrainedModel, lists: list[nn.ModuleList]) -> nn.ModuleList:
    """Return the first list whose modules run on text; the first of all if none does."""
    if any(each.is_meta for each in model.parameters()) and not is_dispatched(model):
        return lists[0]
    ran: set[int] = set()
    handles = [
        module.register_forward_hook(lambda module, *_: ran.add(id(module)))
        for found in lists
        for module in found
    ]
    try:
        ids = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return next((found for found in lists if any(id(module) in ran for module in found)), lists[0])


def _no_layers(model: PreTrainedModel, depth: int, blocks: set[str]) -> UnsupportedModelError:
    """Return the error for a model without a list of `depth` layers of the classes `blocks`."""
    family = model.config.model_type
    counts = [
        len(module)
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList) and blocks & {type(child).__name__ for child in module}
    ]
    if not depth:
        return UnsupportedModelError(
            f"the config of {family} counts no decoder layers; expected num_hidden_layers, and a"
            " decoder-only model whose layers are an nn.ModuleList"
        )
    if len(counts) == 1:
        (count,) = counts
        return UnsupportedModelError(
            f"the model has {count} decoder layers, but its config counts {depth}; set"
            f" model.config.num_hidden_layers to {count} where layers were removed or added"
        )
    if counts:
        return UnsupportedModelError(
            f"{family} has {len(counts)} lists of {' and '.join(map(str, sorted(set(counts))))}"
            f" layers, and its config counts {depth}; expected one list, whose layers run once each"
        )
    return UnsupportedModelError(
        f"{family} has no list of {depth} decoder layers; "
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
    for name, parameter, values in weights_of(model):
        if values.is_meta:
            raise ModelError(
                f"the weight {name} is on no device, and nothing holds it; expected all weights in"
                " memory or on disk, load the model again"
            )
        if all(_is_finite(tensor) for tensor in plain_tensors(values)):
            continue
        number = layer_of.get(id(parameter))
        where = f"decoder layer {number}" if number else "outside the decoder layers"
        if model.dtype == torch.float16 and not torch.isnan(values).any():
            most = torch.finfo(torch.float16).max
            raise ModelError(
                f"the weights are infinite in float16 ({where}: {name}), which holds "
                f"numbers up to {most:.0f}; use --dtype bfloat16 or float32"
            )
        raise ModelError(
            f"the weights hold NaN or infinite values ({where}: {name}); "
            "expected finite weights, get the checkpoint again"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Return whether no number is NaN or infinite; 8-bit floats are widened first."""
    if not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(wide).all())


def check_layer_numbers(layers: nn.ModuleList) -> None:
    """Check that every layer stores its keys and values under its own number.

    Args:
        layers: The decoder layers. A module that several of them share is not checked.

    Raises:
        ModelError: A layer has the number of another one, because layers were removed or moved.
    """
    counts = Counter(
        id(module) for layer in layers for module in layer.modules() if hasattr(module, "layer_idx")
    )
    for index, layer in enumerate(layers):
        found: set[Any] = {
            module.layer_idx
            for module in layer.modules()
            if counts[id(module)] == 1 and module is not layer
        }
        # Zamba 2 gives -1 to modules that store nothing.
        inside: set[int] = {number for number in found if isinstance(number, int)} - {-1}
        # A layer of LongCat has two attentions, each with a number of its own.
        several = range(len(inside) * index, len(inside) * (index + 1))
        wrong = inside - ({index} if len(inside) == 1 else set(several))
        own = getattr(layer, "layer_idx", index)
        if isinstance(own, int) and own not in (index, -1) and counts[id(layer)] == 1:
            wrong.add(own)
        if wrong:
            raise ModelError(
                f"decoder layer {index + 1} has layer_idx {min(wrong)}, expected {index}: layers"
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
    output = decoder(input_ids=input_ids, **kwargs)
    if not hasattr(output, "last_hidden_state"):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} returns {type(output).__name__} without a"
            " last_hidden_state; expected a decoder of transformers"
        )
    final: Tensor = output.last_hidden_state
    return final
