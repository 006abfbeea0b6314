"""Test the benchmark of lossless decoding on a tiny model. No test asserts a speed."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.commands import Run
from support.drafting import Stubborn

from cascade.benchmarks.lossless import benchmark, variants
from cascade.benchmarks.lossless.benchmark import benchmark_lossless
from cascade.benchmarks.lossless.config import LosslessBenchmarkConfig
from cascade.benchmarks.lossless.peers import PeerTimes
from cascade.benchmarks.lossless.records import (
    LosslessBenchmark,
    LosslessCell,
    LosslessVariant,
    Peer,
    TextDifference,
)
from cascade.benchmarks.lossless.variants import DecodingVariant, Made, PromptBatch
from cascade.benchmarks.timing import BenchmarkError
from cascade.core.errors import ModelError
from cascade.core.records import to_json
from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.models.stack import DecoderStack
from cascade.report.benchmarks.lossless import lossless_benchmark_report
from cascade.report.common.sections import print_sections

NAMES = {"generate", "static", "prompt-lookup", "assistant", "full", "lookup"}


def settings(model: Path, **changes: Any) -> LosslessBenchmarkConfig:
    small: dict[str, Any] = {"prompts": 2, "new_tokens": 8, "long_tokens": 300}
    small |= {"dtypes": ("float32",), "kinds": ("instructions",)}
    return LosslessBenchmarkConfig(model=str(model), **(small | changes))


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat nothing, whatever else the machine does."""
    monkeypatch.setattr("cascade.benchmarks.lossless.rounds.disturbance", lambda *_: None)


_RECORDS: list[LosslessBenchmark] = []


@pytest.fixture
def record(roomy: Path, one_thread: None) -> LosslessBenchmark:
    """Return the record of one run, shared by tests that only read it."""
    if not _RECORDS:
        config = settings(roomy, kinds=("instructions", "rewriting", "long-context"))
        _RECORDS.append(benchmark_lossless(config))
    # Pass it through JSON, as if it was read from a file.
    return from_plain(json.loads(to_json(to_plain(_RECORDS[0]))), LosslessBenchmark)


def row_of(cell: LosslessCell, name: str) -> LosslessVariant:
    return next(row for row in cell.variants if row.name == name)


def printed(record: LosslessBenchmark, width: int = 100) -> str:
    stream = io.StringIO()
    print_sections(lossless_benchmark_report(record), Console(file=stream, width=width))
    return stream.getvalue()


# --- The record ------------------------------------------------------------------------------


def test_every_variant_is_timed_once_per_batch_on_every_kind(record: LosslessBenchmark) -> None:
    assert [cell.prompts for cell in record.cells] == ["instructions", "rewriting", "long-context"]
    for cell in record.cells:
        assert {row.name for row in cell.variants} == NAMES
        assert [sorted(batch.order) for batch in cell.batches] == [sorted(NAMES)] * 2
        assert cell.batches[0].order[1:] == cell.batches[1].order[:-1]
        for row in cell.variants:
            assert row.reason is None
            assert len(row.seconds) == len(row.cpu_seconds) == len(row.new_tokens) == 2


def test_texts_of_all_variants_equal_those_of_generate(record: LosslessBenchmark) -> None:
    for cell in record.cells:
        for row in cell.variants:
            assert (row.texts, row.equal, row.first_difference) == (2, 2, None), row.name


def test_speedups_are_ratios_of_seconds_per_new_token(record: LosslessBenchmark) -> None:
    cell = record.cells[0]
    reference, row = row_of(cell, "generate"), row_of(cell, "lookup")
    each = np.array(row.seconds) / row.new_tokens
    own = np.array(reference.seconds) / reference.new_tokens
    assert row.speedup == pytest.approx(np.median(own / each))
    assert row.milliseconds_per_token == pytest.approx(1e3 * np.median(each))
    assert row.interval is not None
    assert row.interval[0] <= row.speedup <= row.interval[1]
    assert reference.speedup == 1.0
    assert reference.interval == [1.0, 1.0]


def test_the_fastest_variant_comes_first(record: LosslessBenchmark) -> None:
    for cell in record.cells:
        speeds = [row.speedup or 0 for row in cell.variants]
        assert speeds == sorted(speeds, reverse=True)


