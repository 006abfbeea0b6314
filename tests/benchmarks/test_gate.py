"""Test the benchmark of the gate: both variants use the same tokens. No test asserts a speed."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.commands import Run
from support.tiny_models import save_checkpoint

from cascade.benchmarks import gate as benchmark
from cascade.benchmarks.gate import GateBenchmark, GateBenchmarkConfig, TimedAlone
from cascade.benchmarks.timing import BenchmarkError
from cascade.core.errors import RecordError
from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.corpora.blocks import load_blocks
from cascade.gate import baseline_lookup
from cascade.gate.accepting import store_profile
from cascade.gate.baselines import read_profile, seal
from cascade.gate.remeasuring import measure_whole
from cascade.models.loading import load
from cascade.report.benchmarks.gate import gate_benchmark_report
from cascade.report.common.sections import print_sections
from cascade.saturation.records import ProfileRecord

LENGTH = 16
ALONE = TimedAlone(what="it", seconds=[1.0])


@pytest.fixture(scope="module")
def baselines(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tiny model's baseline on 20 records of the embedded corpus."""
    folder = tmp_path_factory.mktemp("baselines")
    stack = load(str(saved))
    blocks = load_blocks("embedded", stack.tokenizer, seq_len=LENGTH, num_samples=20)
    store_profile(folder, measure_whole(stack, blocks))
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_records() -> Iterator[None]:
    """Read the same records of the corpus as the baseline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            benchmark,
            "_blocks",
            lambda stack, baseline: load_blocks(
                "embedded", stack.tokenizer, seq_len=LENGTH, num_samples=20
            ),
        )
        yield


def settings(saved: Path, baselines: Path, **changes: Any) -> GateBenchmarkConfig:
    small = {"tokens": 5 * LENGTH, "rounds": 2}
    return GateBenchmarkConfig(model=str(saved), baselines=str(baselines), **(small | changes))


@pytest.fixture(scope="module")
def record(saved: Path, baselines: Path) -> GateBenchmark:
    return benchmark.benchmark_gate(settings(saved, baselines), command="cascade bench gate")


def test_the_forward_pass_covers_the_sequences_of_the_gate(
    saved: Path, baselines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    gates: list[Any] = []
    run_gate = benchmark.run_gate

    def watched(*given: Any, **options: Any) -> Any:
        gates.append(run_gate(*given, **options))
        return gates[-1]

    monkeypatch.setattr(benchmark, "run_gate", watched)
    monkeypatch.setattr(
        benchmark, "bare_forward", lambda _, blocks, size: seen.append((blocks, size))
    )
    monkeypatch.setattr(benchmark, "time_alone", lambda *_: dict.fromkeys(benchmark.ALONE, ALONE))
    benchmark.benchmark_gate(settings(saved, baselines))
    assert len(seen) == len(gates) == 3  # two rounds and a warm-up round
    for (blocks, size), gate in zip(seen, gates, strict=True):
        assert gate.comparison.tokens == blocks.tokens == 5 * LENGTH
        assert size == 5
        assert (gate.profile.sequence_fingerprints == blocks.sequence_fingerprints()).all()


def test_the_baseline_can_be_at_an_address(
    saved: Path, baselines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path))
    monkeypatch.setattr(benchmark, "time_alone", lambda *_: dict.fromkeys(benchmark.ALONE, ALONE))
    url, said = f"file://{baselines}", list[str]()
    config = dataclasses.replace(settings(saved, baselines), baselines=f"{url}/")
    found = benchmark.benchmark_gate(config, progress=said.append)
    assert found.settings.baselines == f"{url}/"
    (line,) = [line for line in said if line.startswith("Baseline: ")]
    assert re.fullmatch(
        rf"Baseline: {url}/\S+\.saturation\.json of {url}, revision sha256:\w+ \(checked now\)",
        line,
    )
    missing = dataclasses.replace(config, baselines="file:///nowhere")
    with pytest.raises(RecordError, match="cannot read baselines from file:///nowhere"):
        benchmark.benchmark_gate(missing)


def test_the_record_has_all_times_and_targets(record: GateBenchmark) -> None:
    seconds = {name: row.seconds for name, row in record.variants.items()}
    by_hand = [a / b for a, b in zip(seconds["gate"], seconds["bare"], strict=True)]
    assert record.ratios[0].name == "gate/bare"
    assert record.ratios[0].rounds == pytest.approx(by_hand)
    assert record.settings.tokens == 5 * LENGTH
    assert record.steps == [LENGTH, 2 * LENGTH, 4 * LENGTH, 5 * LENGTH]
    targets = {row.name: (row.sense, row.limit) for row in record.targets}
    assert targets == {
        "gate/bare": ("at most", 4.0),
        "compare, seconds": ("below", 1.0),
        "load, seconds": ("below", 2.0),
        "plugin, seconds": ("below", 0.05),
    }
    for row in record.targets[1:]:
        values = record.alone[row.name.split(",")[0]].seconds
        assert len(values) == 2
        assert row.measured == pytest.approx(sum(values) / 2)
        assert min(values) > 0
    assert record.elsewhere == []
    assert from_plain(json.loads(json.dumps(to_plain(record))), GateBenchmark) == record


def test_noise_is_timed_for_a_baseline_from_another_machine(
    record: GateBenchmark,
    saved: Path,
    baselines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(baselines, tmp_path / "moved")
    (path,) = folder.glob("*/*.json")
    stored = read_profile(path)
    plain = to_plain(stored.content)
    plain["provenance"]["machine"]["processor"] = "another"
    moved = from_plain(plain, ProfileRecord)
    store_profile(folder, dataclasses.replace(stored, content=seal(moved, stored.state)))
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmark, "time_alone", lambda *_: record.alone)
    found = benchmark.benchmark_gate(settings(saved, folder))
    assert "instead of another" in found.elsewhere[0]
    assert list((tmp_path / "cache/noise").iterdir())  # written in the warm-up round
    assert len(found.variants["noise"].seconds) == 2
    assert "first gate also measures the noise" in " ".join(printed(found).split())
    assert "not needed, because the baseline" in printed(record)


def printed(record: GateBenchmark) -> str:
    text = io.StringIO()
    print_sections(gate_benchmark_report(record), Console(file=text, width=80))
    return text.getvalue()


def test_the_report_shows_all_times_and_refuses_another_kind(record: GateBenchmark) -> None:
    text = printed(record)
    for name in (*record.variants, *record.alone, *(row.name for row in record.targets)):
        assert name in text
    assert max(map(len, text.splitlines())) <= 80
    with pytest.raises(SchemaError, match=r'at kind, got "bench\.fit"'):
        from_plain(to_plain(record) | {"kind": "bench.fit"}, GateBenchmark)


def test_a_baseline_without_sequences_of_the_corpus_is_an_error(
    saved: Path, baselines: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(baselines, tmp_path / "moved")
    stack = load(str(saved))
    texts = ["Other text that the corpus does not have."] * 9
    blocks = load_blocks(texts, stack.tokenizer, seq_len=LENGTH)
    path, _ = store_profile(folder, measure_whole(stack, blocks))
    for end in ("json", "npz", "parquet"):
        path.with_suffix(f".{end}").rename(path.with_name(f"embedded.saturation.{end}"))
    with pytest.raises(BenchmarkError, match=r"expected sequences of .* found none"):
        benchmark.benchmark_gate(settings(saved, folder))


def test_a_gate_that_stops_early_is_an_error(
    saved: Path, baselines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: str, **given: Any) -> Any:
        stack = load(source, **given)
        stack.layers[1].mlp.down_proj.weight.data.mul_(1.01)
        return stack

    monkeypatch.setattr(benchmark, "load", broken)
    with pytest.raises(BenchmarkError, match="to pass, got FAIL before it used its whole budget"):
        benchmark.benchmark_gate(settings(saved, baselines))


def test_a_failing_process_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match=r"a timed process failed: .*nowhere"):
        benchmark.run_python("-m", "cascade", "compare", "nowhere", "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "--tokens of at least 1, got 0"),
        ({"rounds": 1}, r"--rounds of at least 2 \(one round gives no interval\), got 1"),
        ({"threads": 0}, "--threads of at least 1, got 0"),
    ],
)
def test_a_number_that_is_too_small_is_refused(
    saved: Path, baselines: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        settings(saved, baselines, **changes)


def test_a_missing_baseline_is_an_error_with_the_command_that_makes_it(
    saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecordError, match="cascade analyze --output"):
        benchmark.benchmark_gate(settings(saved, tmp_path))


def test_the_baseline_that_ships_with_the_package_is_found_from_any_folder(
    run: Run, saved: Path, baselines: Path, record: GateBenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline_lookup, "shipped_baselines", lambda: baselines)
    monkeypatch.setattr(benchmark, "time_alone", lambda *_: record.alone)
    done = run("bench", "gate", "--model", saved, "--tokens", 80, "--rounds", 2, "--output", "out")
    assert done.status == 0, done.err
    assert not Path("baselines").exists()
    assert f"Baseline: {baselines}" in done.err
    assert json.loads(Path("out/bench.json").read_text())["settings"]["baselines"] is None


def test_the_command_writes_its_record(
    run: Run, saved: Path, baselines: Path, record: GateBenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "time_alone", lambda *_: record.alone)
    given = ("--model", saved, "--baselines", baselines, "--tokens", 80, "--rounds", 2)
    done = run("bench", "gate", *given, "--output", "out")
    assert done.status == 0, done.err
    stored = json.loads(Path("out/bench.json").read_text())
    assert stored["kind"] == "bench.gate"
    assert stored["provenance"]["command"].startswith("cascade bench gate --model")
    assert "gate/bare" in done.out


def test_the_long_sequence_has_its_own_ratio_and_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_checkpoint(tmp_path / "long", max_position_embeddings=512)
    stack = load(str(model))
    blocks = load_blocks("embedded", stack.tokenizer, seq_len=LENGTH, num_samples=20)
    store_profile(tmp_path, measure_whole(stack, blocks))
    passes: list[tuple[int, ...]] = []
    forward = benchmark.bare_forward

    def watched(stack: Any, blocks: Any, size: int) -> None:
        passes.append(blocks.ids.shape)
        forward(stack, blocks, size)

    monkeypatch.setattr(benchmark, "bare_forward", watched)
    monkeypatch.setattr(benchmark, "time_alone", lambda *_: dict.fromkeys(benchmark.ALONE, ALONE))
    found = benchmark.benchmark_gate(settings(model, tmp_path))
    assert found.settings.long_tokens == 512
    # Each of three rounds: the short sequences twice, and the long one.
    assert sorted(passes) == [(1, 512)] * 3 + [(5, LENGTH)] * 6
    assert [ratio.name for ratio in found.ratios][-1] == "gate_long/bare_long"
    targets = {target.name: target.limit for target in found.targets}
    assert targets["gate/bare"] == targets["gate_long/bare_long"] == 4.0
    times = found.variants["gate_long"]
    tokens = 5 * LENGTH + 512
    assert times.tokens_per_second == pytest.approx(tokens / np.median(times.seconds))
    assert "512 tokens" in printed(found)
