"""Models beside each other: depths, matched dips, exit layers, and what moved over same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.build_models import levels, measured, sizes
from support.commands import TEXTS
from support.tiny_models import save_checkpoint, tiny_model, tiny_tokenizer

import cascade
from cascade.core.errors import CorpusError, ModelError, UsageError
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.studies.comparisons.altered_models import Copy, alter
from cascade.studies.comparisons.configurations import Configuration
from cascade.studies.comparisons.model_comparison import (
    MOST_MODELS,
    Candidate,
    SameText,
    UnmeasuredModel,
    candidates,
    compare_models,
    describe_model,
    match_dips,
    measure_model,
)

# --- Dips ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # The same depth in 30 and 60 layers.
        (([25], 30), ([50], 60), [(25, 50)]),
        # 0.833 and 0.84375 are within 0.05; 0.833 and 0.906 are not.
        (([25], 30), ([27], 32), [(25, 27)]),
        (([25], 30), ([29], 32), []),
        # 0.05 itself still matches.
        (([10], 40), ([12], 40), [(10, 12)]),
        (([10], 40), ([13], 40), []),
        # In a model of ten layers, one layer is more than 0.05.
        (([5], 10), ([6], 10), [(5, 6)]),
        (([5], 10), ([7], 10), []),
        (([5], 10), ([22], 40), [(5, 22)]),
        # Nearest first: 9 takes 10, and 12 is left without any.
        (([9, 12], 100), ([10], 100), [(9, 10)]),
        (([8, 9], 100), ([10], 100), [(9, 10)]),
        (([9, 12], 100), ([10, 13], 100), [(9, 10), (12, 13)]),
        # As near on both sides: the one further up.
        (([9, 11], 100), ([10], 100), [(9, 10)]),
        (([], 30), ([25], 30), []),
    ],
)
def test_dips_match_by_hand(
    first: tuple[list[int], int], second: tuple[list[int], int], expected: list[tuple[int, int]]
) -> None:
    assert match_dips(*first, *second) == expected


def dips_of(num_layers: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, num_layers), unique=True, max_size=8).map(sorted)


both = st.tuples(st.integers(1, 60), st.integers(1, 60)).flatmap(
    lambda depths: st.tuples(
        dips_of(depths[0]), st.just(depths[0]), dips_of(depths[1]), st.just(depths[1])
    )
)


@given(both)
def test_matching_is_one_to_one_near_complete_and_the_same_from_either_side(
    case: tuple[list[int], int, list[int], int],
) -> None:
    first, first_layers, second, second_layers = case
    pairs = match_dips(*case)
    ones, others = [one for one, _ in pairs], [other for _, other in pairs]
    assert set(ones) <= set(first)
    assert set(others) <= set(second)
    assert len(set(ones)) == len(set(others)) == len(pairs)
    most = max(Fraction(1, 20), Fraction(1, min(first_layers, second_layers)))

    def apart(one: int, other: int) -> Fraction:
        return abs(Fraction(one, first_layers) - Fraction(other, second_layers))

    assert all(apart(*pair) <= most for pair in pairs)
    left = [
        (one, other)
        for one in set(first) - set(ones)
        for other in set(second) - set(others)
        if apart(one, other) <= most
    ]
    assert not left
    turned = match_dips(second, second_layers, first, first_layers)
    assert sorted((one, other) for other, one in turned) == pairs


@given(st.integers(1, 60).flatmap(lambda depth: st.tuples(dips_of(depth), st.just(depth))))
def test_a_model_matches_itself_dip_by_dip(case: tuple[list[int], int]) -> None:
    assert match_dips(*case, *case) == [(dip, dip) for dip in case[0]]


def test_matched_and_unmatched_dips_of_a_comparison() -> None:
    record = compare_models([measured(levels(30, 10, 25)), measured(levels(40, 20, 33))])
    (pair,) = record["pairs"]
    assert pair["dips"]["judged"]
    assert pair["dips"]["tolerance"] == 0.05
    (match,) = pair["dips"]["matched"]
    assert match["layers"] == ["25", "33"]
    assert match["depths"] == [0.833333, 0.825]
    assert match["means"] == pytest.approx([0.8, 0.8], abs=0.01)
    assert pair["dips"]["unmatched"] == [["10"], ["20"]]


def test_too_few_layers_have_no_dips_to_judge() -> None:
    record = compare_models([measured([0.1, 0.9, 0.9, 0.6]), measured(levels(30, 25))])
    (pair,) = record["pairs"]
    assert not pair["dips"]["judged"]
    assert pair["dips"]["tolerance"] == 0.25
    assert record["models"][0]["exit"]["layer"] == "3"


# --- Depth and exit layers -------------------------------------------------------------------


def test_depths_are_layers_over_their_number_and_the_norm_has_none() -> None:
    record = compare_models([measured(levels(10)), measured(levels(20), norm=False)])
    for entry, depth in zip(record["models"], (10, 20), strict=True):
        layers = [row for row in entry["layers"] if row["layer"].isdigit()]
        assert [row["depth"] for row in layers] == [
            round(layer / depth, 6) for layer in range(1, depth + 1)
        ]
    assert record["models"][0]["layers"][-1]["depth"] is None
    assert len(record["models"][1]["layers"]) == 20


def test_the_exit_of_each_is_the_profiles_own_with_its_depth_and_what_it_spares() -> None:
    models = [measured(levels(10)), measured(levels(30, 25))]
    record = compare_models(models)
    for model, entry in zip(models, record["models"], strict=True):
        own = model.profile.record()["thresholds"]
        assert entry["exit"]["layer"] == own["exit_layer"]
        assert entry["exit"]["by_hard_ratio"] == own["by_hard_ratio"]
    # Nine of ten layers and 29 of 30; one layer of N + 2 lies behind them.
    assert [entry["exit"]["layer"] for entry in record["models"]] == ["9", "29"]
    assert [entry["exit"]["depth"] for entry in record["models"]] == [0.9, 0.966667]
    assert record["models"][0]["exit"]["spared"] == round(1 / 12, 6)


def test_profiles_of_one_shape_lie_nothing_apart_whatever_their_depth() -> None:
    line = [0.5] * 10
    record = compare_models([measured(line), measured([0.5] * 25)])
    assert record["pairs"][0]["apart"]["degrees"] < 0.3  # what the draw itself is apart
    turned = compare_models([measured([0.5] * 25), measured(line)])
    assert turned["pairs"][0]["apart"] == record["pairs"][0]["apart"]


def test_profiles_are_apart_by_the_angle_between_them() -> None:
    # cos 60 and cos 45 degrees, in all layers but the last; there cos 90.
    first = measured([0.5] * 4, sequences=1)
    second = measured([np.sqrt(0.5)] * 3 + [0.0], sequences=1)
    apart = compare_models([first, second])["pairs"][0]["apart"]
    assert apart["degrees"] == pytest.approx(np.sqrt((3 * 15**2 + 30**2) / 4), abs=1.0)
    assert apart["most_degrees"] == pytest.approx(30, abs=1.0)
    assert apart["most_depth"] == 1.0


# --- The same tokens -------------------------------------------------------------------------


def test_what_moved_is_found_layer_by_layer_and_sequence_by_sequence() -> None:
    moved = np.zeros((11, 4))
    moved[2] = [0.001, 0.001, 0.001, 0.001]
    moved[6] = [-0.01, 0.03, -0.01, -0.01]
    record = compare_models(
        [
            measured([0.5] * 10, sequences=4),
            measured([0.5] * 10, sequences=4, moved=moved),
        ]
    )
    (pair,) = record["pairs"]
    assert (pair["unpaired"], pair["paired"]["sequences"]) == (None, 4)
    rows = {row["layer"]: row for row in pair["paired"]["layers"]}
    assert pair["paired"]["largest_mover"] == "7"
    assert rows["3"]["mean"] == pytest.approx(0.001)
    assert rows["3"]["interval"] == pytest.approx([0.001, 0.001])
    assert rows["7"]["mean"] == pytest.approx(0, abs=1e-12)
    assert rows["7"]["mean_size"] == pytest.approx(0.015)
    assert (rows["7"]["largest"], rows["7"]["sequence"]) == (pytest.approx(0.03), 2)
    # Student's interval by hand: t(0.975, 3) = 3.182446, standard deviation 0.02, four sequences.
    assert rows["7"]["interval"] == pytest.approx([-0.0318245, 0.0318245], abs=1e-6)
    assert rows["1"]["mean"] == rows["1"]["largest"] == 0


def test_the_final_norm_is_never_the_largest_mover() -> None:
    moved = np.zeros((6, 3))
    moved[1], moved[5] = 0.01, 0.3
    pair = compare_models(
        [measured([0.5] * 5, sequences=3), measured([0.5] * 5, sequences=3, moved=moved)]
    )["pairs"][0]
    assert pair["paired"]["largest_mover"] == "2"
    assert pair["paired"]["layers"][-1]["mean"] == pytest.approx(0.3)


def test_one_sequence_has_no_interval() -> None:
    pair = compare_models([measured([0.5] * 5, sequences=1), measured([0.5] * 5, sequences=1)])
    assert pair["pairs"][0]["paired"]["layers"][0]["interval"] is None
    json.dumps(pair, allow_nan=False)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"means": [0.5] * 6}, "their layers differ in number, 5 and 6"),
        ({"tokenizer": "another"}, "their tokenizers differ: tokens are not the same"),
        ({"tokenizer": None}, "their tokenizers differ: tokens are not the same"),
        ({"fingerprints": np.arange(6) + 1}, "they read other sequences"),
        ({"sequences": 5}, "they read other sequences"),
        ({"norm": False}, "only one of them has a final norm"),
    ],
)
def test_models_that_cannot_be_paired_say_why(other: dict[str, Any], reason: str) -> None:
    means = other.pop("means", [0.5] * 5)
    (pair,) = compare_models([measured([0.5] * 5), measured(means, **other)])["pairs"]
    assert (pair["unpaired"], pair["paired"]) == (reason, None)


def test_thresholds_are_tried_on_models_of_the_same_depth_alone() -> None:
    first, same, other = (measured(levels(depth)) for depth in (10, 10, 12))
    lower = measured(levels(10), moved=-0.02)
    pairs = compare_models([first, same, other, lower])["pairs"]
    reached = [row["reached"] for row in pairs[0]["thresholds"]]
    assert reached == pytest.approx([0.3, 0.5, 0.7], abs=0.03)
    assert pairs[1]["thresholds"] is None
    for row, before in zip(pairs[2]["thresholds"], reached, strict=True):
        assert row["reached"] > before + 0.2


def test_every_model_is_compared_with_the_first_measured_one() -> None:
    unmeasured = UnmeasuredModel(Configuration("other", "its config.json", None), sizes(12))
    record = compare_models([unmeasured, *(measured(levels(10)) for _ in range(3))])
    assert [(pair["against"], pair["model"]) for pair in record["pairs"]] == [
        ("B", "C"),
        ("B", "D"),
    ]


# --- Unmeasured models -----------------------------------------------------------------------


def test_an_unmeasured_model_has_layers_by_depth_and_no_exit() -> None:
    unmeasured = UnmeasuredModel(Configuration("other", "its config.json", None), sizes(12))
    record = compare_models([measured(levels(30, 25)), unmeasured, measured(levels(10))])
    entry = record["models"][1]
    assert (entry["measured"], entry["exit"], entry["layers"]) == (False, None, None)
    assert entry["configuration"] == "its config.json"
    # 0.9 of C and 29/30 of A, of 12 layers: 10.8 and 11.6.
    assert record["by_depth"] == [
        {
            "depth": 0.9,
            "from": ["C"],
            "layers": [{"model": "B", "layer": 11, "spared": round(1 / 14, 6)}],
        },
        {
            "depth": 0.966667,
            "from": ["A"],
            "layers": [{"model": "B", "layer": 12, "spared": 0.0}],
        },
    ]


def test_without_any_measurement_depths_are_for_reference() -> None:
    record = compare_models(
        [describe_model(name, 128) for name in ("smollm2-360m", "smollm2-1.7b")]
    )
    assert record["pairs"] == []
    assert [entry["depth"] for entry in record["by_depth"]] == [0.5, 0.666667, 0.8, 0.9, 0.966667]
    assert all(entry["from"] == [] for entry in record["by_depth"])
    assert [place["layer"] for place in record["by_depth"][-1]["layers"]] == [31, 23]


def test_models_that_are_all_measured_need_no_layers_by_depth() -> None:
    assert compare_models([measured(levels(30)), measured(levels(10))])["by_depth"] == []


# --- What is compared ------------------------------------------------------------------------


def test_copies_follow_the_first_model_and_unmeasured_ones_come_last(here: Path) -> None:
    found = candidates(["a", "b"], copies=[Copy("int8"), Copy("bf16")], unmeasured=["c"])
    assert found == [
        Candidate("a"),
        Candidate("a", Copy("int8")),
        Candidate("a", Copy("bf16")),
        Candidate("b"),
        Candidate("c", measured=False),
    ]


def test_a_folder_without_weights_is_described(here: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert [each.measured for each in candidates(["a", str(folder)])] == [True, False]
    with pytest.raises(UsageError, match="not measured; leave it out"):
        candidates([str(folder)], copies=[Copy("int8")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"models": []}, "expected at least two models, got 0"),
        ({"models": ["a"]}, "expected at least two models, got 1"),
        ({"models": ["a"] * 13}, f"expected at most {MOST_MODELS} models, got 13"),
        ({"models": [], "copies": [Copy("int8")]}, "the first model, which is not measured"),
        (
            {"models": ["a"], "copies": [Copy("int8")], "config_only": True},
            "the first model, which is not measured",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    here: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        candidates(options.pop("models"), **options)


def test_one_model_is_no_comparison() -> None:
    with pytest.raises(UsageError, match="expected at least two models, got 1"):
        compare_models([measured(levels(10))])


def test_a_candidate_is_checked_before_it_is_loaded(here: Path, folder: Path) -> None:
    Candidate(str(folder)).check()
    with pytest.raises(ModelError, match="no model nobody/nothing"):
        Candidate("nobody/nothing").check()
    (folder / "config.json").write_text('{"model_type": "t5"}')
    for flag in (True, False):
        with pytest.raises(ModelError, match="encoder-decoder"):
            Candidate(str(folder), measured=flag).check()


# --- The text --------------------------------------------------------------------------------


def stack_of(tokenizer: Any) -> DecoderStack:
    return DecoderStack(tiny_model("llama"), tokenizer=tokenizer)


def coarse_tokenizer() -> Any:
    """A tokenizer of another hash and another length: every word is unknown, and one token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def test_another_tokenizer_reads_the_same_records(here: Path) -> None:
    text = SameText("texts.jsonl", seq_len=8, max_tokens=640)
    first = text.blocks(stack_of(tiny_tokenizer()))
    other = text.blocks(stack_of(coarse_tokenizer()))
    assert first.tokens == 640
    assert 1 < first.records == other.records < len(TEXTS)
    assert other.tokens < first.tokens
    # Ten words and EOS for each of the records.
    words = sum(len(each.split()) + 1 for each in TEXTS[: first.records])
    assert other.tokens == words // 8 * 8
    # The first model's tokens are read once, whoever comes between.
    assert text.blocks(stack_of(tiny_tokenizer())) is first


