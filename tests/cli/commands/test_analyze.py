"""`cascade analyze`: what it prints and writes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import typer
from support.commands import (
    NO_MODEL,
    TEXTS,
    Run,
    check_refusal,
    python,
    read_profile,
)
from support.disk import contents

import cascade
from cascade import cli
from cascade.cli.commands.analyze import RUN_FILES
from cascade.core.schema import to_plain

if TYPE_CHECKING:
    from cascade import DecoderStack


def test_a_report_folder_holds_exactly_the_runs_files(draw: Run, here: Path) -> None:
    done = draw("--output", "new/report")
    assert done.status == 0
    assert sorted(path.name for path in (here / "new/report").iterdir()) == sorted(RUN_FILES)
    assert all((here / "new/report" / name).stat().st_size > 1000 for name in RUN_FILES)
    assert done.err == "Wrote new/report/report.html\n"


def test_without_output_nothing_is_written(analyze: Run, here: Path) -> None:
    before = contents(here)
    done = analyze()
    assert done.status == 0
    assert done.err == ""
    assert contents(here) == before


def test_stdout_shows_the_statistics_of_every_layer(analyze: Run) -> None:
    done = analyze("--output", "report")
    for row in read_profile("report")["layers"]:
        numbers = [
            f"{row[name]:.4f}" for name in ("mean", "std", "min", "p10", "p50", "p90", "max")
        ]
        assert [row["layer"], *numbers] in [line.split()[:8] for line in done.out.splitlines()]
    for heading in ("Outliers", "Special layers", "Suggested thresholds"):
        assert heading in done.out


def test_the_profile_has_one_row_per_layer_and_the_final_norm(analyze: Run) -> None:
    analyze("--output", "report")
    profile = read_profile("report")
    assert (profile["schema"], profile["kind"]) == (3, "saturation")
    assert [row["layer"] for row in profile["layers"]] == ["1", "2", "3", "4", "4+norm"]
    for row in profile["layers"]:
        assert list(row) == [
            "layer",
            "count",
            "mean",
            "std",
            "min",
            "p10",
            "p50",
            "p90",
            "max",
            "frac_negative",
            "frac_below_half",
        ]
        assert row["count"] == profile["provenance"]["corpus"]["tokens"]
        numbers = [value for name, value in row.items() if name not in ("layer", "count")]
        assert numbers == [round(value, 6) for value in numbers]
        assert any(value != round(value, 5) for value in numbers)
        assert -1 <= row["min"] <= row["p10"] <= row["p50"] <= row["p90"] <= row["max"] <= 1


def test_the_profile_records_its_provenance(analyze: Run, models: Path) -> None:
    analyze("--output", "report")
    provenance = read_profile("report")["provenance"]
    weights = hashlib.sha256((models / "tiny/model.safetensors").read_bytes()).hexdigest()
    expected = hashlib.sha256(f"model.safetensors:{weights}\n".encode()).hexdigest()
    assert provenance["model"] == {
        "source": str(models / "tiny"),
        "name": "tiny",
        "family": "llama",
        "num_layers": 4,
        "hidden_size": 32,
        "dtype": "float32",
        "device": "cpu",
        "attention": "sdpa",
        "revision": None,
        "weights_hash": f"sha256:{expected}",
        "quantization": None,
    }
    corpus = provenance["corpus"]
    assert re.fullmatch("sha256:[0-9a-f]{64}", corpus.pop("fingerprint"))
    tokens = len("\n".join(TEXTS)) // 32 * 32
    assert corpus == {
        "source": "texts.jsonl",
        "name": "texts",
        "records": 40,
        "tokens": tokens,
        "sequences": tokens // 32,
        "seq_len": 32,
    }
    assert re.fullmatch("sha256:[0-9a-f]{64}", provenance["tokenizer_hash"])
    for name in ("torch", "transformers", "tokenizers", "datasets", "numpy", "gguf"):
        assert provenance["versions"][name] == importlib.metadata.version(name)
    assert provenance["versions"]["cascade-exit"] == cascade.__version__
    assert provenance["machine"]["threads"] == torch.get_num_threads()
    assert provenance["command"] == (
        f"cascade analyze --model {models / 'tiny'} --corpus texts.jsonl --seq-len 32"
        " --output report"
    )


def test_the_recorded_command_can_be_run_again(analyze: Run, here: Path) -> None:
    (here / "texts.jsonl").rename(here / "my texts.jsonl")
    analyze("--corpus", "my texts.jsonl", "--output", "report")
    assert "--corpus 'my texts.jsonl'" in read_profile("report")["provenance"]["command"]


def test_repeating_the_command_gives_an_identical_report(draw: Run, here: Path) -> None:
    arguments = ("--seed", 7, "--num-samples", 30, "--output", "report", "--overwrite")
    assert draw(*arguments).status == 0
    before = contents(here)
    assert draw(*arguments).status == 0
    after = contents(here)
    assert after["report/profile.json"] == before["report/profile.json"]
    assert after == before


def test_the_defaults_are_those_of_the_study() -> None:
    command = typer.main.get_command(cli.app).commands["analyze"]  # type: ignore[attr-defined]
    defaults = {param.name: param.default for param in command.params}
    assert defaults.pop("batch_size") > 0  # a matter of speed alone
    assert defaults == {
        "model": "smollm2-135m",
        "revision": None,
        "corpus": "embedded",
        "split": None,
        "bos": "auto",
        "config": None,
        "text_column": None,
        "num_samples": 500,
        "seq_len": 128,
        "long_context": None,
        "max_tokens": None,
        "dtype": "float32",
        "device": "cpu",
        "device_map": None,
        "engine": None,
        "address": None,
        "workers": None,
        "gpus_per_worker": 0.0,
        "threads": None,
        "shards": None,
        "seed": None,
        "output": None,
        "npz": None,
        "overwrite": False,
        "json": False,
        "quiet": False,
    }


def test_options_select_what_is_measured(analyze: Run) -> None:
    def corpus(*arguments: object) -> dict[str, Any]:
        done = analyze(*arguments, "--output", "report", "--overwrite")
        assert done.status == 0
        found: dict[str, Any] = read_profile("report")["provenance"]["corpus"]
        return found

    assert corpus("--num-samples", 3)["records"] == 3
    assert corpus("--num-samples", 0)["records"] == 40
    assert corpus("--max-tokens", 100)["tokens"] == 96
    assert corpus("--seq-len", 16, "--max-tokens", 100)["seq_len"] == 16
    in_order, drawn, again, other = (
        corpus("--num-samples", 5, *seed)["fingerprint"]
        for seed in ((), ("--seed", 1), ("--seed", 1), ("--seed", 2))
    )
    assert drawn == again
    assert len({in_order, drawn, other}) == 3
    held_out = corpus("--corpus", "embedded", "--split", "held-out", "--max-tokens", 64)
    assert held_out["name"] == "embedded-held-out"


def test_the_batch_size_changes_no_number(analyze: Run) -> None:
    rows = []
    for size in (1, 7, 500):
        assert analyze("--batch-size", size, "--output", f"by-{size}").status == 0
        rows.append(read_profile(f"by-{size}")["layers"])
    for row in rows[1:]:
        for obtained, expected in zip(row, rows[0], strict=True):
            # fp32: other batches are other matrix products, which moves a cosine by some 1e-7;
            # a token on the edge of a bin moves a quantile by no more than itself.
            assert obtained == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_is_measured_and_recorded(analyze: Run, dtype: str) -> None:
    done = analyze("--dtype", dtype, "--device", "auto", "--max-tokens", 320, "--output", "report")
    assert done.status == 0
    model = read_profile("report")["provenance"]["model"]
    assert model["dtype"] == dtype
    assert model["device"] in ("cpu", "cuda", "mps")
    assert f"{dtype} on {model['device']}" in done.out


def test_a_gguf_file_can_be_analyzed(analyze: Run, models: Path) -> None:
    done = analyze("--model", models / "tiny.gguf", "--output", "report")
    assert done.status == 0
    assert done.err == "Wrote report/report.html\n"
    model = read_profile("report")["provenance"]["model"]
    digest = hashlib.sha256((models / "tiny.gguf").read_bytes()).hexdigest()
    assert (model["name"], model["quantization"]) == ("tiny", "Q4_1")
    assert model["weights_hash"] == f"sha256:{digest}"


def test_a_hub_dataset_can_be_the_corpus(analyze: Run, here: Path) -> None:
    (here / "hub").mkdir()
    (here / "texts.jsonl").rename(here / "hub/test.jsonl")
    done = analyze("--corpus", "hub", "--split", "test", "--text-column", "text", "--output", "r")
    assert done.status == 0
    assert read_profile("r")["provenance"]["corpus"]["name"] == "hub-test"


def test_overwrite_replaces_an_older_run(analyze: Run, here: Path) -> None:
    assert analyze("--max-tokens", 320, "--output", "report", "--npz", "x.npz").status == 0
    (here / "report/notes.txt").write_text("mine")
    arguments = ("--max-tokens", 640, "--output", "report", "--npz", "x.npz", "--overwrite")
    assert analyze(*arguments).status == 0
    assert read_profile("report")["provenance"]["corpus"]["tokens"] == 640
    assert np.load("x.npz")["layer_1"].size == 640
    assert sorted(os.listdir("report")) == sorted([*RUN_FILES, "notes.txt"])


def test_npz_has_one_value_per_token_as_in_the_original_study(analyze: Run) -> None:
    done = analyze("--output", "report", "--npz", "new/cos_sim_data.npz")
    assert done.err == "Wrote report/report.html, new/cos_sim_data.npz\n"
    profile = read_profile("report")
    rows = {row["layer"]: row for row in profile["layers"]}
    with np.load("new/cos_sim_data.npz", allow_pickle=False) as stored:
        assert json.loads(str(stored["metadata"])) == profile["provenance"]
        entries = {name: stored[name].astype(np.float64) for name in stored if name != "metadata"}
    labels = {f"layer_{layer}": str(layer) for layer in range(1, 4)}
    labels |= {"layer_4": "4+norm", "layer_4_residual": "4"}
    assert set(entries) == set(labels)
    for name, values in entries.items():
        row = rows[labels[name]]
        assert values.shape == (row["count"],)
        # The table is rounded to 6 decimals.
        assert values.mean() == pytest.approx(row["mean"], abs=6e-7)
        assert values.min() == pytest.approx(row["min"], abs=6e-7)
    assert abs(rows["4"]["mean"] - rows["4+norm"]["mean"]) > 1e-3
    assert sorted(os.listdir("new")) == ["cos_sim_data.npz"]


def test_the_npz_can_be_in_the_report_folder(analyze: Run) -> None:
    assert analyze("--output", "report", "--npz", "report/cos_sim_data.npz").status == 0
    assert sorted(os.listdir("report")) == sorted([*RUN_FILES, "cos_sim_data.npz"])


def test_a_separate_process_prints_only_results_on_stdout(here: Path, models: Path) -> None:
    (here / "hub").mkdir()
    (here / "texts.jsonl").rename(here / "hub/train.jsonl")
    arguments = ["--model", models / "tiny", "--corpus", "hub", "--seq-len", 32, "--output", "r"]
    done = python("-m", "cascade", "analyze", *arguments, HF_HOME=str(here.parent / "hf"))
    assert done.status == 0
    assert done.err == "Wrote r/report.html\n"
    assert done.out.startswith("Model   tiny (llama, 4 decoder layers)")
    assert sorted(os.listdir("r")) == sorted(RUN_FILES)


def test_without_network_an_unknown_model_error_names_all_model_sources(here: Path) -> None:
    before = contents(here)
    # Nothing listens on port 1: what a machine without network sees, at once.
    environment = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(here.parent / "hf")}
    arguments = ["--model", "nobody/nothing", "--output", "new"]
    done = python("-m", "cascade", "analyze", *arguments, HF_HUB_OFFLINE="0", **environment)
    check_refusal(done, NO_MODEL)
    assert contents(here) == before


@pytest.mark.saturation
def test_the_reference_model_is_the_default(
    tmp_path: Path,
    reference_model: DecoderStack,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["analyze", "--max-tokens", "1024", "--output", "report", "--npz", "x.npz"]
    monkeypatch.setattr(sys, "argv", ["cascade", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code in (0, None)
    profile = read_profile("report")
    model = profile["provenance"]["model"]
    assert (model["source"], model["quantization"]) == ("smollm2-135m", "Q4_1")
    assert model.items() <= to_plain(reference_model.provenance).items()
    with np.load("x.npz", allow_pickle=False) as stored:
        names = {f"layer_{layer}" for layer in range(1, 31)} | {"layer_30_residual", "metadata"}
        assert set(stored) == names
        assert stored["layer_30"].shape == (1024,)
        # The two readings of the last layer: behind the final norm, and on the residual stream.
        assert stored["layer_30"].mean() < 0.3 < 0.6 < stored["layer_30_residual"].mean()
