"""Options of commands: groups of options as dataclasses, and the panels of help that show them.

A command takes groups: frozen dataclasses, each field of which is one option. `option_groups` shows
typer the fields as options of the command, and passes the groups to the command.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from cascade.cli import completion
from cascade.core.defaults import EVALUATED_TOKENS, NUM_SAMPLES, SEQ_LEN
from cascade.core.errors import UsageError
from cascade.core.names import path_flaw
from cascade.core.urls import is_url

# --- Groups of options as parameters ---------------------------------------------------------

#: The panels of help that several commands have, in the order in which help shows them, with their
#: options in order. A command's other options are in panels above these.
PANELS = {
    "Model": ("model", "revision", "dtype", "device", "device_map"),
    "Exit heads": ("heads", "propagation"),
    "Corpus": (
        "corpus",
        "split",
        "config",
        "text_column",
        "bos",
        "num_samples",
        "max_tokens",
        "seq_len",
        "stream",
    ),
    "Computation": ("batch_size", "rounds", "threads", "seed"),
    "Output": ("output", "npz", "overwrite", "json", "as_json", "quiet", "help"),
}

#: The panel of a command's options whose group names none.
_OWN_PANEL = "Options"


def option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses whose fields become its options.

    Each option is shown in a panel of help: the one that its annotation names
    (`rich_help_panel`), else its panel in `PANELS`, else the `panel` of its group. Panels that are
    not in `PANELS` come first, in the order in which they are declared.

    Args:
        command: A function; a parameter whose type is a dataclass is a group of options.

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
            found = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            parameters.append(_in_panel(found, _OWN_PANEL))

    def flat(**values: Any) -> None:
        built = {
            name: group(**{field: values.pop(field) for field in field_names(group)})
            for name, group in groups.items()
        }
        command(**values, **built)

    functools.update_wrapper(flat, command)
    flat.__signature__ = inspect.Signature(_in_order(parameters))  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in parameters}
    return flat


def _fields_as_parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    panel = getattr(group, "panel", _OWN_PANEL)
    return [
        _in_panel(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default
                if field.default is not dataclasses.MISSING
                else inspect.Parameter.empty,
                annotation=hints[field.name],
            ),
            panel,
        )
        for field in dataclasses.fields(group)
    ]


def _in_panel(parameter: inspect.Parameter, own_panel: str) -> inspect.Parameter:
    """Return the parameter with a panel and a metavar, where its annotation has none."""
    option = _option(parameter)
    if option is None:
        return parameter
    shared = (panel for panel, names in PANELS.items() if parameter.name in names)
    placed = copy.copy(option)
    placed.rich_help_panel = option.rich_help_panel or next(shared, own_panel)
    kind, *extras = get_args(parameter.annotation)
    placed.metavar = placed.metavar or _metavar(kind)
    extras = [placed if extra is option else extra for extra in extras]
    return parameter.replace(annotation=Annotated[kind, *extras])


def _metavar(kind: Any) -> str | None:
    """Return how help shows the type of an option's values: nothing for a flag, one of a list."""
    names = {bool: "", int: "<int>", float: "<float>", str: "<str>", Path: "<path>"}
    kinds = [kind, *get_args(kind)]
    kinds += [inner for each in get_args(kind) for inner in get_args(each)]
    return next((names[each] for each in kinds if each in names), None)


def _option(parameter: inspect.Parameter) -> Any:
    """Return what an annotation says of an option; None for an argument or the context."""
    extras = getattr(parameter.annotation, "__metadata__", ())
    return next((one for one in extras if isinstance(one, type(typer.Option()))), None)


def _in_order(parameters: Iterable[inspect.Parameter]) -> list[inspect.Parameter]:
    """Return the parameters panel by panel: arguments first, then own panels, then shared ones."""
    found = list(parameters)
    panels: list[str | None] = [None]
    for each in found:
        panel = _panel(each)
        if panel not in panels and panel not in PANELS:
            panels.append(panel)
    panels += PANELS

    def place(each: inspect.Parameter) -> tuple[int, int]:
        panel = _panel(each)
        names = PANELS.get(panel or "", ())
        return panels.index(panel), names.index(each.name) if each.name in names else len(names)

    return sorted(found, key=place)


def _panel(parameter: inspect.Parameter) -> str | None:
    option = _option(parameter)
    return None if option is None else option.rich_help_panel


def field_names(group: Any) -> tuple[str, ...]:
    """Return the names of a group's options, as parameters."""
    return tuple(field.name for field in dataclasses.fields(group))


G = TypeVar("G")


def picked(group: type[G], *others: Any, **values: Any) -> G:
    """Return a group whose options are taken from other groups.

    Args:
        group: The group to make.
        others: Groups that have its options, among others.
        values: Options with other values.
    """
    found: dict[str, Any] = {}
    for other in others:
        found |= {name: getattr(other, name) for name in field_names(other)}
    found |= values
    return group(**{name: found[name] for name in field_names(group)})


