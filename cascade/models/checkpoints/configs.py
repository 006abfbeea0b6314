"""Reading the config of a checkpoint, with errors that name the setting to correct."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.core.errors import ModelError
from cascade.core.reading import LARGEST_FOREIGN_JSON, UnreadableError, parse_json, read_bytes
from cascade.models.checkpoints.reading import cannot_read, read_or_explain, transformers_version

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a checkpoint.

    Raises:
        ModelError: It cannot be read, or is no JSON object.
    """
    try:
        data = read_bytes(path, largest=LARGEST_FOREIGN_JSON)
    except OSError as error:
        raise cannot_read(path, error) from error
    except UnreadableError as error:
        raise ModelError(f"cannot read {path}: {error}; get the checkpoint again") from error
    try:
        content = parse_json(data, foreign=True)
    except UnreadableError as error:
        raise ModelError(f"{path} is not JSON ({error}); correct it, or get it again") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path} is not a JSON object, but a {type(content).__name__}; get it again"
        )
    return content


def read_config(folder: Path, source: str) -> PreTrainedConfig:
    """Return the config of `transformers` in a folder.

    Args:
        folder: The folder.
        source: The model, for errors.

    Raises:
        ModelError: It cannot be read, is of no known family, or has settings that do not fit; the
            message names the setting.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    content = read_json(folder / "config.json")
    family = content.get("model_type")
    if not isinstance(family, str):
        raise ModelError(
            f"{folder / 'config.json'} names no model_type (got {family}); add the family of the"
            ' model, e.g. "model_type": "llama"'
        )
    if family not in CONFIG_MAPPING and "auto_map" not in content:
        raise ModelError(
            f"model_type {family} of {source} is unknown to transformers {transformers_version()};"
            " correct it in config.json, or update transformers"
        )
    if (folder / "generation_config.json").exists():
        # transformers would ignore a broken one, and generate with other settings.
        read_json(folder / "generation_config.json")
    config: PreTrainedConfig = read_or_explain(
        f"the config of {source}",
        lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False),
        advice="correct config.json",
    )
    return config
