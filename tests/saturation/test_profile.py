"""Measuring on tiny models, and the real model against its stored and published tables."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import BASELINES, ROOT
from support.tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from cascade.core.errors import CorpusError, ModelError, UsageError
from cascade.core.records import read_typed
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.gate.baselines import profile_path, read_profile
from cascade.gate.drift import compare
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import SaturationProfile, analyze, similarities
from cascade.saturation.records import ProfileRecord
from cascade.stats.similarity_statistics import QUANTILES, SimilarityStatistics, quantile_edges

SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the study's own data is not beside the repository ({SHARED})"
)

Table = dict[str, dict[str, float]]


def random_blocks(sequences: int = 20, length: int = 12) -> TokenBlocks:
    ids = np.random.default_rng(0).integers(2, 97, (sequences, length)).astype(np.int32)
    return TokenBlocks(ids, "random", "random", sequences)


def read_table(path: Path, names: dict[str, str] | None = None) -> Table:
    """Read a published table: layer -> statistic -> value; `names` renames layers."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return {
        (names or {}).get(row["layer"], row["layer"]): {
            name: float(value) for name, value in row.items() if name != "layer"
        }
        for row in rows
    }


def table_of(profile: SaturationProfile) -> Table:
    return {row.layer: to_plain(row) for row in profile.record().layers}


# --- On tiny models --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_similarities_are_those_of_the_models_own_hidden_states(family: str) -> None:
    model = tiny_model(family)
    ids = torch.from_numpy(random_blocks(3).ids.astype(np.int64))
    with torch.no_grad():
        states = model(
            ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
        ).hidden_states
    measured = similarities(DecoderStack(model), ids)
    assert measured.dtype == torch.float32
    assert measured.shape == (5, 3, 12)
    # The last entry of transformers is behind the final norm: the pair before it is the row
    # "4+norm", and the residual row 4 cannot be had from these states at all.
    rows = {0: (0, 1), 1: (1, 2), 2: (2, 3), 4: (3, 4)}
    for row, (before, after) in rows.items():
        expected = torch.cosine_similarity(states[before].double(), states[after].double(), dim=-1)
        torch.testing.assert_close(measured[row].double(), expected, atol=1e-6, rtol=0)
    assert (measured[3] - measured[4]).abs().max() > 0.01


def test_the_profile_does_not_depend_on_the_batch_size() -> None:
    stack, blocks = DecoderStack(tiny_model("llama")), random_blocks()
    one = analyze(stack, blocks, batch_size=1)
    for batch_size in (3, 16, 50):
        other = analyze(stack, blocks, batch_size=batch_size)
        assert np.array_equal(other.statistics.edges, one.statistics.edges)
        for name, value in one.arrays().items():
            if name in ("total", "square_total", "layers"):
                continue
            np.testing.assert_allclose(other.arrays()[name], value, atol=2e-6, err_msg=name)


def test_the_profile_counts_every_token_of_every_sequence_once() -> None:
    blocks = random_blocks(sequences=7)
    done: list[int] = []
    seen: list[tuple[Any, Any]] = []
    profile = analyze(
        DecoderStack(tiny_model("llama")),
        blocks,
        batch_size=3,
        progress=done.append,
        sink=lambda values, numbers: seen.append((values, numbers)),
    )
    assert done == [36, 36, 12]
    assert np.concatenate([numbers for _, numbers in seen]).tolist() == list(range(7))
    values = np.concatenate([part for part, _ in seen], axis=1)
    table = table_of(profile)
    assert list(table) == ["1", "2", "3", "4", "4+norm"]
    for row, layer in enumerate(table):
        assert table[layer]["count"] == blocks.tokens
        assert table[layer]["mean"] == pytest.approx(values[row].mean(dtype=np.float64), abs=1e-6)
        assert table[layer]["min"] == pytest.approx(values[row].min(), abs=1e-6)
    arrays = profile.arrays()
    assert np.array_equal(arrays["sequence_fingerprint"], blocks.sequence_fingerprints())
    np.testing.assert_allclose(
        arrays["sequence_mean"], values.mean(axis=2, dtype=np.float64).T, atol=1e-12
    )


