"""Provenance of a record: model, corpus, machine, library versions and command."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from typing import Any

import torch

from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack

#: Versions that can move a number.
_LIBRARIES = ("cascade-exit", "torch", "transformers", "tokenizers", "datasets", "numpy", "gguf")


def provenance_of(stack: DecoderStack, blocks: TokenBlocks, command: str | None) -> dict[str, Any]:
    """Return what a record says of its origin: model, corpus, machine, versions and command."""
    model = dict(stack.provenance)
    return {
        "tokenizer_hash": model.pop("tokenizer_hash", None),
        "model": model,
        "corpus": blocks.provenance(),
        "machine": machine_of(stack.device),
        "versions": library_versions(),
        "command": command,
    }


def machine_of(device: torch.device) -> dict[str, Any]:
    """Return what of this machine the last digits of a result depend on."""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    machine = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "blas": blas.group(1) if blas else None,
    }
    if device.type == "cuda":
        machine["accelerator"] = torch.cuda.get_device_name(device)
    return machine


def library_versions() -> dict[str, str]:
    """Return the versions that can move a number: Python's, and each library's."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
