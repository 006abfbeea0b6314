"""Benchmark of collecting: equal work, honest records. No test asserts a speed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.tiny_models import random_ids, tiny_model

from cascade.benchmarks import collect as benchmark
from cascade.benchmarks.collect import (
    Setup,
    angular_distances,
    bare_forward,
    seed_means,
    target_rows,
)
from cascade.benchmarks.timing import BenchmarkError
from cascade.cli import main
from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from cascade.report.benchmarks import print_bench
from cascade.saturation.profile import analyze

ROUNDS = 3
#: The room itself: as an attribute of the package, the function of its name covers it.


def settings(saved: Path, **changes: Any) -> Setup:
    small = {"tokens": 256, "seq_len": 16, "batch_size": 4, "rounds": ROUNDS}
    return Setup(model=str(saved), **(small | changes))


@pytest.fixture(scope="module")
def record(saved: Path) -> dict[str, Any]:
    # Set here, before any test's own fixture is: the record says the number that torch has.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = benchmark.collect(settings(saved), memory=False)
    torch.set_num_threads(before)
    return made


def blocks_of(batch: int, length: int) -> TokenBlocks:
    ids = random_ids(batch, length).numpy().astype(np.int32)
    return TokenBlocks(ids, "random", "random", batch)


# --- Equal work ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_seeds_way_and_analyze_find_the_same_layer_means(family: str):
    stack = DecoderStack(tiny_model(family))
    blocks = blocks_of(5, 12)
    profile = analyze(stack, blocks, batch_size=2)
    means = dict(zip(profile.statistics.layers, profile.statistics.mean(), strict=True))
    del means["4"]  # hidden_states[-1] is behind the final norm: the seed's way has no row for it
    assert list(means) == ["1", "2", "3", "4+norm"]
    # 1e-5: fp32 rounding of a normalized product against a quotient; widths of 32.
    assert seed_means(stack, blocks, 2) == pytest.approx([*means.values()], abs=1e-5)


def test_the_peers_method_is_the_angle_between_the_last_tokens_states():
    stack = DecoderStack(tiny_model("llama"))
    blocks = blocks_of(5, 12)
    with torch.no_grad():
        states = stack.model(
            torch.from_numpy(blocks.ids.astype(np.int64)), output_hidden_states=True
        ).hidden_states
    vectors = np.stack([state[:, -1].double().numpy() for state in states])
    units = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected = (np.arccos((units[:-1] * units[1:]).sum(-1)) / np.pi).mean(axis=1)
    # 1e-5: the cosine in fp32 against float64.
    assert angular_distances(stack, blocks, 2) == pytest.approx(expected, abs=1e-5)


def test_the_bare_way_runs_every_layer_over_every_token_but_no_head():
    stack = DecoderStack(tiny_model("llama"))
    seen: list[int] = []
    heads: list[int] = []
    stack.layers[-1].register_forward_hook(lambda _, args, out: seen.append(out.shape[0]))
    stack.model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    bare_forward(stack, blocks_of(5, 12), 2)
    assert (seen, heads) == ([2, 2, 1], [])


# --- The record ------------------------------------------------------------------------------


def test_collect_pins_the_threads_while_ways_run_and_restores_them_when_one_fails(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    before = torch.get_num_threads()
    seen: list[int] = []

    def fail(*_: Any, **__: Any) -> None:
        seen.append(torch.get_num_threads())
        raise RuntimeError("a way broke")

    monkeypatch.setattr(benchmark, "bare_forward", fail)
    with pytest.raises(RuntimeError, match="a way broke"):
        benchmark.collect(settings(saved, threads=before + 1), memory=False)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_the_record_has_every_way_with_one_time_per_round(record: dict[str, Any]):
    assert (record["schema"], record["kind"]) == (1, "bench.collect")
    assert {"seed_fp32", "bare_fp32", "analyze_fp32", "bare_bf16", "analyze_bf16"} < set(
        record["ways"]
    )
    for way in record["ways"].values():
        assert len(way["seconds"]) == ROUNDS
        assert all(seconds > 0 for seconds in way["seconds"])
        assert way["tokens_per_second"] == pytest.approx(256 / np.median(way["seconds"]))
    assert [sorted(order) for order in record["order"]] == [sorted(record["ways"])] * ROUNDS
    assert all(len(row["rounds"]) == ROUNDS for row in record["ratios"])


def test_the_record_says_what_ran_where(record: dict[str, Any], saved: Path):
    assert record["settings"]["tokens"] == 256
    assert record["settings"]["threads"] == 1
    provenance = record["provenance"]
    assert provenance["model"]["num_layers"] == 4
    assert provenance["model"]["dtype"] == "float32"
    assert provenance["machine"]["threads"] == torch.get_num_threads()
    assert provenance["versions"]["torch"] == torch.__version__
    assert record["peer"]["rebuilt"] is True


def test_the_record_says_how_far_the_ways_agree(record: dict[str, Any]):
    # The same tokens: fp32 rounding for the seed's way, about 3 significant digits for bf16.
    assert abs(record["agreement"]["seed"]["difference"]) < 1e-5
    assert 0 < abs(record["agreement"]["bf16"]["difference"]) < 0.1
    assert record["agreement"]["bf16"]["layer"] in {"1", "2", "3", "4", "4+norm"}


def test_bf16_runs_in_bf16(saved: Path, monkeypatch: pytest.MonkeyPatch):
    dtypes: dict[str, set[torch.dtype]] = {"bare": set(), "analyze": set()}
    for name, function in (("bare", "bare_forward"), ("analyze", "analyze")):
        real = getattr(benchmark, function)

        def spy(stack: DecoderStack, *args: Any, _n: str = name, _r: Any = real, **kw: Any) -> Any:
            dtypes[_n].add(stack.dtype)
            return _r(stack, *args, **kw)

        monkeypatch.setattr(benchmark, function, spy)
    benchmark.collect(settings(saved, rounds=2), memory=False)
    both = {torch.float32, torch.bfloat16}
    assert dtypes == {"bare": both, "analyze": both}


def found(**medians: float) -> list[dict[str, Any]]:
    names = ("analyze_fp32/bare_fp32", "seed_fp32/analyze_fp32", "seed_fp32/analyze_bf16")
    return [
        {"name": name, "median": median, "interval": [median, median]}
        for name, median in zip(names, medians.values(), strict=True)
    ]


@pytest.mark.parametrize(
    ("ratios", "shift", "growth", "met"),
    [
        ((1.05, 1.3, 2.4), -2e-3, 9.99, [True, True, True, True, True]),
        ((1.051, 1.29, 2.39), -2.1e-3, 10.0, [False, False, False, False, False]),
        ((1.0, 2.0, 3.0), 0.0, None, [True, True, True, True, None]),
    ],
)
def test_targets_are_met_up_to_their_limit_and_unknown_without_a_measurement(
    ratios: tuple[float, ...], shift: float, growth: float | None, met: list[bool | None]
):
    rows = target_rows(
        found(a=ratios[0], b=ratios[1], c=ratios[2]),
        {"bf16": {"layer": "1", "difference": shift}},
        {"growth_mb": growth},
    )
    assert [row["met"] for row in rows] == met


def test_the_table_says_met_not_met_and_not_measured(record: dict[str, Any]):
    def target(met: bool | None, interval: list[float] | None) -> dict[str, Any]:
        measured = None if met is None else 1.0
        row = {"name": "n", "sense": "at most", "limit": 1.05, "measured": measured}
        return row | {"interval": interval, "met": met}

    targets = [target(True, [0.9, 1.0]), target(False, [1.0, 1.2]), target(None, None)]
    text = printed(record | {"targets": targets})
    lines = [line for line in text.splitlines() if line.split()[:1] == ["n"]]
    assert [line.split("  ")[-1].strip() for line in lines] == [
        "met",
        "not met, within noise",
        "not measured",
    ]
    for name in record["ways"]:
        assert name in text
    assert "Not measured: not asked for (--no-memory)." in text


def printed(record: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_bench(record, Console(file=stream, width=100))
    return stream.getvalue()


def test_the_targets_fit_into_80_columns_uncut(record: dict[str, Any]):
    targets = [
        row | {"measured": 0.00086, "met": False, "interval": [0.0, 99.0]}
        for row in record["targets"]
    ]
    stream = io.StringIO()
    print_bench(record | {"targets": targets}, Console(file=stream, width=80))
    assert stream.getvalue().count("not met, within noise") == len(targets) == 5
    assert "…" not in stream.getvalue()


def test_another_kind_of_record_is_not_printed(record: dict[str, Any]):
    with pytest.raises(ValueError, match=r"expected kind 'bench\.collect', got 'saturation'"):
        printed(record | {"kind": "saturation"})


# --- The command -----------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["cascade", "bench", "collect", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_bench_json_comes_back_as_it_was_printed(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    common = ["--model", str(saved), "--tokens", "64", "--seq-len", "16", "--no-memory"]
    output = tmp_path / "run"
    arguments = [*common, "--rounds", "2", "--output", str(output)]
    assert run(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    stored = json.loads((output / "bench.json").read_text(encoding="utf-8"))
    assert stored["kind"] == "bench.collect"
    assert stored["provenance"]["command"].startswith("cascade bench collect --model")
    for name, way in stored["ways"].items():
        assert len(way["seconds"]) == 2
        assert f"{way['tokens_per_second']:,.0f}" in out
        assert name in out
    assert [path.name for path in output.iterdir()] == ["bench.json"]
    assert run(monkeypatch, *arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--overwrite") == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--tokens", "127"),
        ("--seq-len", "1"),
        ("--batch-size", "0"),
        ("--rounds", "1"),
        ("--threads", "0"),
        ("--seed", "-1"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(
    option: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert run(monkeypatch, option, value) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"cascade: expected {option} of at least ")
    assert error.rstrip().endswith(f"got {value}")


def test_more_tokens_than_the_corpus_has_are_refused(saved: Path):
    with pytest.raises(BenchmarkError, match="use a smaller --tokens"):
        benchmark.collect(settings(saved, tokens=10**7), memory=False)