def test_shares_count_against_the_first_sequences_quantiles_or_the_edges_given() -> None:
    stack, blocks = DecoderStack(tiny_model("llama")), random_blocks(sequences=40, length=32)
    first = TokenBlocks(blocks.ids[:16], "random", "random", 16)
    shares = analyze(stack, first).arrays()["sequence_share"].mean(axis=0)
    np.testing.assert_allclose(shares, np.tile(QUANTILES, (5, 1)), atol=0.01)
    profile = analyze(stack, blocks)
    values = similarities(stack, torch.from_numpy(first.ids.astype(np.int64))).numpy()
    assert np.array_equal(profile.statistics.edges, quantile_edges(values.reshape(5, -1)))
    edges = np.tile([10, 20, 30], (5, 1))
    assert np.array_equal(analyze(stack, blocks, edges=edges).statistics.edges, edges)


def test_two_shards_with_the_same_edges_merge_into_the_whole() -> None:
    stack, blocks = DecoderStack(tiny_model("llama")), random_blocks(sequences=8)
    edges = np.tile([500, 1000, 2000], (5, 1))
    parts = []
    for rows in (np.arange(0, 8, 2), np.arange(1, 8, 2)):
        statistics = SimilarityStatistics(stack.layer_labels, edges)
        ids = torch.from_numpy(blocks.ids[rows].astype(np.int64))
        statistics.update(similarities(stack, ids).numpy(), rows)
        parts.append(statistics)
    whole = analyze(stack, blocks, edges=edges).statistics
    assert parts[1].merge(parts[0]).table() == whole.table()


def test_bf16_states_are_compared_in_fp32() -> None:
    stack = DecoderStack(tiny_model("llama").to(torch.bfloat16))
    values = similarities(stack, torch.from_numpy(random_blocks(3).ids.astype(np.int64)))
    assert values.dtype == torch.float32
    assert values.max() <= 1
    # Cosines of bf16 states, rounded to bf16 themselves, would have few distinct values.
    assert len(torch.unique(values)) > 0.9 * values.numel()


def test_similarities_never_leave_their_range() -> None:
    stack = DecoderStack(tiny_model("llama"))
    for layer in stack.layers:  # layers that do nothing: every similarity is 1, give or take
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    values = similarities(stack, torch.from_numpy(random_blocks(50).ids.astype(np.int64)))
    assert values[:4].max() <= 1
    assert values[:4].min() > 1 - 1e-6


def test_a_layer_that_overflows_is_named() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="layer 3 is the first to give NaN"):
        analyze(stack, random_blocks())


def test_what_the_model_cannot_take_is_refused_before_the_pass() -> None:
    stack = DecoderStack(tiny_model("llama"))
    with pytest.raises(CorpusError, match="65 tokens exceed the model's 64 positions"):
        analyze(stack, random_blocks(2, 65))
    strange = TokenBlocks(np.full((1, 4), 97, np.int32), "random", "random", 1)
    with pytest.raises(ModelError, match="token id 97, but the model embeds 97"):
        analyze(stack, strange)
    with pytest.raises(CorpusError, match="--batch-size"):
        analyze(stack, random_blocks(), batch_size=0)


def test_a_tiny_models_table_stays_as_stored(
    strict_table: Callable[[list[dict[str, Any]]], None],
) -> None:
    profile = analyze(DecoderStack(tiny_model("llama", num_layers=6)), random_blocks(32, 24))
    strict_table(to_plain(profile.record().layers))


# --- The real model against its stored baseline ----------------------------------------------


