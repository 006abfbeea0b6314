"""Options that say how `cascade generate` chooses tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from cascade.cli.console import message
from cascade.cli.options import PrintOptions
from cascade.core.errors import UsageError, os_reason
from cascade.core.reading import UnreadableError, read_json


@dataclass(frozen=True)
class SamplingOptions(PrintOptions):
    """How tokens are chosen, and what is printed."""

    panel: ClassVar[str] = "Sampling"

    sample: Annotated[
        bool, typer.Option("--sample", help="Sample tokens instead of taking the likeliest.")
    ] = False
    temperature: Annotated[
        float | None, typer.Option(help="Divide logits by this (default: the model's).")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens that have this probability together "
            "(default: the model's)."
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Sample from this many of the likeliest tokens; 0: all "
            "(default: the model's, or 50)."
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from tokens with this share of the likeliest token's probability or more "
            "(default: the model's)."
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Penalize earlier tokens; 1: not (default: the model's)."),
    ] = None
    no_repeat_ngram_size: Annotated[
        int | None,
        typer.Option(
            min=0, help="Repeat no sequence of this many tokens; 0: may (default: the model's)."
        ),
    ] = None
    generation_config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<file|key=value>",
            help="JSON file, or one setting in JSON, of a transformers generation config; "
            "repeatable (default: the model's).",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the settings on the command line; single options override others.

        Raises:
            UsageError: A file or setting cannot be read, an option needs --sample, or the
                temperature is impossible.
        """
        found = read_settings(self.generation_config or ())
        found["do_sample"] = self.sample or found.get("do_sample", False)
        sampling = _given(self, ("temperature", "top_p", "top_k", "min_p"))
        if sampling and not found["do_sample"]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in sampling)
            raise UsageError(f"{flags} need --sample; add it, or leave them out")
        if self.temperature is not None and not self.temperature > 0:
            raise UsageError(
                f"expected a --temperature above 0, got {self.temperature:g}; leave out --sample "
                "to take the likeliest token"
            )
        return found | sampling | _given(self, ("repetition_penalty", "no_repeat_ngram_size"))


def _given(options: object, names: Sequence[str]) -> dict[str, Any]:
    found = {name: getattr(options, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def read_settings(given: Sequence[str]) -> dict[str, Any]:
    """Return generation settings of JSON files and `KEY=VALUE` texts; later ones override.

    Args:
        given: Paths of JSON files, or `KEY=VALUE` with a value in JSON (null: off).

    Raises:
        UsageError: A file or value cannot be read.
    """
    found: dict[str, Any] = {}
    for text in given:
        key, sign, value = text.partition("=")
        if sign and key.isidentifier():
            found[key] = _read_value(text, value)
        else:
            found |= _read_file(Path(text))
    return found


def _read_value(text: str, value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise UsageError(
            f"expected KEY=VALUE with a value in JSON (1.3, true, null, [1, 2]) after "
            f"--generation-config, got {text!r}; correct it"
        ) from error


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        read = read_json(path, foreign=True)
    except (FileNotFoundError, UnreadableError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else error
        raise UsageError(
            f"expected a JSON file or KEY=VALUE after --generation-config, got {str(path)!r}, "
            f"which cannot be read ({reason}); correct it"
        ) from error
    if not isinstance(read, dict):
        raise UsageError(
            f"expected an object in {path}, got a {type(read).__name__}; use the form of "
            "generation_config.json"
        )
    from transformers import GenerationConfig

    # As in transformers, null is a setting that the file leaves to the model.
    settings = {
        name: value
        for name, value in read.items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }
    unknown = sorted(settings.keys() - GenerationConfig().to_dict().keys())
    if unknown:
        message(f"transformers does not know these settings of {path}: {', '.join(unknown)}")
    return {name: value for name, value in settings.items() if name not in unknown}
