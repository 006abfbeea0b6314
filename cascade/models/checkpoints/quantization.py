"""Quantized checkpoints: the packages that read them, how they are read, and how they are named."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cascade.core.errors import ModelError
from cascade.models.checkpoints.reading import is_installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Method:
    """A quantization method that `transformers` knows.

    Attributes:
        title: Its name in messages.
        packages: What it needs: the name for pip, and the module to import.
        device: The only type of device that it runs on; None where CPUs can run it.
        dequantized: Its weights are dequantized when they are read. `transformers` would do so
            only where a package or the machine's GPU lacks the kernels.
        unreadable: Why `transformers` cannot read its checkpoints; None where it can.
    """

    title: str
    packages: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    dequantized: bool = False
    unreadable: str | None = None


#: Packages whose modules and tensors every model consists of.
_USUAL = {"torch", "transformers", "cascade", "builtins", "accelerate"}

#: By the `quant_method` of config.json. Others are left to `transformers`.
METHODS = {
    "aqlm": Method("AQLM", {"aqlm[cpu,gpu]": "aqlm"}),
    "auto-round": Method("AutoRound", {"auto-round": "auto_round"}),
    "awq": Method("AWQ", {"gptqmodel": "gptqmodel"}),
    "bitnet": Method("BitNet"),
    "bitsandbytes": Method("bitsandbytes", {"bitsandbytes": "bitsandbytes"}),
    "compressed-tensors": Method(
        "compressed-tensors", {"compressed-tensors": "compressed_tensors"}
    ),
    "eetq": Method("EETQ", {"kernels": "kernels"}, device="cuda"),
    "fbgemm_fp8": Method("FBGEMM FP8", {"fbgemm-gpu-genai": "fbgemm_gpu"}, device="cuda"),
    "fouroversix": Method("Four Over Six", {"fouroversix": "fouroversix"}, device="cuda"),
    "fp8": Method("fp8", dequantized=True),
    "fp_quant": Method("FP-Quant", {"fp_quant": "fp_quant"}, device="cuda"),
    "gguf": Method("GGUF", unreadable="expected its .gguf file, give --model that file"),
    "gptq": Method("GPTQ", {"optimum": "optimum", "gptqmodel": "gptqmodel"}),
    "higgs": Method(
        "HIGGS",
        {"flute-kernel": "flute", "fast_hadamard_transform": "fast_hadamard_transform"},
        device="cuda",
    ),
    "hqq": Method("HQQ", unreadable="transformers reads no checkpoints of it; dequantize them"),
    "metal": Method("Metal", {"kernels": "kernels"}, device="mps"),
    "mxfp4": Method("MXFP4", dequantized=True),
    "mxfp8": Method("MXFP8", dequantized=True),
    "nvfp4": Method("NVFP4", unreadable="transformers reads no checkpoints of it; dequantize them"),
    "quanto": Method("Quanto", {"optimum-quanto": "optimum.quanto"}),
    "quark": Method("Quark", {"amd-quark": "quark"}),
    "sinq": Method("SINQ", {"sinq": "sinq"}),
    "spqr": Method("SpQR", {"spqr_quant[gpu]": "spqr_quant"}, device="cuda"),
    "torchao": Method("torchao", {"torchao": "torchao"}),
    "vptq": Method("VPTQ", {"vptq": "vptq"}, device="cuda"),
}


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are quantized.

    Attributes:
        method: The `quant_method` of its config.json.
        text: Method, bits and group size, for provenance and reports.
        block: Rows and columns of a weight that share a scale (fp8); None for other methods.
    """

    method: str
    text: str
    block: tuple[int, ...] | None = None


def quantization_of(config: Mapping[str, Any], source: str) -> Quantization | None:
    """Return how a config says that its weights are quantized; None without quantization.

    Args:
        config: The content of config.json.
        source: The model, for the error.

    Raises:
        ModelError: The method is absent or unknown. `transformers` would read such weights as if
            they were not quantized.
    """
    settings = _settings(config)
    if not settings:
        return None
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if not isinstance(settings, Mapping):
        method = settings
    elif settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"  # whose older configs name no method
    else:
        method = settings.get("quant_method")
    if isinstance(method, str) and method in [*AUTO_QUANTIZER_MAPPING, "bitsandbytes"]:
        assert isinstance(settings, Mapping)  # AUTO_QUANTIZER_MAPPING holds no bare names
        block = settings.get("weight_block_size")
        blocks = tuple(block) if isinstance(block, list) else None
        return Quantization(method, _described(method, settings), blocks)
    known = sorted({name.partition("_4bit")[0] for name in AUTO_QUANTIZER_MAPPING} & set(METHODS))
    raise ModelError(
        f"{source} is quantized with {method or 'a method that its config.json does not name'};"
        f" expected a quant_method among {', '.join(known)}: update transformers, or get a"
        " dequantized checkpoint"
    )


def _settings(config: Mapping[str, Any]) -> Any:
    """Return the quantization settings of a config, or of its text decoder."""
    nested = config.get("text_config")
    inner = nested.get("quantization_config") if isinstance(nested, Mapping) else None
    return config.get("quantization_config") or inner


