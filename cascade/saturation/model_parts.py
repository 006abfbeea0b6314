"""Model parts: a summary of each tensor and setting, to tell later which of them differ."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from xxhash import xxh3_128

from cascade.models.architecture import text_config_of
from cascade.models.identity import plain_tensors
from cascade.models.stack import DecoderStack
from cascade.saturation.records import Format, ModelParts, TensorSummary

#: The number of rows of a matrix that decide its format. A row of int8 that is not int8 by chance
#: would need all its weights on the grid.
_ROWS = 16


#: How far a weight may be from the int8 grid, in steps: the rounding of a product in fp32.
_OFF_GRID = 1e-4


#: Attributes of modules and config that say nothing about what is computed.
_IRRELEVANT = re.compile(
    r"^(_.*|training|name_or_path|gradient_checkpointing|layer_idx|.*_token_id|use_cache"
    r"|transformers_version|dtype|torch_dtype|architectures|return_dict|output_.*|problem_type"
    r"|chunk_size_feed_forward|initializer_range|max_seq_len_cached|loss_type|.*dropout.*|call_.*"
    r"|is_encoder_decoder|num_labels|id2label|label2id|original_max_seq_len|model_type)$"
)


#: The number of a layer in a name, and what `torch.compile` adds to a name.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_COMPILED = "_orig_mod."


#: The name of the setting that says whether the LM head is the embedding.
TIED = "tied embedding"


@torch.no_grad()
def parts_of(stack: DecoderStack) -> ModelParts:
    """Return the parts of a model: a summary of every tensor, and every scalar setting.

    This reads each weight once (540 MB in 0.6 s on one core).

    Args:
        stack: The model.
    """
    model: Any = stack.model
    tensors: dict[str, TensorSummary] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:  # `accelerate` keeps it on the disk
            continue
        tensors[plain_name(name)] = _summary(parameter, digest=True)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.numel() and not buffer.is_meta:
            tensors[plain_name(name)] = _summary(buffer, digest=False)
    settings = {name: _joined(values) for name, values in _settings(stack).items()}
    return ModelParts(tensors=tensors, settings=settings)


def plain_name(name: str) -> str:
    """Return the name of a tensor or module without what `torch.compile` adds to it."""
    return name.replace(_COMPILED, "")


def layer_and_kind(stack: DecoderStack, name: str) -> tuple[int | None, str]:
    """Return the decoder layer of a tensor or module, and its name within that layer.

    Args:
        stack: The model.
        name: The name, from `plain_name`.

    Returns:
        The layer from 1, or None outside of the layers, and the rest of the name.
    """
    prefix = layers_prefix(stack)
    if not name.startswith(prefix):
        return None, name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return int(number) + 1, rest


def layers_prefix(stack: DecoderStack) -> str:
    """Return what the names of everything in the decoder layers begin with."""
    first = stack.layers[0]
    name = next(name for name, module in stack.model.named_modules() if module is first)
    return plain_name(name).removesuffix("0")


def format_of(values: Tensor) -> Format:
    """Return the coarsest format that holds the values exactly, as far as a few rows show.

    Args:
        values: A tensor; int8 is looked for in matrices only, as one scale per row or for all.
    """
    if not values.is_floating_point():
        return "int8" if values.dtype is torch.int8 else "float32"
    rows = values.detach().reshape(-1, values.shape[-1])[:_ROWS] if values.ndim else values[None]
    rows = rows.float()
    if values.ndim >= 2 and values.shape[-1] >= 8 and _on_grid(rows):
        return "int8"
    if torch.equal(rows.bfloat16().float(), rows):
        return "bfloat16"
    return "float16" if torch.equal(rows.half().float(), rows) else "float32"


def _on_grid(rows: Tensor) -> bool:
    """Return whether each weight is a multiple of 1/127 of the largest weight of its row."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    steps = rows / (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return bool(largest.any()) and bool(((steps - steps.round()).abs() <= _OFF_GRID).all())


def _summary(values: Tensor, *, digest: bool) -> TensorSummary:
    found = xxh3_128()
    rms, shape = 0.0, "float32"
    for tensor in plain_tensors(values):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{plain.dtype} {list(plain.shape)}".encode())
        found.update(plain.flatten().view(torch.uint8).numpy().data)
        if plain.is_floating_point() and plain.numel() and not rms:
            norm = torch.linalg.vector_norm(plain.float(), dtype=torch.float64)
            rms, shape = float(norm) / plain.numel() ** 0.5, format_of(plain)
    return TensorSummary(
        digest=found.hexdigest()[:16] if digest else "",
        rms=float(f"{rms:.9g}"),
        format=shape,  # type: ignore[arg-type]  # of format_of
    )


# --- Settings --------------------------------------------------------------------------------


def setting_places(stack: DecoderStack, name: str) -> list[tuple[Any, str]]:
    """Return where a setting is stored: the owner and the attribute of each of its values.

    Args:
        stack: The model.
        name: A name in `ModelParts.settings`.
    """
    return [
        (owner, key)
        for found, owner, key, _ in _values_of(stack)
        if found == name and not isinstance(owner, Mapping)
    ]


def _settings(stack: DecoderStack) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, _, _, value in _values_of(stack):
        found.setdefault(name, []).append(as_text(value))
    head = getattr(stack.lm_head, "weight", None)
    embedding = getattr(stack.model.get_input_embeddings(), "weight", None)
    found[TIED] = [as_text(head is not None and head is embedding)]
    return found


def _values_of(stack: DecoderStack) -> Iterator[tuple[str, Any, str, Any]]:
    """Yield each scalar setting as (name, owner, attribute, value), in a fixed order."""
    for path, module in stack.model.named_modules():
        for key, value in vars(module).items():
            if _is_setting(key, value) and not _is_size(module, key):
                yield f"{_NUMBER.sub('*', plain_name(path))}.{key}", module, key, value
    config = text_config_of(stack.model.config)
    for key, value in sorted(vars(config).items()):
        if isinstance(value, Mapping) and not _IRRELEVANT.match(key):
            yield from _values_within(value, f"config.{key}")
        elif _is_setting(key, value):
            yield f"config.{key}", config, key, value


def _values_within(values: Mapping[Any, Any], path: str) -> Iterator[tuple[str, Any, str, Any]]:
    """Yield each scalar of a mapping in the config; RoPE has one mapping per kind of layer."""
    for key, value in sorted(values.items(), key=lambda item: str(item[0])):
        if isinstance(value, Mapping):
            yield from _values_within(value, f"{path}.{key}")
        elif _is_setting(str(key), value):
            yield f"{path}.{key}", values, str(key), value


def _is_setting(key: str, value: object) -> bool:
    is_scalar = value is None or isinstance(value, bool | int | float | str)
    return is_scalar and not _IRRELEVANT.match(key)


def _is_size(module: nn.Module, key: str) -> bool:
    """Return whether an attribute repeats the shape of a weight or belongs to torch itself."""
    return type(module).__module__.startswith("torch.") and key != "eps"


def as_text(value: object) -> str:
    """Return a setting as text; floats with seven digits, as many as fp32 has."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.7g}"
    return f"{text}.0" if text.lstrip("-").isdigit() else text


def from_text(text: str) -> object:
    """Return a setting from its text, see `as_text`."""
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value


def _joined(values: list[str]) -> list[str]:
    return values[:1] if len(set(values)) == 1 else values
