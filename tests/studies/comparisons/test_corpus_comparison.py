"""Corpora side by side: every number again by hand, and what cannot be compared is refused."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_early_exit import a_stack, one_line
from support.tiny_models import VOCABULARY, tiny_model

from cascade import TokenBlocks, analyze, compare_corpora
from cascade.core.errors import CascadeError, CorpusError, ModelError, UsageError
from cascade.core.records import to_json
from cascade.evaluation.calibration import confidences
from cascade.models.stack import DecoderStack
from cascade.stats.similarity_statistics import Array
from cascade.stats.thresholds import fit_threshold
from cascade.studies.comparisons.corpus_comparison import (
    LABELS,
    Question,
    _Measured,
    _special_layers,
    _special_shares,
    _transferred,
)

Record = dict[str, Any]

LAYERS = ["1", "2", "3", "4", "4+norm"]


def text_of(
    sequences: int, low: int = 2, high: int = VOCABULARY, *, seed: int = 0, length: int = 12
) -> TokenBlocks:
    """Return sequences of random tokens of a part of the vocabulary."""
    ids = np.random.default_rng(seed).integers(low, high, (sequences, length)).astype(np.int32)
    name = f"tokens-{low}-{high}-{seed}"
    return TokenBlocks(ids, f"./{name}.jsonl", name, sequences)


#: Two of one kind, the second smaller, and one of other tokens.
CORPORA = [text_of(60), text_of(40, seed=1), text_of(50, 30, 32, seed=2)]


def compared(*corpora: TokenBlocks, **question: Any) -> Record:
    wanted = Question(**{"layer": 3, "hard_ratios": (0.5,)} | question)
    return compare_corpora(a_stack("llama"), corpora or CORPORA, wanted)


@functools.cache
def the_record() -> Record:
    return compared()


def similarities_of(blocks: TokenBlocks, layer: int) -> Array:
    """Return an exit layer's similarities, `[S, T]`, as the exits of a model compute them."""
    return confidences(a_stack("llama"), blocks, layer, "cosine")


# --- Layers ----------------------------------------------------------------------------------


def test_every_mean_is_that_of_a_profile_of_its_own() -> None:
    rows = the_record()["layers"]
    assert [row["layer"] for row in rows] == LAYERS
    for number, blocks in enumerate(CORPORA):
        expected = analyze(a_stack("llama"), blocks).statistics.mean()
        found = [row["means"][number] for row in rows]
        assert [mean["mean"] for mean in found] == pytest.approx(expected, abs=1e-9)
        for mean in found:
            low, high = mean["interval"]
            assert low < mean["mean"] < high
            assert (low + high) / 2 == pytest.approx(mean["mean"])


def test_an_interval_narrows_with_the_root_of_the_sequences() -> None:
    rows = compared(text_of(400, seed=3), text_of(25, seed=4))["layers"]
    widths = np.array([[m["interval"][1] - m["interval"][0] for m in r["means"]] for r in rows])
    ratio = widths[:, 1] / widths[:, 0]
    assert ratio.mean() == pytest.approx(4, rel=0.25)  # 25 sequences estimate their spread roughly


def test_differences_are_to_the_first_and_change_sign_with_the_order() -> None:
    pairs = the_record()["differences"]
    assert [(pair["corpus"], pair["against"]) for pair in pairs] == [("B", "A"), ("C", "A")]
    for number, pair in enumerate(pairs, start=1):
        for row, means in zip(pair["rows"], the_record()["layers"], strict=True):
            assert row["layer"] == means["layer"]
            expected = means["means"][number]["mean"] - means["means"][0]["mean"]
            assert row["difference"] == pytest.approx(expected)
            assert sum(row["interval"]) / 2 == pytest.approx(expected)
    turned = compared(CORPORA[2], CORPORA[0])["differences"][0]
    for row, back in zip(pairs[1]["rows"], turned["rows"], strict=True):
        assert row["difference"] == pytest.approx(-back["difference"])


def test_intervals_of_differences_are_wider_than_those_of_either_mean() -> None:
    record = the_record()
    for number, pair in enumerate(record["differences"], start=1):
        for row, means in zip(pair["rows"], record["layers"], strict=True):
            width = row["interval"][1] - row["interval"][0]
            for mean in (means["means"][0], means["means"][number]):
                assert width > mean["interval"][1] - mean["interval"][0]


def test_text_of_one_kind_stays_and_other_text_moves() -> None:
    same, other = compared(margin=0.05)["differences"]
    assert same["layers"]["moves"] == []
    assert other["layers"]["moves"][:2] == ["1", "2"]


