"""Benchmark of decoding: the same tokens asked of every way, honest records. No speed asserted."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.commands import Run
from support.tiny_models import random_ids, tiny_model

from cascade.benchmarks import decode as benchmark
from cascade.benchmarks.decode import (
    WAYS,
    DecodeSetup,
    generate_plainly,
    generated_rows,
    skipping_rows,
    target_rows,
)
from cascade.benchmarks.timing import BenchmarkError
from cascade.core.errors import ModelError, UsageError
from cascade.decoding.early_exit import EarlyExit
from cascade.exits.head_fitting import fit_heads
from cascade.models.flops import Counts, flops
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.report.benchmarks import print_decoding

ROUNDS = 2
#: The room itself: as an attribute of the package, the function of its name covers it.


def settings(saved: Path, **changes: Any) -> DecodeSetup:
    small = {"prompt_tokens": 12, "new_tokens": 6, "rounds": ROUNDS}
    return DecodeSetup(model=str(saved), **(small | changes))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit on little: what is fitted is not what is tested here."""
    for name, value in (
        ("_FITTED_TOKENS", 1024),
        ("_CALIBRATED_TOKENS", 256),
        ("_SCORED_SEQUENCES", 4),
    ):
        monkeypatch.setattr(benchmark, name, value)


_RECORDS: dict[str, dict[str, Any]] = {}


@pytest.fixture
def record(saved: Path, one_thread: None) -> dict[str, Any]:
    """One run in fp32, shared by the tests that only read it."""
    if "fp32" not in _RECORDS:
        _RECORDS["fp32"] = benchmark.decode(settings(saved, layer=2))
    return json.loads(json.dumps(_RECORDS["fp32"], allow_nan=False))  # type: ignore[no-any-return]


# --- Equal work ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generate_makes_exactly_so_many_tokens_and_ours_are_the_same(family: str) -> None:
    stack, ids = DecoderStack(tiny_model(family)), random_ids(1, 8)
    plain = generate_plainly(stack, ids, 20)
    assert plain.shape == (1, 28)
    assert torch.equal(plain[:, :8], ids)
    ours = EarlyExit(stack).generate(ids, max_new_tokens=20, eos_token_id=())
    assert isinstance(ours, torch.Tensor)
    assert torch.equal(ours, plain)


def test_generate_goes_on_behind_an_end_of_text() -> None:
    stack, ids = DecoderStack(tiny_model("llama")), random_ids(1, 8)
    first = int(generate_plainly(stack, ids, 1)[0, -1])
    stack.model.generation_config.eos_token_id = first
    assert generate_plainly(stack, ids, 6).shape == (1, 14)


def test_verified_tokens_are_the_full_models_and_full_depth_leaves_nothing_out(
    record: dict[str, Any],
) -> None:
    generated = record["generated"]
    assert set(generated) == set(WAYS)
    assert generated["full"]["agreement"] == generated["verified"]["agreement"] == 1.0
    assert generated["full"]["exit_share"] == 0.0
    assert generated["full"]["layers_per_token"] == 4.0
    # Two prompts of 12 tokens, five of the six new tokens are passed through.
    assert generated["full"]["counts"]["layer_rows"] == [34] * 4
    for name in ("frozen", "ridge"):
        row = generated[name]
        assert 0 < row["exit_share"] <= 1, "nobody left: this tests nothing"
        assert row["counts"]["layer_rows"][:2] == [34, 34]
        assert row["counts"]["layer_rows"][2:] < [34, 34]
        assert row["layers_per_token"] == sum(row["counts"]["layer_rows"]) / 34
    assert sum(generated["frozen"]["counts"]["key_value_rows"]) > 0
    assert sum(generated["ridge"]["counts"]["predicted_rows"]) > 0
    assert generated["verified"]["drafted"] >= generated["verified"]["accepted"]


def test_a_corpus_is_text_also_where_it_holds_the_token_that_the_model_pads_with(
    folder: Path,
) -> None:
    pads = {"pad_token_id": ord("e") - 30}  # as the tiny tokenizer numbers the letter
    (folder / "generation_config.json").write_text(json.dumps(pads))
    record = benchmark.decode(settings(folder, layer=2))
    assert record["generated"]["full"]["counts"]["layer_rows"] == [34] * 4


