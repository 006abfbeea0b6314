"""Fitted heads: saving, loading and checking that they belong to the model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.disk import contents, largest_file
from support.head_probes import TEXT, interrupt
from support.reference_early_exit import (
    LAYERS,
    a_stack,
    one_line,
    random_blocks,
    some_heads,
)
from support.tiny_models import FAMILIES, tiny_model
from torch import Tensor

from cascade.core.errors import ModelError, OutputError, RecordError, UsageError
from cascade.core.provenance import provenance_of
from cascade.core.schema import known
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import EarlyExit, make_exit
from cascade.evaluation.calibration import confidences
from cascade.evaluation.exit_evaluation import exit_provenance
from cascade.evaluation.operating_points import Evaluator
from cascade.exits.fitted_heads import FittedHeads, load_heads, with_hash
from cascade.exits.head_fitting import fit_heads
from cascade.exits.records import HeadsProvenance
from cascade.models.stack import DecoderStack

# --- Overlap with the fitted corpus -----------------------------------------------------------


@pytest.mark.parametrize(
    ("fitted", "measured", "expected"),
    [
        (("embedded", "embedded-train"), ("embedded", "embedded-held-out"), False),
        (("embedded", "embedded-train"), ("embedded", "embedded-train-fit"), True),
        (("embedded", "embedded-train"), ("embedded", "embedded"), True),
        (("embedded", "embedded"), ("embedded", "embedded-held-out-confirm"), True),
        (("a/text.jsonl", "text"), ("a/text.jsonl", "text"), True),
        (("a/text.jsonl", "text"), ("b/text.jsonl", "text"), False),
        (("org/text", "text-a"), ("org/text", "text-ab"), False),
    ],
)
def test_saw_detects_overlap_with_fitted_corpus(
    fitted: tuple[str, str], measured: tuple[str, str], expected: bool
) -> None:
    # The token ids differ, as those of one source do if it is cut in different ways.
    corpora = [
        TokenBlocks(random_blocks(3 + number).ids, source, name, 3)
        for number, (source, name) in enumerate((fitted, measured))
    ]
    heads = dataclasses.replace(
        some_heads("llama"), provenance=HeadsProvenance(corpus=corpora[0].provenance())
    )
    assert heads.saw(corpora[1]) is expected
    stack = a_stack("llama")
    assert exit_provenance(stack, corpora[1], None, heads=heads).heads_saw_corpus is expected
    assert heads.saw(dataclasses.replace(corpora[0], name="copy", source="elsewhere"))
    assert exit_provenance(stack, corpora[0], None).heads_saw_corpus is False


# --- Files ------------------------------------------------------------------------------------


def check_equal(got: FittedHeads, expected: FittedHeads, *, half: bool = False) -> None:
    """Raise AssertionError unless two heads are equal, with `half` after rounding to float16."""
    for kind in ("weights", "maps"):
        one, other = getattr(got, kind), getattr(expected, kind)
        assert one.keys() == other.keys()
        for layer, pair in one.items():
            for tensor, right in zip(pair, other[layer], strict=True):
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, right.half().float() if half else right)
    assert (got.width, got.of_states) == (expected.width, expected.of_states)
    assert got.provenance == expected.provenance


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_survive_round_trip(family: str, half: bool, tmp_path: Path) -> None:
    heads, path = some_heads(family), tmp_path / "new" / "heads.safetensors"
    heads.save(path, half=half)
    assert list(contents(tmp_path)) == ["new", "new/heads.safetensors"]
    check_equal(load_heads(path, a_stack(family)), heads, half=half)


def test_half_precision_halves_tensor_size(tmp_path: Path) -> None:
    heads = some_heads("gpt2")
    sizes = []
    for half in (False, True):
        heads.save(tmp_path / "heads.safetensors", half=half)
        with safe_open(tmp_path / "heads.safetensors", framework="pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        sizes.append(sum(tensor.nbytes for tensor in tensors))
    assert sizes[0] == 2 * sizes[1]


def test_loaded_heads_score_like_saved_heads(tmp_path: Path) -> None:
    stack, heads = a_stack("llama"), some_heads("llama")
    heads.save(tmp_path / "heads.safetensors")
    logits = []
    for fitted in (heads, load_heads(tmp_path / "heads.safetensors", stack)):
        early = EarlyExit(
            stack, layer=2, rule="top2_gap", threshold=0.2, heads=fitted, propagation="ridge"
        )
        logits.append(early.score(TEXT, keep_logits=True).logits)
    assert logits[0] is not None
    assert logits[1] is not None
    assert torch.equal(logits[0], logits[1])


def test_weights_beyond_float16_are_rejected(tmp_path: Path) -> None:
    heads = copy.deepcopy(some_heads("llama"))
    heads.maps[2][0][3, 4] = 70_000
    with pytest.raises(UsageError) as error:
        heads.save(tmp_path / "heads.safetensors", half=True)
    assert one_line(error) == (
        "expected weights within the range of float16, got 7e+04 at exit layer 2; save the heads "
        "without half"
    )
    assert contents(tmp_path) == {}
    heads.save(tmp_path / "heads.safetensors")


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_full_disk_leaves_existing_file_unchanged(size: int, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new"):
        path = folder / "heads.safetensors"
        if folder == tmp_path:
            path.write_text("existing content")
        before = contents(tmp_path)
        with largest_file(size), pytest.raises(OutputError) as error:
            some_heads("llama").save(path)
        message = one_line(error)
        assert message.startswith(f"cannot write {path}: ")
        assert "File too large" in message
        assert message.endswith(
            "free some space or choose another folder (the existing file is unharmed)"
        )
        assert contents(tmp_path) == before


def test_interrupted_save_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        some_heads("llama").save(tmp_path / "new" / "heads.safetensors")
    assert contents(tmp_path) == {}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "heads.safetensors"
    some_heads("llama").save(path)
    return path


@pytest.mark.parametrize("kept", [0, 7, 100, 2000, -1], ids=str)
def test_torn_file_is_rejected(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(RecordError) as error:
        load_heads(saved, a_stack("llama"))
    assert one_line(error).startswith(f"{saved} is not a readable safetensors file (")
    assert str(error.value).endswith("); create it again with `cascade fit-heads`")


@pytest.mark.parametrize("content", [b"{}", b"\x00" * 64, b"layer,weight\n1,0.5\n"])
def test_file_in_other_format_is_rejected(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    with pytest.raises(RecordError, match="is not a readable safetensors file"):
        load_heads(saved, a_stack("llama"))


def test_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is a folder, expected the"):
        load_heads(tmp_path, a_stack("llama"))


def test_missing_file_error_names_command(tmp_path: Path) -> None:
    with pytest.raises(RecordError) as error:
        load_heads(tmp_path / "none.safetensors", a_stack("llama"))
    assert one_line(error) == (
        f"expected exit heads at {tmp_path / 'none.safetensors'}, found no file; create it with "
        "`cascade fit-heads`"
    )


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Change the tensors and metadata of a file, seal it and save it as safetensors again."""
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["cascade"])
    tensors = load_file(path)
    change(tensors, about)
    sealed = with_hash(tensors, about)
    save_file(tensors, path, metadata={"cascade": json.dumps(sealed)})


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"cascade": "null"}, {"cascade": "[1]"}, {"cascade": "{}"}]
)
def test_safetensors_file_without_heads_is_rejected(
    saved: Path, metadata: dict[str, str] | None
) -> None:
    save_file(load_file(saved), saved, metadata=metadata)
    with pytest.raises(RecordError) as error:
        load_heads(saved, a_stack("llama"))
    assert one_line(error) == (
        f"{saved} does not contain exit heads; create them with `cascade fit-heads`"
    )


