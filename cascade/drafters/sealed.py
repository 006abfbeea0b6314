"""Safetensors files with a hash over their content, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from cascade.core.files import atomic_path
from cascade.core.reading import UnreadableError, parse_json, read_tensors
from cascade.exits.fitted_heads import with_hash


def write_sealed(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and what is known about them to a file, with their hash.

    Args:
        path: The file.
        tensors: The tensors, by name.
        about: Plain values, as in JSON.

    Raises:
        OutputError: The file cannot be written.
    """
    text = json.dumps(with_hash(tensors, dict(about)), allow_nan=False)
    content = save(dict(tensors), metadata={"cascade": text})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file, and what is known about them.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableError: It is torn or edited.
    """
    tensors, metadata = read_tensors(path)
    about: Any = parse_json(metadata.get("cascade", "null"))
    if not isinstance(about, dict) or with_hash(tensors, about)["hash"] != about.get("hash"):
        raise UnreadableError("it was changed after it was written, its hash differs")
    return tensors, about
