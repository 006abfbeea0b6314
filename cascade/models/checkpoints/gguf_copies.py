"""The dequantized copies of GGUF models in the user's cache folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.core.cache import cache_folder
from cascade.core.errors import ModelError, OutputError, first_line
from cascade.core.files import INCOMING, flush_to_disk, staging_folder, xxh3_of
from cascade.core.locks import locked
from cascade.core.reading import read_json
from cascade.models.checkpoints import gguf_files
from cascade.models.checkpoints.loading_report import check_loading_report
from cascade.models.checkpoints.reading import quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MANIFEST = "cascade.json"
_MANIFEST_SCHEMA = 1
#: Seconds to wait for another process that dequantizes the same file.
_WAIT = 1800.0
#: Number of the way in which copies of GGUF files are made. Since 2, with position scaling, and
#: only if no weight is missing.
_COPY = 2


def gguf_copy(files: Sequence[Path], digest: str) -> tuple[Path, str | None]:
    """Return the dequantized copy of a GGUF model and its quantization, creating it on first use.

    The key includes the release of `transformers`, which dequantizes. A release that dequantizes
    differently must show as drift and not be hidden by an older copy.

    Args:
        files: The `.gguf` files, in their order.
        digest: The hex SHA-256 that identifies them.

    Raises:
        ModelError: A file cannot be read, weights are missing, or the copy is broken.
        OutputError: The copy cannot be kept.
    """
    import transformers
    from safetensors import SafetensorError

    key = f"{digest[:32]}-transformers-{transformers.__version__}-{_COPY}"
    folder = cache_folder() / "weights" / key
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder, wait=_WAIT, doing="dequantizing into"):
                if not folder.exists():  # another process may have created it meanwhile
                    dequantize(files, folder)
        except (
            OSError,
            SafetensorError,
        ) as error:  # safetensors reports a full disk as SafetensorError
            reason = getattr(error, "strerror", None) or first_line(error)
            raise OutputError(
                f"cannot keep the dequantized copy of {files[0].name} in {folder.parent}: "
                f"{reason}; free some space or set CASCADE_CACHE to another folder"
            ) from error
    return folder, _verified_quantization(folder)


def dequantize(files: Sequence[Path], folder: Path) -> None:
    """Write a GGUF model as a folder of plain fp32 weights, all of it or nothing.

    Raises:
        ModelError: A file is torn, lacks weights, or cannot be expressed in `transformers`.
        OSError: The folder cannot be written.
    """
    with staging_folder(folder.parent, INCOMING) as staging:
        with quiet_transformers():
            quantization, model, tokenizer = _read_gguf(files, folder.parent)
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
        (staging / _MANIFEST).write_text(
            json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8"
        )
        for path in (*staging.iterdir(), staging):
            flush_to_disk(path)
        staging.rename(folder)
        flush_to_disk(folder.parent)


def _read_gguf(
    files: Sequence[Path], parent: Path
) -> tuple[str | None, PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = files[0]
    with staging_folder(parent, ".reading-") as alone:
        # transformers prefers a tokenizer.json next to the file to the tokenizer inside it.
        copy = alone / path.name
        from_here: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
        try:
            if files[1:]:
                gguf_files.merge(files, copy)
            else:
                copy.symlink_to(path.resolve())
            from gguf import GGUFReader

            reader = GGUFReader(copy)
            gguf_files.check_unsplit(reader, path)
            tokenizer = AutoTokenizer.from_pretrained(alone, **from_here)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                alone,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **_dequantized(),
                **from_here,
            )
            model, report = loaded
            check_loading_report(path.name, model, report)
            gguf_files.check_tensors(reader, path, model)
            _scale_positions(model.config, reader, path)
            return gguf_files.quantization(reader), model, tokenizer
        except ModelError:
            raise
        except Exception as error:
            # A damaged file can raise any error in the reader; the remedy is the same.
            raise ModelError(
                f"cannot read {path} as GGUF ({first_line(error)}): it is truncated, corrupted or"
                " of an unsupported architecture; get the file again"
            ) from error


def _dequantized() -> dict[str, Any]:
    """Return the option that dequantizes, also where the package kernels could run packed weights.

    Older releases of `transformers` have no such option, and always dequantize.
    """
    import transformers

    settings = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def _scale_positions(config: Any, reader: GGUFReader, path: Path) -> None:
    """Add the position scaling of a GGUF file to the config that was read from it."""
    rotary: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    if rotary is not None and rotary.get("rope_type", "default") != "default":
        return  # read by transformers itself
    theta = float((rotary or {}).get("rope_theta", 10_000.0))
    try:
        scaling = gguf_files.position_scaling(reader, theta)
    except ModelError as error:
        raise ModelError(f"{path.name}: {error}") from error
    if not scaling:
        return
    if rotary is None:
        raise ModelError(
            f"{path.name} scales positions by {scaling['rope_type']}, but {config.model_type} has"
            " no rotary positions in transformers; get the model in safetensors format"
        )
    config.rope_parameters = rotary | scaling


def _verified_quantization(folder: Path) -> str | None:
    """Check a dequantized copy against its manifest; return the quantization it names."""
    try:
        manifest = read_json(folder / _MANIFEST)
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
