"""The weight files of a model folder: those that `transformers` reads, and their dtypes."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cascade.core.errors import ModelError, first_line
from cascade.core.files import kind_of_file, open_regular
from cascade.core.reading import LARGEST_FOREIGN_JSON, read_json
from cascade.models.checkpoints.quantization import Quantization
from cascade.models.checkpoints.reading import cannot_read

#: The files that `transformers` looks for, in its order. An index names the files of a split
#: checkpoint.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.gguf", "consolidated*.pth")
#: Files of these patterns that are no weights of a model.
_OTHER_FILES = {"training_args.bin", "optimizer.bin", "scheduler.bin"}

#: Weights of other frameworks, and of repositories that transformers does not read.
_FOREIGN_FORMATS = ("tf_model*.h5", "flax_model*.msgpack", "*.onnx", "*.pth", "*.pt", "*.npz")

#: Endings of the files of a model that are no weights. Vocabularies have tens of megabytes.
_SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm")

#: How the text begins that Git stores for a file of Git LFS.
_POINTER = b"version https://git-lfs"

#: Dtypes of weights that mean nothing without the scales of a quantization.
_UNSCALED = {"BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"} | {
    f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        read: The files that `transformers` reads, sorted by name.
        others: Files with weights that it does not read, sorted by name.
    """

    read: tuple[Path, ...]
    others: tuple[Path, ...]


def weight_files(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """Find the files that `transformers` reads from a folder, and those that it does not read.

    Args:
        folder: The folder of the model.
        config: The content of its config.json.

    Raises:
        ModelError: The folder has no weights, or lacks files that its index names.
    """
    named = config.get("transformers_weights")
    names = (str(named),) if named else _NAMES
    # A dangling link is the model's file as well; reading it says what is wrong.
    first = next((folder / name for name in names if os.path.lexists(folder / name)), None)
    present = {path for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern)}
    present = {path for path in present if path.name not in _OTHER_FILES}
    if first is None:
        raise _no_weights(folder, names)
    read = _shards(first) if first.suffix == ".json" else [first]
    for file in read:
        check_is_no_pointer(file)
    return WeightFiles(tuple(sorted(read)), tuple(sorted(present - set(read))))


def _no_weights(folder: Path, names: Sequence[str]) -> ModelError:
    """Return the error for a folder without weights that `transformers` reads."""
    patterns = (*_WEIGHT_PATTERNS, *_FOREIGN_FORMATS)
    names_found = {path.name for pattern in patterns for path in folder.glob(pattern)}
    found = sorted(names_found - _OTHER_FILES)
    numbered = [re.fullmatch(r"(.+)-\d+-of-\d+(\.safetensors|\.bin)", name) for name in found]
    shards = [match for match in numbered if match]
    remedy = "get the checkpoint again"
    if shards:
        index = f"{shards[0][1]}{shards[0][2]}.index.json"
        return ModelError(
            f"{folder} holds {len(shards)} files of weights, but no {index}, which says what is in"
            " them; get that file, or save the model again"
        )
    gguf = [name for name in found if name.endswith(".gguf")]
    foreign = [name for name in found if any(fnmatch(name, kind) for kind in _FOREIGN_FORMATS)]
    if gguf:
        remedy = f"give --model {folder / gguf[0]}"
    elif foreign:
        remedy = "convert them to safetensors with the tool of their framework"
    elif len(found) == 1 and found[0].endswith(".safetensors"):
        remedy = f"rename it to {_NAMES[0]} if it holds the whole model"
    more = ", ..." if found[3:] else ""
    return ModelError(
        f"{folder} holds no weights: expected {' or '.join(names)}"
        f"{', got ' + ', '.join(found[:3]) + more if found else ''}; {remedy}"
    )


def check_regular(folder: Path) -> None:
    """Check that a library can read the files in a folder without waiting or taking all memory.

    Args:
        folder: The folder of a model or an adapter.

    Raises:
        ModelError: A file of the model is a pipe, a socket or a device, or is too large for what
            its name says.
    """
    with os.scandir(folder) as entries:
        paths = sorted(Path(entry.path) for entry in entries)
    for path in paths:
        settings = path.suffix.lower() in _SETTINGS
        if not settings and not any(fnmatch(path.name, kind) for kind in _WEIGHT_PATTERNS):
            continue
        try:
            found = path.stat()
        except OSError:
            continue  # explained where it is read
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise ModelError(
                f"expected {path} to be a regular file, got {kind_of_file(found.st_mode)}; get the"
                " checkpoint again"
            )
        if settings and found.st_size > LARGEST_FOREIGN_JSON:
            raise ModelError(
                f"expected at most {LARGEST_FOREIGN_JSON:,} bytes in {path}, got"
                f" {found.st_size:,}; get the checkpoint again"
            )


