"""Inputs of commands: a model spread over devices by `--device-map`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import Run, check_refusal
from support.stacks import LAYERS

REFERENCE = "baselines/smollm2-135m-instruct-q4_1/embedded.saturation.json"

#: The tiny model with its second layer on disk.
DISK_MAP = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
DISK_MAP |= {f"model.layers.{number}": "disk" if number == 1 else "cpu" for number in range(LAYERS)}


@pytest.mark.parametrize("command", ["analyze", "fit-heads", "collect-hard", "gate"])
@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (
            ("--device-map", "nonsense"),
            ["expected --device-map auto, balanced, balanced_low_0, sequential or a .json file"],
        ),
        (
            ("--device-map", "auto", "--device", "cuda"),
            ["expected --device or --device-map, got cuda and auto; leave one out"],
        ),
        (("--device-map", "none.json"), ["none.json cannot be read"]),
    ],
)
def test_unusable_device_maps_are_refused_before_the_model_is_read(
    command: str,
    options: tuple[str, ...],
    fragments: list[str],
    run: Run,
    models: Path,
) -> None:
    needed = {
        "fit-heads": ("--layers", "2", "--output", "heads.safetensors"),
        "collect-hard": ("--hard-ratio", "0.5", "--output", "hard"),
        "gate": ("--baseline", Path(__file__).parents[2] / REFERENCE),
    }.get(command, ())
    done = run(command, "--model", models / "absent", *needed, *options)
    check_refusal(done, fragments)


@pytest.mark.parametrize("model", ["tiny", "tiny.gguf"])
def test_a_device_map_gives_the_same_profile(
    model: str, run: Run, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "map.json").write_text(json.dumps(DISK_MAP))
    arguments = ("--model", models / model, "--corpus", "texts.jsonl", "--seq-len", 16, "--json")
    whole = json.loads(run("analyze", *arguments).out)
    for placed in ("auto", tmp_path / "map.json"):
        spread = json.loads(run("analyze", *arguments, "--device-map", placed).out)
        assert spread["layers"] == whole["layers"]
        assert spread["provenance"]["model"].get("placed") == (
            None if placed == "auto" else "cpu, disk"
        )
