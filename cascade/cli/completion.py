"""Shell completion of option values: what can follow an option, found without loading torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import typer

#: A value, and what the shell shows next to it.
Candidate = tuple[str, str]

#: The exit rules; `tests/cli/test_completion.py` compares them with `cascade.exits.rules.RULES`.
RULES = {
    "cosine": "similarity of the exit layer's input and output",
    "mean_cosine": "mean similarity of the last two layers",
    "top2_gap": "gap between the two most likely tokens",
    "max_probability": "probability of the most likely token",
    "entropy": "entropy of the prediction, inverted",
    "patience": "exit layers in a row that predict the same token",
    "fixed": "every token exits at the exit layer",
    "random": "control: a random number",
    "oracle": "control: whether the full model predicts the same token",
}


def _among(values: dict[str, str]) -> Callable[[str], list[Candidate]]:
    def complete(incomplete: str) -> list[Candidate]:
        return [(value, text) for value, text in values.items() if value.startswith(incomplete)]

    return complete


rules = _among(RULES)
dtypes = _among({"float32": "", "bfloat16": "", "float16": ""})
states_dtypes = _among({"float16": "", "bfloat16": "for large states"})
devices = _among({"cpu": "", "cuda": "", "mps": "", "auto": "the fastest one"})
device_maps = _among(
    {"auto": "as much on GPUs as fits", "balanced": "equally on all GPUs", "sequential": ""}
)
engines = _among({"ray": "on this machine or a cluster"})
corpora = _among({"embedded": "500 records that come with the package"})
splits = _among({"train": "", "held-out": "split of the embedded corpus", "test": ""})
propagations = _among(
    {
        "frozen": "projected from the exit state",
        "ridge": "predicted by a fitted map",
        "exact": "computed when a later token continues",
    }
)
bos = _among({"auto": "as the tokenizer does", "yes": "", "no": ""})
architectures = _among(
    {"cascade": "the drafter of this package", "eagle3": "for `cascade export-drafter`"}
)
starts = _among({"copies": "copies of the last layers", "fresh": "random weights"})
copies = _among({"bf16": "", "int8": "", "int4": "", "noise:0.01": "with random noise"})


def models(incomplete: str) -> list[Candidate]:
    """Return the short names of models, with their names on the hub."""
    return _among({name: known["hub_id"] for name, known in _known_models().items()})(incomplete)


def layer(context: typer.Context, incomplete: str) -> list[Candidate]:
    """Return the decoder layers of the model on the command line, the last ones first."""
    last = _last_layer(context)
    found = [str(number) for number in range(last, 0, -1)]
    return [(number, f"of {last} layers") for number in found if number.startswith(incomplete)]


def row(context: typer.Context, incomplete: str) -> list[Candidate]:
    """Return the rows of a profile: decoder layers and the final norm."""
    last = _last_layer(context)
    norm = (f"{last}+norm", "the final norm")
    return [norm] * (last > 0 and norm[0].startswith(incomplete)) + layer(context, incomplete)


def layers(context: typer.Context, incomplete: str) -> list[Candidate]:
    """Return lists of layers that continue a list such as "20,24,"."""
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [
        (f"{before}{comma}{number}", text)
        for number, text in layer(context, last)
        if number not in taken
    ]


def _last_layer(context: typer.Context) -> int:
    return num_layers(str(context.params.get("model") or "smollm2-135m"))


def num_layers(model: str) -> int:
    """Return a model's number of decoder layers; 0 if no file at hand says it."""
    try:
        config = _config(model)
        return int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    except (AttributeError, OSError, TypeError, ValueError):  # a shell shows no errors
        return 0


def _config(model: str) -> Any:
    path = Path(os.path.expanduser(model)) / "config.json"
    if path.exists():
        from cascade.core.reading import read_json

        return read_json(path, foreign=True)
    for name, known in _known_models().items():
        if model in (name, known["hub_id"]):
            return known["config"]
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json")
    return json.loads(Path(cached).read_text("utf-8")) if isinstance(cached, str) else {}


def _known_models() -> dict[str, Any]:
    """Return the models whose configuration ships with the package, by short name."""
    text = resources.files("cascade").joinpath("data/configurations.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)["models"]
    return found
