"""Fitted heads come back from files as they were saved, and serve no other model."""

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
from cascade.exits.fitted_heads import FittedHeads, load_heads
from cascade.exits.head_fitting import fit_heads
from cascade.exits.records import HeadsProvenance
from cascade.models.stack import DecoderStack

# --- Fitting ----------------------------------------------------------------------------------


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
def test_heads_know_the_text_they_were_fitted_on(
    fitted: tuple[str, str], measured: tuple[str, str], expected: bool
) -> None:
    # Other tokens each: the same source can be cut otherwise.
    corpora = [
        TokenBlocks(random_blocks(3 + part).ids, source, name, 3)
        for part, (source, name) in enumerate((fitted, measured))
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
    """Raise AssertionError unless two heads are the same, or the same but for 16 bits."""
    for kind in ("weights", "maps"):
        one, other = getattr(got, kind), getattr(expected, kind)
        assert one.keys() == other.keys()
        for layer, pair in one.items():
            for part, right in zip(pair, other[layer], strict=True):
                assert part.dtype == torch.float32
                assert torch.equal(part, right.half().float() if half else right)
    assert (got.width, got.of_states) == (expected.width, expected.of_states)
    assert got.provenance == expected.provenance


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_come_back_as_they_were_saved(family: str, half: bool, tmp_path: Path) -> None:
    heads, path = some_heads(family), tmp_path / "new" / "heads.safetensors"
    heads.save(path, half=half)
    assert list(contents(tmp_path)) == ["new", "new/heads.safetensors"]
    check_equal(load_heads(path, a_stack(family)), heads, half=half)


def test_half_takes_half_the_room(tmp_path: Path) -> None:
    heads = some_heads("gpt2")
    sizes = []
    for half in (False, True):
        heads.save(tmp_path / "heads.safetensors", half=half)
        with safe_open(tmp_path / "heads.safetensors", framework="pt") as file:
            parts = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        sizes.append(sum(part.nbytes for part in parts))
    assert sizes[0] == 2 * sizes[1]


def test_loaded_heads_score_as_those_that_were_saved(tmp_path: Path) -> None:
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


def test_weights_that_16_bits_do_not_hold_are_refused(tmp_path: Path) -> None:
    heads = copy.deepcopy(some_heads("llama"))
    heads.maps[2][0][3, 4] = 70_000
    with pytest.raises(UsageError) as error:
        heads.save(tmp_path / "heads.safetensors", half=True)
    assert one_line(error) == (
        "the weights of exit layer 2 reach 7e+04, more than 16 bits hold; save them without half"
    )
    assert contents(tmp_path) == {}
    heads.save(tmp_path / "heads.safetensors")


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_full_disk_leaves_what_was_there(size: int, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new"):
        path = folder / "heads.safetensors"
        if folder == tmp_path:
            path.write_text("what was there before")
        before = contents(tmp_path)
        with largest_file(size), pytest.raises(OutputError) as error:
            some_heads("llama").save(path)
        said = one_line(error)
        assert said.startswith(f"cannot write {path}: ")
        assert "File too large" in said
        assert said.endswith(
            "free some space or choose another folder (the existing file is unharmed)"
        )
        assert contents(tmp_path) == before


def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safetensors.torch.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        some_heads("llama").save(tmp_path / "new" / "heads.safetensors")
    assert contents(tmp_path) == {}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "heads.safetensors"
    some_heads("llama").save(path)
    return path


@pytest.mark.parametrize("kept", [0, 7, 100, 2000, -1], ids=str)
def test_a_torn_file_is_refused(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(RecordError) as error:
        load_heads(saved, a_stack("llama"))
    assert one_line(error).startswith(f"{saved} is no readable safetensors file (")
    assert str(error.value).endswith("); make it anew with `cascade fit-heads`")


@pytest.mark.parametrize("content", [b"{}", b"\x00" * 64, b"layer,weight\n1,0.5\n"])
def test_a_file_of_another_kind_is_refused(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    with pytest.raises(RecordError, match="is no readable safetensors file"):
        load_heads(saved, a_stack("llama"))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is a folder, expected the"):
        load_heads(tmp_path, a_stack("llama"))


def test_a_missing_file_is_refused_with_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(RecordError) as error:
        load_heads(tmp_path / "none.safetensors", a_stack("llama"))
    assert one_line(error) == (
        f"no exit heads at {tmp_path / 'none.safetensors'}; make them with `cascade fit-heads`"
    )


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Change what a file holds and save it as safetensors again."""
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["cascade"])
    tensors = load_file(path)
    change(tensors, about)
    save_file(tensors, path, metadata={"cascade": json.dumps(about)})


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"cascade": "null"}, {"cascade": "[1]"}, {"cascade": "{}"}]
)
def test_other_safetensors_files_are_refused(saved: Path, metadata: dict[str, str] | None) -> None:
    save_file(load_file(saved), saved, metadata=metadata)
    with pytest.raises(RecordError) as error:
        load_heads(saved, a_stack("llama"))
    assert one_line(error) == (f"{saved} holds no exit heads; make them with `cascade fit-heads`")


def test_metadata_that_is_no_json_is_refused(saved: Path) -> None:
    save_file(load_file(saved), saved, metadata={"cascade": "{"})
    with pytest.raises(RecordError, match="is no readable safetensors file"):
        load_heads(saved, a_stack("llama"))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: about.update(schema=2),
        lambda tensors, about: about.update(kind="calibration"),
        lambda tensors, about: about.pop("kind"),
    ],
)
def test_another_schema_or_kind_is_refused(saved: Path, change: Callable[..., Any]) -> None:
    rewrite(saved, change)
    with pytest.raises(RecordError, match="holds no exit heads"):
        load_heads(saved, a_stack("llama"))


def spoil(name: str, value: float) -> Callable[..., Any]:
    return lambda tensors, about: tensors[name].view(-1)[3].fill_(value)


def of_model(**changes: Any) -> Callable[..., Any]:
    return lambda tensors, about: about["provenance"]["model"].update(changes)


def without(*names: str) -> Callable[..., Any]:
    return lambda tensors, about: [tensors.pop(name) for name in names]


def instead(name: str, *shape: int) -> Callable[..., Any]:
    return lambda tensors, about: tensors.update({name: torch.ones(shape)})


#: What is done to a file with heads of all four layers (hidden size 32, maps 32 wide), and the
#: words that say so.
SPOILED: dict[str, tuple[Callable[..., Any], str]] = {
    "no bias": (without("head.2.bias"), "lacks head.2.bias"),
    "no weight": (without("head.2.weight"), "lacks head.2.weight"),
    "no bias of a map": (without("propagation.3.bias"), "lacks propagation.3.bias"),
    "no map": (
        without("propagation.1.weight", "propagation.1.bias"),
        "lacks propagation.1.bias, propagation.1.weight",
    ),
    "no head": (without("head.2.weight", "head.2.bias"), "lacks head.2.bias, head.2.weight"),
    "nothing": (lambda tensors, about: tensors.clear(), "lacks heads altogether"),
    "another tensor": (instead("lm_head", 2), "has lm_head, which is no part of exit heads"),
    "a layer that is no number": (instead("head.last.weight", 2), "has head.last.weight"),
    "another part": (instead("head.2.scale", 2), "has head.2.scale"),
    "a layer of another model": (instead("head.5.weight", 32, 32), "has head.5.weight"),
    "layer 0": (instead("head.0.weight", 32, 32), "has head.0.weight"),
    "a map of the last layer": (instead("propagation.4.bias", 0), "has propagation.4.bias"),
    "a head too small": (
        instead("head.2.weight", 16, 32),
        "expected head.2.weight of shape [32, 32], got [16, 32]",
    ),
    "a bias too long": (instead("head.2.bias", 33), "head.2.bias of shape [32], got [33]"),
    "a bias of two dimensions": (instead("head.2.bias", 1, 32), "shape [32], got [1, 32]"),
    "a map too narrow": (
        instead("propagation.2.weight", 32, 32),
        "expected propagation.2.weight of shape [32, 64], got [32, 32]",
    ),
    "NaN in a head": (spoil("head.2.weight", math.nan), "head.2.weight holds NaN or infinite"),
    "infinity in a bias": (spoil("head.1.bias", math.inf), "head.1.bias holds NaN or infinite"),
    "NaN in a map": (spoil("propagation.1.weight", math.nan), "propagation.1.weight holds NaN"),
    "no width": (
        lambda tensors, about: about.pop("width"),
        "expected a whole number from 1 on at width, got nothing",
    ),
    "another width": (lambda tensors, about: about.update(width=8), "of shape [32, 24], got"),
    "a width in words": (lambda tensors, about: about.update(width="32"), 'at width, got "32"'),
    "a flag that is none": (
        lambda tensors, about: about.update(of_states="no"),
        'expected true or false at of_states, got "no"',
    ),
    "states of another width": (
        lambda tensors, about: about.update(of_states=True, width=16),
        "expected a width of 32 where layer inputs are predicted, got 16",
    ),
    "no provenance": (
        lambda tensors, about: about.pop("provenance"),
        "expected an object at provenance, got nothing",
    ),
    "a provenance that is none": (
        lambda tensors, about: about.update(provenance=[]),
        "expected an object at provenance, got []",
    ),
    "a model that is none": (
        lambda tensors, about: about["provenance"].update(model="ours"),
        'expected an object at provenance.model, got "ours"',
    ),
    "layers in words": (of_model(num_layers="4"), 'at provenance.model.num_layers, got "4"'),
    "no model": (
        lambda tensors, about: about["provenance"].pop("model"),
        "expected provenance.model, got nothing",
    ),
    "a model without layers": (
        lambda tensors, about: about["provenance"]["model"].pop("num_layers"),
        "expected provenance.model.num_layers, got nothing",
    ),
    "a model without a size": (
        lambda tensors, about: about["provenance"]["model"].pop("hidden_size"),
        "expected provenance.model.hidden_size, got nothing",
    ),
    "a size that is none": (
        of_model(hidden_size=None),
        "at provenance.model.hidden_size, got null",
    ),
    "a corpus that is none": (
        lambda tensors, about: about["provenance"].update(corpus=["embedded"]),
        'expected an object or null at provenance.corpus, got ["embedded"]',
    ),
    "a corpus without tokens": (
        lambda tensors, about: about["provenance"]["corpus"].pop("tokens"),
        "from 1 on at provenance.corpus.tokens, got nothing",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_file_that_is_not_whole_is_refused_with_what_is_wrong(saved: Path, case: str) -> None:
    change, words = SPOILED[case]
    rewrite(saved, change)
    with pytest.raises(RecordError) as error:
        load_heads(saved, a_stack("llama"))
    said = one_line(error)
    assert said.startswith(f"{saved} is torn or edited (")
    assert words in said
    assert said.endswith("); make it anew with `cascade fit-heads`")


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_the_last_layer_alone_need_no_map(family: str, tmp_path: Path) -> None:
    heads = fit_heads(a_stack(family), random_blocks(), [LAYERS])
    heads.save(tmp_path / "heads.safetensors")
    assert load_heads(tmp_path / "heads.safetensors", a_stack(family)).layers == [LAYERS]


# --- Other models -----------------------------------------------------------------------------


OURS: dict[str, Any] = {"name": "ours", "weights_hash": "sha256:1", "revision": "main"}


def named_stack(**changes: Any) -> DecoderStack:
    return DecoderStack(tiny_model("llama"), provenance=OURS | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
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
def test_heads_of_another_model_are_refused_with_both_named(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    heads = fit_heads(named_stack(), random_blocks(), [2])
    heads.save(tmp_path / "heads.safetensors")
    other = named_stack(**changes)
    expected = f"these exit heads belong to {said}; make them anew for this model"
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
    """Return every way in which heads can come to serve a model."""
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


def test_heads_of_a_model_in_memory_serve_its_weights_and_no_others(tmp_path: Path) -> None:
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
                f"llama (weights_hash {hashes[1]}); make them anew for this model"
            )


def test_what_else_is_known_of_an_origin_does_not_hide_the_weights() -> None:
    stack, blocks = a_stack("llama"), random_blocks()
    origin = provenance_of(stack, blocks, "by hand")
    before = copy.deepcopy(origin)
    heads = fit_heads(stack, blocks, [2], provenance=origin)
    heads.check(stack)
    assert origin == before


def test_heads_of_the_same_weights_in_another_dtype_are_refused() -> None:
    stack = DecoderStack(tiny_model("llama").bfloat16())
    with pytest.raises(ModelError, match=r"llama \(dtype float32\), but .* \(dtype bfloat16\)"):
        some_heads("llama").check(stack)


def test_heads_without_provenance_serve_no_model() -> None:
    heads = dataclasses.replace(some_heads("llama"), provenance=HeadsProvenance())
    with pytest.raises(ModelError, match="belong to an unknown model"):
        heads.check(a_stack("llama"))


@pytest.mark.parametrize("layer", [3, 5, 0])
def test_a_layer_that_was_not_fitted_is_refused_with_those_that_were(layer: int) -> None:
    heads, stack = fit_heads(a_stack("llama"), random_blocks(), [2, 4]), a_stack("llama")
    for use in (heads.head, heads.propagation):
        with pytest.raises(UsageError) as error:
            use(stack, layer)
        assert one_line(error) == (
            f"these heads were fitted for the layers 2, 4, got layer {layer}; fit it with "
            "`cascade fit-heads --layers`"
        )