def given_besides(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Return the options on the command line that are not among `names`, as it spells them."""
    return given(context, set(context.params) - set(names))


def given(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Return which of `names` are on the command line, as it spells them, in its order."""
    wanted = set(names)
    return [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name in wanted
        and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]


# --- Options that several commands take: the same name, the same words, the same range -------

_MAX_SEED = 2**63 - 1


def _check_seed(value: int) -> int:
    # A callback instead of `max`: help would show a range of 20 digits.
    if value > _MAX_SEED:
        raise typer.BadParameter(f"expected at most {_MAX_SEED}")
    return value


def _check_bos(value: str) -> str:
    # Checked here, because a corpus is read only after the model is loaded.
    if value not in ("auto", "yes", "no"):
        raise typer.BadParameter(f"expected auto, yes or no, got {value!r}")
    return value


def check_folder(value: str | None) -> str | None:
    """Return the name of a folder of baselines, or its address.

    Raises:
        UsageError: No folder can have this path.
    """
    flaw = None if value is None or is_url(value) else path_flaw(value)
    if flaw is not None:
        raise UsageError(f"{flaw} for --baselines; name another file or folder")
    return value


Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Short name, hub id, folder or .gguf file.",
        autocompletion=completion.models,
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="float32, bfloat16 or float16.", autocompletion=completion.dtypes),
]
Device = Annotated[
    str,
    typer.Option("--device", help="cpu, cuda, mps or auto.", autocompletion=completion.devices),
]
DeviceMapName = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Spread the layers over devices: auto, balanced, sequential, or a .json file.",
        autocompletion=completion.device_maps,
    ),
]
ExitLayer = Annotated[
    int | None,
    typer.Option(
        "--layer",
        help="Exit layer (default: second to last).",
        autocompletion=completion.layer,
    ),
]
#: For commands that take --heads.
ExitLayerOfHeads = Annotated[
    int | None,
    typer.Option(
        "--layer",
        help="Exit layer (default: second to last, or of --heads).",
        autocompletion=completion.layer,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split", help="Split of a hub or embedded corpus.", autocompletion=completion.splits
    ),
]
NumSamples = Annotated[
    int, typer.Option("--num-samples", min=0, help="Read this many records; 0 reads all.")
]
SeqLen = Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per sequence.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Stop after this many tokens.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per forward pass.")]
Bos = Annotated[
    str,
    typer.Option(
        "--bos",
        callback=_check_bos,
        help="Begin texts and sequences with BOS: auto (if the tokenizer does), yes or no.",
        autocompletion=completion.bos,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, callback=_check_seed, help="Seed of random choices and intervals."
    ),
]
ExitLayers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="Exit layers, e.g. 24,28 (default: of --heads, or second to last).",
        autocompletion=completion.layers,
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help="Exit rule; repeatable (default: cosine, top2_gap).",
        autocompletion=completion.rules,
    ),
]
Agreement = Annotated[
    float,
    typer.Option("--agreement", help="Target share of tokens with the full model's prediction."),
]
HeadsFile = Annotated[
    Path | None,
    typer.Option("--heads", help="File of `cascade fit-heads` (default: logit lens)."),
]
Propagation = Annotated[
    str,
    typer.Option(
        "--propagation",
        help="Keys and values of exited tokens above the exit: frozen, ridge or exact.",
        autocompletion=completion.propagations,
    ),
]
#: An address keeps its form as text; as a path it would lose a slash.
BaselinesFolder = Annotated[
    str | None,
    typer.Option(
        "--baselines",
        metavar="<path|url>",
        callback=check_folder,
        help="Folder of baselines, or its address, such as hf://datasets/ORG/NAME (default: "
        "./baselines, then those of cascade).",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")
]


@dataclass(frozen=True)
class DeviceOptions:
    """On which device and with which dtype a model runs."""

    dtype: Dtype = "float32"
    device: Device = "cpu"


@dataclass(frozen=True)
class ModelOptions(DeviceOptions):
    """Which model runs, on which device, and with which dtype."""

    model: Model = "smollm2-135m"
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")
    ] = None


@dataclass(frozen=True)
class PlacedModelOptions(ModelOptions):
    """Which model runs, perhaps over several devices."""

    device_map: DeviceMapName = None


@dataclass(frozen=True)
class TextOptions:
    """Which text is read, and the length of its sequences."""

    corpus: Annotated[
        str,
        typer.Option(
            "--corpus",
            help="embedded, hub dataset, file, folder, or - for standard input.",
            autocompletion=completion.corpora,
        ),
    ] = "embedded"
    text_column: Annotated[
        str | None,
        typer.Option(
            "--text-column",
            help="Column to read, such as body or meta.text (default: by the form of the records).",
        ),
    ] = None
    seq_len: SeqLen = SEQ_LEN
    bos: Bos = "auto"


@dataclass(frozen=True)
class CorpusOptions(TextOptions):
    """Which text is read, from which split, and how many tokens."""

    split: Split = None
    max_tokens: MaxTokens = None


@dataclass(frozen=True)
class SampledCorpusOptions(CorpusOptions):
    """Which text is read, from which split, and how many records and tokens."""

    num_samples: NumSamples = NUM_SAMPLES


@dataclass(frozen=True)
class EvaluationCorpusOptions(CorpusOptions):
    """The text of an evaluation."""

    max_tokens: MaxTokens = EVALUATED_TOKENS


@dataclass(frozen=True)
class HeadOptions:
    """Exit heads, and the keys and values of exited tokens in upper layers."""

    heads: HeadsFile = None
    propagation: Propagation = "frozen"


@dataclass(frozen=True)
class PassOptions:
    """Batch size and seed of an evaluation."""

    batch_size: BatchSize = 8
    seed: Seed = 0


Json = Annotated[
    bool, typer.Option("--json", help="Print the record as JSON instead of the report.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]


@dataclass(frozen=True)
class PrintOptions:
    """What a command prints. `cascade.cli.app.Command` reads these options for every command."""

    json: Json = False
    quiet: Quiet = False


@dataclass(frozen=True)
class OutputOptions(PrintOptions):
    """Where results are written, and what is printed."""

    output: Annotated[Path | None, typer.Option("--output", help="Folder for the results.")] = None
    overwrite: Overwrite = False