@pytest.mark.saturation
def test_a_quarter_of_the_embedded_corpus_gives_the_stored_baseline(
    quarter_profile: SaturationProfile,
) -> None:
    baseline = read_profile(profile_path(BASELINES, quarter_profile.record()))
    comparison = compare(quarter_profile, baseline)
    assert comparison.verdict == "PASS", comparison.worst()[:5]
    # Every statistic of every sequence and layer: no hole.
    assert len(comparison.cells) == 31 * 10
    assert comparison.sequences == (128, 128)


@pytest.mark.saturation
@pytest.mark.whole
def test_the_embedded_corpus_gives_the_stored_baseline(
    embedded_profile: SaturationProfile,
) -> None:
    baseline = read_profile(profile_path(BASELINES, embedded_profile.record()))
    comparison = compare(embedded_profile, baseline)
    assert comparison.verdict == "PASS", comparison.worst()[:5]
    # Every statistic of every sequence and layer, and the table besides: no hole.
    assert len(comparison.cells) == 31 * (5 + 10)
    assert comparison.sequences == (511, 511)


@pytest.mark.saturation
@pytest.mark.whole
def test_special_layers_and_thresholds_are_as_stored(embedded_profile: SaturationProfile) -> None:
    record = embedded_profile.record()
    stored = read_typed(profile_path(BASELINES, record), ProfileRecord)
    assert record.structure.cutoff == pytest.approx(stored.structure.cutoff, abs=1e-4)
    for name in ("input_transform", "dips", "output_transform", "stable_bands"):
        assert getattr(record.structure, name) == getattr(stored.structure, name)
    assert record.thresholds.exit_layer == stored.thresholds.exit_layer
    for new, old in zip(
        record.thresholds.by_hard_ratio, stored.thresholds.by_hard_ratio, strict=True
    ):
        assert new.hard_ratio == old.hard_ratio
        assert new.threshold == pytest.approx(old.threshold, abs=1e-4)


@pytest.mark.saturation
def test_a_quarter_of_the_embedded_corpus_has_the_stored_special_layers(
    quarter_profile: SaturationProfile,
) -> None:
    record = quarter_profile.record()
    stored = read_typed(profile_path(BASELINES, record), ProfileRecord)
    for name in ("input_transform", "dips", "output_transform", "stable_bands"):
        assert getattr(record.structure, name) == getattr(stored.structure, name)
    assert record.thresholds.exit_layer == stored.thresholds.exit_layer


def test_every_baseline_is_small_and_whole() -> None:
    records = sorted(BASELINES.glob("*/*.saturation.json"))
    assert records
    for path in records:
        assert path.stat().st_size < 2_000_000
        assert path.with_suffix(".npz").stat().st_size < 2_000_000
        assert profile_path(BASELINES, read_profile(path).record()) == path


# --- The real model against the published table ----------------------------------------------

#: Layers 1 to 29: Q4_1 weights in place of fp16 and our corpus in place of Alpaca move no layer's
#: mean by more than 0.012 (Layer 25; on Alpaca text itself quantization alone moves it by 0.007).
LAYER_TOLERANCE = 0.02
#: The row behind the final norm swings with the corpus: 0.12 on Alpaca, 0.08 on the seed tasks,
#: 0.02 on ours, -0.09 on WikiText-2. It says that the norm turns the state, hardly more.
NORMED_TOLERANCE = 0.25


@pytest.fixture(scope="module")
def published() -> Table:
    return read_table(BASELINES / "smollm2-135m-instruct" / "published.csv")


@pytest.fixture(scope="module")
def embedded(quarter_profile: SaturationProfile) -> Table:
    return table_of(quarter_profile)


@pytest.mark.saturation
@pytest.mark.parametrize("layer", [*map(str, range(1, 30)), "30+norm"])
def test_a_layers_mean_is_near_the_published_one(
    embedded: Table, published: Table, layer: str
) -> None:
    tolerance = NORMED_TOLERANCE if layer == "30+norm" else LAYER_TOLERANCE
    assert embedded[layer]["mean"] == pytest.approx(published[layer]["mean"], abs=tolerance)


