"""Quantized checkpoints: whether the installed `transformers` knows how to read one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cascade.core.errors import ModelError


def quantization_method(config: Mapping[str, Any], source: str) -> str | None:
    """Return the quantization method that a config names, e.g. "awq"; None without quantization.

    Args:
        config: The content of config.json.
        source: The model, for the error.

    Raises:
        ModelError: The method is absent or unknown. `transformers` would read such weights as if
            they were not quantized.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if not isinstance(settings, dict):
        method = settings
    elif settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"  # whose older configs name no method
    else:
        method = settings.get("quant_method")
    if method in [*AUTO_QUANTIZER_MAPPING, "bitsandbytes"]:
        return str(method)
    raise ModelError(
        f"{source} is quantized with {method or 'a method that its config.json does not name'};"
        f" expected a quant_method among {', '.join(sorted(AUTO_QUANTIZER_MAPPING))}: update"
        " transformers, or get a dequantized checkpoint"
    )
