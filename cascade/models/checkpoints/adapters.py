"""PEFT adapters: a folder that holds an adapter of another model, and adapters in memory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from cascade.core.errors import CascadeError, ModelError, UnsupportedModelError, first_line
from cascade.models.checkpoints.configs import read_json
from cascade.models.checkpoints.reading import quiet_transformers

_CONFIG = "adapter_config.json"
#: Methods that change what the model reads, not what its layers compute.
_PROMPT_METHODS = {
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
}
#: Names of the weight files of a whole model.
_MODEL_WEIGHTS = r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
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
    names = os.listdir(folder)
    weights = [name for name in names if re.fullmatch(_MODEL_WEIGHTS, name)]
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
    settings = read_json(path)
    kind = str(settings.get("peft_type", "LORA")).upper()
    if kind in _PROMPT_METHODS:
        raise _changes_the_input(str(folder), kind)
    base = settings.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(f"{path} names no base_model_name_or_path; add the path of the base model")
    found = folder / os.path.expanduser(base)
    if not found.exists():
        return base
    if has_adapter(found):
        raise ModelError(
            f"{folder} is an adapter of {found}, which is an adapter itself; expected a model:"
            " merge the first one into its model with merge_and_unload(), and name that model in"
            f" {_CONFIG}"
        )
    return str(found)


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
        _check_used(adapted, folder, source)
        with quiet_transformers():
            if merge and _can_be_merged(adapted):
                return adapted.merge_and_unload()
            return adapted.get_base_model()
    except CascadeError:
        raise
    except Exception as error:  # peft raises many types, for a torn file and for another model
        raise ModelError(
            f"cannot apply the adapter {source}: {first_line(error)}; expected an adapter of its"
            " base model, get both again"
        ) from error


def _can_be_merged(adapted: Any) -> bool:
    """Return whether peft can add an adapter to the weights; the others stay beside them."""
    return not any(
        config.peft_type.value == "ADAPTION_PROMPT" or getattr(config, "lora_bias", False)
        for config in adapted.peft_config.values()
    )


def _check_used(adapted: Any, folder: Path, source: str) -> None:
    """Check that every tensor of an adapter was applied, and that it lacks none.

    peft only warns.

    Raises:
        ModelError: A tensor has no place in the base model, or one is missing.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    weights = adapter_files(folder)[1]
    if weights.suffix != ".safetensors":
        return
    with safe_open(weights, framework="np") as file:
        stored = set(file.keys())
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    unused = sorted(stored - expected - set(adapted.state_dict()))
    missing = sorted(expected - stored)
    if unused:
        raise ModelError(
            f"cannot apply the adapter {source}: its base model has no place for {unused[0]}"
            f" ({len(unused)} in all); expected an adapter of this model, check"
            f" base_model_name_or_path in {_CONFIG}"
        )
    if missing:
        raise ModelError(
            f"cannot apply the adapter {source}: it lacks {missing[0]} ({len(missing)} in all);"
            " get the adapter again"
        )


def _changes_the_input(source: str, kind: str) -> ModelError:
    return ModelError(
        f"{source} is an adapter of the kind {kind}, which adds virtual tokens to the input or to"
        " the cache; expected one that changes layers, such as LoRA"
    )


def without_wrapper(model: Any) -> Any:
    """Return the model inside a wrapper; any other model itself.

    Args:
        model: A model, perhaps in a `PeftModel` (whose adapters stay in place), or in the wrapper
            of data-parallel training.

    Raises:
        ModelError: The adapter adds virtual tokens, or the weights are spread over processes.
        UnsupportedModelError: It is no model of `transformers`.
    """
    if type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
        model = model.module
    if type(model).__name__ == "FullyShardedDataParallel":
        raise ModelError(
            "the model is wrapped in FullyShardedDataParallel, which spreads its weights over"
            " processes; expected a whole model, save it and load it again"
        )
    if not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"expected a causal language model of transformers, got {type(model).__name__}"
        )
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model
    for config in model.peft_config.values():
        if config.is_prompt_learning:
            raise _changes_the_input("the model", str(config.peft_type.value))
    return model.get_base_model()
