"""Fitted heads: the file that stores exit heads and propagation maps."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from cascade.core.errors import RecordError, UsageError
from cascade.core.files import AnyPath, atomic_path
from cascade.core.provenance import ModelProvenance
from cascade.core.reading import UnreadableError, parse_json, read_tensors
from cascade.core.records import has_hash, record_hash
from cascade.core.schema import from_plain, known, to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.bos import check_same_bos
from cascade.exits.heads import PropagationMap, RidgeHead
from cascade.exits.records import HeadsMetadata, HeadsProvenance
from cascade.models.identity import check_same_model
from cascade.models.stack import DecoderStack

#: The sequence of every ten that is held out to choose ridge strengths and epochs.
HELD_OUT = 9


@dataclass
class FittedHeads:
    """Ridge heads and propagation maps of several exit layers, with their provenance.

    Attributes:
        weights: Exit layer -> `(W [D, D], b [D])` of its head.
        maps: Exit layer -> `(W [D, layers * width], b [layers * width])` of its propagation map.
        width: Outputs of a propagation map per upper layer.
        of_states: Whether the maps predict layer inputs instead of keys and values.
        provenance: The model and the corpus that the heads were fitted with.

    Example:
        >>> from cascade import fit_heads, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, seq_len=32, max_tokens=640)
        >>> heads = fit_heads(stack, blocks, [24, 28])
        >>> heads.layers
        [24, 28]
        >>> heads.head(stack, 28).name
        'ridge'
    """

    weights: dict[int, tuple[Tensor, Tensor]]
    maps: dict[int, tuple[Tensor, Tensor]]
    width: int
    of_states: bool
    provenance: HeadsProvenance = field(default_factory=HeadsProvenance)

    @property
    def layers(self) -> list[int]:
        """The exit layers, ascending."""
        return sorted(self.weights)

    def _check_exit(self, stack: DecoderStack, layer: int) -> None:
        if layer not in self.weights:
            raise UsageError(
                f"expected a layer that these heads were fitted for "
                f"({', '.join(map(str, self.layers))}), got {layer}; fit it with `cascade "
                "fit-heads --layers`"
            )
        self.check(stack)

    def head(self, stack: DecoderStack, layer: int) -> RidgeHead:
        """Return the ridge head of an exit layer.

        Args:
            stack: The model that the heads were fitted for.
            layer: A layer of `layers`.

        Raises:
            UsageError: No head was fitted for this layer.
            ModelError: The heads belong to another model.
        """
        self._check_exit(stack, layer)
        return RidgeHead(stack, *self.weights[layer])

    def propagation(self, stack: DecoderStack, layer: int) -> PropagationMap | None:
        """Return the propagation map of an exit layer, or None for the last layer.

        Args:
            stack: The model that the heads were fitted for.
            layer: A layer of `layers`.

        Raises:
            UsageError: No map was fitted for this layer.
            ModelError: The heads belong to another model.
        """
        self._check_exit(stack, layer)
        if layer == stack.num_layers:
            return None
        weight, bias = (tensor.to(stack.device) for tensor in self.maps[layer])
        return PropagationMap(
            weight, bias, first=layer + 1, width=self.width, of_states=self.of_states
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 over all weights; two heads share it only if all weights are equal."""
        digest = hashlib.sha256()
        for name, pairs in (("head", self.weights), ("propagation", self.maps)):
            for layer in sorted(pairs):
                digest.update(f"{name}.{layer}".encode())
                for tensor in pairs[layer]:
                    digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def saw(self, blocks: TokenBlocks) -> bool:
        """Return whether a corpus overlaps the one that the heads were fitted on.

        Two corpora overlap if they are the same or if one is a split of the other. Heads perform
        better on text that they were fitted on, so results on such a corpus do not generalize.

        Args:
            blocks: A corpus to measure on.
        """
        fitted = known(self.provenance.corpus)
        if fitted is None:
            return False
        if fitted.fingerprint == blocks.fingerprint():
            return True
        names = f"{fitted.name}-", f"{blocks.name}-"
        same = names[0].startswith(names[1]) or names[1].startswith(names[0])
        return same and fitted.source == blocks.source

    def check(self, stack: DecoderStack) -> None:
        """Check that the heads were fitted for this model.

        Args:
            stack: The model.

        Raises:
            ModelError: The heads belong to another model; names both models and what differs.
        """
        model = known(self.provenance.model) or ModelProvenance()
        tokenizer = known(model.tokenizer_hash) or known(self.provenance.tokenizer_hash)
        model = replace(model, tokenizer_hash=tokenizer)
        check_same_model(model, stack, what="these exit heads")

    def check_bos(self, bos: object) -> None:
        """Check that a text begins with BOS if the text that the heads were fitted on did.

        Args:
            bos: The `bos` of the text (see `TokenBlocks`).

        Raises:
            CorpusError: One text begins with BOS and the other does not.
        """
        fitted_on = known(self.provenance.corpus)
        if fitted_on is not None:
            check_same_bos(
                fitted_on.bos,
                bos,
                what="these exit heads were fitted on text",
                again="fit them again",
            )

    def metadata(self) -> HeadsMetadata:
        """Return what a file of these heads stores next to the weights."""
        return HeadsMetadata(width=self.width, of_states=self.of_states, provenance=self.provenance)

    def save(self, path: AnyPath, *, half: bool = False) -> None:
        """Write the heads to a safetensors file, atomically.

        Args:
            path: The file to write.
            half: Store the weights in float16, which halves the file's size.

        Raises:
            OutputError: The file cannot be written.
            UsageError: With `half`, a weight exceeds the range of float16.
        """
        from safetensors.torch import save

        path = Path(path)
        tensors = {}
        for kind, pairs in (("head", self.weights), ("propagation", self.maps)):
            for layer, (weight, bias) in pairs.items():
                for name, tensor in (("weight", weight), ("bias", bias)):
                    stored = _halved(tensor, layer) if half else tensor
                    tensors[f"{kind}.{layer}.{name}"] = stored.cpu().contiguous()
        about = with_hash(tensors, to_plain(self.metadata()))
        text = json.dumps(about, allow_nan=False)
        # `save_file` would write to another temporary file, which nobody removes after a kill.
        content = save(tensors, metadata={"cascade": text})
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)