def test_metadata_that_is_not_json_is_rejected(saved: Path) -> None:
    save_file(load_file(saved), saved, metadata={"cascade": "{"})
    with pytest.raises(RecordError, match="is not a readable safetensors file"):
        load_heads(saved, a_stack("llama"))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: about.update(schema=2),
        lambda tensors, about: about.update(kind="calibration"),
        lambda tensors, about: about.pop("kind"),
    ],
)
def test_other_schema_or_kind_is_rejected(saved: Path, change: Callable[..., Any]) -> None:
    rewrite(saved, change)
    with pytest.raises(RecordError, match="does not contain exit heads"):
        load_heads(saved, a_stack("llama"))


def spoil(name: str, value: float) -> Callable[..., Any]:
    return lambda tensors, about: tensors[name].view(-1)[3].fill_(value)


def of_model(**changes: Any) -> Callable[..., Any]:
    return lambda tensors, about: about["provenance"]["model"].update(changes)


def without(*names: str) -> Callable[..., Any]:
    return lambda tensors, about: [tensors.pop(name) for name in names]


def instead(name: str, *shape: int) -> Callable[..., Any]:
    return lambda tensors, about: tensors.update({name: torch.ones(shape)})


#: Changes to a file with heads of all four layers (hidden size 32, maps 32 wide), and a text that
#: the error message contains.
SPOILED: dict[str, tuple[Callable[..., Any], str]] = {
    "no bias": (without("head.2.bias"), "missing head.2.bias"),
    "no weight": (without("head.2.weight"), "missing head.2.weight"),
    "no map bias": (without("propagation.3.bias"), "missing propagation.3.bias"),
    "no map": (
        without("propagation.1.weight", "propagation.1.bias"),
        "missing propagation.1.bias, propagation.1.weight",
    ),
    "no head": (without("head.2.weight", "head.2.bias"), "missing head.2.bias, head.2.weight"),
    "no tensors": (lambda tensors, about: tensors.clear(), "missing all heads"),
    "unexpected tensor": (
        instead("lm_head", 2),
        "unexpected tensor lm_head, which exit heads of this model do not have",
    ),
    "layer is not a number": (instead("head.last.weight", 2), "tensor head.last.weight"),
    "unexpected parameter": (instead("head.2.scale", 2), "unexpected tensor head.2.scale"),
    "layer above the model": (instead("head.5.weight", 32, 32), "tensor head.5.weight"),
    "layer 0": (instead("head.0.weight", 32, 32), "unexpected tensor head.0.weight"),
    "map of the last layer": (instead("propagation.4.bias", 0), "tensor propagation.4.bias"),
    "head too small": (
        instead("head.2.weight", 16, 32),
        "expected head.2.weight of shape [32, 32], got [16, 32]",
    ),
    "bias too long": (instead("head.2.bias", 33), "head.2.bias of shape [32], got [33]"),
    "bias of two dimensions": (instead("head.2.bias", 1, 32), "shape [32], got [1, 32]"),
    "map too narrow": (
        instead("propagation.2.weight", 32, 32),
        "expected propagation.2.weight of shape [32, 64], got [32, 32]",
    ),
    "NaN in a head": (spoil("head.2.weight", math.nan), "head.2.weight contains NaN or infinite"),
    "infinity in a bias": (spoil("head.1.bias", math.inf), "head.1.bias contains NaN or infinite"),
    "NaN in a map": (spoil("propagation.1.weight", math.nan), "propagation.1.weight contains NaN"),
    "no width": (
        lambda tensors, about: about.pop("width"),
        "expected a whole number from 1 on at width, got nothing",
    ),
    "different width": (lambda tensors, about: about.update(width=8), "of shape [32, 24], got"),
    "width is a string": (lambda tensors, about: about.update(width="32"), 'at width, got "32"'),
    "of_states is a string": (
        lambda tensors, about: about.update(of_states="no"),
        'expected true or false at of_states, got "no"',
    ),
    "layer inputs of the wrong width": (
        lambda tensors, about: about.update(of_states=True, width=16),
        "expected a width of 32 where layer inputs are predicted, got 16",
    ),
    "no provenance": (
        lambda tensors, about: about.pop("provenance"),
        "expected an object at provenance, got nothing",
    ),
    "provenance is a list": (
        lambda tensors, about: about.update(provenance=[]),
        "expected an object at provenance, got []",
    ),
    "model is a string": (
        lambda tensors, about: about["provenance"].update(model="ours"),
        'expected an object at provenance.model, got "ours"',
    ),
    "num_layers is a string": (of_model(num_layers="4"), 'at provenance.model.num_layers, got "4"'),
    "no model": (
        lambda tensors, about: about["provenance"].pop("model"),
        "expected provenance.model, got nothing",
    ),
    "no num_layers": (
        lambda tensors, about: about["provenance"]["model"].pop("num_layers"),
        "expected provenance.model.num_layers, got nothing",
    ),
    "no hidden_size": (
        lambda tensors, about: about["provenance"]["model"].pop("hidden_size"),
        "expected provenance.model.hidden_size, got nothing",
    ),
    "hidden_size is null": (
        of_model(hidden_size=None),
        "at provenance.model.hidden_size, got null",
    ),
    "corpus is a list": (
        lambda tensors, about: about["provenance"].update(corpus=["embedded"]),
        'expected an object or null at provenance.corpus, got ["embedded"]',
    ),
    "no corpus tokens": (
        lambda tensors, about: about["provenance"]["corpus"].pop("tokens"),
        "from 1 on at provenance.corpus.tokens, got nothing",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_corrupt_file_error_names_problem(saved: Path, case: str) -> None:
    change, expected = SPOILED[case]
    rewrite(saved, change)
    with pytest.raises(RecordError) as error:
        load_heads(saved, a_stack("llama"))
    message = one_line(error)
    assert message.startswith(f"{saved} is torn or edited (")
    assert expected in message
    assert message.endswith("); create it again with `cascade fit-heads`")


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_last_layer_need_no_map(family: str, tmp_path: Path) -> None:
    heads = fit_heads(a_stack(family), random_blocks(), [LAYERS])
    heads.save(tmp_path / "heads.safetensors")
    assert load_heads(tmp_path / "heads.safetensors", a_stack(family)).layers == [LAYERS]


# --- Other models -----------------------------------------------------------------------------


OURS: dict[str, Any] = {"name": "ours", "weights_hash": "sha256:1", "revision": "main"}


def named_stack(**changes: Any) -> DecoderStack:
    return DecoderStack(tiny_model("llama"), provenance=OURS | changes)


@pytest.mark.parametrize(
    ("changes", "models"),
    [
        (
            {"name": "theirs", "weights_hash": "sha256:2"},
            "ours (weights_hash sha256:1), but the model is theirs (weights_hash sha256:2)",
        ),
        ({"revision": None}, "ours (revision main), but the model is ours (revision None)"),
        (
            {"name": None, "dtype": "bfloat16"},
            "ours (dtype float32), but the model is llama (dtype bfloat16)",
        ),
        (
            {"num_layers": 30, "hidden_size": 576},
            "ours (num_layers 4, hidden_size 32), but the model is ours (num_layers 30, "
            "hidden_size 576)",
        ),
    ],
)
def test_heads_of_another_model_error_names_both_models(
    changes: dict[str, Any], models: str, tmp_path: Path
) -> None:
    heads = fit_heads(named_stack(), random_blocks(), [2])
    heads.save(tmp_path / "heads.safetensors")
    other = named_stack(**changes)
    expected = f"these exit heads belong to {models}; make them again for this model"
    for use in (
        lambda: heads.check(other),
        lambda: load_heads(tmp_path / "heads.safetensors", other),
        lambda: EarlyExit(other, layer=2, threshold=0.5, heads=heads),
    ):
        with pytest.raises(ModelError) as error:
            use()
        assert one_line(error) == expected
    load_heads(tmp_path / "heads.safetensors", named_stack(device="elsewhere"))


def uses_of(heads: FittedHeads, stack: DecoderStack, saved: Path) -> list[Callable[[], object]]:
    """Return every call that uses heads together with a model."""
    return [
        lambda: heads.check(stack),
        lambda: heads.head(stack, 2),
        lambda: heads.propagation(stack, 2),
        lambda: make_exit(stack, 2, "cosine", 0.5, heads=heads),
        lambda: EarlyExit(stack, layer=2, threshold=0.5, heads=heads),
        lambda: EarlyExit(stack, heads=heads),
        lambda: Evaluator(stack, {2: ["cosine"]}, heads=heads),
        lambda: confidences(stack, random_blocks(), 2, "cosine", heads=heads),
        lambda: load_heads(saved, stack),
    ]


def test_heads_of_unnamed_model_require_equal_weights(tmp_path: Path) -> None:
    saved = tmp_path / "heads.safetensors"
    heads = fit_heads(DecoderStack(tiny_model("llama")), random_blocks(), [2])
    heads.save(saved)
    for use in uses_of(heads, DecoderStack(tiny_model("llama")), saved):
        use()
    trained = DecoderStack(tiny_model("llama"))
    trained.lm_head.weight.data[3, 4] += 1e-3
    for stack in (DecoderStack(tiny_model("llama", seed=1)), trained):
        model = known(heads.provenance.model)
        assert model is not None
        hashes = (model.weights_hash, stack.weights_hash())
        for use in uses_of(heads, stack, saved):
            with pytest.raises(ModelError) as error:
                use()
            assert one_line(error) == (
                f"these exit heads belong to llama (weights_hash {hashes[0]}), but the model is "
                f"llama (weights_hash {hashes[1]}); make them again for this model"
            )


def test_given_provenance_is_not_modified_and_weights_hash_is_added() -> None:
    stack, blocks = a_stack("llama"), random_blocks()
    origin = provenance_of(stack, blocks, "by hand")
    before = copy.deepcopy(origin)
    heads = fit_heads(stack, blocks, [2], provenance=origin)
    heads.check(stack)
    assert origin == before


def test_heads_of_same_weights_in_other_dtype_are_rejected() -> None:
    stack = DecoderStack(tiny_model("llama").bfloat16())
    with pytest.raises(ModelError, match=r"llama \(dtype float32\), but .* \(dtype bfloat16\)"):
        some_heads("llama").check(stack)


def test_heads_without_provenance_are_rejected() -> None:
    heads = dataclasses.replace(some_heads("llama"), provenance=HeadsProvenance())
    with pytest.raises(ModelError, match="belong to an unknown model"):
        heads.check(a_stack("llama"))


@pytest.mark.parametrize("layer", [3, 5, 0])
def test_unfitted_layer_error_lists_fitted_layers(layer: int) -> None:
    heads, stack = fit_heads(a_stack("llama"), random_blocks(), [2, 4]), a_stack("llama")
    for use in (heads.head, heads.propagation):
        with pytest.raises(UsageError) as error:
            use(stack, layer)
        assert one_line(error) == (
            f"expected a layer that these heads were fitted for (2, 4), got {layer}; fit it with "
            "`cascade fit-heads --layers`"
        )
