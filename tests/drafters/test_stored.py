"""Stored drafters: read back as they were, refused where they do not belong to the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from support.build_drafters import a_record
from support.tiny_drafters import LAYERS, TABLE, a_drafted_stack, a_moved_network, stored
from support.tiny_models import tiny_model, tiny_tokenizer

from cascade.core.errors import CascadeError, ModelError, OutputError, RecordError
from cascade.core.records import read_typed, write_record
from cascade.drafters.records import DrafterRecord
from cascade.drafters.stored import RECORD, WEIGHTS, read_drafter
from cascade.models.checkpoints.reading import file_hash
from cascade.models.stack import DecoderStack

TOKENS = torch.arange(1, 97, 2)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a stored drafter, as if they had been written so."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    record = read_typed(folder / RECORD, DrafterRecord)
    write_record(folder / RECORD, replace(record, sha256=file_hash(folder / WEIGHTS)))


def test_a_stored_drafter_is_read_back_in_bfloat16(tmp_path: Path) -> None:
    stack = a_drafted_stack()
    found = read_drafter(stored(tmp_path), stack)
    assert torch.equal(found.tokens, TOKENS)
    assert found.table.tensors().keys() == TABLE.tensors().keys()
    for name, tensor in TABLE.tensors().items():
        assert torch.equal(found.table.tensors()[name], tensor)
    assert found.network.feature_layers == LAYERS
    for name, weight in a_moved_network(stack).state_dict().items():
        assert torch.equal(found.network.state_dict()[name], weight.to(torch.bfloat16))
    assert not any(weight.requires_grad for weight in found.network.parameters())
    assert found.record == read_typed(tmp_path / RECORD, DrafterRecord)
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS, RECORD]


def test_weights_have_the_names_of_llama(tmp_path: Path) -> None:
    names = set(load_file(stored(tmp_path) / WEIGHTS))
    assert {"layer.self_attn.q_proj.weight", "layer.mlp.down_proj.weight", "d2t"} <= names
    assert {"layer.input_layernorm.weight", "norm.weight", "features_in.weight"} <= names
    assert not any("lm_head" in name or "embed_tokens" in name for name in names)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_biases_and_norms_of_heads_are_stored(family: str, tmp_path: Path) -> None:
    stack = a_drafted_stack(family)
    found = read_drafter(stored(tmp_path, stack), stack)
    own = "layer.self_attn.q_proj.bias" if family == "qwen2" else "layer.self_attn.q_norm.weight"
    assert own in found.network.state_dict()


def test_a_model_in_another_dtype_has_the_same_drafter(tmp_path: Path) -> None:
    model = tiny_model("llama")
    hashes = {"weights_hash": "sha256:of the files"}
    stack = DecoderStack(model, tokenizer=tiny_tokenizer(), provenance=hashes)
    folder = stored(tmp_path, stack)
    half = DecoderStack(model.bfloat16(), tokenizer=tiny_tokenizer(), provenance=hashes)
    assert read_drafter(folder, half).network.feature_layers == LAYERS


def test_a_drafter_of_other_weights_is_refused(tmp_path: Path) -> None:
    other = DecoderStack(tiny_model("llama", seed=1), tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match=r"this drafter belong to .* \(weights_hash .*\)"):
        read_drafter(stored(tmp_path), other)


def test_a_drafter_of_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\(family llama\), but the model is .*\(family qwen2\)"):
        read_drafter(stored(tmp_path), a_drafted_stack("qwen2"))


def test_a_drafter_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    stack = a_drafted_stack()
    other = DecoderStack(
        stack.model, tokenizer=tiny_tokenizer(), provenance={"tokenizer_hash": "sha256:other"}
    )
    before = DecoderStack(
        stack.model, tokenizer=tiny_tokenizer(), provenance={"tokenizer_hash": "sha256:one"}
    )
    with pytest.raises(ModelError, match="tokenizer_hash sha256:one"):
        read_drafter(stored(tmp_path, before), other)


def put(**tensors: Any) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda found: found.update(tensors)


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another dtype": (
        lambda found: found.update({"norm.weight": found["norm.weight"].float()}),
        r"expected norm.weight of .* in bfloat16, got float32; train the drafter again",
    ),
    "another shape": (
        lambda found: found.update({"state_next.weight": torch.zeros(3, 3).bfloat16()}),
        r"expected a tensor of shape \[32, 32\] as state_next.weight in .*, got \[3, 3\]",
    ),
    "a missing tensor": (
        lambda found: found.pop("norm.weight"),
        r"expected a tensor of shape \[32\] as norm.weight in .*, got nothing",
    ),
    "another tensor": (
        lambda found: found.update({"head": torch.zeros(2).bfloat16()}),
        r"expected no such tensor as head in .*, got \[2\]",
    ),
    "NaN": (
        lambda found: found["norm.weight"].fill_(float("nan")),
        "norm.weight of .* has NaN or infinite values",
    ),
    "no vocabulary": (
        lambda found: found.pop("d2t"),
        "expected 48 tokens in d2t of the drafter, got 0; train it again",
    ),
    "a shorter vocabulary": (
        lambda found: found.update(d2t=found["d2t"][:-1].clone()),
        "expected 48 tokens in d2t of the drafter, got 47",
    ),
    "another vocabulary": (
        lambda found: found.update(d2t=found["d2t"] + 60),
        "the drafter proposes token 155, but the model has 97 tokens",
    ),
    "no table": (
        lambda found: found.pop("table.counts"),
        "the drafter's table of n-grams is incomplete .*; train it again",
    ),
    "a torn table": (
        lambda found: found.update({"table.totals": found["table.totals"][1:].clone()}),
        "the drafter's table of n-grams is incomplete .*expected tensors of one length",
    ),
    "a table of another vocabulary": (
        lambda found: found["table.following"][:, 0].add_(97),
        "the drafter's table has tokens outside of 0..96; train it again for this model",
    ),
    "a vocabulary without EOS": (
        lambda found: found["d2t"][0].fill_(0),
        "a drafter that proposes the tokens that end a text, got one without token 1",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_drafter_that_does_not_fit_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    folder = stored(tmp_path)
    edit(folder, change)
    with pytest.raises(ModelError, match=message) as caught:
        read_drafter(folder, a_drafted_stack())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, length: int) -> None:
    path = stored(tmp_path) / WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(RecordError, match=r"drafter.safetensors is incomplete or changed \("):
        read_drafter(tmp_path, a_drafted_stack())


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path) / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RecordError, match=r"its hash differs from the one in record.json"):
        read_drafter(tmp_path, a_drafted_stack())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    (stored(tmp_path) / WEIGHTS).unlink()
    with pytest.raises(RecordError, match=r"drafter.safetensors is missing"):
        read_drafter(tmp_path, a_drafted_stack())


def test_an_edited_record_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path) / RECORD
    path.write_text(path.read_text().replace('"vocabulary": 48', '"vocabulary": 47'))
    with pytest.raises(RecordError, match="was changed after it was written"):
        read_drafter(tmp_path, a_drafted_stack())


def test_a_folder_without_a_drafter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no record .* make one with `cascade train-drafter`"):
        read_drafter(tmp_path / "none", a_drafted_stack())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_layers": [3, 1]}, "feature_layers in ascending order"),
        ({"feature_layers": []}, "feature_layers in ascending order"),
        ({"chosen_step": 7}, "an evaluation of chosen_step 7"),
        ({"calibration": [[0.5]]}, "16 bins in each calibration"),
        ({"calibration": []}, "16 bins in each calibration"),
        ({"methods": []}, "the figures of table and network in methods"),
    ],
)
def test_a_record_whose_entries_contradict_each_other_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_record(tmp_path / RECORD, replace(a_record(), **change))
    with pytest.raises(RecordError, match=message):
        read_typed(tmp_path / RECORD, DrafterRecord)


def test_a_record_of_more_layers_than_the_model_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="reads layer 9, but the model has 4"):
        read_drafter(stored(tmp_path, feature_layers=[1, 3, 9]), a_drafted_stack())


def test_an_earlier_drafter_is_replaced_only_on_request(tmp_path: Path) -> None:
    stored(tmp_path)
    before = json.loads((tmp_path / RECORD).read_text())
    with pytest.raises(OutputError, match="holds another run"):
        stored(tmp_path)
    assert json.loads((tmp_path / RECORD).read_text()) == before


def test_the_record_says_which_evaluation_was_kept() -> None:
    assert a_record().chosen().step == 600
    assert issubclass(ModelError, CascadeError)
