"""Test the benchmark of early exit: all variants use the same prompts. No test asserts a speed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.commands import Run

from cascade.benchmarks import decoding as benchmark
from cascade.benchmarks.decoding import (
    VARIANTS,
    DecodingBenchmark,
    DecodingBenchmarkConfig,
)
from cascade.benchmarks.decoding_results import ScoringTimes
from cascade.benchmarks.passes import generate_plainly
from cascade.benchmarks.timing import BenchmarkError
from cascade.core.errors import ModelError, UsageError
from cascade.core.records import to_json
from cascade.core.schema import UNSET, SchemaError, from_plain, to_plain
from cascade.exits.head_fitting import fit_heads
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.report.benchmarks.decoding import decoding_benchmark_report
from cascade.report.common.sections import print_sections

ROUNDS = 2


def settings(saved: Path, **changes: Any) -> DecodingBenchmarkConfig:
    small = {"prompt_tokens": 12, "new_tokens": 6, "rounds": ROUNDS}
    return DecodingBenchmarkConfig(model=str(saved), **(small | changes))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit on few tokens, because these tests do not depend on the fit."""
    for name, value in (
        ("FITTED_TOKENS", 1024),
        ("CALIBRATED_TOKENS", 256),
        ("SCORED_SEQUENCES", 4),
    ):
        monkeypatch.setattr(benchmark, name, value)


_RECORDS: dict[str, DecodingBenchmark] = {}


@pytest.fixture
def record(saved: Path, one_thread: None) -> DecodingBenchmark:
    """Return the record of one run in fp32, shared by tests that only read it."""
    if "fp32" not in _RECORDS:
        _RECORDS["fp32"] = benchmark.benchmark_decoding(settings(saved, layer=2))
    # Pass it through JSON, as if it was read from a file.
    text = to_json(to_plain(_RECORDS["fp32"]))
    return from_plain(json.loads(text), DecodingBenchmark)


# --- Equal work ------------------------------------------------------------------------------


def test_verified_tokens_equal_the_full_models_and_full_depth_computes_every_row(
    record: DecodingBenchmark,
) -> None:
    generated = record.generated
    assert set(generated) == set(VARIANTS)
    assert generated["full"].agreement == generated["verified"].agreement == 1.0
    assert generated["full"].exit_share == 0.0
    assert generated["full"].layers_per_token == 4.0
    # Two prompts of 12 tokens, and five of the six new tokens each, are computed.
    assert generated["full"].counts.layer_rows == [34] * 4
    for name in ("frozen", "ridge"):
        row = generated[name]
        assert 0 < row.exit_share <= 1, "no token exits, so the test is void"
        assert row.counts.layer_rows[:2] == [34, 34]
        assert row.counts.layer_rows[2:] < [34, 34]
        assert row.layers_per_token == sum(row.counts.layer_rows) / 34
    assert sum(generated["frozen"].counts.key_value_rows) > 0
    assert sum(generated["ridge"].counts.predicted_rows) > 0
    assert generated["verified"].drafted >= generated["verified"].accepted


def test_a_models_padding_token_penalties_and_beams_do_not_change_the_work(
    folder: Path,
) -> None:
    pads = {"pad_token_id": ord("e") - 30}  # the tiny tokenizer's id of the letter
    pads |= {"repetition_penalty": 1.9, "num_beams": 2, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(pads))
    record = benchmark.benchmark_decoding(settings(folder, layer=2))
    assert record.generated["full"].counts.layer_rows == [34] * 4


# --- The record ------------------------------------------------------------------------------


def test_the_record_has_every_variant_with_one_time_per_round(record: DecodingBenchmark) -> None:
    assert (record.schema, record.kind) == (1, "bench.decode")
    assert list(record.variants) == list(VARIANTS)
    for times in record.variants.values():
        assert len(times.seconds) == ROUNDS
        assert times.tokens_per_second == pytest.approx(12 / np.median(times.seconds))
    assert [sorted(order) for order in record.order] == [sorted(VARIANTS)] * ROUNDS
    assert [row.name for row in record.ratios] == [
        f"{name}/generate" for name in VARIANTS if name != "generate"
    ]