def test_a_tokenizer_of_more_tokens_reads_the_same_records_to_their_end(here: Path) -> None:
    text = SameText("texts.jsonl", seq_len=8, max_tokens=160)
    first = text.blocks(stack_of(coarse_tokenizer()))
    other = text.blocks(stack_of(tiny_tokenizer()))
    assert (first.tokens, first.records) == (160, other.records)
    letters = sum(len(each) + 1 for each in TEXTS[: first.records])
    assert other.tokens == letters // 8 * 8 > 160


def test_one_long_document_is_read_up_to_as_many_tokens(here: Path) -> None:
    Path("one.txt").write_text(" ".join(TEXTS))
    text = SameText("one.txt", seq_len=8, max_tokens=160)
    assert text.blocks(stack_of(tiny_tokenizer())).tokens == 160
    assert text.blocks(stack_of(coarse_tokenizer())).tokens == 160


def test_a_model_without_a_tokenizer_reads_nothing(here: Path) -> None:
    text = SameText("texts.jsonl", seq_len=8)
    with pytest.raises(CorpusError, match="no tokenizer"):
        text.blocks(stack_of(None))
    text.blocks(stack_of(tiny_tokenizer()))
    with pytest.raises(CorpusError, match="no tokenizer"):
        text.blocks(stack_of(None))


