"""Profiles of tiny models, and of the real model against stored and published tables."""

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
    not SHARED.is_dir(),
    reason=f"the data of the seed study is not next to the repository ({SHARED})",
)

Table = dict[str, dict[str, float]]


def random_blocks(sequences: int = 20, length: int = 12) -> TokenBlocks:
    ids = np.random.default_rng(0).integers(2, 97, (sequences, length)).astype(np.int32)
    return TokenBlocks(ids, "random", "random", sequences)


def read_table(path: Path, names: dict[str, str] | None = None) -> Table:
    """Read a published table as layer -> statistic -> value; `names` renames layers."""
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
def test_similarities_match_the_models_hidden_states(family: str) -> None:
    model = tiny_model(family)
    ids = torch.from_numpy(random_blocks(3).ids.astype(np.int64))
    with torch.no_grad():
        states = model(
            ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
        ).hidden_states
    measured = similarities(DecoderStack(model), ids)
    assert measured.dtype == torch.float32
    assert measured.shape == (5, 3, 12)
    # The last entry of transformers is after the final norm. Compared with the entry before it, it
    # gives the row "4+norm"; the residual row 4 cannot be computed from these states.
    rows = {0: (0, 1), 1: (1, 2), 2: (2, 3), 4: (3, 4)}
    for row, (before, after) in rows.items():
        expected = torch.cosine_similarity(states[before].double(), states[after].double(), dim=-1)
        torch.testing.assert_close(measured[row].double(), expected, atol=1e-6, rtol=0)
    assert (measured[3] - measured[4]).abs().max() > 0.01


def test_profile_does_not_depend_on_the_batch_size() -> None:
    stack, blocks = DecoderStack(tiny_model("llama")), random_blocks()
    one = analyze(stack, blocks, batch_size=1)
    for batch_size in (3, 16, 50):
        other = analyze(stack, blocks, batch_size=batch_size)
        assert np.array_equal(other.statistics.edges, one.statistics.edges)
        for name, value in one.arrays().items():
            if name in ("total", "square_total", "layers"):
                continue
            np.testing.assert_allclose(other.arrays()[name], value, atol=2e-6, err_msg=name)


def test_profile_counts_every_token_once() -> None:
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
    values = np.concatenate([batch for batch, _ in seen], axis=1)
    table = table_of(profile)
    assert list(table) == ["1", "2", "3", "4", "4+norm"]
    for row, layer in enumerate(table):
        assert table[layer]["count"] == blocks.tokens
        assert table[layer]["mean"] == pytest.approx(values[row].mean(dtype=np.float64), abs=1e-6)
        assert table[layer]["min"] == pytest.approx(values[row].min(), abs=1e-6)
    arrays = profile.arrays()
    assert np.array_equal(arrays["sequence_fingerprint"], blocks.sequence_fingerprints())
    np.testing.assert_allclose(
        profile.rows.all().mean, values.mean(axis=2, dtype=np.float64).T, atol=1e-12
    )


def test_edges_are_given_or_come_from_the_first_sequences() -> None:
    stack, blocks = DecoderStack(tiny_model("llama")), random_blocks(sequences=40, length=32)
    first = TokenBlocks(blocks.ids[:16], "random", "random", 16)
    shares = analyze(stack, first).rows.all().share.mean(axis=0)
    np.testing.assert_allclose(shares, np.tile(QUANTILES, (5, 1)), atol=0.01)
    profile = analyze(stack, blocks)
    values = similarities(stack, torch.from_numpy(first.ids.astype(np.int64))).numpy()
    assert np.array_equal(profile.statistics.edges, quantile_edges(values.reshape(5, -1)))
    edges = np.tile([10, 20, 30], (5, 1))
    assert np.array_equal(analyze(stack, blocks, edges=edges).statistics.edges, edges)


def test_statistics_of_two_shards_merge_to_the_whole() -> None:
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
    # Cosines rounded to bf16 would have few distinct values.
    assert len(torch.unique(values)) > 0.9 * values.numel()


def test_similarities_stay_in_their_range() -> None:
    stack = DecoderStack(tiny_model("llama"))
    for layer in stack.layers:  # layers that do nothing, so every similarity is 1 up to rounding
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    values = similarities(stack, torch.from_numpy(random_blocks(50).ids.astype(np.int64)))
    assert values[:4].max() <= 1
    assert values[:4].min() > 1 - 1e-6


def test_error_names_the_layer_that_overflows() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="layer 3 is the first to give NaN"):
        analyze(stack, random_blocks())


def test_invalid_blocks_are_rejected_before_the_pass() -> None:
    stack = DecoderStack(tiny_model("llama"))
    with pytest.raises(CorpusError, match="65 tokens exceed the model's 64 positions"):
        analyze(stack, random_blocks(2, 65))
    strange = TokenBlocks(np.full((1, 4), 97, np.int32), "random", "random", 1)
    with pytest.raises(ModelError, match="token id 97, but the model embeds 97"):
        analyze(stack, strange)
    with pytest.raises(CorpusError, match="--batch-size"):
        analyze(stack, random_blocks(), batch_size=0)