def test_agreement_is_the_share_of_new_tokens_at_the_same_place() -> None:
    stack, ids = DecoderStack(tiny_model("llama")), random_ids(2, 6)
    early = EarlyExit(stack)
    made: Any = early.generate(ids, max_new_tokens=4, eos_token_id=(), return_dict_in_generate=True)
    other = made.sequences.clone()
    other[0, 7] += 1  # the second of eight new tokens
    rows = generated_rows({"generate": [other], "full": [made]}, 6, 4)
    assert rows["full"]["agreement"] == 7 / 8
    assert rows["generate"] == {"agreement": 1.0}


# --- The record ------------------------------------------------------------------------------


def test_the_record_has_every_way_with_one_time_per_round(record: dict[str, Any]) -> None:
    assert (record["schema"], record["kind"]) == (1, "bench.decode")
    assert list(record["ways"]) == list(WAYS)
    for way in record["ways"].values():
        assert len(way["seconds"]) == ROUNDS
        assert way["tokens_per_second"] == pytest.approx(12 / np.median(way["seconds"]))
    assert [sorted(order) for order in record["order"]] == [sorted(WAYS)] * ROUNDS
    assert [row["name"] for row in record["ratios"]] == [
        f"{way}/generate" for way in WAYS if way != "generate"
    ]


def test_the_record_says_what_ran_where_and_how_tokens_left(record: dict[str, Any]) -> None:
    assert record["settings"]["layer"] == record["exit"]["layer"] == 2
    assert record["settings"]["threads"] == torch.get_num_threads()
    assert record["exit"]["head"] == "ridge"
    assert record["exit"]["fallback"] is None
    assert "first half" in record["exit"]["threshold"]
    assert record["provenance"]["model"]["num_layers"] == 4
    assert record["provenance"]["corpus"]["sequences"] == 2
    assert record["provenance"]["machine"]["cores"] >= 1


def test_the_assistant_is_timed_against_generate_over_the_same_tokens(
    record: dict[str, Any],
) -> None:
    row = record["assistant"]
    assert row["reason"] is None
    assert (row["layer"], row["new_tokens"]) == (2, 6)
    assert set(row["ways"]) == {"assistant", "generate"}
    assert row["agreement"] == 1.0
    assert [ratio["name"] for ratio in row["ratios"]] == ["assistant/generate"]


def test_where_the_assistant_does_not_run_the_record_says_why(
    saved: Path, one_thread: None
) -> None:
    record = benchmark.decode(settings(saved, batch_size=2, scoring=False, dtype="bfloat16"))
    assert record["assistant"]["reason"].startswith("it does not run here (")
    assert "batch_size" in record["assistant"]["reason"]
    assert "ways" not in record["assistant"]
    assert record["scoring"] == {"reason": "not asked for (--no-scoring)"}
    targets = {row["name"]: row for row in record["targets"]}
    assert targets["verified tokens equal, fp32"]["met"] is None
    assert targets["true_skipping"]["met"] is None
    text = printed(record)
    assert "Not measured: it does not run here" in text
    assert "Not measured: not asked for (--no-scoring)." in text