def _halved(tensor: Tensor, layer: int) -> Tensor:
    stored = tensor.half()
    if not torch.isfinite(stored).all():
        raise UsageError(
            f"expected weights within the range of float16, got {float(tensor.abs().max()):.3g} at"
            f" exit layer {layer}; save the heads without half"
        )
    return stored


def load_heads(path: AnyPath, stack: DecoderStack) -> FittedHeads:
    """Return the fitted heads stored in a file, after checking that they belong to the model.

    Args:
        path: The safetensors file.
        stack: The model.

    Raises:
        RecordError: The file is missing or torn, or it does not contain exit heads.
        ModelError: The heads belong to another model; names both models.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from cascade import fit_heads, load, load_blocks, load_heads
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, seq_len=32, max_tokens=640)
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "heads.safetensors"
        ...     fit_heads(stack, blocks, [29]).save(path)
        ...     load_heads(path, stack).layers
        [29]
    """
    path = Path(path)
    if os.path.isdir(path):
        raise RecordError(
            f"{path} is a folder, expected the .safetensors file of `cascade fit-heads`"
        )
    heads = read_heads(path)
    heads.check(stack)
    return heads


def read_heads(path: Path) -> FittedHeads:
    """Return the fitted heads stored in a file, whatever model they belong to.

    Args:
        path: The safetensors file.

    Raises:
        RecordError: The file is missing, torn or edited, or it does not contain exit heads.
    """
    try:
        stored, metadata = read_tensors(path)
        about = parse_json(metadata.get("cascade", "null"))
    except FileNotFoundError as error:
        raise RecordError(
            f"expected exit heads at {path}, found no file; create it with `cascade fit-heads`"
        ) from error
    except UnreadableError as error:
        raise RecordError(
            f"{path} is not a readable safetensors file ({error}); create it again with `cascade "
            "fit-heads`"
        ) from error
    kind = HeadsMetadata.KIND, HeadsMetadata.SCHEMA
    if not isinstance(about, dict) or (about.get("kind"), about.get("schema")) != kind:
        raise RecordError(
            f"{path} does not contain exit heads; create them with `cascade fit-heads`"
        )
    try:
        _check_hash(stored, about)
        tensors = {name: tensor.float() for name, tensor in stored.items()}
        return _assembled(tensors, from_plain(about, HeadsMetadata))
    except ValueError as error:
        raise RecordError(
            f"{path} is torn or edited ({error}); create it again with `cascade fit-heads`"
        ) from error