@pytest.mark.parametrize("margin", [1e-6, 0.02, 1.9])
def test_a_verdict_is_where_the_interval_lies(margin: float) -> None:
    for pair in compared(margin=margin)["differences"]:
        by_verdict: dict[str, list[str]] = {"stays": [], "moves": [], "cannot tell": []}
        for row in sorted(pair["rows"], key=lambda row: -abs(row["difference"])):
            nearest = 0.0 if np.prod(row["interval"]) < 0 else min(map(abs, row["interval"]))
            farthest = max(map(abs, row["interval"]))
            expected = (
                "stays" if farthest <= margin else "moves" if nearest > margin else "cannot tell"
            )
            assert row["verdict"] == expected
            by_verdict[expected].append(row["layer"])
        assert pair["layers"] == by_verdict


def test_what_cannot_be_told_says_how_many_tokens_would_tell() -> None:
    row, blocks = None, [text_of(20, seed=5), text_of(20, 30, 60, seed=6)]
    for margin in (0.01, 0.02, 0.05):
        rows = compared(*blocks, margin=margin)["differences"][0]["rows"]
        assert all(
            (row["tokens_needed"] is None) == (row["verdict"] != "cannot tell") for row in rows
        )
        row = next((row for row in rows if row["verdict"] == "cannot tell"), row)
        if row is None:
            continue
        # An interval so many times narrower would just touch the margin.
        half = (row["interval"][1] - row["interval"][0]) / 2
        half /= np.sqrt(row["tokens_needed"] / blocks[0].tokens)
        if row in rows:
            assert half == pytest.approx(abs(abs(row["difference"]) - margin), rel=0.01)
    assert row is not None


def test_resampling_is_seeded_and_each_corpus_has_draws_of_its_own() -> None:
    assert compared(seed=0) == the_record()
    other = compared(seed=1)
    assert other["layers"] != the_record()["layers"]
    # With the same draws for both, the difference to a copy would hardly vary from draw to draw.
    ids = CORPORA[0].ids.copy()
    ids[0, -1] = ids[0, -1] % 90 + 2
    copy = TokenBlocks(ids, "copy", "copy", 60)
    found = compared(CORPORA[0], copy)
    for row, means in zip(found["differences"][0]["rows"], found["layers"], strict=True):
        assert abs(row["difference"]) < 1e-3
        low, high = means["means"][0]["interval"]
        assert row["interval"][1] - row["interval"][0] > 1.2 * (high - low)


def test_sequences_in_common_are_counted() -> None:
    blocks = text_of(40)
    some = TokenBlocks(np.concatenate([blocks.ids[:7], text_of(9, seed=9).ids]), "some", "some", 16)
    record = compared(blocks, text_of(20, seed=8), some)
    assert record["shared"] == [{"corpora": ["A", "C"], "sequences": 7}]
    assert the_record()["shared"] == []


# --- Special layers --------------------------------------------------------------------------


def corpus_of(label: str, **special: tuple[str | None, float]) -> Record:
    """Return what a record says of a corpus: layer -> role and share of resamples."""
    roles: dict[str, list[str]] = {"input_transform": [], "dips": [], "output_transform": []}
    for layer, (role, _) in special.items():
        if role is not None:
            roles[role].append(layer[1:])
    rows = [
        {"layer": layer[1:], "role": role, "share_of_resamples": share}
        for layer, (role, share) in special.items()
    ]
    return {"label": label, "structure": roles, "special": rows}


def test_the_same_special_layers_are_the_same() -> None:
    about = [corpus_of(label, l2=("dips", 1.0)) for label in "AB"]
    assert _special_layers(about, ["1", "2", "3"]) == {"same": True, "differ": []}


@pytest.mark.parametrize(
    ("there", "here", "sure"),
    [(1.0, 0.0, True), (0.96, 0.04, True), (0.9, 0.0, False), (1.0, 0.2, False)],
)
def test_a_layer_special_in_one_alone_is_sure_only_where_resamples_agree(
    there: float, here: float, sure: bool
) -> None:
    about = [
        corpus_of("A", l1=("input_transform", 1.0), l3=("dips", there)),
        corpus_of("B", l1=("input_transform", 1.0), l3=(None, here)),
    ]
    found = _special_layers(about, ["1", "2", "3"])
    shares = {"A": there, "B": here}
    row = {"layer": "3", "special_in": ["A"], "shares": shares, "sure": sure}
    assert found == {"same": False, "differ": [row]}


