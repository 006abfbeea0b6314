"""What loading a checkpoint reported: missing, unexpected and mismatched tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cascade.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALES = re.compile(r"(scales?|scale_inv|zero_points?|qzeros|g_idx|absmax|quant_map|quant_state)")
#: Last components of the names of packed weights (GPTQ and AWQ, bitsandbytes, HQQ, ...).
_PACKED = {"qweight", "qzeros", "weight_packed", "W_q", "absmax", "blocks"}
#: Where a name can have superfluous components, and how many: one anywhere, two in front.
_SPANS = ((None, 1), (0, 2))
_LORA = re.compile(r"(^|\.)lora_|(^|\.)adapters?\.|\.dora_|\.ia3_")


def check_loading_report(source: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Check that loading used every tensor of the files that belongs to the decoder.

    `transformers` only warns: missing weights are random, and others are dropped.

    Args:
        source: The model, for errors.
        model: The loaded model.
        report: The loading info of `from_pretrained`. Tensors that the family ignores on purpose
            are not in it.

    Raises:
        ModelError: Weights are missing or have other shapes, or tensors of the decoder were not
            used: layers that the config does not count, quantization scales, biases, or an
            adapter's. Tensors of other parts, such as a vision tower, are allowed; see
            `unused_parts`.
    """
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ModelError(
            f"{source}: {name} has the shape {_shape(stored)} in the files and {_shape(wanted)} by"
            f" config.json{_more(mismatched)}; expected a config.json of these weights, get both"
            " from the same checkpoint"
        )
    unexpected = sorted(report["unexpected_keys"])
    lora = [name for name in unexpected if _LORA.search(name)]
    if lora:
        raise ModelError(
            f"{source} has weights of an adapter that are not applied, such as"
            f" {lora[0]}{_more(lora)}; expected a merged model: load it with peft,"
            " merge_and_unload() and save_pretrained()"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        _check_names(source, missing, unexpected)
        others = f" (and has {unexpected[0]}, which it does not use)" if unexpected else ""
        raise ModelError(
            f"{source} lacks {len(missing)} of its weights, the first is {missing[0]}{others}; "
            "get the checkpoint again"
        )
    unused = _of_the_decoder(unexpected, model)
    if not unused:
        return
    scales = [name for name in unused if _SCALES.search(name.rpartition(".")[2])]
    depth = model.config.get_text_config().num_hidden_layers
    layers = [name for name in unused if _layer_number(name) >= depth]
    if scales:
        reason = "its weights need quantization scales that are not applied"
        remedy = "expected a quantization_config in config.json; dequantize the weights, or add it"
        unused = scales
    elif layers:
        reason = f"config.json counts {depth} layers, but the files have more"
        remedy = "correct num_hidden_layers, or get config.json and weights of the same checkpoint"
        unused = layers
    else:
        reason = f"the files have weights that {model.config.model_type} does not use"
        remedy = "expected a config.json of these weights; get both from the same checkpoint"
    raise ModelError(f"{source}: {reason}, such as {unused[0]}{_more(unused)}; {remedy}")


def _check_names(source: str, missing: list[str], unexpected: list[str]) -> None:
    """Check that missing weights are not in the files under other names.

    Raises:
        ModelError: They have a prefix, such as that of a wrapper, or they are quantized.
    """
    packed = [name for name in unexpected if name.rpartition(".")[2] in _PACKED]
    if packed:
        raise ModelError(
            f"{source} has quantized weights, such as {packed[0]}{_more(packed)}, but its"
            " config.json has no quantization_config for them; add it (for GPTQ and AWQ, the"
            " content of quantize_config.json or quant_config.json with its quant_method)"
        )
    wanted = set(missing)
    for name in unexpected:
        parts = name.split(".")
        for start, end in _SPANS:
            for first in range(len(parts) - 1) if start is None else [start]:
                extra = ".".join(parts[first : first + end])
                short = ".".join([*parts[:first], *parts[first + end :]])
                if short in wanted:
                    raise ModelError(
                        f"{source} has {name} where {short} is expected ({len(missing)} weights are"
                        f' missing): a wrapper added "{extra}." to the names; save the model'
                        " without the wrapper, or rename the tensors"
                    )


def unused_parts(model: PreTrainedModel, report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parts of the files outside the decoder that loading did not use.

    Args:
        model: The loaded model.
        report: The loading info of `from_pretrained`.

    Returns:
        The first component of the tensors' names, e.g. `("mtp", "vision_tower")`.
    """
    unexpected = report["unexpected_keys"]
    names = set(unexpected) - set(_of_the_decoder(unexpected, model))
    prefix = f"{model.base_model_prefix}."
    return tuple(sorted({name.removeprefix(prefix).split(".")[0] for name in names}))


def _of_the_decoder(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Return the tensors that would be part of a module that the model has.

    A buffer that the model computes itself, such as a causal mask, does not count.
    """
    inner = {path for path, module in model.named_modules() if module is not model.base_model}
    inner.discard("")
    buffers = {path for path, _ in model.named_buffers()}

    def belongs(name: str) -> bool:
        for full in (name, f"{model.base_model_prefix}.{name}"):
            if full in buffers:
                return False
            parents = full.split(".")[:-1]
            if any(".".join(parents[:count]) in inner for count in range(1, len(parents) + 1)):
                return True
        return False

    return [name for name in names if belongs(name)]


def _layer_number(name: str) -> int:
    """Return the index in a tensor's name, e.g. 4 for `model.layers.4.mlp.up_proj.weight`."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1)


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _more(names: list[Any]) -> str:
    return f" ({len(names) - 1} more)" if names[1:] else ""