# --- Tiny models, trained --------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Llamas of 6 and 9 layers, trained for some steps on the corpus at hand."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer(" ".join(TEXTS))["input_ids"][:2048]).reshape(-1, 32)
    folders = {}
    for depth in (6, 9):
        folder = tmp_path_factory.mktemp("trained") / f"deep{depth}"
        model = tiny_model("llama", num_layers=depth, max_position_embeddings=64).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.25)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(30):
            batch = ids[torch.arange(16) + 16 * (step % 4)]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[depth] = folder
    return folders


def test_trained_models_of_two_depths_and_a_copy(here: Path, trained: dict[int, Path]) -> None:
    text = SameText("texts.jsonl", seq_len=16)

    def seen() -> Iterator[Any]:
        for depth, how in ((6, None), (6, "int8"), (9, None)):
            stack = load(str(trained[depth]))
            if how:
                alter(stack, Copy(how))
            yield measure_model(stack, text.blocks(stack))

    record = compare_models(seen(), command="cascade compare-models")
    json.dumps(record, allow_nan=False)
    first, _, deeper = record["models"]
    assert [entry["name"] for entry in record["models"]] == ["deep6", "deep6+int8", "deep9"]
    assert [row["depth"] for row in deeper["layers"][:3]] == [0.111111, 0.222222, 0.333333]
    assert first["provenance"]["corpus"] == deeper["provenance"]["corpus"]
    of_copy, of_deeper = record["pairs"]
    assert of_copy["same_tokenizer"]
    assert of_deeper["same_tokenizer"]
    assert of_deeper["unpaired"] == "their layers differ in number, 6 and 9"
    assert 0 < of_copy["apart"]["degrees"] < of_deeper["apart"]["degrees"]
    moves = [row["mean_size"] for row in of_copy["paired"]["layers"]]
    assert all(0 < move < 0.05 for move in moves)
    # What was compared is what `cascade analyze` measures.
    stack = load(str(trained[9]))
    own = cascade.analyze(stack, text.blocks(stack)).record()
    assert [row["mean"] for row in deeper["layers"]] == [row["mean"] for row in own["layers"]]
    assert deeper["structure"] == own["structure"]


