"""How precisely PyTorch multiplies matrices of float32: in full, or rounded to fewer digits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: What `torch` calls full precision; "none" inherits it.
_FULL = ("ieee", "none")
#: What the settings of `torch.set_float32_matmul_precision` mean, for versions before 2.9.
_LEGACY = {"cpu": {"high": "tf32", "medium": "bf16"}, "cuda": {"high": "tf32", "medium": "tf32"}}
_AUTOCAST = " by autocast"
_LEGACY_NAMES = {"tf32": "high", "bf16": "medium"}


def product_precision(device: torch.device) -> str | None:
    """Return how products of float32 are rounded on a device; None in full precision.

    `torch.set_float32_matmul_precision`, `torch.backends.*.matmul.fp32_precision` and
    `torch.autocast` change it.

    Args:
        device: The device that computes.

    Returns:
        "tf32", "bf16", or e.g. "bfloat16 by autocast". None too where the device ignores what is
        set.

    Example:
        >>> import torch
        >>> product_precision(torch.device("cpu")) is None
        True
        >>> with torch.autocast("cpu"):
        ...     product_precision(torch.device("cpu"))
        'bfloat16 by autocast'
    """
    import torch

    if _is_autocast(device):
        name = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        return name + _AUTOCAST
    if device.type not in _LEGACY:
        return None
    backend = _backend(device)
    if hasattr(backend, "fp32_precision"):
        found = str(backend.fp32_precision)
    else:
        found = _LEGACY[device.type].get(torch.get_float32_matmul_precision(), _FULL[0])
    return None if found in _FULL or not _rounds(device, found) else found


@functools.cache
def _rounds(device: torch.device, precision: str) -> bool:
    """Return whether the precision that is set changes products: older processors ignore it."""
    import torch

    rows = torch.arange(128 * 256, device=device, dtype=torch.float32).view(128, 256).sin()
    with torch.no_grad():
        found = torch.nn.functional.linear(rows, rows)
        with _set(device, None):
            return not torch.equal(found, torch.nn.functional.linear(rows, rows))


def unit_of(precision: str) -> float:
    """Return one unit in the last place of 1, after rounding.

    Args:
        precision: What `product_precision` returned.

    Example:
        >>> unit_of("tf32")
        0.0009765625
    """
    return 2.0**-10 if precision.startswith(("tf32", "float16")) else 2.0**-7


def is_by_autocast(precision: str) -> bool:
    """Return whether it is autocast that rounds, so that half precision is rounded too.

    Args:
        precision: What `product_precision` returned.
    """
    return precision.endswith(_AUTOCAST)


@contextlib.contextmanager
def products_in(device: torch.device, precision: str | None = None) -> Iterator[None]:
    """Multiply float32 in another precision inside a `with` block, without autocast.

    Args:
        device: The device that computes.
        precision: "tf32" or "bf16"; None for full precision.

    Example:
        >>> import torch
        >>> with torch.autocast("cpu"), products_in(torch.device("cpu")):
        ...     product_precision(torch.device("cpu")) is None
        True
    """
    import torch

    with contextlib.ExitStack() as restore:
        if _is_autocast(device):
            restore.enter_context(torch.autocast(device.type, enabled=False))
        restore.enter_context(_set(device, precision))
        yield


@contextlib.contextmanager
def _set(device: torch.device, precision: str | None) -> Iterator[None]:
    import torch

    if device.type not in _LEGACY:
        yield
        return
    backend = _backend(device)
    with contextlib.ExitStack() as restore:
        if hasattr(backend, "fp32_precision"):
            before = backend.fp32_precision
            wanted = precision or _FULL[0]
            if before != wanted and not (before in _FULL and wanted in _FULL):
                restore.callback(setattr, backend, "fp32_precision", before)
                backend.fp32_precision = wanted
        else:
            restore.callback(
                torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()
            )
            torch.set_float32_matmul_precision(_LEGACY_NAMES.get(precision or "", "highest"))
        yield


def _is_autocast(device: torch.device) -> bool:
    import torch

    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _backend(device: torch.device) -> Any:
    import torch

    backends: Any = torch.backends
    return backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