def test_the_record_names_model_machine_and_exit(record: DecodingBenchmark) -> None:
    assert record.settings.layer == record.exit.layer == 2
    assert record.settings.threads == torch.get_num_threads()
    assert record.exit.head == "ridge"
    assert record.exit.fallback is None
    assert "first half" in record.exit.threshold
    assert record.provenance.model.num_layers == 4
    assert record.provenance.corpus.sequences == 2
    assert record.provenance.machine.cores >= 1


def test_the_assistant_is_timed_against_generate_over_the_same_tokens(
    record: DecodingBenchmark,
) -> None:
    row = record.assistant
    assert row.reason is None
    assert (row.layer, row.new_tokens) == (2, 6)
    assert set(row.variants) == {"assistant", "generate"}
    assert row.agreement == 1.0
    assert [ratio.name for ratio in row.ratios] == ["assistant/generate"]


def test_the_record_has_the_reason_if_the_assistant_does_not_run(
    saved: Path, one_thread: None
) -> None:
    record = benchmark.benchmark_decoding(
        settings(saved, batch_size=2, scoring=False, dtype="bfloat16")
    )
    assert record.assistant.reason.startswith("assistant_early_exit does not run here (")
    assert "batch_size" in record.assistant.reason
    assert record.assistant.variants is UNSET
    assert record.scoring == ScoringTimes(reason="disabled by --no-scoring")
    assert to_plain(record.scoring) == {"reason": "disabled by --no-scoring"}
    targets = {row.name: row for row in record.targets}
    assert targets["verified tokens equal, fp32"].met is None
    assert targets["true_skipping"].met is None
    text = printed(record)
    assert "Not measured: assistant_early_exit does not run here" in " ".join(text.split())
    assert "Not measured: disabled by --no-scoring." in text


def test_a_failing_assistant_does_not_change_the_depth_of_the_model(
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
    record = benchmark.benchmark_decoding(settings(saved, scoring=False))
    assert record.assistant.reason == "assistant_early_exit does not run here (broken)"
    assert stacks[0].decoder.config.num_hidden_layers == 4


def test_scoring_compares_time_with_counted_operations(record: DecodingBenchmark) -> None:
    scoring = record.scoring
    assert scoring.reason is None
    (row,) = scoring.skipping
    assert row.name == "frozen at 2"
    assert row.exit_share == pytest.approx(0.7, abs=0.02)
    assert 0.5 < row.flops_ratio < 0.8  # two of four layers for 70 % of the tokens
    assert row.excess == pytest.approx(row.seconds_ratio / row.flops_ratio)
    assert {row.name for row in record.targets} == {
        "full/generate",
        "verified tokens equal, fp32",
        "true_skipping, frozen at 2",
    }


# --- Heads, layers, thresholds ---------------------------------------------------------------


def test_heads_from_a_file_are_used_with_their_layer_as_exit(
    saved: Path, tmp_path: Path, one_thread: None
) -> None:
    stack = load(str(saved))
    blocks = benchmark.load_blocks("embedded", stack.tokenizer, seq_len=16, max_tokens=1024)
    path = tmp_path / "heads.safetensors"
    fit_heads(stack, blocks, [1, 2]).save(path)
    record = benchmark.benchmark_decoding(
        settings(saved, heads=str(path), threshold=0.5, scoring=False)
    )
    assert to_plain(record.exit) | {"fallback": None} == {
        "layer": 2,
        "rule": "cosine",
        "heads": str(path),
        "head": "ridge",
        "threshold": "given",
        "fallback": None,
    }
    assert record.settings.threshold == 0.5
    with pytest.raises(
        UsageError, match=r"expected a layer that these heads were fitted for \(1, 2\), got 3"
    ):
        benchmark.benchmark_decoding(settings(saved, heads=str(path), layer=3))


def test_heads_of_another_model_are_refused(saved: Path, tmp_path: Path, models: Path) -> None:
    stack = load(str(models / "other"))
    blocks = benchmark.load_blocks("embedded", stack.tokenizer, seq_len=16, max_tokens=1024)
    path = tmp_path / "heads.safetensors"
    fit_heads(stack, blocks, [2]).save(path)
    with pytest.raises(ModelError, match="belong to"):
        benchmark.benchmark_decoding(settings(saved, heads=str(path)))


# --- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 1}, "expected --rounds of at least 2 (one round gives no interval), got 1"),
        ({"prompts": 0}, "expected --prompts of at least 1, got 0"),
        ({"new_tokens": 1}, "expected --new-tokens of at least 2, got 1"),
        ({"batch_size": 0}, "expected --batch-size of at least 1, got 0"),
        ({"threads": 0}, "expected --threads of at least 1, got 0"),
        ({"dtype": "float16"}, "expected --dtype float32 or bfloat16, got float16"),
        ({"hard_ratio": 1.5}, "expected --hard-ratio in 0..1, got 1.5"),
    ],
)
def test_invalid_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError) as caught:
        DecodingBenchmarkConfig(**changes)
    assert str(caught.value) == message


