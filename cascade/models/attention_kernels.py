"""The attention kernel that a model runs with, where its config names one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cascade.core.errors import UsageError
from cascade.models.checkpoints.reading import is_installed

#: The packages of the FlashAttention versions.
_FLASH = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}


def choose_attention(
    config: Any, wanted: str | None, *, device: torch.device | None, dtype: torch.dtype
) -> str | None:
    """Choose the attention kernel: the wanted one, the config's, or what every machine has.

    A kernel that a config names and this machine lacks is replaced by SDPA (or eager attention, for
    families without SDPA). Code is never downloaded because a config names it.

    Args:
        config: The config of `transformers`; changed in place where its kernel is replaced.
        wanted: The kernel that the user named; None for the config's.
        device: Where the model will run; None where a device map decides.
        dtype: The dtype that it will run in.

    Returns:
        The kernel in the config that was replaced; None if none was.

    Raises:
        UsageError: This machine lacks the wanted kernel.
    """
    if wanted is not None:
        lacking = _lacking(wanted, device, dtype)
        if lacking:
            raise UsageError(
                f"attn_implementation {wanted} cannot run here: it needs {lacking}; use sdpa or"
                " eager"
            )
        return None
    replaced = [
        (owner, owner._attn_implementation)
        for owner in _configs(config)
        if not _can_follow(owner._attn_implementation, device, dtype)
    ]
    for owner, _ in replaced:
        owner._attn_implementation = None  # transformers chooses SDPA, or eager without it
    return str(replaced[0][1]) if replaced else None


def _configs(config: Any) -> Iterator[Any]:
    """Yield a config and those nested in it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        nested = getattr(config, name, None)
        if hasattr(nested, "_attn_implementation"):
            yield from _configs(nested)


def _can_follow(kernel: Any, device: torch.device | None, dtype: torch.dtype) -> bool:
    """Return whether a model can run with the kernel that its config names."""
    if _is_plain(kernel):
        return True
    if not isinstance(kernel, str) or "/" in kernel or kernel.startswith("paged|"):
        return False  # code from the hub, and kernels of a server
    return _lacking(kernel, device, dtype) is None


def _is_plain(kernel: Any) -> bool:
    return kernel in (None, "eager", "sdpa")


def _lacking(kernel: str, device: torch.device | None, dtype: torch.dtype) -> str | None:
    """Return what a kernel needs that is not here, for messages; None if it can run."""
    from transformers import AttentionInterface
    from transformers.utils import import_utils

    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if kernel in _FLASH:
        check = getattr(import_utils, f"is_flash_attn_{kernel[-1]}_available", None)
        installed = check is not None and check()
        if installed and on_gpu and dtype in (torch.float16, torch.bfloat16):
            return None
        return f"the package {_FLASH[kernel]}, a CUDA device and --dtype bfloat16 or float16"
    if kernel == "flex_attention":  # on a CPU, compiling it took a minute for each shape
        return None if on_gpu else "a CUDA device"
    if "/" in kernel:  # on the hub
        return None if is_installed("kernels") else "the package kernels"
    if _is_plain(kernel) or kernel in AttentionInterface().valid_keys():
        return None
    return "an attention function that is registered under this name"
