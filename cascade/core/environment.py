"""The environment that a bug report describes: versions, processor, threads and folders."""

from __future__ import annotations

import os
import platform

from cascade.core.cache import cache_folder, hub_cache
from cascade.core.provenance import library_versions, machine_of
from cascade.core.schema import Part, known


class Environment(Part, frozen=True, kw_only=True):
    """The environment that a command runs in.

    Attributes:
        versions: Package -> version, Python's included.
        platform: Operating system and architecture.
        processor: Name of the processor.
        cores: Logical cores of the machine.
        threads: Threads that torch computes with.
        capability: Vector instructions that torch uses, e.g. "AVX512".
        blas: Library of matrix products.
        accelerators: Devices other than the processor.
        cache: The package's cache folder.
        model_cache: The hub's cache folder, which has downloaded models.
    """

    versions: dict[str, str]
    platform: str
    processor: str
    cores: int | None
    threads: int
    capability: str | None
    blas: str | None
    accelerators: list[str]
    cache: str
    model_cache: str


#: Packages that a bug report names, besides those that can move a number.
_MORE = ("safetensors", "accelerate", "huggingface-hub", "typer", "pytest")


def environment() -> Environment:
    """Return the environment of this process. Loads torch, and no other large package."""
    import torch

    machine = machine_of(torch.device("cpu"))
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("mps")
    return Environment(
        versions=library_versions(_MORE),
        platform=platform.platform(),
        processor=machine.processor,
        cores=os.cpu_count(),
        threads=machine.threads,
        capability=known(machine.capability),
        blas=known(machine.blas),
        accelerators=accelerators,
        cache=str(cache_folder()),
        model_cache=str(hub_cache()),
    )