def test_drafts_are_counted_by_position_and_proposer(record: LosslessBenchmark) -> None:
    for cell in record.cells:
        full, lookup = row_of(cell, "full").drafts, row_of(cell, "lookup").drafts
        assert full is not None
        assert lookup is not None
        assert full.tokens_per_pass == 1.0
        assert full.drafted == 0
        assert lookup.tokens_per_pass >= 1.0
        assert [at.name for at in lookup.proposers] == ["n-gram", "runner-ups"]
        assert sum(at.drafted for at in lookup.proposers) == lookup.drafted
        assert sum(at.accepted for at in lookup.proposers) == lookup.accepted
        assert sum(at.accepted for at in lookup.positions) == lookup.accepted
        assert row_of(cell, "generate").drafts is None


def test_the_record_has_memory_load_and_provenance(record: LosslessBenchmark) -> None:
    (memory,) = record.memory
    assert memory.weights_mb > 0
    assert memory.obstacle is None
    assert memory.peak_mb is None or memory.peak_mb > memory.weights_mb
    assert record.settings.threads == torch.get_num_threads()
    assert record.provenance.machine.cores
    assert record.provenance.model.dtype == "float32"
    assert record.provenance.corpus.sequences == 6
    assert all(batch.load_average is not None for batch in record.cells[0].batches)


def test_a_record_with_a_missing_time_is_refused(record: LosslessBenchmark) -> None:
    plain = to_plain(record)
    plain["cells"][0]["variants"][0]["seconds"].pop()
    broken = from_plain(plain, LosslessBenchmark)
    assert "as many seconds, cpu_seconds and new_tokens" in str(broken.inconsistency())
    assert record.inconsistency() is None


def test_a_record_of_another_kind_is_refused(record: LosslessBenchmark) -> None:
    with pytest.raises(SchemaError, match=r'at kind, got "bench\.decode"'):
        from_plain(to_plain(record) | {"kind": "bench.decode"}, LosslessBenchmark)


# --- Planted faults --------------------------------------------------------------------------


def plant(
    monkeypatch: pytest.MonkeyPatch, name: str, wrap: Callable[[DecodingVariant], Any]
) -> None:
    """Replace what one variant does."""
    real = variants.variants_of

    def planted(*arguments: Any, **options: Any) -> dict[str, DecodingVariant]:
        found = real(*arguments, **options)
        found[name] = DecodingVariant(found[name].what, wrap(found[name]), found[name].most)
        return found

    monkeypatch.setattr(benchmark, "variants_of", planted)


