"""The weight files of a model folder: those that `transformers` reads, and their dtypes."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.core.errors import ModelError, first_line, os_reason

#: The files that `transformers` looks for, in its order. An index names the files of a split
#: checkpoint.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.gguf", "consolidated*.pth")
#: Files of these patterns that are no weights of a model.
_OTHER_FILES = {"training_args.bin", "optimizer.bin", "scheduler.bin"}

#: Dtypes of weights that mean nothing without the scales of a quantization.
_UNSCALED = {"BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"} | {
    f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        read: The files that `transformers` reads, sorted by name.
        others: Files with weights that it does not read, sorted by name.
    """

    read: tuple[Path, ...]
    others: tuple[Path, ...]


def weight_files(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """Find the files that `transformers` reads from a folder, and those that it does not read.

    Args:
        folder: The folder of the model.
        config: The content of its config.json.

    Raises:
        ModelError: The folder has no weights, or lacks files that its index names.
    """
    named = config.get("transformers_weights")
    names = (str(named),) if named else _NAMES
    # A dangling link is the model's file as well; reading it says what is wrong.
    first = next((folder / name for name in names if os.path.lexists(folder / name)), None)
    present = {path for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern)}
    present = {path for path in present if path.name not in _OTHER_FILES}
    if first is None:
        found = ", ".join(sorted(path.name for path in present))
        raise ModelError(
            f"{folder} holds no weights: expected {' or '.join(names)}"
            f"{', got ' + found if found else ''}; get the checkpoint again"
        )
    read = _shards(first) if first.suffix == ".json" else [first]
    return WeightFiles(tuple(sorted(read)), tuple(sorted(present - set(read))))


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except OSError as error:
        raise ModelError(
            f"cannot read {index}: {os_reason(error)}; get the checkpoint again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} names no files of weights ({first_line(error)}); get the checkpoint again"
        ) from error
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {len(missing)} of its {len(files)} weight files:"
            f" {', '.join(missing[:8])}{', ...' if missing[8:] else ''}; get them again"
        )
    return files


def check_stored_dtypes(source: str, files: Iterable[Path], parameters: Collection[str]) -> None:
    """Check that the weights of an unquantized model are stored as floating-point numbers.

    `transformers` would convert integers to floats without their scales.

    Args:
        source: The model, for the error.
        files: Its safetensors files. Others are skipped: `torch.save` keeps dtypes, and quantized
            checkpoints are not published so.
        parameters: Names of the parameters of the loaded model. Buffers may be integers.

    Raises:
        ModelError: A parameter is stored as integers or as 8-bit floats.
    """
    from safetensors import safe_open

    for file in files:
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                dtype = tensors.get_slice(name).get_dtype()
                if dtype in _UNSCALED and _is_parameter(name, parameters):
                    raise ModelError(
                        f"{source} stores {name} as {dtype}, but its config.json has no"
                        " quantization_config: expected floating-point weights; dequantize them, or"
                        " get a checkpoint whose config.json says how they are scaled"
                    )


def _is_parameter(name: str, parameters: Collection[str]) -> bool:
    """Return whether a stored name is that of a parameter, with or without the model's prefix."""
    return name in parameters or any(known.endswith(f".{name}") for known in parameters)
