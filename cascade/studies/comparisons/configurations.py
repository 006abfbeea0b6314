"""Sizes and operations of a model, computed from its configuration without its weights."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade.core.errors import ModelError, UnsupportedModelError, first_line
from cascade.core.schema import Part, from_plain
from cascade.models.architecture import (
    auto_class,
    check_config,
    find_layers,
    text_config_of,
)
from cascade.models.checkpoints.files import check_regular
from cascade.models.checkpoints.gguf_files import check_magic
from cascade.models.checkpoints.reading import quiet_transformers, read_or_explain
from cascade.models.checkpoints.weights import HUB_NAMES, WHEELS
from cascade.models.flops import full_flops, layer_flops
from cascade.models.layer_states import attending
from cascade.studies.comparisons.model_records import ModelSizes

#: File patterns of weights.
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    Attributes:
        family: Model family, for example "llama".
        num_layers: Number of decoder layers.
        hidden_size: Width of the residual stream.
        vocab_size: Number of outputs of the LM head.
        parameters: Number of parameters. Shared parameters are counted once.
        layer_parameters: Number of parameters of all decoder layers.
        seq_len: Tokens per sequence for which operations were counted.
        operations: Operations of the whole model per token; a multiply-add counts as two.
        layer_shares: Each decoder layer's share of the operations, `[N]`.
        lm_head_share: The LM head's share of the operations.
    """

    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    parameters: int
    layer_parameters: int
    seq_len: int
    operations: float
    layer_shares: tuple[float, ...]
    lm_head_share: float

    def spared(self, layer: int) -> float:
        """Return the share of operations in the layers behind an exit layer.

        A token that exits there saves at most this share, because it still needs the LM head, and
        keys and values in the upper layers.

        Args:
            layer: Exit layer, 1..N.
        """
        return sum(self.layer_shares[layer:])

    def record(self) -> ModelSizes:
        """Return the sizes as stored in a record, with rounded shares and operations."""
        return ModelSizes(
            family=self.family,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            parameters=self.parameters,
            layer_parameters=self.layer_parameters,
            seq_len=self.seq_len,
            operations_per_token=round(self.operations),
            layer_share=round(sum(self.layer_shares) / self.num_layers, 6),
            lm_head_share=round(self.lm_head_share, 6),
        )


def sizes_of(config: Any, seq_len: int) -> Sizes:
    """Count the parameters and operations of the model that a configuration describes.

    The model is built on the meta device, without memory for its weights, so its size is not
    limited.

    Args:
        config: A `transformers` configuration.
        seq_len: Tokens per sequence. The cost of attention grows with this length.

    Raises:
        UnsupportedModelError: The configuration does not describe a decoder-only model.
    """
    check_config(config)
    try:
        with quiet_transformers(), torch.device("meta"):
            # Use a copy, because building a model fills in missing fields of its configuration.
            model = auto_class(config).from_config(copy.deepcopy(config))
    except Exception as error:
        # Families raise different exceptions for inconsistent sizes.
        raise UnsupportedModelError(
            f"cannot build a {config.model_type} model from this configuration "
            f"({first_line(error)}); expected the config.json of a complete model"
        ) from error
    outline = _Outline.of(model)
    total = full_flops(outline, 1, seq_len)
    layers = layer_flops(outline, 1, seq_len)
    return Sizes(
        family=config.model_type,
        num_layers=len(outline.layers),
        hidden_size=outline.hidden_size,
        vocab_size=outline.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_parameters=sum(parameter.numel() for parameter in outline.layers.parameters()),
        seq_len=seq_len,
        operations=total / seq_len,
        layer_shares=tuple(layer / total for layer in layers),
        lm_head_share=1 - sum(layers) / total,
    )


@dataclass(frozen=True)
class _Outline:
    layers: nn.ModuleList
    attends: tuple[bool, ...]
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, model: Any) -> _Outline:
        text, layers = text_config_of(model.config), find_layers(model)
        return cls(layers, attending(model, layers), int(text.hidden_size), int(text.vocab_size))


def layer_at(depth: float | Fraction, num_layers: int) -> int:
    """Return the layer nearest to a relative depth, and the deeper one of two equally near.

    Args:
        depth: Relative depth, layer / N, in (0, 1].
        num_layers: Number of decoder layers, N.
    """
    return min(max(int(depth * num_layers + Fraction(1, 2)), 1), num_layers)


@dataclass(frozen=True)
class Configuration:
    """A model's configuration and its origin.

    Attributes:
        name: Name for reports.
        origin: Where the configuration was read from.
        config: The `transformers` configuration.
    """

    name: str
    origin: str
    config: Any


def known_names() -> Sequence[str]:
    """Return the short names of models whose configurations are part of the package."""
    return tuple(_known())


class _KnownModel(Part, frozen=True, kw_only=True):
    source: str
    hub_id: str
    config: dict[str, Any]


@cache
def _known() -> dict[str, _KnownModel]:
    text = resources.files("cascade").joinpath("data/configurations.json").read_text("utf-8")
    return from_plain(json.loads(text)["models"], dict[str, _KnownModel])


def read_configuration(source: str, *, revision: str | None = None) -> Configuration:
    """Read a model's configuration without its weights.

    Args:
        source: Source of the model, as for `cascade.load`. A folder needs only its config.json.
        revision: Hub revision.

    Raises:
        ModelError: The configuration is missing or cannot be read.
    """
    from transformers import AutoConfig

    path = Path(os.path.expanduser(source))
    if source not in WHEELS and os.path.exists(path):
        return _from_disk(path, source)
    known = _known().get(source) or _by_hub_id(source)
    if known is not None and revision is None:
        return Configuration(
            source.rpartition("/")[2].lower(),
            known.source,
            AutoConfig.for_model(**known.config),
        )
    return _from_hub(HUB_NAMES.get(source, source), revision)


def _by_hub_id(source: str) -> _KnownModel | None:
    return next((entry for entry in _known().values() if entry.hub_id == source), None)


def _from_disk(path: Path, source: str) -> Configuration:
    from transformers import AutoConfig

    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{source} holds no config.json; expected a saved transformers model")
        check_regular(path)
        config = read_or_explain(
            f"the config of {source}",
            lambda: AutoConfig.from_pretrained(path, trust_remote_code=False),
        )
        return Configuration(
            os.path.basename(os.path.realpath(path)).lower(), str(path / "config.json"), config
        )
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"expected a model folder or a .gguf file, got {source}")
    check_magic(path)
    config = read_or_explain(
        f"the config of {source}",
        lambda: AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        ),
    )
    return Configuration(path.stem.lower(), str(path), config)


def _from_hub(source: str, revision: str | None) -> Configuration:
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:
        # The Hub client raises many kinds of errors. All mean the same to the user.
        raise ModelError(
            f"no configuration of {source}: no such folder, and the Hub reports "
            f"({first_line(error)}); give a folder that holds config.json, or one of "
            f"{', '.join(known_names())}"
        ) from error
    return Configuration(source.replace("/", "--").lower(), f"hub: {source}", config)


def lacks_weights(source: str) -> bool:
    """Return whether a model is a local folder that holds a configuration but no weights."""
    path = Path(os.path.expanduser(source))
    if source in WHEELS or not os.path.isdir(path):
        return False
    found = any(True for pattern in _WEIGHTS for _ in path.glob(pattern))
    return (path / "config.json").exists() and not found