def test_another_role_is_another_structure() -> None:
    about = [corpus_of("A", l2=("dips", 1.0)), corpus_of("B", l2=("input_transform", 1.0))]
    assert _special_layers(about, ["1", "2"]) == {"same": False, "differ": []}


@functools.cache
def a_deep_record() -> Record:
    """Return a comparison on a model with layers enough for a structure, one of them special."""
    return compare_corpora(_deep_stack(), CORPORA, Question(hard_ratios=(0.5,)))


@functools.cache
def _deep_stack() -> DecoderStack:
    model = tiny_model("llama", num_layers=8)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            # All layers but the fourth turn the stream little.
            scale = 1.0 if number == 3 else 0.05
            layer.mlp.down_proj.weight.mul_(scale)
            layer.self_attn.o_proj.weight.mul_(scale)
    return DecoderStack(model)


def test_a_structure_is_the_profiles_own() -> None:
    record = a_deep_record()
    for corpus, blocks in zip(record["corpora"], CORPORA, strict=True):
        profile = analyze(_deep_stack(), blocks).record()
        assert corpus["structure"] == profile["structure"]
        assert corpus["structure"]["dips"] == ["4"]
        assert str(corpus["suggested_exit_layer"]) == profile["thresholds"]["exit_layer"]
        assert corpus["tokens"] == blocks.tokens
        row = next(row for row in corpus["special"] if row["layer"] == "4")
        assert (row["role"], row["share_of_resamples"]) == ("dips", 1.0)
    # Two tokens alone turn the last layer far more: the norm behind it no longer stands out.
    (row,) = record["special"]["differ"]
    assert (row["layer"], row["special_in"], row["sure"]) == ("8+norm", ["A", "B"], True)
    assert not record["special"]["same"]


def test_resamples_say_how_sure_a_special_layer_is() -> None:
    flat, dip = [0.95] * 7, [0.95] * 3 + [0.1] + [0.95] * 3
    labels = [str(number) for number in range(1, 8)]
    shares = _special_shares(labels, np.array([flat, dip, dip, dip]))
    assert shares == dict.fromkeys(labels, 0.0) | {"4": 0.75}


def test_a_layer_special_in_resamples_alone_is_told_without_a_role() -> None:
    profile = analyze(_deep_stack(), CORPORA[0])
    found = _Measured(profile, 1, np.zeros((60, 12)))
    dip = np.array([0.95] * 2 + [0.1] + [0.95] * 6)
    draws = np.stack([found.means] * 3 + [dip])
    rows = {
        row["layer"]: row for row in found.about("A", draws, profile.statistics.layers)["special"]
    }
    assert rows["3"] == {"layer": "3", "role": None, "share_of_resamples": 0.25}
    assert rows["4"] == {"layer": "4", "role": "dips", "share_of_resamples": 0.75}


# --- Thresholds ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_every_threshold_is_fitted_and_applied_at_the_exit_layer(layer: int) -> None:
    corpora = [*CORPORA[:2], text_of(50, 20, 70, seed=2)]
    record = compared(*corpora, layer=layer, hard_ratios=(0.25, 0.6))
    rows = record["thresholds"]["rows"]
    pairs = list(itertools.permutations("ABC", 2))
    assert [(row["from"], row["to"]) for row in rows[::2]] == pairs
    assert [row["hard_ratio"] for row in rows] == [0.25, 0.6] * len(pairs)
    values = dict(zip("ABC", (similarities_of(blocks, layer) for blocks in corpora), strict=True))
    for row in rows:
        # Tokens that begin a sequence tie, and two ways of going through the layers part ties by
        # rounding; a neighbouring layer's similarities would be off by tenths.
        for side, share in ((row["from"], row["hard_ratio"]), (row["to"], row["realized"])):
            assert (values[side] < row["threshold"]).mean() == pytest.approx(share, abs=0.02)
        low, high = row["interval"]
        assert low <= row["realized"] <= high
        assert row["off"] == pytest.approx(row["realized"] - row["hard_ratio"])
        assert row["off_interval"] == pytest.approx(
            [end - row["hard_ratio"] for end in (low, high)]
        )


