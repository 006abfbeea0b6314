"""Provenance of a record: model, corpus, machine, library versions and command."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, Protocol

from msgspec import field
from msgspec.structs import replace

from cascade.core.float32_products import product_precision
from cascade.core.schema import UNSET, Count, Index, Part, UnsetType, from_plain, known, to_plain

if TYPE_CHECKING:
    import torch

#: Libraries whose version can change a result.
_LIBRARIES = ("cascade-exit", "torch", "transformers", "tokenizers", "datasets", "numpy", "gguf")


class ModelProvenance(Part, frozen=True, kw_only=True):
    """Which model a record describes. Details that are unknown for a model in memory are absent.

    Attributes:
        weights_hash: SHA-256 of the files that the weights were loaded from, or of the weights in
            memory.
        tokenizer_hash: Stored here in files of hard tokens and of fitted heads; other records
            store it in `Provenance`.
        altered: How the weights were altered after loading (see
            `cascade.studies.comparisons.altered_models`).
        unused_parts: Parts of the weight files outside the decoder that the model does not use,
            e.g. "mtp, vision_tower".
        text_decoder: The type of the text decoder, which alone was measured, of a model that also
            reads images or audio, e.g. "qwen2".
        adapter: The base model that an adapter was applied to; `source` is the adapter.
        unread_files: Other weight files in the model's folder, e.g. "consolidated.safetensors".
        attention_in_config: The attention kernel that the config names, where this machine lacks it
            and `attention` was used instead.
        placed: Where the layers are, of a model that a device map spreads over several devices,
            e.g. "cuda:0, cuda:1, cpu".
        packages: Packages that compute the layers in addition to torch and transformers, with
            versions, e.g. "bitsandbytes 0.50.2".
    """

    family: str | UnsetType = UNSET
    num_layers: Count | UnsetType = UNSET
    hidden_size: Count | UnsetType = UNSET
    dtype: str | UnsetType = UNSET
    device: str | UnsetType = UNSET
    attention: str | UnsetType | None = UNSET
    source: str | UnsetType | None = UNSET
    name: str | UnsetType | None = UNSET
    revision: str | UnsetType | None = UNSET
    weights_hash: str | UnsetType | None = UNSET
    quantization: str | UnsetType | None = UNSET
    tokenizer_hash: str | UnsetType | None = UNSET
    altered: str | UnsetType = UNSET
    unused_parts: str | UnsetType = UNSET
    unread_files: str | UnsetType = UNSET
    adapter: str | UnsetType = UNSET
    text_decoder: str | UnsetType = UNSET
    attention_in_config: str | UnsetType = UNSET
    placed: str | UnsetType = UNSET
    packages: str | UnsetType = UNSET


#: The splits of a corpus, by record. The first one trains, the second one selects and judges.
Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")


class CorpusProvenance(Part, frozen=True, kw_only=True):
    """Which text was measured.

    Attributes:
        record_split: "train" or "held-out", where only these records were read.
        split_rule: How records are assigned to the two.
        spread: How sequences were chosen, where not all of them were measured.
        empty_records: How many records were null or blank, if any were.
        form: The form of the records, if they are not in Alpaca form or read from a text column,
            e.g. "chat (messages), chat template".
        split: The split of a hub dataset or of the embedded corpus, if one was named.
        config: The configuration of a hub dataset, if one was named.
        text_column: The column that was read, if one was named.
        seed: The seed that the records were shuffled with, if they were.
        max_tokens: The maximum number of tokens, if one was given.
        num_samples: The maximum number of records, 0 for all, if it is not the default.
        bos: "yes" where each record and sequence begins with the tokenizer's BOS token; "no" where
            the tokenizer adds it but the text was read without.
    """

    source: str
    name: str
    fingerprint: str
    records: Index
    tokens: Count
    sequences: Count
    seq_len: Count
    record_split: str | UnsetType = field(default=UNSET, name="part")
    split_rule: str | UnsetType = field(default=UNSET, name="parted")
    spread: str | UnsetType = UNSET
    empty_records: Count | UnsetType = UNSET
    form: str | UnsetType = UNSET
    split: str | UnsetType = UNSET
    config: str | UnsetType = UNSET
    text_column: str | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    max_tokens: Count | UnsetType = UNSET
    num_samples: Index | UnsetType = UNSET
    bos: Literal["yes", "no"] | UnsetType = UNSET


class MachineProvenance(Part, frozen=True, kw_only=True):
    """The machine details that affect the last digits of results.

    Attributes:
        capability: The instruction set that torch uses, e.g. AVX512. The oldest records have
            neither this nor `blas`.
        products: How matrix products are rounded, e.g. "tf32"; absent where they are not. See
            `cascade.core.float32_products`.
    """

    processor: str
    threads: Count
    capability: str | UnsetType = UNSET
    blas: str | UnsetType | None = UNSET
    accelerator: str | UnsetType = UNSET
    products: str | UnsetType = UNSET


class MeasuringMachine(Part, frozen=True, kw_only=True):
    """A machine that measured some of the shards of a profile.

    Attributes:
        device: The device of the model.
        machine: Processor and threads.
        shards: How many shards it measured.
    """

    device: str
    machine: MachineProvenance
    shards: Count


class EngineProvenance(Part, frozen=True, kw_only=True):
    """How the tasks of a profile in shards were run. None of it is compared.

    Attributes:
        shards: The number of shards.
        engines: What started the tasks, such as "ray 2.60.0"; empty for `cascade measure-shard`.
        machines: The machines that measured, sorted by their details.
        planned: The machine that made the plan: it measured bin edges, noise and long sequences.
    """

    shards: Count
    engines: list[str]
    machines: list[MeasuringMachine]
    planned: MachineProvenance


class Provenance(Part, frozen=True, kw_only=True):
    """Where a record comes from: model, corpus, machine, versions and command.

    Attributes:
        engine: How the profile was measured in shards; absent for a profile of one pass.
    """

    tokenizer_hash: str | None = None
    model: ModelProvenance
    corpus: CorpusProvenance
    machine: MachineProvenance | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    command: str | None = None
    engine: EngineProvenance | UnsetType = UNSET


class HasModelProvenance(Protocol):
    """A model with provenance, such as `DecoderStack`."""

    provenance: ModelProvenance

    @property
    def device(self) -> torch.device:
        """The device of the weights."""


class HasCorpusProvenance(Protocol):
    """A corpus with provenance, such as `TokenBlocks`."""

    def provenance(self) -> CorpusProvenance:
        """Return which text was measured."""


def provenance_of(
    stack: HasModelProvenance, blocks: HasCorpusProvenance, command: str | None
) -> Provenance:
    """Return the provenance of a record: model, corpus, machine, versions and command.

    Args:
        stack: The model that was measured.
        blocks: The text on which it was measured.
        command: The command that the user ran; None for records made from Python.
    """
    return Provenance(
        tokenizer_hash=known(stack.provenance.tokenizer_hash),
        model=replace(stack.provenance, tokenizer_hash=UNSET),
        corpus=blocks.provenance(),
        machine=machine_of(stack.device),
        versions=library_versions(),
        command=command,
    )


def model_provenance(
    found: ModelProvenance, given: Mapping[str, Any] | ModelProvenance | None
) -> ModelProvenance:
    """Return a model's provenance: the details found in it, overridden by the given ones.

    Args:
        found: Details read from the model itself.
        given: Details that take precedence, under some of the names of `ModelProvenance`.

    Raises:
        TypeError: A name is not an attribute of `ModelProvenance`.
        SchemaError: A value has the wrong type.
    """
    plain = to_plain({} if given is None else given)
    for name in plain:
        if name not in ModelProvenance.__struct_fields__:
            names = ", ".join(ModelProvenance.__struct_fields__)
            raise TypeError(f"expected a provenance with names among {names}, got {name!r}")
    return from_plain(to_plain(found) | plain, ModelProvenance)


def machine_of(device: torch.device) -> MachineProvenance:
    """Return the machine details that affect the last digits of results.

    Args:
        device: The device that computes.
    """
    import torch

    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    cuda = device.type == "cuda"
    return MachineProvenance(
        processor=processor_name(),
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        blas=blas.group(1) if blas else None,
        accelerator=torch.cuda.get_device_name(device) if cuda else UNSET,
        products=product_precision(device) or UNSET,
    )


def library_versions(others: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python and of every library that can change a result.

    Args:
        others: Further packages, added at the end.
    """
    found = {"python": platform.python_version()}
    for name in (*_LIBRARIES, *others):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor_name() -> str:
    """Return the name of the processor."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