def test_the_same_model_twice_moves_nowhere(here: Path, trained: dict[int, Path]) -> None:
    text = SameText("texts.jsonl", seq_len=16, max_tokens=256)
    stacks = [load(str(trained[6])) for _ in range(2)]
    record = compare_models([measure_model(stack, text.blocks(stack)) for stack in stacks])
    (pair,) = record["pairs"]
    assert all(row["largest"] == 0 for row in pair["paired"]["layers"])
    assert pair["apart"] == {"degrees": 0.0, "most_degrees": 0.0, "most_depth": 0.166667}


def test_saved_checkpoints_are_models_of_their_own(here: Path, tmp_path: Path) -> None:
    """What a user quantized and saved is compared like any other folder."""
    folder = save_checkpoint(tmp_path / "mine")
    stack = load(str(folder))
    alter(stack, Copy("int8"))
    stack.model.save_pretrained(tmp_path / "int8")
    tiny_tokenizer().save_pretrained(tmp_path / "int8")
    text = SameText("texts.jsonl", seq_len=16, max_tokens=256)
    saved = load(str(tmp_path / "int8"))
    pair = compare_models([measure_model(each, text.blocks(each)) for each in (stack, saved)])
    assert all(row["largest"] == 0 for row in pair["pairs"][0]["paired"]["layers"])
