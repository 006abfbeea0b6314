"""Provenance of a record: model, corpus, machine, library versions and command."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

from cascade.core.schema import UNSET, Count, Index, Part, UnsetType, from_plain

if TYPE_CHECKING:
    import torch

#: Versions that can move a number.
_LIBRARIES = ("cascade-exit", "torch", "transformers", "tokenizers", "datasets", "numpy", "gguf")


class ModelProvenance(Part, frozen=True, kw_only=True):
    """Which model a record is of; what is not known of a model in memory is absent."""

    family: str | UnsetType = UNSET
    num_layers: Count | UnsetType = UNSET
    hidden_size: Count | UnsetType = UNSET
    dtype: str | UnsetType = UNSET
    device: str | UnsetType = UNSET
    attention: str | UnsetType | None = UNSET
    source: str | UnsetType | None = UNSET
    name: str | UnsetType = UNSET
    revision: str | UnsetType | None = UNSET
    weights_hash: str | UnsetType | None = UNSET
    quantization: str | UnsetType | None = UNSET


class CorpusProvenance(Part, frozen=True, kw_only=True):
    """Which text a record is of."""

    source: str
    name: str
    fingerprint: str
    records: Index
    tokens: Count
    sequences: Count
    seq_len: Count
    part: str | UnsetType = UNSET
    parted: str | UnsetType = UNSET
    spread: str | UnsetType = UNSET


class MachineProvenance(Part, frozen=True, kw_only=True):
    """The machine details that affect the last digits of results.

    Attributes:
        capability: Absent from the first records, as `blas` is.
    """

    processor: str
    threads: Count
    capability: str | UnsetType = UNSET
    blas: str | UnsetType | None = UNSET
    accelerator: str | UnsetType = UNSET


class Provenance(Part, frozen=True, kw_only=True):
    """Where a record comes from: model, corpus, machine, versions and command."""

    tokenizer_hash: str | None = None
    model: ModelProvenance
    corpus: CorpusProvenance
    machine: MachineProvenance | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    command: str | None = None


class HasModelProvenance(Protocol):
    """A model that knows its origin, as `DecoderStack` does."""

    provenance: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where it runs."""


class HasCorpusProvenance(Protocol):
    """A corpus that knows its origin, as `TokenBlocks` does."""

    def provenance(self) -> dict[str, Any]:
        """Return what a record says of it."""


def provenance_of(
    stack: HasModelProvenance, blocks: HasCorpusProvenance, command: str | None
) -> dict[str, Any]:
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


def typed_provenance(provenance: dict[str, Any]) -> Provenance:
    """Return a typed provenance."""
    return from_plain(provenance, Provenance)


def machine_of(device: torch.device) -> dict[str, Any]:
    """Return the machine details that affect the last digits of results."""
    import torch

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
