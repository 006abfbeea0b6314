"""Options of commands: the ones that several commands take, and groups of options.

A command takes groups: frozen dataclasses, each field of which is one option. `option_groups` shows
typer the fields as options of the command, and hands the command the groups.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from cascade.core.defaults import EVALUATED_TOKENS, NUM_SAMPLES, SEQ_LEN

MODEL_HELP = "Model: smollm2-135m, -360m or -1.7b, a hub id, a local folder, or a .gguf file."
RULES_HELP = "cosine, mean_cosine, top2_gap, max_probability, entropy, patience, ..."

# --- Groups of options as parameters ---------------------------------------------------------

#: The order in which help shows the options that several commands take.
ORDER = (
    "model",
    "revision",
    "heads",
    "propagation",
    "corpus",
    "split",
    "text_column",
    "num_samples",
    "seq_len",
    "max_tokens",
    "batch_size",
    "dtype",
    "device",
    "seed",
    "output",
    "overwrite",
)


@dataclass(frozen=True)
class Behind:
    """In an option's annotation: help shows it directly behind another one.

    Attributes:
        name: The other option's parameter.
    """

    name: str


@dataclass(frozen=True)
class First:
    """In an option's annotation: help shows it among the command's own options."""


def option_groups(
    command: Callable[..., None], *, order: Sequence[str] = ORDER
) -> Callable[..., None]:
    """Let a command take dataclasses whose fields become its options.

    Help shows the command's own options first, in the order in which they are declared, then the
    shared ones, in the order given. `First` and `Behind` in an annotation place single options.

    Args:
        command: A function; a parameter whose type is a dataclass is a group of options.
        order: The parameters of the shared options.

    Returns:
        A function that takes every option by name, for typer.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += _fields_as_parameters(groups[name])
        else:
            parameters.append(
                parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            )

    def flat(**values: Any) -> None:
        built = {
            name: group(**{field: values.pop(field) for field in field_names(group)})
            for name, group in groups.items()
        }
        command(**values, **built)

    functools.update_wrapper(flat, command)
    flat.__signature__ = inspect.Signature(_in_order(parameters, order))  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in parameters}
    return flat


def _fields_as_parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default
            if field.default is not dataclasses.MISSING
            else inspect.Parameter.empty,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]


def _in_order(
    parameters: Iterable[inspect.Parameter], order: Sequence[str]
) -> list[inspect.Parameter]:
    own, shared, behind = [], [], []
    for each in parameters:
        marks = getattr(each.annotation, "__metadata__", ())
        if any(isinstance(mark, Behind) for mark in marks):
            behind.append(each)
        elif each.name in order and not any(isinstance(mark, First) for mark in marks):
            shared.append(each)
        else:
            own.append(each)
    placed = [*own, *sorted(shared, key=lambda each: order.index(each.name))]
    for each in behind:
        (mark,) = (mark for mark in each.annotation.__metadata__ if isinstance(mark, Behind))
        place = [other.name for other in placed].index(mark.name)
        placed.insert(place + 1, each)
    return placed


def field_names(group: Any) -> tuple[str, ...]:
    """Return the names of a group's options, as parameters."""
    return tuple(field.name for field in dataclasses.fields(group))


G = TypeVar("G")


def picked(group: type[G], *others: Any, **values: Any) -> G:
    """Return a group whose options are taken from other groups.

    Args:
        group: The group to make.
        others: Groups that have its options, among others.
        values: Options with values of their own.
    """
    found: dict[str, Any] = {}
    for other in others:
        found |= {name: getattr(other, name) for name in field_names(other)}
    found |= values
    return group(**{name: found[name] for name in field_names(group)})


def given_beside(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Return the options that the command line gives besides some, as it spells them."""
    return given(context, set(context.params) - set(names))


def given(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Return which of some options the command line gives, as it spells them, in its own order."""
    wanted = set(names)
    return [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name in wanted
        and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]


# --- Options that several commands take: the same name, the same words, the same range -------

Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
Dtype = Annotated[str, typer.Option("--dtype", help="Arithmetic: float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="Device: cpu, cuda, mps or auto.")]
Split = Annotated[str | None, typer.Option("--split", help="Split of a hub or embedded corpus.")]
NumSamples = Annotated[
    int, typer.Option("--num-samples", min=0, help="Records to take; 0 for all.")
]
SeqLen = Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per sequence.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Stop at this many tokens.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per forward pass.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of draws and intervals.")]
HeadsFile = Annotated[
    Path | None,
    typer.Option("--heads", help="Heads of `cascade fit-heads`; the logit lens without."),
]
Propagation = Annotated[
    str, typer.Option("--propagation", help="What upper layers see of exited tokens.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")
]


@dataclass(frozen=True)
class DeviceOptions:
    """Where and in which arithmetic a model runs."""

    dtype: Dtype = "float32"
    device: Device = "cpu"


@dataclass(frozen=True)
class ModelOptions(DeviceOptions):
    """Which model, and where and in which arithmetic it runs."""

    model: Model = "smollm2-135m"
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.")] = (
        None
    )


@dataclass(frozen=True)
class TextOptions:
    """Which text, and the length of its sequences."""

    corpus: Annotated[
        str,
        typer.Option(
            "--corpus", help="embedded, a .jsonl/.json/.parquet/.txt file, or a hub dataset."
        ),
    ] = "embedded"
    text_column: Annotated[
        str | None,
        typer.Option("--text-column", help="Column to read, where records are not in Alpaca form."),
    ] = None
    seq_len: SeqLen = SEQ_LEN


@dataclass(frozen=True)
class CorpusOptions(TextOptions):
    """Which text, of which split, and how many of its tokens."""

    split: Split = None
    max_tokens: MaxTokens = None


@dataclass(frozen=True)
class SampledCorpusOptions(CorpusOptions):
    """Which text, of which split, and how many of its records and tokens."""

    num_samples: NumSamples = NUM_SAMPLES


@dataclass(frozen=True)
class EvaluationCorpusOptions(CorpusOptions):
    """Which text an evaluation measures."""

    max_tokens: MaxTokens = EVALUATED_TOKENS


@dataclass(frozen=True)
class HeadOptions:
    """Exit heads, and what upper layers get of exited tokens."""

    heads: HeadsFile = None
    propagation: Propagation = "frozen"


@dataclass(frozen=True)
class PassOptions:
    """How the passes of an evaluation are made."""

    batch_size: BatchSize = 8
    seed: Seed = 0


@dataclass(frozen=True)
class OutputOptions:
    """Where results go."""

    output: Annotated[Path | None, typer.Option("--output", help="Folder for the results.")] = None
    overwrite: Overwrite = False