def check_is_no_pointer(path: Path) -> None:
    """Check that a file is not what Git stores in place of a large file.

    Raises:
        ModelError: It is a Git LFS pointer.
    """
    try:
        with open_regular(path) as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # explained where it is read
    if start == _POINTER:
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file that it stands for; run `git lfs pull` in"
            f" {path.parent}"
        )


def check_whole(path: Path) -> None:
    """Check that a file of weights is whole, as far as its size and its header say.

    Raises:
        ModelError: It is empty, truncated, or something else; the message names the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        size = path.stat().st_size
        if size == 0:
            raise ModelError(f"{path} is empty (0 bytes); get it again")
        if path.suffix != ".safetensors":
            return
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        reason = first_line(error).removeprefix("Error while deserializing header: ")
        raise ModelError(
            f"{path} is truncated or is no safetensors file ({reason}, {size} bytes); get it again"
        ) from error
    except OSError as error:
        raise cannot_read(path, error) from error


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names."""
    check_is_no_pointer(index)
    try:
        names = sorted(set(read_json(index, foreign=True)["weight_map"].values()))
        outside = [name for name in names if os.path.isabs(name) or ".." in Path(name).parts]
        if outside:
            raise ModelError(
                f"expected {index} to name files in its folder, got {outside[0][:80]!r}; get the"
                " checkpoint again"
            )
        files = [index.parent / name for name in names]
    except OSError as error:
        raise cannot_read(index, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} names no files of weights ({first_line(error)}); get the checkpoint again"
        ) from error
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {len(missing)} of its {len(files)} weight files:"
            f" {', '.join(missing[:8])}{', ...' if missing[8:] else ''}; get them again"
        )
    return files


def check_stored_dtypes(
    source: str,
    files: Iterable[Path],
    parameters: Collection[str],
    scheme: Quantization | None = None,
) -> None:
    """Check that weights are stored as numbers of the kind that the config says.

    `transformers` would convert integers to floats without their scales, and would record that
    weights are quantized where they are not.

    Args:
        source: The model, for the error.
        files: Its safetensors files. Others are skipped: `torch.save` keeps dtypes, and quantized
            checkpoints are not published so.
        parameters: Names of the parameters of the loaded model. Buffers may be integers.
        scheme: How the config says that the weights are quantized.

    Raises:
        ModelError: A parameter is stored as integers or as 8-bit floats, but the config names no
            quantization; or it names one, and no weight is stored so.
    """
    files = list(files)
    if not files or any(file.suffix != ".safetensors" for file in files):
        return
    unscaled = ((name, dtype) for name, dtype, _ in _stored(files) if dtype in _UNSCALED)
    if scheme is None:
        found = next((each for each in unscaled if _is_parameter(each[0], parameters)), None)
        if found is not None:
            name, dtype = found
            raise ModelError(
                f"{source} stores {name} as {dtype}, but its config.json has no"
                " quantization_config: expected floating-point weights; dequantize them, or"
                " get a checkpoint whose config.json says how they are scaled"
            )
    # compressed-tensors may store rounded weights as floats, next to their scales.
    elif scheme.method != "compressed-tensors" and next(unscaled, None) is None:
        raise ModelError(
            f"{source} is quantized with {scheme.method} by its config.json, but all of its weights"
            " are stored as floating-point numbers: expected quantized weights; remove"
            " quantization_config from config.json where they were dequantized"
        )


def check_blocks(source: str, files: Iterable[Path], scheme: Quantization) -> None:
    """Check that the blocks of fp8 weights are as large as `transformers` takes them to be.

    It divides a weight into as many equal blocks as there are scales. Where the last block is
    smaller than the others, other numbers would get a scale than those it belongs to.

    Args:
        source: The model, for the error.
        files: Its weight files.
        scheme: How the weights are quantized.

    Raises:
        ModelError: A weight is no whole number of blocks.
    """
    if scheme.block is None:
        return
    shapes = {name: shape for name, _, shape in _stored(files)}
    for name, shape in shapes.items():
        scales = shapes.get(f"{name}_scale_inv")
        if scales is None or len(shape) != len(scales):
            continue
        ends = zip(shape[-2:], scales[-2:], scheme.block, strict=False)
        if any(count > 1 and size != count * block for size, count, block in ends):
            raise ModelError(
                f"{source}: {name} has the shape {' x '.join(map(str, shape))}, which is no whole"
                f" number of blocks of {' x '.join(map(str, scheme.block))}; transformers would"
                " scale it wrongly, get a dequantized checkpoint"
            )


def _stored(files: Iterable[Path]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of each tensor in safetensors files; others are skipped."""
    from safetensors import safe_open

    for file in files:
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                stored = tensors.get_slice(name)
                yield name, stored.get_dtype(), tuple(stored.get_shape())


def _is_parameter(name: str, parameters: Collection[str]) -> bool:
    """Return whether a stored name is that of a parameter, with or without the model's prefix."""
    return name in parameters or any(known.endswith(f".{name}") for known in parameters)
