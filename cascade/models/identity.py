"""Hashes of weights and tokenizers, and checking that a file belongs to a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from cascade.core.errors import ModelError
from cascade.core.provenance import ModelProvenance
from cascade.core.schema import from_plain, known, to_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cascade.models.stack import DecoderStack


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 over everything that affects how a tokenizer encodes text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    else:
        text = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map])
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any, source: str) -> None:
    """Check that a tokenizer can be the model's: that it knows at least half of its tokens.

    `transformers` makes an empty tokenizer of some families where the files are missing. Models
    embed somewhat more tokens than their tokenizers know, to round the number up.

    Args:
        tokenizer: The tokenizer.
        config: The config of the model.
        source: The model, for the error.

    Raises:
        ModelError: The tokenizer knows fewer than half of the tokens.
    """
    embedded = int(config.get_text_config().vocab_size)
    if len(tokenizer) < embedded / 2:
        raise ModelError(
            f"the tokenizer of {source} knows {len(tokenizer)} tokens, but the model embeds"
            f" {embedded}; expected the model's own tokenizer: copy tokenizer.json and"
            " tokenizer_config.json from the model that it was made from"
        )


def weights_digest(model: nn.Module) -> str:
    """Return a SHA-256 over the current weights. Hashing 650 MB took 0.5 s on one core.

    Args:
        model: The model.
    """
    digest = hashlib.sha256()
    # Hash each weight once and without its name, because wrapping a module renames weights or
    # lists them twice.
    weights = model.state_dict(keep_vars=True).values()
    for value in {id(value): value for value in weights}.values():
        for tensor in plain_tensors(value):
            add_to_digest(digest, tensor)
    return f"in-memory-sha256:{digest.hexdigest()}"


def add_to_digest(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Add a tensor's dtype, shape and bytes to a digest."""
    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    numbers = tensor.detach().cpu().contiguous().flatten()
    digest.update(numbers.view(torch.uint8).numpy().data)


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of one weight; quantized weights consist of several."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


#: Details that two models must share, in addition to weights, to use the same heads.
IDENTITY = ("revision", "family", "num_layers", "hidden_size", "dtype")


def check_same_model(
    expected: ModelProvenance | Mapping[str, Any], stack: DecoderStack, *, what: str
) -> None:
    """Check that heads or a calibration were made for this model, revision and dtype.

    Args:
        expected: The `model` entry in the provenance of the heads or the calibration.
        stack: The loaded model.
        what: What is checked, for the error message.

    Raises:
        ModelError: They were made for another model; the message names both and the difference.
    """
    wanted, own = from_plain(to_plain(expected), ModelProvenance), stack.provenance
    differs = [name for name in IDENTITY if _value(wanted, name) != _value(own, name)]
    if not differs:  # hash the weights only if nothing else differs
        own = replace(own, weights_hash=stack.weights_hash())
        differs = ["weights_hash"] if known(wanted.weights_hash) != own.weights_hash else []
    if differs:
        raise ModelError(
            f"{what} belong to {_named(wanted, differs)}, but the model is "
            f"{_named(own, differs)}; make them again for this model"
        )


def _value(model: ModelProvenance, name: str) -> str | int | None:
    value: str | int | None = known(getattr(model, name))
    return value


def _named(model: ModelProvenance, differs: Sequence[str]) -> str:
    details = ", ".join(f"{name} {_value(model, name)}" for name in differs)
    return f"{known(model.name) or known(model.family) or 'an unknown model'} ({details})"
