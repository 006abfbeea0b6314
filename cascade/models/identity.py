"""Model identity: tokenizer hashes, and whether two records are of the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from cascade.core.errors import ModelError
from cascade.core.provenance import ModelProvenance
from cascade.core.schema import from_plain, known, to_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cascade.models.stack import DecoderStack


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 over all that decides how text becomes token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    else:
        text = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map])
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


#: What two models must share, beside their weights, for the heads of one to serve the other.
IDENTITY = ("revision", "family", "num_layers", "hidden_size", "dtype")


def check_same_model(
    expected: ModelProvenance | Mapping[str, Any], stack: DecoderStack, *, what: str
) -> None:
    """Refuse heads or a calibration of another model, revision or dtype.

    Args:
        expected: The `model` part of the provenance of what is to be used.
        stack: The model at hand.
        what: What is to be used, for the error.

    Raises:
        ModelError: Names both models and what differs.
    """
    wanted, own = from_plain(to_plain(expected), ModelProvenance), stack.provenance
    differs = [name for name in IDENTITY if _value(wanted, name) != _value(own, name)]
    if not differs:  # else there is no need to read all weights
        own = replace(own, weights_hash=stack.weights_hash())
        differs = ["weights_hash"] if known(wanted.weights_hash) != own.weights_hash else []
    if differs:
        raise ModelError(
            f"{what} belong to {_named(wanted, differs)}, but the model is "
            f"{_named(own, differs)}; make them anew for this model"
        )


def _value(model: ModelProvenance, name: str) -> str | int | None:
    value: str | int | None = known(getattr(model, name))
    return value


def _named(model: ModelProvenance, differs: Sequence[str]) -> str:
    details = ", ".join(f"{name} {_value(model, name)}" for name in differs)
    return f"{known(model.name) or known(model.family) or 'an unknown model'} ({details})"