def test_a_planted_inequality_is_reported(
    roomy: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(variant: DecodingVariant) -> Callable[[PromptBatch], Made]:
        def run(batch: PromptBatch) -> Made:
            made = variant.run(batch)
            sequences = made.sequences.clone()
            sequences[:, batch.ids.shape[1] + 1] += 1
            return Made(sequences, made.generation)

        return run

    # The ends of texts would cut the fault off.
    monkeypatch.setattr(benchmark, "end_tokens", lambda _: frozenset())
    plant(monkeypatch, "lookup", wrong)
    record = benchmark_lossless(settings(roomy))
    row = row_of(record.cells[0], "lookup")
    assert (row.equal, row.texts) == (0, 2)
    assert row.first_difference == TextDifference(prompt=1, token=2)
    assert row_of(record.cells[0], "full").equal == 2
    text = " ".join(printed(record).split())
    assert "lookup: 2 of 2 texts differ from generate's, first prompt 1 at new token 2." in text


def test_a_text_that_ends_too_early_is_unequal(
    roomy: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(variant: DecodingVariant) -> Callable[[PromptBatch], Made]:
        return lambda batch: Made(variant.run(batch).sequences[:, :-1])

    monkeypatch.setattr(benchmark, "end_tokens", lambda _: frozenset())
    plant(monkeypatch, "static", short)
    row = row_of(benchmark_lossless(settings(roomy)).cells[0], "static")
    assert row.equal == 0
    assert row.first_difference is not None


def test_a_planted_slow_variant_comes_last(
    roomy: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(variant: DecodingVariant) -> Callable[[PromptBatch], Made]:
        def run(batch: PromptBatch) -> Made:
            time.sleep(1.5)
            return variant.run(batch)

        return run

    plant(monkeypatch, "full", slow)
    record = benchmark_lossless(settings(roomy))
    assert record.cells[0].variants[-1].name == "full"


def test_a_variant_that_does_not_run_has_its_reason_and_comes_last(
    roomy: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: DecodingVariant) -> Callable[[PromptBatch], Made]:
        def run(_: PromptBatch) -> Made:
            raise NotImplementedError("no static cache here\nsee below")

        return run

    plant(monkeypatch, "static", broken)
    record = benchmark_lossless(settings(roomy))
    row = record.cells[0].variants[-1]
    assert (row.name, row.reason, row.seconds) == ("static", "no static cache here", [])
    assert "Not measured: static: no static cache here." in printed(record)


# --- Batches, drafters, peers ----------------------------------------------------------------


def test_batches_of_rows_with_different_lengths_give_equal_texts(
    roomy: Path, one_thread: None
) -> None:
    record = benchmark_lossless(settings(roomy, prompts=5, batch_sizes=(1, 2)))
    alone, together = record.cells
    assert (alone.batch_size, together.batch_size) == (1, 2)
    assert len(together.batches) == 2  # the fifth prompt fills no batch
    for name in ("full", "lookup", "static"):
        assert row_of(together, name).equal == row_of(together, name).texts == 4
    assert row_of(together, "full").drafts is not None
    assert "batch_size" in str(row_of(together, "prompt-lookup").reason)
    # Slow variants are timed on few batches only.
    assert len(row_of(alone, "assistant").seconds) == variants.SLOW_BATCHES


def test_a_drafter_is_timed_alone_and_with_the_others(
    roomy: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load_drafter(path: str, stack: DecoderStack, **_: Any) -> Stubborn:
        loaded.append(f"{path} {stack.dtype}")
        return Stubborn([40, 41])

    monkeypatch.setattr(benchmark, "load_drafter", load_drafter)
    config = settings(roomy, drafter="drafters/here", dtypes=("float32", "bfloat16"))
    record = benchmark_lossless(config)
    # Both dtypes are checked before anything is timed.
    assert [entry.rpartition(".")[2] for entry in loaded] == ["float32", "bfloat16"] * 2
    for cell in record.cells:
        alone, both = row_of(cell, "network").drafts, row_of(cell, "drafter").drafts
        assert alone is not None
        assert both is not None
        assert [at.name for at in alone.proposers] == ["stubborn"]
        assert [at.name for at in both.proposers] == ["n-gram", "stubborn", "runner-ups"]
        assert alone.drafted > 0
    assert row_of(record.cells[0], "network").equal == 2
    assert [cell.dtype for cell in record.cells] == ["float32", "bfloat16"]
    assert [memory.dtype for memory in record.memory] == ["float32", "bfloat16"]


def test_variants_can_be_chosen(roomy: Path, one_thread: None) -> None:
    record = benchmark_lossless(settings(roomy, variants=("full", "lookup")))
    for cell in record.cells:
        assert {row.name for row in cell.variants} == {"generate", "full", "lookup"}


def test_unknown_variants_are_refused_before_anything_is_timed(
    roomy: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "time_rounds", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(BenchmarkError, match=r"expected --variants among generate, .*, got slow"):
        benchmark_lossless(settings(roomy, variants=("full", "slow")))


def test_a_drafter_of_another_model_is_refused_before_anything_is_timed(
    roomy: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_drafter(path: str, stack: DecoderStack, **_: Any) -> Stubborn:
        if stack.dtype == torch.bfloat16:
            raise ModelError("the drafter is for float32")
        return Stubborn([1])

    monkeypatch.setattr(benchmark, "load_drafter", load_drafter)
    monkeypatch.setattr(benchmark, "time_rounds", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(ModelError, match="the drafter is for float32"):
        benchmark_lossless(settings(roomy, drafter="d", dtypes=("float32", "bfloat16")))


def test_a_peer_is_sorted_by_its_speed_without_comparing_texts(
    roomy: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(name="llama.cpp", package="llama", version="1", precision="Q4_1", reason=None)
    broken = Peer(name="openvino", package="ov", version="2", precision="Q4_1", reason=None)
    monkeypatch.setattr(benchmark, "find_peers", lambda *_, **__: ([peer, broken], Path("x.gguf")))

    def time_peer(name: str, task: Any) -> PeerTimes | str:
        if name == "openvino":
            return "it does not read Q4_1"
        count = len(task.prompts)
        return PeerTimes([1e-6] * count, [1e-6] * count, [task.new_tokens] * count)

    monkeypatch.setattr(benchmark, "time_peer", time_peer)
    record = benchmark_lossless(settings(roomy, dtypes=("float32", "bfloat16")))
    for cell in record.cells:
        assert cell.variants[0].name == "llama.cpp"
        assert cell.variants[0].equal is None
        assert cell.variants[0].what == "llama 1, Q4_1, in its own process"
        assert "openvino" not in [row.name for row in cell.variants]
    assert record.peers[1].reason == "it does not read Q4_1"
    assert record.peers[1].precision is None
    assert "not measured: it does not read Q4_1" in printed(record)


# --- The report and the command --------------------------------------------------------------


def test_the_report_shows_speed_acceptance_and_memory(record: LosslessBenchmark) -> None:
    text = printed(record)
    for title in ("Fastest", "float32, rewriting, batch 1", "Memory", "Notes"):
        assert title in text
    for name in NAMES:
        assert name in text
    assert "Share of drafts that were right up to a position" in text
    assert "runner-ups" in text
    assert "llama-cpp-python is not installed" in text or "llama-cpp-python" in text
    assert "0 of 6 batches were timed again" in text


def test_the_report_fits_a_narrow_terminal(record: LosslessBenchmark) -> None:
    assert max(map(len, printed(record, width=80).splitlines())) <= 80


def test_the_command_prints_and_writes_the_record(roomy: Path, run: Run, here: Path) -> None:
    done = run(
        *("bench", "decode", "--model", roomy, "--dtypes", "float32", "--kinds", "instructions"),
        *("--prompts", 2, "--new-tokens", 4, "--no-peers", "--output", "out"),
    )
    assert done.status == 0, done.err
    record = json.loads((here / "out" / "bench.json").read_text())
    assert record["kind"] == "bench.lossless"
    assert record["hash"]
    assert record["provenance"]["command"].startswith("cascade bench decode --model")
    assert "disabled by --no-peers" in done.out
    assert "Batch 2 of 2: float32, instructions, batch 1" in done.err
    assert "generate 1.00" in done.err


# --- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--prompts", 1),
            "--prompts of at least 2 (one prompt gives no interval), got 1",
        ),
        (("--new-tokens", 1), "expected --new-tokens of at least 2, got 1"),
        (("--long-tokens", 3), "expected --long-tokens of at least 16, got 3"),
        (("--threads", 0), "expected --threads of at least 1, got 0"),
        (
            ("--dtypes", "fp8"),
            "expected --dtypes among float32, bfloat16, float16, each once, got fp8",
        ),
        (
            ("--kinds", "instructions,instructions"),
            "expected --kinds among instructions, rewriting, long-context, each once, got "
            "instructions,instructions",
        ),
        (("--kinds", ","), "got none"),
        (("--batch", "1,x"), "expected --batch with whole numbers such as 1,4, got 1,x"),
        (("--batch", "0"), "expected different --batch of at least 1, got 0"),
        (("--batch", "2,2"), "expected different --batch of at least 1, got 2,2"),
        (
            ("--batch", "4", "--prompts", 6),
            "expected --prompts of at least 8 (two batches of 4), got 6",
        ),
        (("--drafter", "nowhere"), "no record nowhere/record.json; make one with"),
        (("--corpus", "nowhere.jsonl"), "no corpus file nowhere.jsonl"),
        (
            ("--long-tokens", 3000),
            "3000 --long-tokens and 128 --new-tokens exceed the model's 2048 positions",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    roomy: Path, run: Run, here: Path, arguments: tuple[object, ...], message: str
) -> None:
    done = run("bench", "decode", "--model", roomy, "--output", "out", *arguments)
    assert done.status == 2
    lines = [line for line in done.err.splitlines() if not line.startswith("Loading")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (here / "out").exists()