def test_table_of_a_tiny_model(
    strict_table: Callable[[list[dict[str, Any]]], None],
) -> None:
    profile = analyze(DecoderStack(tiny_model("llama", num_layers=6)), random_blocks(32, 24))
    strict_table(to_plain(profile.record().layers))


# --- The real model against its stored baseline ----------------------------------------------


def check_baseline(profile: SaturationProfile, sequences: int, cells: int) -> None:
    """Check that a profile passes against its baseline, and that so many cells are compared."""
    comparison = compare(profile, read_profile(profile_path(BASELINES, profile.record())))
    assert comparison.verdict == "PASS", comparison.worst()[:5]
    assert len(comparison.cells) == cells
    assert comparison.sequences == (sequences, sequences)


def check_roles(record: ProfileRecord, stored: ProfileRecord) -> None:
    for name in ("input_transform", "dips", "output_transform", "stable_bands"):
        assert getattr(record.structure, name) == getattr(stored.structure, name)
    assert record.thresholds.exit_layer == stored.thresholds.exit_layer


@pytest.mark.saturation
def test_quarter_of_the_embedded_corpus_matches_the_stored_baseline(
    quarter_profile: SaturationProfile,
) -> None:
    # Every statistic of every sequence and layer is compared.
    check_baseline(quarter_profile, sequences=128, cells=31 * 5)


@pytest.mark.saturation
@pytest.mark.whole
def test_embedded_corpus_matches_the_stored_baseline(
    embedded_profile: SaturationProfile,
) -> None:
    # Every statistic of every sequence and layer, and of the table, is compared.
    check_baseline(embedded_profile, sequences=511, cells=31 * (5 + 10))


@pytest.mark.saturation
def test_quarter_of_the_embedded_corpus_has_the_stored_roles(
    quarter_profile: SaturationProfile,
) -> None:
    record = quarter_profile.record()
    check_roles(record, read_typed(profile_path(BASELINES, record), ProfileRecord))


@pytest.mark.saturation
@pytest.mark.whole
def test_roles_and_thresholds_match_the_stored_baseline(
    embedded_profile: SaturationProfile,
) -> None:
    record = embedded_profile.record()
    stored = read_typed(profile_path(BASELINES, record), ProfileRecord)
    check_roles(record, stored)
    assert record.structure.cutoff == pytest.approx(stored.structure.cutoff, abs=1e-4)
    for new, old in zip(
        record.thresholds.by_hard_ratio, stored.thresholds.by_hard_ratio, strict=True
    ):
        assert new.hard_ratio == old.hard_ratio
        assert new.threshold == pytest.approx(old.threshold, abs=1e-4)


def test_stored_baselines_are_small_and_valid() -> None:
    records = sorted(BASELINES.glob("*/*.saturation.json"))
    assert records
    for path in records:
        assert path.stat().st_size < 2_000_000
        assert path.with_suffix(".npz").stat().st_size < 2_000_000
        assert profile_path(BASELINES, read_profile(path).record()) == path


# --- The real model against the published table ----------------------------------------------

#: Q4_1 weights instead of fp16 and our corpus instead of Alpaca change the mean of layers 1 to 29
#: by at most 0.012 (layer 25; on Alpaca text, quantization alone changes it by 0.007).
LAYER_TOLERANCE = 0.02
#: The row after the final norm depends on the corpus: 0.12 on Alpaca, 0.08 on the seed tasks, 0.02
#: on ours, -0.09 on WikiText-2. It shows little more than that the norm turns the state.
NORMED_TOLERANCE = 0.25


@pytest.fixture(scope="module")
def published() -> Table:
    return read_table(BASELINES / "smollm2-135m-instruct" / "published.csv")


@pytest.fixture(scope="module")
def embedded(quarter_profile: SaturationProfile) -> Table:
    return table_of(quarter_profile)


@pytest.mark.saturation
@pytest.mark.parametrize("layer", [*map(str, range(1, 30)), "30+norm"])
def test_mean_of_each_layer_is_near_the_published_one(
    embedded: Table, published: Table, layer: str
) -> None:
    tolerance = NORMED_TOLERANCE if layer == "30+norm" else LAYER_TOLERANCE
    assert embedded[layer]["mean"] == pytest.approx(published[layer]["mean"], abs=tolerance)


@pytest.mark.saturation
def test_layer_25_has_clearly_the_lowest_mean_of_layers_3_to_29(embedded: Table) -> None:
    others = min(embedded[str(layer)]["mean"] for layer in range(3, 30) if layer != 25)
    assert embedded["25"]["mean"] < others - 0.08