def test_a_broken_assistant_leaves_the_model_its_depth(
    saved: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = []

    def plainly(stack: DecoderStack, ids: Any, new: int, **settings: Any) -> Any:
        stacks.append(stack)
        if settings:
            stack.decoder.config.num_hidden_layers = 1  # type: ignore[union-attr]
            raise RuntimeError("broken\nin two lines")
        return generate_plainly(stack, ids, new)

    monkeypatch.setattr(benchmark, "generate_plainly", plainly)
    record = benchmark.decode(settings(saved, scoring=False))
    assert record["assistant"]["reason"] == "it does not run here (broken)"
    assert stacks[0].decoder.config.num_hidden_layers == 4


def test_scoring_holds_time_against_counted_operations(record: dict[str, Any]) -> None:
    scoring = record["scoring"]
    assert scoring["reason"] is None
    (row,) = scoring["skipping"]
    assert row["name"] == "frozen at 2"
    assert row["exit_share"] == pytest.approx(0.7, abs=0.02)
    assert 0.5 < row["flops_ratio"] < 0.8  # two of four layers for 70 % of the tokens
    assert row["excess"] == pytest.approx(row["seconds_ratio"] / row["flops_ratio"])
    assert {row["name"] for row in record["targets"]} == {
        "full/generate",
        "verified tokens equal, fp32",
        "true_skipping, frozen at 2",
    }


def test_operations_are_those_of_the_counts() -> None:
    stack = DecoderStack(tiny_model("llama"))
    early = EarlyExit(stack, layer=1, rule="fixed", threshold=-math.inf)
    first = {"full": EarlyExit(stack).score(random_ids()), "frozen": early.score(random_ids())}
    ratios = [{"name": "frozen/full", "median": 0.5, "interval": [0.4, 0.6]}]
    (row,) = skipping_rows(stack, first, ratios)
    expected = flops(stack, first["frozen"].counts) / flops(stack, first["full"].counts)
    assert row["flops_ratio"] == expected < 0.8
    assert row["exit_share"] == 1.0
    assert row["excess"] == 0.5 / expected
    assert row["interval"] == pytest.approx([0.4 / expected, 0.6 / expected])


def test_a_missed_target_is_said() -> None:
    ratios = [{"name": "full/generate", "median": 1.1, "interval": [1.05, 1.2]}]
    first = {
        "generate": [torch.tensor([[1, 2, 3, 4]])],
        "verified": [torch.tensor([[1, 2, 3, 5]])],
    }
    scoring = {"skipping": [{"name": "frozen at 8", "excess": 1.3, "interval": [1.2, 1.4]}]}
    rows = target_rows(ratios, first, scoring, 2, exactly=True)
    assert [row["met"] for row in rows] == [False, False, False]
    assert [row["measured"] for row in rows] == [1.1, 0.5, 1.3]
    assert target_rows(ratios, first, scoring, 2, exactly=False)[1]["met"] is None


# --- Heads, layers, thresholds ---------------------------------------------------------------


def test_heads_of_a_file_are_used_and_their_layer_is_the_exit(
    saved: Path, tmp_path: Path, one_thread: None
) -> None:
    stack = load(str(saved))
    blocks = benchmark.load_blocks("embedded", stack.tokenizer, seq_len=16, max_tokens=1024)
    path = tmp_path / "heads.safetensors"
    fit_heads(stack, blocks, [1, 2]).save(path)
    record = benchmark.decode(settings(saved, heads=str(path), threshold=0.5, scoring=False))
    assert record["exit"] | {"fallback": None} == {
        "layer": 2,
        "rule": "cosine",
        "heads": str(path),
        "head": "ridge",
        "threshold": "given",
        "fallback": None,
    }
    assert record["settings"]["threshold"] == 0.5
    with pytest.raises(
        UsageError, match="these heads were fitted for the layers 1, 2, got layer 3"
    ):
        benchmark.decode(settings(saved, heads=str(path), layer=3))


def test_heads_of_another_model_are_refused(saved: Path, tmp_path: Path, models: Path) -> None:
    stack = load(str(models / "other"))
    blocks = benchmark.load_blocks("embedded", stack.tokenizer, seq_len=16, max_tokens=1024)
    path = tmp_path / "heads.safetensors"
    fit_heads(stack, blocks, [2]).save(path)
    with pytest.raises(ModelError, match="belong to"):
        benchmark.decode(settings(saved, heads=str(path)))


# --- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 1}, "expected --rounds of at least 2 (one round has no interval), got 1"),
        ({"prompts": 0}, "expected --prompts of at least 1, got 0"),
        ({"new_tokens": 1}, "expected --new-tokens of at least 2, got 1"),
        ({"batch_size": 0}, "expected --batch-size of at least 1, got 0"),
        ({"threads": 0}, "expected --threads of at least 1, got 0"),
        ({"dtype": "float16"}, "expected --dtype float32 or bfloat16, got float16"),
        ({"hard_ratio": 1.5}, "expected --hard-ratio in 0..1, got 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError) as caught:
        DecodeSetup(**changes)
    assert str(caught.value) == message


def test_more_prompts_than_the_text_gives_are_refused(saved: Path) -> None:
    with pytest.raises(BenchmarkError, match="use fewer --prompts or --prompt-tokens"):
        benchmark.decode(settings(saved, prompts=100_000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 5}, "expected an exit layer in 1..4, got 5"),
        ({"rule": "cosinus"}, "expected a rule among"),
        ({"threshold": 2.0}, "expected a threshold in there"),
    ],
)
def test_an_exit_that_cannot_be_is_refused_before_anything_is_fitted(
    saved: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "fit_heads", None)
    with pytest.raises(UsageError, match=message):
        benchmark.decode(settings(saved, **changes))