def test_without_a_layer_it_is_the_one_that_the_first_corpus_suggests() -> None:
    suggested = compared(layer=None)
    layer = suggested["corpora"][0]["suggested_exit_layer"]
    assert suggested["settings"]["layer"] == layer
    assert suggested["settings"]["layer_suggested"]
    given = compared(layer=layer)
    assert not given["settings"]["layer_suggested"]
    assert given["thresholds"] == suggested["thresholds"]


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.0, "transfers"), (0.05, "cannot tell"), (0.2, "does not")]
)
def test_a_threshold_transfers_where_its_interval_is_within_the_tolerance(
    shift: float, verdict: str
) -> None:
    generator = np.random.default_rng(0)
    here, there = generator.uniform(0, 0.5, (2, 400, 12))
    fitted = fit_threshold(here, 0.5)
    row = _transferred(fitted, there - shift / 2, Question())
    assert row["verdict"] == verdict
    assert row["off"] == pytest.approx(shift, abs=0.03)
    assert (row["tokens_needed"] is None) is (verdict != "cannot tell")


def test_a_ratio_asked_twice_is_answered_once() -> None:
    record = compared(hard_ratios=(0.5, 0.3, 0.5))
    assert record["settings"]["hard_ratios"] == [0.5, 0.3]
    assert len(record["thresholds"]["rows"]) == 2 * 6
    assert sum(record["thresholds"]["counts"].values()) == 2 * 6


# --- The record ------------------------------------------------------------------------------


def test_the_record_is_whole_and_can_be_written() -> None:
    record = the_record()
    assert (record["schema"], record["kind"]) == (1, "corpus-comparison")
    assert "corpus" not in record["provenance"]
    assert {
        label: corpus["source"] for label, corpus in record["provenance"]["corpora"].items()
    } == {label: blocks.source for label, blocks in zip("ABC", CORPORA, strict=True)}
    assert to_json(record)  # refuses NaN


def test_batches_make_no_difference_and_progress_adds_up() -> None:
    done: list[int] = []
    question = Question(layer=3, hard_ratios=(0.5,))
    record = compare_corpora(
        a_stack("llama"), CORPORA, question, batch_size=7, progress=done.append
    )
    assert sum(done) == sum(blocks.tokens for blocks in CORPORA)
    for row, expected in zip(record["layers"], the_record()["layers"], strict=True):
        for mean, other in zip(row["means"], expected["means"], strict=True):
            assert mean["mean"] == pytest.approx(other["mean"], abs=1e-6)


# --- Refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corpora", "error", "message"),
    [
        ([], UsageError, "expected at least 2 corpora to compare, got 0"),
        ([text_of(4)], UsageError, "expected at least 2 corpora to compare, got 1"),
        ([text_of(4, seed=n) for n in range(9)], UsageError, "at most 8 corpora, got 9"),
        ([text_of(4), text_of(1, seed=1)], CorpusError, "2 sequences of tokens-2-97-1, got 1"),
        ([text_of(4), text_of(6, seed=1), text_of(4)], CorpusError, "the same tokens twice"),
        ([text_of(4), text_of(4, length=65, seed=1)], CorpusError, "use --seq-len 64 or less"),
        ([text_of(4), text_of(4, 2, 200, seed=1)], ModelError, "the model embeds 97 tokens"),
    ],
)
def test_corpora_that_cannot_be_compared_are_refused_before_any_pass(
    corpora: list[TokenBlocks], error: type[CascadeError], message: str
) -> None:
    done: list[int] = []
    with pytest.raises(error) as caught:
        compare_corpora(a_stack("llama"), corpora, progress=done.append)
    assert message in one_line(caught)
    assert done == []


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"layer": 0}, "expected --layer of at least 1, got 0"),
        ({"layer": 5}, "expected --layer in 1..4, got 5"),
        ({"hard_ratios": ()}, "expected at least one hard ratio, got none"),
        ({"hard_ratios": (0.5, 1.0)}, "expected a --hard-ratio between 0 and 1, got 1"),
        ({"hard_ratios": (float("nan"),)}, "expected a --hard-ratio between 0 and 1, got nan"),
        ({"margin": 0.0}, "expected a --margin between 0 and 2, got 0"),
        ({"margin": float("nan")}, "expected a --margin between 0 and 2, got nan"),
        ({"tolerance": 1.0}, "expected a --tolerance between 0 and 1, got 1"),
        ({"seed": -1}, "expected a --seed of 0 or more, got -1"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(question: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        compared(**question)
    assert message in one_line(caught)


def test_there_is_a_label_for_every_corpus_that_is_allowed() -> None:
    corpora = [text_of(3, seed=number, length=4) for number in range(len(LABELS))]
    record = compared(*corpora, layer=1)
    assert [corpus["label"] for corpus in record["corpora"]] == list(LABELS)
    assert len(record["thresholds"]["rows"]) == 8 * 7
