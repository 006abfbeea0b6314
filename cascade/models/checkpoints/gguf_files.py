"""GGUF files: shards, quantization, position scaling, and tensors that no layer reads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.core.errors import ModelError
from cascade.core.files import open_regular
from cascade.models.checkpoints.reading import cannot_read

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

#: How every GGUF file begins.
_MAGIC = b"GGUF"

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(\.gguf)$", re.IGNORECASE)

#: Details of position scaling that are carried over; others are refused.
_SCALING = {
    "type",
    "factor",
    "original_context_length",
    "finetuned",
    "yarn_beta_fast",
    "yarn_beta_slow",
}
#: Tensors of frequency factors other than those of Llama 3.
_OTHER_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
#: Where Llama 3 starts to scale, as a multiple of where it scales in full.
_HIGH_FREQUENCY_FACTOR = 4.0


def name_of(path: Path) -> str:
    """Return the name of a GGUF model: that of its file, without the number of a shard."""
    return _SHARD.sub("", path.name) if _SHARD.search(path.name) else path.stem


def shards(path: Path) -> list[Path]:
    """Return all files of a GGUF model, given one of them.

    Args:
        path: A `.gguf` file. Files of a split model are named `NAME-00001-of-00003.gguf`.

    Raises:
        ModelError: Files of the split model are missing.
    """
    match = _SHARD.search(path.name)
    if match is None:
        return [path]
    stem, count = path.name[: match.start()], int(match.group(2))
    names = [f"{stem}-{number:05}-of-{count:05}{match.group(3)}" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).exists()]
    if missing:
        raise ModelError(
            f"{path.name} is one of {count} files, and {path.parent} lacks"
            f" {', '.join(missing[:8])}{', ...' if missing[8:] else ''}; get all of them"
        )
    return [path.parent / name for name in names]


def check_magic(path: Path) -> None:
    """Check how a file begins, before all of it is read for its hash.

    Raises:
        ModelError: It is no GGUF file, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise cannot_read(path, error) from error
    if start != _MAGIC:
        begins = f"it begins with {start.decode('latin-1')!r}" if start else "it is empty"
        raise ModelError(
            f"{path} is truncated, corrupted or no GGUF file ({begins}, expected"
            f" {_MAGIC.decode()!r}); get the file again"
        )


def merge(files: Sequence[Path], target: Path) -> None:
    """Write the files of a split GGUF model as one file.

    Args:
        files: The files, in their order. The first has the settings.
        target: The file to write.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(file) for file in files]
    first = readers[0]
    writer = GGUFWriter(target, architecture(first))
    for name, field in first.fields.items():
        if name.startswith(("GGUF.", "split.")) or name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_unsplit(reader: GGUFReader, path: Path) -> None:
    """Check that a file holds the whole model, whatever its name.

    Raises:
        ModelError: The file is one of several.
    """
    count = int(value(reader, "split.count") or 1)
    if count > 1:
        number = int(value(reader, "split.no") or 0) + 1
        raise ModelError(
            f"{path.name} is file {number} of a model in {count} files, but is not named so;"
            f" expected {path.stem}-{number:05}-of-{count:05}.gguf and the others next to it"
        )


def architecture(reader: GGUFReader) -> str:
    """Return the architecture that a file names, e.g. "llama"."""
    return str(value(reader, "general.architecture"))


def value(reader: GGUFReader, name: str) -> Any:
    """Return a setting of a file; None if it is absent."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def quantization(reader: GGUFReader) -> str | None:
    """Return the quantization that a file names, e.g. "Q4_1"."""
    from gguf import LlamaFileType

    kind = value(reader, "general.file_type")
    return None if kind is None else LlamaFileType(int(kind)).name.removeprefix("MOSTLY_")