# --- The report and the command --------------------------------------------------------------


def printed(record: dict[str, Any], width: int = 100) -> str:
    stream = io.StringIO()
    print_decoding(record, Console(file=stream, width=width))
    return stream.getvalue()


def test_the_report_shows_ways_ratios_exits_and_targets(record: dict[str, Any]) -> None:
    text = printed(record)
    for part in ("Speed", "Ratios of seconds", "What was generated", "Targets", "Notes"):
        assert part in text
    for way in WAYS:
        assert way in text
    assert "true_skipping, frozen at 2" in text
    assert "layer 2, cosine from" in text
    assert f"{record['ratios'][0]['median']:.3f}" in text


def test_the_report_is_whole_on_a_narrow_terminal(record: dict[str, Any]) -> None:
    assert max(map(len, printed(record, width=80).splitlines())) <= 80


def test_the_report_takes_no_other_record(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected kind 'bench.decode', got 'bench.collect'"):
        printed(record | {"kind": "bench.collect"})


def test_the_command_prints_and_writes_the_record(saved: Path, run: Run, here: Path) -> None:
    done = run(
        *("bench", "decode", "--model", saved, "--prompt-tokens", 12, "--new-tokens", 6),
        *("--rounds", 2, "--no-scoring", "--output", "out"),
    )
    assert done.status == 0, done.err
    record = json.loads((here / "out" / "bench.json").read_text())
    assert record["kind"] == "bench.decode"
    assert record["provenance"]["command"].startswith("cascade bench decode --model")
    assert "full/generate" in done.out
    assert "Round 2 of 2" in done.err


def test_the_command_refuses_in_one_line(saved: Path, run: Run, here: Path) -> None:
    done = run("bench", "decode", "--model", saved, "--rounds", 1, "--output", "out")
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert "expected --rounds of at least 2" in done.err
    assert not (here / "out").exists()


def test_prompts_beyond_the_positions_are_refused_before_any_pass(
    saved: Path, run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As an attribute, the name is the function's.
    monkeypatch.setattr(benchmark, "fit_heads", lambda *_, **__: pytest.fail("heads were fitted"))
    for prompt, new in ((600, 24), (60, 5)):
        done = run(
            *("bench", "decode", "--model", saved, "--output", "out"),
            *("--prompt-tokens", prompt, "--new-tokens", new),
        )
        assert done.status == 2
        assert done.err.splitlines()[-1] == (
            f"cascade: {prompt} --prompt-tokens and {new} --new-tokens exceed the model's 64 "
            "positions; take fewer"
        )
        assert not (here / "out").exists()


def test_counts_of_several_batches_add_up() -> None:
    stack = DecoderStack(tiny_model("llama"))
    early = EarlyExit(stack)
    made: list[Any] = [
        early.generate(
            random_ids(1, 6, seed=seed),
            max_new_tokens=3,
            eos_token_id=(),
            return_dict_in_generate=True,
        )
        for seed in (0, 1)
    ]
    rows = generated_rows({"generate": [part.sequences for part in made], "full": made}, 6, 4)
    expected: Counts = made[0].counts + made[1].counts
    assert rows["full"]["counts"] == expected.record()
    assert rows["full"]["layers_per_token"] == 4.0