def test_more_prompts_than_the_text_has_are_refused(saved: Path) -> None:
    with pytest.raises(BenchmarkError, match="use fewer --prompts or --prompt-tokens"):
        benchmark.benchmark_decoding(settings(saved, prompts=100_000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 5}, "expected an exit layer in 1..4, got 5"),
        ({"rule": "cosinus"}, "expected a rule among"),
        ({"threshold": 2.0}, "expected a threshold in this range"),
    ],
)
def test_an_invalid_exit_is_refused_before_anything_is_fitted(
    saved: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "fit_heads", None)
    with pytest.raises(UsageError, match=message):
        benchmark.benchmark_decoding(settings(saved, **changes))


# --- The report and the command --------------------------------------------------------------


def printed(record: DecodingBenchmark, width: int = 100) -> str:
    stream = io.StringIO()
    print_sections(decoding_benchmark_report(record), Console(file=stream, width=width))
    return stream.getvalue()


def test_the_report_shows_variants_ratios_exits_and_targets(record: DecodingBenchmark) -> None:
    text = printed(record)
    for title in ("Speed", "Ratios of seconds", "Generated text", "Targets", "Notes"):
        assert title in text
    for name in VARIANTS:
        assert name in text
    assert "true_skipping, frozen at 2" in text
    assert "layer 2, cosine >= " in text
    assert f"{record.ratios[0].median:.3f}" in text


def test_the_report_fits_a_narrow_terminal(record: DecodingBenchmark) -> None:
    assert max(map(len, printed(record, width=80).splitlines())) <= 80


def test_the_report_refuses_a_record_of_another_kind(record: DecodingBenchmark) -> None:
    with pytest.raises(SchemaError, match=r'at kind, got "bench\.collect"'):
        from_plain(to_plain(record) | {"kind": "bench.collect"}, DecodingBenchmark)


def test_the_command_prints_and_writes_the_record(saved: Path, run: Run, here: Path) -> None:
    done = run(
        *("bench", "early-exit", "--model", saved, "--prompt-tokens", 12, "--new-tokens", 6),
        *("--rounds", 2, "--no-scoring", "--output", "out"),
    )
    assert done.status == 0, done.err
    record = json.loads((here / "out" / "bench.json").read_text())
    assert record["kind"] == "bench.decode"
    assert record["provenance"]["command"].startswith("cascade bench early-exit --model")
    assert "full/generate" in done.out
    assert "Round 2 of 2" in done.err


def test_the_command_gives_a_one_line_error(saved: Path, run: Run, here: Path) -> None:
    done = run("bench", "early-exit", "--model", saved, "--rounds", 1, "--output", "out")
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert "expected --rounds of at least 2" in done.err
    assert not (here / "out").exists()


def test_prompts_beyond_the_positions_are_refused_before_any_pass(
    saved: Path, run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "fit_heads", lambda *_, **__: pytest.fail("heads were fitted"))
    for prompt, new in ((600, 24), (60, 5)):
        done = run(
            *("bench", "early-exit", "--model", saved, "--output", "out"),
            *("--prompt-tokens", prompt, "--new-tokens", new),
        )
        assert done.status == 2
        assert done.err.splitlines()[-1] == (
            f"cascade: {prompt} --prompt-tokens and {new} --new-tokens exceed the model's 64 "
            "positions; use fewer"
        )
        assert not (here / "out").exists()