@pytest.mark.saturation
def test_layer_25_is_the_lowest_of_layers_3_to_29_by_a_clear_margin(embedded: Table) -> None:
    others = min(embedded[str(layer)]["mean"] for layer in range(3, 30) if layer != 25)
    assert embedded["25"]["mean"] < others - 0.08


@pytest.mark.saturation
def test_layer_1_turns_the_embeddings_and_the_bands_are_saturated(embedded: Table) -> None:
    assert abs(embedded["1"]["mean"]) < 0.05
    assert embedded["1"]["frac_below_half"] == 1
    bands = [layer for layer in range(3, 30) if layer != 25]
    assert min(embedded[str(layer)]["mean"] for layer in bands) > 0.93


@pytest.mark.saturation
def test_the_final_norm_makes_the_published_layer_30(embedded: Table) -> None:
    # Residual 0.71, normed near 0: whoever mixes up the two is off by 0.5 and more.
    assert embedded["30"]["mean"] == pytest.approx(0.71, abs=0.04)
    assert embedded["30+norm"]["mean"] < 0.25


def check_thresholds(profile: SaturationProfile) -> None:
    thresholds = profile.record().thresholds
    assert thresholds.exit_layer == "29"
    published = {0.3: 0.9453, 0.5: 0.9517, 0.7: 0.9570}
    for row in thresholds.by_hard_ratio:
        # Twice what separates Q4_1 on Alpaca text from the published values.
        assert row.threshold == pytest.approx(published[row.hard_ratio], abs=0.002)


@pytest.mark.saturation
def test_suggested_thresholds_are_near_the_published_ones(
    quarter_profile: SaturationProfile,
) -> None:
    check_thresholds(quarter_profile)


@needs_shared
@pytest.mark.saturation
@pytest.mark.whole
def test_the_seed_tasks_agree_with_an_independent_reference(
    reference_model: DecoderStack,
) -> None:
    blocks = load_blocks(
        str(SHARED / "data/self-instruct-seed-tasks.jsonl"), reference_model.tokenizer
    )
    measured = table_of(analyze(reference_model, blocks))
    reference = read_table(
        SHARED / "reference/smollm2-135m-q4_1.seed-tasks.fp32.csv",
        {"30": "30+norm", "30-residual": "30"},
    )
    assert measured.keys() == reference.keys()
    for layer, row in reference.items():
        for statistic in ("mean", "std", "p10", "p50", "p90"):
            assert measured[layer][statistic] == pytest.approx(row[statistic], abs=1e-4), (
                f"layer {layer}, {statistic}"
            )


@pytest.fixture
def hub() -> None:
    """Skip where the hub cannot be reached; whatever fails afterwards is a failure."""
    from huggingface_hub import model_info

    try:
        model_info("HuggingFaceTB/SmolLM2-135M-Instruct", timeout=10)
    except Exception as error:  # off, blocked, or away: the client has a type for each
        pytest.skip(f"the hub cannot be reached: {type(error).__name__}")


#: What the published table is compared in: fp32 here against fp16 there, other 500 records (which
#: ones the study took is not known). Q4_1 on Alpaca text is within 0.009 in every mean.
PUBLISHED_TOLERANCE = {"mean": 0.01, "std": 0.01, "p10": 0.015, "p50": 0.01, "p90": 0.01}


@pytest.mark.published
@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_alpaca_and_the_original_weights_give_the_published_table(
    published: Table, dtype: str
) -> None:
    stack = load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=dtype)
    blocks = load_blocks("tatsu-lab/alpaca", stack.tokenizer, num_samples=500)
    profile = analyze(stack, blocks)
    measured = table_of(profile)
    for layer, row in published.items():
        for statistic, tolerance in PUBLISHED_TOLERANCE.items():
            # The row behind the final norm swings with the choice of records.
            allowed = 0.05 if layer == "30+norm" else tolerance
            assert measured[layer][statistic] == pytest.approx(row[statistic], abs=allowed), (
                f"layer {layer}, {statistic}"
            )
    bands = [layer for layer in range(3, 30) if layer != 25]
    assert measured["25"]["mean"] < min(measured[str(layer)]["mean"] for layer in bands) - 0.08
    check_thresholds(profile)