def _described(method: str, settings: Mapping[str, Any]) -> str:
    """Return e.g. "gptq, 4 bit, groups of 128"."""
    bits, groups, kinds = set[int](), set[int](), set[str]()
    for weights in _weight_settings(settings):
        for name in ("bits", "num_bits", "w_bit", "nbits"):
            if isinstance(weights.get(name), int):
                bits.add(weights[name])
        for name in ("group_size", "q_group_size"):
            if isinstance(weights.get(name), int) and weights[name] > 0:
                groups.add(weights[name])
        for name in ("format", "_type", "quant_type", "weights", "fmt"):
            if isinstance(weights.get(name), str):
                kinds.add(weights[name])
    if method == "bitsandbytes":
        four = settings.get("load_in_4bit")
        bits = {4 if four else 8}
        kinds = {str(settings.get("bnb_4bit_quant_type", "fp4"))} if four else set()
    inputs = {
        int(group["input_activations"].get("num_bits") or 0)
        for group in _mappings(settings.get("config_groups"))
        if isinstance(group.get("input_activations"), Mapping)
    }
    block = settings.get("weight_block_size")
    dequantized = METHODS[method].dequantized if method in METHODS else False
    details = [
        method,
        *sorted(kinds),
        f"{_joined(bits)} bit" if bits else "",
        f"activations of {_joined(inputs)} bit" if inputs else "",
        f"groups of {_joined(groups)}" if groups else "",
        f"blocks of {' x '.join(map(str, block))}" if isinstance(block, list) else "",
        "dequantized" if dequantized else "",
    ]
    return ", ".join(detail for detail in details if detail)


def _joined(numbers: set[int]) -> str:
    return "/".join(map(str, sorted(numbers)))


def _weight_settings(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the settings and those nested in them that describe how weights are quantized."""
    yield settings
    for group in _mappings(settings.get("config_groups")):  # compressed-tensors
        yield from _mappings([group.get("weights")])
    for kind in _mappings(settings.get("quant_type")):  # torchao
        yield kind
        yield from _mappings([kind.get("_data")])


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    found = values.values() if isinstance(values, Mapping) else values or []
    return [value for value in found if isinstance(value, Mapping)]


def check_readable(quantization: Quantization, source: str, device: torch.device | None) -> None:
    """Check that this machine can read and run a quantized checkpoint, before it is read.

    Args:
        quantization: How it is quantized.
        source: The model, for errors.
        device: Where it will run; None where a device map decides.

    Raises:
        ModelError: A package is missing, or the method runs on GPUs only.
    """
    method = METHODS.get(quantization.method)
    if method is None:
        return
    about = f"{source} is quantized with {method.title}"
    if method.unreadable:
        raise ModelError(f"{about}: {method.unreadable}")
    if method.device and device is not None and device.type != method.device:
        raise ModelError(
            f"{about}, which runs on {method.device} devices only, got {device}; use --device"
            f" {method.device} on a machine with one, or get a dequantized checkpoint"
        )
    missing = [pip for pip, module in method.packages.items() if not is_installed(module)]
    if missing:
        packages = " and ".join(missing)
        plural = "s" if missing[1:] else ""
        raise ModelError(
            f"{about}, which needs the package{plural} {packages}; run"
            f" `pip install {' '.join(missing)}`, or get a dequantized checkpoint"
        )


def dequantize_when_read(config: Any, quantization: Quantization) -> None:
    """Tell `transformers` to dequantize the weights, for methods that it may dequantize.

    It would do so depending on the GPU and on the packages that are installed.

    Args:
        config: The config of `transformers`; changed in place.
        quantization: How the weights are quantized.
    """
    method = METHODS.get(quantization.method)
    if method is None or not method.dequantized:
        return
    for owner in (config, config.get_text_config()):
        settings = getattr(owner, "quantization_config", None)
        if isinstance(settings, dict):
            settings["dequantize"] = True


@torch.no_grad()
def unify_dtype(model: PreTrainedModel, dtype: torch.dtype, quantization: Quantization) -> None:
    """Give a dequantized model one dtype.

    `transformers` dequantizes into the wanted dtype, but leaves the other weights in that of the
    files.

    Args:
        model: The model; changed in place.
        dtype: The wanted dtype.
        quantization: How its weights were quantized.
    """
    method = METHODS.get(quantization.method)
    if method is None or not method.dequantized:
        return
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


@torch.no_grad()
def decompress(model: PreTrainedModel) -> None:
    """Decompress weights that a package would decompress when the whole model is first called.

    `DecoderStack` calls the decoder, not the model around it.

    Args:
        model: Any model; only one read by compressed-tensors is called, with one token.
    """
    if hasattr(model, "ct_decompress_hook"):
        model(torch.zeros((1, 1), dtype=torch.long, device=model.device))


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def packages_of(layers: nn.Module) -> str:
    """Return the packages besides torch and transformers that compute layers, with versions.

    Args:
        layers: The decoder layers.

    Returns:
        E.g. "bitsandbytes 0.50.2"; empty where there are none.
    """
    classes = {type(each) for each in [*layers.modules(), *layers.parameters()]}
    names = {each.__module__.partition(".")[0] for each in classes}
    # A Linear whose forward is replaced, as compressed-tensors does.
    replaced = [vars(module).get("forward") for module in layers.modules()]
    names |= {each.__module__.partition(".")[0] for each in replaced if each is not None}
    others = names - _USUAL
    if not others:  # nearly always; reading all installed packages takes a third of a second
        return ""
    distributions = _distributions()
    found = {distribution for name in others for distribution in distributions.get(name, [])}
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(found))