@pytest.mark.saturation
def test_layer_1_is_near_orthogonal_and_the_bands_are_saturated(embedded: Table) -> None:
    assert abs(embedded["1"]["mean"]) < 0.05
    assert embedded["1"]["frac_below_half"] == 1
    bands = [layer for layer in range(3, 30) if layer != 25]
    assert min(embedded[str(layer)]["mean"] for layer in bands) > 0.93


@pytest.mark.saturation
def test_published_layer_30_is_the_normed_row(embedded: Table) -> None:
    # Residual 0.71, normed near 0: confusing the two gives an error of at least 0.5.
    assert embedded["30"]["mean"] == pytest.approx(0.71, abs=0.04)
    assert embedded["30+norm"]["mean"] < 0.25


def check_thresholds(profile: SaturationProfile) -> None:
    thresholds = profile.record().thresholds
    assert thresholds.exit_layer == "29"
    published = {0.3: 0.9453, 0.5: 0.9517, 0.7: 0.9570}
    for row in thresholds.by_hard_ratio:
        # Twice the difference between Q4_1 on Alpaca text and the published values.
        assert row.threshold == pytest.approx(published[row.hard_ratio], abs=0.002)


@pytest.mark.saturation
def test_suggested_thresholds_are_near_the_published_ones(
    quarter_profile: SaturationProfile,
) -> None:
    check_thresholds(quarter_profile)


@needs_shared
@pytest.mark.saturation
@pytest.mark.whole
def test_profile_of_the_seed_tasks_matches_an_independent_reference(
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
    """Skip if the hub cannot be reached; later errors are failures."""
    from huggingface_hub import model_info

    try:
        model_info("HuggingFaceTB/SmolLM2-135M-Instruct", timeout=10)
    except (
        Exception
    ) as error:  # the client has different errors for offline, blocked and unreachable
        pytest.skip(f"the hub cannot be reached: {type(error).__name__}")


#: Tolerances for the published table, which was measured in fp16 on 500 other records (it is not
#: known which). Q4_1 on Alpaca text is within 0.009 in every mean.
PUBLISHED_TOLERANCE = {"mean": 0.01, "std": 0.01, "p10": 0.015, "p50": 0.01, "p90": 0.01}


@pytest.mark.published
@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_original_weights_on_alpaca_give_the_published_table(published: Table, dtype: str) -> None:
    stack = load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=dtype)
    blocks = load_blocks("tatsu-lab/alpaca", stack.tokenizer, num_samples=500)
    profile = analyze(stack, blocks)
    measured = table_of(profile)
    for layer, row in published.items():
        for statistic, tolerance in PUBLISHED_TOLERANCE.items():
            # The row after the final norm depends on the choice of records.
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


def test_analyze_accepts_a_transformers_model_and_texts(
    plain_model: Any,
) -> None:
    tokenizer = tiny_tokenizer()
    found = analyze(plain_model, TEXTS, tokenizer=tokenizer, seq_len=8)
    blocks = load_blocks(TEXTS, tokenizer, seq_len=8, num_samples=None)
    expected = analyze(DecoderStack(plain_model, tokenizer=tokenizer), blocks)
    assert found.statistics.table() == expected.statistics.table()
    assert found.provenance.corpus == expected.provenance.corpus
    stack = DecoderStack(plain_model, tokenizer=tokenizer)
    assert analyze(stack, TEXTS, seq_len=8).statistics.table() == expected.statistics.table()


def test_analyze_accepts_a_dataset(plain_model: Any) -> None:
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


def test_provenance_of_a_transformers_model_names_its_weights(plain_model: Any) -> None:
    plain_model.name_or_path = "owner/Tiny"
    found = analyze(plain_model, TEXTS, tokenizer=tiny_tokenizer(), seq_len=8).provenance
    assert (found.model.source, found.model.name) == ("owner/Tiny", "owner--tiny")
    assert str(found.model.weights_hash).startswith("in-memory-sha256:")
    assert str(found.tokenizer_hash).startswith("sha256:")
    plain_model.get_output_embeddings().weight.data[0, 0] += 1
    changed = analyze(plain_model, random_blocks()).provenance
    assert changed.model.weights_hash != found.model.weights_hash


def test_analyze_keeps_the_training_mode_of_a_model(plain_model: Any) -> None:
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
def test_invalid_model_or_corpus_is_rejected(
    model: str | None, corpus: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        analyze(model and tiny_model(model), corpus, **options)
    assert str(error.value) == message


def test_second_tokenizer_is_rejected() -> None:
    stack = DecoderStack(tiny_model("llama"), tokenizer=tiny_tokenizer())
    with pytest.raises(UsageError) as error:
        analyze(stack, TEXTS, tokenizer=tiny_tokenizer())
    assert str(error.value) == "expected no tokenizer, as the model has its own; leave it out"