# --- A model of transformers, and texts ------------------------------------------------------


TEXTS = ["the first of the texts", "and a second one", "the third is longer than both of them"]


@pytest.fixture
def plain_model() -> Any:
    return tiny_model("llama")


def test_a_transformers_model_and_texts_give_the_profile_of_stack_and_blocks(
    plain_model: Any,
) -> None:
    tokenizer = tiny_tokenizer()
    found = analyze(plain_model, TEXTS, tokenizer=tokenizer, seq_len=8)
    blocks = load_blocks(TEXTS, tokenizer, seq_len=8)
    expected = analyze(DecoderStack(plain_model, tokenizer=tokenizer), blocks)
    assert found.statistics.table() == expected.statistics.table()
    assert found.provenance.corpus == expected.provenance.corpus
    stack = DecoderStack(plain_model, tokenizer=tokenizer)
    assert analyze(stack, TEXTS, seq_len=8).statistics.table() == expected.statistics.table()


def test_a_dataset_gives_the_profile_of_its_texts(plain_model: Any) -> None:
    import datasets

    dataset = datasets.Dataset.from_dict({"body": TEXTS})
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "seq_len": 8}
    found = analyze(plain_model, dataset, text_column="body", **options)
    assert found.statistics.table() == analyze(plain_model, TEXTS, **options).statistics.table()


def test_blocks_need_no_tokenizer(plain_model: Any) -> None:
    found, expected = (
        analyze(model, random_blocks()) for model in (plain_model, DecoderStack(plain_model))
    )
    assert found.statistics.table() == expected.statistics.table()


def test_the_provenance_names_the_weights_in_memory(plain_model: Any) -> None:
    plain_model.name_or_path = "owner/Tiny"
    found = analyze(plain_model, TEXTS, tokenizer=tiny_tokenizer(), seq_len=8).provenance
    assert (found.model.source, found.model.name) == ("owner/Tiny", "owner--tiny")
    assert str(found.model.weights_hash).startswith("in-memory-sha256:")
    assert str(found.tokenizer_hash).startswith("sha256:")
    plain_model.get_output_embeddings().weight.data[0, 0] += 1
    changed = analyze(plain_model, random_blocks()).provenance
    assert changed.model.weights_hash != found.model.weights_hash


def test_a_model_in_training_remains_in_training(plain_model: Any) -> None:
    plain_model.train()
    plain_model.model.layers[1].eval()
    analyze(plain_model, random_blocks())
    assert plain_model.training
    assert plain_model.model.layers[0].training
    assert not plain_model.model.layers[1].training


@pytest.mark.parametrize(
    ("model", "corpus", "options", "message"),
    [
        (
            "llama",
            TEXTS,
            {},
            "expected a tokenizer to read texts with; pass tokenizer=",
        ),
        (
            "llama",
            "embedded",
            {"tokenizer": tiny_tokenizer()},
            "expected texts, a dataset or blocks, got the name 'embedded'; read it with "
            "load_blocks",
        ),
        (
            "llama",
            random_blocks(),
            {"seq_len": 8},
            "seq_len: the corpus is already cut into blocks; pass the options to load_blocks",
        ),
        (
            None,
            TEXTS,
            {},
            "expected a model of cascade.load or of transformers, got NoneType",
        ),
    ],
)
def test_what_cannot_be_analyzed_is_refused(
    model: str | None, corpus: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        analyze(model and tiny_model(model), corpus, **options)
    assert str(error.value) == message


def test_a_second_tokenizer_is_refused() -> None:
    stack = DecoderStack(tiny_model("llama"), tokenizer=tiny_tokenizer())
    with pytest.raises(UsageError) as error:
        analyze(stack, TEXTS, tokenizer=tiny_tokenizer())
    assert str(error.value) == "expected no tokenizer, as the model has its own; leave it out"