def with_hash(tensors: Mapping[str, Tensor], about: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata with a hash over the stored tensors and over itself."""
    unsealed = {name: value for name, value in about.items() if name != "hash"}
    digest = hashlib.sha256(record_hash(unsealed).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return unsealed | {"hash": f"sha256:{digest.hexdigest()}"}


def _check_hash(tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Raise ValueError unless the hash is that of the content. Older files have none."""
    if has_hash(about) and with_hash(tensors, about)["hash"] != about["hash"]:
        raise ValueError("it was changed after it was written, its hash differs")


def _assembled(tensors: dict[str, Tensor], metadata: HeadsMetadata) -> FittedHeads:
    """Return the content of a file as heads.

    Raises:
        ValueError: The file is incomplete or inconsistent; says what is wrong.
    """
    width, (hidden, last) = metadata.width, _sizes_of(metadata.provenance)
    if metadata.of_states and width != hidden:
        raise ValueError(
            f"expected a width of {hidden} where layer inputs are predicted, got {width}"
        )
    _check_tensors(tensors, _shapes(tensors, hidden, last, width))

    def pairs(kind: str) -> dict[int, tuple[Tensor, Tensor]]:
        layers = [int(name.split(".")[1]) for name in tensors if name.startswith(f"{kind}.")]
        return {
            layer: (tensors[f"{kind}.{layer}.weight"], tensors[f"{kind}.{layer}.bias"])
            for layer in layers
        }

    return FittedHeads(
        pairs("head"), pairs("propagation"), width, metadata.of_states, metadata.provenance
    )


def _sizes_of(provenance: HeadsProvenance) -> tuple[int, int]:
    """Return the hidden size and the number of layers of the heads' model."""
    model = known(provenance.model)
    if model is None:
        raise ValueError("expected provenance.model, got nothing")
    hidden, layers = known(model.hidden_size), known(model.num_layers)
    if hidden is None:
        raise ValueError("expected provenance.model.hidden_size, got nothing")
    if layers is None:
        raise ValueError("expected provenance.model.num_layers, got nothing")
    return hidden, layers


def _shapes(
    tensors: Iterable[str], hidden: int, last: int, width: int
) -> dict[str, tuple[int, ...]]:
    """Return the expected shape of every tensor, for each layer that the tensor names mention."""
    named = [re.fullmatch(r"(?:head|propagation)\.([1-9]\d*)\.\w+", name) for name in tensors]
    layers = sorted({int(match[1]) for match in named if match is not None})
    return {
        f"{kind}.{layer}.{name}": shape
        for layer in layers
        if layer <= last
        for kind, outputs in (("head", hidden), ("propagation", (last - layer) * width))
        if outputs
        for name, shape in (("weight", (hidden, outputs)), ("bias", (outputs,)))
    }


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"unexpected tensor {name}, which exit heads of this model do not have")
    missing = sorted(expected.keys() - tensors.keys())
    if missing or not expected:
        raise ValueError(f"missing {', '.join(missing) or 'all heads'}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            got = list(tensors[name].shape)
            raise ValueError(f"expected {name} of shape {list(shape)}, got {got}")
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{name} contains NaN or infinite values")