def check_tensors(reader: GGUFReader, path: Path, model: PreTrainedModel) -> None:
    """Check that the model has every layer of a file.

    Args:
        reader: The file.
        path: Its path, for the error.
        model: The model that was read from it.

    Raises:
        ModelError: The file has layers that the model does not have.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for tensor in reader.tensors:
        match = re.match(r"blk\.(\d+)\.", tensor.name)
        if match and int(match.group(1)) >= depth:
            raise ModelError(
                f"{path.name} says that it has {depth} layers, but holds {tensor.name};"
                " expected settings and weights of the same model, get the file again"
            )


def position_scaling(reader: GGUFReader, theta: float) -> dict[str, Any]:
    """Return the scaling of rotary positions in a file, as `transformers` writes it.

    The reader of `transformers` 5 drops it, and positions would be computed without scaling.

    Args:
        reader: The file.
        theta: The base of the rotary frequencies.

    Returns:
        Entries of `config.rope_parameters`; empty without scaling.

    Raises:
        ModelError: The scaling cannot be expressed in `transformers`.
    """
    prefix = f"{architecture(reader)}.rope."
    settings = {
        name.removeprefix(f"{prefix}scaling."): value(reader, name)
        for name in reader.fields
        if name.startswith(f"{prefix}scaling.")
    }
    linear = value(reader, f"{prefix}scale_linear")
    if linear is not None:
        settings = {"factor": linear, "type": "linear"} | settings
    # Attention factors of 1 and empty extrapolation factors change nothing.
    neutral = {name for name in settings if name.endswith("attn_factor") and settings[name] == 1}
    unknown = sorted(set(settings) - _SCALING - neutral)
    factors = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_")}
    other = next((name for name in _OTHER_FACTORS if name in factors), None)
    if unknown or other:
        raise ModelError(
            f"the file scales positions by {other or prefix + 'scaling.' + unknown[0]}, which"
            " transformers cannot read from GGUF; get the model in safetensors format"
        )
    if "rope_freqs.weight" in factors:
        return frequency_scaling(np.asarray(factors["rope_freqs.weight"].data, np.float64), theta)
    return _named_scaling(settings)


def _named_scaling(settings: Mapping[str, Any]) -> dict[str, Any]:
    kind, factor = settings.get("type", "linear"), float(settings.get("factor", 1.0) or 1.0)
    if kind == "none" or factor == 1.0:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = settings.get("original_context_length")
    if kind != "yarn" or not original:
        raise ModelError(
            f"the file scales positions by {kind}{'' if original else ' without original length'};"
            " expected linear, or yarn with rope.scaling.original_context_length; get the model in"
            " safetensors format"
        )
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(original),
    }
    for name in ("beta_fast", "beta_slow"):
        if settings.get(f"yarn_{name}") is not None:
            scaling[name] = float(settings[f"yarn_{name}"])
    return scaling


def frequency_scaling(factors: NDArray[np.float64], theta: float) -> dict[str, Any]:
    """Return the Llama 3 scaling that divides the rotary frequencies by given factors.

    A factor is 1 for short wavelengths, constant for long ones, and 1 over it is linear in the
    frequency between them.

    Args:
        factors: `[head_dim / 2]`, the tensor `rope_freqs.weight`.
        theta: The base of the rotary frequencies.

    Raises:
        ModelError: No Llama 3 scaling gives these factors.
    """
    largest = float(factors.max())
    if np.all(factors == 1.0):
        return {}
    waves = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    high = _HIGH_FREQUENCY_FACTOR
    between = (factors > 1.0) & (factors < largest * (1 - 1e-6))
    if between.any():
        smooth = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
        lengths = waves[between] * (smooth * (high - 1) + 1)
    else:
        shortest = waves[factors > 1.0].min(initial=math.inf)
        unscaled = waves[factors == 1.0].max(initial=0.0)
        lengths = np.array([(shortest + high * unscaled) / 2 if unscaled else shortest - 1])
    original = round(float(np.median(lengths)))
    if original < 1 or not np.allclose(
        llama3_factors(waves, largest, high, original), factors, rtol=1e-4, atol=0
    ):
        raise ModelError(
            "the frequency factors of rope_freqs.weight are not those of Llama 3, and"
            " transformers cannot read others from GGUF; get the model in safetensors format"
        )
    return {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def llama3_factors(
    waves: NDArray[np.float64], factor: float, high: float, original: int
) -> NDArray[np.float64]:
    """Return what Llama 3 divides the frequencies of given wavelengths by.

    Args:
        waves: Wavelengths in tokens.
        factor: The factor of long wavelengths, those above `original`.
        high: Wavelengths below `original / high` keep their frequency.
        original: The number of positions before scaling.
    """
    smooth = np.clip((original / waves - 1) / (high - 1), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
