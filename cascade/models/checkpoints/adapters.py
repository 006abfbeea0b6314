"""PEFT adapters: a folder that holds an adapter of another model, and adapters in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cascade.core.errors import ModelError, first_line, os_reason
from cascade.models.checkpoints.reading import quiet_transformers

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def has_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter."""
    return (folder / _CONFIG).exists()


def check_alone(folder: Path) -> None:
    """Check that an adapter is not in the folder of a whole model.

    `transformers` would apply such an adapter only where peft is installed.

    Raises:
        ModelError: The folder holds a model as well.
    """
    weights = [name for name in os.listdir(folder) if name.startswith(("model", "pytorch_model"))]
    if weights:
        raise ModelError(
            f"{folder} holds an adapter ({_CONFIG}) and a model ({sorted(weights)[0]}): expected"
            " one of them; move the adapter to its own folder, or merge_and_unload() it"
        )


def base_of(folder: Path) -> str:
    """Return the model that an adapter was trained on, as a source for `load`.

    Args:
        folder: The folder of the adapter. A relative path is looked up from this folder first.

    Raises:
        ModelError: The adapter does not name its base model.
    """
    path = folder / _CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {os_reason(error)}; get the adapter again"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} names no base_model_name_or_path ({first_line(error)}); get the adapter again"
        ) from error
    if not base or not isinstance(base, str):
        raise ModelError(f"{path} names no base_model_name_or_path; add the path of the base model")
    return str(folder / base) if (folder / base).exists() else base


def adapter_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of an adapter: its settings and its weights.

    Raises:
        ModelError: The weights are missing.
    """
    weights = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise ModelError(
            f"{folder} lacks the weights of its adapter: expected {_WEIGHTS[0]}; get it again"
        )
    return folder / _CONFIG, weights


def apply_adapter(model: Any, folder: Path, source: str, *, merge: bool) -> Any:
    """Return a model with an adapter applied.

    Args:
        model: The base model.
        folder: The folder of the adapter.
        source: The adapter as the user named it, for errors.
        merge: Add the adapter to the weights. A quantized model keeps it beside them.

    Raises:
        ModelError: peft is not installed, or the adapter does not fit the model.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(
            f"{source} is an adapter, which needs the package peft; run"
            " `pip install cascade-exit[peft]`, or merge the adapter elsewhere"
        ) from None
    try:
        with quiet_transformers():
            adapted = PeftModel.from_pretrained(model, folder)
            return adapted.merge_and_unload() if merge else adapted.get_base_model()
    except Exception as error:  # peft raises many types, for a torn file and for another model
        raise ModelError(
            f"cannot apply the adapter {source}: {first_line(error)}; expected an adapter of its"
            " base model, get both again"
        ) from error


def without_wrapper(model: Any) -> Any:
    """Return the model inside a `PeftModel`, adapters in place; any other model itself."""
    wrapped = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return model.get_base_model() if wrapped else model
