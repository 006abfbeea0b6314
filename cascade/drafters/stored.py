"""Stored drafters: a folder with the record and the weights, which are switched together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec.structs import replace
from safetensors.torch import save
from torch import Tensor

from cascade.core.errors import ModelError, RecordError, first_line
from cascade.core.files import AnyPath
from cascade.core.reading import UnreadableError, check_tensors, read_tensors
from cascade.core.records import read_typed, to_file
from cascade.core.run_folder import RunFolder, current
from cascade.decoding.drafting.tables import NgramTable
from cascade.drafters.network.architectures import new_network
from cascade.drafters.network.drafter_network import DrafterNetwork
from cascade.drafters.network.layers import check_can_draft
from cascade.drafters.network.vocabulary import ends_of
from cascade.drafters.records import DrafterRecord
from cascade.models.checkpoints.reading import file_hash
from cascade.models.identity import check_same_model
from cascade.models.stack import DecoderStack

#: Files of a drafter: its record, and its weights.
RECORD, WEIGHTS = "record.json", "drafter.safetensors"

#: The tensor with the tokens that the network can propose, and the prefix of those of the table.
#: All others are weights of the network.
_TOKENS, _TABLE = "d2t", "table."


@dataclass(frozen=True)
class Drafter:
    """A drafter of a model, as it is stored.

    Attributes:
        network: Its network, in bfloat16 as stored.
        tokens: The tokens that it can propose, ascending, `[V']`.
        table: What followed each n-gram of the texts that it was trained on.
        record: Its record.
    """

    network: DrafterNetwork
    tokens: Tensor
    table: NgramTable
    record: DrafterRecord


def write_drafter(out: RunFolder, drafter: Drafter) -> DrafterRecord:
    """Stage the files of a drafter.

    Args:
        out: The folder.
        drafter: The drafter; its record has no hash of the weights yet.

    Returns:
        The record with the hash.

    Raises:
        OutputError: The folder cannot be written.
    """
    tensors = {
        name: weight.detach().to(torch.bfloat16).cpu().contiguous()
        for name, weight in drafter.network.state_dict().items()
    }
    tensors[_TOKENS] = drafter.tokens.to(torch.int32).cpu().contiguous()
    tensors |= {f"{_TABLE}{name}": each for name, each in drafter.table.tensors().items()}
    out.write(WEIGHTS, save(tensors, metadata={"format": "pt"}))
    whole = replace(drafter.record, sha256=file_hash(out.staging / WEIGHTS))
    out.write(RECORD, to_file(whole))
    return whole


def read_drafter(path: AnyPath, stack: DecoderStack) -> Drafter:
    """Return the drafter in a folder, after checking that it belongs to the model.

    A drafter can be used with any dtype of the model that it was trained for.

    Args:
        path: The folder that `cascade train-drafter` wrote.
        stack: The model.

    Raises:
        RecordError: A file is missing, torn, edited or from a newer release.
        ModelError: The drafter belongs to another model, tokenizer or vocabulary.
        UnsupportedModelError: The model cannot have a drafter.
    """
    folder = Path(path)
    record = read_typed(folder / RECORD, DrafterRecord)
    own = replace(
        record.provenance.model, dtype=stack.provenance.dtype, device=stack.provenance.device
    )
    check_same_model(own, stack, what="the weights of this drafter")
    weights = _checked(folder / record.file, record)
    check_can_draft(stack)
    tokens = weights.pop(_TOKENS, None)
    names = [name for name in weights if name.startswith(_TABLE)]
    table = _table_of({name.removeprefix(_TABLE): weights.pop(name) for name in names}, stack)
    _check_tokens(tokens, record, stack)
    assert tokens is not None
    if record.feature_layers[-1] > stack.num_layers:
        raise ModelError(
            f"this drafter reads layer {record.feature_layers[-1]}, but the model has "
            f"{stack.num_layers}; train it again for this model"
        )
    network = new_network(record.config.architecture, stack, record.feature_layers)
    network.to(torch.bfloat16)
    _check_weights(weights, network.state_dict(), folder / record.file)
    network.load_state_dict(weights)
    network.requires_grad_(False)
    return Drafter(network, tokens.long(), table, record)


def _checked(path: Path, record: DrafterRecord) -> dict[str, Tensor]:
    """Return the tensors of a file after checking its hash.

    Raises:
        RecordError: It is missing, incomplete or changed.
    """
    path = current(path)
    try:
        # The header says whether the file is whole before all of it is read for its hash.
        check_tensors(path)
        same = file_hash(path) == record.sha256
        tensors, _ = read_tensors(path)
        flaw = None if same else f"its hash differs from the one in {RECORD}"
    except FileNotFoundError as error:
        raise RecordError(f"{path} is missing; restore it, or train the drafter again") from error
    except UnreadableError as error:
        flaw = str(error)
    if flaw is not None:
        raise RecordError(
            f"{path} is incomplete or changed ({flaw}); restore it, or train the drafter again"
        )
    return tensors


def _check_tokens(tokens: Tensor | None, record: DrafterRecord, stack: DecoderStack) -> None:
    """Check that a drafter's vocabulary is one of this model, and can end a text.

    Raises:
        ModelError: It is not.
    """
    count = 0 if tokens is None else tokens.numel()
    if tokens is None or tokens.dtype != torch.int32 or count != record.vocabulary:
        raise ModelError(
            f"expected {record.vocabulary:,} tokens in {_TOKENS} of the drafter, got {count:,}; "
            "train it again"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= stack.vocab_size:
        raise ModelError(
            f"the drafter proposes token {int(tokens.max())}, but the model has "
            f"{stack.vocab_size:,} tokens; train it again for this model"
        )
    missing = sorted(set(ends_of(stack)) - set(tokens.tolist()))
    if missing:
        raise ModelError(
            f"expected a drafter that proposes the tokens that end a text, got one without token "
            f"{missing[0]}; train it again for this model"
        )


def _table_of(tensors: Mapping[str, Tensor], stack: DecoderStack) -> NgramTable:
    """Return the table of n-grams of a drafter.

    Raises:
        ModelError: It has other tensors, or tokens that the model lacks.
    """
    try:
        table = NgramTable.from_tensors(tensors)
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"the drafter's table of n-grams is incomplete ({first_line(error)}); train it again"
        ) from error
    if not all(0 <= token < stack.vocab_size for token in table.tokens()):
        raise ModelError(
            f"the drafter's table has tokens outside of 0..{stack.vocab_size - 1}; train it again "
            "for this model"
        )
    return table


def _check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    for name in (*expected, *found):
        got, wanted = found.get(name), expected.get(name)
        if got is None or wanted is None or got.shape != wanted.shape:
            here = "nothing" if got is None else str(list(got.shape))
            there = (
                "no such tensor" if wanted is None else f"a tensor of shape {list(wanted.shape)}"
            )
            raise ModelError(
                f"expected {there} as {name} in {path}, got {here}; train the drafter again for "
                "this model"
            )
        if got.dtype != wanted.dtype:
            raise ModelError(
                f"expected {name} of {path} in {wanted.dtype}, got {got.dtype}; train the drafter "
                "again".replace("torch.", "")
            )
        if not torch.isfinite(got).all():
            raise ModelError(
                f"{name} of {path} has NaN or infinite values; train the drafter again"
            )
